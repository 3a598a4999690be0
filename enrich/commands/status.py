"""`enrich status` shows counts, credits, expiry times and past runs, `enrich runs` lists the runs. Read-only."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click

from enrich.commands import options
from enrich.commands.status_watch import DEFAULT_INTERVAL_S, RunStatus, RunWatcher, watch_job
from enrich.job.job import Job
from enrich.ledger import queries, records, step_results, transitions
from enrich.ledger.database import Database, open_or_empty
from enrich.ledger.lock import is_locked
from enrich.ledger.queries import InDoubtSummary
from enrich.ledger.records import ExecutionRow
from enrich.models import (
    STATUS_WORDS,
    count_by_status,
    format_elapsed,
    iso_time,
    job_title,
    pluralize,
    to_credits,
    to_ms,
)
from enrich.run.balance import choose_baseline
from enrich.run.progress import Phase
from enrich.run.terminal_text import pad

#: A wider table leaves out these columns, in this order.
MAX_COLUMNS, OPTIONAL_COLUMNS = 80, ("time", "balance")
_LEFT_ALIGNED = ("started (UTC)", "exit")


def read_runs(job: Job, last: int) -> dict[str, Any]:
    """Return the object of `enrich runs --json`: the newest `last` executions, and the totals of all."""
    with open_or_empty(job.ledger) as ledger, ledger.snapshot():
        lock_held = is_locked(job.ledger)  # before reading: a run that ends meanwhile was not killed
        newest = records.newest_execution_id(ledger)
        executions = records.list_executions(ledger, job.name)
    return {
        "job": job.name,
        "sandbox": job.sandbox,
        "ledger": str(job.ledger),
        "executions": [
            execution_as_json(execution, is_running=lock_held and execution.id == newest) | _counts_as_json(execution)
            for execution in executions[:last]
        ],
        "totals": {
            "executions": len(executions),
            "submitted": sum(execution.submitted for execution in executions),
            "credits_spent": to_credits(sum(execution.spent for execution in executions)),
            "credits_unknown": sum(execution.unknown for execution in executions),
        },
    }


def execution_as_json(execution: ExecutionRow, *, is_running: bool) -> dict[str, Any]:
    """Return what the ledger has of an execution."""
    return {
        "execution": execution.id,
        "started_at": iso_time(execution.started_ms),
        "ended_at": iso_time(execution.ended_ms),
        "exit_code": execution.exit_code,
        "outcome": execution.outcome(is_running=is_running),
        "submitted": execution.submitted,
        "credits_spent": to_credits(execution.spent),
        "credits_unknown": execution.unknown,
        "balance_after": to_credits(execution.balance_after),
    }


def _counts_as_json(execution: ExecutionRow) -> dict[str, Any]:
    summary, ended_ms = execution.read_summary(), execution.ended_ms
    rows, found = summary.get("rows"), summary.get("found")
    return {
        "elapsed_s": None if ended_ms is None else round((ended_ms - execution.started_ms) / 1000, 3),
        "rows": rows,
        "found": found,
        "found_share": round(found / rows, 4) if rows and found is not None else None,
    }


def format_runs(result: dict[str, Any]) -> Iterator[str]:
    """Format the runs as text lines of at most MAX_COLUMNS."""
    totals, title = result["totals"], job_title(result["job"], sandbox=result["sandbox"])
    if not totals["executions"]:
        yield f"{title} has never run ({result['ledger']})"
        return
    if result["sandbox"]:
        yield title
    runs = [_run_cells(run) for run in result["executions"]]
    names = [name for name in runs[0] if name != "?" or totals["credits_unknown"]]
    widths = {name: max(len(name), *(len(run[name]) for run in runs)) for name in names}
    for name in OPTIONAL_COLUMNS:
        if sum(widths.values()) + len(widths) - 1 > MAX_COLUMNS:
            del widths[name]
    for run in [{name: name for name in names}, *runs]:
        yield " ".join(
            run[name].ljust(width) if name in _LEFT_ALIGNED else run[name].rjust(width)
            for name, width in widths.items()
        )
    unknown = ""
    if totals["credits_unknown"]:
        unknown = f", {pluralize(totals['credits_unknown'], 'result')} of unknown price (?)"
    yield (
        f"All {pluralize(totals['executions'], 'run')}: {totals['submitted']:,} sent, "
        f"{totals['credits_spent']:,.2f} credits{unknown}"
    )


def _run_cells(run: dict[str, Any]) -> dict[str, str]:
    return {
        "run": str(run["execution"]),
        "started (UTC)": run["started_at"].replace("T", " ")[:16],
        "time": "-" if run["elapsed_s"] is None else format_elapsed(run["elapsed_s"]),
        "exit": f"{_or_dash(run['exit_code'], '')} {run['outcome']}",
        "leads": _or_dash(run["rows"], ","),
        "sent": f"{run['submitted']:,}",
        "match": _or_dash(run["found_share"], ".0%"),
        "credits": f"{run['credits_spent']:,.2f}",
        "?": str(run["credits_unknown"] or ""),
        "balance": _or_dash(run["balance_after"], ",.2f"),
    }


def _or_dash(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


@click.command()
@options.job_options()
@click.option("--last", type=options.Number(1), default=20, show_default=True, metavar="RUNS", help="Number of runs.")
@options.JSON_OPTION
def runs(job_options: options.JobOptions, last: int, as_json: bool) -> None:
    """List the runs of JOB, newest first. Times are UTC."""
    job = job_options.load()
    options.check_ledger_not_lost(job)
    result = read_runs(job, last)
    options.echo_result({"exit_code": 0, **result}, format_runs(result), as_json=as_json)


SHOWN_EXECUTIONS = 10
_STATES = ("found", "not_found", "failed", "expired", "in_doubt", "pending")


def read_status(job: Job) -> dict[str, Any]:
    """Return the object of `enrich status --json`. Requests are counted by status, named as in the run summary."""
    with open_or_empty(job.ledger) as ledger:
        view = RunWatcher(job).read_view(ledger)
        with ledger.snapshot():
            counts = queries.state_counts(ledger)
            spent, unknown = queries.spent_totals(ledger)
            tasks = transitions.submitted_tasks(ledger)
            all_executions = records.list_executions(ledger)
            in_doubt = queries.in_doubt_summary(ledger)
            step_counts = _step_counts(job, ledger)
    executions = [row for row in all_executions if row.job == job.name][:SHOWN_EXECUTIONS]
    ttl_ms = to_ms(job.result_ttl)
    may_run = view.status in (RunStatus.RUNNING, RunStatus.NO_HEARTBEAT)
    running_id = view.run.id if view.run is not None and may_run else None
    doubts: dict[str, Any] | None = None
    if in_doubt is not None:
        doubts = {
            "number": in_doubt.number,
            "credits_at_most": to_credits(in_doubt.max_cost),
            "oldest_execution": in_doubt.oldest_execution_id,
            "oldest_at": iso_time(in_doubt.oldest_ms),
            "oldest_age_s": max(0, (time.time_ns() // 1_000_000 - in_doubt.oldest_ms) // 1000),
        }
    return {
        "job": job.name,
        "sandbox": job.sandbox,
        "ledger": str(job.ledger),
        "requests": sum(counts.values()),
        **count_by_status(counts),
        "at_the_api": sum(len(task.attempts) for task in tasks),
        "next_expiry": iso_time(tasks[0].submitted_ms + ttl_ms) if tasks else None,
        "last_expiry": iso_time(tasks[-1].submitted_ms + ttl_ms) if tasks else None,
        "credits_spent": to_credits(spent),
        "credits_unknown": unknown,
        "doubts": doubts,
        "balance": _balance_as_json(all_executions, in_doubt),
        "at_work": view.as_json() if view.status is RunStatus.RUNNING else None,
        "executions": [
            execution_as_json(row, is_running=row.id == running_id)
            | {
                "balance_before": to_credits(row.balance_before),
                "receipt": None if row.summary is None else json.loads(row.summary),
            }
            for row in executions
        ],
    } | step_counts


def _balance_as_json(executions: Sequence[ExecutionRow], in_doubt: InDoubtSummary | None) -> dict[str, Any] | None:
    """Return the balance before the run with the oldest unconfirmed request, or the last run, and after the last run.

    None: not known. `executions` are all runs of the ledger, newest first.
    """
    last = next((row for row in executions if row.balance_after is not None), None)
    if last is None:
        return None
    first = choose_baseline(executions, last.id if in_doubt is None else in_doubt.oldest_execution_id)
    if first is None or last.id < first.id:
        return None
    return {
        "since_execution": first.id,
        "before": to_credits(first.balance_before),
        "after": to_credits(last.balance_after),
        "credits_spent": to_credits(sum(row.spent for row in executions if first.id <= row.id <= last.id)),
    }


def _step_counts(job: Job, ledger: Database) -> dict[str, Any]:
    """Return the requests of each step by status, and its credits in all runs; nothing for a job without steps."""
    if not job.step_jobs:
        return {}
    counts, spent = step_results.requests_by_step(ledger), step_results.credits_by_step(ledger)
    return {
        "steps": [
            {
                "name": step.step,
                "requests": sum(counts.get(step.step, {}).values()),
                **count_by_status(counts.get(step.step, {})),
                "credits_spent": to_credits(spent.get(step.step, 0)),
            }
            for step in job.step_jobs
        ]
    }


def _step_lines(steps: Sequence[dict[str, Any]]) -> Iterator[str]:
    if steps:
        yield f"  {'step':<14}{'requests':>9}{'found':>9}{'no match':>9}{'failed':>9}{'open':>9}{'credits':>12}"
    for step in steps:
        failed, open_requests = step["failed"] + step["expired"], step["pending"] + step["in_doubt"]
        numbers = f"{step['requests']:>9,}{step['found']:>9,}{step['not_found']:>9,}{failed:>9,}{open_requests:>9,}"
        yield f"  {pad(step['name'], 14)}{numbers}{step['credits_spent']:>12,.2f}"


def format_status(result: dict[str, Any], watch_command: str = "enrich status JOB --watch") -> Iterator[str]:
    """Format the status as text lines, the last run first."""
    requests, title = result["requests"], job_title(result["job"], sandbox=result["sandbox"])
    if not requests and not result["executions"]:
        yield f"{title} has never run ({result['ledger']})"
        return
    if (run := result["at_work"]) is not None:
        progress = next((phase.value for phase in Phase if phase.key == run["doing"]), "starting")
        if run["total"] is not None:
            progress = f"{run['done']:,} of {pluralize(run['total'], 'request')}"
        yield f"{title}: running since {run['started_at']}: {progress}. Watch it: {watch_command}"
    for execution in result["executions"][:1]:
        yield from _last_run_lines(execution, title, is_running=run is not None)
    yield from _total_lines(result)
    if len(result["executions"]) > 1:
        yield "  run  started               ended                 exit       sent    credits"
        for execution in result["executions"]:
            ended = execution["ended_at"] or "not ended"
            code = "-" if execution["exit_code"] is None else execution["exit_code"]
            yield (
                f"  {execution['execution']:>3}  {execution['started_at']}  {ended:<20}  {code:>4}"
                f"  {execution['submitted']:>9,}  {execution['credits_spent']:>9,.2f}"
            )


def _total_lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield requests, credits and balance of all runs."""
    yield f"All runs: {pluralize(result['requests'], 'request')} in {result['ledger']}"
    for state in _STATES:
        if result[state]:
            yield f"  {STATUS_WORDS.get(state, state):<12}{result[state]:>9,}"
    yield from _step_lines(result.get("steps", ()))
    if (in_doubt := result["doubts"]) is not None:
        age = format_elapsed(in_doubt["oldest_age_s"])
        yield (
            f"  {'':<12}{'':>9}  may have cost up to {in_doubt['credits_at_most']:,.2f} credits; "
            f"the oldest is {age} old, from run {in_doubt['oldest_execution']}"
        )
    unknown = (
        f", {pluralize(result['credits_unknown'], 'result')} of unknown price" if result["credits_unknown"] else ""
    )
    yield f"  {'credits':<12}{result['credits_spent']:>9,.2f}  spent in all runs{unknown}"
    if result["at_the_api"]:
        expiry = f"the first result expires at {result['next_expiry']}"
        yield f"  {'running':<12}{result['at_the_api']:>9,}  at Databar; {expiry}"
    if (balance := result["balance"]) is not None:
        yield f"  {'balance':<12}{balance['after']:>9,.2f}  {_balance_text(balance)}"


def _last_run_lines(execution: dict[str, Any], title: str, *, is_running: bool) -> Iterator[str]:
    """Yield the last run: when it ended and how, and the leads by status."""
    number, code = execution["execution"], execution["exit_code"]
    if code is None:
        if not is_running:
            yield f"{title}: run {number} started at {execution['started_at']} and did not end"
        return
    yield f"{title}: run {number} ended at {execution['ended_at']} with exit {code} ({execution['outcome']})"
    summary = execution["receipt"] or {}
    if summary.get("rows") is not None and summary.get("found") is not None:
        counts = {state: summary.get(state) for state in (*_STATES, "invalid", "filtered")}
        words = {**STATUS_WORDS, "found": "enriched"}
        parts = [f"{count:,} {words.get(state, state)}" for state, count in counts.items() if count]
        yield f"  {pluralize(summary['rows'], 'lead')}: {' · '.join(parts)}"
    yield f"  {execution['submitted']:,} sent, {execution['credits_spent']:,.2f} credits"


def _balance_text(balance: dict[str, Any]) -> str:
    other = round(balance["before"] - balance["after"] - balance["credits_spent"], 2) + 0.0
    was = f"{balance['before']:,.2f} before run {balance['since_execution']}"
    if not other:
        return was
    return f"{was}; {-other:,.2f} refunded or added" if other < 0 else f"{was}; {other:+,.2f} beyond the credits spent"


@click.command()
@options.job_options()
@click.option("--watch", "watching", is_flag=True, help="Show the run in progress until it ends.")
@click.option("--every", type=options.SECONDS, metavar="2s", help="With --watch: refresh interval; default: 2s.")
@options.JSON_OPTION
def status(job_options: options.JobOptions, watching: bool, every: float | None, as_json: bool) -> int:
    """Show the last run of JOB, and the requests, credits and open tasks in its ledger.

    With --watch, it shows the run in progress until it ends, then exits with 0. Without a run, it waits for the
    next one; Ctrl-C quits. Without a terminal, each refresh is one line, with --json one object. Watching does not
    disturb the run.
    """
    job = job_options.load()
    if watching:
        if every == 0:
            raise click.UsageError("--every must be at least 1s")
        return watch_job(RunWatcher(job), sys.stdout, os.environ, every or DEFAULT_INTERVAL_S, as_json=as_json)
    if every is not None:
        raise click.UsageError("--every needs --watch")
    options.check_ledger_not_lost(job)
    result = read_status(job)
    watch_command = f"enrich status {job_options.arguments(as_typed=True).ledger_args} --watch"
    options.echo_result({"exit_code": 0, **result}, format_status(result, watch_command), as_json=as_json)
    return 0

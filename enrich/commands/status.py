"""`enrich status`: shows counts, credits, expiry times and past executions from the ledger. Read-only."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from enrich.commands import options
from enrich.commands.run_view import RunStatus
from enrich.commands.status_watch import DEFAULT_INTERVAL_S, RunWatcher, watch_job
from enrich.job.job import Job
from enrich.ledger.database import ledger_exists
from enrich.ledger.ledger import Ledger
from enrich.models import count_by_status, format_duration, iso_time, pluralize, to_credits
from enrich.run.balance import choose_baseline
from enrich.run.progress import Phase

#: Number of past executions in the status.
SHOWN_EXECUTIONS = 10


def read_status(job: Job) -> dict[str, Any]:
    """Return the object of `enrich status --json`. Requests are counted by status, named as in the run summary."""
    if not ledger_exists(job.ledger):
        return _build_status(job, None)
    ledger = Ledger(job.ledger, read_only=True)
    try:
        return _build_status(job, ledger)
    finally:
        ledger.close()


def _build_status(job: Job, ledger: Ledger | None) -> dict[str, Any]:
    counts = ledger.state_counts() if ledger else {}
    spent, unknown = ledger.spent_totals() if ledger else (0, 0)
    tasks = ledger.submitted_tasks() if ledger else []
    ttl_ms = int(job.model.policy.result_ttl.total_seconds() * 1000)
    executions = ledger.executions(job.name, SHOWN_EXECUTIONS) if ledger else []
    view = RunWatcher(job).read_view() if ledger else None
    in_doubt = ledger.in_doubt_summary() if ledger else None
    all_executions = ledger.executions() if ledger else []
    last = next((row for row in all_executions if row["balance_after"] is not None), None)
    first = (
        None
        if last is None
        else choose_baseline(all_executions, last["id"] if in_doubt is None else in_doubt.oldest_execution_id)
    )
    return {
        "job": job.name,
        "ledger": str(job.ledger),
        "requests": sum(counts.values()),
        **count_by_status(counts),
        "at_the_api": sum(len(task.attempts) for task in tasks),
        "next_expiry": iso_time(tasks[0].submitted_ms + ttl_ms) if tasks else None,
        "last_expiry": iso_time(tasks[-1].submitted_ms + ttl_ms) if tasks else None,
        "credits_spent": to_credits(spent),
        "credits_unknown": unknown,
        "doubts": None
        if in_doubt is None
        else {
            "number": in_doubt.number,
            "credits_at_most": to_credits(in_doubt.max_cost),
            "oldest_execution": in_doubt.oldest_execution_id,
            "oldest_at": iso_time(in_doubt.oldest_ms),
            "oldest_age_s": max(0, (time.time_ns() // 1_000_000 - in_doubt.oldest_ms) // 1000),
        },
        "balance": None
        if first is None or last is None or last["id"] < first["id"]
        else {
            "since_execution": first["id"],
            "before": to_credits(first["balance_before"]),
            "after": to_credits(last["balance_after"]),
            "credits_spent": to_credits(
                sum(row["spent"] for row in all_executions if first["id"] <= row["id"] <= last["id"])
            ),
        },
        "at_work": view.as_json() if view is not None and view.status is RunStatus.RUNNING else None,
        "executions": [
            {
                "execution": row["id"],
                "started_at": iso_time(row["started_ms"]),
                "ended_at": None if row["ended_ms"] is None else iso_time(row["ended_ms"]),
                "exit_code": row["exit_code"],
                "submitted": row["submitted"],
                "credits_spent": to_credits(row["spent"]),
                "credits_unknown": row["unknown"],
                "balance_before": to_credits(row["balance_before"]),
                "balance_after": to_credits(row["balance_after"]),
                "receipt": None if row["receipt"] is None else json.loads(row["receipt"]),
            }
            for row in executions
        ],
    }


def _progress_text(run: dict[str, Any]) -> str:
    if run["total"] is None:
        return Phase[run["doing"].upper()].value if run["doing"] else "it has just begun"
    return f"{run['done']:,} of {run['total']:,} requests"


def format_status(result: dict[str, Any]) -> Iterator[str]:
    """Format the status as text lines."""
    requests = result["requests"]
    if not requests and not result["executions"]:
        yield f"{result['job']} has never run: {result['ledger']} knows of no request"
        return
    yield f"{result['job']}: {pluralize(requests, 'request')} in {result['ledger']}"
    if (run := result["at_work"]) is not None:
        yield f"  at work since {run['started_at']}: {_progress_text(run)}; --watch shows how it goes on"
    for state in ("found", "not_found", "failed", "expired", "in_doubt", "pending"):
        if result[state]:
            yield f"  {state:<10}{result[state]:>9,}"
    if (in_doubt := result["doubts"]) is not None:
        oldest = (
            f"the oldest is {format_duration(in_doubt['oldest_age_s'])} old, "
            f"of execution {in_doubt['oldest_execution']}"
        )
        yield f"  {'':<10}{'':>9}  may have cost up to {in_doubt['credits_at_most']:,.2f} credits; {oldest}"
    unknown = f" and {result['credits_unknown']} answers of unknown price" if result["credits_unknown"] else ""
    yield f"  credits   {result['credits_spent']:>9,.2f}  spent in all{unknown}"
    if result["at_the_api"]:
        expiry = f"the first result expires at {result['next_expiry']}"
        yield f"  waiting   {result['at_the_api']:>9,}  requests at the API; {expiry}"
    if (balance := result["balance"]) is not None:
        other = round(balance["before"] - balance["after"] - balance["credits_spent"], 2) + 0.0
        was = f"was {balance['before']:,.2f} before execution {balance['since_execution']}"
        yield f"  balance   {balance['after']:>9,.2f}  {was}; {other:+,.2f} beyond the credits spent"
    if result["executions"]:
        yield "  execution  started               ended                 exit  submitted    credits"
    for execution in result["executions"]:
        ended = execution["ended_at"] or "not ended"
        code = "-" if execution["exit_code"] is None else execution["exit_code"]
        yield (
            f"  {execution['execution']:>9}  {execution['started_at']}  {ended:<20}  {code:>4}"
            f"  {execution['submitted']:>9,}  {execution['credits_spent']:>9,.2f}"
        )


@click.command()
@options.job_options()
@click.option("--watch", "watching", is_flag=True, help="Show the run that is at work, until it ends.")
@click.option(
    "--every",
    callback=options.parse_seconds,
    metavar="2s",
    help="With --watch: look so often; default: every 2 seconds.",
)
@options.JSON_OPTION
def status(job_options: options.JobOptions, watching: bool, every: float | None, as_json: bool) -> int:
    """Show what the ledger of JOB knows: counts, credits, what expires when, past executions.

    With --watch it shows the run that is at work, again and again, and leaves with 0 when that ends, however it does.
    When none is at work it waits for the next; Ctrl-C leaves. Off a terminal each look is a line, with --json an
    object. A run is not disturbed by it.
    """
    job = job_options.load()
    if watching:
        if every == 0:
            raise click.UsageError("--every 0s is too often: at least 1s")
        return watch_job(RunWatcher(job), sys.stdout, os.environ, every or DEFAULT_INTERVAL_S, as_json=as_json)
    if every is not None:
        raise click.UsageError("--every says how often --watch looks: it needs --watch")
    result = read_status(job)
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(format_status(result)))
    return 0

"""`enrich runs`: lists the runs of a job, newest first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from enrich.commands import options
from enrich.job.job import Job
from enrich.ledger import records
from enrich.ledger.database import open_or_empty
from enrich.ledger.lock import is_locked
from enrich.ledger.records import ExecutionRow
from enrich.models import format_elapsed, iso_time, job_title, pluralize, to_credits

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

"""`enrich runs`: the executions of a job, newest first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from enrich.job import Job
from enrich.model import duration, iso, many, to_credits
from enrich.store.database import exists
from enrich.store.history import History, Past
from enrich.store.lock import is_held
from enrich.watch.outcome import ending


@dataclass(slots=True)
class _Totals:
    """All executions of the job together; credits in millionths."""

    executions: int = 0
    submitted: int = 0
    spent: int = 0
    unknown: int = 0

    def count(self, past: Past) -> None:
        self.executions += 1
        self.submitted += past.submitted
        self.spent += past.spent
        self.unknown += past.unknown


def read_runs(job: Job, last: int) -> dict[str, Any]:
    """Return the object of `enrich runs --json`: the newest `last` executions, and the totals of all."""
    shown: list[dict[str, Any]] = []
    totals = _Totals()
    if exists(job.ledger):
        with closing(History(job.ledger)) as history:
            history.begin()
            held = is_held(job.ledger)
            newest = history.newest()
            executions = history.executions(job.name)
            for past in islice(executions, last):
                totals.count(past)
                shown.append(_told(past, at_work=held if past.id == newest else False))
            for past in executions:
                totals.count(past)
    return {
        "job": job.name,
        "ledger": str(job.ledger),
        "executions": shown,
        "totals": {
            "executions": totals.executions,
            "submitted": totals.submitted,
            "credits_spent": to_credits(totals.spent),
            "credits_unknown": totals.unknown,
        },
    }


def _told(past: Past, *, at_work: bool | None) -> dict[str, Any]:
    receipt = past.receipt
    rows, found = receipt.get("rows"), receipt.get("found")
    return {
        "execution": past.id,
        "started_at": iso(past.started_ms),
        "ended_at": None if past.ended_ms is None else iso(past.ended_ms),
        "elapsed_s": None if past.ended_ms is None else round((past.ended_ms - past.started_ms) / 1000, 3),
        "exit_code": past.exit_code,
        "outcome": ending(past.exit_code, at_work=at_work),
        "rows": rows,
        "submitted": past.submitted,
        "found": found,
        "found_share": round(found / rows, 4) if rows and found is not None else None,
        "credits_spent": to_credits(past.spent),
        "credits_unknown": past.unknown,
        "balance_after": to_credits(past.balance_after),
    }


_LINE = "{:>4} {:<16} {:>8} {:>3} {:<15}{:>10}{:>10}{:>5}{:>10}{:>3}{:>12}"


def lines(runs: dict[str, Any]) -> Iterator[str]:
    """Write them for a person, in lines of at most 100 columns."""
    totals = runs["totals"]
    if not totals["executions"]:
        yield f"{runs['job']} has never run: {runs['ledger']} knows of no execution of it"
        return
    yield _LINE.format(
        "run", "started (UTC)", "time", "", "exit", "rows", "submitted", "hits", "credits", "?", "balance"
    )
    for run in runs["executions"]:
        yield _LINE.format(
            run["execution"],
            run["started_at"].replace("T", " ")[:16],
            "-" if run["elapsed_s"] is None else duration(run["elapsed_s"]),
            _or_dash(run["exit_code"], ""),
            run["outcome"],
            _or_dash(run["rows"], ","),
            f"{run['submitted']:,}",
            _or_dash(run["found_share"], ".0%"),
            f"{run['credits_spent']:,.2f}",
            run["credits_unknown"] or "",
            _or_dash(run["balance_after"], ",.2f"),
        )
    unknown = f" and {totals['credits_unknown']:,} answers of unknown price (?)" if totals["credits_unknown"] else ""
    yield (
        f"in all {many(totals['executions'], 'execution')}: "
        f"{totals['submitted']:,} submitted, "
        f"{totals['credits_spent']:,.2f} credits spent{unknown}"
    )


def _or_dash(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)

"""What the ledger knows: counts, credits, what expires when, past executions. Looks only."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from enrich.difference import reckoned_from
from enrich.job import Job
from enrich.look.lookout import Lookout
from enrich.look.picture import Sign
from enrich.model import by_status, duration, iso, many, to_credits
from enrich.pulse import Doing
from enrich.store.database import exists
from enrich.store.ledger import Ledger

SHOWN_EXECUTIONS = 10


def read_status(job: Job) -> dict[str, Any]:
    """Return the object of `enrich status --json`; requests by state, with the names of the receipt."""
    if not exists(job.ledger):
        return _status(job, None)
    ledger = Ledger(job.ledger, read_only=True)
    try:
        return _status(job, ledger)
    finally:
        ledger.close()


def _status(job: Job, ledger: Ledger | None) -> dict[str, Any]:
    counts = ledger.counts() if ledger else {}
    spent, unknown = ledger.totals() if ledger else (0, 0)
    tasks = ledger.tasks() if ledger else []
    ttl_ms = int(job.model.policy.result_ttl.total_seconds() * 1000)
    executions = ledger.executions(job.name, SHOWN_EXECUTIONS) if ledger else []
    seen = Lookout(job).look() if ledger else None
    doubts = ledger.doubts() if ledger else None
    every = ledger.executions() if ledger else []
    last = next((row for row in every if row["balance_after"] is not None), None)
    first = None if last is None else reckoned_from(every, last["id"] if doubts is None else doubts.execution)
    return {
        "job": job.name,
        "ledger": str(job.ledger),
        "requests": sum(counts.values()),
        **by_status(counts),
        "at_the_api": sum(len(task.attempts) for task in tasks),
        "next_expiry": iso(tasks[0].submitted_ms + ttl_ms) if tasks else None,
        "last_expiry": iso(tasks[-1].submitted_ms + ttl_ms) if tasks else None,
        "credits_spent": to_credits(spent),
        "credits_unknown": unknown,
        "doubts": None
        if doubts is None
        else {
            "number": doubts.number,
            "credits_at_most": to_credits(doubts.most),
            "oldest_execution": doubts.execution,
            "oldest_at": iso(doubts.since_ms),
            "oldest_age_s": max(0, (time.time_ns() // 1_000_000 - doubts.since_ms) // 1000),
        },
        "balance": None
        if first is None or last is None or last["id"] < first["id"]
        else {
            "since_execution": first["id"],
            "before": to_credits(first["balance_before"]),
            "after": to_credits(last["balance_after"]),
            "credits_spent": to_credits(sum(row["spent"] for row in every if first["id"] <= row["id"] <= last["id"])),
        },
        "at_work": seen.as_json() if seen is not None and seen.sign is Sign.AT_WORK else None,
        "executions": [
            {
                "execution": row["id"],
                "started_at": iso(row["started_ms"]),
                "ended_at": None if row["ended_ms"] is None else iso(row["ended_ms"]),
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


def _how_far(at_work: dict[str, Any]) -> str:
    if at_work["total"] is None:
        return Doing[at_work["doing"].upper()].value if at_work["doing"] else "it has just begun"
    return f"{at_work['done']:,} of {at_work['total']:,} requests"


def lines(status: dict[str, Any]) -> Iterator[str]:
    """Write the status for a person."""
    requests = status["requests"]
    if not requests and not status["executions"]:
        yield f"{status['job']} has never run: {status['ledger']} knows of no request"
        return
    yield f"{status['job']}: {many(requests, 'request')} in {status['ledger']}"
    if (at_work := status["at_work"]) is not None:
        yield f"  at work since {at_work['started_at']}: {_how_far(at_work)}; --watch shows how it goes on"
    for state in ("found", "not_found", "failed", "expired", "in_doubt", "pending"):
        if status[state]:
            yield f"  {state:<10}{status[state]:>9,}"
    if (doubts := status["doubts"]) is not None:
        oldest = f"the oldest is {duration(doubts['oldest_age_s'])} old, of execution {doubts['oldest_execution']}"
        yield f"  {'':<10}{'':>9}  may have cost up to {doubts['credits_at_most']:,.2f} credits; {oldest}"
    unknown = f" and {status['credits_unknown']} answers of unknown price" if status["credits_unknown"] else ""
    yield f"  credits   {status['credits_spent']:>9,.2f}  spent in all{unknown}"
    if status["at_the_api"]:
        expiry = f"the first result expires at {status['next_expiry']}"
        yield f"  waiting   {status['at_the_api']:>9,}  requests at the API; {expiry}"
    if (balance := status["balance"]) is not None:
        other = round(balance["before"] - balance["after"] - balance["credits_spent"], 2) + 0.0
        was = f"was {balance['before']:,.2f} before execution {balance['since_execution']}"
        yield f"  balance   {balance['after']:>9,.2f}  {was}; {other:+,.2f} beyond the credits spent"
    if status["executions"]:
        yield "  execution  started               ended                 exit  submitted    credits"
    for execution in status["executions"]:
        ended = execution["ended_at"] or "not ended"
        code = "-" if execution["exit_code"] is None else execution["exit_code"]
        yield (
            f"  {execution['execution']:>9}  {execution['started_at']}  {ended:<20}  {code:>4}"
            f"  {execution['submitted']:>9,}  {execution['credits_spent']:>9,.2f}"
        )

"""`enrich reconcile`: what the balance lost against what the ledger knows; it decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from enrich.api.client import Client
from enrich.api.credentials import Access
from enrich.connect import patiently
from enrich.difference import CENT, WORDS, Part, Reconciliation, compare, reckoned_from
from enrich.errors import ApiUnreachable, Refused
from enrich.execution import Timing
from enrich.job import Job
from enrich.model import SystemClock, read_balance
from enrich.store.database import exists
from enrich.store.ledger import Ledger


def reconcile_job(job: Job, access: Access, since: int | None) -> Reconciliation:
    """Ask for the balance and hold it against the ledger.

    Raises Refused when the ledger or the API does not tell what is needed, ApiUnreachable, Unauthorized.
    """
    if not exists(job.ledger):
        raise Refused(f"{job.ledger}: there is no ledger: this job has never run", "enrich run it first")
    ledger = Ledger(job.ledger, read_only=True)
    try:
        executions, doubts = ledger.executions(), ledger.doubts()
        if since is None:
            chosen = reckoned_from(executions, None if doubts is None else doubts.execution)
        else:
            named = [row for row in executions if row["id"] == since and row["balance_before"] is not None]
            chosen = named[0] if named else None
        if chosen is None:
            which = "no execution" if since is None else f"execution {since} is not there or"
            raise Refused(f"{job.ledger}: {which} knows its balance", "enrich status lists the executions")
        movements = ledger.movements(chosen["id"])
    finally:
        ledger.close()
    now = asyncio.run(_balance(access))
    return compare(chosen["id"], chosen["balance_before"], now, movements)


async def _balance(access: Access) -> int:
    async with Client(access, SystemClock()) as client:
        user = await patiently(client.user, Timing().start_s)
    balance = read_balance(user.balance)
    if balance is None:
        raise ApiUnreachable("the API tells no balance", "nothing can be reconciled without it")
    return balance


def lines(told: Reconciliation) -> Iterator[str]:
    """Write it for a person."""
    yield f"since execution {told.since}: balance {told.balance_before:,.2f}, now {told.balance_now:,.2f}"
    yield f"  {told.difference:>10,.2f}  credits are gone; the ledger knows of"
    for name, words in WORDS.items():
        part: Part = getattr(told, name)
        if part.number:
            exact = abs(part.most - part.least) < CENT
            amount = f"{part.most:,.2f}" if exact else f"{part.least:,.2f} to {part.most:,.2f}"
            yield f"  {amount:>20}  {part.number:,} {words}"
    if told.unexplained > 0:
        yield f"  {told.unexplained:>20,.2f}  not explained: other users of the account, other ledgers, changed prices"
    elif told.unexplained < 0:
        yield f"  {-told.unexplained:>20,.2f}  came in: a top-up, or refunds"
    else:
        yield "  nothing beyond that: the difference can be explained"
    if told.in_doubt.number:
        yield "what is in doubt is yours to decide: enrich run --retry in_doubt (may pay twice) or --accept in_doubt"

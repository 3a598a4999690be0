"""`enrich reconcile`: what the balance lost against what the ledger knows; it decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from enrich.api.client import Client
from enrich.api.credentials import Access
from enrich.connect import patiently
from enrich.errors import ApiUnreachable, Refused
from enrich.execution import Timing
from enrich.job import Job
from enrich.model import SystemClock, to_credits, to_micros
from enrich.receipt import CENT
from enrich.store.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the difference: between `least` and `most` credits, for `number` requests."""

    number: int = 0
    least: float = 0.0
    most: float = 0.0


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """The difference of the balance since an execution began, in credits, and its parts.

    `spent` is exact. `earlier` settled meanwhile what was submitted before: the API may have reserved
    its price then. What is running, in doubt, expired or of unknown price may have cost anything up to
    its worst price. `unexplained` is what the parts cannot make up: above 0 it went elsewhere, below 0
    it came from elsewhere.
    """

    since: int
    balance_before: float
    balance_now: float
    difference: float
    spent: Part
    earlier: Part
    at_the_api: Part
    in_doubt: Part
    expired: Part
    unknown_price: Part
    unexplained: float

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {"exit_code": 0, **asdict(self)}


def reconcile_job(job: Job, access: Access, since: int | None) -> Reconciliation:
    """Ask for the balance and hold it against the ledger.

    Raises Refused when the ledger or the API does not tell what is needed, ApiUnreachable, Unauthorized.
    """
    if not job.ledger_path.exists():
        raise Refused(f"{job.ledger_path}: there is no ledger: this job has never run", "enrich run it first")
    ledger = Ledger(job.ledger_path, read_only=True)
    try:
        known = [row for row in ledger.executions() if row["balance_before"] is not None]
        chosen = next((row for row in known if since is None or row["id"] == since), None)
        if chosen is None:
            which = "no execution" if since is None else f"execution {since} is not there or"
            raise Refused(f"{job.ledger_path}: {which} knows its balance", "enrich status lists the executions")
        movements = ledger.movements(chosen["id"])
    finally:
        ledger.close()
    now = asyncio.run(_balance(access))
    return compare(chosen["id"], chosen["balance_before"], now, movements)


async def _balance(access: Access) -> int:
    async with Client(access, SystemClock()) as client:
        user = await patiently(client.user, Timing().start_s)
    balance = to_micros(user.balance)
    if balance is None:
        raise ApiUnreachable("the API tells no balance", "nothing can be reconciled without it")
    return balance


def compare(since: int, before: int, now: int, movements: list[tuple[str, bool, int, int, int]]) -> Reconciliation:
    """Take the difference apart; amounts in millionths, `movements` as Ledger.movements gives them."""

    def part(*kinds: str, made_since: bool | None = None) -> Part:
        rows = [row for row in movements if row[0] in kinds and made_since in (None, bool(row[1]))]
        number = sum(count for _, _, count, _, _ in rows)
        # What was submitted before may have been reserved before: then it can only give back.
        least = sum(-reserved for _, recent, _, _, reserved in rows if not recent)
        most = sum(reserved for _, recent, _, _, reserved in rows if recent)
        return Part(number, to_credits(least), to_credits(most))

    exact = [row for row in movements if row[0] == "known" and row[1]]
    spent = to_credits(sum(credits_ for _, _, _, credits_, _ in exact))
    old = [row for row in movements if row[0] == "known" and not row[1]]
    paid = to_credits(sum(credits_ for _, _, _, credits_, _ in old))
    reserved = to_credits(sum(worst for _, _, _, _, worst in old))
    parts = {
        "spent": Part(sum(row[2] for row in exact), spent, spent),
        "earlier": Part(sum(row[2] for row in old), paid - reserved, paid),
        "at_the_api": part("submitting", "submitted"),
        "in_doubt": part("in_doubt"),
        "expired": part("expired"),
        "unknown_price": part("found", "not_found", "failed"),
    }
    difference = to_credits(before - now)
    least, most = sum(each.least for each in parts.values()), sum(each.most for each in parts.values())
    outside = max(difference - most, 0.0) + min(difference - least, 0.0)
    return Reconciliation(
        since=since,
        balance_before=to_credits(before),
        balance_now=to_credits(now),
        difference=difference,
        unexplained=0.0 if abs(outside) < CENT else round(outside, 6),
        **parts,
    )


WORDS = {
    "spent": "answers of known price",
    "earlier": "answers submitted before",
    "at_the_api": "still running at the API",
    "in_doubt": "in doubt",
    "expired": "expired before they were fetched",
    "unknown_price": "answers of unknown price",
}


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

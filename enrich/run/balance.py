"""Explains the difference between two balances. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from msgspec import Struct, to_builtins

from enrich.ledger.records import ExecutionRow
from enrich.models import to_credits

#: Smaller differences are rounding.
ROUNDING_CREDITS = 0.005


class DifferencePart(Struct, frozen=True):
    """One part of the difference: between `least` and `most` credits, for `number` requests."""

    number: int
    least: float
    most: float


class Reconciliation(Struct, frozen=True):
    """The change of the balance since a run began, in credits, and its parts.

    `spent` is exact. `earlier` are requests that were submitted before that run and settled since: the API may have
    reserved their price before it. `at_the_api`, `in_doubt`, `expired` and `unknown_price` may have cost
    anything up to their highest price. `unexplained` is what the parts cannot explain: above 0 it was spent elsewhere,
    below 0 it was added from elsewhere.
    """

    since: int
    balance_before: float
    balance_now: float
    difference: float
    spent: DifferencePart
    earlier: DifferencePart
    at_the_api: DifferencePart
    in_doubt: DifferencePart
    expired: DifferencePart
    unknown_price: DifferencePart
    unexplained: float

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return cast("dict[str, Any]", to_builtins(self))


def explain_balance(
    since: int, before: int, after: int, movements: Sequence[tuple[str, bool, int, int, int]]
) -> Reconciliation:
    """Split the difference into its parts. Amounts in millionths; `movements` from queries.credit_movements."""

    def part(*kinds: str) -> DifferencePart:
        rows = [row for row in movements if row[0] in kinds]
        number = sum(count for _, _, count, _, _ in rows)
        # The price of an earlier request may have been reserved earlier. Then credits can only be returned.
        least = sum(-reserved for _, recent, _, _, reserved in rows if not recent)
        most = sum(reserved for _, recent, _, _, reserved in rows if recent)
        return DifferencePart(number, to_credits(least), to_credits(most))

    exact = [row for row in movements if row[0] == "known" and row[1]]
    spent = to_credits(sum(credits_ for _, _, _, credits_, _ in exact))
    old = [row for row in movements if row[0] == "known" and not row[1]]
    paid = to_credits(sum(credits_ for _, _, _, credits_, _ in old))
    reserved = to_credits(sum(worst for _, _, _, _, worst in old))
    parts = {
        "spent": DifferencePart(sum(row[2] for row in exact), spent, spent),
        "earlier": DifferencePart(sum(row[2] for row in old), paid - reserved, paid),
        "at_the_api": part("submitting", "submitted"),
        "in_doubt": part("in_doubt"),
        "expired": part("expired"),
        "unknown_price": part("found", "not_found", "failed"),
    }
    difference = to_credits(before - after)
    least, most = sum(each.least for each in parts.values()), sum(each.most for each in parts.values())
    unexplained = max(difference - most, 0.0) + min(difference - least, 0.0)
    return Reconciliation(
        since=since,
        balance_before=to_credits(before),
        balance_now=to_credits(after),
        difference=difference,
        unexplained=0.0 if abs(unexplained) < ROUNDING_CREDITS else round(unexplained, 6),
        **parts,
    )


def choose_baseline(executions: Sequence[ExecutionRow], oldest_in_doubt: int | None) -> ExecutionRow | None:
    """Choose the run since which to compare the balance: the last, or the one with the oldest open in_doubt request.

    `executions` are in the order newest first, `oldest_in_doubt` is the id of that run. Only runs with a known balance
    count: otherwise the next older one is chosen, else the oldest. Returns None when no run has a known balance.
    """
    known = [row for row in executions if row.balance_before is not None]
    if not known:
        return None
    return next((row for row in known if oldest_in_doubt is None or row.id <= oldest_in_doubt), known[-1])


#: What each part counts: a noun in the singular, and the words after it.
PART_LABELS = {
    "spent": ("result", " of known price"),
    "earlier": ("result", " of earlier requests"),
    "at_the_api": ("request", " running at Databar"),
    "in_doubt": ("unconfirmed request", ""),
    "expired": ("expired request", ""),
    "unknown_price": ("result", " of unknown price"),
}

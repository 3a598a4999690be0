"""What an execution came to: the object that `--json` prints and the lines that a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from enrich.model import RowStatus


@dataclass(frozen=True, slots=True)
class Receipt:
    """Counts and credits as they happened; None: not known. Rows by the status that they have in the output."""

    job: str
    exit_code: int
    execution: int | None = None
    rows: int | None = None
    requests: int | None = None
    submitted: int = 0
    reused: int | None = None
    found: int | None = None
    not_found: int | None = None
    failed: int | None = None
    expired: int | None = None
    in_doubt: int | None = None
    invalid: int | None = None
    filtered: int | None = None
    pending: int | None = None
    credits_spent: float = 0.0
    credits_unknown: int = 0
    balance_before: float | None = None
    balance_after: float | None = None
    polls: int = 0
    rate_limited: int = 0
    elapsed_s: float = 0.0
    output: str | None = None
    rejects: str | None = None
    rejected: int | None = None
    changes: str | None = None
    changed: int | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    hint: str | None = None

    def with_rows(self, counts: Mapping[RowStatus, int]) -> Receipt:
        """Add the rows by status."""
        return replace(
            self,
            found=counts.get(RowStatus.FOUND, 0),
            not_found=counts.get(RowStatus.NOT_FOUND, 0),
            failed=counts.get(RowStatus.FAILED, 0),
            expired=counts.get(RowStatus.EXPIRED, 0),
            in_doubt=counts.get(RowStatus.IN_DOUBT, 0),
            invalid=counts.get(RowStatus.INVALID, 0),
            filtered=counts.get(RowStatus.FILTERED, 0),
            pending=counts.get(RowStatus.PENDING, 0),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        told = asdict(self)
        return {name: value for name, value in told.items() if name not in ("error", "hint") or value is not None}


#: Differences below this are rounding.
CENT = 0.005

#: What the person may do about rows of a status.
REMEDIES = {
    RowStatus.FAILED: "ask again, at a price: --retry failed",
    RowStatus.EXPIRED: "gone before they were fetched; again: --retry expired",
    RowStatus.IN_DOUBT: "perhaps charged; again: --retry in_doubt",
    RowStatus.INVALID: "never sent: see enrich_error",
    RowStatus.PENDING: "the next run goes on",
}


def lines(receipt: Receipt) -> Iterator[str]:
    """Write the receipt for a person, in lines of at most 80 columns or so."""
    rows = receipt.rows or 0
    yield f"{receipt.job}: {_count(rows, 'row')}, {_count(receipt.requests or 0, 'distinct request')}"
    for status in RowStatus:
        count = getattr(receipt, status.value)
        if count:
            share = f"{count / rows:6.1%}" if rows else ""
            yield f"  {status.value:<10}{count:>9,} {share}  {REMEDIES.get(status, '')}".rstrip()
    unknown = f" and {receipt.credits_unknown} answers of unknown price" if receipt.credits_unknown else ""
    yield f"  submitted {receipt.submitted:>9,}         {receipt.reused or 0:,} reused from the ledger"
    yield f"  credits   {receipt.credits_spent:>9,.2f}         spent in this execution{unknown}"
    if receipt.balance_before is not None and receipt.balance_after is not None:
        gone = receipt.balance_before - receipt.balance_after
        other = gone - receipt.credits_spent
        differs = f"; {other:+,.2f} beyond the credits spent: enrich reconcile" if abs(other) >= CENT else ""
        yield f"  balance   {receipt.balance_after:>9,.2f}         was {receipt.balance_before:,.2f}{differs}"
    asked = f"{receipt.polls:,} polls, {receipt.rate_limited:,} answers 429"
    yield f"  time      {_duration(receipt.elapsed_s):>9}         {asked}"
    if receipt.output is not None:
        yield f"  output    {receipt.output}"
    if receipt.rejects is not None:
        yield f"  rejects   {receipt.rejected:>9,}         {receipt.rejects}"
    if receipt.changes is not None:
        yield f"  changes   {receipt.changed:>9,}         {receipt.changes}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

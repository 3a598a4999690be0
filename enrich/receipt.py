"""What an execution came to: the object that `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from enrich.model import RowStatus


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Counts and credits as they happened; None: not known. Rows by the status that they have in the output.

    `credits_over_cap` is what was spent beyond the cap because prices rose while requests were at the API.
    `planned` is what the execution was to cost when it had read its input (`min`, `likely`, `max`). `answers` counts
    the requests that it settled, `columns` the rows that have a value; `cost_per_hit` holds what was settled in this
    execution against what it found. `providers` are those of its answers, in the order they were asked;
    `providers_untold` answers do not say whom they asked, and `credits_elsewhere` were paid to nobody that an answer
    names. `difference` takes apart what the balance lost, where that is not what was spent.
    """

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
    credits_over_cap: float | None = None
    planned: Mapping[str, float | None] | None = None
    cost_per_hit: float | None = None
    answers: int | None = None
    columns: Mapping[str, int] | None = None
    providers: Sequence[Mapping[str, Any]] = ()
    providers_untold: int | None = None
    credits_elsewhere: float | None = None
    difference: Mapping[str, Any] | None = None
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

    def with_row_counts(self, counts: Mapping[RowStatus, int], columns: Mapping[str, int]) -> RunSummary:
        """Add the rows by status, and those that have a value in the new columns."""
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
            columns=dict(columns),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in ("error", "hint") or value is not None}

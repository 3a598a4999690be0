"""A batch of rows as it is in one step: the decision about each row, and what the ledger has of its request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import polars as pl

from enrich.ledger.step_results import StepResult
from enrich.models import RowStatus
from enrich.rows.requests import RowBatch
from enrich.rows.step_decision import NOT_FINAL, StepDecision
from enrich.run.recorded_rows import Identities


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The rows of a batch in one step.

    `batch` has the requests of those rows whose answers count. `sends` says which of them the run may send, `results`
    what the ledger has of them. `final`: a later step may build on the row.
    """

    batch: RowBatch
    decisions: Sequence[StepDecision]
    results: Sequence[StepResult | None]
    final: Sequence[bool]
    #: All requests, also those whose answers do not count, with what the ledger has, and which rows the job leaves out.
    fingerprints: Sequence[bytes | None]
    known: Sequence[StepResult | None]
    left_out: Sequence[bool]
    #: Why rows have no request, whether they wait for an earlier step or not.
    reasons: Sequence[str | None]
    #: The rows that need their request, whether the run may send it or not, and the identities of all rows.
    requesting_rows: Sequence[int]
    identities: Identities

    def to_send(self) -> RowBatch:
        """Return the batch with the requests of those rows that the run may send."""
        return replace(
            self.batch,
            fingerprints=[
                name if decision is StepDecision.SEND else None
                for name, decision in zip(self.batch.fingerprints, self.decisions, strict=True)
            ],
        )


class StepTables(NamedTuple):
    """A batch of rows as it is in every step, with the table that each of them reads, as text.

    `frame` is the input, `text` the table behind the last step.
    """

    height: int
    frame: pl.DataFrame
    text: pl.DataFrame
    steps: Sequence[tuple[StepBatch, pl.DataFrame]]


def decided_batch(
    batch: RowBatch,
    decisions: Sequence[StepDecision],
    results: Sequence[StepResult | None],
    requesting_rows: Sequence[int],
    names: Identities,
) -> StepBatch:
    """Keep the requests of the rows that have an answer or wait for one, and say why the others have none."""
    left_out = [status is RowStatus.FILTERED for status in batch.statuses]
    fingerprints, statuses, errors, final = list(batch.fingerprints), list(batch.statuses), list(batch.errors), []
    for row, decision in enumerate(decisions):
        result = results[row]
        if decision in (StepDecision.SEND, StepDecision.KEEP):
            final.append(result is not None and result.state not in NOT_FINAL)
            continue
        final.append(decision is not StepDecision.WAIT)
        fingerprints[row] = None
        if decision is StepDecision.WAIT:
            statuses[row], errors[row] = RowStatus.PENDING, None
        elif decision is StepDecision.LACK:
            statuses[row], errors[row] = RowStatus.FILTERED, f"{errors[row]}: not found by an earlier step"
        elif decision is StepDecision.FILTER and statuses[row] is not RowStatus.FILTERED:
            statuses[row], errors[row] = RowStatus.FILTERED, None
    kept = [result if fingerprints[row] is not None else None for row, result in enumerate(results)]
    return StepBatch(
        replace(batch, fingerprints=fingerprints, statuses=statuses, errors=errors),
        decisions,
        kept,
        final,
        batch.fingerprints,
        results,
        left_out,
        batch.errors,
        requesting_rows,
        names,
    )

"""A batch of rows as it is in one step: the decision about each row, and what the ledger has of its request.

Several rows can have one request. Its answer belongs only to the rows that are recorded with it (table `step_rows`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import polars as pl
from msgspec import Struct
from msgspec.structs import replace

from enrich.files.values import numbered_frame
from enrich.job.job import Job
from enrich.ledger import step_results
from enrich.ledger.database import Database
from enrich.ledger.step_results import StepResult
from enrich.models import RowStatus, State
from enrich.rows.batches import RowBatch
from enrich.rows.job_steps import NOT_FINAL, StepDecision


class StepBatch(Struct, frozen=True):
    """The rows of a batch in one step.

    `built` has every row's request, and `known` its result in the ledger. `batch` has the requests of those rows whose
    answers count, and `results` theirs. `final`: a later step may build on the row.
    """

    built: RowBatch
    known: Sequence[StepResult | None]
    decisions: Sequence[StepDecision]
    batch: RowBatch
    results: Sequence[StepResult | None]
    final: Sequence[bool]
    #: The rows that need their request, whether the run may send it or not, and the identities of all rows.
    requesting_rows: Sequence[int]
    #: Why nothing new is sent for rows that are left out: the person is forgotten, or a result was purged.
    unsent: Mapping[int, str]
    identities: Identities

    def purged_rows(self) -> list[int]:
        """Return the rows whose result was found, and then purged."""
        return [
            row
            for row, known in enumerate(self.results)
            if known is not None and known.result.erased_ms is not None and known.result.state == State.FOUND
        ]

    def to_send(self, others: Collection[int] = ()) -> RowBatch:
        """Return the batch with the requests of those rows that the run may send, and of `others`."""
        return replace(
            self.batch,
            fingerprints=[
                name if decision is StepDecision.SEND or row in others else None
                for row, (name, decision) in enumerate(zip(self.batch.fingerprints, self.decisions, strict=True))
            ],
        )


def decided_batch(  # noqa: PLR0913, PLR0917 - what is known of a batch
    batch: RowBatch,
    decisions: Sequence[StepDecision],
    results: Sequence[StepResult | None],
    requesting_rows: Sequence[int],
    unsent: Mapping[int, str],
    names: Identities,
) -> StepBatch:
    """Keep the requests of the rows that have an answer or wait for one, and say why the others have none."""
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
            statuses[row], errors[row] = RowStatus.FILTERED, unsent.get(row)
    kept = [result if fingerprints[row] is not None else None for row, result in enumerate(results)]
    return StepBatch(
        batch,
        results,
        decisions,
        replace(batch, fingerprints=fingerprints, statuses=statuses, errors=errors),
        kept,
        final,
        requesting_rows,
        {row: why for row, why in unsent.items() if decisions[row] is StepDecision.FILTER},
        names,
    )


class Identities(NamedTuple):
    """Two texts for each row: of all its cells, and of the cells that steps send.

    Each is hashed, so a row is recognized after one of them changes.
    """

    all_cells: pl.Series
    sent_cells: pl.Series

    def hashes(self, job: Job, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the hashes of rows in a step, each with the index of its row in the list. `job` is that of the step."""
        for kind, cells in zip(self._fields, self, strict=True):
            prefix = blake2b(f"{job.name}\0{job.step}\0{kind}\0".encode(), digest_size=8, person=b"enrich-step-row")
            for index, text in enumerate(cells.gather(list(rows)).to_list()):
                hasher = prefix.copy()
                hasher.update(text.encode())
                yield index, int.from_bytes(hasher.digest(), "big", signed=True)


def identities(text: pl.DataFrame, sent: Sequence[str]) -> Identities:
    """Return the identities of the rows of a table. `sent` are the columns that the steps send."""
    return Identities(joined_cells(text, text.columns), joined_cells(text, sent))


def joined_cells(text: pl.DataFrame, columns: Sequence[str]) -> pl.Series:
    """Join the cells of some columns into one text for each row."""
    if not columns:
        return pl.repeat("", text.height, dtype=pl.String, eager=True)
    cells = numbered_frame(map(text.get_column, columns))
    return cells.select(pl.concat_str(pl.all().fill_null(""), separator="\x1f")).to_series()


def find_recorded_rows(
    ledger: Database, job: Job, fingerprints: Sequence[bytes | None], rows: Sequence[int], names: Identities
) -> dict[int, step_results.RecordedRow]:
    """Return those of the rows that are recorded with their request. `names` identifies all rows of the batch."""
    requests = [
        (rows[index], (fingerprint, row_hash))
        for index, row_hash in names.hashes(job, rows)
        if (fingerprint := fingerprints[rows[index]]) is not None
    ]
    found = step_results.find_recorded_rows(ledger, job.step, [pair for _, pair in requests]) if requests else {}
    recorded: dict[int, step_results.RecordedRow] = {}
    for index, known in found.items():
        row = requests[index][0]
        if row not in recorded or not known.is_requested_by_other:
            recorded[row] = known
    return recorded

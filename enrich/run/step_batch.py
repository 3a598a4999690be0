"""A batch of rows as it is in one step, and the leads of a run under `caps`, `--limit` and `--sample`.

Several rows can have one request. Its answer belongs only to the rows that are recorded with it (table `step_rows`).

A limit counts a lead at the first step that sends it in this run. Leads begun earlier continue with their later steps
and do not count. Requests that are sent again (`--retry`, `policy.refresh`) count too. A request that several leads
share counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import polars as pl
from msgspec import Struct
from msgspec.structs import replace

from enrich.files.values import numbered_frame
from enrich.job.cell_text import clean_cells
from enrich.job.job import Job
from enrich.job.spec import Caps
from enrich.ledger import step_results
from enrich.ledger.database import Database
from enrich.ledger.enroll import stratified_sample
from enrich.ledger.step_results import StepResult
from enrich.models import RowStatus, State
from enrich.rows.batches import RowBatch
from enrich.rows.job_input import JobInput
from enrich.rows.job_steps import NOT_FINAL, StepDecision


class StepBatch(Struct, frozen=True, dict=True):
    """The rows of a batch in one step, with the decision about each.

    `built` has every row's request, and `known` its result in the ledger. `requesting_rows` need their request, whether
    the run may send it or not. `unsent` has the rows that are left out because the person is forgotten or a result was
    purged, each with this reason. `identities` are those of all rows.
    """

    built: RowBatch
    known: Sequence[StepResult | None]
    decisions: Sequence[StepDecision]
    requesting_rows: Sequence[int]
    unsent: dict[int, str]
    identities: Identities

    @cached_property
    def batch(self) -> RowBatch:
        """The batch with the requests of those rows alone that have an answer or wait for one."""
        built = self.built
        fingerprints, statuses, errors = list(built.fingerprints), list(built.statuses), list(built.errors)
        for row, decision in enumerate(self.decisions):
            if decision in _WITH_REQUEST:
                continue
            fingerprints[row] = None
            if decision is StepDecision.WAIT:
                statuses[row], errors[row] = RowStatus.PENDING, None
            elif decision is StepDecision.LACK:
                statuses[row], errors[row] = RowStatus.FILTERED, f"{errors[row]}: not found by an earlier step"
            elif decision is StepDecision.FILTER and statuses[row] is not RowStatus.FILTERED:
                statuses[row], errors[row] = RowStatus.FILTERED, self.unsent.get(row)
        return replace(built, fingerprints=fingerprints, statuses=statuses, errors=errors)

    @cached_property
    def results(self) -> list[StepResult | None]:
        """The results of the requests of `batch`."""
        rows = zip(self.known, self.decisions, strict=True)
        return [result if decision in _WITH_REQUEST else None for result, decision in rows]

    @cached_property
    def final(self) -> list[bool]:
        """Which rows a later step may build on."""
        return [
            result is not None and result.state not in NOT_FINAL
            if decision in _WITH_REQUEST
            else decision is not StepDecision.WAIT
            for result, decision in zip(self.known, self.decisions, strict=True)
        ]

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


#: Decisions with which a row has a request.
_WITH_REQUEST = (StepDecision.SEND, StepDecision.KEEP)


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


@dataclass(slots=True)
class LeadSelection:
    """The leads that a limited run may send requests for."""

    limit: int | None
    sample: int | None
    seed: int
    #: The rows that count in this run.
    chosen: set[int] = field(default_factory=set)
    #: Which rows earlier runs have begun, one byte for each row of the input.
    begun: bytearray = field(default_factory=bytearray)
    counted: int = 0

    def may_send(self, first_position: int, results: Sequence[StepResult | None]) -> list[bool]:
        """Return which rows of a batch may be sent."""
        return [
            row in self.chosen or (self._is_begun(row) and (result is None or not result.was_sent))
            for row, result in enumerate(results, first_position)
        ]

    def _is_begun(self, row: int) -> bool:
        return row < len(self.begun) and bool(self.begun[row])

    @property
    def remaining(self) -> int:
        """How many more leads the run may begin."""
        return max(0, min(limit for limit in (self.sample, self.limit) if limit is not None) - self.counted)

    def choose(self, candidates: Iterable[tuple[int, bytes | None]], queue_order: pl.Series | None) -> None:
        """Choose from the rows that would be sent, by sample, then by limit in the send order.

        A row that was sent before (retry, refresh) comes with its fingerprint. Rows that share it count once.
        """
        rows_by_request: dict[bytes | int, list[int]] = {}
        for row, request in candidates:
            rows_by_request.setdefault(row if request is None else request, []).append(row)
        leads = list(rows_by_request.values())
        if self.sample is not None and not self.counted:
            leads = [leads[number] for number in stratified_sample(len(leads), self.sample, self.seed)]
        if queue_order is not None:
            order = queue_order.to_list()
            leads.sort(key=lambda rows: min(_places(rows, order)))
        leads = leads[: self.remaining]
        self.counted += len(leads)
        # A lead is not begun because it shares a request that is sent again.
        for rows in leads:
            self.chosen.update(list(filter(self._is_begun, rows)) or rows[:1])


def capped_rows(job_input: JobInput, caps: Caps, begun: bytearray, check_stopped: Callable[[], None]) -> bytearray:
    """Return which rows of the input are beyond the cap of their group, one byte for each row.

    Rows that earlier runs have `begun` count first and are never left out, then the others in the send order. Rows that
    the job leaves out do not count, and those without a group are not limited. Rows that send the same cells are one
    lead: if one of them takes part, all do. `check_stopped` is called before each batch. It may raise to stop.
    """
    order, height = job_input.queue_order(check_stopped), 0
    sent = job_input.identifying_columns
    parts = []
    for first_position, _, text in job_input.frames():
        check_stopped()
        group = clean_cells(text.get_column(caps.by).alias("")).str.to_lowercase()
        taking_part = job_input.selected_rows(text)
        if (suppressed := job_input.suppressed_rows(text)) is not None:
            taking_part &= ~suppressed
        rows = pl.int_range(first_position, first_position + text.height, eager=True)
        height = first_position + text.height
        # The file may have grown since the begun leads were found.
        known = begun[first_position:height].ljust(text.height, b"\0")
        is_begun = pl.Series(map(bool, known), dtype=pl.Boolean)
        # Without `dedupe` each row has a request of its own.
        leads = joined_cells(text, sent).hash() if job_input.job.model.dedupe else rows.cast(pl.UInt64)
        columns = {"row": rows, "group": group.hash(), "lead": leads, "begun": is_begun, "limited": group != ""}
        parts.append(pl.DataFrame(columns).filter(taking_part))
    capped = bytearray(height)
    if not parts:
        return capped
    table = pl.concat(parts)
    rows = table.get_column("row")
    place = rows if order is None else pl.Series(_places(rows.to_list(), order.to_list()))
    numbered = (
        table.with_columns(place.alias("place"))
        .sort(~pl.col("begun"), "place")
        .with_row_index("first")
        .with_columns(pl.col("first").min().over("group", "lead").rank("dense").over("group").alias("number"))
    )
    takes_part = (pl.col("number") <= caps.max) | pl.col("begun") | ~pl.col("limited")
    # All rows of a lead: the next run finds all of them begun, and must write the same output.
    for row in numbered.filter(~takes_part.any().over("lead")).get_column("row"):
        capped[row] = 1
    return capped


def _places(rows: Iterable[int], order: Sequence[int]) -> list[int]:
    """Return the places of rows in the send order. The file may have grown since that was read."""
    return [order[row] if row < len(order) else row for row in rows]

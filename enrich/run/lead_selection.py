"""Chooses the leads of a run where a job has steps: under `caps`, `--limit` and `--sample`.

A limit counts a lead at the first step that sends it in this run. Leads begun earlier continue with their later steps
and do not count. Requests that are sent again (`--retry`, `policy.refresh`) count too. A request that several leads
share counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import polars as pl

from enrich.job.cell_text import clean_cells
from enrich.job.spec import Caps
from enrich.ledger.enroll import stratified_sample
from enrich.ledger.step_results import StepResult
from enrich.rows.job_input import JobInput
from enrich.run.step_batch import joined_cells


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


def capped_rows(job_input: JobInput, caps: Caps, begun: bytearray) -> bytearray:
    """Return which rows of the input are beyond the cap of their group, one byte for each row.

    Rows that earlier runs have `begun` count first and are never left out, then the others in the send order. Rows that
    the job leaves out, and those without a group, do not count. Rows that send the same cells are one lead.
    """
    order, height = job_input.queue_order(), 0
    sent = job_input.identifying_columns
    parts = []
    for first_position, _, text in job_input.frames():
        group = clean_cells(text.get_column(caps.by).alias("")).str.to_lowercase()
        taking_part = job_input.selected_rows(text) & (group != "")
        if (suppressed := job_input.suppressed_rows(text)) is not None:
            taking_part &= ~suppressed
        rows = pl.int_range(first_position, first_position + text.height, eager=True)
        height = first_position + text.height
        is_begun = pl.Series([bool(each) for each in begun[first_position:height]], dtype=pl.Boolean)
        # Without `dedupe` each row has a request of its own.
        leads = joined_cells(text, sent).hash() if job_input.job.model.dedupe else rows.cast(pl.UInt64)
        columns = {"row": rows, "group": group.hash(), "lead": leads, "begun": is_begun}
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
    for row in numbered.filter((pl.col("number") > caps.max) & ~pl.col("begun")).get_column("row"):
        capped[row] = 1
    return capped


def _places(rows: Iterable[int], order: Sequence[int]) -> list[int]:
    """Return the places of rows in the send order. The file may have grown since that was read."""
    return [order[row] if row < len(order) else row for row in rows]

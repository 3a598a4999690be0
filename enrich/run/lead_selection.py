"""Chooses the leads of a run with `--limit` or `--sample`, where a job has steps.

A limit counts leads where they are asked first in the run. Leads begun earlier go on with their later steps and do not
count. Requests that are sent again (`--retry`, `policy.refresh`) count too; one that several leads share counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import polars as pl

from enrich.ledger.enroll import stratified_sample
from enrich.ledger.step_results import StepResult


class Candidate(NamedTuple):
    """A row that a run would send. `request` is set if it is only sent again."""

    row: int
    request: bytes | None


@dataclass(slots=True)
class LeadSelection:
    """The leads that a limited run may send requests for, one byte for each row of the input."""

    limit: int | None
    sample: int | None
    seed: int
    #: Rows that this run has counted, and rows that earlier runs have begun.
    chosen: bytearray = field(default_factory=bytearray)
    begun: bytearray = field(default_factory=bytearray)
    counted: int = 0

    def may_send(self, first_position: int, results: Sequence[StepResult | None]) -> list[bool]:
        """Return which rows of a batch may be sent."""
        rows = range(first_position, first_position + len(results))
        return [
            _has(self.chosen, row) or (_has(self.begun, row) and (result is None or not result.was_sent))
            for row, result in zip(rows, results, strict=True)
        ]

    @property
    def places(self) -> int:
        """How many more leads the run may begin."""
        return max(0, min(limit for limit in (self.sample, self.limit) if limit is not None) - self.counted)

    def mark_begun(self, rows: bytearray) -> None:
        """Record rows that earlier runs have begun, one byte for each row of the input."""
        _mark(self.begun, [row for row, is_begun in enumerate(rows) if is_begun])

    def choose(self, candidates: Iterable[Candidate], queue_order: pl.Series | None) -> None:
        """Choose from the rows that would be sent, by sample, then by limit in the send order."""
        by_place: dict[bytes | int, list[int]] = {}
        for row, request in candidates:
            by_place.setdefault(row if request is None else request, []).append(row)
        places = list(by_place.values())
        if self.sample is not None and not self.counted:
            places = [places[number] for number in stratified_sample(len(places), self.sample, self.seed)]
        if queue_order is not None:
            order = queue_order.to_list()
            places.sort(key=lambda rows: min(order[row] if row < len(order) else row for row in rows))
        places = places[: self.places]
        self.counted += len(places)
        # A lead is not begun because it shares a request that is sent again.
        _mark(self.chosen, [row for rows in places for row in [r for r in rows if _has(self.begun, r)] or rows[:1]])


def _has(marks: bytearray, row: int) -> bool:
    return row < len(marks) and bool(marks[row])


def _mark(marks: bytearray, rows: Sequence[int]) -> None:
    if rows:
        marks.extend(bytes(max(0, max(rows) + 1 - len(marks))))
        for row in rows:
            marks[row] = 1

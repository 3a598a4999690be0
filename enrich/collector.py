"""Joins rows and answers into the output file, batch by batch; never talks to the API."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from enrich.answer import is_blank, parse_data, pick
from enrich.job import Job
from enrich.ledger import Ledger
from enrich.model import RowStatus, Standing, State, iso, to_credits
from enrich.place import Place
from enrich.question import Question
from enrich.rows import STATUS_COLUMNS, Batch, Rows
from enrich.tables.writing import write


@dataclass(frozen=True, slots=True)
class Collector:
    """What the output is made of. `check` is called before every batch and may raise to give up."""

    ledger: Ledger
    job: Job
    question: Question
    rows: Rows
    check: Callable[[], None] = lambda: None

    def write(self, target: Place) -> Counter[RowStatus]:
        """Write the output from the input and the ledger alone; return the rows by status.

        Raises Refused when the input can't be read or the output can't be written.
        """
        counts: Counter[RowStatus] = Counter()
        new = _new_schema(self.question)
        write(
            target,
            self.job.output,
            job=self.job.name,
            schema=self.rows.schema | new,
            frames=self._frames(counts),
            new=len(new),
        )
        return counts

    def count(self) -> Counter[RowStatus]:
        """Count the rows by the status that they would have in the output."""
        counts: Counter[RowStatus] = Counter()
        for _ in self._frames(counts):
            pass
        return counts

    def _frames(self, counts: Counter[RowStatus]) -> Iterator[pl.DataFrame]:
        schema = _new_schema(self.question)
        self.ledger.begin_pass()
        for batch in self.rows.batches(self.question):
            self.check()
            asked = ((position, fingerprint) for position, fingerprint, _ in batch.asked())
            known = {standing.index - batch.first: standing for standing in self.ledger.standing(asked)}
            columns = _new_columns(batch, known, self.question)
            counts.update(map(RowStatus, columns["enrich_status"]))
            new = [pl.Series(name, values, schema[name]) for name, values in columns.items()]
            yield batch.frame.hstack(new)


def _new_schema(question: Question) -> dict[str, pl.DataType]:
    return {name: pl.String() for name in question.columns} | STATUS_COLUMNS


def _new_columns(batch: Batch, known: dict[int, Standing], question: Question) -> dict[str, list[Any]]:
    names = [*question.columns, *STATUS_COLUMNS]
    cells = [_new_cells(batch, index, known.get(index), question) for index in range(batch.frame.height)]
    return {name: [row[place] for row in cells] for place, name in enumerate(names)}


def _new_cells(batch: Batch, index: int, standing: Standing | None, question: Question) -> list[Any]:
    """Make the new cells of one row: the job's columns, then the status columns."""
    empty: list[Any] = [None] * len(question.columns)
    if standing is None:
        status = batch.statuses[index] or RowStatus.PENDING
        return [*empty, status, batch.errors[index], None, None, None, None]
    status = RowStatus.of(standing.state)
    values = empty
    if standing.state in (State.FOUND, State.NOT_FOUND) and standing.answer is not None:
        fields = parse_data(json.loads(standing.answer).get("data")).fields
        values = [cell(pick(fields, path)) for path in question.columns.values()]
        # Another job with other columns may have asked: this job's columns decide here.
        status = RowStatus.FOUND if any(value is not None for value in values) else RowStatus.NOT_FOUND
    if status is RowStatus.PENDING:
        # The last attempt was refused, failed for nothing or is at the API: no answer yet, so none of its marks.
        return [*values, status, standing.error, None, None, standing.task_id, None]
    return [
        *values,
        status,
        standing.error,
        standing.provider,
        to_credits(standing.credits) if standing.first and standing.credits is not None else None,
        standing.task_id,
        iso(standing.settled_ms) if standing.settled_ms is not None else None,
    ]


def cell(value: object) -> str | None:
    """Write a value of the result as a cell: text as it is, anything else as JSON, nothing as null."""
    if is_blank(value):
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

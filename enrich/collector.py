"""Joins rows and answers into the output file, batch by batch; never talks to the API."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from enrich.api.answer import is_blank, parse_data, pick
from enrich.asking import STATUS_COLUMNS, Batch
from enrich.job import Job
from enrich.model import RowStatus, Standing, State, iso, to_credits
from enrich.place import Place
from enrich.question import Question
from enrich.rows import Rows
from enrich.store.ledger import Ledger
from enrich.tables.cells import as_text
from enrich.tables.writing import guarded, runs_formulas, write


@dataclass(frozen=True, slots=True)
class Page:
    """A batch with what is known of its rows, by index, and its new cells, by column."""

    batch: Batch
    known: Mapping[int, Standing]
    cells: Mapping[str, list[Any]]


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
        merged = self.merged
        added = {name: kind for name, kind in new_schema(self.question).items() if name not in merged}
        schema: dict[str, pl.DataType] = {
            name: pl.String() if name in merged else kind for name, kind in self.rows.schema.items()
        }
        write(
            target,
            self.job.output,
            job=self.job.name,
            schema=schema | added,
            frames=self._frames(counts, added, safely=runs_formulas(target)),
            new=len(added),
        )
        return counts

    def count(self) -> Counter[RowStatus]:
        """Count the rows by the status that they would have in the output."""
        counts: Counter[RowStatus] = Counter()
        for page in self.pages():
            counts.update(map(RowStatus, page.cells["enrich_status"]))
        return counts

    @property
    def merged(self) -> list[str]:
        """The job's columns that the input has already."""
        return [name for name in self.question.columns if name in self.rows.columns]

    def pages(self) -> Iterator[Page]:
        """Read the input once, each batch with its new cells."""
        names = [*self.question.columns, *STATUS_COLUMNS]
        for batch in self.rows.batches(self.question):
            self.check()
            known = {standing.index - batch.first: standing for standing in self.ledger.standing(batch.asked())}
            cells = [_new_cells(batch, index, known.get(index), self.question) for index in range(batch.frame.height)]
            yield Page(batch, known, {name: [row[place] for row in cells] for place, name in enumerate(names)})

    def _frames(
        self, counts: Counter[RowStatus], added: Mapping[str, pl.DataType], *, safely: bool
    ) -> Iterator[pl.DataFrame]:
        for page in self.pages():
            counts.update(map(RowStatus, page.cells["enrich_status"]))
            frame = page.batch.frame.with_columns(self.merge(page, name, safely=safely) for name in self.merged)
            yield frame.hstack([pl.Series(name, page.cells[name], kind) for name, kind in added.items()])

    def merge(self, page: Page, name: str, *, safely: bool = False) -> pl.Series:
        """Complete a column of the input; what was not found never blanks what is there."""
        # Without a name: polars would take one like `^a.*$` for a pattern.
        old = as_text(page.batch.frame.get_column(name)).alias("")
        new = pl.Series("", page.cells[name], pl.String)
        if safely:
            new = guarded(new)
        if self.job.model.merge == "fill_empty":
            new = new.set(old.str.strip_chars() != "", None)
        return new.fill_null(old).alias(name)


def new_schema(question: Question) -> dict[str, pl.DataType]:
    """Name the new columns, with their types."""
    return {name: pl.String() for name in question.columns} | STATUS_COLUMNS


def _new_cells(batch: Batch, index: int, standing: Standing | None, question: Question) -> list[Any]:
    """Make the new cells of one row: the job's columns, then the status columns."""
    empty: list[Any] = [None] * len(question.columns)
    if standing is None:
        status = batch.statuses[index] or RowStatus.PENDING
        return [*empty, status, batch.errors[index], None, None, None, None]
    status = RowStatus.of(standing.state)
    values = empty
    error = standing.error
    if standing.capped and status is RowStatus.PENDING:
        return [*empty, RowStatus.FILTERED, "capped: enough leads of its group are asked", None, None, None, None]
    if standing.erased_ms is not None:
        error = f"the answer was purged at {iso(standing.erased_ms)}"
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
        error,
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

"""Leads of the input by their number or by a cell: what they ask with, and who else asks the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import polars as pl

from enrich.asking import Batch, source
from enrich.errors import JobError
from enrich.job import Job, nearest
from enrich.model import RowStatus
from enrich.question import Question
from enrich.rows import Rows
from enrich.tables.cells import text_frame

#: So many leads are told of at most.
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Lead:
    """A row of the input, counted from 1, with what it asks."""

    number: int
    cells: Mapping[str, str]
    fingerprint: bytes | None
    params: str | None
    status: RowStatus | None
    error: str | None


@dataclass(slots=True)
class Found:
    """What was found in the input: leads, at most SHOWN of them, and how many there are."""

    leads: list[Lead] = field(default_factory=list)
    count: int = 0


def parse_match(match: str, columns: list[str]) -> tuple[str, str]:
    """Take `COLUMN=VALUE` apart; a column's name may have an equals sign in it."""
    named = [column for column in columns if match.startswith(f"{column}=")]
    if not named:
        column, equals, _ = match.partition("=")
        if not equals:
            raise JobError(f"--match {match}: must be COLUMN=VALUE", 'for example: --match "Email=ada@engine.example"')
        raise JobError(f"--match: the input has no column `{column}`", nearest(column, columns))
    column = max(named, key=len)
    return column, match[len(column) + 1 :]


def numbered(job: Job, rows: Rows, question: Question, number: int) -> Found:
    """Find a row by its number. Raises JobError when there are not so many."""
    height = 0
    for batch in rows.batches(question):
        height = batch.first + batch.frame.height
        if number <= height:
            return Found([_lead(batch, number - batch.first - 1)], 1)
    raise JobError(
        f"--row {number}: the input has {height:,} rows ({job.input_path})", "the first row has the number 1"
    )


def matching(rows: Rows, question: Question, column: str, value: str) -> Found:
    """Find the rows whose cell is this value, but for outer blanks and the case of letters."""
    found, folded = Found(), value.strip().casefold()
    for batch in rows.batches(question):
        for index, cell in enumerate(text_frame(batch.frame.select(pl.nth(rows.columns.index(column)))).to_series()):
            if cell.strip().casefold() == folded:
                found.count += 1
                if found.count <= SHOWN:
                    found.leads.append(_lead(batch, index))
    return found


def _lead(batch: Batch, index: int) -> Lead:
    return Lead(
        batch.first + index + 1,
        text_frame(batch.frame[index]).row(0, named=True),
        batch.fingerprints[index],
        batch.params[index],
        batch.statuses[index],
        batch.errors[index],
    )


def places_of(rows: Rows, question: Question, wanted: Collection[bytes]) -> dict[bytes, list[int]]:
    """Tell which rows ask each of these requests."""
    places: dict[bytes, list[int]] = {}
    for batch in rows.batches(question) if wanted else ():
        for row in batch.asked():
            if row.fingerprint in wanted:
                places.setdefault(row.fingerprint, []).append(row.position + 1)
    return places


def would_send(job: Job, column: str, value: str) -> dict[str, str]:
    """Tell what each param would be if it came from this cell."""
    params = {
        name: param.model_copy(update={"columns": [column]})
        for name, param in job.model.params.items()
        if column in param.columns
    }
    frame = pl.DataFrame({column: [value]}, schema={column: pl.String})
    sent = {name: source(param, frame, [column]).item() for name, param in params.items()}
    return {name: text for name, text in sent.items() if text}

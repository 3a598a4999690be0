"""Finds leads of the input by row number or by a cell, with their requests and the rows that share a request."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import polars as pl

from enrich.errors import JobError
from enrich.files.values import text_frame
from enrich.job.cell_text import fold
from enrich.job.job import Job
from enrich.job.name_hints import suggest_name
from enrich.models import RowStatus
from enrich.rows.job_input import JobInput
from enrich.rows.params import ParamCells, conversion_of, param_values, split_left_out
from enrich.rows.requests import RowBatch
from enrich.rows.template import RequestTemplate

#: Most leads to show.
MAX_LEADS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Lead:
    """A row of the input, counted from 1, with its request."""

    number: int
    cells: Mapping[str, str]
    fingerprint: bytes | None
    params: str | None
    status: RowStatus | None
    error: str | None


@dataclass(slots=True)
class LeadMatches:
    """The matching leads, at most MAX_LEADS_SHOWN of them, and how many there are."""

    leads: list[Lead] = field(default_factory=list)
    count: int = 0


def parse_match(match: str, columns: list[str]) -> tuple[str, str]:
    """Split `COLUMN=VALUE`; a column's name may contain an equals sign. Raises JobError."""
    candidates = [column for column in columns if match.startswith(f"{column}=")]
    if not candidates:
        column, equals, _ = match.partition("=")
        if not equals:
            raise JobError(f"--match {match}: must be COLUMN=VALUE", 'for example: --match "Email=ada@engine.example"')
        raise JobError(f"--match: the input has no column `{column}`", suggest_name(column, columns))
    column = max(candidates, key=len)
    return column, match[len(column) + 1 :]


def find_by_number(job: Job, job_input: JobInput, template: RequestTemplate, number: int) -> LeadMatches:
    """Find a row by its number. Raises JobError when the input has fewer rows."""
    row_count = 0
    for batch in job_input.batches(template):
        row_count = batch.first_position + batch.frame.height
        if number <= row_count:
            return LeadMatches([_make_lead(batch, number - batch.first_position - 1)], 1)
    raise JobError(f"--row {number}: the input has {row_count:,} rows ({job.input_path})", "row numbers start at 1")


def find_by_cell(job_input: JobInput, template: RequestTemplate, column: str, value: str) -> LeadMatches:
    """Find the rows whose cell is this value. Ignores case, and what `enrich.job.cell_text` ignores."""
    found, folded = LeadMatches(), fold(value)
    for batch in job_input.batches(template):
        for index, cell in enumerate(
            text_frame(batch.frame.select(pl.nth(job_input.columns.index(column)))).to_series()
        ):
            if fold(cell) == folded:
                found.count += 1
                if found.count <= MAX_LEADS_SHOWN:
                    found.leads.append(_make_lead(batch, index))
    return found


def _make_lead(batch: RowBatch, index: int) -> Lead:
    return Lead(
        batch.first_position + index + 1,
        text_frame(batch.frame[index]).row(0, named=True),
        batch.fingerprints[index],
        batch.params[index],
        batch.statuses[index],
        batch.errors[index],
    )


def rows_by_request(
    job_input: JobInput, template: RequestTemplate, fingerprints: Collection[bytes]
) -> dict[bytes, list[int]]:
    """Return the numbers (from 1) of the rows that have each of these requests."""
    row_numbers: dict[bytes, list[int]] = {}
    for batch in job_input.batches(template) if fingerprints else ():
        for number, name in enumerate(batch.fingerprints, batch.first_position + 1):
            if name is not None and name in fingerprints:
                row_numbers.setdefault(name, []).append(number)
    return row_numbers


def params_from_cell(job: Job, template: RequestTemplate, column: str, value: str) -> dict[str, str]:
    """Return each param that reads this column, as it would be sent for this cell."""
    frame = pl.DataFrame({column: [value]}, schema={column: pl.String})
    cells = ParamCells([column], frame, frame, job.model.placeholders)
    values = {
        name: split_left_out(param_values(param.only_from(column), cells, conversion_of(template, name)))[0].item()
        for name, param in job.model.params.items()
        if column in param.columns
    }
    return {name: text for name, text in values.items() if text}

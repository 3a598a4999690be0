"""Builds the new cells of a batch of a job with steps: those of each step, and those of the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from enrich.job.cell_text import blank_cells
from enrich.job.job import Job
from enrich.job.steps import STEP_FIELDS, step_column
from enrich.ledger import step_results
from enrich.ledger.database import Database
from enrich.models import RequestResult, result_columns
from enrich.rows.step_decision import row_status
from enrich.run.collector import JoinedStep, name_source, new_cells
from enrich.run.job_steps import Step
from enrich.run.step_batch import StepBatch


def join_step(ledger: Database, step: Step, step_batch: StepBatch, *, bill: bool) -> JoinedStep:
    """Join the rows of a batch with the answers of a step."""
    batch = step_batch.batch
    first_rows: dict[bytes, int] = {}
    for row, name in enumerate(batch.fingerprints):
        if name is not None and step_batch.results[row] is not None:
            first_rows.setdefault(name, row)
    known = {result.request_id for result in step_batch.results if result is not None}
    billed = step_results.add_to_bill(ledger, known) if bill and known else set()
    results: list[RequestResult] = []
    places: dict[bytes, int] = {}
    for name, row in first_rows.items():
        found = step_batch.results[row]
        assert found is not None  # noqa: S101 - only such rows are listed
        places[name] = len(results)
        is_first = int(found.request_id in billed)
        results.append(found.result._replace(position=batch.first_position + row, first=is_first))
    named = name_source(step.template, result_columns(results))
    indexes = [None if name is None else places.get(name) for name in batch.fingerprints]
    cells = new_cells(batch, named, pl.Series(indexes, dtype=pl.UInt32), step.template.columns)
    return JoinedStep(step.job.step, step.template.columns, batch.fingerprints, named, indexes, cells)


def row_cells(
    job: Job, values: Mapping[str, pl.Series], text: pl.DataFrame, joined: Sequence[JoinedStep]
) -> dict[str, pl.Series]:
    """Return the new cells of a batch: the columns, those of each step, those of the row.

    `values` has what was found for each column, and `text` is the table behind the last step.
    """
    cells = dict(values)
    for step in joined:
        of_step = {step_column(step.name, name): step.cells[f"enrich_{name}"] for name in STEP_FIELDS}
        cells |= {name: column.alias(name) for name, column in of_step.items()}
    complete = job.complete or tuple(joined[-1].columns)
    blank = [
        blank_cells(text.get_column(name), job.model.placeholders).alias(str(number))
        for number, name in enumerate(complete)
    ]
    is_complete = (~pl.DataFrame(blank).select(pl.any_horizontal(pl.all())).to_series()).to_list()
    statuses = zip(*(step.cells["enrich_status"] for step in joined), strict=True)
    rows = zip(statuses, is_complete, strict=True)
    row_statuses = [row_status(row, is_complete=done).value for row, done in rows]
    errors = pl.DataFrame(
        [(step.name + ": " + step.cells["enrich_error"]).alias(str(number)) for number, step in enumerate(joined)]
    )
    prices = pl.DataFrame([step.cells["enrich_credits"].alias(str(number)) for number, step in enumerate(joined)])
    reason = pl.concat_str(pl.all(), separator="; ", ignore_nulls=True)
    total = pl.when(pl.any_horizontal(pl.all().is_not_null())).then(pl.sum_horizontal(pl.all()).round(6))
    return cells | {
        "enrich_status": pl.Series("enrich_status", row_statuses, pl.String),
        "enrich_error": errors.select(
            pl.when(pl.any_horizontal(pl.all().is_not_null())).then(reason).alias("enrich_error")
        ).to_series(),
        "enrich_credits": prices.select(total.alias("enrich_credits")).to_series(),
    }

"""`enrich explain`: shows the full history of one lead, from the input and the ledger, without network."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import click
import polars as pl

from enrich.commands import options
from enrich.commands.explain_history import (
    MAX_LEADS_SHOWN,
    Explainer,
    Lead,
    request_lines,
    row_lines,
    row_without_request,
)
from enrich.errors import JobError, suggest_name
from enrich.files.values import text_frame
from enrich.job.cell_text import fold
from enrich.job.job import Job
from enrich.ledger import enroll, erasure, queries
from enrich.ledger.database import Database, open_or_empty
from enrich.ledger.lock import is_locked
from enrich.models import CAPPED_REASON, Decision, RowStatus, pluralize
from enrich.rows.batches import RowBatch
from enrich.rows.job_input import JobInput
from enrich.rows.job_steps import StepDecision
from enrich.rows.requests import ParamCells, conversion_of, param_values, split_left_out
from enrich.rows.template import RequestTemplate
from enrich.run.output import preview_caps
from enrich.run.preflight import find_template, steps_from_ledger
from enrich.run.step_rows import StepRows


def explain_leads(job: Job, row: int | None, match: str | None) -> dict[str, Any]:
    """Return the object of `enrich explain --json` for a row, or for those that match. Raises EnrichError."""
    with open_or_empty(job.ledger) as ledger, ledger.snapshot():
        job_input = JobInput(job, erasure.load_forgotten(ledger))
        found, count = _find_rows(job_input, row, match)
        if job.step_jobs:
            explained = _explain_steps(ledger, job_input, found)
        else:
            explained = _explain_requests(ledger, job_input, found, match)
        about = {"job": job.name, "input": str(job.input_path), "ledger": str(job.ledger), "matches": count}
        return about | explained


def _explain_requests(ledger: Database, job_input: JobInput, found: Sequence[int], match: str | None) -> dict[str, Any]:
    """Explain the rows of a job without steps."""
    job = job_input.job
    template, is_known = find_template(ledger, job)
    if job.model.caps is not None:
        preview_caps(ledger, template, job_input)
    leads = [lead for (lead,) in _read_leads(_input_batches(ledger, job_input, template), found)]
    if not is_known:
        return {"ever_ran": False, "rows": [row_without_request(job, lead) for lead in leads], "gone": []}
    explainer = Explainer(job, template, ledger, is_locked(job.ledger))
    candidates = []
    if match is not None:
        params = _params_from_cell(job, template, *_parse_match(match, job_input.columns))
        candidates = list(queries.find_by_any_param(ledger, params))
    fingerprints = {lead.fingerprint for lead in leads if lead.fingerprint is not None}
    fingerprints |= {candidate.fingerprint for candidate in candidates}
    (rows_of,) = _rows_by_request(_input_batches(ledger, job_input, template), [fingerprints])
    params_of_leads = {lead.params for lead in leads}
    gone = [known for known in candidates if known.fingerprint not in rows_of and known.params not in params_of_leads]
    return {
        "ever_ran": True,
        "rows": [explainer.explain_row(lead, rows_of) for lead in leads],
        "gone": [explainer.explain_request(known) for known in gone[:MAX_LEADS_SHOWN]],
    }


def _parse_match(match: str, columns: list[str]) -> tuple[str, str]:
    """Split `COLUMN=VALUE`; a column's name may contain an equals sign. Raises JobError."""
    candidates = [column for column in columns if match.startswith(f"{column}=")]
    if not candidates:
        column, equals, _ = match.partition("=")
        if not equals:
            raise JobError(f"--match {match}: must be COLUMN=VALUE", 'for example: --match "Email=ada@engine.example"')
        raise JobError(f"--match: the input has no column `{column}`", suggest_name(column, columns))
    column = max(candidates, key=len)
    return column, match[len(column) + 1 :]


def _find_rows(job_input: JobInput, row: int | None, match: str | None) -> tuple[list[int], int]:
    """Return the matching rows, at most MAX_LEADS_SHOWN of them (numbers from 0), and how many there are."""
    found: list[int] = []
    count = 0
    column, value = (None, "") if match is None else _parse_match(match, job_input.columns)
    folded_value = fold(value)
    for first_position, _, text in job_input.frames():
        count = first_position + text.height
        if column is None:
            if row is not None and first_position < row <= count:
                return [row - 1], 1
            continue
        cells = enumerate(text.to_series(job_input.header.index(column)), first_position)
        found += [position for position, cell in cells if fold(cell) == folded_value]
    if column is None:
        hint = "row numbers start at 1"
        raise JobError(f"--row {row}: the input has {pluralize(count, 'row')} ({job_input.job.input_path})", hint)
    return found[:MAX_LEADS_SHOWN], len(found)


#: A batch of the input in each step, or in a job without steps: its requests, and the cells that they are made of.
Batches: TypeAlias = Iterator[list[tuple[RowBatch, pl.DataFrame]]]


def _input_batches(ledger: Database, job_input: JobInput, template: RequestTemplate) -> Batches:
    """Yield each batch of a job without steps. A row over a cap is filtered."""
    for batch in job_input.batches(template):
        if job_input.job.model.caps is not None:
            for decided in enroll.row_decisions(ledger, batch.requests()):
                if decided.decision is Decision.CAPPED:
                    index = decided.position - batch.first_position
                    batch.statuses[index], batch.errors[index] = RowStatus.FILTERED, CAPPED_REASON
        yield [(batch, batch.frame)]


def _step_batches(rows: StepRows) -> Batches:
    """Yield each batch of a job with steps. A row that waits for earlier steps has them as its error."""
    for tables in rows.step_tables():
        for step, (step_batch, _) in zip(rows.steps, tables.steps, strict=True):
            for index, decision in enumerate(step_batch.decisions):
                if decision is StepDecision.WAIT:
                    waits_for = [
                        number for number in sorted(step.depends_on) if not tables.steps[number][0].final[index]
                    ]
                    names = ", ".join(rows.steps[number].job.step for number in waits_for)
                    step_batch.batch.errors[index] = f"waits for {names}"
        yield [(step_batch.batch, text) for step_batch, text in tables.steps]


def _read_leads(batches: Batches, numbers: Sequence[int]) -> list[list[Lead]]:
    """Return these rows, which are in order, as they are in each step. Read no further than the last of them."""
    leads: list[list[Lead]] = []
    for steps in batches if numbers else ():
        first, height = steps[0][0].first_position, steps[0][1].height
        indexes = (number - first for number in numbers if first <= number < first + height)
        leads += [[_make_lead(batch, frame, index) for batch, frame in steps] for index in indexes]
        if len(leads) == len(numbers):
            break
    return leads


def _make_lead(batch: RowBatch, frame: pl.DataFrame, index: int) -> Lead:
    return Lead(
        batch.first_position + index + 1,
        text_frame(frame[index]).row(0, named=True),
        batch.fingerprints[index],
        batch.params[index],
        batch.statuses[index],
        batch.errors[index],
    )


def _rows_by_request(batches: Batches, fingerprints: Sequence[Collection[bytes]]) -> list[dict[bytes, list[int]]]:
    """Return, for each step, the numbers (from 1) of the rows that have each of these requests."""
    found: list[dict[bytes, list[int]]] = [{} for _ in fingerprints]
    for steps in batches if any(fingerprints) else ():
        for rows_of, chosen, (batch, _) in zip(found, fingerprints, steps, strict=True):
            for number, name in enumerate(batch.fingerprints, batch.first_position + 1):
                if name is not None and name in chosen:
                    rows_of.setdefault(name, []).append(number)
    return found


def _params_from_cell(job: Job, template: RequestTemplate, column: str, value: str) -> dict[str, str]:
    """Return each param that reads this column, as it would be sent for this cell."""
    frame = pl.DataFrame({column: [value]}, schema={column: pl.String})
    cells = ParamCells([column], frame, frame, job.model.placeholders)
    values = {
        name: split_left_out(param_values(param.only_from(column), cells, conversion_of(template, name)))[0].item()
        for name, param in job.model.params.items()
        if column in param.columns
    }
    return {name: text for name, text in values.items() if text}


def _explain_steps(ledger: Database, job_input: JobInput, found: Sequence[int]) -> dict[str, Any]:
    """Explain the rows of a job with steps."""
    job = job_input.job
    rows = StepRows(job_input, ledger, steps_from_ledger(ledger, job, job_input))
    rows.begin()
    leads = _read_leads(_step_batches(rows), found)
    fingerprints = [{lead.fingerprint for lead in leads_of_step} - {None} for leads_of_step in zip(*leads, strict=True)]
    shared = _rows_by_request(_step_batches(rows), fingerprints)
    is_running = is_locked(job.ledger)
    explainers = [Explainer(step.job, step.template, ledger, is_running) for step in rows.steps]
    explained = [
        {
            "row": leads_of_row[0].number,
            "steps": [
                {"step": step.job.step} | explainer.explain_row(lead, rows_of)
                for step, explainer, lead, rows_of in zip(rows.steps, explainers, leads_of_row, shared, strict=True)
            ],
        }
        for leads_of_row in leads
    ]
    return {"ever_ran": find_template(ledger, job)[1], "rows": explained, "gone": []}


def format_explanation(result: Mapping[str, Any]) -> Iterator[str]:
    """Format the object of `explain_leads` as text lines."""
    if not result["ever_ran"]:
        yield f"{result['job']} has never run ({result['ledger']})"
    if result["matches"] > MAX_LEADS_SHOWN:
        yield f"{result['matches']:,} rows match; the first {MAX_LEADS_SHOWN}:"
    for row in result["rows"]:
        yield from _step_lines(row) if "steps" in row else row_lines(row)
    if not result["rows"]:
        yield f"No row of {result['input']} matches."
    for request in result["gone"]:
        yield "No longer in the input, but in the ledger:"
        yield from request_lines(request)


def _step_lines(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"row {row['row']}"
    for step in row["steps"]:
        first, *rest = row_lines(step)
        yield f"  step {step['step']}: {first.partition(': ')[2]}"
        if step["status"] not in (RowStatus.FILTERED, RowStatus.INVALID) or step["request"] is not None:
            yield from (f"  {line}" for line in rest)


@click.command()
@options.job_options(has_input=True)
@click.option("--row", type=options.Number(1), metavar="ROW", help="Row number in the input. 1 is the first lead.")
@click.option("--match", metavar="COLUMN=VALUE", help="Rows with this value. Ignores case and surrounding spaces.")
@options.JSON_OPTION
def explain(job_options: options.JobOptions, row: int | None, match: str | None, as_json: bool) -> None:
    """Show the history of one lead of JOB: its params, requests, charges and results. Without network."""
    if (row is None) == (match is None):
        raise click.UsageError('choose a lead with --row ROW or --match "Email=ada@engine.example"')
    job = job_options.load()
    options.check_ledger_not_lost(job)
    result = explain_leads(job, row, match)
    options.echo_result({"exit_code": 0, **result}, format_explanation(result), as_json=as_json)

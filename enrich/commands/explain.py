"""`enrich explain`: shows the full history of one lead, from the input and the ledger, without network."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import click
import polars as pl
from msgspec.structs import replace

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
from enrich.models import CAPPED_REASON, Decision, RowStatus
from enrich.rows.job_input import JobInput
from enrich.rows.job_steps import StepDecision
from enrich.rows.params import ParamCells, conversion_of, param_values, split_left_out
from enrich.rows.requests import RowBatch
from enrich.rows.template import RequestTemplate
from enrich.run.output import preview_caps
from enrich.run.preflight import find_template, steps_from_ledger
from enrich.run.step_input import begin_steps
from enrich.run.step_rows import StepRows, StepTables


def explain_leads(job: Job, row: int | None, match: str | None) -> dict[str, Any]:
    """Return the object of `enrich explain --json` for a row, or for the rows that match `COLUMN=VALUE`.

    Raises JobError if the input has no such row or column, CommandRefused if the input cannot be read.
    """
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
    leads = _read_leads(ledger, job_input, template, found)
    if not is_known:
        return {"ever_ran": False, "rows": [row_without_request(job, lead) for lead in leads], "gone": []}
    explainer = Explainer(job, template, ledger, is_locked(job.ledger))
    candidates = []
    if match is not None:
        params = _params_from_cell(job, template, *_parse_match(match, job_input.columns))
        candidates = list(queries.find_by_any_param(ledger, params))
    fingerprints = {lead.fingerprint for lead in leads if lead.fingerprint is not None}
    fingerprints |= {candidate.fingerprint for candidate in candidates}
    rows_of = _rows_by_request(job_input, template, fingerprints)
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
        raise JobError(f"--row {row}: the input has {count:,} rows ({job_input.job.input_path})", hint)
    return found[:MAX_LEADS_SHOWN], len(found)


def _read_leads(ledger: Database, job_input: JobInput, template: RequestTemplate, numbers: Sequence[int]) -> list[Lead]:
    """Return these rows, which are in order, with their requests. Read no further than the last of them."""
    leads: list[Lead] = []
    for batch in job_input.batches(template) if numbers else ():
        if job_input.job.model.caps is not None:
            for decided in enroll.row_decisions(ledger, batch.requests()):
                if decided.decision is Decision.CAPPED:
                    index = decided.position - batch.first_position
                    batch.statuses[index], batch.errors[index] = RowStatus.FILTERED, CAPPED_REASON
        indexes = [number - batch.first_position for number in numbers]
        leads += [
            _make_lead(batch, index, text_frame(batch.frame[index]))
            for index in indexes
            if 0 <= index < batch.frame.height
        ]
        if len(leads) == len(numbers):
            break
    return leads


def _make_lead(batch: RowBatch, index: int, text: pl.DataFrame) -> Lead:
    """Return a row of a batch, whose cells as text are the one row of `text`."""
    return Lead(
        batch.first_position + index + 1,
        text.row(0, named=True),
        batch.fingerprints[index],
        batch.params[index],
        batch.statuses[index],
        batch.errors[index],
    )


def _rows_by_request(
    job_input: JobInput, template: RequestTemplate, fingerprints: Collection[bytes]
) -> dict[bytes, list[int]]:
    """Return the numbers (from 1) of the rows that have each of these requests."""
    found: dict[bytes, list[int]] = {}
    for batch in job_input.batches(template) if fingerprints else ():
        _add_rows(found, batch, fingerprints)
    return found


def _add_rows(found: dict[bytes, list[int]], batch: RowBatch, fingerprints: Collection[bytes]) -> None:
    for number, name in enumerate(batch.fingerprints, batch.first_position + 1):
        if name is not None and name in fingerprints:
            found.setdefault(name, []).append(number)


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
    begin_steps(rows)
    leads = _read_leads_of_steps(rows, found)
    shared = _rows_by_request_of_steps(rows, leads)
    is_running = is_locked(job.ledger)
    explainers = [Explainer(step.job, step.template, ledger, is_running) for step in rows.steps]
    explained = [
        {
            "row": number + 1,
            "steps": [
                {"step": step.job.step} | explainer.explain_row(lead, shared[index])
                for index, (step, explainer, lead) in enumerate(zip(rows.steps, explainers, leads[number], strict=True))
            ],
        }
        for number in found
    ]
    return {"ever_ran": find_template(ledger, job)[1], "rows": explained, "gone": []}


def _read_leads_of_steps(rows: StepRows, numbers: Sequence[int]) -> dict[int, list[Lead]]:
    """Return these rows as they are in every step."""
    leads: dict[int, list[Lead]] = {}
    for tables in rows.step_tables() if numbers else ():
        first = tables.steps[0][0].batch.first_position
        for number in numbers:
            if first <= number < first + tables.frame.height:
                leads[number] = _leads_of_row(rows, tables, number - first)
    return leads


def _leads_of_row(rows: StepRows, tables: StepTables, index: int) -> list[Lead]:
    leads: list[Lead] = []
    for step, (step_batch, text) in zip(rows.steps, tables.steps, strict=True):
        batch, error = step_batch.batch, step_batch.batch.errors[index]
        if step_batch.decisions[index] is StepDecision.WAIT:
            waits_for = [number for number in sorted(step.depends_on) if not tables.steps[number][0].final[index]]
            error = f"waits for {', '.join(rows.steps[number].job.step for number in waits_for)}"
        leads.append(replace(_make_lead(batch, index, text[index]), error=error))
    return leads


def _rows_by_request_of_steps(rows: StepRows, leads: Mapping[int, Sequence[Lead]]) -> list[dict[bytes, list[int]]]:
    """Return, for each step, the numbers (from 1) of the rows that have each of the leads' requests."""
    fingerprints = [
        {lead.fingerprint for of_row in leads.values() if (lead := of_row[number]).fingerprint is not None}
        for number in range(len(rows.steps))
    ]
    found: list[dict[bytes, list[int]]] = [{} for _ in rows.steps]
    for tables in rows.step_tables() if any(fingerprints) else ():
        for number, (step_batch, _) in enumerate(tables.steps):
            _add_rows(found[number], step_batch.batch, fingerprints[number])
    return found


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

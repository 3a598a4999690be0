"""`enrich explain`: shows the full history of one lead, from the input and the ledger, without network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import click

from enrich.commands import options
from enrich.commands.check_steps import open_ledger_or_empty
from enrich.commands.explain_history import Explainer, request_lines, row_lines, row_without_request
from enrich.errors import JobError
from enrich.job.cell_text import fold
from enrich.job.job import Job
from enrich.ledger import bindings, erasure, request_history
from enrich.ledger.database import Database, ledger_exists, open_existing
from enrich.ledger.erasure import ForgottenRequests
from enrich.ledger.lock import is_locked
from enrich.models import RequestSelection, RowStatus
from enrich.rows.job_input import JobInput
from enrich.rows.job_steps import StepDecision, make_steps
from enrich.rows.lookup import (
    MAX_LEADS_SHOWN,
    Lead,
    find_by_cell,
    find_by_number,
    params_from_cell,
    parse_match,
    rows_by_request,
)
from enrich.rows.template import RequestTemplate, template_of_unknown_target
from enrich.run.preflight import template_from_ledger
from enrich.run.step_batch import StepTables
from enrich.run.step_input import StepInput
from enrich.run.step_rows import StepRows


def explain_leads(job: Job, row: int | None, match: str | None) -> dict[str, Any]:
    """Return the object of `enrich explain --json` for a row, or for the rows that match `COLUMN=VALUE`.

    Raises JobError if the input has no such row or column, CommandRefused if the input cannot be read.
    """
    template, forgotten = _read_template(job)
    job_input = JobInput(job, forgotten)
    lookup_template = template or template_of_unknown_target(job)
    if match is not None:
        column, value = parse_match(match, job_input.columns)
        found = find_by_cell(job_input, lookup_template, column, value)
    else:
        found = find_by_number(job, job_input, lookup_template, row or 0)
    result: dict[str, Any] = {
        "job": job.name,
        "input": str(job.input_path),
        "ledger": str(job.ledger),
        "ever_ran": template is not None,
        "matches": found.count,
    }
    if template is None:
        return result | {"rows": [row_without_request(job, lead) for lead in found.leads], "gone": []}
    with closing(open_existing(job.ledger)) as ledger, ledger.snapshot():
        explainer = Explainer(job, template, ledger, is_locked(job.ledger))
        candidates = (
            list(request_history.find_by_any_param(ledger, params_from_cell(job, template, column, value)))
            if match is not None
            else []
        )
        fingerprints = {lead.fingerprint for lead in found.leads if lead.fingerprint is not None}
        fingerprints |= {candidate.fingerprint for candidate in candidates}
        rows_of = rows_by_request(job_input, template, fingerprints)
        params_of_leads = {lead.params for lead in found.leads}
        missing = [
            known for known in candidates if known.fingerprint not in rows_of and known.params not in params_of_leads
        ]
        return result | {
            "rows": [explainer.explain_row(lead, rows_of) for lead in found.leads],
            "gone": [explainer.explain_request(known) for known in missing[:MAX_LEADS_SHOWN]],
        }


def _read_template(job: Job) -> tuple[RequestTemplate | None, ForgottenRequests | None]:
    """Return the request template and the forgotten requests of the ledger. No template: this job has never run."""
    if not ledger_exists(job.ledger):
        return None, None
    with closing(Database(job.ledger, read_only=True)) as ledger:
        description = bindings.load_description(ledger, job.model.target)
        return None if description is None else template_from_ledger(ledger, job), erasure.load_forgotten(ledger)


def format_explanation(result: Mapping[str, Any]) -> Iterator[str]:
    """Format the object of `explain_leads` or `explain_steps` as text lines."""
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
@click.option("--row", type=options.AtLeast(1), metavar="ROW", help="Row number in the input. 1 is the first lead.")
@click.option("--match", metavar="COLUMN=VALUE", help="Rows with this value. Ignores case and surrounding spaces.")
@options.JSON_OPTION
def explain(job_options: options.JobOptions, row: int | None, match: str | None, as_json: bool) -> None:
    """Show the history of one lead of JOB: its params, requests, charges and results. Without network."""
    if (row is None) == (match is None):
        raise click.UsageError('choose a lead with --row ROW or --match "Email=ada@engine.example"')
    job = job_options.load()
    result = explain_steps(job, row, match) if job.step_jobs else explain_leads(job, row, match)
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(format_explanation(result)))


def explain_steps(job: Job, row: int | None, match: str | None) -> dict[str, Any]:
    """Return the object of `enrich explain --json` for a job with steps.

    Raises JobError if the input has no such row or column, CommandRefused if the input cannot be read.
    """
    with open_ledger_or_empty(job) as ledger, ledger.snapshot():
        job_input = JobInput(job, erasure.load_forgotten(ledger))
        found, count = _find_rows(job, job_input, row, match)
        templates = [
            template_from_ledger(ledger, step)
            if bindings.load_description(ledger, step.model.target)
            else template_of_unknown_target(step)
            for step in job.step_jobs
        ]
        rows = StepRows(job, job_input, ledger, make_steps(job, job_input, templates))
        StepInput(rows, 0).begin(RequestSelection())
        leads = _read_leads(rows, found)
        shared = _rows_by_request(rows, leads)
        is_running = is_locked(job.ledger)
        explainers = [Explainer(step.job, step.template, ledger, is_running) for step in rows.steps]
        return {
            "job": job.name,
            "input": str(job.input_path),
            "ledger": str(job.ledger),
            "ever_ran": any(bindings.load_description(ledger, step.model.target) for step in job.step_jobs),
            "matches": count,
            "rows": [
                {
                    "row": number + 1,
                    "steps": [
                        {"step": step.job.step} | explainer.explain_row(lead, shared[index])
                        for index, (step, explainer, lead) in enumerate(
                            zip(rows.steps, explainers, leads[number], strict=True)
                        )
                    ],
                }
                for number in found
            ],
            "gone": [],
        }


def _find_rows(job: Job, job_input: JobInput, row: int | None, match: str | None) -> tuple[list[int], int]:
    """Return the matching rows, at most MAX_LEADS_SHOWN of them (numbers from 0), and how many there are."""
    found: list[int] = []
    count = 0
    column, value = (None, "") if match is None else parse_match(match, job_input.columns)
    for first_position, _, text in job_input.frames():
        count = first_position + text.height
        if column is None:
            if row is not None and first_position < row <= count:
                return [row - 1], 1
            continue
        for position, cell in enumerate(text.to_series(job_input.header.index(column)), first_position):
            if fold(cell) == fold(value):
                found.append(position)
    if column is None:
        hint = "row numbers start at 1"
        raise JobError(f"--row {row}: the input has {count:,} rows ({job.input_path})", hint)
    return found[:MAX_LEADS_SHOWN], len(found)


def _read_leads(rows: StepRows, numbers: Sequence[int]) -> dict[int, list[Lead]]:
    """Return these rows as they are in every step."""
    leads: dict[int, list[Lead]] = {}
    for tables in rows.step_tables() if numbers else ():
        first = tables.steps[0][0].batch.first_position
        for number in numbers:
            if first <= number < first + tables.height:
                leads[number] = _leads_of_row(rows, tables, number - first)
    return leads


def _leads_of_row(rows: StepRows, tables: StepTables, index: int) -> list[Lead]:
    leads: list[Lead] = []
    for step, (step_batch, text) in zip(rows.steps, tables.steps, strict=True):
        batch, error = step_batch.batch, step_batch.batch.errors[index]
        if step_batch.decisions[index] is StepDecision.WAIT:
            waits_for = [number for number in sorted(step.depends_on) if not tables.steps[number][0].final[index]]
            error = f"waits for {', '.join(rows.steps[number].job.step for number in waits_for)}"
        cells = text.row(index, named=True)
        number, status = batch.first_position + index + 1, batch.statuses[index]
        leads.append(Lead(number, cells, batch.fingerprints[index], batch.params[index], status, error))
    return leads


def _rows_by_request(rows: StepRows, leads: Mapping[int, Sequence[Lead]]) -> list[dict[bytes, list[int]]]:
    """Return, for each step, the numbers (from 1) of the rows that have each of the leads' requests."""
    fingerprints = [
        {lead.fingerprint for of_row in leads.values() if (lead := of_row[number]).fingerprint is not None}
        for number in range(len(rows.steps))
    ]
    found: list[dict[bytes, list[int]]] = [{} for _ in rows.steps]
    for tables in rows.step_tables() if any(fingerprints) else ():
        for number, (step_batch, _) in enumerate(tables.steps):
            for position, name in enumerate(step_batch.batch.fingerprints, step_batch.batch.first_position + 1):
                if name is not None and name in fingerprints[number]:
                    found[number].setdefault(name, []).append(position)
    return found

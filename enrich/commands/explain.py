"""`enrich explain`: shows the full history of one lead, from the input and the ledger, without network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import click

from enrich.commands import options
from enrich.commands.explain_history import Explainer, request_lines, row_lines, row_without_request
from enrich.commands.explain_steps import explain_steps, format_steps_explanation
from enrich.job.job import Job
from enrich.ledger import bindings, erasure, request_history
from enrich.ledger.database import Database, ledger_exists, open_existing
from enrich.ledger.forgotten import ForgottenRequests
from enrich.ledger.lock import is_locked
from enrich.rows.job_input import JobInput
from enrich.rows.lookup import (
    MAX_LEADS_SHOWN,
    find_by_cell,
    find_by_number,
    params_from_cell,
    parse_match,
    rows_by_request,
)
from enrich.rows.template import RequestTemplate
from enrich.run.preflight import template_from_ledger


def explain_leads(job: Job, row: int | None, match: str | None) -> dict[str, Any]:
    """Return the object of `enrich explain --json` for a row, or for the rows that match `COLUMN=VALUE`.

    Raises JobError if the input has no such row or column, CommandRefused if the input cannot be read.
    """
    template, forgotten = _read_template(job)
    job_input = JobInput(job, forgotten)
    lookup_template = template or RequestTemplate(job.model.target, (), (), {}, None)
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
    """Format the object of `explain_leads` as text lines."""
    if not result["ever_ran"]:
        yield f"{result['job']} has never run ({result['ledger']})"
    if result["matches"] > MAX_LEADS_SHOWN:
        yield f"{result['matches']:,} rows match; the first {MAX_LEADS_SHOWN}:"
    for row in result["rows"]:
        yield from row_lines(row)
    if not result["rows"]:
        yield f"No row of {result['input']} matches."
    for request in result["gone"]:
        yield "No longer in the input, but in the ledger:"
        yield from request_lines(request)


@click.command()
@options.job_options(has_input=True)
@click.option("--row", type=options.AtLeast(1), metavar="ROW", help="Row number in the input. 1 is the first lead.")
@click.option("--match", metavar="COLUMN=VALUE", help="Rows with this value. Ignores case and surrounding spaces.")
@options.JSON_OPTION
def explain(
    job_options: options.JobOptions,
    row: int | None,
    match: str | None,
    as_json: bool,
) -> None:
    """Show the history of one lead of JOB: its params, requests, charges and results. Without network."""
    if (row is None) == (match is None):
        raise click.UsageError('choose a lead with --row ROW or --match "Email=ada@engine.example"')
    job = job_options.load()
    result = explain_steps(job, row, match) if job.step_jobs else explain_leads(job, row, match)
    lines = format_steps_explanation(result) if job.step_jobs else format_explanation(result)
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(lines))

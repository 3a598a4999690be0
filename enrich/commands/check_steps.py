"""Checks the steps of a job against the input: what each reads, how many leads it wants, what a request costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from enrich.commands.check_target import CheckResult, add_problem
from enrich.errors import EnrichError
from enrich.job.job import Job
from enrich.ledger.database import open_or_empty
from enrich.models import RequestSelection, to_credits
from enrich.rows.job_input import JobInput
from enrich.rows.job_steps import make_steps
from enrich.rows.template import RequestTemplate, join_templates, template_of_unknown_target
from enrich.run.context import RunOptions, select_requests
from enrich.run.step_input import StepInput
from enrich.run.step_plan import forecast_steps
from enrich.run.step_rows import StepRows


def check_steps(
    job: Job, job_input: JobInput | None, templates: Sequence[RequestTemplate | None], result: CheckResult
) -> None:
    """Check what the steps read, and count the leads that each wants at most. An error becomes a problem."""
    known = [
        template or template_of_unknown_target(step) for step, template in zip(job.step_jobs, templates, strict=True)
    ]
    result.steps = [_describe(step, template) for step, template in zip(job.step_jobs, known, strict=True)]
    if job_input is None:
        return
    try:
        job_input.check_new_columns(join_templates(known))
        # Where nothing is known of a target, neither are its columns.
        is_known = all(template or step.model.columns for step, template in zip(job.step_jobs, templates, strict=True))
        steps = make_steps(job if is_known else replace(job, complete=()), job_input, known)
        for step, described in zip(steps, result.steps, strict=True):
            described["depends_on"] = [job.step_jobs[number].step for number in sorted(step.depends_on)]
        if result.problems:
            return
        with open_or_empty(job.ledger) as ledger:
            rows = StepRows(job_input, ledger, steps)
            StepInput(rows, 0).begin(RequestSelection())
            selections = [select_requests(step, RunOptions(), 0) for step in job.step_jobs]
            result.rows, forecasts = forecast_steps(rows, ledger, selections)
    except EnrichError as error:
        add_problem(result.problems, error)
        return
    for forecast, described in zip(forecasts, result.steps, strict=True):
        described["leads"] = forecast.leads
    result.sendable_rows = max(forecast.leads for forecast in forecasts)


def _describe(step: Job, template: RequestTemplate) -> dict[str, Any]:
    target = step.model.target
    return {
        "name": step.step,
        target.kind.value: target.id,
        "leads": None,
        "worst_price": to_credits(template.worst_price),
        "max_credits": step.step_max_credits,
        "depends_on": None,
    }

"""`enrich check`: validates a job, its input, its paths and its ledger before a run. Read-only, offline by default."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import click
import polars as pl
from msgspec.structs import replace

from enrich.commands import options
from enrich.commands.check_target import CheckResult, ParamFill, add_problem, check_target, read_stored
from enrich.commands.paths import path_problems
from enrich.commands.report import INSTALL_HINT, is_extra_missing
from enrich.commands.streams import echo_error, echo_message
from enrich.databar.description import Description
from enrich.databar.environment import find_base_url, host_of
from enrich.errors import EnrichError, JobError
from enrich.job.cell_text import blank_cells
from enrich.job.job import Job
from enrich.job.locations import STDIN
from enrich.job.target import UNFILLED_COLUMN, Param
from enrich.ledger.database import open_or_empty
from enrich.models import pluralize, to_credits
from enrich.rows.job_input import JobInput
from enrich.rows.job_steps import make_steps, step_problems
from enrich.rows.requests import format_left_out, left_out_by_param
from enrich.rows.template import RequestTemplate, join_templates, template_of_unknown_target
from enrich.run.preflight import query_api


def check_summary(job: Job, result: CheckResult) -> str:
    """Format one line about a job without problems."""
    counts = ""
    if result.rows is not None:
        counts = f"{pluralize(result.rows, 'lead')}, {result.sendable_rows:,} can be sent, "
    target = pluralize(len(job.step_jobs), "step") if job.step_jobs else job.model.target.title
    return f"{job.name}: {counts}{target} as described by {result.source}"


def check_as_json(job: Job, result: CheckResult) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    problems = [{"message": problem.message, "hint": problem.hint} for problem in result.problems]
    return {
        "exit_code": int(result.exit_code),
        "job": job.name,
        "rows": result.rows,
        "can_be_asked": result.sendable_rows,
        "left_out": left_out_by_param(result.left_out),
        "params": None
        if result.fill is None
        else {
            name: {"filled": result.fill.filled[name], "missing": result.fill.missing[name]}
            for name in job.model.params
        },
        **(
            {"steps": result.steps}
            if job.step_jobs
            else {job.model.target.kind.value: job.model.waterfall or job.model.enrichment}
        ),
        "described_by": result.source,
        "changes": result.changes,
        "notes": [*result.warnings, *result.notes],
        "problems": problems,
    } | ({"error": problems[0]["message"]} if problems else {})


def check_job(job: Job, bound_to: Mapping[str, str | None], live: Sequence[Description] = ()) -> CheckResult:
    """Check a job as far as possible and collect all problems.

    `bound_to` is what the runs will use (`api_host`, `workspace`), as far as known. `live` has the API's current
    descriptions of the targets of the steps; (): the check is offline.
    """
    result = CheckResult("")
    stored = [read_stored(step, bound_to, result) for step in job.steps]
    result.problems += [problem for step in job.steps for problem in _unfilled_params(step)]
    job_input = None
    if job.input_path == STDIN or not isinstance(job.input_path, Path):
        result.notes.append("the input was not read, because it is a pipe, in object storage or on the web")
    else:
        job_input = _open_input(job, result.problems)
        result.notes += [] if job_input is None else job_input.notes()
    templates = [
        check_target(step, known, live[number] if live else None, result)
        for number, (step, known) in enumerate(zip(job.steps, stored, strict=True))
    ]
    result.template = templates[0]
    if job.step_jobs:
        _check_steps(job, job_input, templates, result)
    elif job_input is not None and (result.template is not None or not result.problems):
        _read_input(job_input, result.template or template_of_unknown_target(job), result)
    if job_input is not None and not result.problems:
        result.warnings += _key_warnings(job_input)
    of_paths, of_ledger = list(path_problems(job)), f"{job.ledger}: "
    # Only one problem of the ledger is reported: that it is another file of the job, or else why it cannot be opened.
    if any("`ledger` are the same" in problem.message or "`ledger` and" in problem.message for problem in of_paths):
        result.problems = [each for each in result.problems if not each.message.startswith(of_ledger)]
    elif any(problem.message.startswith(of_ledger) for problem in result.problems):
        of_paths = [each for each in of_paths if not each.message.startswith(of_ledger)]
    for problem in of_paths:
        add_problem(result.problems, problem)
    if job.model.report is not None and job.model.report.path is not None and is_extra_missing():
        result.notes.append(f"the `report` needs its extra: {INSTALL_HINT}")
    return result


def _check_steps(
    job: Job, job_input: JobInput | None, templates: Sequence[RequestTemplate | None], result: CheckResult
) -> None:
    """Check what the steps read, and count the leads that each may send. An error becomes a problem."""
    from enrich.run.context import RunOptions, select_requests
    from enrich.run.step_plan import forecast_steps
    from enrich.run.step_rows import StepRows

    known = [
        template or template_of_unknown_target(step) for step, template in zip(job.step_jobs, templates, strict=True)
    ]
    result.steps = [_describe_step(step, template) for step, template in zip(job.step_jobs, known, strict=True)]
    if job_input is None:
        return
    try:
        job_input.check_new_columns(join_templates(known))
    except EnrichError as error:
        add_problem(result.problems, error)
    job, known = _known_steps(job, job_input, known, result)
    for problem in step_problems(job, job_input, known):
        add_problem(result.problems, problem)
    if result.problems:
        return
    steps = make_steps(job, job_input, known)
    for step, described in zip(steps, result.steps, strict=False):
        described["depends_on"] = [job.step_jobs[number].step for number in sorted(step.depends_on)]
    try:
        with open_or_empty(job.ledger) as ledger:
            rows = StepRows(job_input, ledger, steps)
            rows.begin()
            selections = [select_requests(step.job, RunOptions(), 0) for step in steps]
            result.rows, result.sendable_rows, forecasts = forecast_steps(rows, ledger, selections)
    except EnrichError as error:
        add_problem(result.problems, error)
        return
    for forecast, described in zip(forecasts, result.steps, strict=False):
        described["leads"] = forecast.leads


def _known_steps(
    job: Job, job_input: JobInput, templates: list[RequestTemplate], result: CheckResult
) -> tuple[Job, list[RequestTemplate]]:
    """Return the job with its steps, or the first ones if a later one may read a field of an unknown target."""
    unknown = next((number for number, template in enumerate(templates, 1) if not template.columns), None)
    if unknown is None:
        return job, templates
    job = replace(job, complete=())
    if not any(step_problems(job, job_input, templates)):
        return job, templates
    step = job.step_jobs[unknown - 1]
    result.notes.append(
        f"the steps after `{step.step}` were not checked: the fields of {step.model.target.label} are not known. "
        "`--online` checks them"
    )
    return replace(job, step_jobs=job.step_jobs[:unknown]), templates[:unknown]


def _describe_step(step: Job, template: RequestTemplate) -> dict[str, Any]:
    target = step.model.target
    return {
        "name": step.step,
        target.kind.value: target.id,
        "leads": None,
        "worst_price": to_credits(template.worst_price),
        "max_credits": step.step_max_credits,
        "depends_on": None,
    }


def _unfilled_params(job: Job) -> Iterator[JobError]:
    for name, param in job.model.params.items():
        if UNFILLED_COLUMN in param.columns:
            hint = f"write the name of the column with the {name}, or {{value: …}} for a constant"
            yield job.error(["params", name], "no column is set", hint)


def _open_input(job: Job, problems: list[EnrichError]) -> JobInput | None:
    """Open the input and check each part of the job against it. A part that does not fit is reported and left out."""
    with suppress(EnrichError):
        return JobInput(job)
    model = job.model
    removed_parts = dict.fromkeys(("where", "order_by", "caps", "suppress", "changes", "report")) | {
        "params": {},
        "only_if_empty": [],
    }
    bare_model = model.model_copy(update=removed_parts)

    def can_open(**part: object) -> bool:
        try:
            JobInput(replace(job, model=bare_model.model_copy(update=part)))
        except EnrichError as error:
            add_problem(problems, error)
            return False
        return True

    try:
        job_input = JobInput(replace(job, model=bare_model))
        # An input without any column of the params is one problem, not one for each column.
        named = [name for param in model.params.values() for name in param.columns]
        if (foreign := job_input.foreign_input_error(named)) is not None:
            raise foreign
        first_column = job_input.columns[:1]
        # A column is tried beside those that the input has: without any, the input seems to be another file.
        present = [name for name in named if name in job_input.all_columns]
        beside = {"": Param(column=present)} if present else {}

        def fits(name: str, param: Param) -> bool:
            """Try each column of a param separately, so that each missing column is reported."""
            if UNFILLED_COLUMN in param.columns:
                return False
            return not [each for each in param.columns if not can_open(params={**beside, name: param.only_from(each)})]

        def fitting(key: str, columns: Sequence[str]) -> list[str]:
            """Try each column of a key at its index, so that an error names its line."""
            tried = ((column, [*first_column * index, column]) for index, column in enumerate(columns))
            return [column for column, listed in tried if can_open(params=beside, **{key: listed})]

        params = {name: param if fits(name, param) else Param(value="?") for name, param in model.params.items()}
        valid_parts: dict[str, object] = {
            "params": params,
            "only_if_empty": fitting("only_if_empty", model.only_if_empty),
            "order_by": fitting("order_by", model.order_by or ()) or None,
        }
        for key in ("where", "caps", "suppress", "changes", "report"):
            part = getattr(model, key)
            valid_parts[key] = part if part is None or can_open(params=params, **{key: part}) else None
        return JobInput(replace(job, model=model.model_copy(update=valid_parts)))
    except EnrichError as error:
        problems.append(error)
        return None


def _read_input(job_input: JobInput, template: RequestTemplate, result: CheckResult) -> None:
    """Read the input to its end and count its rows. An error becomes a problem."""
    try:
        job_input.check_new_columns(template)
        rows, fill = 0, ParamFill(job_input.job)
        for batch in job_input.batches(template):
            rows += batch.frame.height
            result.left_out += batch.left_out
            fill.add(batch)
    except EnrichError as error:
        add_problem(result.problems, error)
        return
    result.rows, result.sendable_rows, result.fill = rows, fill.sendable, fill
    result.warnings += fill.warnings()


def _key_warnings(job_input: JobInput) -> Iterator[str]:
    """Yield a warning for leads without a `changes.key`, and one for leads that share theirs."""
    changes = job_input.job.model.changes
    if changes is None or changes.key is None:
        return
    columns = [job_input.header.index(name) for name in changes.key]
    blank, hashes = 0, [pl.Series(dtype=pl.UInt64)]
    for _, _, text in job_input.frames():
        keys = text[:, columns].filter(job_input.selected_rows(text))
        is_blank = reduce(and_, (blank_cells(cells, ()) for cells in keys.get_columns()))
        blank += int(is_blank.sum())
        hashes.append(keys.filter(~is_blank).hash_rows())
    name = f"`changes.key` ({', '.join(changes.key)})"
    if blank:
        yield f"{name} is blank in {pluralize(blank, 'lead')}: the change feed does not say which they are"
    if shared := int(pl.concat(hashes).is_duplicated().sum()):
        yield f"{name} is not unique: {pluralize(shared, 'lead')} share theirs with another one"


def _step_lines(steps: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of the steps: target, leads wanted at most, highest price of a request, steps it depends on."""
    if not steps:
        return
    targets = [f"{kind} {step[kind]}" for step in steps for kind in ("waterfall", "enrichment") if kind in step]
    names = [step["name"] for step in steps]
    width, target_width = max(map(len, [*names, "step"])), max(map(len, [*targets, "target"]))
    yield f"  {'step':<{width}}  {'target':<{target_width}}  {'leads':>9}  {'price':>8}  depends on"
    for step, target in zip(steps, targets, strict=True):
        leads = "-" if step["leads"] is None else f"{step['leads']:,}"
        price = "-" if step["worst_price"] is None else f"{step['worst_price']:,.15g}"
        depends = ", ".join(step["depends_on"] or ()) or "-"
        yield f"  {step['name']:<{width}}  {target:<{target_width}}  {leads:>9}  {price:>8}  {depends}"


def check_with_access(job: Job, *, online: bool) -> CheckResult:
    """Check a job and its ledger; with `online` against the API, too. Raises EnrichError if the API cannot be used."""
    live = None
    bound_to: dict[str, str | None] = {} if job.sandbox else {"api_host": host_of(find_base_url(os.environ))}
    if online:
        with options.open_access(None, use_sandbox=job.sandbox) as access:
            live = query_api(access, job)
        if not job.sandbox:
            bound_to["workspace"] = live.user.workspace
    return check_job(job, bound_to, live.descriptions if live else ())


@click.command()
@options.RUN_JOB_OPTIONS
@click.option("--online", is_flag=True, help="Compare with the API, too, and list what changed since the last run.")
@options.JSON_OPTION
def check(job_options: options.JobOptions, online: bool, as_json: bool) -> int:
    """Check JOB before it runs, and list every problem. Free, offline, changes nothing.

    Reads the job file, the whole input, the paths and the ledger.
    """
    job = job_options.load()
    result = check_with_access(job, online=online)
    if as_json or not result.problems:
        lines = [f"ok: {check_summary(job, result)}", *_step_lines(result.steps)]
        lines += result.fill.mapping_lines() if result.fill else ()
        options.echo_result(check_as_json(job, result), lines, as_json=as_json)
    for line in format_left_out(left_out_by_param(result.left_out)):
        echo_message(line, label="not used: ")
    for warning in result.warnings:
        echo_message(warning, label="warning: ")
    for note in [*result.changes, *result.notes]:
        echo_message(note, label="note: ")
    for problem in result.problems:
        echo_error(problem.message, problem.hint)
    return result.exit_code

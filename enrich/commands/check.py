"""`enrich check`: validates a job, its input, its paths and its ledger before a run. Read-only, offline by default."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from enrich.commands import options
from enrich.commands.init.template import PLACEHOLDER
from enrich.commands.paths import path_exists, path_problems
from enrich.databar.credentials import find_base_url, host_of
from enrich.databar.waterfall import DOCUMENTED_ON, DOCUMENTED_WATERFALLS, Field, Waterfall, waterfall_changes
from enrich.databar.waterfall import Param as Offered
from enrich.errors import CommandRefused, EnrichError, JobError
from enrich.exit_codes import EXIT_PRECEDENCE, ExitCode
from enrich.job.job import Job
from enrich.job.locations import STDIN, ObjectUrl, PostgresLocation
from enrich.job.spec import Param
from enrich.ledger.database import ledger_exists
from enrich.ledger.ledger import Ledger
from enrich.ledger.sqlite import CHECKED_AT_START_BYTES, RESTORE_HINT
from enrich.ledger.verify import check_ledger
from enrich.report.page_file import INSTALL_HINT, is_extra_missing
from enrich.rows.reader import JobInput
from enrich.rows.template import RequestTemplate, make_request_template, missing_params, unknown_params
from enrich.run.preflight import query_api


@dataclass(slots=True)
class CheckResult:
    """Findings of a check. `sendable_rows` of the `rows` have a request. Both are None if the input was not read.

    `source` is where the waterfall's description comes from. `changes` lists what the vendor changed.
    """

    source: str
    problems: list[EnrichError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    template: RequestTemplate | None = None
    rows: int | None = None
    sendable_rows: int | None = None

    @property
    def exit_code(self) -> ExitCode:
        """The exit code that a run would have because of the problems."""
        codes = {problem.exit_code for problem in self.problems}
        return next((code for code in EXIT_PRECEDENCE if code in codes), ExitCode.OK)


def check_summary(job: Job, result: CheckResult) -> str:
    """Format one line about a job without problems."""
    counts = ""
    if result.rows is not None:
        counts = f"{result.rows:,} {'row' if result.rows == 1 else 'rows'}, {result.sendable_rows:,} can be asked, "
    return f"{job.name}: {counts}{job.model.waterfall} as known from {result.source}"


def check_as_json(job: Job, result: CheckResult) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    problems = [{"message": problem.message, "hint": problem.hint} for problem in result.problems]
    return {
        "exit_code": int(result.exit_code),
        "job": job.name,
        "rows": result.rows,
        "can_be_asked": result.sendable_rows,
        "waterfall": job.model.waterfall,
        "described_by": result.source,
        "changes": result.changes,
        "notes": result.notes,
        "problems": problems,
    } | ({"error": problems[0]["message"]} if problems else {})


def check_job(job: Job, bound_to: Mapping[str, str | None], live: Waterfall | None = None) -> CheckResult:
    """Check a job as far as possible and collect all problems.

    `bound_to` is what the runs will use (`api_host`, `workspace`), as far as known. `live` is the API's current
    description of the waterfall, None if the API was not asked.
    """
    result = CheckResult("")
    last_known: Waterfall | None = None
    providers: list[int] = []
    try:
        last_known, providers = _read_ledger(job, bound_to)
    except EnrichError as error:
        result.problems.append(error)
    documented = DOCUMENTED_WATERFALLS.get(job.model.waterfall)
    waterfall = live or last_known or documented
    result.source = _description_source(live, last_known, documented)
    if live and last_known:
        result.changes = list(waterfall_changes(last_known, live))
    result.problems += _unfilled_params(job)
    job_input = None
    if job.input_path == STDIN or isinstance(job.input_path, ObjectUrl):
        result.notes.append("the input comes through a pipe or from a storage: it was not read")
    else:
        job_input = _open_input(job, result.problems)
    if waterfall is None:
        result.notes.append(f"the waterfall `{job.model.waterfall}` is in no documentation: `--online` asks the API")
    elif waterfall is documented:
        result.problems += missing_params(job, waterfall)
        source_note = f"says {result.source}, which may be out of date: `--online` asks the API"
        result.notes += [f"{problem.message}, {source_note}" for problem in unknown_params(job, waterfall)]
        result.template = _make_documented_template(job, waterfall, result.problems)
    else:
        result.problems += [*unknown_params(job, waterfall), *missing_params(job, waterfall)]
        result.template = _make_template(job, waterfall, providers, result.problems)
    if job_input is not None and result.template is not None:
        _read_input(job_input, result.template, result)
    result.problems += path_problems(job)
    if job.model.report is not None and job.model.report.path is not None and is_extra_missing():
        result.notes.append(f"no run can write the `report` without its extra: {INSTALL_HINT}")
    return result


def _description_source(live: Waterfall | None, last_known: Waterfall | None, documented: Waterfall | None) -> str:
    if live:
        return "the API now"
    if last_known:
        return "the API at the last run"
    return f"the documentation of {DOCUMENTED_ON}" if documented else "nobody"


def _read_ledger(job: Job, bound_to: Mapping[str, str | None]) -> tuple[Waterfall | None, list[int]]:
    """Read the stored waterfall (None without one) and its provider ids. Raises the same errors as a run."""
    path = job.ledger
    if not (ledger_exists(path) if isinstance(path, PostgresLocation) else path_exists(path)):
        return None, []
    if isinstance(path, Path) and path.is_file() and path.stat().st_size <= CHECKED_AT_START_BYTES:
        found = check_ledger(path)
        if found.problems:
            raise CommandRefused(f"{path}: the ledger is not sound: {'; '.join(found.problems)}", RESTORE_HINT)
    with closing(Ledger(path, read_only=True)) as ledger:
        bound = {name: ledger.read_fact(name) for name in bound_to}
        stored = ledger.waterfall(job.model.waterfall)
    for name, value in bound_to.items():
        if None not in (value, bound[name]) and value != bound[name]:
            raise JobError(
                f"{path}: this ledger belongs to another {name.replace('_', ' ')}: {bound[name]}, not {value}",
                "use another `ledger:`, or the key and DATABAR_BASE_URL that it was made with",
            )
    if stored is None:
        return None, []
    return Waterfall.model_validate(stored[0]), stored[1] or []


def _unfilled_params(job: Job) -> Iterator[JobError]:
    for name, param in job.model.params.items():
        if PLACEHOLDER in param.columns:
            hint = f"put the name of the column there that holds the {name}, or {{value: …}} for a constant"
            yield job.error(["params", name], "is still to be filled in", hint)


def _open_input(job: Job, problems: list[EnrichError]) -> JobInput | None:
    """Open the input and check each part of the job against it. A part that does not fit is reported and left out."""
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
            problems.append(error)
            return False
        return True

    try:
        first_column = JobInput(replace(job, model=bare_model)).columns[:1]
        params = {
            name: param if _param_fits(name, param, can_open) else Param(value="?")
            for name, param in model.params.items()
        }
        only = [
            column
            for index, column in enumerate(model.only_if_empty)
            if can_open(only_if_empty=[*first_column * index, column])  # at its index, so that the error names its line
        ]
        valid_parts: dict[str, object] = {"params": params, "only_if_empty": only}
        order = [
            column
            for index, column in enumerate(model.order_by or ())
            if can_open(order_by=[*first_column * index, column])
        ]
        valid_parts["order_by"] = order or None
        for key in ("where", "caps", "suppress", "changes", "report"):
            part = getattr(model, key)
            valid_parts[key] = part if part is None or can_open(params=params, **{key: part}) else None
        return JobInput(replace(job, model=model.model_copy(update=valid_parts)))
    except EnrichError as error:
        problems.append(error)
        return None


def _param_fits(name: str, param: Param, can_open: Callable[..., bool]) -> bool:
    """Try each column of a param separately, so that each missing column is reported."""
    if PLACEHOLDER in param.columns:
        return False
    single_column_params = [param.model_copy(update={"columns": [column]}) for column in param.columns]
    return not [each for each in single_column_params if not can_open(params={name: each})]


def _make_template(
    job: Job, waterfall: Waterfall, providers: list[int], problems: list[EnrichError]
) -> RequestTemplate | None:
    """Make the request template with all params of the job. Unknown and missing params were reported before."""
    if not providers:
        providers = [each.id for each in waterfall.available_enrichments if each.enabled_by_default]
    offered = {param.name: param for param in waterfall.input_params}
    mapped = [offered.get(name, Offered(name=name)) for name in job.model.params]
    try:
        return make_request_template(job, waterfall.model_copy(update={"input_params": mapped}), providers)
    except JobError as error:
        problems.append(error)
        return None


def _make_documented_template(job: Job, waterfall: Waterfall, problems: list[EnrichError]) -> RequestTemplate | None:
    """Make the request template from the documentation, which lacks the providers and some fields."""
    lenient = waterfall.model_copy(
        update={
            "is_email_verifying": True,
            "output_fields": waterfall.output_fields or [Field(name=waterfall.identifier)],
        }
    )
    return _make_template(job, lenient, job.model.enrichments or [0], problems)


def _read_input(job_input: JobInput, template: RequestTemplate, result: CheckResult) -> None:
    """Read the input to its end and count its rows. An error becomes a problem."""
    try:
        job_input.check_new_columns(template)
        result.rows = result.sendable_rows = 0
        for batch in job_input.batches(template):
            result.rows += batch.frame.height
            result.sendable_rows += sum(fingerprint is not None for fingerprint in batch.fingerprints)
    except EnrichError as error:
        result.rows = result.sendable_rows = None
        result.problems.append(error)


@click.command()
@options.RUN_JOB_OPTIONS
@click.option("--online", is_flag=True, help="Ask the API, too: what did it change since the last run?")
@options.JSON_OPTION
def check(
    job_options: options.JobOptions,
    online: bool,
    as_json: bool,
) -> int:
    """Check JOB before it runs: the file, the input to its end, the paths, the ledger. Pays and changes nothing."""
    job = job_options.load()
    live = None
    bound_to: dict[str, str | None] = (
        {} if job_options.use_sandbox else {"api_host": host_of(find_base_url(os.environ))}
    )
    if online:
        with options.open_access(None, use_sandbox=job_options.use_sandbox) as access:
            live = query_api(access, job.model.waterfall)
        if not job_options.use_sandbox:
            bound_to["workspace"] = live.user.workspace
    result = check_job(job, bound_to, live.waterfall if live else None)
    if as_json:
        click.echo(json.dumps(check_as_json(job, result), ensure_ascii=False))
    elif not result.problems:
        click.echo(f"ok: {check_summary(job, result)}")
    for note in [*result.changes, *result.notes]:
        click.echo(f"note: {note}", err=True)
    for problem in result.problems:
        click.echo(f"error: {problem.message}", err=True)
        if problem.hint:
            click.echo(f"hint: {problem.hint}", err=True)
    return result.exit_code

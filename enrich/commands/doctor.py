"""`enrich doctor`: checks that the next cron run of a job will work. Read-only."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from shutil import disk_usage

import click
from msgspec import Struct
from msgspec.structs import replace

from enrich.commands import doctor_checks as checks
from enrich.commands import options
from enrich.commands.check import check_job, check_summary
from enrich.commands.check_target import CheckResult
from enrich.commands.cron import cron_environment, enrich_command, make_cron_environ
from enrich.commands.doctor_checks import Finding, error_finding, next_run_time
from enrich.commands.paths import files_read, files_written, local_input_files, nearest_existing
from enrich.commands.report import INSTALL_HINT, is_extra_missing
from enrich.databar.environment import NO_KEY_HINT, ApiAccess, find_base_url, find_key, find_proxy, load_certificates
from enrich.errors import CommandRefused, EnrichError, JobError
from enrich.exit_codes import ExitCode, first_exit_code
from enrich.files import object_store
from enrich.files.input_files import find_objects
from enrich.job.job import Job
from enrich.job.locations import InputLocation, ObjectUrl, PostgresLocation, sandbox_state_path
from enrich.ledger import queries, records, transitions
from enrich.ledger.database import ledger_exists, open_or_empty
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.lock import is_locked
from enrich.models import State, pluralize, read_balance, to_micros, to_ms
from enrich.run.budget import make_budget
from enrich.run.preflight import ApiSnapshot, query_api

RECENT_EXECUTIONS = 7
#: Bytes per request in a small ledger. With at least ENOUGH_REQUESTS requests the ledger's own average is used.
REQUEST_BYTES, ENOUGH_REQUESTS = 2_000, 100
#: Maximum factor by which gzip compresses a CSV.
GZIP_FACTOR = 10
KEY_REMEDY = (
    "set DATABAR_API_KEY_FILE in the crontab, as `enrich cron JOB --at 02:00` does, then pass "
    "--env DATABAR_API_KEY_FILE=…"
)
#: Environment variables that change where and how the API and the ledger are reached.
ENVIRONMENT_VARIABLES = (
    "DATABAR_BASE_URL",
    *(name for lower in ("https_proxy", "all_proxy", "no_proxy") for name in (lower, lower.upper())),
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "ENRICH_LEDGER",
)


class DoctorContext(Struct, frozen=True):
    """Conditions of the checks. `cron_environ` is the environment under cron, `shell_environ` the current one.

    `next_run` is when the job runs next. `sandbox_access` is set if the job is checked against the sandbox.
    """

    cron_environ: Mapping[str, str]
    shell_environ: Mapping[str, str]
    now: datetime
    next_run: datetime
    offline: bool = False
    sandbox_access: ApiAccess | None = None


def job_findings(job: Job, context: DoctorContext) -> Iterator[Finding]:
    """Check a job and everything that its runs need. Writes nothing and spends nothing."""
    access = context.sandbox_access
    bound_to: dict[str, str | None] = {}
    if context.sandbox_access is None:
        access = yield from environment_findings(context)
        bound_to = {"api_host": access.host} if access else {}
    live: ApiSnapshot | None = None
    if access and not context.offline:
        try:
            live = query_api(access, job, context.cron_environ)
            if context.sandbox_access is None:
                bound_to["workspace"] = live.user.workspace
            yield Finding("ok", "api", f"{access.host} accepts the key")
            yield checks.check_clock(live.clock_ahead_s)
        except EnrichError as error:
            yield error_finding("key" if error.exit_code is ExitCode.KEY else "api", error)
    check = check_job(job, bound_to, live.descriptions if live else ())
    yield from (error_finding("job", problem) for problem in check.problems)
    yield from (Finding("warn", "waterfall", change, "check that the job still fits") for change in check.changes)
    if not check.problems:
        yield Finding("ok", "job", check_summary(job, check))
    if job.model.report is not None and job.model.report.path is not None and is_extra_missing():
        yield Finding("warn", "report", "the run cannot write the `report` without its extra", INSTALL_HINT)
    yield from _file_findings(job, context)
    if not context.offline:
        with suppress(JobError):  # check_job has reported it
            yield from _storage_findings(job, context.next_run)
    requests = yield from _ledger_findings(job, context, check, live)
    yield from _disk_findings(job, context, check, requests)
    yield from _program_findings(job, context)


def environment_findings(context: DoctorContext) -> Generator[Finding, None, ApiAccess | None]:
    """Check the API key and the network settings in cron's environment. Return the access, None if it is unusable."""
    environ, home = context.cron_environ, Path(context.cron_environ["HOME"])
    key = base_url = None
    try:
        key = find_key(environ, home)
        yield Finding("ok", "key", "available to cron")
        yield from _key_file_findings(environ, home)
    except EnrichError as error:
        set_names = [
            name for name in ("DATABAR_API_KEY", "DATABAR_API_KEY_FILE") if context.shell_environ.get(name, "").strip()
        ]
        if set_names and not any(environ.get(name) for name in set_names):
            message = f"{set_names[0]} is set in this shell only, not in cron"
            yield Finding("fail", "key", message, KEY_REMEDY, ExitCode.KEY)
        else:
            remedy = KEY_REMEDY if error.hint == NO_KEY_HINT else error.hint
            yield Finding("fail", "key", error.message, remedy, error.exit_code)
    try:
        base_url = find_base_url(environ)
        find_proxy(environ, base_url)
        if base_url.startswith("https:"):
            load_certificates(environ)
    except EnrichError as error:
        base_url = None
        yield error_finding("api", error)
    for name in ENVIRONMENT_VARIABLES:
        if context.shell_environ.get(name) and not environ.get(name):
            message = f"{name} is set in this shell only, not in cron"
            yield Finding("warn", "api", message, f"set it in the crontab, then pass --env {name}=…")
    return ApiAccess(base_url, key) if base_url is not None and key is not None else None


def _key_file_findings(environ: Mapping[str, str], home: Path) -> Iterator[Finding]:
    if environ.get("DATABAR_API_KEY", "").strip():
        return
    path = Path(environ.get("DATABAR_API_KEY_FILE", "").strip() or home / ".databar" / "config")
    if not path.is_absolute():
        yield Finding("warn", "key", f"{path} is a relative path, and cron starts in {home}", "use the absolute path")
    if checks.is_accessible_by_others(path):
        yield Finding("warn", "key", f"{path}: other users can read the key", f"chmod 600 {path}")


def _file_findings(job: Job, context: DoctorContext) -> Iterator[Finding]:
    """Check the input's age, the output's names and the ledger's file checks."""
    if ages := [path.stat().st_mtime for path in local_input_files(job) if os.access(path, os.R_OK)]:
        yield checks.check_input_age(max(ages), context.now.timestamp())
    reserved = {path: f"the {key}" if key in ("input", "ledger") else key for key, path in files_read(job).items()}
    if isinstance(job.ledger, PostgresLocation):
        yield checks.check_output_names(job.output_path, context.next_run, reserved)
        return
    yield checks.check_output_names(job.output_path, context.next_run, {**reserved, job.ledger: "the ledger"})
    kind = checks.file_system_type(checks.read_mountinfo(), Path(os.path.realpath(job.ledger)))
    if checks.is_network_file_system(kind):
        message = f"{job.ledger} is on a network file system ({kind}), where SQLite locks are not reliable"
        yield Finding("warn", "ledger", message, "keep the ledger on a local disk: `ledger:` in the job file")


def _storage_findings(job: Job, next_run: datetime) -> Iterator[Finding]:
    """Check with cron's credentials that the job's objects in object storage can be reached. Reads no object."""
    files: dict[str, InputLocation] = {"input": job.input_path, "output": job.output_path(next_run)}
    for key, url in (files | job.extra_output_paths(next_run)).items():
        if not isinstance(url, ObjectUrl):
            continue
        try:
            if key != "input":
                object_store.check_bucket(url)
            elif not any(find_objects(url).values()):
                raise CommandRefused(f"{url} does not exist", "check the URL")
            yield Finding("ok", "storage", f"{url} can be reached with cron's environment")
        except EnrichError as error:
            remedies = (error.hint, "variables must be in the crontab: pass each with --env NAME")
            remedy = "; ".join(filter(None, remedies))
            yield Finding("fail", "storage", error.message, remedy, error.exit_code)


def _ledger_findings(
    job: Job, context: DoctorContext, check: CheckResult, live: ApiSnapshot | None
) -> Generator[Finding, None, int]:
    """Check what earlier runs left in the ledger, and the credits for the next run. Return how many requests it has."""
    path = job.ledger
    try:
        with open_or_empty(path) as ledger:
            counts = queries.state_counts(ledger)
            executions = records.list_executions(ledger, job.name, RECENT_EXECUTIONS)
            submitted = [task.submitted_ms for task in transitions.submitted_tasks(ledger) for _ in task.attempts]
        exists = ledger_exists(path)
    except (EnrichError, *DATABASE_ERRORS):
        return 0  # check_job has reported it
    requests = sum(counts.values())
    content = f"{pluralize(requests, 'request')} in {path}" if exists else f"{path}: created by the first run"
    yield Finding("ok", "ledger", content)
    if is_locked(path):
        yield Finding(
            "warn", "lock", "a run is in progress", "wait until it ends, or start the next one with --if-locked skip"
        )
    ttl_ms = to_ms(job.result_ttl)
    now_ms, next_run_ms = (int(at.timestamp() * 1000) for at in (context.now, context.next_run))
    yield checks.check_expiring_results(submitted, ttl_ms, now_ms, next_run_ms)
    yield checks.check_in_doubt(counts.get(State.IN_DOUBT, 0))
    max_price = check.template.worst_price if check.template else None
    limits = job.model.limits
    if check.template and live:
        try:
            make_budget(job, check.template, read_balance(live.user.balance))
        except EnrichError as error:
            yield error_finding("cap", error)
    yield checks.check_cap(to_micros(limits.max_credits), max_price, executions)
    if live:
        spent = [row.spent for row in executions]
        yield checks.check_balance(read_balance(live.user.balance), to_micros(limits.min_balance), max_price, spent)
    return requests


def _disk_findings(job: Job, context: DoctorContext, check: CheckResult, requests: int) -> Iterator[Finding]:
    """Check the free space for the output and the ledger, which has this many requests."""
    try:
        size = sum(
            path.stat().st_size * (GZIP_FACTOR if path.suffix.lower() == ".gz" else 1)
            for path in local_input_files(job)
        )
        per_request = 0.0  # the disk of a database server is not checked
        if not isinstance(job.ledger, PostgresLocation):
            per_request = job.ledger.stat().st_size / requests if requests >= ENOUGH_REQUESTS else REQUEST_BYTES
        # SQLite's journal may hold a second copy of the data.
        growth = int(2 * per_request * (check.sendable_rows or 0))
        ledger_folder = job.ledger.local_folder if isinstance(job.ledger, PostgresLocation) else job.ledger.parent
        ledger_disk, output = nearest_existing(ledger_folder), job.output_path(context.next_run)
        output_disk = nearest_existing(output.parent) if isinstance(output, Path) else ledger_disk
        is_one_disk = output_disk.stat().st_dev == ledger_disk.stat().st_dev
        free = disk_usage(output_disk).free
        yield checks.check_free_space(output_disk, free, 2 * size, growth if is_one_disk else 0)
        if not is_one_disk:
            yield checks.check_free_space(ledger_disk, disk_usage(ledger_disk).free, 0, growth)
    except OSError:
        return  # check_job has reported what cannot be read


def _program_findings(job: Job, context: DoctorContext) -> Iterator[Finding]:
    """Start the program as cron would, and check its encoding of file names."""
    command = enrich_command()
    problem = checks.startup_error(command, context.cron_environ)
    if problem:
        message = f"{command[0]} does not start with cron's environment: {problem}"
        yield Finding("fail", "program", message, "install it where cron's user can run it", ExitCode.REFUSED)
    else:
        yield Finding("ok", "program", f"{' '.join(command)} starts with cron's environment")
    try:
        paths = [*files_written(job, context.next_run).values(), *files_read(job).values()]
    except JobError:
        return  # check_job has reported it
    if all(str(path).isascii() for path in paths):
        return
    encoding = checks.file_name_encoding(context.cron_environ)
    if encoding.replace("-", "").lower() != "utf8":
        message = f"file names are written in {encoding} under cron, and the job's paths are not ASCII"
        yield Finding(
            "fail", "names", message, "set LANG=C.UTF-8 in the crontab, then pass --env LANG=C.UTF-8", ExitCode.REFUSED
        )


@contextmanager
def _open_sandbox(job: Job | None) -> Iterator[ApiAccess]:
    """Open the sandbox of the job, or a new one if the job's has never run, or another command is using it."""
    with ExitStack() as stack:
        access = None
        if job is not None and sandbox_state_path(job.ledger).is_file():
            with suppress(CommandRefused):
                access = stack.enter_context(options.open_access(job, use_sandbox=True))
        yield access or stack.enter_context(options.open_access(None, use_sandbox=True))


@click.command()
@options.JOB_ARGUMENT
@click.option(
    "--env", "given", multiple=True, metavar="NAME[=VALUE]", help="A variable that the crontab sets. Can be repeated."
)
@click.option("--env-file", type=options.FILE, metavar="FILE", help="A file with such variables, one per line.")
@click.option(
    "--at", default="02:00", show_default=True, type=options.TIME_OF_DAY, metavar="HH:MM", help="Time of the next run."
)
@click.option("--offline", is_flag=True, help="Check without the API.")
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Check with the sandbox and its ledger.")
@options.JSON_OPTION
def doctor(
    job_file: Path,
    given: tuple[str, ...],
    env_file: Path | None,
    at: tuple[int, int],
    offline: bool,
    use_sandbox: bool,
    as_json: bool,
) -> int:
    """Check that the next cron run of JOB will work.

    Uses cron's environment, without the variables of this shell. Free, changes nothing. The exit code is 0 if
    nothing fails, otherwise the one that the run would have.
    """
    environ = make_cron_environ(given, env_file)
    now = datetime.now().astimezone()
    findings: list[Finding] = []
    with ExitStack() as stack:
        shell = stack.enter_context(cron_environment(environ))
        job: Job | None = None
        job_options = options.JobOptions(job_file, use_sandbox=use_sandbox)
        try:
            job = job_options.load()
        except EnrichError as error:
            findings.append(error_finding("job", error))
        access = stack.enter_context(_open_sandbox(job)) if use_sandbox else None
        context = DoctorContext(environ, shell, now, next_run_time(now, *at), offline, access)
        findings += environment_findings(context) if job is None else job_findings(job, context)
        name_job = job_options.arguments(as_typed=True).in_hint
    findings = [replace(each, remedy=each.remedy and name_job(each.remedy)) for each in findings]
    # A run without a job ends before it needs the key.
    code = first_exit_code({finding.exit_code for finding in (findings if job else findings[:1])})
    fields = ("mark", "subject", "message", "remedy")
    listed = [{name: getattr(finding, name) for name in fields} for finding in findings]
    result = {"exit_code": int(code), "job": str(job_file), "findings": listed}
    options.echo_result(result, checks.format_findings(findings), as_json=as_json)
    return code

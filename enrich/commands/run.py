"""`enrich run` enriches the leads of a job, or resumes. `enrich collect` writes the output again, without network."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import Struct, field
from msgspec.structs import replace

from enrich.commands import options
from enrich.commands.report import write_run_report
from enrich.commands.streams import ask, can_ask, echo_error, echo_message, for_terminal
from enrich.databar.clock import SystemClock
from enrich.databar.text_filter import clean_text
from enrich.errors import CommandRefused, EnrichError, JobError, LedgerLocked, install_hint
from enrich.exit_codes import ExitCode, JobArguments, format_actions, required_actions
from enrich.job.job import Job
from enrich.job.locations import STDIN, PostgresLocation, WebUrl
from enrich.ledger.database import ledger_exists
from enrich.ledger.lock import lock_ledger, open_for_run
from enrich.ledger.verify import as_enrich_error
from enrich.models import State, parse_count
from enrich.monitoring.log_file import open_log
from enrich.monitoring.observers import RunObservers
from enrich.run import pipeline
from enrich.run.context import ClusterOptions, RunEnvironment, RunOptions, check_ledger_exists
from enrich.run.other_ledgers import with_own_output
from enrich.run.output import rebuild_output
from enrich.run.plan_file import read_plan
from enrich.run.progress import Progress
from enrich.run.summary import RunSummary, format_details, format_summary

if TYPE_CHECKING:  # it needs Ray
    from enrich.cluster.engine import RayCluster

_MAX_PORT = 65_535
#: A run has up to 64 connections, and the sandbox the other ends of them. With fewer files a run would end half-way.
_MIN_OPEN_FILES = 200


@contextmanager
def observe_run(
    job_options: options.JobOptions, log_file: Path | None, show_note: Callable[[str], None]
) -> Iterator[RunObservers]:
    """Yield the observers of a run. They are notified of every error that ends the block."""
    with open_log(log_file, job_options.job_file.stem, show_note) as log:
        observers = RunObservers(log, show_note, job_options.arguments())
        try:
            yield observers
        except BaseException as error:
            observers.failed(*_exit_code_and_message(error))
            raise


def _exit_code_and_message(error: BaseException) -> tuple[int, str]:
    """Return exit code and message of an error. For a bug only its type, because its text may contain data."""
    match error:
        case EnrichError():
            return error.exit_code, error.message
        case click.ClickException():
            return ExitCode.USAGE, error.format_message()
        case click.Abort() | EOFError() | KeyboardInterrupt():
            return ExitCode.INTERRUPTED, "interrupted"

    if isinstance(error, Exception) and (known := as_enrich_error(error, None)) is not None:
        return known.exit_code, known.message
    return ExitCode.BUG, f"this is a bug: {type(error).__name__}"


def _check_address(value: str) -> str:
    """Return HOST:PORT unchanged. Raises ValueError for another format."""
    if not 0 < (parse_count(value.rpartition(":")[2]) or 0) <= _MAX_PORT:
        raise ValueError("must be HOST:PORT, as `ray start --head` prints it")
    if "://" in value:
        raise ValueError("must be HOST:PORT without `ray://`. Run the command on a machine of the cluster")
    return value


def make_cluster_options(
    job: Job, engine: str | None, address: str | None, workers: int | None
) -> ClusterOptions | None:
    """Return the options of the cluster, None for this process alone. Raises JobError if the job cannot use one."""
    if engine is None:
        if address is not None or workers is not None:
            raise JobError("--address and --workers need --engine ray")
        return None
    if engine != "ray":  # the command line has checked it, the Python API has not
        raise JobError(f"`engine` must be 'ray' or None, not {engine!r}")
    if not isinstance(job.ledger, PostgresLocation):
        message = f"--engine ray needs a ledger in PostgreSQL, and this one is a file: {job.ledger}"
        raise job.error(["ledger"], message, "set `ledger: postgresql://host/database`")
    if address is not None and (job.input_path == STDIN or isinstance(job.input_path, WebUrl)):
        raise JobError("with --address, the input must be a file that all machines can read, not a pipe or a download")
    if find_spec("ray") is None:
        raise JobError("--engine ray is not installed", install_hint("cluster"))
    return ClusterOptions(address, workers)


@contextmanager
def open_engine(job: Job, cluster: ClusterOptions | None) -> Iterator[RayCluster | None]:
    """Yield a Ray cluster for the block, None if `cluster` is None.

    Raises ClusterFailed if the cluster cannot be reached or started.
    """
    if cluster is None or not isinstance(job.ledger, PostgresLocation):
        yield None
        return
    from enrich.cluster.connection import connect_ray

    with connect_ray(cluster.address) as cpus:
        from enrich.cluster.engine import RayCluster

        yield RayCluster(job.ledger, cluster.workers or cpus)


def check_combination(selected: RunOptions, max_credits: float | None) -> None:
    """Raise JobError for options that contradict each other."""
    is_limited = any(limit is not None for limit in (selected.limit, selected.sample, max_credits))
    if selected.plan is not None and (selected.retry or is_limited):
        raise JobError(
            "--plan cannot be combined with --limit, --sample, --max-credits or --retry: the plan has its own"
        )
    conflicting = sorted(selected.retry & {State.IN_DOUBT, State.FAILED}) if selected.accept_in_doubt else []
    if conflicting:
        raise JobError(f"--accept in_doubt and --retry {','.join(conflicting)} contradict each other: choose one")


class RunCallbacks(Struct, frozen=True):
    """What a run calls: `on_message` with a text for the user at once, `on_progress` often, `on_end` before the report.

    `close_progress` is called when no progress follows, also after an error. Setting a result of `stop`, from any
    thread, stops the run as SIGINT does.
    """

    on_message: Callable[[str], None] = lambda _: None
    on_progress: Callable[[Progress], None] = lambda _: None
    close_progress: Callable[[], None] = lambda: None
    on_end: Callable[[RunSummary], None] = lambda _: None
    stop: Future[None] = field(default_factory=Future)


def _check_open_files_limit() -> None:
    """Raise CommandRefused if this process may open fewer files than a run needs."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < _MIN_OPEN_FILES:
        message = f"too many open files: the limit is {limit}, and a run needs {_MIN_OPEN_FILES}"
        raise CommandRefused(message, "raise it: ulimit -n 1024")


def run_observed(
    job: Job, run_options: RunOptions, wait_s: float, observers: RunObservers, callbacks: RunCallbacks
) -> RunSummary:
    """Run a job under its ledger's lock, which it waits for up to `wait_s` seconds, and write its report.

    Raises EnrichError for failures before the run is recorded in the ledger.
    """
    observers.start(job, run_options)
    _check_open_files_limit()
    job, moved = with_own_output(job)
    observers.report_problem(moved)
    if not ledger_exists(job.ledger):
        job.file_locations(datetime.now().astimezone())  # no ledger is created in place of another file of the job
    with ExitStack() as stack:
        stack.enter_context(lock_ledger(job.ledger, wait_s))
        # Before any threads start, because the engine starts processes.
        engine = stack.enter_context(open_engine(job, run_options.cluster))
        access = stack.enter_context(options.open_access(job, use_sandbox=job.sandbox))
        ledger, lease = stack.enter_context(open_for_run(job.ledger))

        def note(text: str) -> None:
            observers.note(text)
            callbacks.on_message(clean_text(text))

        def show_progress(progress: Progress) -> None:
            observers.show_progress(progress)
            callbacks.on_progress(progress)

        stack.callback(callbacks.close_progress)
        observers.lock_acquired()
        if engine is not None and lease is not None:
            engine = replace(engine, lease_id=lease.fencing_token.lease_id)
        clock, lease_valid = (lease, lease.is_valid) if lease else (SystemClock(), lambda: True)
        environment = RunEnvironment(
            clock,
            on_message=note,
            on_problem=observers.report_problem,
            on_progress=show_progress,
            lease_valid=lease_valid,
            stop=callbacks.stop,
            engine=engine,
        )
        summary = pipeline.run(job, access, ledger, run_options, environment)
    observers.end(summary)
    callbacks.on_end(summary)
    if summary.exit_code not in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
        observers.report_problem(write_run_report(job, observers.job_arguments))
    return summary


def print_summary(
    summary: RunSummary, job_arguments: JobArguments, *, as_json: bool, show: bool, details: bool = False
) -> None:
    """Print the run summary: text to stderr, JSON to stdout."""
    options.begin_result()
    summary = replace(summary, hint=summary.hint and job_arguments.in_hint(summary.hint))
    paint = options.make_styler()
    if summary.error:
        echo_error(summary.error, summary.hint, label=f"{paint('error', 'red')}: ")
    if show and summary.rows is not None:
        output, rejects, changes = map(options.short_path, (summary.output, summary.rejects, summary.changes))
        shown = replace(summary, output=output, rejects=rejects, changes=changes)
        # The hint of an error is about its exit code, too.
        code = ExitCode.OK if summary.hint else summary.exit_code
        actions = required_actions(code, summary.as_json(), job_arguments)
        lines = [*format_summary(shown, paint), *(f"  {line}" for line in format_actions(actions))]
        lines += map(job_arguments.in_hint, format_details(summary, paint) if details else ())
        click.echo(for_terminal("\n".join(lines)), err=True)
    if as_json:
        options.echo_json(summary.as_json())


@click.command()
@options.RUN_JOB_OPTIONS
@options.selection_options
@click.option(
    "--plan", "plan_file", type=options.FILE, help="Send exactly what a plan of `enrich plan JOB -o FILE` contains."
)
@click.option("--max-time", type=options.SECONDS, metavar="5h", help="Stop after this time. The rest stays pending.")
@click.option(
    "--accept", type=click.Choice(["in_doubt"]), help="Mark unconfirmed requests as failed, without sending them again."
)
@click.option("--engine", type=click.Choice(["ray"]), help="Run on a Ray cluster. Needs a ledger in PostgreSQL.")
@click.option(
    "--address",
    type=options.Parsed(_check_address),
    metavar="HOST:PORT",
    help="Address of the Ray cluster. Default: this machine.",
)
@click.option(
    "--workers", type=options.Number(1), metavar="NUMBER", help="Number of Ray workers. Default: one per CPU."
)
@click.option(
    "--workspace-renamed", is_flag=True, help="Confirm that the workspace of the ledger was renamed at Databar."
)
@click.option("--new-ledger", is_flag=True, help="Pay again for leads that another ledger has paid for.")
@click.option("--yes", is_flag=True, help="Skip the confirmation of the first run without a cap.")
@click.option(
    "--if-locked",
    default="fail",
    show_default=True,
    type=options.Parsed(options.parse_lock_wait),
    metavar="fail|skip|wait[=10m]",
    help="What to do when another run is using the ledger.",
)
@options.JSON_OPTION
@click.option("--summary", "always_summary", is_flag=True, help="Print the run summary without a terminal, too.")
@click.option("-v", "--verbose", is_flag=True, help="Add columns, balance, polls and providers to the run summary.")
@click.option("--quiet", is_flag=True, help="Print errors only: no progress bar, no run summary.")
@click.option("--log-file", type=options.FILE, help="Append events to this file, one JSON object per line.")
def run(
    job_options: options.JobOptions,
    selected: RunOptions,
    max_credits: float | None,
    plan_file: Path | None,
    max_time: float | None,
    accept: str | None,
    engine: str | None,
    address: str | None,
    workers: int | None,
    workspace_renamed: bool,
    new_ledger: bool,
    yes: bool,
    if_locked: tuple[bool, float],
    as_json: bool,
    always_summary: bool,
    verbose: bool,
    quiet: bool,
    log_file: Path | None,
) -> int:
    """Enrich the leads of JOB. The same command resumes after an interruption.

    Collects the results of earlier requests, sends new ones, and writes the output. Without a terminal, it prints
    only errors and problems.
    """
    with observe_run(job_options, log_file, lambda text: echo_message(text, label="note: ")) as observers:
        plan = None if plan_file is None else read_plan(plan_file)
        selected = replace(selected, plan=plan, accept_in_doubt=accept is not None)
        check_combination(selected, max_credits)
        job = job_options.load(max_credits if plan is None else plan.max_credits)
        on_terminal = sys.stderr.isatty()
        can_confirm, use_sandbox = can_ask(), job_options.use_sandbox
        should_confirm = can_confirm and not yes and not use_sandbox and job.max_credits is None
        run_options = replace(
            selected,
            max_time_s=max_time,
            workspace_renamed=workspace_renamed,
            confirm=ask if should_confirm and plan is None else None,
            new_ledger=new_ledger or use_sandbox,
            confirm_new_ledger=ask if can_confirm else None,
            cluster=make_cluster_options(job, engine, address, workers),
        )
        skip, wait_s = if_locked

        def end(summary: RunSummary) -> None:
            show = always_summary or verbose or (not quiet and (on_terminal or summary.exit_code != ExitCode.OK))
            arguments = job_options.arguments(as_typed=True)
            print_summary(summary, arguments, as_json=as_json, show=show, details=verbose)

        callbacks = RunCallbacks(on_end=end)
        if on_terminal and not quiet:
            from enrich.monitoring.progress_bar import ProgressBar

            bar = ProgressBar()
            callbacks = RunCallbacks(
                on_message=bar.write_line, on_progress=bar.show, close_progress=bar.close, on_end=end
            )
        try:
            return run_observed(job, run_options, wait_s, observers, callbacks).exit_code
        except LedgerLocked as error:
            if not skip:
                options_hint = "To wait for it or to skip: --if-locked wait or skip"
                raise LedgerLocked(error.message, ". ".join(filter(None, (error.hint, options_hint)))) from None
            observers.skipped(error.message)
            if as_json:
                options.echo_json({"exit_code": 0, "error": error.message})
            return ExitCode.OK


@click.command()
@options.RUN_JOB_OPTIONS
@click.option("--partial", is_flag=True, help="Write the output although leads are pending.")
@options.JSON_OPTION
def collect(job_options: options.JobOptions, partial: bool, as_json: bool) -> int:
    """Write the output of JOB from the ledger, without network and cost."""
    job, note = with_own_output(job_options.load())
    if note is not None:
        echo_message(note, label="note: ")
    check_ledger_exists(job)
    with lock_ledger(job.ledger, 0):
        summary = rebuild_output(job, partial=partial)
    print_summary(summary, job_options.arguments(as_typed=True), as_json=as_json, show=sys.stderr.isatty())
    return summary.exit_code

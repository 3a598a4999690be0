"""`enrich run`: enriches the leads of a job, or resumes."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from enrich.commands import options
from enrich.commands.report import write_run_report
from enrich.databar.clock import SystemClock
from enrich.errors import EnrichError, JobError, LedgerLocked
from enrich.exit_codes import ExitCode, JobArguments, format_actions, required_actions
from enrich.job.job import Job
from enrich.job.locations import STDIN, PostgresLocation
from enrich.ledger.lock import lock_ledger, open_for_run
from enrich.ledger.sqlite import is_damage_error
from enrich.models import State
from enrich.monitoring.log_file import open_log
from enrich.monitoring.observers import RunObservers
from enrich.monitoring.progress_bar import ProgressBar
from enrich.run import pipeline
from enrich.run.cluster import ClusterEngine
from enrich.run.context import ClusterOptions, Progress, RunContext, RunOptions
from enrich.run.plan_file import read_plan
from enrich.run.summary import RunSummary, format_summary


def with_observers(command: Callable[..., int]) -> Callable[..., int]:
    """Pass `observers` to a command instead of `log_file`. They are notified of every error that ends it."""

    @functools.wraps(command)
    def wrapper(*, job_options: options.JobOptions, log_file: Path | None, **params: Any) -> int:  # noqa: ANN401 - click's options
        def print_error(text: str) -> None:
            click.echo(text, err=True)

        with open_log(log_file, job_options.job_file.stem, lambda text: print_error(f"note: {text}")) as log:
            observers = RunObservers(log, print_error, job_options.arguments())
            try:
                return command(job_options=job_options, observers=observers, **params)
            except BaseException as error:
                observers.failed(*_exit_code_and_message(error))
                raise

    return wrapper


def _exit_code_and_message(error: BaseException) -> tuple[int, str]:
    """Return exit code and message of an error. For a bug only its type, because its text may contain data."""
    match error:
        case EnrichError():
            return error.exit_code, error.message
        case click.ClickException():
            return ExitCode.USAGE, error.format_message()
        case click.Abort() | EOFError() | KeyboardInterrupt():
            return ExitCode.INTERRUPTED, "interrupted"

    if is_damage_error(error):
        return ExitCode.REFUSED, "the ledger is damaged"
    return ExitCode.BUG, f"this is a bug: {type(error).__name__}"


def _check_address(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Return HOST:PORT unchanged. Raises a usage error for another format."""
    if value is not None and not value.rpartition(":")[2].isdecimal():
        raise click.BadParameter("must be HOST:PORT, as `ray start --head` prints it")
    if value is not None and "://" in value:
        raise click.BadParameter("must be HOST:PORT without `ray://`: run it on a machine of the cluster")
    return value


ENGINE_OPTIONS = (
    click.option("--engine", type=click.Choice(["ray"]), help="Let Ray carry the work; the ledger is in PostgreSQL."),
    click.option(
        "--address", callback=_check_address, metavar="HOST:PORT", help="The Ray cluster; default: one on this machine."
    ),
    click.option("--workers", type=click.IntRange(min=1), help="Actors of Ray that send and poll; default: the CPUs."),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for a run on a Ray cluster to a command."""
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command


def make_cluster_options(
    job: Job, engine: str | None, address: str | None, workers: int | None
) -> ClusterOptions | None:
    """Return the options of the cluster, None for this process alone. Raises JobError if the job cannot use one."""
    if engine is None:
        if address is not None or workers is not None:
            raise click.UsageError("--address and --workers are for --engine ray")
        return None
    if not isinstance(job.ledger, PostgresLocation):
        message = f"--engine ray needs a ledger that all workers reach, and this is a file: {job.ledger}"
        raise job.error(["ledger"], message, "keep it in PostgreSQL: `ledger: postgresql://host/database`")
    if address is not None and job.input_path == STDIN:
        raise click.UsageError("what comes through a pipe is not seen by the machines at --address: put it into a file")
    if find_spec("ray") is None:
        raise JobError("--engine ray needs the extra `cluster`", "pip install 'databar-enrich[cluster]'")
    return ClusterOptions(address, workers)


@contextmanager
def open_engine(job: Job, cluster: ClusterOptions | None) -> Iterator[ClusterEngine | None]:
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


def _confirm(plan_text: str) -> bool:
    click.echo(plan_text, err=True)
    try:
        return click.confirm("Go on?", err=True)
    except click.Abort:
        raise KeyboardInterrupt from None


def _run_pipeline(
    job: Job, run_options: RunOptions, wait_s: float, observers: RunObservers, *, use_sandbox: bool, on_terminal: bool
) -> RunSummary:
    """Run the job under the ledger's lock, with the progress bar and the observers."""
    with ExitStack() as stack:
        stack.enter_context(lock_ledger(job.ledger, wait_s))
        # Before any threads start, because the engine starts processes.
        engine = stack.enter_context(open_engine(job, run_options.spread))
        access = stack.enter_context(options.open_access(job, use_sandbox=use_sandbox))
        store, lease = stack.enter_context(open_for_run(job.ledger))
        bar = ProgressBar() if on_terminal else None

        def note(text: str) -> None:
            observers.note(text)
            if bar is not None:
                bar.write_line(text)

        def show_progress(progress: Progress) -> None:
            observers.show_progress(progress)
            if bar is not None:
                bar.show(progress)

        if bar is not None:
            stack.callback(bar.close)
        observers.lock_acquired()
        if engine is not None and lease is not None:
            engine = engine.for_leader(lease.fencing_token.owner_id)
        clock, lease_valid = (lease, lease.is_valid) if lease else (SystemClock(), lambda: True)
        context = RunContext(
            job,
            access,
            store,
            clock,
            on_message=note,
            on_progress=show_progress,
            lease_valid=lease_valid,
            engine=engine,
        )
        return pipeline.run(context, run_options)


def print_summary(summary: RunSummary, job_arguments: JobArguments, *, as_json: bool, show: bool) -> None:
    """Print the run summary: text to stderr, JSON to stdout."""
    paint = options.make_styler()
    if summary.error:
        click.echo(f"{paint('error', 'red')}: {summary.error}", err=True)
    if summary.hint:
        click.echo(f"hint: {summary.hint}", err=True)
    if show and summary.rows is not None:
        click.echo("\n".join(format_summary(summary, paint)), err=True)
        if actions := required_actions(summary.exit_code, summary.as_json(), job_arguments):
            click.echo(
                "\n".join(["", paint("needs you", "bold"), *(f"  {line}" for line in format_actions(actions))]),
                err=True,
            )
    if as_json:
        click.echo(json.dumps(summary.as_json(), ensure_ascii=False))


@click.command()
@options.RUN_JOB_OPTIONS
@options.selection_options
@click.option("--plan", "plan_file", type=options.FILE, help="Keep to a plan that `enrich plan -o` wrote.")
@click.option(
    "--max-time", callback=options.parse_seconds, metavar="5h", help="Stop after this time; the rest stays pending."
)
@click.option(
    "--accept", type=click.Choice(["in_doubt"]), help="Take these for lost: they become failed and are not asked again."
)
@engine_options
@click.option("--update-providers", is_flag=True, help="Take over the API's present default providers.")
@click.option("--workspace-renamed", is_flag=True, help="The ledger's workspace has another name at Databar now.")
@click.option("--new-ledger", is_flag=True, help="Use a new ledger though an earlier output was paid from another one.")
@click.option("--yes", is_flag=True, help="Do not ask before the first real run without a cap.")
@click.option(
    "--if-locked",
    default="fail",
    show_default=True,
    callback=options.parse_lock_wait,
    metavar="fail|skip|wait[=10m]",
    help="What to do when another execution holds the ledger.",
)
@options.JSON_OPTION
@click.option("--receipt", "always_receipt", is_flag=True, help="Print the receipt off a terminal, too.")
@click.option("--quiet", is_flag=True, help="No bar and no receipt, only errors.")
@click.option("--log-file", type=options.FILE, help="Append what happens to this file, one JSON object a line.")
@with_observers
def run(
    job_options: options.JobOptions,
    limit: int | None,
    sample: int | None,
    seed: int,
    max_credits: float | None,
    retry: frozenset[str],
    plan_file: Path | None,
    max_time: float | None,
    accept: str | None,
    engine: str | None,
    address: str | None,
    workers: int | None,
    update_providers: bool,
    workspace_renamed: bool,
    new_ledger: bool,
    yes: bool,
    if_locked: tuple[bool, float],
    as_json: bool,
    always_receipt: bool,
    quiet: bool,
    observers: RunObservers,
) -> int:
    """Enrich the leads of JOB; started again it resumes.

    Collects what is outstanding, submits what was never asked, polls, writes the output and
    prints the receipt. Nothing is paid for twice, whatever ended the run before.
    """
    plan = None if plan_file is None else read_plan(plan_file)
    if plan is not None:
        if retry or not (limit is sample is max_credits is None):
            raise click.UsageError("--plan has its own --limit, --sample, --max-credits and --retry: leave them out")
        max_credits = plan.max_credits
    job = job_options.load(max_credits)
    on_terminal = sys.stderr.isatty() and not quiet
    stdin_is_terminal = sys.stdin is not None and sys.stdin.isatty()
    use_sandbox = job_options.use_sandbox
    should_confirm = stdin_is_terminal and on_terminal and not yes and not use_sandbox and job.max_credits is None
    if accept is not None and retry & {accept, "failed"}:
        conflicting = ",".join(sorted(retry & {accept, "failed"}))
        raise click.UsageError(
            f"--accept {accept} takes them for lost, and --retry {conflicting} would ask them again: choose one"
        )
    run_options = RunOptions(
        limit=limit,
        sample=sample,
        seed=seed,
        max_time_s=max_time,
        retry=frozenset(map(State, retry)),
        accept_doubts=accept is not None,
        update_providers=update_providers,
        workspace_renamed=workspace_renamed,
        confirm=_confirm if should_confirm and plan is None else None,
        plan=plan,
        new_ledger=new_ledger or use_sandbox,
        confirm_new_ledger=_confirm if stdin_is_terminal and on_terminal else None,
        spread=make_cluster_options(job, engine, address, workers),
    )
    observers.start(job, run_options, sandbox=use_sandbox)
    skip, wait_s = if_locked
    try:
        summary = _run_pipeline(job, run_options, wait_s, observers, use_sandbox=use_sandbox, on_terminal=on_terminal)
    except LedgerLocked as error:
        if not skip:
            raise
        observers.skipped(error.message)
        if as_json:
            click.echo(json.dumps({"exit_code": 0, "error": error.message}))
        return ExitCode.OK
    observers.end(summary)
    show = on_terminal or always_receipt or (summary.exit_code != ExitCode.OK and not quiet)
    print_summary(summary, job_options.arguments(as_typed=True), as_json=as_json, show=show)
    if summary.exit_code not in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
        observers.report_problem(write_run_report(job, observers.job_arguments))
    return summary.exit_code

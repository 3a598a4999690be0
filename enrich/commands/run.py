"""`enrich run`, `enrich plan` and `enrich collect`: the way of a night."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enrich.commands import options
from enrich.commands.options import engine_options, make_cluster_options, open_engine
from enrich.commands.report import write_run_report
from enrich.commands.witnessed import make_job_arguments, with_observers
from enrich.errors import ExitCode, LedgerLocked

if TYPE_CHECKING:
    from enrich.exit_codes import JobArguments
    from enrich.job.job import Job
    from enrich.monitoring.observers import RunObservers
    from enrich.run.context import RunOptions
    from enrich.run.summary import RunSummary


@click.command()
@options.JOB_ARGUMENT
@options.path_options
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
    job_file: Path,
    input_path: str | None,
    output: str | None,
    ledger: str | None,
    use_sandbox: bool,
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
    from enrich.models import State
    from enrich.run.context import RunOptions
    from enrich.run.plan_file import read_plan

    plan = None if plan_file is None else read_plan(plan_file)
    if plan is not None:
        if retry or not (limit is sample is max_credits is None):
            raise click.UsageError("--plan has its own --limit, --sample, --max-credits and --retry: leave them out")
        max_credits = plan.max_credits
    job = options.load_job_file(job_file, input_path, output, ledger, use_sandbox, max_credits)
    on_terminal = sys.stderr.isatty() and not quiet
    stdin_is_terminal = sys.stdin is not None and sys.stdin.isatty()
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
    _show_summary(summary, as_json=as_json, show=show)
    if summary.exit_code not in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
        observers.report_problem(write_run_report(job, observers.job_arguments))
    return summary.exit_code


def _run_pipeline(
    job: Job, run_options: RunOptions, wait_s: float, observers: RunObservers, *, use_sandbox: bool, on_terminal: bool
) -> RunSummary:
    """Run under the lock, with the bar and the witnesses."""
    from enrich.ledger.lock import lock_ledger, open_for_run
    from enrich.models import SystemClock
    from enrich.monitoring.progress_bar import ProgressBar
    from enrich.run.context import Progress, RunContext
    from enrich.run.pipeline import run

    with ExitStack() as stack:
        stack.enter_context(lock_ledger(job.ledger, wait_s))
        # Before there are threads: it starts processes.
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
        return run(context, run_options)


def _confirm(plan_text: str) -> bool:
    click.echo(plan_text, err=True)
    try:
        return click.confirm("Go on?", err=True)
    except click.Abort:
        raise KeyboardInterrupt from None


def _show_summary(summary: RunSummary, *, as_json: bool, show: bool) -> None:
    from enrich.exit_codes import format_actions, required_actions
    from enrich.run.summary import format_summary

    paint = options.make_styler()
    if summary.error:
        click.echo(f"{paint('error', 'red')}: {summary.error}", err=True)
    if summary.hint:
        click.echo(f"hint: {summary.hint}", err=True)
    if show and summary.rows is not None:
        click.echo("\n".join(format_summary(summary, paint)), err=True)
        if actions := required_actions(summary.exit_code, summary.as_json(), _target_as_typed()):
            click.echo(
                "\n".join(["", paint("needs you", "bold"), *(f"  {line}" for line in format_actions(actions))]),
                err=True,
            )
    if as_json:
        click.echo(json.dumps(summary.as_json(), ensure_ascii=False))


def _target_as_typed() -> JobArguments:
    """Name the job as it was typed: its commands work where they are read."""
    params = click.get_current_context().params
    paths = (params[name] for name in ("job_file", "input_path", "output", "ledger"))
    return make_job_arguments(*paths, use_sandbox=params["use_sandbox"], as_typed=True)


@click.command(short_help="Show what a run of JOB would ask and cost; costs nothing.")
@options.JOB_ARGUMENT
@options.path_options
@options.selection_options
@click.option("-o", "freeze", type=options.FILE, help="Freeze the plan for `enrich run --plan`.")
@click.option("--rows", "rows_file", type=options.FILE, help="Write each row's decision to this file.")
@options.JSON_OPTION
def plan(
    job_file: Path,
    input_path: str | None,
    output: str | None,
    ledger: str | None,
    use_sandbox: bool,
    limit: int | None,
    sample: int | None,
    seed: int,
    max_credits: float | None,
    retry: frozenset[str],
    freeze: Path | None,
    rows_file: Path | None,
    as_json: bool,
) -> None:
    """Show what a run of JOB would ask and cost, and why each row is or isn't paid for; costs nothing."""
    from enrich.ledger.lock import is_locked
    from enrich.models import State
    from enrich.run.context import RunOptions
    from enrich.run.plan import format_plan, make_plan
    from enrich.run.plan_file import write_plan

    job = options.load_job_file(job_file, input_path, output, ledger, use_sandbox, max_credits)
    run_options = RunOptions(limit=limit, sample=sample, seed=seed, retry=frozenset(map(State, retry)))
    if freeze is not None and is_locked(job.ledger):
        raise LedgerLocked(f"{job.ledger}: a run is at work, so no plan can be kept to", "freeze one after it")
    with options.open_access(job, use_sandbox=use_sandbox) as access:
        planned, saved_plan = make_plan(job, access, run_options, rows_file.absolute() if rows_file else None)
    if freeze is not None:
        write_plan(freeze, saved_plan)
    click.echo(json.dumps(planned.as_json(), ensure_ascii=False) if as_json else "\n".join(format_plan(planned)))


@click.command(short_help="Write the output of JOB from the ledger alone.")
@options.JOB_ARGUMENT
@options.path_options
@click.option("--partial", is_flag=True, help="Write the output even when rows are pending.")
@options.JSON_OPTION
def collect(
    job_file: Path,
    input_path: str | None,
    output: str | None,
    ledger: str | None,
    use_sandbox: bool,
    partial: bool,
    as_json: bool,
) -> int:
    """Write the output of JOB from the ledger alone, without network."""
    from enrich.ledger.lock import lock_ledger
    from enrich.run.rebuild import rebuild_output

    job = options.load_job_file(job_file, input_path, output, ledger, use_sandbox)
    with lock_ledger(job.ledger, 0):
        summary = rebuild_output(job, partial=partial)
    _show_summary(summary, as_json=as_json, show=sys.stderr.isatty())
    return summary.exit_code

"""`enrich run`, `enrich plan` and `enrich collect`: the way of a night."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enrich.commands import options
from enrich.commands.engines import carrying, spread_of, working
from enrich.commands.report import leave_report
from enrich.commands.witnessed import target_of, witnessed
from enrich.errors import Exit, LedgerLocked

if TYPE_CHECKING:
    from enrich.job import Job
    from enrich.receipt import Receipt
    from enrich.surroundings import Options
    from enrich.watch.outcome import Target
    from enrich.watch.witnesses import Witnesses


@click.command()
@options.JOB_ARGUMENT
@options.paths
@options.choosing
@click.option("--plan", "plan_file", type=options.FILE, help="Keep to a plan that `enrich plan -o` wrote.")
@click.option(
    "--max-time", callback=options.seconds, metavar="5h", help="Stop after this time; the rest stays pending."
)
@click.option(
    "--accept", type=click.Choice(["in_doubt"]), help="Take these for lost: they become failed and are not asked again."
)
@carrying
@click.option("--update-providers", is_flag=True, help="Take over the API's present default providers.")
@click.option("--workspace-renamed", is_flag=True, help="The ledger's workspace has another name at Databar now.")
@click.option("--new-ledger", is_flag=True, help="Use a new ledger though an earlier output was paid from another one.")
@click.option("--yes", is_flag=True, help="Do not ask before the first real run without a cap.")
@click.option(
    "--if-locked",
    default="fail",
    show_default=True,
    callback=options.lock_wait,
    metavar="fail|skip|wait[=10m]",
    help="What to do when another execution holds the ledger.",
)
@options.AS_JSON
@click.option("--receipt", "always_receipt", is_flag=True, help="Print the receipt off a terminal, too.")
@click.option("--quiet", is_flag=True, help="No bar and no receipt, only errors.")
@click.option("--log-file", type=options.FILE, help="Append what happens to this file, one JSON object a line.")
@witnessed
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
    witnesses: Witnesses,
) -> int:
    """Enrich the leads of JOB; started again it resumes.

    Collects what is outstanding, submits what was never asked, polls, writes the output and
    prints the receipt. Nothing is paid for twice, whatever ended the run before.
    """
    from enrich.model import State
    from enrich.planfile import read_plan
    from enrich.surroundings import Options

    plan = None if plan_file is None else read_plan(plan_file)
    if plan is not None:
        if retry or not (limit is sample is max_credits is None):
            raise click.UsageError("--plan has its own --limit, --sample, --max-credits and --retry: leave them out")
        max_credits = plan.max_credits
    job = options.load(job_file, input_path, output, ledger, use_sandbox, max_credits)
    on_terminal = sys.stderr.isatty() and not quiet
    listens = sys.stdin is not None and sys.stdin.isatty()
    asks = listens and on_terminal and not yes and not use_sandbox and job.max_credits is None
    if accept is not None and retry & {accept, "failed"}:
        said = ",".join(sorted(retry & {accept, "failed"}))
        raise click.UsageError(
            f"--accept {accept} takes them for lost, and --retry {said} would ask them again: choose one"
        )
    wishes = Options(
        limit=limit,
        sample=sample,
        seed=seed,
        max_time_s=max_time,
        retry=frozenset(map(State, retry)),
        accept_doubts=accept is not None,
        update_providers=update_providers,
        workspace_renamed=workspace_renamed,
        confirm=_confirm if asks and plan is None else None,
        plan=plan,
        new_ledger=new_ledger or use_sandbox,
        confirm_new_ledger=_confirm if listens and on_terminal else None,
        spread=spread_of(job, engine, address, workers),
    )
    witnesses.start(job, wishes, sandbox=use_sandbox)
    skip, wait_s = if_locked
    try:
        receipt = _run(job, wishes, wait_s, witnesses, use_sandbox=use_sandbox, on_terminal=on_terminal)
    except LedgerLocked as error:
        if not skip:
            raise
        witnesses.skipped(error.message)
        if as_json:
            click.echo(json.dumps({"exit_code": 0, "error": error.message}))
        return Exit.OK
    witnesses.end(receipt)
    show = on_terminal or always_receipt or (receipt.exit_code != Exit.OK and not quiet)
    _show_receipt(receipt, as_json=as_json, show=show)
    if receipt.exit_code not in (Exit.INTERRUPTED, Exit.TERMINATED):
        witnesses.complain(leave_report(job, witnesses.target))
    return receipt.exit_code


def _run(
    job: Job, wishes: Options, wait_s: float, witnesses: Witnesses, *, use_sandbox: bool, on_terminal: bool
) -> Receipt:
    """Run under the lock, with the bar and the witnesses."""
    from enrich.model import SystemClock
    from enrich.pipeline import run
    from enrich.store.lock import hold
    from enrich.store.opening import opened
    from enrich.surroundings import Progress, Surroundings
    from enrich.watch.progress import Bar

    with ExitStack() as stack:
        stack.enter_context(hold(job.ledger, wait_s))
        # Before there are threads: it starts processes.
        engine = stack.enter_context(working(job, wishes.spread))
        access = stack.enter_context(options.access(job, use_sandbox=use_sandbox))
        store, lease = stack.enter_context(opened(job.ledger))
        bar = Bar() if on_terminal else None

        def tell(text: str) -> None:
            witnesses.tell(text)
            if bar is not None:
                bar.tell(text)

        def show(progress: Progress) -> None:
            witnesses.show(progress)
            if bar is not None:
                bar.show(progress)

        if bar is not None:
            stack.callback(bar.close)
        witnesses.admitted()
        if engine is not None and lease is not None:
            engine = engine.led_by(lease.fence.owner)
        clock, holds = (lease, lease.holds) if lease else (SystemClock(), lambda: True)
        around = Surroundings(job, access, store, clock, tell=tell, show=show, holds=holds, engine=engine)
        return run(around, wishes)


def _confirm(plan: str) -> bool:
    click.echo(plan, err=True)
    try:
        return click.confirm("Go on?", err=True)
    except click.Abort:
        raise KeyboardInterrupt from None


def _show_receipt(receipt: Receipt, *, as_json: bool, show: bool) -> None:
    from enrich.slip import lines
    from enrich.watch.outcome import advice, needs

    paint = options.painter()
    if receipt.error:
        click.echo(f"{paint('error', 'red')}: {receipt.error}", err=True)
    if receipt.hint:
        click.echo(f"hint: {receipt.hint}", err=True)
    if show and receipt.rows is not None:
        click.echo("\n".join(lines(receipt, paint)), err=True)
        if needed := needs(receipt.exit_code, receipt.as_json(), _here()):
            click.echo("\n".join(["", paint("needs you", "bold"), *(f"  {line}" for line in advice(needed))]), err=True)
    if as_json:
        click.echo(json.dumps(receipt.as_json(), ensure_ascii=False))


def _here() -> Target:
    """Name the job as it was typed: its commands work where they are read."""
    given = click.get_current_context().params
    paths = (given[name] for name in ("job_file", "input_path", "output", "ledger"))
    return target_of(*paths, use_sandbox=given["use_sandbox"], from_here=True)


@click.command(short_help="Show what a run of JOB would ask and cost; costs nothing.")
@options.JOB_ARGUMENT
@options.paths
@options.choosing
@click.option("-o", "freeze", type=options.FILE, help="Freeze the plan for `enrich run --plan`.")
@click.option("--rows", "rows_file", type=options.FILE, help="Write each row's decision to this file.")
@options.AS_JSON
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
    from enrich.forecast import lines
    from enrich.model import State
    from enrich.plan import make_plan
    from enrich.planfile import write_plan
    from enrich.store.lock import is_held
    from enrich.surroundings import Options

    job = options.load(job_file, input_path, output, ledger, use_sandbox, max_credits)
    wishes = Options(limit=limit, sample=sample, seed=seed, retry=frozenset(map(State, retry)))
    if freeze is not None and is_held(job.ledger):
        raise LedgerLocked(f"{job.ledger}: a run is at work, so no plan can be kept to", "freeze one after it")
    with options.access(job, use_sandbox=use_sandbox) as access:
        planned, frozen = make_plan(job, access, wishes, rows_file.absolute() if rows_file else None)
    if freeze is not None:
        write_plan(freeze, frozen)
    click.echo(json.dumps(planned.as_json(), ensure_ascii=False) if as_json else "\n".join(lines(planned)))


@click.command(short_help="Write the output of JOB from the ledger alone.")
@options.JOB_ARGUMENT
@options.paths
@click.option("--partial", is_flag=True, help="Write the output even when rows are pending.")
@options.AS_JSON
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
    from enrich.offline import collect_offline
    from enrich.store.lock import hold

    job = options.load(job_file, input_path, output, ledger, use_sandbox)
    with hold(job.ledger, 0):
        receipt = collect_offline(job, partial=partial)
    _show_receipt(receipt, as_json=as_json, show=sys.stderr.isatty())
    return receipt.exit_code

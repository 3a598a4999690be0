"""`enrich run` and `enrich collect`: what writes the output."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enrich.commands import options
from enrich.commands.witnessed import witnessed
from enrich.errors import Exit, LedgerLocked

if TYPE_CHECKING:
    from enrich.job import Job
    from enrich.receipt import Receipt
    from enrich.surroundings import Options
    from enrich.witnesses import Witnesses


@click.command()
@options.JOB_ARGUMENT
@options.paths
@click.option("--limit", type=click.IntRange(min=0), help="Ask at most N new requests; the rest stays pending.")
@click.option("--max-credits", type=click.FloatRange(min=0), help="Spend at most so many credits in this execution.")
@click.option(
    "--max-time", callback=options.seconds, metavar="5h", help="Stop after this time; the rest stays pending."
)
@click.option(
    "--retry", callback=options.states, metavar="STATES", help="Ask these again, at a price: failed,expired,in_doubt."
)
@click.option(
    "--accept", type=click.Choice(["in_doubt"]), help="Take these for lost: they become failed and are not asked again."
)
@click.option("--update-providers", is_flag=True, help="Take over the API's present default providers.")
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
    input_path: Path | None,
    output: Path | None,
    ledger: Path | None,
    use_sandbox: bool,
    limit: int | None,
    max_credits: float | None,
    max_time: float | None,
    retry: frozenset[str],
    accept: str | None,
    update_providers: bool,
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
    from enrich.surroundings import Options

    job = options.load(job_file, input_path, output, ledger, use_sandbox, max_credits)
    on_terminal = sys.stderr.isatty() and not quiet
    asks = sys.stdin.isatty() and on_terminal and not yes and not use_sandbox and job.max_credits is None
    if accept in retry:
        raise click.UsageError("--accept and --retry in_doubt say opposite things: choose one")
    wishes = Options(
        limit=limit,
        max_time_s=max_time,
        retry=frozenset(map(State, retry)),
        accept_doubts=accept is not None,
        update_providers=update_providers,
        confirm=_confirm if asks else None,
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
    return receipt.exit_code


def _run(
    job: Job, wishes: Options, wait_s: float, witnesses: Witnesses, *, use_sandbox: bool, on_terminal: bool
) -> Receipt:
    """Run under the lock, with the bar and the witnesses."""
    from enrich.ledger import Ledger
    from enrich.lock import hold
    from enrich.pipeline import run
    from enrich.progress import Bar
    from enrich.surroundings import Progress, Surroundings

    with ExitStack() as stack:
        stack.enter_context(hold(job.ledger_path, wait_s))
        access = stack.enter_context(options.access(job, use_sandbox=use_sandbox))
        store = Ledger(job.ledger_path)
        stack.callback(store.close)
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
        return run(Surroundings(job, access, store, tell=tell, show=show), wishes)


def _confirm(plan: str) -> bool:
    click.echo(plan, err=True)
    try:
        return click.confirm("Go on?", err=True)
    except click.Abort:
        raise KeyboardInterrupt from None


def _show_receipt(receipt: Receipt, *, as_json: bool, show: bool) -> None:
    from enrich.receipt import lines

    if receipt.error:
        click.echo(f"error: {receipt.error}", err=True)
    if receipt.hint:
        click.echo(f"hint: {receipt.hint}", err=True)
    if show and receipt.rows is not None:
        click.echo("\n".join(lines(receipt)), err=True)
    if as_json:
        click.echo(json.dumps(receipt.as_json(), ensure_ascii=False))


@click.command()
@options.JOB_ARGUMENT
@options.paths
@click.option("--partial", is_flag=True, help="Write the output even when rows are pending.")
@options.AS_JSON
def collect(
    job_file: Path,
    input_path: Path | None,
    output: Path | None,
    ledger: Path | None,
    use_sandbox: bool,
    partial: bool,
    as_json: bool,
) -> int:
    """Write the output of JOB from the ledger alone, without network."""
    from enrich.lock import hold
    from enrich.offline import collect_offline

    job = options.load(job_file, input_path, output, ledger, use_sandbox)
    with hold(job.ledger_path, 0):
        receipt = collect_offline(job, partial=partial)
    _show_receipt(receipt, as_json=as_json, show=sys.stderr.isatty())
    return receipt.exit_code

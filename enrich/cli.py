"""Words, options and exit codes of the commands; no logic."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enrich import __version__, options
from enrich.errors import EnrichError, Exit, Interrupted, LedgerLocked
from enrich.sandbox.command import sandbox
from enrich.upkeep import ledger as ledger_group

if TYPE_CHECKING:
    from enrich.receipt import Receipt
    from enrich.spec import Job
    from enrich.surroundings import Options


def main() -> None:
    """Run the command line; every way out has its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    sys.exit(run_command(sys.argv[1:]))


def _terminated(_number: int, _frame: object) -> None:
    raise Interrupted(Exit.TERMINATED)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    as_json = "--json" in arguments
    try:
        # Not cli.main(), which makes an exit of its own of a reader that left.
        with cli.make_context("enrich", list(arguments)) as context:
            code = cli.invoke(context)
            sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return Exit.USAGE
    except click.UsageError as error:
        hint = f"{error.ctx.command_path} --help" if error.ctx else "enrich --help"
        return _fail(Exit.USAGE, error.format_message(), hint, as_json=as_json)
    except click.ClickException as error:
        return _fail(Exit.USAGE, error.format_message(), None, as_json=as_json)
    except (click.Abort, EOFError, KeyboardInterrupt):
        return _fail(Exit.INTERRUPTED, "interrupted", None, as_json=as_json)
    except EnrichError as error:
        return _fail(error.exit_code, error.message, error.hint, as_json=as_json)
    except BrokenPipeError:
        # Who read our output left; Python must not complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except Exception as error:  # noqa: BLE001 - a bug: told with its trace, never swallowed
        from enrich.database import RESTORE, tells_of_damage

        if tells_of_damage(error):
            return _fail(Exit.REFUSED, f"the ledger is damaged: {error}", RESTORE, as_json=as_json)
        traceback.print_exc()
        return _fail(
            Exit.BUG, f"this is a bug: {type(error).__name__}", "please report it with the lines above", as_json=as_json
        )
    return int(code or 0)


def _fail(code: Exit, message: str, hint: str | None, *, as_json: bool) -> int:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    if as_json:
        click.echo(json.dumps({"exit_code": int(code), "error": message}))
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="enrich")
def cli() -> None:
    """Enrich a CSV of leads with a Databar.ai waterfall.

    Resumable, never paying twice, losing no answer. Start with: enrich run JOB --sandbox
    """


@cli.command()
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
    log_file: Path | None,
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
    skip, wait_s = if_locked
    try:
        receipt = _run(job, wishes, wait_s, use_sandbox=use_sandbox, on_terminal=on_terminal, log_file=log_file)
    except LedgerLocked as error:
        if not skip:
            raise
        if as_json:
            click.echo(json.dumps({"exit_code": 0, "error": error.message}))
        return Exit.OK
    show = on_terminal or always_receipt or (receipt.exit_code != Exit.OK and not quiet)
    _show_receipt(receipt, as_json=as_json, show=show)
    return receipt.exit_code


def _run(
    job: Job, wishes: Options, wait_s: float, *, use_sandbox: bool, on_terminal: bool, log_file: Path | None
) -> Receipt:
    """Run under the lock, with the bar and the log."""
    from enrich.ledger import Ledger
    from enrich.lock import hold
    from enrich.pipeline import run
    from enrich.progress import Bar, Log, log_to
    from enrich.surroundings import Progress, Surroundings

    with ExitStack() as stack:
        log = Log(stack.enter_context(log_to(log_file)))
        stack.enter_context(hold(job.ledger_path, wait_s))
        access = stack.enter_context(options.access(job, use_sandbox=use_sandbox))
        store = Ledger(job.ledger_path)
        stack.callback(store.close)
        bar = Bar() if on_terminal else None

        def tell(text: str) -> None:
            log.tell(text)
            if bar is not None:
                bar.tell(text)

        def show(progress: Progress) -> None:
            log.show(progress)
            if bar is not None:
                bar.show(progress)

        if bar is not None:
            stack.callback(bar.close)
        receipt = run(Surroundings(job, access, store, tell=tell, show=show), wishes)
        log.end(receipt.as_json())
        return receipt


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


@cli.command()
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


@cli.command()
@options.JOB_ARGUMENT
@click.option("--ledger", type=options.FILE, help="Look into this ledger instead of the job's.")
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger of the sandbox.")
@options.AS_JSON
def status(job_file: Path, ledger: Path | None, use_sandbox: bool, as_json: bool) -> None:
    """Show what the ledger of JOB knows: counts, credits, what expires when, past executions."""
    from enrich.status import lines, read_status

    known = read_status(options.load(job_file, None, None, ledger, use_sandbox))
    click.echo(json.dumps(known, ensure_ascii=False) if as_json else "\n".join(lines(known)))


@cli.command()
@options.JOB_ARGUMENT
@click.option("--ledger", type=options.FILE, help="Look into this ledger instead of the job's.")
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger and the account of the sandbox.")
@click.option("--since", type=int, metavar="EXECUTION", help="From this execution on; default: the last one.")
@options.AS_JSON
def reconcile(job_file: Path, ledger: Path | None, use_sandbox: bool, since: int | None, as_json: bool) -> None:
    """Hold the balance against the ledger of JOB: what explains the difference, and what cannot be known."""
    from enrich.reconcile import lines, reconcile_job

    job = options.load(job_file, None, None, ledger, use_sandbox)
    with options.access(job, use_sandbox=use_sandbox) as access:
        told = reconcile_job(job, access, since)
    click.echo(json.dumps(told.as_json()) if as_json else "\n".join(lines(told)))


@cli.command()
@click.argument("identifier", required=False)
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Ask the built-in sandbox.")
@options.AS_JSON
def waterfalls(identifier: str | None, use_sandbox: bool, as_json: bool) -> None:
    """Show what the API offers: waterfalls, their params, fields, providers and prices."""
    from enrich.offer import lines, read_offer

    with options.access(None, use_sandbox=use_sandbox) as access:
        offer = read_offer(access, identifier)
    if as_json:
        told = [waterfall.model_dump() for waterfall in offer]
        click.echo(json.dumps(told[0] if identifier else told, ensure_ascii=False))
    else:
        click.echo("\n".join(lines(offer, whole=identifier is not None)))


@cli.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    from enrich.spec import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


cli.add_command(sandbox)
cli.add_command(ledger_group)

"""The command line: registers all commands and maps errors to exit codes."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from enrich import __version__
from enrich.commands import look, nightly, options, report, run, setup, upkeep
from enrich.databar.outside_text import clean_text
from enrich.errors import EnrichError, ExitCode, Interrupted
from enrich.sandbox.command import sandbox
from enrich.streams import flush_error, guard_streams


def main() -> None:
    """Run the command line and exit with its exit code."""
    guard_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup, or after `&` in a shell
            signal.signal(number, _raise_terminated)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # After a KeyboardInterrupt during an import, `python -m` ends with the signal, even if it is handled.
        signal.signal(signal.SIGINT, _raise_interrupted)
    # Collect cycles less often: batches hold thousands of short-lived tuples, and collection took a third of the time.
    gc.set_threshold(100_000, 50, 100)
    code = run_command(sys.argv[1:])
    if (error := flush_error(sys.stdout)) is not None and not isinstance(error, BrokenPipeError):
        click.echo(f"note: stdout cannot be written: {error.strerror}", err=True)
    if "ray" in sys.modules:
        # Skip the normal shutdown: after Ray has ended, its threads sometimes abort a process that exits normally.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _raise_terminated(_number: int, _frame: object) -> None:
    raise Interrupted(ExitCode.TERMINATED)


def _raise_interrupted(_number: int, _frame: object) -> None:
    raise Interrupted(ExitCode.INTERRUPTED)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    as_json = "--json" in arguments
    context: click.Context | None = None
    try:
        # Do not use cli.main(), which exits with its own code if the reader closes the output.
        with cli.make_context("enrich", list(arguments)) as context:
            code = cli.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return ExitCode.USAGE
    except click.UsageError as error:
        hint = f"{error.ctx.command_path} --help" if error.ctx else "enrich --help"
        return _fail(ExitCode.USAGE, error.format_message(), hint, as_json=as_json)
    except click.ClickException as error:
        return _fail(ExitCode.USAGE, error.format_message(), None, as_json=as_json)
    except (click.Abort, EOFError, KeyboardInterrupt):
        return _fail(ExitCode.INTERRUPTED, "interrupted", None, as_json=as_json)
    except EnrichError as error:
        return _fail(error.exit_code, error.message, error.hint, as_json=as_json)
    except BrokenPipeError:
        return ExitCode.OK  # the reader closed the output, so there is nothing left to do
    except Exception as error:  # noqa: BLE001 - a bug: printed with its traceback
        return _fail_unexpected(
            error, None if context is None else context.meta.get(options.LEDGER_META_KEY), as_json=as_json
        )
    return int(code or 0)


def _fail_unexpected(error: Exception, ledger: object, *, as_json: bool) -> int:
    from enrich.ledger.dialect import DatabaseFailed
    from enrich.ledger.sqlite import RESTORE_HINT, is_busy_error, is_damage_error
    from enrich.ledger.verify import is_damaged

    if isinstance(error, DatabaseFailed):
        return _fail(
            ExitCode.BUG, f"the ledger's server failed: {error}", "run the same command again", as_json=as_json
        )
    if is_busy_error(error):
        hint = "end the program that holds the lock, then run the same command again"
        return _fail(ExitCode.BUG, "another program has locked the ledger", hint, as_json=as_json)
    # An error caused by a damaged ledger is not a bug. Print no traceback: it may quote the ledger's content.
    if is_damage_error(error) or (isinstance(ledger, Path) and is_damaged(ledger)):
        return _fail(
            ExitCode.REFUSED, f"{ledger or 'a database'}: the ledger is damaged", RESTORE_HINT, as_json=as_json
        )
    click.echo(clean_text("".join(traceback.format_exception(error)), _find_api_key()).rstrip("\n"), err=True)
    return _fail(
        ExitCode.BUG, f"this is a bug: {type(error).__name__}", "please report it with the lines above", as_json=as_json
    )


def _find_api_key() -> str:
    """Return the API key, so that it can be masked in a traceback. Empty if there is none."""
    from enrich.databar.credentials import find_key

    with suppress(EnrichError):
        return find_key(os.environ, Path(os.path.expanduser("~"))).get_secret_value()  # noqa: PTH111 - as in options
    return ""


def _fail(code: ExitCode, message: str, hint: str | None, *, as_json: bool) -> int:
    message = clean_text(message)  # it may contain a file name or a server's text
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


for command in (
    run.run,
    run.plan,
    run.collect,
    look.status,
    look.runs,
    look.explain,
    look.reconcile,
    report.report,
    setup.init,
    setup.check,
    setup.waterfalls,
    nightly.cron,
    nightly.doctor,
    setup.schema,
    sandbox,
    upkeep.ledger,
    upkeep.forget,
    upkeep.purge,
):
    cli.add_command(command)

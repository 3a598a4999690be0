"""The command line: registers all commands and maps errors to exit codes."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path

import click
from click.shell_completion import CompletionItem, shell_complete

from enrich import __version__
from enrich.commands import LEDGER_META_KEY
from enrich.commands.streams import echo_error, flush_error, guard_streams
from enrich.databar.text_filter import clean_text
from enrich.errors import EnrichError, Interrupted, RunCancelled
from enrich.exit_codes import ExitCode


def main() -> int:
    """Run the command line and return its exit code. All output is flushed."""
    # We use no plugins of pydantic. It would read the entry points of all installed packages to find some.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    guard_streams()
    os.umask(os.umask(0) & ~stat.S_IRWXU)  # a umask that takes the owner's rights would make our files unreadable
    signals = SignalErrors()
    signals.install()
    instruction = os.environ.get("_ENRICH_COMPLETE")
    if instruction:
        code: int = shell_complete(cli, {}, "enrich", "_ENRICH_COMPLETE", instruction)
    else:
        code = run_command(sys.argv[1:], signals)
    if (error := flush_error(sys.stdout)) is not None and not isinstance(error, BrokenPipeError):
        click.echo(f"note: stdout cannot be written: {error.strerror}", err=True)
    sys.stderr.flush()
    return code


class SignalErrors:
    """Raises a signal as Interrupted, and keeps it: a library may raise its own error in place of ours.

    `is_final`: the result of the command is printed, or it has ended. The first signal then changes nothing, and the
    second one ends the process at once.
    """

    def __init__(self) -> None:
        self.is_final = False
        self._received: Interrupted | None = None
        self._was_late = False

    def install(self) -> None:
        """Raise signals from now on, without those ignored at the program's start (`nohup`, a shell's `&`)."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._raise)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # In place of KeyboardInterrupt: all signals end a command in the same way, with the same message.
            signal.signal(signal.SIGINT, self._raise)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Raise the signal instead of any error that follows it in the block."""
        try:
            yield
        except click.exceptions.Exit:
            raise
        except Exception:
            if self._received is not None:
                raise self._received from None
            raise
        finally:
            self.is_final = True

    def _raise(self, number: int, _frame: object) -> None:
        error = Interrupted(ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED)
        if not self.is_final:
            self._received = error
            raise error
        if self._was_late:
            os._exit(error.exit_code)
        self._was_late = True


def run_command(arguments: Sequence[str], signals: SignalErrors | None = None) -> int:
    """Run one command and return its exit code. `signals` raises them where this is the whole program."""
    as_json = "--json" in arguments
    context: click.Context | None = None
    try:
        # Do not use cli.main(), which exits with its own code if the reader closes the output.
        restoring = nullcontext() if signals is None else signals.restoring()
        with restoring, cli.make_context("enrich", list(arguments), obj=signals) as context:
            code = cli.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return ExitCode.USAGE
    except click.UsageError as error:
        # An error of the parser, such as a missing value, has no context.
        subcommand = (context and context.invoked_subcommand) or ""
        command = error.ctx.command_path if error.ctx else f"enrich {subcommand}".rstrip()
        return _fail(ExitCode.USAGE, error.format_message(), f"{command} --help", as_json=as_json)
    except click.ClickException as error:
        return _fail(ExitCode.USAGE, error.format_message(), getattr(error, "hint", None), as_json=as_json)
    except (click.Abort, EOFError, KeyboardInterrupt):
        return _fail(ExitCode.INTERRUPTED, "interrupted", None, as_json=as_json)
    except RunCancelled as error:
        return _fail(error.exit_code, error.message, None, as_json=as_json, label="")
    except EnrichError as error:
        return _fail(error.exit_code, error.message, error.hint, as_json=as_json)
    except BrokenPipeError:
        return ExitCode.OK  # the reader closed the output, so there is nothing left to do
    except Exception as error:  # noqa: BLE001 - a bug: printed with its traceback
        return _fail_unexpected(error, None if context is None else context.meta.get(LEDGER_META_KEY), as_json=as_json)
    return int(code or 0)


def _fail_unexpected(error: Exception, ledger: object, *, as_json: bool) -> int:
    from enrich.ledger.verify import as_enrich_error

    if (known := as_enrich_error(error, ledger)) is not None:
        return _fail(known.exit_code, known.message, known.hint, as_json=as_json)
    if isinstance(error, FileNotFoundError) and not _has_working_directory():
        message, hint = "the working directory no longer exists", "change to a folder that exists"
        return _fail(ExitCode.USAGE, message, hint, as_json=as_json)
    click.echo(clean_text("".join(traceback.format_exception(error)), _find_api_key()).rstrip("\n"), err=True)
    return _fail(
        ExitCode.BUG, f"this is a bug: {type(error).__name__}", "report it with the lines above", as_json=as_json
    )


def _has_working_directory() -> bool:
    try:
        return bool(Path.cwd())
    except FileNotFoundError:
        return False


def _find_api_key() -> str:
    """Return the API key, so that it can be masked in a traceback. Empty if there is none."""
    from enrich.databar.environment import find_key

    with suppress(EnrichError):
        return find_key(os.environ, Path(os.path.expanduser("~"))).get_secret_value()  # noqa: PTH111 - as in options
    return ""


def _fail(code: ExitCode, message: str, hint: str | None, *, as_json: bool, label: str = "error: ") -> int:
    echo_error(message, hint, label=label)
    if as_json:
        click.echo(json.dumps({"exit_code": int(code), "error": clean_text(message)}))
    return code


#: The commands by section of the help: module and short help. A module is imported when its command is used.
SECTIONS = {
    "Set up": {
        "init": ("enrich.commands.init", "Write a commented job file for a CSV."),
        "check": ("enrich.commands.check", "Check JOB before it runs, and list every problem. Free, offline."),
        "waterfalls": ("enrich.commands.waterfalls", "List waterfalls, with params and prices."),
        "enrichments": ("enrich.commands.waterfalls", "List enrichments, with params and prices."),
        "schema": ("enrich.commands.schema", "Print the JSON Schema of the job file, for editors."),
        "cron": ("enrich.commands.cron", "Print the crontab line and the systemd units for JOB."),
        "doctor": ("enrich.commands.doctor", "Check that the next cron run of JOB will work."),
    },
    "Run": {
        "plan": ("enrich.commands.plan", "Show what a run of JOB sends and the most it can cost. Free."),
        "run": ("enrich.commands.run", "Enrich the leads of JOB. The same command resumes."),
        "cancel": ("enrich.commands.cancel", "Cancel the tasks of JOB that are running at Databar."),
    },
    "Inspect": {
        "status": ("enrich.commands.status", "Show the last run of JOB, or watch the current one."),
        "runs": ("enrich.commands.status", "List the runs of JOB, newest first."),
        "explain": ("enrich.commands.explain", "Show the history of one lead of JOB."),
        "report": ("enrich.commands.report", "Write the report of JOB: one HTML page."),
    },
    "Data": {
        "collect": ("enrich.commands.run", "Write the output of JOB from the ledger, without network."),
        "forget": ("enrich.commands.forget", "Erase a person from the ledger of JOB."),
        "purge": ("enrich.commands.forget", "Erase old params and results from the ledger of JOB."),
    },
    "Maintenance": {
        "ledger": ("enrich.commands.ledger", "Check, back up or copy a ledger."),
        "reconcile": ("enrich.commands.reconcile", "Compare the account balance with the ledger of JOB."),
        "sandbox": ("enrich.commands.sandbox", "Serve the built-in sandbox of the Databar API."),
    },
}
COMMANDS = {name: command for commands in SECTIONS.values() for name, command in commands.items()}


class LazyGroup(click.Group):
    """The commands of `COMMANDS`. Each is imported when it is used, so `enrich --help` imports none of them."""

    def list_commands(self, _: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, _: click.Context, name: str) -> click.Command | None:
        """Import a command. None if it does not exist."""
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[name][0]), name)
        return command

    def format_commands(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in sections."""
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in commands.items()])

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command name or an option of the group."""
        names = [CompletionItem(name, help=COMMANDS[name][1]) for name in COMMANDS if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, context, incomplete)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="enrich")
def cli() -> None:
    """Enrich a CSV of leads with a Databar.ai waterfall or enrichment.

    Resumable, never charged twice, with a budget cap. Try it without a key: enrich run JOB --sandbox
    """

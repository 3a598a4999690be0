"""What stands around `enrich run`: those who are told how it goes, whatever ends it."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from enrich.errors import EnrichError, ExitCode
from enrich.exit_codes import JobArguments


def with_observers(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command its `witnesses` instead of `log_file`; they hear of every way out."""

    @functools.wraps(command)
    def wrapper(*, log_file: Path | None, **params: Any) -> int:  # noqa: ANN401 - click's options
        from enrich.monitoring.log_file import open_log
        from enrich.monitoring.observers import RunObservers

        def print_error(text: str) -> None:
            click.echo(text, err=True)

        with open_log(log_file, params["job_file"].stem, lambda text: print_error(f"note: {text}")) as log:
            paths = (params[name] for name in ("job_file", "input_path", "output", "ledger"))
            observers = RunObservers(log, print_error, make_job_arguments(*paths, use_sandbox=params["use_sandbox"]))
            try:
                return command(**params, observers=observers)
            except BaseException as error:
                observers.failed(*_exit_code_and_message(error))
                raise

    return wrapper


def make_job_arguments(
    job_file: Path,
    input_path: str | None,
    output: str | None,
    ledger: str | None,
    *,
    use_sandbox: bool,
    as_typed: bool = False,
) -> JobArguments:
    """Name the job with the paths that the command line gave: for anywhere, or as they were typed."""

    def path(named: Path | str) -> str:
        text = str(named)
        if text == "-" or "://" in text:
            return text
        if as_typed:  # what begins with a dash would be taken for an option
            return f"./{text}" if text.startswith("-") else text
        return str(Path(text).absolute())

    ledger_args = [path(job_file)]
    if ledger is not None:
        ledger_args += ["--ledger", path(ledger)]
    if use_sandbox:
        ledger_args.append("--sandbox")
    run_args = list(ledger_args)
    for option, given in (("--input", input_path), ("--output", output)):
        if given is not None:
            run_args += [option, path(given)]
    return JobArguments(shlex.join(run_args), shlex.join(ledger_args))


def _exit_code_and_message(error: BaseException) -> tuple[int, str]:
    """Say with which exit code the command line will leave, and why; of a bug only its kind, as it may hold data."""
    match error:
        case EnrichError():
            return error.exit_code, error.message
        case click.ClickException():
            return ExitCode.USAGE, error.format_message()
        case click.Abort() | EOFError() | KeyboardInterrupt():
            return ExitCode.INTERRUPTED, "interrupted"
    from enrich.ledger.sqlite import is_damage_error

    if is_damage_error(error):
        return ExitCode.REFUSED, "the ledger is damaged"
    return ExitCode.BUG, f"this is a bug: {type(error).__name__}"

"""What stands around `enrich run`: those who are told how it goes, whatever ends it."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from enrich.errors import EnrichError, Exit
from enrich.watch.outcome import Target


def witnessed(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command its `witnesses` instead of `log_file`; they hear of every way out."""

    @functools.wraps(command)
    def with_witnesses(*, log_file: Path | None, **given: Any) -> int:  # noqa: ANN401 - click's options
        from enrich.watch.runlog import log_to
        from enrich.watch.witnesses import Witnesses

        def say(text: str) -> None:
            click.echo(text, err=True)

        with log_to(log_file, given["job_file"].stem, lambda text: say(f"note: {text}")) as log:
            witnesses = Witnesses(log, say, target(given, from_here=False))
            try:
                return command(**given, witnesses=witnesses)
            except BaseException as error:
                witnesses.failed(*_told(error))
                raise

    return with_witnesses


def target(given: Mapping[str, Any], *, from_here: bool) -> Target:
    """Name the job with the paths that the command line gave: as they were typed, or for anywhere."""

    def path(named: Path | str) -> str:
        anywhere = from_here or str(named) == "-" or "://" in str(named)
        return str(named) if anywhere else str(Path(named).absolute())

    look = [path(given["job_file"]), *(["--sandbox"] if given["use_sandbox"] else [])]
    if given["ledger"] is not None:
        look += ["--ledger", path(given["ledger"])]
    run = list(look)
    for option, name in (("--input", "input_path"), ("--output", "output")):
        if given[name] is not None:
            run += [option, path(given[name])]
    return Target(shlex.join(run), shlex.join(look))


def _told(error: BaseException) -> tuple[int, str]:
    """Say with which exit code the command line will leave, and why; of a bug only its kind, as it may hold data."""
    match error:
        case EnrichError():
            return error.exit_code, error.message
        case click.ClickException():
            return Exit.USAGE, error.format_message()
        case click.Abort() | EOFError() | KeyboardInterrupt():
            return Exit.INTERRUPTED, "interrupted"
    from enrich.store.database import tells_of_damage

    if tells_of_damage(error):
        return Exit.REFUSED, "the ledger is damaged"
    return Exit.BUG, f"this is a bug: {type(error).__name__}"

"""What stands around `enrich run`: those who are told how it goes, whatever ends it."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
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
            paths = (given[name] for name in ("job_file", "input_path", "output", "ledger"))
            witnesses = Witnesses(log, say, target_of(*paths, use_sandbox=given["use_sandbox"]))
            try:
                return command(**given, witnesses=witnesses)
            except BaseException as error:
                witnesses.failed(*_told(error))
                raise

    return with_witnesses


def target_of(
    job_file: Path,
    input_path: str | None,
    output: str | None,
    ledger: str | None,
    *,
    use_sandbox: bool,
    from_here: bool = False,
) -> Target:
    """Name the job with the paths that the command line gave: for anywhere, or as they were typed."""

    def path(named: Path | str) -> str:
        text = str(named)
        if text == "-" or "://" in text:
            return text
        if from_here:  # what begins with a dash would be taken for an option
            return f"./{text}" if text.startswith("-") else text
        return str(Path(text).absolute())

    look = [path(job_file)]
    if ledger is not None:
        look += ["--ledger", path(ledger)]
    if use_sandbox:
        look.append("--sandbox")
    run = list(look)
    for option, given in (("--input", input_path), ("--output", output)):
        if given is not None:
            run += [option, path(given)]
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
    from enrich.store.sqlite import tells_of_damage

    if tells_of_damage(error):
        return Exit.REFUSED, "the ledger is damaged"
    return Exit.BUG, f"this is a bug: {type(error).__name__}"

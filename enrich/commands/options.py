"""Options that several commands share, and functions that parse and use their values."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from msgspec import Struct
from pydantic import SecretStr

from enrich.commands import LEDGER_META_KEY
from enrich.databar.environment import ApiAccess, find_access
from enrich.databar.text_filter import clean_text
from enrich.errors import CommandRefused, EnrichError, needs_extra
from enrich.exit_codes import JobArguments
from enrich.job.field_types import parse_duration
from enrich.job.job import Job, Overrides, load_job
from enrich.job.local_files import why_no_file
from enrich.job.locations import (
    LedgerLocation,
    as_argument,
    check_no_password,
    hide_secrets,
    is_url,
    sandbox_state_path,
)
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.file_identity import ledger_file_exists, make_private_folder
from enrich.ledger.sqlite_errors import is_busy_error
from enrich.models import PLAIN_NUMBER, RETRYABLE_STATES, State

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def parse_file_path(text: str) -> Path:
    """Parse the path of a file, which need not exist. Raises ValueError for a name that no file can have."""
    if text == "-":
        raise ValueError("must be a file, not `-`")
    if is_url(text):
        raise ValueError("must be a file on this machine, not a URL")
    reason = why_no_file(Path(text)) if text else "it is empty"
    if reason is not None:
        raise ValueError(f"`{text}` cannot be the name of a file: {reason}")
    if os.path.isdir(text):  # noqa: PTH112 - Path.is_dir raises PermissionError
        raise ValueError(f"`{text}` is a folder, not a file")
    return Path(text)


class FilePath(click.Path):
    """The path of a file, as of `parse_file_path`; `-` may stand for stdout."""

    def __init__(self, *, allow_dash: bool = False) -> None:
        super().__init__(dir_okay=False, allow_dash=allow_dash)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401 - as in click
        """Parse the path."""
        if str(value) == "-" and self.allow_dash:
            return Path("-")
        try:
            return parse_file_path(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


FILE, FILE_OR_STDOUT = FilePath(), FilePath(allow_dash=True)
_INPUT_HELP = "Read this file or URL, or - for stdin, instead of the job's input."
_OUTPUT_HELP = "Write this file or URL instead of the job's output."
_TIME_OF_DAY = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])")


class Parsed(click.ParamType):  # type: ignore[type-arg] # older versions are not generic
    """The value of an option as `parse` returns it. Its ValueError becomes a usage error."""

    name = "text"

    def __init__(self, parse: Callable[[str], object]) -> None:
        self.parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """Parse a text. A default that is no text stays as it is."""
        try:
            return self.parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_seconds(text: str) -> float:
    """Parse a duration to seconds. Raises ValueError."""
    return parse_duration(text).total_seconds()


def _parse_states(text: str) -> frozenset[State]:
    """Parse `failed,expired,in_doubt`. Raises ValueError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in RETRYABLE_STATES:
            raise ValueError(f"`{name}` must be one of {', '.join(filter(RETRYABLE_STATES.__contains__, State))}")
    return frozenset(map(State, names))


def parse_lock_wait(text: str) -> tuple[bool, float]:
    """Parse `--if-locked`: whether to skip the run, and how many seconds to wait (-1: without limit)."""
    word, _equals, duration = text.partition("=")
    if word == "wait":
        return False, parse_seconds(duration) if duration else -1
    if duration or word not in ("fail", "skip"):
        raise ValueError("must be fail, skip, wait or wait=10m")
    return word == "skip", 0.0


def parse_time_of_day(text: str) -> tuple[int, int]:
    """Parse a time of day to hour and minute. Raises ValueError."""
    match = _TIME_OF_DAY.fullmatch(text.strip())
    if match is None:
        raise ValueError("must be a time of the day such as 02:00, between 0:00 and 23:59")
    return int(match[1]), int(match[2])


SECONDS, TIME_OF_DAY = Parsed(parse_seconds), Parsed(parse_time_of_day)


#: It rejects URLs with a password before the arguments are written anywhere.
LEDGER_OPTION = click.option(
    "--ledger",
    type=Parsed(check_no_password),
    metavar="FILE",
    help="Use this ledger, a file or postgresql://…, instead of the job's.",
)


JOB_ARGUMENT = click.argument("job_file", metavar="JOB", type=FILE)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


class JobOptions(Struct, frozen=True):
    """The job of a command, and what its options give instead of the job file."""

    job_file: Path
    input_path: str | None = None
    output: str | None = None
    ledger: str | None = None
    use_sandbox: bool = False

    @property
    def given_ledger(self) -> str | None:
        """The ledger of `--ledger`, or else of `ENRICH_LEDGER`. None: the job's."""
        return self.ledger or os.environ.get("ENRICH_LEDGER") or None

    def load(self, max_credits: float | None = None) -> Job:
        """Load the job file. The options and `ENRICH_LEDGER` override its values. Raises JobError."""
        overrides = Overrides(self.input_path, self.output, self.given_ledger, max_credits, self.use_sandbox)
        job = load_job(self.job_file, overrides)
        record_ledger(job.ledger)
        return job

    @contextmanager
    def named_in_hints(self) -> Iterator[None]:
        """Name this job in the hint of an error that is raised in the block."""
        try:
            yield
        except EnrichError as error:
            error.hint = error.hint and self.arguments(as_typed=True).in_hint(error.hint)
            raise

    def arguments(self, *, as_typed: bool = False) -> JobArguments:
        """Return the arguments that name the job and its paths: absolute, or as given on the command line."""

        def path(named: Path | str) -> str:
            text = str(named)
            if "://" in text:
                return hide_secrets(text)
            if text == "-":
                return text
            return as_argument(text) if as_typed else str(Path(text).absolute())

        ledger_args = [path(self.job_file)]
        if self.given_ledger is not None:  # a reader's shell lacks the variables of cron
            ledger_args += ["--ledger", path(self.given_ledger)]
        if self.use_sandbox:
            ledger_args.append("--sandbox")
        run_args = list(ledger_args)
        for option, given in (("--input", self.input_path), ("--output", self.output)):
            if given is not None:
                run_args += [option, path(given)]
        return JobArguments(shlex.join(run_args), shlex.join(ledger_args))


def add_options(*added: Decorator) -> Decorator:
    """Return a decorator that adds options to a command, shown in this order."""
    return lambda command: functools.reduce(lambda decorated, option: option(decorated), reversed(added), command)


def job_options(
    *, has_input: bool = False, has_output: bool = False, sandbox: str = "Use the ledger of the sandbox."
) -> Decorator:
    """Add JOB and the options for its paths to a command, which gets them as one object, `job_options`."""
    with_options = add_options(
        JOB_ARGUMENT,
        *([click.option("--input", "input_path", metavar="FILE", help=_INPUT_HELP)] if has_input else []),
        *([click.option("--output", metavar="FILE", help=_OUTPUT_HELP)] if has_output else []),
        LEDGER_OPTION,
        click.option("--sandbox", "use_sandbox", is_flag=True, help=sandbox),
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(**params: Any) -> Any:  # noqa: ANN401 - click's options, and what the command returns
            given = {name: params.pop(name) for name in JobOptions.__struct_fields__ if name in params}
            job_options = JobOptions(**given)
            with job_options.named_in_hints():
                return command(job_options=job_options, **params)

        return with_options(wrapper)

    return decorate


#: `job_options` of the commands that send or plan requests.
RUN_JOB_OPTIONS = job_options(has_input=True, has_output=True, sandbox="Use the built-in sandbox: no key, no credits.")


class Number(click.ParamType):  # type: ignore[type-arg] # older versions are not generic
    """A number in plain digits, at least the minimum. The help shows no range, as it does for `click.IntRange`."""

    name = "number"

    def __init__(self, minimum: float = -math.inf, number: click.ParamType[Any] = click.INT) -> None:
        self.minimum, self.number = minimum, number

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse a number. Raises a usage error for other text, and for less than the minimum."""
        if not PLAIN_NUMBER.fullmatch(str(value)):
            self.fail(f"`{value}` is not a number in plain digits", param, ctx)
        number: float = self.number.convert(value, param, ctx)
        if number < self.minimum:
            self.fail(f"{value} is less than {self.minimum}", param, ctx)
        return number


def selection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for what is sent to a command, which gets them as `selected`, and `max_credits`."""

    @functools.wraps(command)
    def wrapper(**params: Any) -> Any:  # noqa: ANN401 - click's options, and what the command returns
        from enrich.run.context import RunOptions

        names = ("limit", "sample", "seed", "retry", "update_providers")
        selected = RunOptions(**{name: params.pop(name) for name in names})
        return command(selected=selected, **params)

    return _add_selection_options(wrapper)


_add_selection_options = add_options(
    click.option(
        "--limit", type=Number(0), metavar="ROWS", help="Send at most this many new requests. The rest stays pending."
    ),
    click.option(
        "--sample",
        type=Number(1),
        metavar="ROWS",
        help="Send only this many new requests: a stratified random sample of the file.",
    ),
    click.option(
        "--seed",
        type=Number(),
        default=0,
        show_default=True,
        metavar="NUMBER",
        help="Seed of the sample. The same seed chooses the same rows.",
    ),
    click.option(
        "--max-credits", type=Number(0, click.FLOAT), metavar="CREDITS", help="Spend at most this many credits."
    ),
    click.option(
        "--retry",
        type=Parsed(_parse_states),
        default="",
        metavar="STATES",
        help="Send these again, which may charge again: failed, expired, in_doubt, separated by commas.",
    ),
    click.option("--update-providers", is_flag=True, help="Switch to the current default providers of the waterfall."),
)


def record_ledger(ledger: LedgerLocation) -> None:
    """Record which ledger a command uses, because damage to it may cause an unexpected error."""
    if (context := click.get_current_context(silent=True)) is not None:
        context.meta[LEDGER_META_KEY] = ledger


def check_ledger_not_lost(job: Job) -> None:
    """Raise CommandRefused when the file of a ledger is missing, and only a rescue file has its data."""
    if isinstance(job.ledger, Path) and not ledger_file_exists(job.ledger):
        from enrich.run.context import check_no_rescue_file  # slow to import, and rarely needed

        check_no_rescue_file(job)


@contextmanager
def open_access(job: Job | None, *, use_sandbox: bool) -> Iterator[ApiAccess]:
    """Yield the API's address and key, or those of a sandbox that runs during the block."""
    if not use_sandbox:
        # Without a home directory expanduser leaves the ~, and then the key file does not exist.
        yield find_access(os.environ, Path(os.path.expanduser("~")))  # noqa: PTH111
        return

    with needs_extra("sandbox", "the sandbox is not installed"):
        from enrich.sandbox.server import serve_in_thread
    with ExitStack() as stack:
        if job is None:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "sandbox.db"
        else:
            if isinstance(job.ledger, Path):
                ledger_file_exists(job.ledger)  # raises for a folder, before anything is created beside it
            state = sandbox_state_path(job.ledger)
        try:
            make_private_folder(state.parent)
            server = stack.enter_context(serve_in_thread(state))
        except (OSError, ValueError, *DATABASE_ERRORS) as error:
            is_used = is_busy_error(error)
            reason = "another command is using it" if is_used else getattr(error, "strerror", None) or error
            own_hint = None if job is None else "name another ledger with --ledger"
            hint = "run this again after that command ends" if is_used else own_hint
            raise CommandRefused(f"{state}: the sandbox cannot use this file: {reason}", hint) from error
        yield ApiAccess(server.base_url, SecretStr(server.api_key))


def short_path(path: str | None) -> str | None:
    """Return a path as seen from the working directory, if it is below it, to be printed."""
    if path is None:
        return None
    if "://" not in path:
        with suppress(ValueError):
            path = str(Path(path).relative_to(Path.cwd()))
    return clean_text(path)


def begin_result() -> None:
    """Mark that the result of the command is printed now. The first signal after this changes nothing."""
    context = click.get_current_context(silent=True)
    if context is not None and context.obj is not None:
        context.obj.is_final = True


def echo_json(document: object) -> None:
    """Print the result of a command as JSON."""
    begin_result()
    click.echo(json.dumps(document, ensure_ascii=False))


def echo_result(result: object, lines: Iterable[str], *, as_json: bool) -> None:
    """Print the result of a command as JSON, or its lines of text."""
    if as_json:
        echo_json(result)
    else:
        click.echo(clean_text("\n".join(lines)))


def make_styler() -> Callable[[str, str], str]:
    """Return a function that colors text for stderr, only on a color terminal (https://no-color.org)."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return lambda text, _: text

    def paint(text: str, name: str) -> str:
        if name == "bold":
            return click.style(text, bold=True)
        return click.style(text, fg=name) if name else text

    return paint

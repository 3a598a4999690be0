"""`enrich sandbox`: serves the API on loopback; every setting is an option."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from enrich.errors import JobError, needs_extra
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.sandbox.settings import FAULT_KINDS, Fault, SandboxSettings

_FAULTS = ", ".join(f"{name} ({', '.join(kind.params)})" if kind.params else name for name, kind in FAULT_KINDS.items())
_HELP = f"""Serve the built-in sandbox of the Databar API on loopback, with invented people and configurable faults.

Prints the two variables that point `enrich` to it, and serves until you press Ctrl-C. Free.

Faults, with their params in parentheses: {_FAULTS}."""

MAX_PORT = 65_535
_HINTS = get_type_hints(SandboxSettings, include_extras=True)


def _reader(name: str, read: Callable[[str], Any]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:  # noqa: ANN401  # a string, or the default, which is already converted
        try:
            return read(value) if isinstance(value, str) else value
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    convert.__name__ = name
    return convert


def _number(kind: Callable[[str], Any], text: str) -> float:
    try:
        return kind(text)  # type: ignore[no-any-return] # int or float
    except ValueError:
        raise ValueError(f"`{text}` is not a {'whole number' if kind is int else 'number'}") from None


def _type_of(hint: Any) -> Any:  # noqa: ANN401  # a Python type in, a click type out
    kinds = get_args(hint)
    if get_origin(hint) is tuple:
        return _type_of(kinds[0])
    if get_origin(hint) is Literal:
        return click.Choice(kinds)
    if get_origin(hint) is UnionType:
        return _reader(
            f"{kinds[0].__name__}|none", lambda text: None if text.lower() == "none" else _number(kinds[0], text)
        )
    if hint is Fault:
        return _reader("fault", Fault.parse)
    return _reader(hint.__name__, hint if hint is str else partial(_number, hint))


def _option(name: str, annotated: Any, default: Any) -> click.Option:  # noqa: ANN401  # a type and its value
    hint, text = get_args(annotated)
    many = get_origin(hint) is tuple
    shown = ", ".join(default) if many else "none" if default is None else str(default)
    if shown and hint is not bool:  # click itself would put parentheses around it
        text += f" [default: {shown}]"
    return click.Option(
        [f"--{(name.removesuffix('s') if many else name).replace('_', '-')}", name],
        type=None if hint is bool else _type_of(hint),
        is_flag=hint is bool,
        multiple=many,
        default=default,
        help=text,
    )


def _run(port: int, state: Path | None, **values: Any) -> None:  # noqa: ANN401  # one for each setting
    if not 0 <= port <= MAX_PORT:
        raise click.UsageError(f"--port must be from 0 to {MAX_PORT}")
    try:
        settings = SandboxSettings(**values)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with needs_extra("sandbox", "the sandbox is not installed"):
        from enrich.sandbox.server import serve
    with ExitStack() as stack:
        if state is None:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-"))) / "state.db"
        try:
            serve(state, settings, port)
        except (OSError, ValueError, *DATABASE_ERRORS) as error:
            used = getattr(error, "filename", None) or state  # the file, or the port
            option = "--port" if str(used) == f"port {port}" else "--state"
            reason = getattr(error, "strerror", None) or error
            raise JobError(f"{used}: the sandbox cannot use it: {reason}", f"choose another with {option}") from error


sandbox = click.Command(
    "sandbox",
    callback=_run,
    help=_HELP,
    params=[
        click.Option(["--port"], type=int, default=0, metavar="PORT", help="Port to listen on. Default: a free one."),
        click.Option(
            ["--state"],
            type=click.Path(dir_okay=False, path_type=Path),
            help="File for tasks and credits. Default: a temporary one.",
        ),
        *(_option(field.name, _HINTS[field.name], field.default) for field in fields(SandboxSettings)),
    ],
)

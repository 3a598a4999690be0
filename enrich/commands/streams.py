"""Makes standard streams safe, prints messages and asks. Failed writes are dropped, closed streams use /dev/null."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

import click

from enrich.databar.text_filter import clean_text

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _DroppingFile(io.FileIO):
    """A file that drops data after a write error. `write_error` is the first error, None without one."""

    write_error: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write data. Wait for the reader if the descriptor is non-blocking. After an error drop everything."""
        try:
            while self.write_error is None:
                if (written := super().write(data)) is not None:
                    return written
                select.select([], [self], [])
        except OSError as error:
            self.write_error = error
        return memoryview(data).nbytes


def guard_streams() -> None:
    """Occupy descriptors 0 to 2 before any other file is opened, so that no such file receives stream output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - positional only
    sys.stdout, sys.stderr = _guarded_stream(sys.stdout, 1), _guarded_stream(sys.stderr, 2)


def _guarded_stream(stream: TextIO | None, descriptor: int) -> TextIO:
    errors = stream.errors if stream else None
    return io.TextIOWrapper(
        io.BufferedWriter(_DroppingFile(descriptor, "w", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace" if errors in (None, "strict") else errors,
        line_buffering=descriptor == 2 or os.isatty(descriptor),  # noqa: PLR2004 - stderr
    )


def flush_error(stream: TextIO) -> OSError | None:
    """Flush a stream and return its first write error. None: everything was written."""
    stream.flush()
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.write_error if isinstance(raw, _DroppingFile) else None


#: Stand-ins for characters that not every terminal can show.
_ASCII = str.maketrans({"✓": "ok:", "→": "->", "·": "-", "…": "..."})


def for_terminal(text: str) -> str:
    """Return a text as stderr can show it."""
    try:
        text.encode(sys.stderr.encoding or "utf-8")
    except (LookupError, UnicodeEncodeError):
        return text.translate(_ASCII)
    return text


def echo_message(text: str, *, label: str = "") -> None:
    """Print a text on stderr, which may contain names of files and texts from outside, but no colors."""
    click.echo(label + for_terminal(clean_text(text)), err=True)


def echo_error(message: str, hint: str | None, *, label: str = "error: ") -> None:
    """Print an error, and what to do about it, on stderr."""
    echo_message(message, label=label)
    if hint:
        echo_message(hint, label="hint: ")


def can_ask() -> bool:
    """Return whether there is a terminal to ask on."""
    return sys.stderr.isatty() and sys.stdin is not None and sys.stdin.isatty()


def ask(text: str) -> bool:
    """Ask the question that is the last line of a text. No answer (Ctrl-D) is a no."""
    *lines, question = text.splitlines()
    echo_message("\n".join(lines))
    try:
        return click.confirm(question, prompt_suffix=" ", err=True)
    except click.Abort:
        click.echo(err=True)
        return False

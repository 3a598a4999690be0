"""Opens table files as text. Read errors become FileProblem, with the byte and line for a decoding error."""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TextIO

from enrich.errors import CommandRefused
from enrich.job.locations import Format

BYTE_ORDER_MARK = "\ufeff"
BINARY_HINT = "It is no text file, or one in another encoding, perhaps `encoding: utf-16-le`"

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before utf-16, because this mark begins with that of utf-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MAGIC_BYTES = {
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "If it is a workbook, let its name end in `.xlsx`"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "Open it in a spreadsheet and save it as `.xlsx`"),
    b"PAR1": ("a Parquet file", "Let its name end in `.parquet`"),
    b"\x1f\x8b": ("compressed with gzip", "Let its name end in `.gz`, or unpack it"),
}
FORMAT_NAMES = {"csv": "CSV text", "jsonl": "JSON Lines", "parquet": "a Parquet file", "xlsx": "an Excel workbook"}


@dataclass(frozen=True, slots=True)
class TableFile:
    """A table's file and its format settings. `display_name` replaces the path in messages."""

    path: Path
    separator: str = ","
    encoding: str = "utf-8"
    format: Format = "csv"
    sheet: str | None = None
    display_name: str | None = None

    def __str__(self) -> str:
        return self.display_name or str(self.path)


class FileProblem(Exception):
    """A problem with a table's file, with a hint on what to do. It never quotes a cell of the file."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@contextmanager
def as_refused() -> Iterator[None]:
    """Convert FileProblem into CommandRefused, which ends the command."""
    try:
        yield
    except FileProblem as problem:
        raise CommandRefused(problem.message, problem.hint) from problem


@contextmanager
def open_text(source: TableFile, newline: str = "") -> Iterator[TextIO]:
    """Open the file as text, after its byte order mark if it has one. Raises FileProblem."""
    check_encoding(source.encoding)
    with as_file_problem(source):
        try:
            with _open_binary(source) as raw:
                _check_magic_bytes(source, raw.read(8))
                raw.seek(0)
                with io.TextIOWrapper(raw, source.encoding, newline=newline) as text:
                    if text.read(1) != BYTE_ORDER_MARK:
                        text.seek(0)
                    yield text
        except UnicodeError:
            raise _decoding_problem(source) from None


@contextmanager
def as_file_problem(source: TableFile) -> Iterator[None]:
    """Convert errors while reading the file into FileProblem."""
    try:
        path = source.path
        if path.exists() and not path.is_file():  # opening a named pipe could block forever
            raise FileProblem(f"{source} is {'a folder' if path.is_dir() else 'not a file'}", "Name a file")
        yield
    except FileNotFoundError:
        raise FileProblem(f"{source} does not exist", "Check the path; it is relative to the current folder") from None
    except PermissionError:
        raise FileProblem(f"{source} may not be read by this user", "Give yourself the right to read it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        hint = "Fetch the file again; if it is plain text, let its name not end in `.gz`"
        raise FileProblem(f"{source} is not a sound gzip file", hint) from None
    except OSError as error:
        raise FileProblem(f"{source} cannot be read: {error.strerror or error}") from None


def check_encoding(encoding: str) -> None:
    """Raise FileProblem if the encoding is unknown or not a text encoding."""
    try:
        codecs.lookup(encoding)
        "a".encode(encoding)  # refuses codecs that are not for text, such as base64
    except (LookupError, ValueError):
        message = f"encoding `{encoding}` is not known"
        raise FileProblem(message, "Use a name such as `utf-8`, `cp1252` or `utf-16`") from None


def quote_column(column: str) -> str:
    """Format a column's name for a message."""
    return f"`{column}`" if column else "the blank name"


def repeated_columns(header: list[str], positions: list[str] | None = None) -> str | None:
    """Return a message with the repeated column names and their positions. None if there are none.

    `positions` are the names of the positions. By default they are numbered from 1.
    """
    if len(set(header)) == len(header):
        return None
    found: dict[str, list[str]] = {}
    for position, name in enumerate(header):
        found.setdefault(name, []).append(positions[position] if positions else str(position + 1))
    repeated = [f"{quote_column(name)} at {', '.join(where)}" for name, where in found.items() if len(where) > 1]
    return f"names columns twice: {'; '.join(repeated)}"


def _open_binary(source: TableFile) -> io.BufferedReader | gzip.GzipFile:
    path = source.path
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _check_magic_bytes(source: TableFile, beginning: bytes) -> None:
    for magic, (kind, hint) in _MAGIC_BYTES.items():
        if beginning.startswith(magic):
            raise FileProblem(f"{source} is not {FORMAT_NAMES[source.format]} but {kind}", hint)
    encoding = codecs.lookup(source.encoding).name
    mark = next((marked for mark, marked in _BYTE_ORDER_MARKS.items() if beginning.startswith(mark)), None)
    if mark and not encoding.startswith(mark):
        problem, suggestion = f"begins a mark of {mark}", mark
    elif beginning and not mark and encoding in {"utf-16", "utf-32"}:
        order = "be" if beginning.startswith(b"\0") else "le"
        problem, suggestion = "begins no mark of it", f"{encoding}-{order}" if b"\0" in beginning else "utf-8"
    else:
        return
    message = f"{source} is not `{source.encoding}` text: byte 1 (line 1) {problem}"
    raise FileProblem(message, f"Set `encoding: {suggestion}`")


def _decoding_problem(source: TableFile) -> FileProblem:
    """Read the file again as bytes to find the first byte that is invalid in its encoding."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(source.encoding)(), translate=True)
    offset, line, position = 0, 1, ""
    with _open_binary(source) as raw:
        for chunk in chain(iter(lambda: raw.read(1 << 20), b""), [b""]):
            pending, state = decoder.getstate()
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeError as error:
                start = getattr(error, "start", 0) - len(pending)
                decoder.setstate((pending if start > 0 else b"", state))
                line += decoder.decode(chunk[: max(start, 0)], final=True).count("\n")
                position = f": byte {offset + start + 1} (line {line}) has no meaning in it"
                break
            offset += len(chunk)
    suggestion = "cp1252" if codecs.lookup(source.encoding).name.startswith("utf-8") else "utf-8"
    hint = f"Name the encoding it was saved in, perhaps `encoding: {suggestion}`"
    return FileProblem(f"{source} is not `{source.encoding}` text{position}", BINARY_HINT if b"\0" in chunk else hint)

"""Opens table files as text. Read errors become FileProblem, with the byte and line for a decoding error."""

import codecs
import gzip
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import TextIO

from msgspec import Struct

from enrich.errors import UNREADABLE_HINT, CommandRefused, did_you_mean, suggest_name
from enrich.job.cell_text import clean
from enrich.job.locations import Format

BYTE_ORDER_MARK = "\ufeff"
_CELL_SHAPE = re.compile(
    r"(?<![^\s@])[^\s@]+@[^\s@]+\.[^\s@]+"  # an e-mail address; tried once for each word, as words may be long
    r"|^\s*(?:[a-z]+://|www\.)\S+\s*$"
    r"|^\s*(?:[a-z0-9-]+\.)+[a-z]{2,}(?:/\S*)?\s*$"  # a domain
    r"|^\s*\+\d[\d\s()./-]{3,}$"  # a phone number
    r"|^\s*\(?(?:\d[\s()./-]*){9,}$",
    re.IGNORECASE,
)
BINARY_HINT = "it may be a binary file, or have another encoding, such as `encoding: utf-16-le`"

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before utf-16, because this mark begins with that of utf-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
#: What works for files, pipes and web addresses.
_FORMAT_HINT = "rename it to end in `.{0}`, or set `format: {0}` as a key of `input`"
_UNPACK_HINT = "decompress it first: only `.gz` is supported"
#: How files begin that are often taken for a table, what they are, and what to do.
_MAGIC_BYTES = {
    b"PK\x03\x04": (
        "a zip archive or an Excel workbook",
        f"if it is a workbook, {_FORMAT_HINT.format('xlsx')}; otherwise unpack it",
    ),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook (`.xls`)", "open it in a spreadsheet and save it as `.xlsx`"),
    b"PAR1": ("a Parquet file", _FORMAT_HINT.format("parquet")),
    b"\x1f\x8b": ("compressed with gzip", "rename it to end in `.gz`, or decompress it"),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", _UNPACK_HINT),
    b"\xfd7zXZ\0": ("compressed with xz", _UNPACK_HINT),
    b"BZh": ("compressed with bzip2", _UNPACK_HINT),
    b"\x04\x22\x4d\x18": ("compressed with LZ4", _UNPACK_HINT),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", _UNPACK_HINT),
    b"Rar!\x1a": ("a RAR archive", _UNPACK_HINT),
    b"\xff\x06\x00\x00sNaPpY": ("compressed with Snappy", _UNPACK_HINT),
    b"SQLite format 3\0": ("an SQLite database", "export the table as CSV"),
    b"%PDF-": ("a PDF document", "name a file of leads"),
    b"{\\rtf": ("a text document (RTF)", "save it as CSV"),
}
JSON_ARRAY_HINT = "it looks like a JSON array: convert it to lines with `jq -c '.[]'`"
#: The same for text in place of CSV, after blanks and a byte order mark.
_TEXT_BEGINNINGS = (
    (re.compile(rb"<!doctype html|<html", re.IGNORECASE), "an HTML page", "download the file itself, as CSV"),
    (re.compile(rb"<\?xml"), "an XML document", "save it as CSV"),
    (re.compile(rb"\[\s*\{"), "JSON", f"{JSON_ARRAY_HINT}, in a file that ends in `.jsonl`"),
    (re.compile(rb"\{\s*\""), "JSON", f"if each line is an object, {_FORMAT_HINT.format('jsonl')}"),
)
#: An OpenDocument file is a zip archive that begins with a member of this text.
_OPEN_DOCUMENT = b"mimetypeapplication/vnd.oasis.opendocument."
_OPEN_DOCUMENT_HINT = "open it in a spreadsheet and save it as `.xlsx` or as CSV"
_MAGIC_LENGTH = 128
#: A longer name of a column is cut in messages.
_MAX_SHOWN_NAME = 100
#: Rows that are read at once.
ROWS_PER_BATCH = 20_000
FORMAT_NAMES = {"csv": "CSV text", "jsonl": "JSON Lines", "parquet": "a Parquet file", "xlsx": "an Excel workbook"}


class TableFile(Struct, frozen=True):
    """A table's file and its format settings. `display_name` replaces the path in messages."""

    path: Path
    separator: str = ","
    encoding: str = "utf-8"
    format: Format = "csv"
    sheet: str | None = None
    display_name: str | None = None

    def __str__(self) -> str:
        return self.display_name or str(self.path)


class FileProblem(CommandRefused):
    """A table's file cannot be read. The message names the file, and never quotes a cell of it."""


@contextmanager
def open_text(source: TableFile, newline: str = "") -> Iterator[TextIO]:
    """Open the file as text, after its byte order mark if it has one. Raises FileProblem."""
    with as_file_problem(source):
        try:
            with open_binary(source) as raw:
                beginning = raw.read(_MAGIC_LENGTH)
                _check_other_format(source, beginning)
                _check_byte_order_mark(source, beginning)
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
            raise FileProblem(f"{source} is {'a folder' if path.is_dir() else 'not a file'}", "name a file")
        yield
    except FileNotFoundError:
        raise FileProblem(f"{source} does not exist", "check the path") from None
    except PermissionError:
        raise FileProblem(f"{source} cannot be read by this user", "change its permissions") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        hint = "download the file again; if it is plain text, rename it without `.gz`"
        raise FileProblem(f"{source} is a damaged gzip file", hint) from None
    except OSError as error:
        raise FileProblem(f"{source} cannot be read: {error.strerror or error}", UNREADABLE_HINT) from None


def quote_column(column: str) -> str:
    """Format a column's name for a message. A name that looks like a cell of a person is not shown."""
    if looks_like_cell(column):
        return "(a name that looks like a cell)"
    if len(column) > _MAX_SHOWN_NAME:
        return f"`{column[:_MAX_SHOWN_NAME]}…` (a name of {len(column):,} characters)"
    return f"`{column}`" if column else "the blank name"


def looks_like_cell(name: str) -> bool:
    """Check whether a column's name looks like a cell of a lead: an e-mail, a URL, a domain, a phone number."""
    return _CELL_SHAPE.search(name) is not None


#: Why a header is no header, where its cells look like those of a lead.
NO_HEADER = "looks like a lead, not like column names: the file has no header"
NO_HEADER_HINT = "write the column names into a first line, as in First Name,Last Name,Website"
LATER_HEADER_HINT = "the header may be a later row: delete the lines above it"
SHORT_ROW_HINT = (
    "if a total or a footer starts here, delete it; otherwise look for a cell with a quote or a line break in it that "
    "should be in quotes"
)


def header_problem(header: list[str], positions: list[str] | None = None) -> tuple[str, str] | None:
    """Return the problem of a header, with a hint that quotes no lead. None: the header is valid.

    `positions` are the names of the columns' positions. By default they are numbered from 1.
    """
    repeated = _repeated_columns(header, positions)
    if repeated is None:
        return None
    if any(map(looks_like_cell, header)):
        return NO_HEADER, NO_HEADER_HINT
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        return repeated, "give each column its own name"
    # Only the blank name is repeated. A title above the header has few names.
    return repeated, LATER_HEADER_HINT if 2 * len(named) <= len(header) else "delete the columns without a name"


def _repeated_columns(header: list[str], positions: list[str] | None) -> str | None:
    """Return a message with the repeated column names and their positions. None if there are none."""
    if len(set(header)) == len(header):
        return None
    found: dict[str, list[str]] = {}
    for position, name in enumerate(header):
        found.setdefault(name, []).append(positions[position] if positions else str(position + 1))
    repeated = [f"{quote_column(name)} at {', '.join(where)}" for name, where in found.items() if len(where) > 1]
    return f"has duplicate column names: {'; '.join(repeated)}"


def is_headerless(header: Sequence[str], job_columns: Iterable[str]) -> bool:
    """Check whether the first line looks like a lead: it has a name like a cell, and no column of the job."""
    return {*map(_fold, header)}.isdisjoint(map(_fold, job_columns)) and any(map(looks_like_cell, header))


def missing_column_hint(column: str, header: Sequence[str], job_columns: Iterable[str]) -> str | None:
    """Return a hint on a column that the header lacks. None: no hint."""
    if twin := next((name for name in header if name != column and clean(name) == clean(column)), None):
        shown = f"the input's name is {json.dumps(twin)}, the job's is {json.dumps(column)}"
        return f"they look alike, but {shown}: write the input's, in double quotes"
    if set(header) & set(job_columns):
        return suggest_name(column, [name for name in header if not looks_like_cell(name)])
    # Without a single column of the job the first line may be a lead, so only a name that differs little is shown.
    by_fold = {_fold(name): name for name in header}
    close = get_close_matches(_fold(column), by_fold, n=1, cutoff=0.8)
    return did_you_mean(by_fold[close[0]]) if close else None


def _fold(name: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))


def open_binary(source: TableFile) -> io.BufferedReader | gzip.GzipFile:
    """Open the file as bytes, unpacked if its name ends with `.gz`."""
    path = source.path
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def check_magic_bytes(source: TableFile) -> None:
    """Raise FileProblem if a binary file is empty, or if its beginning shows that it is of another format."""
    with as_file_problem(source), source.path.open("rb") as raw:
        beginning = raw.read(_MAGIC_LENGTH)
    if not beginning:
        raise FileProblem(f"{source} is empty", "write or download it again")
    if not beginning.startswith(_OWN_MAGIC_BYTES.get(source.format, b"-")) or _OPEN_DOCUMENT in beginning:
        _check_other_format(source, beginning)


_OWN_MAGIC_BYTES = {"xlsx": b"PK\x03\x04", "parquet": b"PAR1"}


def _check_other_format(source: TableFile, beginning: bytes) -> None:
    known = [description for magic, description in _MAGIC_BYTES.items() if beginning.startswith(magic)]
    if beginning.startswith(b"PK") and _OPEN_DOCUMENT in beginning:
        known = [("an OpenDocument file (`.ods`)", _OPEN_DOCUMENT_HINT)]
    if source.format == "csv":
        text = beginning.removeprefix(codecs.BOM_UTF8).lstrip()
        known += [(kind, hint) for pattern, kind, hint in _TEXT_BEGINNINGS if pattern.match(text)]
    for kind, hint in known:
        raise FileProblem(f"{source} is not {FORMAT_NAMES[source.format]} but {kind}", hint)


def byte_order_encoding(beginning: bytes) -> str | None:
    """Return the encoding that the byte order mark of a file names; None: it has none."""
    return next((marked for mark, marked in _BYTE_ORDER_MARKS.items() if beginning.startswith(mark)), None)


def _check_byte_order_mark(source: TableFile, beginning: bytes) -> None:
    encoding = codecs.lookup(source.encoding).name
    mark = byte_order_encoding(beginning)
    if mark and not encoding.startswith(mark):
        problem, suggestion = f"begins a mark of {mark}", mark
    elif beginning and not mark and encoding in {"utf-16", "utf-32"}:
        order = "be" if beginning.startswith(b"\0") else "le"
        problem, suggestion = "begins no mark of it", f"{encoding}-{order}" if b"\0" in beginning else "utf-8"
    else:
        return
    message = f"{source} is not `{source.encoding}` text: byte 1 (line 1) {problem}"
    raise FileProblem(message, f"set `encoding: {suggestion}` as a key of `input`")


def _decoding_problem(source: TableFile) -> FileProblem:
    """Read the file again as bytes to find the first byte that is invalid in its encoding."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(source.encoding)(), translate=True)
    offset, line, position = 0, 1, ""
    with open_binary(source) as raw:
        for chunk in chain(iter(lambda: raw.read(1 << 20), b""), [b""]):
            pending, state = decoder.getstate()
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeError as error:
                start = getattr(error, "start", 0) - len(pending)
                decoder.setstate((pending if start > 0 else b"", state))
                line += decoder.decode(chunk[: max(start, 0)], final=True).count("\n")
                position = f": byte {offset + start + 1} (line {line}) is invalid in it"
                break
            offset += len(chunk)
    suggestion = "cp1252" if codecs.lookup(source.encoding).name.startswith("utf-8") else "utf-8"
    hint = f"set the encoding it was saved in, such as `encoding: {suggestion}`, as a key of `input`"
    return FileProblem(f"{source} is not `{source.encoding}` text{position}", BINARY_HINT if b"\0" in chunk else hint)

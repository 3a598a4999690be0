"""Turns CSV text into rows and rows into CSV text: every cell exactly as it stands, or a problem that says where."""

import codecs
import csv
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Literal, Self, TextIO

import polars as pl

from enrich.tables.textfile import (
    BINARY,
    BYTE_ORDER_MARK,
    TableFile,
    TableProblem,
    check_encoding,
    named,
    opened,
    twice,
)

if TYPE_CHECKING:
    from _csv import Reader

Rows = Sequence[Sequence[object]]

CELL_LIMIT = 10_000_000  # characters; csv's own limit of 131,072 is below what scraped pages and notes reach

_SYNTAX = {  # csv tells its errors apart only by their words
    "unexpected end of data": ("has a quote that is never closed", "Close the quote, or double it if it is text"),
    "expected after": (
        "has characters after a closing quote",
        "Double each quote inside a quoted cell, or close the quote that was opened earlier in the row",
    ),
    "field limit": (
        f"has a cell of more than {CELL_LIMIT:,} characters",
        "Look for a quote that is never closed in this row, or shorten the cell",
    ),
}
_parsing = threading.Lock()


def read_header(source: TableFile) -> list[str]:
    """Return the column names as they are written."""
    with _opened(source) as text:
        return _header(source, _reader(source, text))


def read_batches(source: TableFile, rows_per_batch: int = 20_000) -> Iterator[pl.DataFrame]:
    """Yield the rows in order as frames of text; a blank cell is `""`, never null."""
    with _opened(source) as text:
        reader = _reader(source, text)
        header = _header(source, reader)
        while rows := _take(reader, rows_per_batch):
            if set(map(len, rows)) != {len(header)}:
                raise _first_flaw(source)
            # Unnamed while they are searched: polars would take a name such as `^a.*$` for a pattern.
            columns = [pl.Series(values=cells, dtype=pl.String) for cells in zip(*rows, strict=True)]
            if any(column.str.contains("\0", literal=True).any() for column in columns):
                raise _first_flaw(source)
            yield pl.DataFrame(dict(zip(header, columns, strict=True)))


def likely_separator(header: list[str], separator: str) -> str | None:
    """Guess the separator that was meant when the header came out as a single column."""
    if len(header) != 1:
        return None
    guess = max(set(",;\t|") - {separator}, key=lambda candidate: (header[0].count(candidate), candidate))
    return guess if guess in header[0] else None


class CsvWriter:
    """Writes frames as CSV text to a binary file, which stays open; a frame is written whole or not at all."""

    def __init__(self, raw: BinaryIO, separator: str = ",", encoding: str = "utf-8") -> None:
        _check(separator, encoding)
        self._raw = raw
        self._separator = separator
        self._encoding = encoding
        self._encoder = codecs.getincrementalencoder(encoding)()
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.write(self._encoder.encode("", final=True))

    def write_header(self, header: list[str]) -> None:
        """Write the column names."""
        # Unquoted, a byte order mark that belongs to the first name would be taken for that of the file.
        text = _text([header], self._separator, quote_all="".join(header).startswith(BYTE_ORDER_MARK))
        self._write(text, header, lambda: [header], first_row=0)

    def write(self, frame: pl.DataFrame) -> None:
        """Write the rows of a frame of text; a null becomes a blank cell."""
        if frame.width > 1 and self._separator.isascii():
            # The same text as csv writes, ten times as fast; polars would quote what is blank, but not what is null.
            filled = frame.select(pl.when(pl.all() != "").then(pl.all()))
            text = filled.write_csv(include_header=False, separator=self._separator)
        else:
            text = _text(frame.rows(), self._separator)
        self._write(text, frame.columns, frame.rows, first_row=self._rows + 1)
        self._rows += frame.height

    def _write(self, text: str, columns: list[str], rows: Callable[[], Rows], first_row: int) -> None:
        try:
            self._raw.write(self._encoder.encode(text))
        except UnicodeEncodeError:
            raise self._unwritable(columns, rows(), first_row) from None

    def _unwritable(self, columns: list[str], rows: Rows, first_row: int) -> TableProblem:
        hint = "Set `encoding: utf-8` for the file to write"
        for row, cells in enumerate(rows, first_row):
            for name, cell in zip(columns, cells, strict=True):
                if not _fits(str(cell), self._encoding):
                    place = f"{f'row {row}' if row else 'the header'}, column {named(name)}"
                    return TableProblem(f"{place}: `{self._encoding}` has no sign for a character of this cell", hint)
        return TableProblem(f"separator {self._separator!r} cannot be written in `{self._encoding}`", hint)


def _text(rows: Rows, separator: str, *, quote_all: bool = False) -> str:
    text = _LineFeedText()
    rule: Literal[0, 1] = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    csv.writer(text, delimiter=separator, quoting=rule).writerows(rows)
    return text.getvalue()


class _LineFeedText(io.StringIO):
    """Ends rows with a line feed, though csv ends them with both, for then it quotes the cells that hold either."""

    def write(self, row: str) -> int:
        return super().write(row.removesuffix("\r\n") + "\n")


@contextmanager
def _opened(source: TableFile) -> Iterator[TextIO]:
    """Open the file; what the parser says of it becomes a problem."""
    _check(source.separator, source.encoding)
    try:
        with opened(source) as text:
            yield text
    except csv.Error:
        raise _first_flaw(source) from None


def _check(separator: str, encoding: str) -> None:
    if len(separator) != 1 or separator in '"\r\n\0':
        message = f"separator {separator!r} is not a single character other than a quote or a line end"
        raise TableProblem(message, 'Use one such as "," or ";" or, for a tab, "\\t" in double quotes')
    check_encoding(encoding)


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _reader(source: TableFile, text: Iterable[str]) -> "Reader":
    return csv.reader(text, delimiter=source.separator, strict=True)


@contextmanager
def _long_cells() -> Iterator[None]:
    """Raise csv's limit for a moment only: it holds for the whole process, so others may rely on theirs."""
    with _parsing:
        usual = csv.field_size_limit(CELL_LIMIT)
        try:
            yield
        finally:
            csv.field_size_limit(usual)


def _take(reader: Iterator[list[str]], count: int) -> list[list[str]]:
    """Return the next rows, at most so many; csv gives an empty line as an empty list, which is no row."""
    with _long_cells():
        return list(islice(filter(None, reader), count))


def _header(source: TableFile, reader: Iterator[list[str]]) -> list[str]:
    rows = _take(reader, 1)
    if not rows:
        raise TableProblem(f"{source} is empty", "The first line must hold the column names")
    if _flaw(source, rows[0], rows[0]):
        raise _first_flaw(source)
    return rows[0]


def _first_flaw(source: TableFile) -> TableProblem:
    """Read the file again, slowly, to say in which row and line it first goes wrong."""
    header: list[str] = []
    row, line = 0, 1
    with _opened(source) as text, _long_cells():
        reader = _reader(source, text)
        try:
            for cells in reader:
                if cells:
                    header = header or cells
                    if flaw := _flaw(source, header, cells):
                        break
                    row += 1
                line = reader.line_num + 1
            else:
                return TableProblem(f"{source} changed while it was read", "Start again when the file is complete")
        except csv.Error as error:
            known = (flaw for words, flaw in _SYNTAX.items() if words in str(error))
            flaw = next(known, ("is not well-formed CSV", "Look at its quotes"))
    what, hint = flaw
    if reader.line_num > line:
        hint += f"; the row runs on to line {reader.line_num}"
    place = f"row {row}" if row else "the header"
    return TableProblem(f"{source}: {place} (line {line}) {what}", hint)


def _flaw(source: TableFile, header: list[str], cells: list[str]) -> tuple[str, str] | None:
    """Tell what is wrong with a row, the header being one too, and the remedy."""
    if len(cells) != len(header):
        what = f"has {_counted(len(cells), 'cell')}, but the header has {_counted(len(header), 'column')}"
        separator = likely_separator(header, source.separator)
        if separator:
            return what, f"Perhaps the separator is {separator!r}"
        return what, f"Look for a cell with {source.separator!r} or a quote in it that should be in quotes"
    if any("\0" in cell for cell in cells):
        return "has a NUL character", BINARY
    repeated = twice(header) if cells is header else None
    return (repeated, "Give each column a name of its own") if repeated else None


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"

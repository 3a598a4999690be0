"""Reads and writes CSV. Cells are preserved exactly. Errors name the row, the line and the column."""

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

from enrich.files.text import (
    BINARY_HINT,
    BYTE_ORDER_MARK,
    FileProblem,
    TableFile,
    check_encoding,
    open_text,
    quote_column,
    repeated_columns,
)

if TYPE_CHECKING:
    from _csv import Reader

CellRows = Sequence[Sequence[object]]

MAX_CELL_CHARACTERS = 10_000_000  # csv's default of 131,072 is too low for scraped pages and long notes

_SYNTAX_PROBLEMS = {  # csv's errors differ only in their message texts
    "unexpected end of data": ("has a quote that is never closed", "Close the quote, or double it if it is text"),
    "expected after": (
        "has characters after a closing quote",
        "Double each quote inside a quoted cell, or close the quote that was opened earlier in the row",
    ),
    "field limit": (
        f"has a cell of more than {MAX_CELL_CHARACTERS:,} characters",
        "Look for a quote that is never closed in this row, or shorten the cell",
    ),
}
_cell_limit_lock = threading.Lock()


def read_header(source: TableFile) -> list[str]:
    """Return the column names exactly as written."""
    with _open_csv(source) as text:
        return _next_header(source, _csv_reader(source, text))


def read_batches(source: TableFile, rows_per_batch: int = 20_000) -> Iterator[pl.DataFrame]:
    """Yield the rows in order as frames of text. A blank cell is `""`, never null."""
    with _open_csv(source) as text:
        reader = _csv_reader(source, text)
        header = _next_header(source, reader)
        while rows := _next_rows(reader, rows_per_batch):
            if set(map(len, rows)) != {len(header)}:
                raise _first_problem(source)
            # Search unnamed columns, because polars reads a name such as `^a.*$` as a pattern.
            columns = [pl.Series(values=cells, dtype=pl.String) for cells in zip(*rows, strict=True)]
            if any(column.str.contains("\0", literal=True).any() for column in columns):
                raise _first_problem(source)
            yield pl.DataFrame(dict(zip(header, columns, strict=True)))


def likely_separator(header: list[str], separator: str) -> str | None:
    """Guess the right separator if the header has only one column. None: no guess."""
    if len(header) != 1:
        return None
    guess = max(set(",;\t|") - {separator}, key=lambda candidate: (header[0].count(candidate), candidate))
    return guess if guess in header[0] else None


class CsvWriter:
    """Writes frames as CSV to a binary file, which stays open. A frame is written completely or not at all."""

    def __init__(self, raw: BinaryIO, separator: str = ",", encoding: str = "utf-8") -> None:
        _check_settings(separator, encoding)
        self._raw = raw
        self._separator = separator
        self._encoding = encoding
        self._encoder = codecs.getincrementalencoder(encoding)()
        self._row_count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.write(self._encoder.encode("", final=True))

    def write_header(self, header: list[str]) -> None:
        """Write the column names."""
        # Quote the header if the first name starts with a byte order mark. Unquoted, it would be read as the file's.
        text = _rows_as_text([header], self._separator, quote_all="".join(header).startswith(BYTE_ORDER_MARK))
        self._write_text(text, header, lambda: [header], first_row=0)

    def write(self, frame: pl.DataFrame) -> None:
        """Write the rows of a frame of text. A null becomes a blank cell."""
        if frame.width > 1 and self._separator.isascii():
            # Same text as from csv, ten times as fast. Blank cells become null first: polars quotes blanks, not nulls.
            filled = frame.select(pl.when(pl.all() != "").then(pl.all()))
            text = filled.write_csv(include_header=False, separator=self._separator)
        else:
            text = _rows_as_text(frame.rows(), self._separator)
        self._write_text(text, frame.columns, frame.rows, first_row=self._row_count + 1)
        self._row_count += frame.height

    def _write_text(self, text: str, columns: list[str], rows: Callable[[], CellRows], first_row: int) -> None:
        try:
            self._raw.write(self._encoder.encode(text))
        except UnicodeEncodeError:
            raise self._encoding_problem(columns, rows(), first_row) from None

    def _encoding_problem(self, columns: list[str], rows: CellRows, first_row: int) -> FileProblem:
        hint = "Set `encoding: utf-8` for the file to write"
        for row, cells in enumerate(rows, first_row):
            for name, cell in zip(columns, cells, strict=True):
                if not _can_encode(str(cell), self._encoding):
                    position = f"{f'row {row}' if row else 'the header'}, column {quote_column(name)}"
                    return FileProblem(f"{position}: `{self._encoding}` has no sign for a character of this cell", hint)
        return FileProblem(f"separator {self._separator!r} cannot be written in `{self._encoding}`", hint)


def _rows_as_text(rows: CellRows, separator: str, *, quote_all: bool = False) -> str:
    text = _LineFeedText()
    quoting: Literal[0, 1] = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    csv.writer(text, delimiter=separator, quoting=quoting).writerows(rows)
    return text.getvalue()


class _LineFeedText(io.StringIO):
    r"""Replaces csv's row end `\r\n` with `\n`. With `\r\n`, csv quotes every cell that contains either character."""

    def write(self, row: str) -> int:
        return super().write(row.removesuffix("\r\n") + "\n")


@contextmanager
def _open_csv(source: TableFile) -> Iterator[TextIO]:
    """Open the file as text. Convert parser errors into FileProblem."""
    _check_settings(source.separator, source.encoding)
    try:
        with open_text(source) as text:
            yield text
    except csv.Error:
        raise _first_problem(source) from None


def _check_settings(separator: str, encoding: str) -> None:
    if len(separator) != 1 or separator in '"\r\n\0':
        message = f"separator {separator!r} is not a single character other than a quote or a line end"
        raise FileProblem(message, 'Use one such as "," or ";" or, for a tab, "\\t" in double quotes')
    check_encoding(encoding)


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _csv_reader(source: TableFile, text: Iterable[str]) -> "Reader":
    return csv.reader(text, delimiter=source.separator, strict=True)


@contextmanager
def _raised_cell_limit() -> Iterator[None]:
    """Raise csv's cell limit temporarily. It applies to the whole process, and other code may rely on its own limit."""
    with _cell_limit_lock:
        previous_limit = csv.field_size_limit(MAX_CELL_CHARACTERS)
        try:
            yield
        finally:
            csv.field_size_limit(previous_limit)


def _next_rows(reader: Iterator[list[str]], count: int) -> list[list[str]]:
    """Return the next rows, at most `count`. Empty lines, which csv returns as empty lists, do not count as rows."""
    with _raised_cell_limit():
        return list(islice(filter(None, reader), count))


def _next_header(source: TableFile, reader: Iterator[list[str]]) -> list[str]:
    rows = _next_rows(reader, 1)
    if not rows:
        raise FileProblem(f"{source} is empty", "The first line must hold the column names")
    if _row_problem(source, rows[0], rows[0]):
        raise _first_problem(source)
    return rows[0]


def _first_problem(source: TableFile) -> FileProblem:
    """Read the file again, row by row, to find the row and line of its first error."""
    header: list[str] = []
    row, line = 0, 1
    with _open_csv(source) as text, _raised_cell_limit():
        reader = _csv_reader(source, text)
        try:
            for cells in reader:
                if cells:
                    header = header or cells
                    if problem := _row_problem(source, header, cells):
                        break
                    row += 1
                line = reader.line_num + 1
            else:
                return FileProblem(f"{source} changed while it was read", "Start again when the file is complete")
        except csv.Error as error:
            known = (flaw for words, flaw in _SYNTAX_PROBLEMS.items() if words in str(error))
            problem = next(known, ("is not well-formed CSV", "Look at its quotes"))
    message, hint = problem
    if reader.line_num > line:
        hint += f"; the row runs on to line {reader.line_num}"
    position = f"row {row}" if row else "the header"
    return FileProblem(f"{source}: {position} (line {line}) {message}", hint)


def _row_problem(source: TableFile, header: list[str], cells: list[str]) -> tuple[str, str] | None:
    """Return the problem of a row or of the header, with a hint. None: the row is valid."""
    if len(cells) != len(header):
        message = f"has {_count_text(len(cells), 'cell')}, but the header has {_count_text(len(header), 'column')}"
        separator = likely_separator(header, source.separator)
        if separator:
            return message, f"Perhaps the separator is {separator!r}"
        return message, f"Look for a cell with {source.separator!r} or a quote in it that should be in quotes"
    if any("\0" in cell for cell in cells):
        return "has a NUL character", BINARY_HINT
    repeated = repeated_columns(header) if cells is header else None
    return (repeated, "Give each column a name of its own") if repeated else None


def _count_text(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"

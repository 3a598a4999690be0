"""Reads and writes CSV. Cells are preserved exactly. Errors name the row, the line and the column."""

import codecs
import csv
import io
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, product
from typing import TYPE_CHECKING, BinaryIO, Literal, TextIO

import polars as pl

from enrich.files.text import (
    BINARY_HINT,
    BYTE_ORDER_MARK,
    LATER_HEADER_HINT,
    ROWS_PER_BATCH,
    FileProblem,
    TableFile,
    as_file_problem,
    byte_order_encoding,
    header_problem,
    open_binary,
    open_text,
)

if TYPE_CHECKING:
    from _csv import Reader

#: The usual separators.
SEPARATORS = ",;\t|"
MAX_CELL_CHARACTERS = 10_000_000  # csv's default of 131,072 is too low for scraped pages and long notes
MAX_LINE_CHARACTERS = 50_000_000
#: A batch ends early after this many characters, so that rows of any length are read in bounded memory.
_MAX_BATCH_CHARACTERS = 20_000_000
#: Characters that are read at once, and then the rest of the line.
_BLOCK_CHARACTERS = 1 << 18
#: The line that Excel reads as the separator, before the header.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)

_SYNTAX_PROBLEMS = {  # csv's errors differ only in their message texts
    "unexpected end of data": ("has a quote that is never closed", "close the quote, or double it if it is text"),
    "expected after": (
        "has characters after a closing quote",
        "double each quote inside a quoted cell, or close the quote that was opened earlier in the row",
    ),
    "field limit": (
        f"has a cell of more than {MAX_CELL_CHARACTERS:,} characters",
        "Look for a quote that is never closed in this row, or shorten the cell",
    ),
}
_cell_limit_lock = threading.Lock()


def read_header(source: TableFile) -> list[str]:
    """Return the column names exactly as written."""
    with _open_csv(source) as lines:
        return _next_header(source, lines.reader())


def read_batches(source: TableFile, rows_per_batch: int = ROWS_PER_BATCH) -> Iterator[pl.DataFrame]:
    """Yield the rows in order as frames of text. A blank cell is `""`, never null."""
    with _open_csv(source) as lines:
        reader = lines.reader()
        header = _next_header(source, reader)
        width = len(header)
        while cells := _next_cells(source, reader, rows_per_batch, lines, width):
            # One list of all cells, not one of each row: creating and collecting those takes as long as reading.
            columns = [pl.Series(values=cells[place::width], dtype=pl.String) for place in range(width)]
            yield pl.DataFrame(dict(zip(header, columns, strict=True)))


def likely_separator(header: list[str], separator: str) -> str | None:
    """Guess the right separator if the header has only one column. None: no guess."""
    if len(header) != 1:
        return None
    guess = max(set(SEPARATORS) - {separator}, key=lambda candidate: (header[0].count(candidate), candidate))
    return guess if guess in header[0] else None


def write(
    raw: BinaryIO, columns: list[str], frames: Iterable[pl.DataFrame], separator: str = ",", encoding: str = "utf-8"
) -> None:
    """Write the column names, and frames of text that the encoding has (see `limits`). A null becomes a blank cell."""
    encoder = codecs.getincrementalencoder(encoding)()
    # Quote the header if the first name starts with a byte order mark. Unquoted, it would be read as the file's.
    header = _rows_as_text([columns], separator, quote_all="".join(columns).startswith(BYTE_ORDER_MARK))
    raw.write(encoder.encode(header))
    for frame in frames:
        if frame.width > 1 and separator.isascii():
            # Same text as from csv, ten times as fast. Blank cells become null first: polars quotes blanks, not nulls.
            filled = frame.select(pl.when(pl.all() != "").then(pl.all()))
            text = filled.write_csv(include_header=False, separator=separator)
        else:
            text = _rows_as_text(frame.rows(), separator)
        raw.write(encoder.encode(text))
    raw.write(encoder.encode("", final=True))


def _rows_as_text(rows: Sequence[Sequence[object]], separator: str, *, quote_all: bool = False) -> str:
    text = _LineFeedText()
    quoting: Literal[0, 1] = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    csv.writer(text, delimiter=separator, quoting=quoting).writerows(rows)
    return text.getvalue()


class _LineFeedText(io.StringIO):
    r"""Replaces csv's row end `\r\n` with `\n`. With `\r\n`, csv quotes every cell that contains either character."""

    def write(self, row: str) -> int:
        return super().write(row.removesuffix("\r\n") + "\n")


class _Lines:
    """The lines of a text file, of bounded length. A first line `sep=;` sets the separator."""

    def __init__(self, source: TableFile, text: TextIO) -> None:
        self._source = source
        self._text = text
        self._first = text.readline(MAX_LINE_CHARACTERS + 1)
        self._check_length(self._first)
        named = _SEPARATOR_LINE.fullmatch(self._first)
        self.separator = named[1] if named else source.separator
        #: The number of the line in the file that is the reader's first.
        self.first_line_number = 2 if named else 1
        #: Characters read so far, up to a block more than the reader used.
        self.characters = 0
        #: Whether they have a NUL.
        self.has_nul = False

    def reader(self) -> "Reader":
        """Return a CSV reader of the lines."""
        return csv.reader(chain.from_iterable(self._blocks()), delimiter=self.separator, strict=True)

    def _blocks(self) -> Iterator[Iterable[str]]:
        """Yield the lines in blocks: a block is divided without Python code for each line."""
        if self.first_line_number == 1:
            self._count(self._first)
            yield [self._first]
        # Whole lines: some characters, and the rest of the last line.
        while block := self._text.read(_BLOCK_CHARACTERS) + self._text.readline(MAX_LINE_CHARACTERS + 1):
            self._count(block)
            if len(block) > MAX_LINE_CHARACTERS:
                for line in _divide(block):
                    self._check_length(line)
            yield _divide(block)

    def _count(self, text: str) -> None:
        self.characters += len(text)
        self.has_nul = self.has_nul or "\0" in text

    def _check_length(self, line: str) -> None:
        if len(line) > MAX_LINE_CHARACTERS:
            message = f"{self._source} has a line of more than {MAX_LINE_CHARACTERS:,} characters"
            raise FileProblem(message, "look for an unclosed quote, or for missing line ends")


def _divide(block: str) -> Iterable[str]:
    r"""Return the lines of a text, which end with `\n`, `\r` or both, as those of a file."""
    return io.StringIO(block, newline="")


@contextmanager
def _open_csv(source: TableFile) -> Iterator[_Lines]:
    """Open the file as lines. Convert parser errors into FileProblem."""
    try:
        with open_text(source) as text:
            yield _Lines(source, text)
    except csv.Error:
        raise _first_problem(source) from None


@contextmanager
def _raised_cell_limit() -> Iterator[None]:
    """Raise csv's cell limit temporarily. It applies to the whole process, and other code may rely on its own limit."""
    with _cell_limit_lock:
        previous_limit = csv.field_size_limit(MAX_CELL_CHARACTERS)
        try:
            yield
        finally:
            csv.field_size_limit(previous_limit)


def _next_cells(source: TableFile, reader: Iterator[list[str]], count: int, lines: _Lines, width: int) -> list[str]:
    """Return the cells of the next rows, at most `count`, one row after the other. Raises FileProblem.

    csv returns an empty line as an empty list. It is a blank cell of a table with one column, in other tables no row.
    """
    cells: list[str] = []
    is_ragged = False
    end, last_character = count * width, lines.characters + _MAX_BATCH_CHARACTERS
    with _raised_cell_limit():
        for row in reader:
            if len(row) == width:
                cells += row
            elif row:
                is_ragged = True
                break
            elif width == 1:
                cells.append("")
            # A batch without cells would be the end of the file.
            if len(cells) == end or (cells and lines.characters > last_character):
                break
    if is_ragged or lines.has_nul:
        raise _first_problem(source)
    return cells


def _next_header(source: TableFile, reader: Iterator[list[str]]) -> list[str]:
    with _raised_cell_limit():
        header = next(filter(None, reader), None)
    if header is None:
        raise FileProblem(f"{source} is empty", "the first line must have the column names")
    if _row_problem(source, header, header):
        raise _first_problem(source)
    return header


def _first_problem(source: TableFile) -> FileProblem:
    """Read the file again, row by row, to find the row and line of its first error."""
    header: list[str] = []
    row = 0
    with _open_csv(source) as lines, _raised_cell_limit():
        reader = lines.reader()
        line = first_line = lines.first_line_number
        try:
            for found in reader:
                cells = found or ([""] if len(header) == 1 else [])
                if cells:
                    header = header or cells
                    if problem := _row_problem(source, header, cells, is_first_row=row == 1):
                        break
                    row += 1
                line = reader.line_num + first_line
            else:
                return FileProblem(f"{source} changed while it was read", "run again when the file is complete")
        except csv.Error as error:
            known = (flaw for words, flaw in _SYNTAX_PROBLEMS.items() if words in str(error))
            problem = next(known, ("is not well-formed CSV", "Check its quotes"))
    message, hint = problem
    if (last_line := reader.line_num + first_line - 1) > line:
        hint += f"; the row runs on to line {last_line}"
    position = f"row {row}" if row else "the header"
    return FileProblem(f"{source}: {position} (line {line}) {message}", hint)


def _row_problem(
    source: TableFile, header: list[str], cells: list[str], *, is_first_row: bool = False
) -> tuple[str, str] | None:
    """Return the problem of a row or of the header, with a hint. None: the row is valid."""
    if len(cells) != len(header):
        message = f"has {_count_text(len(cells), 'cell')}, but the header has {_count_text(len(header), 'column')}"
        separator = likely_separator(header, source.separator)
        if separator:
            return message, f"the separator may be {separator!r}"
        hint = f"look for a cell with {source.separator!r} or a quote in it that should be in quotes"
        is_title = len(header) < len(cells) and (is_first_row or len(header) == 1)
        return message, f"{LATER_HEADER_HINT}. Or: {hint}" if is_title else hint
    if any("\0" in cell for cell in cells):
        return "has a NUL character", BINARY_HINT
    return header_problem(header) if cells is header else None


def _count_text(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


#: How many rows of a file that was saved again are read at a time, and how its quotes may be read.
_RESAVED_ROWS_PER_BATCH = 10_000
_QUOTINGS: tuple[Literal[0, 3], ...] = (csv.QUOTE_MINIMAL, csv.QUOTE_NONE)


def read_resaved_cells(source: TableFile, choose: Callable[[list[str]], list[str]]) -> Iterator[list[str]]:
    """Yield the cells of some columns in batches; nothing if there are none. `choose` selects them by their names.

    Another program, such as a spreadsheet, may have saved the file again. Separator and encoding may differ from
    those of `source`: characters other than ASCII may be wrong. There may be lines above the header, rows that are too
    short or too long, and a quote that is never closed. Raises FileProblem.
    """
    with as_file_problem(source):
        with open_binary(source) as raw:
            marked = byte_order_encoding(raw.read(4))
        for encoding in (marked,) if marked else dict.fromkeys((source.encoding, "utf-8")):
            separators = dict.fromkeys((source.separator, *SEPARATORS))
            # A quote that is never closed would make one cell of the rest. Such a file is read again without quotes.
            for separator, quoting in product(separators, _QUOTINGS):
                with open_binary(source) as raw, io.TextIOWrapper(raw, encoding, "replace", newline="") as text:
                    batches = _read_cells(csv.reader(text, delimiter=separator, quoting=quoting, strict=True), choose)
                    if (first := next(batches, None)) is not None:
                        yield first
                        yield from batches
                        return
    read_header(source)  # raises FileProblem if this is no CSV file


def _read_cells(reader: Iterator[list[str]], choose: Callable[[list[str]], list[str]]) -> Iterator[list[str]]:
    """Yield the cells below the header, one of the first rows, and an empty list at the end if there was no error."""
    columns: list[int] = []
    is_well_formed = True
    while rows := _next_rows(reader):
        cells: list[str] = []
        for row in rows:
            if row is None:
                is_well_formed = False
            elif columns:
                cells += [row[column] for column in columns if column < len(row) and row[column]]
            else:
                names = [text.strip(f"{BYTE_ORDER_MARK} ") for text in row]
                columns = [names.index(name) for name in choose(names)]
        if not columns:
            return
        if cells:
            yield cells
    if columns and is_well_formed:
        yield []


def _next_rows(reader: Iterator[list[str]]) -> list[list[str] | None]:
    """Return the next rows. None: a row that cannot be read."""
    rows: list[list[str] | None] = []
    with _raised_cell_limit():
        while len(rows) < _RESAVED_ROWS_PER_BATCH:
            try:
                rows.append(next(reader))
            except csv.Error:
                rows.append(None)
            except (StopIteration, UnicodeError):  # no byte order mark, which the encoding needs
                break
    return rows

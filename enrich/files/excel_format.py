"""Reads a sheet of an Excel workbook as text, and writes a workbook with text cells only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from tempfile import TemporaryDirectory
from typing import BinaryIO

import polars as pl
from python_calamine import CalamineError, CalamineWorkbook, WorksheetNotFound
from xlsxwriter import Workbook
from xlsxwriter.utility import xl_col_to_name
from xlsxwriter.worksheet import Worksheet

from enrich.files.text import FileProblem, TableFile, as_file_problem, quote_column, repeated_columns
from enrich.files.values import to_text

#: Limits of an Excel sheet. Rows include the header.
MAX_ROWS, MAX_COLUMNS, MAX_CELL_CHARACTERS = 1_048_576, 16_384, 32_767
_OTHER_FORMAT_HINT = "`enrich collect` with an --output that ends in .csv or .parquet writes it without paying"
_COLUMN_WIDTH = 18


def read_header(source: TableFile) -> list[str]:
    """Return the column names: the first row that is not blank."""
    return next(_sheet_rows(source))


def read_batches(source: TableFile, rows_per_batch: int = 20_000) -> Iterator[pl.DataFrame]:
    """Yield the rows in order as frames of text. The sheet is held in memory. Excel's row limit bounds its size."""
    rows = _sheet_rows(source)
    header = next(rows)
    while batch := list(islice(rows, rows_per_batch)):
        yield pl.DataFrame(dict(zip(header, zip(*batch, strict=True), strict=True)), dict.fromkeys(header, pl.String))


def write(raw: BinaryIO, columns: list[str], frames: Iterable[pl.DataFrame]) -> None:
    """Write frames of text. Raises FileProblem if they exceed the limits of a sheet."""
    if len(columns) > MAX_COLUMNS:
        raise FileProblem(f"a sheet holds no more than {MAX_COLUMNS:,} columns", _OTHER_FORMAT_HINT)
    with TemporaryDirectory(prefix="enrich-") as folder:
        book = Workbook(raw, {"constant_memory": True, "tmpdir": folder})
        book.set_properties({"created": datetime(2000, 1, 1, tzinfo=UTC)})  # makes equal outputs byte-identical
        sheet = book.add_worksheet("leads")
        try:
            _write_sheet(sheet, book, columns, frames)
        except BaseException:
            if sheet.row_data_fh is not None:
                sheet.row_data_fh.close()
            raise
        book.close()


def _write_sheet(sheet: Worksheet, book: Workbook, columns: list[str], frames: Iterable[pl.DataFrame]) -> None:
    bold = book.add_format({"bold": True})
    sheet.freeze_panes(1, 0)
    sheet.set_column(0, len(columns) - 1, _COLUMN_WIDTH)
    for column, name in enumerate(columns):
        sheet.write_string(0, column, _checked_cell(name, 0, name), bold)
    row = 0
    for frame in frames:
        for cells in frame.iter_rows():
            row += 1
            if row == MAX_ROWS:
                raise FileProblem(
                    f"a sheet holds no more than {MAX_ROWS - 1:,} rows under its header", _OTHER_FORMAT_HINT
                )
            for column, cell in enumerate(cells):
                if cell:
                    sheet.write_string(row, column, _checked_cell(cell, row, columns[column]))
    sheet.autofilter(0, 0, row, len(columns) - 1)
    # Turn off the green corners that warn about numbers stored as text.
    sheet.ignore_errors({"number_stored_as_text": f"A1:{xl_col_to_name(len(columns) - 1)}{row + 1}"})


def _checked_cell(cell: str, row: int, column: str) -> str:
    # Excel counts UTF-16 code units.
    if len(cell) * 2 > MAX_CELL_CHARACTERS and len(cell.encode("utf-16-le")) // 2 > MAX_CELL_CHARACTERS:
        position = f"{f'row {row}' if row else 'the header'}, column {quote_column(column)}"
        raise FileProblem(
            f"{position}: a cell of a sheet holds no more than {MAX_CELL_CHARACTERS:,} characters", _OTHER_FORMAT_HINT
        )
    return cell


def _sheet_rows(source: TableFile) -> Iterator[list[str]]:
    """Yield the header and the rows below it, all as wide as the sheet. Blank rows at the end are left out."""
    with as_file_problem(source):
        try:
            book = CalamineWorkbook.from_path(source.path)
            sheet = book.get_sheet_by_index(0) if source.sheet is None else book.get_sheet_by_name(source.sheet)
        except WorksheetNotFound:
            hint = f"Its sheets: {', '.join(book.sheet_names)}"
            raise FileProblem(f"{source} has no sheet `{source.sheet}`", hint) from None
        except CalamineError as error:
            hint = "Open it in a spreadsheet and save it as `.xlsx`, without a password"
            raise FileProblem(f"{source} is not a sound Excel workbook: {error}", hint) from None
    header: list[str] = []
    blank: list[list[str]] = []
    for row, values in enumerate(sheet.iter_rows(), 1):
        cells = list(map(to_text, values))
        if not any(cells):
            blank.append(cells)
            continue
        if not header:
            first = (sheet.start or (0, 0))[1]
            if repeated := repeated_columns(cells, [xl_col_to_name(first + place) for place in range(len(cells))]):
                position = f"{source}: the header (row {row} of sheet `{sheet.name}`)"
                raise FileProblem(f"{position} {repeated}", "Give each column a name of its own")
            header, blank = cells, []
        yield from blank
        blank = []
        yield cells
    if not header:
        raise FileProblem(f"{source}: sheet `{sheet.name}` is empty", "The first row must hold the column names")

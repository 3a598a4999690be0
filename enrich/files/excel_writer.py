"""Writes an Excel workbook with text cells only."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import BinaryIO

import polars as pl
from xlsxwriter import Workbook
from xlsxwriter.utility import xl_col_to_name, xl_rowcol_to_cell_fast
from xlsxwriter.worksheet import Worksheet

from enrich.files import excel_format
from enrich.files.temporary_folders import temporary_folder
from enrich.files.text import FileProblem, quote_column
from enrich.files.workbook_check import CellDigest, check_workbook, escape_text

_OTHER_FORMAT_HINT = "`enrich collect` with an --output that ends in .csv or .parquet writes it for free"
_COLUMN_WIDTH = 18


class _TextSheet(Worksheet):
    """A sheet in which every string is plain text.

    The library writes a string such as `<r>…</r>` as raw XML, and escapes only the first of two overlapping `_x0041_`.
    """

    def _xml_rich_inline_string(self, string: str, attributes: list[tuple[str, object]] = []) -> None:  # noqa: B006
        self._xml_inline_string(string, True, attributes)  # noqa: FBT003

    @staticmethod
    def _escape_control_characters(data: str) -> str:
        return escape_text(data)


def write(raw: BinaryIO, columns: list[str], frames: Iterable[pl.DataFrame]) -> None:
    """Write frames of text and read them back.

    Raises FileProblem if they exceed the limits of a sheet, or if the sheet does not read back as written.
    """
    if len(columns) > excel_format.MAX_COLUMNS:
        raise FileProblem(f"a sheet has at most {excel_format.MAX_COLUMNS:,} columns", _OTHER_FORMAT_HINT)
    with temporary_folder() as folder:
        book = Workbook(raw, {"constant_memory": True, "tmpdir": str(folder)})
        book.set_properties({"created": datetime(2000, 1, 1, tzinfo=UTC)})  # makes equal outputs byte-identical
        sheet = book.add_worksheet("leads", _TextSheet)
        written = CellDigest()
        try:
            _write_sheet(sheet, book, columns, frames, written)
        except BaseException:
            if sheet.row_data_fh is not None:
                sheet.row_data_fh.close()
            raise
        book.close()
    check_workbook(raw, written)


def _write_sheet(
    sheet: Worksheet, book: Workbook, columns: list[str], frames: Iterable[pl.DataFrame], written: CellDigest
) -> None:
    bold = book.add_format({"bold": True})
    sheet.freeze_panes(1, 0)
    sheet.set_column(0, len(columns) - 1, _COLUMN_WIDTH)
    for column, name in enumerate(columns):
        if name:
            sheet.write_string(0, column, _checked_cell(name, 0, name), bold)
            written.add(xl_rowcol_to_cell_fast(0, column), name)
    row = 0
    for frame in frames:
        for cells in frame.iter_rows():
            row += 1
            if row == excel_format.MAX_ROWS:
                raise FileProblem(f"a sheet has at most {row - 1:,} rows under its header", _OTHER_FORMAT_HINT)
            for column, cell in enumerate(cells):
                if cell:
                    sheet.write_string(row, column, _checked_cell(cell, row, columns[column]))
                    written.add(xl_rowcol_to_cell_fast(row, column), cell)
    sheet.autofilter(0, 0, row, len(columns) - 1)
    # Turn off the green corners that warn about numbers stored as text.
    sheet.ignore_errors({"number_stored_as_text": f"A1:{xl_col_to_name(len(columns) - 1)}{row + 1}"})


def _checked_cell(cell: str, row: int, column: str) -> str:
    limit = excel_format.MAX_CELL_CHARACTERS
    if len(cell) * 2 > limit and excel_format.cell_length(cell) > limit:
        position = f"{f'row {row}' if row else 'the header'}, column {quote_column(column)}"
        raise FileProblem(f"{position}: a cell of a sheet has at most {limit:,} characters", _OTHER_FORMAT_HINT)
    return cell

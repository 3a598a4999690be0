"""Writes an Excel workbook with text cells only, and reads it back with a parser of its own."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from datetime import UTC, datetime
from hashlib import blake2b
from typing import BinaryIO
from xml.etree.ElementTree import ParseError

import polars as pl
from xlsxwriter import Workbook
from xlsxwriter.utility import xl_col_to_name, xl_rowcol_to_cell_fast
from xlsxwriter.worksheet import Worksheet

from enrich.files import excel_format
from enrich.files.atomic import WriteProblem
from enrich.files.input_files import temporary_folder
from enrich.files.text import quote_column

_OTHER_FORMAT_HINT = "`enrich collect JOB --output FILE.csv` writes it as CSV, for free"
_COLUMN_WIDTH = 18
_ESCAPE = re.compile("_x([0-9A-Fa-f]{4})_")
_LIKE_ESCAPE = re.compile("_(?=x[0-9A-Fa-f]{4}_)")
_NOT_IN_XML = re.compile("[\x00-\x08\x0b-\x1f\ufffe\uffff]")


class _TextSheet(Worksheet):
    """A sheet in which every string is plain text.

    The library writes a string such as `<r>…</r>` as raw XML, and escapes only the first of two overlapping `_x0041_`.
    """

    def _xml_rich_inline_string(self, string: str, attributes: list[tuple[str, object]] = []) -> None:  # noqa: B006
        self._xml_inline_string(string, True, attributes)  # noqa: FBT003

    @staticmethod
    def _escape_control_characters(data: str) -> str:
        """Escape characters that XML cannot hold, and text that looks like such an escape."""
        data = _LIKE_ESCAPE.sub("_x005F_", data)
        return _NOT_IN_XML.sub(lambda found: f"_x{ord(found[0]):04X}_", data)


def write(raw: BinaryIO, columns: list[str], frames: Iterable[pl.DataFrame]) -> None:
    """Write frames of text and read them back. Raises WriteProblem, also if the sheet does not read back as written."""
    if len(columns) > excel_format.MAX_COLUMNS:
        raise WriteProblem(f"a sheet has at most {excel_format.MAX_COLUMNS:,} columns", _OTHER_FORMAT_HINT)
    with temporary_folder() as folder:
        book = Workbook(raw, {"constant_memory": True, "tmpdir": str(folder)})
        book.set_properties({"created": datetime(2000, 1, 1, tzinfo=UTC)})  # makes equal outputs byte-identical
        sheet = book.add_worksheet("leads", _TextSheet)
        written = blake2b()
        try:
            _write_sheet(sheet, book, columns, frames, written)
        except BaseException:
            if sheet.row_data_fh is not None:
                sheet.row_data_fh.close()
            raise
        book.close()
    check_workbook(raw, written)


def _write_sheet(
    sheet: Worksheet, book: Workbook, columns: list[str], frames: Iterable[pl.DataFrame], written: blake2b
) -> None:
    bold = book.add_format({"bold": True})
    sheet.freeze_panes(1, 0)
    sheet.set_column(0, len(columns) - 1, _COLUMN_WIDTH)
    for column, name in enumerate(columns):
        if name:
            sheet.write_string(0, column, _checked_cell(name, 0, name), bold)
            add_cell(written, xl_rowcol_to_cell_fast(0, column), name)
    row = 0
    for frame in frames:
        for cells in frame.iter_rows():
            row += 1
            if row == excel_format.MAX_ROWS:
                raise WriteProblem(f"a sheet has at most {row - 1:,} rows under its header", _OTHER_FORMAT_HINT)
            for column, cell in enumerate(cells):
                if cell:
                    sheet.write_string(row, column, _checked_cell(cell, row, columns[column]))
                    add_cell(written, xl_rowcol_to_cell_fast(row, column), cell)
    sheet.autofilter(0, 0, row, len(columns) - 1)
    # Turn off the green corners that warn about numbers stored as text.
    sheet.ignore_errors({"number_stored_as_text": f"A1:{xl_col_to_name(len(columns) - 1)}{row + 1}"})


def _checked_cell(cell: str, row: int, column: str) -> str:
    limit = excel_format.MAX_CELL_CHARACTERS
    if len(cell) * 2 > limit and excel_format.cell_length(cell) > limit:
        position = f"{f'row {row}' if row else 'the header'}, column {quote_column(column)}"
        raise WriteProblem(f"{position}: a cell of a sheet has at most {limit:,} characters", _OTHER_FORMAT_HINT)
    return cell


SHEET = "xl/worksheets/sheet1.xml"
#: Elements that a sheet of plain text does not have: formulas, values that are no text, rich text, links.
_FORBIDDEN = frozenset(("f", "v", "r", "hyperlink"))


def add_cell(digest: blake2b, reference: str, text: str) -> None:
    """Add a cell that is not blank to a digest of all cells in their order. `reference` is as in `B2`."""
    digest.update(f"{reference}\0{len(text)}\0{text}".encode())


def check_workbook(raw: BinaryIO, written: blake2b) -> None:
    """Read a workbook with one sheet. Raises WriteProblem if it has other cells than those that were written."""
    found, is_text_only = blake2b(), True
    raw.seek(0)
    try:
        with zipfile.ZipFile(raw) as archive, archive.open(SHEET) as sheet:
            for name, element in excel_format.read_elements(sheet):
                if name == "c":
                    text = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), "".join(element.itertext()))
                    add_cell(found, element.attrib["r"], text)
                    is_text_only &= element.get("t") == "inlineStr"
                is_text_only &= name not in _FORBIDDEN
    except (zipfile.BadZipFile, KeyError, ValueError, ParseError):
        is_text_only = False
    if not is_text_only or found.digest() != written.digest():
        raise WriteProblem("the written workbook cannot be read back", _OTHER_FORMAT_HINT)

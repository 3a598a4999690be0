"""Reads a sheet of an Excel workbook as text."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import time
from itertools import islice

import polars as pl
from python_calamine import CalamineError, CalamineSheet, CalamineWorkbook, SheetTypeEnum, SheetVisibleEnum

from enrich.files.text import FileProblem, TableFile, as_file_problem, check_magic_bytes, header_problem
from enrich.files.values import to_text
from enrich.files.workbook_scan import UnsoundWorkbook, check_size, find_non_date, negative_numbers, scan_sheet

#: Limits of an Excel sheet. Rows include the header.
MAX_ROWS, MAX_COLUMNS, MAX_CELL_CHARACTERS = 1_048_576, 16_384, 32_767
#: Integers below this are exact as floats.
_MAX_EXACT_INTEGER = 2**53


def read_header(source: TableFile) -> list[str]:
    """Return the column names: the first row that is not blank."""
    return next(_sheet_rows(source))


def read_batches(source: TableFile, rows_per_batch: int = 20_000) -> Iterator[pl.DataFrame]:
    """Yield the rows in order as frames of text. The sheet is held in memory. Excel's row limit bounds its size."""
    rows = _sheet_rows(source)
    header = next(rows)
    while batch := list(islice(rows, rows_per_batch)):
        yield pl.DataFrame(dict(zip(header, zip(*batch, strict=True), strict=True)), dict.fromkeys(header, pl.String))


def cell_length(cell: str) -> int:
    """Return the length of a cell as Excel counts it, in UTF-16 code units."""
    return len(cell.encode("utf-16-le")) // 2


def _sheet_rows(source: TableFile) -> Iterator[list[str]]:
    """Yield the header and the rows below it, all as wide as the sheet. Blank rows at the end are left out."""
    from xlsxwriter.utility import xl_col_to_name  # noqa: PLC0415 - slow to import, and few inputs are workbooks

    sheet = _open_sheet(source)
    first_column = (sheet.start or (0, 0))[1]
    header: list[str] = []
    blank: list[list[str]] = []
    for row, cells in enumerate(_text_rows(source, sheet), 1):
        if not any(cells):
            blank.append(cells)
            continue
        if "\0" in "".join(cells):
            column = xl_col_to_name(first_column + next(place for place, cell in enumerate(cells) if "\0" in cell))
            raise FileProblem(f"{source}: cell {column}{row} has a NUL character", "clear the cell, or write it again")
        if not header:
            positions = [xl_col_to_name(first_column + place) for place in range(len(cells))]
            if problem := header_problem(cells, positions):
                message, hint = problem
                raise FileProblem(f"{source}: the header (row {row} of sheet `{sheet.name}`) {message}", hint)
            header, blank = cells, []
        yield from blank
        blank = []
        yield cells
    if not header:
        raise FileProblem(f"{source}: sheet `{sheet.name}` is empty", "the first row must have the column names")


def _open_sheet(source: TableFile) -> CalamineSheet:
    """Open the named sheet, or else the first that is a visible table. Raises FileProblem."""
    with as_file_problem(source):
        try:
            check_size(source.path)
            book = CalamineWorkbook.from_path(source.path)
            name = _choose_sheet(source, book)
            stat = source.path.stat()
            scan = scan_sheet(source.path, name, (stat.st_size, stat.st_mtime_ns))
            if scan.far_cell is not None:
                hint = "delete the rows and columns beyond the table, or save the sheet as CSV"
                raise FileProblem(f"{source}: sheet `{name}` has a cell far beyond its table: {scan.far_cell}", hint)
            if scan.formula_without_value is not None:
                message = f"{source}: sheet `{name}` has a formula without a value: {scan.formula_without_value}"
                raise FileProblem(
                    message, "open the workbook in a spreadsheet and save it, so that formulas have values"
                )
            return book.get_sheet_by_name(name)
        except (CalamineError, UnsoundWorkbook) as error:
            check_magic_bytes(source)
            if "cell error value" in str(error):
                message = f"{source} has a cell with an error that cannot be read, such as #GETTING_DATA"
                raise FileProblem(message, "clear the cell, or save the sheet as CSV") from None
            reason = f": {error}" if isinstance(error, UnsoundWorkbook) else ""
            hint = "open it in a spreadsheet and save it as `.xlsx`, without a password"
            raise FileProblem(f"{source} is a damaged Excel workbook{reason}", hint) from None


def _choose_sheet(source: TableFile, book: CalamineWorkbook) -> str:
    tables = [each for each in book.sheets_metadata if each.typ == SheetTypeEnum.WorkSheet]
    hint = f"its sheets: {', '.join(each.name for each in tables) or 'none with cells'}"
    if source.sheet is not None:
        if source.sheet not in [each.name for each in tables]:
            kind = "" if source.sheet not in book.sheet_names else " with cells"
            raise FileProblem(f"{source} has no sheet `{source.sheet}`{kind}", hint)
        return source.sheet
    visible = [each.name for each in tables if each.visible == SheetVisibleEnum.Visible]
    if not visible:
        raise FileProblem(f"{source} has no visible sheet with cells", f"{hint}; choose one: `sheet: …`")
    return visible[0]


def _text_rows(source: TableFile, sheet: CalamineSheet) -> Iterator[list[str]]:
    from xlsxwriter.utility import xl_rowcol_to_cell  # noqa: PLC0415 - see above

    rows, row, first_column = sheet.iter_rows(), 0, (sheet.start or (0, 0))[1]
    negative: dict[str, float] | None = None
    while True:
        row += 1
        try:
            values = next(rows, None)
        except BaseException as error:
            # Rust's panics are no Exception. Their type cannot be imported.
            if not isinstance(error, OverflowError | ValueError) and type(error).__name__ != "PanicException":
                raise
            cell = find_non_date(source.path, sheet.name, row)
            place = f"cell {cell}" if cell else f"row {row}"
            message = (
                f"{source}: {place} of sheet `{sheet.name}` is formatted as a date or time, but has another number"
            )
            raise FileProblem(message, "format the cell as a number or as text") from None
        if values is None:
            return
        if any(isinstance(value, time) for value in values):
            negative = negative_numbers(source.path, sheet.name) if negative is None else negative
            values = [
                negative.get(xl_rowcol_to_cell(row - 1, place), value) if isinstance(value, time) else value
                for place, value in enumerate(values, first_column)
            ]
        yield [to_text(_shown_number(value) if isinstance(value, float) else value) for value in values]


def _shown_number(value: float) -> float:
    """Round a number to the digits that Excel shows. Integers below 2**53 are exact and stay as they are."""
    return value if value.is_integer() and abs(value) < _MAX_EXACT_INTEGER else float(f"{value:.15g}")

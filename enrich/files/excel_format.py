"""Reads a sheet of an Excel workbook as text.

The library that reads workbooks holds a sheet as a full rectangle, and reads a formula without a value as a blank. So
the XML of the sheet is scanned first: the extent of its cells, and formulas without a value.
"""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import time
from functools import lru_cache
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import IO
from xml.etree.ElementTree import Element, ParseError, iterparse

import polars as pl
from msgspec import Struct
from python_calamine import CalamineError, CalamineSheet, CalamineWorkbook, SheetTypeEnum, SheetVisibleEnum

from enrich.files.text import ROWS_PER_BATCH, FileProblem, TableFile, as_file_problem, check_magic_bytes, header_problem
from enrich.files.values import to_text

#: Limits of an Excel sheet. Rows include the header.
MAX_ROWS, MAX_COLUMNS, MAX_CELL_CHARACTERS = 1_048_576, 16_384, 32_767
#: Integers below this are exact as floats.
_MAX_EXACT_INTEGER = 2**53


def read_header(source: TableFile) -> list[str]:
    """Return the column names: the first row that is not blank."""
    return next(_sheet_rows(source))


def read_batches(source: TableFile) -> Iterator[pl.DataFrame]:
    """Yield the rows in order as frames of text. The sheet is held in memory. Excel's row limit bounds its size."""
    rows = _sheet_rows(source)
    header = next(rows)
    while batch := list(islice(rows, ROWS_PER_BATCH)):
        yield pl.DataFrame(dict(zip(header, zip(*batch, strict=True), strict=True)), dict.fromkeys(header, pl.String))


def cell_length(cell: str) -> int:
    """Return the length of a cell as Excel counts it, in UTF-16 code units."""
    return len(cell.encode("utf-16-le")) // 2


def _sheet_rows(source: TableFile) -> Iterator[list[str]]:
    """Yield the header and the rows below it, all as wide as the sheet. Blank rows at the end are left out."""
    from xlsxwriter.utility import xl_col_to_name  # noqa: PLC0415 - slow to import, and few inputs are workbooks

    sheet, others = _open_sheet(source)
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
                hint += f". Or choose another sheet: {', '.join(others)}" if others else ""
                raise FileProblem(f"{source}: the header (row {row} of sheet `{sheet.name}`) {message}", hint)
            header, blank = cells, []
        yield from blank
        blank = []
        yield cells
    if not header:
        raise FileProblem(f"{source}: sheet `{sheet.name}` is empty", "the first row must have the column names")


def _open_sheet(source: TableFile) -> tuple[CalamineSheet, list[str]]:
    """Open the named sheet, or else the first that is a visible table, and list the others. Raises FileProblem."""
    with as_file_problem(source):
        try:
            check_size(source.path)
            book = CalamineWorkbook.from_path(source.path)
            names, stat = _possible_sheets(source, book), source.path.stat()
            scans = ((name, scan_sheet(source.path, name, (stat.st_size, stat.st_mtime_ns))) for name in names)
            name, scan = next(((name, scan) for name, scan in scans if scan.has_cells), (names[0], SheetScan()))
            if scan.far_cell is not None:
                hint = "delete the rows and columns beyond the table, or save the sheet as CSV"
                raise FileProblem(f"{source}: sheet `{name}` has a cell far beyond its table: {scan.far_cell}", hint)
            if scan.formula_without_value is not None:
                message = f"{source}: sheet `{name}` has a formula without a value: {scan.formula_without_value}"
                raise FileProblem(
                    message, "open the workbook in a spreadsheet and save it, so that formulas have values"
                )
            return book.get_sheet_by_name(name), [other for other in book.sheet_names if other != name]
        except (CalamineError, UnsoundWorkbook) as error:
            check_magic_bytes(source)
            if "cell error value" in str(error):
                message = f"{source} has a cell with an error that cannot be read, such as #GETTING_DATA"
                raise FileProblem(message, "clear the cell, or save the sheet as CSV") from None
            reason = f": {error}" if isinstance(error, UnsoundWorkbook) else ""
            hint = "open it in a spreadsheet and save it as `.xlsx`, without a password"
            raise FileProblem(f"{source} is a damaged Excel workbook{reason}", hint) from None


def _possible_sheets(source: TableFile, book: CalamineWorkbook) -> list[str]:
    """Return the named sheet, or else all visible tables, of which the first with cells is read. Raises FileProblem."""
    tables = [each for each in book.sheets_metadata if each.typ == SheetTypeEnum.WorkSheet]
    hint = f"its sheets: {', '.join(each.name for each in tables) or 'none with cells'}"
    if source.sheet is not None:
        if source.sheet not in [each.name for each in tables]:
            kind = "" if source.sheet not in book.sheet_names else " with cells"
            raise FileProblem(f"{source} has no sheet `{source.sheet}`{kind}", hint)
        return [source.sheet]
    visible = [each.name for each in tables if each.visible == SheetVisibleEnum.Visible]
    if not visible:
        raise FileProblem(f"{source} has no visible sheet with cells", f"{hint}; choose one: `sheet: …`")
    return visible


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


#: A sheet's rectangle may have this many positions, or this many for each of its cells.
_MAX_POSITIONS, _MAX_POSITIONS_PER_CELL = 5_000_000, 50
#: The library holds all shared strings of a workbook in memory.
_MAX_SHARED_STRINGS_BYTES = 1 << 30
#: The first number that is no date in Excel, 1 January 10000.
_FIRST_NON_DATE = 2_958_466


class UnsoundWorkbook(ValueError):
    """The file is no workbook. The message is the reason, and quotes no cell."""


class SheetScan(Struct, frozen=True):
    """What a scan found: whether there are cells, and cells such as `B2`. None: there is none."""

    has_cells: bool = False
    far_cell: str | None = None
    formula_without_value: str | None = None


def check_size(path: Path) -> None:
    """Raise UnsoundWorkbook if the workbook's texts would not fit into memory, or if it is no archive."""
    with _open_archive(path) as archive:
        shared = [info.file_size for info in archive.infolist() if info.filename.lower() == "xl/sharedstrings.xml"]
    if sum(shared) > _MAX_SHARED_STRINGS_BYTES:
        raise UnsoundWorkbook("its texts are larger than 1 GiB")


@lru_cache(maxsize=16)
def scan_sheet(path: Path, sheet: str, version: tuple[int, int]) -> SheetScan:  # noqa: ARG001 - version is for the cache
    """Scan a sheet. `version` changes with the file. Raises UnsoundWorkbook."""
    count, last_cell, rows = 0, "", (0, -1)
    columns: set[str] = set()
    formula_without_value: str | None = None
    for cell in _cells(path, sheet):
        reference, parts = cell.get("r", ""), [_local_name(part) for part in cell]
        if formula_without_value is None and "f" in parts and cell.get("t") != "str" and not _value(cell):
            # A formula whose value is empty text has the type `str`.
            formula_without_value = reference or "a cell"
        if "v" not in parts and "is" not in parts:
            continue
        count += 1
        if not (letters := reference.rstrip("0123456789")):
            continue
        columns.add(letters)
        row = int(reference[len(letters) :] or 0)
        first, last = rows if last_cell else (row, row)
        if row > last or not last_cell or (row == last and len(reference) >= len(last_cell)):
            last_cell = reference
        rows = min(first, row), max(last, row)
    numbers = [_column_number(letters) for letters in columns]
    width = max(numbers) - min(numbers) + 1 if numbers else 0
    is_sparse = (rows[1] - rows[0] + 1) * width > max(_MAX_POSITIONS, _MAX_POSITIONS_PER_CELL * count)
    has_cells = count > 0 or formula_without_value is not None
    return SheetScan(has_cells, last_cell if is_sparse else None, formula_without_value)


def find_non_date(path: Path, sheet: str, row: int) -> str | None:
    """Return the first cell of a row (from 1) with a number that is too large for a date. None: there is none."""
    for cell in _cells(path, sheet):
        if cell.get("r", "").lstrip(ascii_uppercase) == str(row) and cell.get("t", "n") in {"n", "d"}:
            value = _value(cell)
            try:
                is_date = not value or abs(float(value)) < _FIRST_NON_DATE
            except ValueError:
                is_date = False
            if not is_date:
                return cell.get("r")
    return None


def negative_numbers(path: Path, sheet: str) -> dict[str, float]:
    """Return the negative numbers of a sheet by their cells. The library reads them as times if so formatted."""
    numbers = ((cell.get("r", ""), _value(cell)) for cell in _cells(path, sheet) if cell.get("t", "n") == "n")
    return {reference: float(text) for reference, text in numbers if reference and text.startswith("-")}


def _value(cell: Element) -> str:
    return "".join(text for part in cell if _local_name(part) != "f" for text in part.itertext())


def _column_number(letters: str) -> int:
    number = 0
    for letter in letters.upper():
        number = number * 26 + ord(letter) - ord("A") + 1
    return number


def _cells(path: Path, sheet: str) -> Iterator[Element]:
    with _open_archive(path) as archive:
        for member in _members_of(archive, sheet):
            with archive.open(member) as source:
                yield from (element for name, element in read_elements(source) if name == "c")


def read_elements(source: IO[bytes]) -> Iterator[tuple[str, Element]]:
    """Yield each element of an XML file, with its name, where it ends. Those of a row are dropped when it has ended."""
    for _, element in iterparse(source):  # noqa: S314 - expat limits what entities may grow to
        name = _local_name(element)
        yield name, element
        if name == "row":
            element.clear()


def _local_name(element: Element) -> str:
    """Return the name of an element without its namespace."""
    return element.tag.rpartition("}")[2]


@contextmanager
def _open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, ParseError, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UnsoundWorkbook("it cannot be unpacked") from error


def _members_of(archive: zipfile.ZipFile, sheet: str) -> list[str]:
    """Return the member of the archive that has a sheet, or all sheets if the workbook has an unusual structure."""
    names = {name.lower().lstrip("/"): name for name in archive.namelist()}
    all_sheets = [name for lowered, name in names.items() if "worksheets/" in lowered and lowered.endswith(".xml")]
    workbook, relations = names.get("xl/workbook.xml"), names.get("xl/_rels/workbook.xml.rels")
    if workbook is None or relations is None:
        return all_sheets
    targets = {each.get("Id"): each.get("Target", "") for each in _attributes(archive, relations, "Relationship")}
    for each in _attributes(archive, workbook, "sheet"):
        if each.get("name") == sheet:
            target = next((targets.get(value, "") for key, value in each.items() if key.endswith("}id")), "")
            member = posixpath.normpath(posixpath.join("/xl", target)).lstrip("/").lower()
            return [names[member]] if member in names else all_sheets
    return all_sheets


def _attributes(archive: zipfile.ZipFile, member: str, name: str) -> list[dict[str, str]]:
    """Return the attributes of all elements of a name."""
    with archive.open(member) as source:
        return [element.attrib for found, element in read_elements(source) if found == name]

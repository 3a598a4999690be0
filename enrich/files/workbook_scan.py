"""Scans the XML of a sheet in bounded memory: the extent of its cells, and formulas without a value.

The library that reads workbooks holds a sheet as a full rectangle, and reads a formula without a value as a blank.
"""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import IO
from xml.etree.ElementTree import Element, ParseError, iterparse

from msgspec import Struct

#: A sheet's rectangle may have this many positions, or this many for each of its cells.
_MAX_POSITIONS, _MAX_POSITIONS_PER_CELL = 5_000_000, 50
#: The library holds all shared strings of a workbook in memory.
_MAX_SHARED_STRINGS_BYTES = 1 << 30
#: The first number that is no date in Excel, 1 January 10000.
_FIRST_NON_DATE = 2_958_466


class UnsoundWorkbook(ValueError):
    """The file is no workbook. The message is the reason, and quotes no cell."""


class SheetScan(Struct, frozen=True):
    """What a scan found, as cells such as `B2`. None: there is none."""

    far_cell: str | None
    formula_without_value: str | None


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
    return SheetScan(last_cell if is_sparse else None, formula_without_value)


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
            target = next((targets.get(value, "") for key, value in each.items() if key.endswith(" id")), "")
            member = posixpath.normpath(posixpath.join("/xl", target)).lstrip("/").lower()
            return [names[member]] if member in names else all_sheets
    return all_sheets


def _attributes(archive: zipfile.ZipFile, member: str, name: str) -> list[dict[str, str]]:
    """Return the attributes of all elements of a name."""
    with archive.open(member) as source:
        return [element.attrib for found, element in read_elements(source) if found == name]

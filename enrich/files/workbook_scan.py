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
from xml.parsers import expat

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
    scanner = _Scanner()
    _parse_sheet(path, sheet, scanner)
    positions = scanner.height * scanner.width
    is_sparse = positions > max(_MAX_POSITIONS, _MAX_POSITIONS_PER_CELL * scanner.cells)
    return SheetScan(scanner.last_cell if is_sparse else None, scanner.formula_without_value)


def find_non_date(path: Path, sheet: str, row: int) -> str | None:
    """Return the first cell of a row (from 1) with a number that is too large for a date. None: there is none."""
    finder = _NonDateFinder(row)
    _parse_sheet(path, sheet, finder)
    return finder.found


def negative_numbers(path: Path, sheet: str) -> dict[str, float]:
    """Return the negative numbers of a sheet by their cells. The library reads them as times if so formatted."""
    finder = _NegativeFinder()
    _parse_sheet(path, sheet, finder)
    return {cell: float(text) for cell, text in finder.found.items()}


class _SheetHandler:
    """Receives the elements of a sheet. Namespace prefixes are removed from their names."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self.start

    def start(self, name: str, attributes: dict[str, str]) -> None:
        raise NotImplementedError


class _Scanner(_SheetHandler):
    def __init__(self) -> None:
        super().__init__()
        self.cells = 0
        self.last_cell = ""
        self.formula_without_value: str | None = None
        self._rows: tuple[int, int] | None = None
        self._columns = dict[str, None]()
        self._reference = ""
        self._kind: str | None = None
        self._value = ""

    @property
    def height(self) -> int:
        return 0 if self._rows is None else self._rows[1] - self._rows[0] + 1

    @property
    def width(self) -> int:
        numbers = list(map(_column_number, self._columns))
        return max(numbers) - min(numbers) + 1 if numbers else 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(" ")[2]
        if name == "c":
            self._reference, self._kind = attributes.get("r", ""), attributes.get("t")
        elif name in {"v", "is"}:
            self._add_cell()
            if self.parser.EndElementHandler is not None:
                self.parser.CharacterDataHandler = self._add_value
        elif name == "f" and self.formula_without_value is None:
            self._value = ""
            self.parser.EndElementHandler = self._end

    def _add_cell(self) -> None:
        self.cells += 1
        letters = self._reference.rstrip("0123456789")
        if not letters:
            return
        self._columns[letters] = None
        row = int(self._reference[len(letters) :] or 0)
        first, last = self._rows or (row, row)
        if row > last or not self.last_cell or (row == last and len(self._reference) >= len(self.last_cell)):
            self.last_cell = self._reference
        self._rows = min(first, row), max(last, row)

    def _add_value(self, text: str) -> None:
        self._value += text

    def _end(self, name: str) -> None:
        name = name.rpartition(" ")[2]
        if name == "v":
            self.parser.CharacterDataHandler = None
        elif name == "c":
            self.parser.EndElementHandler = None
            # A formula whose value is empty text has the type `str`.
            if not self._value and self._kind != "str":
                self.formula_without_value = self._reference or "a cell"


class _NonDateFinder(_SheetHandler):
    def __init__(self, row: int) -> None:
        super().__init__()
        self.found: str | None = None
        self._row = str(row)
        self._reference = ""

    def start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(" ")[2]
        self.parser.CharacterDataHandler = None
        if name == "c":
            self._reference = attributes.get("r", "") if attributes.get("t", "n") in {"n", "d"} else ""
        elif name == "v" and self.found is None and self._reference.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ") == self._row:
            self.parser.CharacterDataHandler = self._check_value

    def _check_value(self, text: str) -> None:
        try:
            if not abs(float(text)) < _FIRST_NON_DATE:
                self.found = self._reference
        except ValueError:
            self.found = self._reference


class _NegativeFinder(_SheetHandler):
    def __init__(self) -> None:
        super().__init__()
        self.found = dict[str, str]()
        self._reference = ""

    def start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(" ")[2]
        self.parser.CharacterDataHandler = None
        if name == "c":
            self._reference = attributes.get("r", "") if attributes.get("t", "n") == "n" else ""
        elif name == "v" and self._reference:
            self.parser.CharacterDataHandler = self._add_value

    def _add_value(self, text: str) -> None:
        # The text may come in parts.
        if self._reference and (text.startswith("-") or self._reference in self.found):
            self.found[self._reference] = self.found.get(self._reference, "") + text
        else:
            self._reference = ""


def _column_number(letters: str) -> int:
    number = 0
    for letter in letters.upper():
        number = number * 26 + ord(letter) - ord("A") + 1
    return number


def _parse_sheet(path: Path, sheet: str, handler: _SheetHandler) -> None:
    with _open_archive(path) as archive:
        for member in _members_of(archive, sheet):
            with archive.open(member) as source:
                handler.parser.ParseFile(source)


@contextmanager
def _open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, expat.ExpatError, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UnsoundWorkbook("it cannot be unpacked") from error


def _members_of(archive: zipfile.ZipFile, sheet: str) -> list[str]:
    """Return the member of the archive that has a sheet, or all sheets if the workbook has an unusual structure."""
    names = {name.lower().lstrip("/"): name for name in archive.namelist()}
    all_sheets = [name for lowered, name in names.items() if "worksheets/" in lowered and lowered.endswith(".xml")]
    workbook, relations = names.get("xl/workbook.xml"), names.get("xl/_rels/workbook.xml.rels")
    if workbook is None or relations is None:
        return all_sheets
    targets = {each.get("Id"): each.get("Target", "") for each in _elements(archive, relations, "Relationship")}
    for each in _elements(archive, workbook, "sheet"):
        if each.get("name") == sheet:
            target = next((targets.get(value, "") for key, value in each.items() if key.endswith(" id")), "")
            member = posixpath.normpath(posixpath.join("/xl", target)).lstrip("/").lower()
            return [names[member]] if member in names else all_sheets
    return all_sheets


def _elements(archive: zipfile.ZipFile, member: str, element: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if name.rpartition(" ")[2] == element:
            found.append(attributes)

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    with archive.open(member) as source:
        parser.ParseFile(source)
    return found

"""Reads a written workbook back, cell by cell, with a parser that shares no code with the library that wrote it."""

from __future__ import annotations

import re
import zipfile
from hashlib import blake2b
from typing import BinaryIO
from xml.parsers import expat

from enrich.files.text import FileProblem

SHEET = "xl/worksheets/sheet1.xml"
_ESCAPE = re.compile("_x([0-9A-Fa-f]{4})_")
_LIKE_ESCAPE = re.compile("_(?=x[0-9A-Fa-f]{4}_)")
_NOT_IN_XML = re.compile("[\x00-\x08\x0b-\x1f\ufffe\uffff]")
#: Elements that a sheet of plain text does not have: formulas, values that are no text, rich text, links.
_FORBIDDEN = frozenset(("f", "v", "r", "hyperlink"))
_CHUNK_BYTES = 1 << 18


class CellDigest:
    """Hashes cells in the order in which they are written, so that two sheets can be compared in little memory."""

    def __init__(self) -> None:
        self._hash = blake2b()

    def add(self, reference: str, text: str) -> None:
        """Add a cell that is not blank. `reference` is as in `B2`."""
        self._hash.update(f"{reference}\0{len(text)}\0{text}".encode())

    def value(self) -> bytes:
        """Return the hash of the cells so far."""
        return self._hash.digest()


def check_workbook(raw: BinaryIO, expected: CellDigest) -> None:
    """Read a workbook with one sheet. Raises FileProblem if it has other cells than those that were written."""
    reader = _SheetReader()
    raw.seek(0)
    try:
        with zipfile.ZipFile(raw) as archive, archive.open(SHEET) as sheet:
            while chunk := sheet.read(_CHUNK_BYTES):
                reader.feed(chunk)
            reader.feed(b"", final=True)
    except (zipfile.BadZipFile, KeyError, ValueError, expat.ExpatError):
        raise _unsound() from None
    if not reader.is_text_only or reader.cells.value() != expected.value():
        raise _unsound()


def escape_text(text: str) -> str:
    """Escape characters that XML cannot hold, and text that looks like such an escape."""
    text = _LIKE_ESCAPE.sub("_x005F_", text)
    return _NOT_IN_XML.sub(lambda found: f"_x{ord(found[0]):04X}_", text)


def _unescape_text(text: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)


def _unsound() -> FileProblem:
    return FileProblem(
        "the written workbook cannot be read back",
        "`enrich collect` with an --output that ends in .csv or .parquet writes it without paying",
    )


class _SheetReader:
    """Parses the XML of a sheet."""

    def __init__(self) -> None:
        self.cells = CellDigest()
        self.is_text_only = True
        self._reference = ""
        self._texts: list[str] = []
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end

    def feed(self, chunk: bytes, *, final: bool = False) -> None:
        """Parse the next bytes. Raises ExpatError."""
        self._parser.Parse(chunk, final)

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "t":
            self._parser.CharacterDataHandler = self._texts.append
        elif name == "c":
            self._reference, self._texts = attributes["r"], []
            self.is_text_only &= attributes.get("t") == "inlineStr"
        elif name in _FORBIDDEN:
            self.is_text_only = False

    def _end(self, name: str) -> None:
        if name == "t":
            self._parser.CharacterDataHandler = None
        elif name == "c":
            self.cells.add(self._reference, _unescape_text("".join(self._texts)))

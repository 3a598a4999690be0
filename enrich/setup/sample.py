"""Looks at an unknown table: its encoding, its separator, its header and its first rows."""

from __future__ import annotations

import codecs
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from enrich.errors import Refused
from enrich.place import format_of
from enrich.setup.concepts import Column, describe
from enrich.spec import Input
from enrich.tables.cells import text_frame
from enrich.tables.csvfile import read_batches, read_header
from enrich.tables.source import Source
from enrich.tables.textfile import TableFile, TableProblem

SAMPLE = 1_000
SEPARATORS = ",;\t|"
_CHUNK = 1 << 20
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before utf-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """How a table is to be read, and its columns as the first rows show them."""

    format: TableFile
    columns: list[Column]
    rows: int

    @property
    def header(self) -> list[str]:
        """The column names."""
        return [column.name for column in self.columns]


def take_sample(path: Path) -> Sample:
    """Guess encoding and separator and read the first rows. Raises Refused that says why it cannot be read."""
    if (kind := format_of(path.name)) not in ("csv", None):
        source = Source(path, Input(path=str(path)))
        frame = next(source.batches(), None)
        return _sample(TableFile(path, format=kind), list(source.schema), frame)
    try:
        encoding = _encoding(path)
        tried = [_try(TableFile(path, separator, encoding)) for separator in SEPARATORS]
        # With the right separator the rows are as long as the header, and longer than with any other.
        good = [sample for sample in tried if isinstance(sample, Sample)]
        best = max(good, key=lambda sample: len(sample.columns), default=None)
        if best is None or (len(best.columns) == 1 and len(good) < len(SEPARATORS)):
            raise next(problem for problem in tried if isinstance(problem, TableProblem))
    except TableProblem as problem:
        raise Refused(problem.message, problem.hint) from problem
    return best


def _try(source: TableFile) -> Sample | TableProblem:
    try:
        header = read_header(source)
        frame = next(read_batches(source, SAMPLE), None)
    except TableProblem as problem:
        return problem
    return _sample(source, header, frame)


def _sample(source: TableFile, header: list[str], frame: pl.DataFrame | None) -> Sample:
    rows = None if frame is None else text_frame(frame.head(SAMPLE))
    columns = [describe(name, [] if rows is None else rows.get_column(name).to_list()) for name in header]
    return Sample(source, columns, 0 if rows is None else rows.height)


def _encoding(path: Path) -> str:
    """Take UTF-8 when the whole file is, what its mark says, else cp1252."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        if not path.is_file():
            return "utf-8"
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as raw:
            beginning = raw.read(4)
            if marked := next((name for mark, name in _MARKS if beginning.startswith(mark)), None):
                return marked
            decoder.decode(beginning)
            while chunk := raw.read(_CHUNK):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "cp1252"
    except (OSError, EOFError, zlib.error):
        return "utf-8"  # csvfile says what is wrong
    return "utf-8"

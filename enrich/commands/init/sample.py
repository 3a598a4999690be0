"""Looks at an unknown table: its encoding, its separator, its header and its first rows."""

from __future__ import annotations

import codecs
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from enrich.commands.init.column_matching import Column, describe_column
from enrich.errors import CommandRefused
from enrich.files.csv_format import read_batches, read_header
from enrich.files.reader import InputTable
from enrich.files.text import FileProblem, TableFile
from enrich.files.values import text_frame
from enrich.job.locations import format_of
from enrich.job.spec import Input

SAMPLE_ROWS = 1_000
SEPARATORS = ",;\t|"
_CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARKS = (
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
        source = InputTable(path, Input(path=str(path)))
        frame = next(source.batches(), None)
        return _make_sample(TableFile(path, format=kind), list(source.schema), frame)
    try:
        encoding = _detect_encoding(path)
        attempts = [_try_format(TableFile(path, separator, encoding)) for separator in SEPARATORS]
        # With the right separator the rows are as long as the header, and longer than with any other.
        readable = [sample for sample in attempts if isinstance(sample, Sample)]
        best = max(readable, key=lambda sample: len(sample.columns), default=None)
        if best is None or (len(best.columns) == 1 and len(readable) < len(SEPARATORS)):
            raise next(problem for problem in attempts if isinstance(problem, FileProblem))
    except FileProblem as problem:
        raise CommandRefused(problem.message, problem.hint) from problem
    return best


def _try_format(source: TableFile) -> Sample | FileProblem:
    try:
        header = read_header(source)
        frame = next(read_batches(source, SAMPLE_ROWS), None)
    except FileProblem as problem:
        return problem
    return _make_sample(source, header, frame)


def _make_sample(source: TableFile, header: list[str], frame: pl.DataFrame | None) -> Sample:
    rows = None if frame is None else text_frame(frame.head(SAMPLE_ROWS))
    columns = [describe_column(name, [] if rows is None else rows.get_column(name).to_list()) for name in header]
    return Sample(source, columns, 0 if rows is None else rows.height)


def _detect_encoding(path: Path) -> str:
    """Take UTF-8 when the whole file is, what its mark says, else cp1252."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        if not path.is_file():
            return "utf-8"
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as raw:
            beginning = raw.read(4)
            if encoding := next((name for mark, name in _BYTE_ORDER_MARKS if beginning.startswith(mark)), None):
                return encoding
            decoder.decode(beginning)
            while chunk := raw.read(_CHUNK_BYTES):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "cp1252"
    except (OSError, EOFError, zlib.error):
        return "utf-8"  # csvfile says what is wrong
    return "utf-8"

"""Samples an unknown table: detects its encoding and separator, reads its header and its first rows."""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path

import polars as pl
from msgspec import Struct

from enrich.commands.init.column_kinds import is_usual_header
from enrich.commands.init.column_matching import Column, describe_column
from enrich.errors import CommandRefused
from enrich.files.csv_format import SEPARATORS, read_batches, read_header
from enrich.files.reader import InputTable
from enrich.files.text import NO_HEADER, NO_HEADER_HINT, FileProblem, TableFile, byte_order_encoding, looks_like_cell
from enrich.files.values import text_frame
from enrich.job.locations import format_of
from enrich.job.spec import Input

SAMPLE_ROWS = 1_000
#: With this many usual names a first line is a header.
_USUAL_HEADERS = 2
_CHUNK_BYTES = 1 << 20


class Sample(Struct, frozen=True):
    """The format of a table, and its columns as seen in the first `rows` rows."""

    format: TableFile
    columns: list[Column]
    rows: int

    @property
    def header(self) -> list[str]:
        """The column names."""
        return [column.name for column in self.columns]


def take_sample(path: Path) -> Sample:
    """Detect encoding and separator, and read the first rows. Raises CommandRefused if the file cannot be read."""
    if (kind := format_of(path.name)) not in ("csv", None):
        source = InputTable(path, Input(path=str(path)))
        frame = next(source.batches(), None)
        return _make_sample(TableFile(path, format=kind), list(source.schema), frame)
    encoding = _detect_encoding(path)
    attempts = [_try_format(TableFile(path, separator, encoding)) for separator in SEPARATORS]
    # With the right separator the rows have as many cells as the header, and more than with any other separator.
    readable = [sample for sample in attempts if isinstance(sample, Sample)]
    best = max(readable, key=lambda sample: len(sample.columns), default=None)
    if best is None or (len(best.columns) == 1 and len(readable) < len(SEPARATORS)):
        raise next(problem for problem in attempts if isinstance(problem, FileProblem))
    return best


def _try_format(source: TableFile) -> Sample | FileProblem:
    try:
        header = read_header(source)
        frame = next(read_batches(source, SAMPLE_ROWS), None)
    except FileProblem as problem:
        return problem
    return _make_sample(source, header, frame)


def _make_sample(source: TableFile, header: list[str], frame: pl.DataFrame | None) -> Sample:
    # Exports have names such as `ACCOUNT.NAME`, which may also be a domain.
    if any(map(looks_like_cell, header)) and sum(map(is_usual_header, header)) < _USUAL_HEADERS:
        raise CommandRefused(f"{source}: the first line {NO_HEADER}", NO_HEADER_HINT)
    rows = None if frame is None else text_frame(frame.head(SAMPLE_ROWS))
    columns = [describe_column(name, [] if rows is None else rows.get_column(name).to_list()) for name in header]
    return Sample(source, columns, 0 if rows is None else rows.height)


def _detect_encoding(path: Path) -> str:
    """Return the encoding by the byte order mark, or UTF-8 if the whole file is valid, else cp1252."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        if not path.is_file():
            return "utf-8"
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as raw:
            beginning = raw.read(4)
            marked = byte_order_encoding(beginning)
            if marked not in (None, "utf-8"):
                return marked
            decoder.decode(beginning)
            while chunk := raw.read(_CHUNK_BYTES):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "cp1252"
    except (OSError, EOFError, zlib.error):
        return "utf-8"  # reading the table reports the error
    return "utf-8-sig" if marked else "utf-8"

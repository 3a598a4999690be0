"""Looks at an unknown CSV: its encoding, its separator, its header and its first rows."""

from __future__ import annotations

import codecs
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

from enrich.concepts import Column, describe
from enrich.csvfile import CsvFormat, CsvProblem, read_batches, read_header
from enrich.errors import Refused

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
    """How a CSV is to be read, and its columns as the first rows show them."""

    format: CsvFormat
    columns: list[Column]
    rows: int

    @property
    def header(self) -> list[str]:
        """The column names."""
        return [column.name for column in self.columns]


def take_sample(path: Path) -> Sample:
    """Guess encoding and separator and read the first rows. Raises Refused that says why it cannot be read."""
    try:
        encoding = _encoding(path)
        tried = [_try(CsvFormat(path, separator, encoding)) for separator in SEPARATORS]
        # With the right separator the rows are as long as the header, and longer than with any other.
        good = [sample for sample in tried if isinstance(sample, Sample)]
        best = max(good, key=lambda sample: len(sample.columns), default=None)
        if best is None or (len(best.columns) == 1 and len(good) < len(SEPARATORS)):
            raise next(problem for problem in tried if isinstance(problem, CsvProblem))
    except CsvProblem as problem:
        raise Refused(problem.message, problem.hint) from problem
    return best


def _try(source: CsvFormat) -> Sample | CsvProblem:
    try:
        header = read_header(source)
        frame = next(read_batches(source, SAMPLE), None)
    except CsvProblem as problem:
        return problem
    columns = [describe(name, [] if frame is None else frame[name].to_list()) for name in header]
    return Sample(source, columns, 0 if frame is None else frame.height)


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

"""Divides the input into parts that can be read by themselves, on any machine that sees the files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import polars as pl

from enrich.tables.copies import LocalCopies
from enrich.tables.finding import InputFile
from enrich.tables.reading import InputSchema, read_batches
from enrich.tables.textfile import FileProblem, as_refused

#: So many rows of a Parquet file make a part; of other formats a file is one.
ROWS_PER_PART = 100_000
#: As the readers have them.
ROWS_PER_BATCH = 20_000


@dataclass(frozen=True, slots=True)
class InputPart:
    """Some rows of one file: from which on (`start`, from 0) and how many; `first` is their place in the input."""

    file: InputFile
    start_row: int
    rows: int
    first_position: int


def divide_files(row_counts: Iterable[tuple[InputFile, int]]) -> list[InputPart]:
    """Divide files, of so many rows each, into parts that follow one another; an empty file has none."""
    parts: list[InputPart] = []
    first_position = 0
    for file, rows in row_counts:
        step = ROWS_PER_PART if file.settings.format == "parquet" else max(rows, 1)
        for start in range(0, rows, step):
            part_rows = min(step, rows - start)
            parts.append(InputPart(file, start, part_rows, first_position))
            first_position += part_rows
    return parts


class InMemoryRows:
    """Rows that were read already."""

    def __init__(self, first_position: int, frame: pl.DataFrame) -> None:
        self.first_position = first_position
        self._frame = frame

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows."""
        yield from self._frame.iter_slices(ROWS_PER_BATCH)


class PartReader:
    """The rows of one part, to be read again and again."""

    def __init__(self, part: InputPart, input_schema: InputSchema, copies: LocalCopies | None = None) -> None:
        """Make it ready; `copies` are shared by the parts of an object, so that it is fetched once."""
        self._part = part
        self._input_schema = input_schema
        self._copies = copies or LocalCopies()
        self.first_position = part.first_position

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows. Raises Refused, also when the file has other rows by now."""
        part, height = self._part, 0
        with as_refused():
            for frame in read_batches(part.file, self._input_schema, self._copies, part.start_row, part.rows):
                height += frame.height
                if height > part.rows:
                    break
                yield frame
            if height != part.rows:
                hint = "start again when the files are complete"
                raise FileProblem(f"{part.file} changed since the run began", hint)

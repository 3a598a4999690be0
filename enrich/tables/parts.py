"""Divides the input into parts that can be read by themselves, on any machine that sees the files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import polars as pl

from enrich.tables.copies import Copies
from enrich.tables.finding import Leaf
from enrich.tables.reading import Shape, batches
from enrich.tables.textfile import TableProblem, refusing

#: So many rows of a Parquet file make a part; of other formats a file is one.
ROWS = 100_000
#: As the readers have them.
ROWS_PER_BATCH = 20_000


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one file: from which on (`start`, from 0) and how many; `first` is their place in the input."""

    leaf: Leaf
    start: int
    rows: int
    first: int


def divide(counted: Iterable[tuple[Leaf, int]]) -> list[Part]:
    """Divide files, of so many rows each, into parts that follow one another; an empty file has none."""
    parts: list[Part] = []
    first = 0
    for leaf, rows in counted:
        step = ROWS if leaf.told.format == "parquet" else max(rows, 1)
        for start in range(0, rows, step):
            taken = min(step, rows - start)
            parts.append(Part(leaf, start, taken, first))
            first += taken
    return parts


class Block:
    """Rows that were read already."""

    def __init__(self, first: int, frame: pl.DataFrame) -> None:
        self.first = first
        self._frame = frame

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows."""
        yield from self._frame.iter_slices(ROWS_PER_BATCH)


class Stretch:
    """The rows of one part, to be read again and again."""

    def __init__(self, part: Part, shape: Shape, copies: Copies | None = None) -> None:
        """Make it ready; `copies` are shared by the parts of an object, so that it is fetched once."""
        self._part = part
        self._shape = shape
        self._copies = copies or Copies()
        self.first = part.first

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows. Raises Refused, also when the file has other rows by now."""
        part, height = self._part, 0
        with refusing():
            for frame in batches(part.leaf, self._shape, self._copies, part.start, part.rows):
                height += frame.height
                if height > part.rows:
                    break
                yield frame
            if height != part.rows:
                hint = "start again when the files are complete"
                raise TableProblem(f"{part.leaf} changed since the run began", hint)

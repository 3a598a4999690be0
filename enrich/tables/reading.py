"""Reads one file of the input, whatever its format, with the columns that its folders name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from enrich.tables import csvfile, excel, jsonl, parquet
from enrich.tables.cells import JSON
from enrich.tables.copies import Copies
from enrich.tables.finding import Leaf
from enrich.tables.textfile import TableFile, TableProblem

Schema = dict[str, pl.DataType]
#: So many files are asked about at a time.
AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """The columns of an input: those of its files with their types, and those that only the folders name."""

    columns: Schema
    said: tuple[str, ...] = ()

    @property
    def schema(self) -> Schema:
        """All columns in their order; what a folder says is text."""
        return self.columns | dict.fromkeys(self.said, pl.String())


@dataclass(frozen=True, slots=True)
class Outline:
    """The columns of a file, and how many rows it has if it says that itself."""

    columns: Schema
    rows: int | None


def outlines(leaves: Sequence[Leaf], copies: Copies) -> list[Outline]:
    """Read what the files say of themselves, of several at a time. Raises TableProblem, Refused."""
    if len(leaves) == 1:
        return [_outline(leaves[0], copies)]
    with ThreadPoolExecutor(AT_ONCE, "outline") as pool:
        return list(pool.map(lambda leaf: _outline(leaf, Copies()), leaves))


def _outline(leaf: Leaf, copies: Copies) -> Outline:
    try:
        if (file := copies.outline(leaf)) is not None:
            return Outline(_schema(file), parquet.count_rows(file) if file.format == "parquet" else None)
    except TableProblem:
        if isinstance(leaf.where, Path):
            raise
    # What little was fetched does not say it.
    file = copies.file(leaf)
    return Outline(_schema(file), parquet.count_rows(file) if file.format == "parquet" else None)


def common_shape(leaves: Sequence[Leaf], told: Sequence[Outline]) -> Shape:
    """Return the columns that all files have; JSON Lines, which may leave out keys, have those of any.

    Raises TableProblem that names the first file that differs.
    """
    first = leaves[0]
    columns = dict(told[0].columns)
    for leaf, other in zip(leaves[1:], (outline.columns for outline in told[1:]), strict=True):
        if leaf.told.format == "jsonl":
            columns |= {name: kind for name, kind in other.items() if columns.get(name) != JSON}
        elif difference := _difference(list(columns.items()), list(other.items())):
            raise TableProblem(f"{leaf}: its header differs from that of {first}: {difference}", "make them equal")
    return Shape(columns, tuple(dict.fromkeys(name for name, _ in first.says if name not in columns)))


def batches(
    leaf: Leaf, shape: Shape, copies: Copies, start: int = 0, rows: int | None = None
) -> Iterator[pl.DataFrame]:
    """Yield the rows of a file in order; only of Parquet some of them can be had. Raises TableProblem."""
    said = [(name, value) for name, value in leaf.says if name in shape.said]
    for frame in _batches(copies.file(leaf), shape.columns, start, rows):
        more = [pl.repeat(value, frame.height, dtype=pl.String, eager=True).alias(name) for name, value in said]
        yield frame.hstack(more) if more else frame


def count(leaf: Leaf, shape: Shape, copies: Copies) -> int:
    """Count the rows of a file, which is read to its end. Raises TableProblem."""
    return sum(frame.height for frame in _batches(copies.file(leaf), shape.columns, 0, None))


def _difference(first: list[tuple[str, pl.DataType]], other: list[tuple[str, pl.DataType]]) -> str | None:
    names, others = [name for name, _ in first], [name for name, _ in other]
    missing = [f"`{name}` is missing" for name in names if name not in others]
    more = [f"`{name}` is new" for name in others if name not in names]
    if missing or more:
        return ", ".join([*missing, *more])
    for place, ((name, kind), (its_name, its_kind)) in enumerate(zip(first, other, strict=True), 1):
        if its_name != name:
            return f"column {place} is `{its_name}`, not `{name}`"
        if its_kind != kind:
            return f"`{name}` is of type {its_kind}, not {kind}"
    return None


def _schema(file: TableFile) -> Schema:
    match file.format:
        case "csv":
            return dict.fromkeys(csvfile.read_header(file), pl.String())
        case "xlsx":
            return dict.fromkeys(excel.read_header(file), pl.String())
        case "jsonl":
            return jsonl.read_schema(file)
        case "parquet":
            return parquet.read_schema(file)


def _batches(file: TableFile, columns: Schema, start: int, rows: int | None) -> Iterator[pl.DataFrame]:
    match file.format:
        case "csv":
            return csvfile.read_batches(file)
        case "xlsx":
            return excel.read_batches(file)
        case "jsonl":
            return jsonl.read_batches(file, columns)
        case "parquet":
            return parquet.read_batches(file, start, rows)

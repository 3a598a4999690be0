"""Reads one file of the input, whatever its format, with the columns that its folders name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from enrich.tables import csvfile, excel, jsonl, parquet
from enrich.tables.cells import JSON_TYPE
from enrich.tables.copies import LocalCopies
from enrich.tables.finding import InputFile
from enrich.tables.textfile import FileProblem, TableFile

Schema = dict[str, pl.DataType]
#: So many files are asked about at a time.
FILES_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class InputSchema:
    """The columns of an input: those of its files with their types, and those that only the folders name."""

    file_columns: Schema
    partition_columns: tuple[str, ...] = ()

    @property
    def all_columns(self) -> Schema:
        """All columns in their order; what a folder says is text."""
        return self.file_columns | dict.fromkeys(self.partition_columns, pl.String())


@dataclass(frozen=True, slots=True)
class FileMetadata:
    """The columns of a file, and how many rows it has if it says that itself."""

    columns: Schema
    rows: int | None


def read_metadata(input_files: Sequence[InputFile], copies: LocalCopies) -> list[FileMetadata]:
    """Read what the files say of themselves, of several at a time. Raises TableProblem, Refused."""
    if len(input_files) == 1:
        return [_read_metadata(input_files[0], copies)]
    with ThreadPoolExecutor(FILES_AT_ONCE, "outline") as pool:
        return list(pool.map(lambda file: _read_metadata(file, LocalCopies()), input_files))


def _read_metadata(input_file: InputFile, copies: LocalCopies) -> FileMetadata:
    try:
        if (file := copies.metadata_file(input_file)) is not None:
            return FileMetadata(_read_schema(file), parquet.count_rows(file) if file.format == "parquet" else None)
    except FileProblem:
        if isinstance(input_file.location, Path):
            raise
    # What little was fetched does not say it.
    file = copies.table_file(input_file)
    return FileMetadata(_read_schema(file), parquet.count_rows(file) if file.format == "parquet" else None)


def common_schema(input_files: Sequence[InputFile], metadata: Sequence[FileMetadata]) -> InputSchema:
    """Return the columns that all files have; JSON Lines, which may leave out keys, have those of any.

    Raises TableProblem that names the first file that differs.
    """
    first = input_files[0]
    columns = dict(metadata[0].columns)
    for file, other in zip(input_files[1:], (info.columns for info in metadata[1:]), strict=True):
        if file.settings.format == "jsonl":
            columns |= {name: kind for name, kind in other.items() if columns.get(name) != JSON_TYPE}
        elif difference := _schema_difference(list(columns.items()), list(other.items())):
            raise FileProblem(f"{file}: its header differs from that of {first}: {difference}", "make them equal")
    return InputSchema(columns, tuple(dict.fromkeys(name for name, _ in first.partition_values if name not in columns)))


def read_batches(
    file: InputFile, input_schema: InputSchema, copies: LocalCopies, start: int = 0, rows: int | None = None
) -> Iterator[pl.DataFrame]:
    """Yield the rows of a file in order; only of Parquet some of them can be had. Raises TableProblem."""
    partition_values = [
        (name, value) for name, value in file.partition_values if name in input_schema.partition_columns
    ]
    for frame in _read_batches(copies.table_file(file), input_schema.file_columns, start, rows):
        partition_cells = [
            pl.repeat(value, frame.height, dtype=pl.String, eager=True).alias(name) for name, value in partition_values
        ]
        yield frame.hstack(partition_cells) if partition_cells else frame


def count_file_rows(file: InputFile, input_schema: InputSchema, copies: LocalCopies) -> int:
    """Count the rows of a file, which is read to its end. Raises TableProblem."""
    return sum(frame.height for frame in _read_batches(copies.table_file(file), input_schema.file_columns, 0, None))


def _schema_difference(first: list[tuple[str, pl.DataType]], other: list[tuple[str, pl.DataType]]) -> str | None:
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


def _read_schema(file: TableFile) -> Schema:
    match file.format:
        case "csv":
            return dict.fromkeys(csvfile.read_header(file), pl.String())
        case "xlsx":
            return dict.fromkeys(excel.read_header(file), pl.String())
        case "jsonl":
            return jsonl.read_schema(file)
        case "parquet":
            return parquet.read_schema(file)


def _read_batches(file: TableFile, columns: Schema, start: int, rows: int | None) -> Iterator[pl.DataFrame]:
    match file.format:
        case "csv":
            return csvfile.read_batches(file)
        case "xlsx":
            return excel.read_batches(file)
        case "jsonl":
            return jsonl.read_batches(file, columns)
        case "parquet":
            return parquet.read_batches(file, start, rows)

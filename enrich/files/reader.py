"""Reads the input as one table: any format, one file or several, local, from object storage or from stdin."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path

import polars as pl
from msgspec import Struct

from enrich.errors import UNREADABLE_HINT, CommandRefused
from enrich.files import csv_format, excel_format, jsonl_format, parquet_format
from enrich.files.input_files import (
    InputFile,
    LocalCopies,
    find_input_files,
    find_objects,
    find_paths,
    remove_abandoned_folders_once,
)
from enrich.files.text import ROWS_PER_BATCH, FileProblem, TableFile, quote_column
from enrich.files.values import JSON_TYPE, text_frame
from enrich.job.locations import STDIN, InputLocation, ObjectUrl, WebUrl
from enrich.job.spec import Input

Schema = dict[str, pl.DataType]
#: Number of files whose metadata is read in parallel.
FILES_AT_ONCE = 16


class InputSchema(Struct, frozen=True):
    """The columns of an input: those in its files, with types, and those that only folder names contain."""

    file_columns: Schema
    partition_columns: tuple[str, ...] = ()

    @property
    def all_columns(self) -> Schema:
        """All columns in order. Columns from folder names are text."""
        return self.file_columns | dict.fromkeys(self.partition_columns, pl.String())


class FileMetadata(Struct, frozen=True):
    """The columns of a file, and its row count if the metadata has it (Parquet), else None."""

    columns: Schema
    rows: int | None


def read_metadata(input_files: Sequence[InputFile], copies: LocalCopies) -> list[FileMetadata]:
    """Read the metadata of the files, several in parallel. Raises FileProblem, CommandRefused."""
    if len(input_files) == 1:
        return [_read_metadata(input_files[0], copies)]
    with ThreadPoolExecutor(FILES_AT_ONCE, "metadata") as pool:
        return list(pool.map(lambda file: _read_metadata(file, LocalCopies()), input_files))


def _read_metadata(input_file: InputFile, copies: LocalCopies) -> FileMetadata:
    def read(file: TableFile) -> FileMetadata:
        return FileMetadata(_read_schema(file), parquet_format.count_rows(file) if file.format == "parquet" else None)

    try:
        if (file := copies.metadata_file(input_file)) is not None:
            return read(file)
    except FileProblem:
        if isinstance(input_file.location, Path):
            raise
    # The downloaded beginning or end is not enough: read the complete file.
    return read(copies.table_file(input_file))


def common_schema(input_files: Sequence[InputFile], metadata: Sequence[FileMetadata]) -> InputSchema:
    """Return the columns, which must be the same in all files. For JSON Lines, return the columns of any file.

    JSON Lines may leave out keys. Raises FileProblem that names the first file that differs.
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
    """Yield the rows of a file in order, or of Parquet some `rows` from `start` (from 0). Raises FileProblem."""
    partition_values = [
        (name, value) for name, value in file.partition_values if name in input_schema.partition_columns
    ]
    for frame in _read_batches(copies.table_file(file), input_schema.file_columns, start, rows):
        columns, own_columns = list(input_schema.file_columns.items()), list(frame.schema.items())
        if columns != own_columns and (difference := _schema_difference(columns, own_columns)):
            raise FileProblem(f"{file}: its header has changed: {difference}", "run again when the file is complete")
        partition_cells = [
            pl.repeat(value, frame.height, dtype=pl.String, eager=True).alias(name) for name, value in partition_values
        ]
        yield frame.hstack(partition_cells) if partition_cells else frame


def count_file_rows(file: InputFile, input_schema: InputSchema, copies: LocalCopies) -> int:
    """Count the rows of a file by reading all of it. Raises FileProblem."""
    return sum(frame.height for frame in _read_batches(copies.table_file(file), input_schema.file_columns, 0, None))


def _schema_difference(first: list[tuple[str, pl.DataType]], other: list[tuple[str, pl.DataType]]) -> str | None:
    names, others = [name for name, _ in first], [name for name, _ in other]
    missing = [f"{quote_column(name)} is missing" for name in names if name not in others]
    more = [f"{quote_column(name)} is new" for name in others if name not in names]
    if missing or more:
        return ", ".join([*missing, *more])
    for place, ((name, kind), (its_name, its_kind)) in enumerate(zip(first, other, strict=True), 1):
        if its_name != name:
            return f"column {place} is {quote_column(its_name)}, not {quote_column(name)}"
        if its_kind != kind:
            types = f"type {its_kind}, not {kind}"
            # The categories of an Enum are cells.
            return (
                f"{quote_column(name)} is of {types if 'categories=' not in types else 'a type with other categories'}"
            )
    return None


def _read_schema(file: TableFile) -> Schema:
    match file.format:
        case "csv":
            return dict.fromkeys(csv_format.read_header(file), pl.String())
        case "xlsx":
            return dict.fromkeys(excel_format.read_header(file), pl.String())
        case "jsonl":
            return jsonl_format.read_schema(file)
        case "parquet":
            return parquet_format.read_schema(file)


def _read_batches(file: TableFile, columns: Schema, start: int, rows: int | None) -> Iterator[pl.DataFrame]:
    match file.format:
        case "csv":
            return csv_format.read_batches(file)
        case "xlsx":
            return excel_format.read_batches(file)
        case "jsonl":
            return jsonl_format.read_batches(file, columns)
        case "parquet":
            return parquet_format.read_batches(file, start, rows)


#: Number of rows in a part of a Parquet file. A file of another format is one part.
ROWS_PER_PART = 100_000


class InputPart(Struct, frozen=True):
    """A range of rows in one file. `start_row` is their start in the file (from 0), `first_position` in the input."""

    file: InputFile
    start_row: int
    rows: int
    first_position: int


class InMemoryRows(Struct, frozen=True):
    """Rows that are already in memory. `first_position` is the position of the first row in the input."""

    first_position: int
    frame: pl.DataFrame

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows in batches."""
        return self.frame.iter_slices(ROWS_PER_BATCH)


def read_part(part: InputPart, input_schema: InputSchema, copies: LocalCopies) -> Iterator[pl.DataFrame]:
    """Yield the rows of one part in batches. Raises CommandRefused, also if the file's row count has changed."""
    height = 0
    for frame in read_batches(part.file, input_schema, copies, part.start_row, part.rows):
        height += frame.height
        if height > part.rows:
            break
        yield frame
    if height != part.rows:
        raise FileProblem(f"{part.file} changed since the run began", "start again when the files are complete")


class InputTable:
    """The input as a table that can be read repeatedly. Objects, downloads and stdin become private local files."""

    def __init__(self, location: InputLocation, settings: Input) -> None:
        """Find the files and read their headers. Raises CommandRefused that names the file and the remedy."""
        remove_abandoned_folders_once()
        self._location = location
        self._settings = settings
        self._is_copy_current: bool | None = None
        self._copies = LocalCopies()
        self.input_files = self._find_files()
        metadata = read_metadata(self.input_files, self._copies)
        self.input_schema = common_schema(self.input_files, metadata)
        # Files with a row count in their metadata.
        self._known_row_counts = {
            file: info.rows for file, info in zip(self.input_files, metadata, strict=True) if info.rows is not None
        }
        self.schema = self.input_schema.all_columns
        self.first_position = 0

    def file_versions(self) -> object:
        """Return a value that differs if any file was replaced, changed, added or removed."""
        location = self._location
        if isinstance(location, ObjectUrl):
            try:
                return find_objects(location)
            except CommandRefused:  # assume no change while the storage cannot be read
                return {file.location: file.version for file in self.input_files}
        if isinstance(location, WebUrl):
            # The first call is about the copy that was just read. Later ones download it again.
            self._is_copy_current = self._is_copy_current is None or self._has_same_rows()
            return self._is_copy_current
        if location == STDIN:
            return True
        if self.input_files[0].location == location:
            return _file_identity(location)
        try:
            return [(path, _file_identity(path)) for path in find_paths(location)]
        except FileProblem:
            return None

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the bytes of all files and the column values in their folder names."""
        total = sha256()
        for file in self.input_files:
            try:
                with self._copies.table_file(file).path.open("rb") as raw:
                    total.update(file_digest(raw, "sha256").digest())
            except OSError as error:
                raise FileProblem(f"{file} cannot be read: {error.strerror}", UNREADABLE_HINT) from None
            total.update(repr(file.partition_values).encode() if file.partition_values else b"")
        return total.hexdigest()

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows of all files in order. Columns keep their types. Raises CommandRefused."""
        for file in self.input_files:
            yield from read_batches(file, self.input_schema, self._copies)

    def _cell_digest(self) -> bytes:
        """Hash the cells as text. Only for a comparison in this process: other versions of polars hash differently."""
        total = sha256()
        for frame in self.batches():
            total.update(array("Q", text_frame(frame).hash_rows().to_list()).tobytes())
        return total.digest()

    def parts(self, count_rows: Callable[[Sequence[InputFile]], Sequence[int]]) -> list[InputPart]:
        """Divide the rows into consecutive parts. `count_rows` is for files without a row count in their metadata."""
        unknown = [file for file in self.input_files if file not in self._known_row_counts]
        row_counts = self._known_row_counts | dict(zip(unknown, count_rows(unknown), strict=True))
        parts: list[InputPart] = []
        first_position = 0
        for file in self.input_files:
            rows = row_counts[file]
            step = ROWS_PER_PART if file.settings.format == "parquet" else max(rows, 1)
            parts += [
                InputPart(file, start, min(step, rows - start), first_position + start)
                for start in range(0, rows, step)
            ]
            first_position += rows
        return parts

    def _has_same_rows(self) -> bool:
        """Download the input again, and check whether it has the same cells. True if it cannot be read now."""
        try:
            current = InputTable(self._location, self._settings)
            if current.digest() == self.digest():
                return True
            return list(current.schema) == list(self.schema) and current._cell_digest() == self._cell_digest()
        except CommandRefused:
            return True

    def _find_files(self) -> list[InputFile]:
        if isinstance(self._location, WebUrl):
            return [InputFile(self._copies.copy_web(self._location), self._settings, str(self._location))]
        if self._location == STDIN:
            return [InputFile(self._copies.copy_stdin(), self._settings, "standard input")]
        return find_input_files(self._location, self._settings)


def _file_identity(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns

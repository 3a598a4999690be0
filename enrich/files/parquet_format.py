"""Reads and writes Parquet in batches. Every column keeps its type."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import BinaryIO, cast

import polars as pl
from polars.io.plugins import register_io_source

from enrich.files.text import ROWS_PER_BATCH, FileProblem, TableFile, as_file_problem, check_magic_bytes, quote_column
from enrich.files.values import JSON_TYPE, as_text, first_without_text, text_or_null

# Polars panics at a time zone that it does not have, such as `+03:30`. See `_known_zones`.
os.environ["POLARS_IGNORE_TIMEZONE_PARSE_ERROR"] = "1"

#: Number of rows held in memory while reading or writing.
ROWS_PER_CHUNK = 100_000

#: Size of the end of a file: the length of its footer (4 bytes) and the magic number (4 bytes).
TAIL_BYTES = 8
_MAGIC = b"PAR1"
#: Polars cannot read decimals with more digits.
_MAX_DECIMAL_DIGITS = 38
#: A NUL character in JSON text: an escape whose backslash is not itself escaped.
_NUL_IN_JSON = r"(?:^|[^\\])(?:\\\\)*\\u0000"


def end_length(tail: bytes) -> int | None:
    """Return the length in bytes of the footer and the tail. None: not a Parquet file."""
    is_parquet = len(tail) == TAIL_BYTES and tail.endswith(_MAGIC)
    return int.from_bytes(tail[:4], "little") + TAIL_BYTES if is_parquet else None


def write_footer_copy(raw: BinaryIO, size: int, end: bytes) -> None:
    """Write a file with the columns and row count of another one of this `size`, from its `end`: footer and tail."""
    raw.truncate(size)
    raw.write(_MAGIC)
    raw.seek(size - len(end))
    raw.write(end)


def read_schema(source: TableFile) -> dict[str, pl.DataType]:
    """Return the columns and their types."""
    with _as_parquet_problem(source):
        schema = dict(_scan(source).collect_schema())
    if not schema:
        raise FileProblem(f"{source} has no columns", "choose a file of leads")
    for name, kind in schema.items():
        if isinstance(kind, pl.Decimal) and kind.precision > _MAX_DECIMAL_DIGITS:
            message = f"{source}: column {quote_column(name)} has the type {kind}, which is not supported"
            raise FileProblem(message, f"write it with at most {_MAX_DECIMAL_DIGITS} digits, or as text")
    return schema


def count_rows(source: TableFile) -> int:
    """Return the number of rows from the metadata, without reading the rows."""
    with _as_parquet_problem(source):
        return int(_scan(source).select(pl.len()).collect().item())


def read_batches(source: TableFile, start: int = 0, rows: int | None = None) -> Iterator[pl.DataFrame]:
    """Yield `rows` rows in order, beginning with row `start` (from 0). None: all remaining rows."""
    height = count_rows(source)
    end = height if rows is None else min(start + rows, height)
    with _as_parquet_problem(source):
        scan = _scan(source)
        # Read in fixed chunks, because polars prefetches several row groups of any size.
        for position in range(start, end, ROWS_PER_CHUNK):
            chunk = scan.slice(position, min(ROWS_PER_CHUNK, end - position)).collect()
            _check_cells(source, chunk, position)
            yield from chunk.iter_slices(ROWS_PER_BATCH)


def _check_cells(source: TableFile, frame: pl.DataFrame, start: int) -> None:
    """Raise FileProblem for the first cell of a column that no text can stand for, or with a NUL character."""
    for column in frame.get_columns():
        problem, index = "has a date or time that does not exist", first_without_text(column)
        if index is None and column.dtype not in _WITHOUT_NUL:
            problem, index = "has a NUL character", _first_nul(column)
        if index is not None:
            position = f"{source}: row {start + index + 1}, column {quote_column(column.name)}"
            raise FileProblem(f"{position}: this cell {problem}", "write the file again without it")


_WITHOUT_NUL = (pl.Binary, pl.Boolean, pl.Null)


def _first_nul(column: pl.Series) -> int | None:
    kind = column.dtype
    if kind.is_numeric() or kind.is_temporal():
        return None
    escape = _NUL_IN_JSON if kind.is_nested() else "\0"
    has_nul = as_text(column).alias("").str.contains(escape, literal=not kind.is_nested())
    return has_nul.arg_max() if has_nul.any() else None


def _scan(source: TableFile) -> pl.LazyFrame:
    scan = pl.scan_parquet(source.path, glob=False, hive_partitioning=False)
    kinds = [(place, kind, _known_zones(kind)) for place, kind in enumerate(scan.collect_schema().dtypes())]
    changed = [pl.nth(place).cast(known) for place, kind, known in kinds if known != kind]
    return scan.with_columns(changed) if changed else scan


def _known_zones(kind: pl.DataType) -> pl.DataType:
    """Replace the time zones that polars does not have by UTC. A time in the file is in UTC, whatever its zone is."""
    if isinstance(kind, pl.Struct):
        return pl.Struct({field.name: _known_zones(cast("pl.DataType", field.dtype)) for field in kind.fields})
    if isinstance(kind, pl.List | pl.Array):
        inner = _known_zones(cast("pl.DataType", kind.inner))
        return pl.List(inner) if isinstance(kind, pl.List) else pl.Array(inner, kind.size)
    if isinstance(kind, pl.Datetime) and kind.time_zone and not _is_known_zone(kind.time_zone):
        return pl.Datetime(kind.time_unit, "UTC")
    return kind


@cache
def _is_known_zone(zone: str) -> bool:
    try:
        pl.Series([0], dtype=pl.Datetime("us", zone)).dt.strftime("%Z")
    except pl.exceptions.ComputeError:
        return False
    return True


def file_schema(schema: Mapping[str, pl.DataType]) -> pl.Schema:
    """Return the columns of a file. JSON columns become text."""
    return pl.Schema({name: pl.String() if kind == JSON_TYPE else kind for name, kind in schema.items()})


def write(raw: BinaryIO, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]) -> int:
    """Stream frames through polars' sink, never all in memory. JSON columns become text. Returns the number of rows."""
    written = 0

    def batches(
        _columns: list[str] | None, _predicate: pl.Expr | None, _rows: int | None, _size: int | None
    ) -> Iterator[pl.DataFrame]:
        nonlocal written
        for frame in frames:
            written += frame.height
            columns = frame.get_columns()
            yield pl.DataFrame({each.name: text_or_null(each) if each.dtype == JSON_TYPE else each for each in columns})

    register_io_source(batches, schema=file_schema(schema)).sink_parquet(raw, row_group_size=ROWS_PER_CHUNK)
    return written


@contextmanager
def _as_parquet_problem(source: TableFile) -> Iterator[None]:
    try:
        with as_file_problem(source):
            yield
    except pl.exceptions.PolarsError:
        check_magic_bytes(source)
        raise FileProblem(f"{source} is a damaged Parquet file", "write or download it again") from None
    except pl.exceptions.PanicException:  # not a subclass of Exception; a bug in polars
        hint = "write its columns with simpler types, such as text"
        raise FileProblem(f"{source} has a column of a type that cannot be read", hint) from None

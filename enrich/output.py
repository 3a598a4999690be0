"""Writes the output file: whole or not at all, readable by its owner only."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

import polars as pl
from polars.io.plugins import register_io_source

from enrich.csvfile import CsvProblem, CsvWriter
from enrich.errors import JobError, Refused
from enrich.spec import Output

#: New text that a spreadsheet would run as a formula; a number or a phone behind `+` or `-` is none.
_FORMULA = r"^[=@\t\r]"
_SIGNED = r"^[+-]"
_NUMBER_OR_PHONE = r"^[+-]\s?\(?\d[\d\s().,/-]*(?:\s*(?:x|ext\.?)\s*\d+)?$"

_LATER = "make room for it; the ledger has the answers: `enrich collect` writes them without paying"


def part_of(target: Path, job: str, kind: str = "output") -> Path:
    """The file in which the output grows; its name has no date, so that the next start finds a stale one."""
    return target.with_name(f".{job}.enrich-part" if kind == "output" else f".{job}.enrich-{kind}-part")


def prepare(target: Path, source: Path, job: str, kind: str = "output") -> None:
    """Make the output's folder and remove what a killed run left in it.

    Raises JobError when the output would replace the input or a ledger, Refused when the folder can't be made.
    """
    try:
        if target == source or (target.exists() and source.exists() and target.samefile(source)):
            raise JobError(f"{target}: the output would replace the input", "choose another `output`")
        if target.is_file() and _is_database(target):
            raise JobError(f"{target}: the output would replace a ledger", "choose another `output`")
        target.parent.mkdir(parents=True, exist_ok=True)
        part_of(target, job, kind).unlink(missing_ok=True)
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        if target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        raise Refused(f"{target}: the output cannot be written: {error.strerror}") from error


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def write(  # noqa: PLR0913 - one file is all of these
    target: Path,
    output: Output,
    *,
    job: str,
    schema: Mapping[str, pl.DataType],
    frames: Iterable[pl.DataFrame],
    new: int,
    kind: str = "output",
) -> None:
    """Write the frames, whose last `new` columns are ours. Raises Refused; the old file stays then."""
    name = target.name.lower()
    try:
        with _atomic(target, part_of(target, job, kind)) as raw:
            if name.endswith(".parquet"):
                _write_parquet(raw, schema, frames)
            elif name.endswith(".gz"):
                # No name and no time inside: equal outputs are equal bytes.
                with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
                    _write_csv(cast("BinaryIO", packed), output, list(schema), frames, new)
            else:
                _write_csv(raw, output, list(schema), frames, new)
    except CsvProblem as problem:
        raise Refused(f"{target}: {problem.message}", problem.hint) from problem
    except OSError as error:
        raise Refused(f"{target}: the output cannot be written: {error.strerror or error}", _LATER) from error
    except pl.exceptions.ComputeError as error:
        # What the disk says comes out of polars' sink as this.
        raise Refused(f"{target}: the output cannot be written: {error}", _LATER) from error


@contextmanager
def _atomic(target: Path, part: Path) -> Iterator[BinaryIO]:
    # The run was long: the folder may have gone since it began.
    target.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        with os.fdopen(descriptor, "w+b") as raw:
            yield raw
            raw.flush()
            os.fsync(raw.fileno())
            if not os.path.samestat(os.fstat(raw.fileno()), part.stat()):
                raise FileExistsError(17, f"another run of a job of this name writes {part}")
            part.replace(target)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_csv(raw: BinaryIO, output: Output, columns: list[str], frames: Iterable[pl.DataFrame], new: int) -> None:
    with CsvWriter(raw, output.separator, output.encoding) as writer:
        writer.write_header(columns)
        for frame in frames:
            writer.write(frame.with_columns(map(_as_text, frame.get_columns()[-new:])))


def runs_formulas(target: Path) -> bool:
    """Tell whether a spreadsheet would run text of this file as a formula."""
    return not target.name.lower().endswith(".parquet")


def _as_text(column: pl.Series) -> pl.Series:
    """Write a new column as text that no spreadsheet runs."""
    if column.dtype != pl.String:
        return pl.Series(column.name, [None if value is None else _number(value) for value in column], pl.String)
    return guarded(column)


def guarded(column: pl.Series) -> pl.Series:
    """Write text so that no spreadsheet runs it."""
    text = pl.nth(0)
    is_formula = text.str.contains(_FORMULA) | (text.str.contains(_SIGNED) & ~text.str.contains(_NUMBER_OR_PHONE))
    safe = pl.when(is_formula).then("'" + text).otherwise(text)
    return column.alias("").to_frame().select(safe.alias("")).to_series().alias(column.name)


def _number(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _write_parquet(raw: BinaryIO, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]) -> None:
    """Stream the frames through polars' own sink, so that they are never held together."""

    def batches(
        _columns: list[str] | None, _predicate: pl.Expr | None, _rows: int | None, _size: int | None
    ) -> Iterator[pl.DataFrame]:
        yield from frames

    register_io_source(batches, schema=pl.Schema(schema)).sink_parquet(raw)

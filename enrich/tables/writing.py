"""Writes the files of a run: whole or not at all, readable by their owner only."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import polars as pl

from enrich.errors import JobError, Refused
from enrich.place import Place, Url, format_of, is_dataset, is_pattern
from enrich.spec import Output
from enrich.tables import dataset, excel, jsonl, parquet, storage
from enrich.tables.atomic import AGAIN, growing, telling
from enrich.tables.cells import text_frame
from enrich.tables.csvfile import CsvWriter
from enrich.tables.finding import files, would_find
from enrich.tables.textfile import refusing

#: New text that a spreadsheet would run as a formula; a number or a phone behind `+` or `-` is none.
_FORMULA = r"^[=@\t\r]"
_SIGNED = r"^[+-]"
_NUMBER_OR_PHONE = r"^[+-]\s?\(?\d[\d\s().,/-]*(?:\s*(?:x|ext\.?)\s*\d+)?$"


def part_of(target: Path, job: str, kind: str = "output") -> Path:
    """The file in which a file of the run grows; its name has no date, so that the next start finds a stale one."""
    return target.with_name(f".{job}.enrich-part" if kind == "output" else f".{job}.enrich-{kind}-part")


def prepare(target: Place, source: Place, job: str, kind: str = "output") -> None:
    """Make the folder of a file that the run will write, and remove what a killed run left in it.

    Raises JobError when it would replace the input or a ledger, Refused when it can't be written.
    """
    if kind == "output" and is_dataset(target):
        dataset.prepare(target, source, job)
        return
    if isinstance(target, Url):
        if would_find(source, target):
            raise _read_next(target, source, kind)
        if target == source:
            raise JobError(f"{target}: the {kind} would replace the input", f"choose another `{kind}`")
        storage.check(target)
        return
    try:
        _spare_the_input(target, source, kind)
        if target.is_file() and _is_database(target):
            raise JobError(f"{target}: the {kind} would replace a ledger", f"choose another `{kind}`")
        target.parent.mkdir(parents=True, exist_ok=True)
        part_of(target, job, kind).unlink(missing_ok=True)
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        if target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if target.exists() and not target.is_file():
            raise OSError(0, "it is no file")
    except OSError as error:
        raise Refused(f"{target}: the {kind} cannot be written: {error.strerror}") from error


def _spare_the_input(target: Path, source: Place, kind: str) -> None:
    if isinstance(source, Url):
        return
    if would_find(source, target):
        raise _read_next(target, source, kind)
    with refusing():
        paths = files(source)
    for path in paths:
        if target == path or (target.exists() and path.exists() and target.samefile(path)):
            raise JobError(f"{target}: the {kind} would replace the input", f"choose another `{kind}`")


def _read_next(target: Place, source: Place, kind: str) -> JobError:
    narrower = f", or a narrower pattern than {source.name}" if is_pattern(source) else ""
    return JobError(
        f"{target}: the {kind} would be read as input by the next run", f"choose another `{kind}`{narrower}"
    )


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def write(  # noqa: PLR0913 - one file is all of these
    target: Place,
    output: Output,
    *,
    job: str,
    schema: Mapping[str, pl.DataType],
    frames: Iterable[pl.DataFrame],
    new: int,
    kind: str = "output",
) -> None:
    """Write the frames, whose last `new` columns are ours. Raises Refused; the old file stays then.

    `kind` is the key of the job file that names the target: each has a temporary file of its own.
    """
    if kind == "output" and is_dataset(target):
        dataset.write(target, job, schema, frames)
        return
    with telling(target, kind), _whole(target, job, kind) as raw, _packed(raw, target.name) as plain:
        match format_of(target.name):
            case "parquet":
                parquet.write(plain, schema, frames)
            case "xlsx":
                excel.write(plain, list(schema), map(text_frame, frames))
            case "jsonl":
                jsonl.write(plain, list(schema), frames)
            case _:
                _write_csv(plain, output, list(schema), frames, new)


@contextmanager
def _whole(target: Place, job: str, kind: str) -> Iterator[BinaryIO]:
    """Open a file that becomes the target when the block ends well."""
    if isinstance(target, Path):
        # The run was long: the folder may have gone since it began.
        target.parent.mkdir(parents=True, exist_ok=True)
        with growing(target, part_of(target, job, kind)) as raw:
            yield raw
        return
    with tempfile.TemporaryFile() as file:
        yield cast("BinaryIO", file)
        file.seek(0)
        try:
            storage.send(target, cast("BinaryIO", file))
        except Refused as error:
            raise Refused(error.message, f"{error.hint}; {AGAIN}") from error


@contextmanager
def _packed(raw: BinaryIO, name: str) -> Iterator[BinaryIO]:
    if not name.lower().endswith(".gz"):
        yield raw
        return
    # No name and no time inside: equal outputs are equal bytes.
    with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
        yield cast("BinaryIO", packed)


def _write_csv(raw: BinaryIO, output: Output, columns: list[str], frames: Iterable[pl.DataFrame], new: int) -> None:
    with CsvWriter(raw, output.separator, output.encoding) as writer:
        writer.write_header(columns)
        for frame in frames:
            text = text_frame(frame)
            writer.write(text.with_columns(map(guarded, text.get_columns()[-new:])))


def runs_formulas(target: Place) -> bool:
    """Tell whether a spreadsheet would run text of this file as a formula."""
    return format_of(target.name) == "csv"


def guarded(column: pl.Series) -> pl.Series:
    """Write text so that no spreadsheet runs it."""
    text = pl.nth(0)
    is_formula = text.str.contains(_FORMULA) | (text.str.contains(_SIGNED) & ~text.str.contains(_NUMBER_OR_PHONE))
    safe = pl.when(is_formula).then("'" + text).otherwise(text)
    return column.alias("").to_frame().select(safe.alias("")).to_series().alias(column.name)

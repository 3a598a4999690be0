"""Writes the files of a run atomically, readable only by their owner."""

from __future__ import annotations

import errno
import gzip
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

import polars as pl

from enrich.errors import CommandRefused, JobError
from enrich.files import csv_format, jsonl_format, object_store, parquet_dataset, parquet_format
from enrich.files.atomic import as_write_refused, atomic_write, follow_link
from enrich.files.discovery import find_paths
from enrich.files.values import as_text, text_frame
from enrich.job.file_names import is_same_file
from enrich.job.locations import InputLocation, Location, ObjectUrl, format_of, is_dataset
from enrich.job.spec import Output

#: Text that a spreadsheet would run as a formula: it skips line breaks and invisible characters before it, and takes
#: full-width signs. `+` or `-` before a number or a phone number is harmless.
_SKIPPED = r"^[\n\r\x0b\x0c\x{85}\x{2028}\x{2029}\p{Cf}]*"
_FORMULA = rf"^[\t\r]|{_SKIPPED}[=@\x{{FF1D}}\x{{FF20}}]"
_SIGNED = rf"{_SKIPPED}[+\-\x{{FF0B}}\x{{FF0D}}]"
#: How any of them begins.
_NO_LETTER = "^[^0-9A-Za-z]"
_NUMBER_OR_PHONE = r"^[+-]\s?\(?\d[\d\s().,/-]*(?:\s*(?:x|ext\.?)\s*\d+|[eE][+-]?\d+)?$"


def temporary_path(target: Path, job: str, kind: str = "output") -> Path:
    """Return the path of the temporary file of a target. It contains no date, so the next run finds a leftover file."""
    return target.with_name(f".{job}.enrich-part" if kind == "output" else f".{job}.enrich-{kind}-part")


def prepare_file(target: Location, input_location: InputLocation, job: str, kind: str = "output") -> None:
    """Create the folder of a file that the run will write, and remove leftovers of a killed run.

    Raises JobError if the file would replace the input or a ledger.
    Raises CommandRefused if it cannot be written.
    """
    as_dataset = kind == "output" and is_dataset(target)
    if isinstance(target, ObjectUrl):
        if target == input_location:
            raise JobError(f"{target}: the {kind} would replace the input", f"choose another `{kind}`")
        object_store.check_bucket(target)
        if as_dataset:
            parquet_dataset.prepare_bucket(target)
        return
    if as_dataset:
        parquet_dataset.prepare_folder(target, input_location, job)
        return
    try:
        _check_not_input(target, input_location, kind)
        target = follow_link(target)
        if is_sqlite_file(target):
            raise JobError(f"{target}: the {kind} would replace a ledger", f"choose another `{kind}`")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary_path(target, job, kind).unlink(missing_ok=True)
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
        with suppress(FileNotFoundError):
            mode = target.stat().st_mode
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(mode) else "it is not a file")
    except OSError as error:
        raise CommandRefused(f"{target}: the {kind} cannot be written: {error.strerror}") from error


def _check_not_input(target: Path, input_location: InputLocation, kind: str) -> None:
    if not isinstance(input_location, Path):
        return
    for path in find_paths(input_location):
        if is_same_file(target, path):
            raise JobError(f"{target}: the {kind} would replace the input", f"choose another `{kind}`")


def is_sqlite_file(path: Path) -> bool:
    """Return whether a file is a SQLite database, as ledgers are. Raises OSError."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def write_file(  # noqa: PLR0913 - all of these describe one file
    target: Location,
    output: Output,
    *,
    job: str,
    schema: Mapping[str, pl.DataType],
    frames: Iterable[pl.DataFrame],
    new_columns: int,
    kind: str = "output",
) -> None:
    """Write the frames, whose last `new_columns` columns are added by enrich.

    Raises CommandRefused, and then the old file stays. `kind` is the file's key in the job file. Each kind has its own
    temporary file.
    """
    if kind == "output" and is_dataset(target):
        parquet_dataset.write_dataset(target, job, schema, frames)
        return
    with as_write_refused(target, kind), _open_target(target, job, kind) as raw, _gzipped(raw, target.name) as plain:
        match format_of(target.name):
            case "parquet":
                parquet_format.write(plain, schema, frames)
            case "xlsx":
                from enrich.files import excel_writer  # noqa: PLC0415 - its library is slow to import

                excel_writer.write(plain, list(schema), map(text_frame, frames))
            case "jsonl":
                jsonl_format.write(plain, list(schema), frames)
            case _:
                texts = (_csv_text(frame, new_columns) for frame in frames)
                csv_format.write(plain, list(schema), texts, output.separator, output.encoding)


@contextmanager
def _open_target(target: Location, job: str, kind: str) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes the target if the block ends without an error."""
    if isinstance(target, Path):
        target = follow_link(target)
        # The folder may have been removed during a long run.
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target, temporary_path(target, job, kind)) as raw:
            yield raw
        return
    with tempfile.TemporaryFile() as file:
        yield cast("BinaryIO", file)
        object_store.upload(target, cast("BinaryIO", file), kind)


@contextmanager
def _gzipped(raw: BinaryIO, name: str) -> Iterator[BinaryIO]:
    if not name.lower().endswith(".gz"):
        yield raw
        return
    # Store no name and no time, so that equal outputs are byte-identical.
    with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
        yield cast("BinaryIO", packed)


def _csv_text(frame: pl.DataFrame, new_columns: int) -> pl.DataFrame:
    text = frame.with_columns(as_text(column) for column in frame.get_columns() if column.dtype != pl.String)
    return text.with_columns(*escape_formulas(text.select(pl.nth(range(-new_columns, 0)))))


def is_formula(text: str) -> bool:
    """Check whether a spreadsheet would run a text as a formula."""
    return bool(escape_formulas(pl.DataFrame({"": [text]})).item() != text)


def escape_formulas(texts: pl.DataFrame) -> pl.DataFrame:
    """Prefix text that looks like a formula with `'`, so that no spreadsheet runs it."""
    may_run = texts.select_seq(pl.all().str.contains(_NO_LETTER).any())
    text = pl.nth([place for place, column in enumerate(may_run) if column.item()])
    is_safe = ~text.str.contains(_FORMULA) & (~text.str.contains(_SIGNED) | text.str.contains(_NUMBER_OR_PHONE))
    return texts.with_columns(pl.when(is_safe).then(text).otherwise("'" + text))

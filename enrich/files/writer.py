"""Writes the files of a run atomically, readable only by their owner, within the limits of their formats.

Input beyond the limits is refused when it is read, answers are shortened.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, cast

import polars as pl
from msgspec import Struct

from enrich.errors import UNWRITABLE_HINT, CommandRefused, JobError
from enrich.files import csv_format, excel_format, jsonl_format, object_store, parquet_dataset, parquet_format
from enrich.files.atomic import as_write_refused, atomic_write, follow_link
from enrich.files.input_files import find_paths
from enrich.files.text import FileProblem, quote_column
from enrich.files.values import as_text, text_frame
from enrich.job.local_files import is_same_file, make_folder
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
        make_folder(target.parent)
        temporary_path(target, job, kind).unlink(missing_ok=True)
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
        with suppress(FileNotFoundError):
            mode = target.stat().st_mode
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(mode) else "it is not a file")
    except OSError as error:
        raise CommandRefused(f"{target}: the {kind} cannot be written: {error.strerror}", UNWRITABLE_HINT) from error


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
            case "csv" | None:
                texts = (_csv_text(frame, new_columns) for frame in frames)
                csv_format.write(plain, list(schema), texts, output.separator, output.encoding)


@contextmanager
def _open_target(target: Location, job: str, kind: str) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes the target if the block ends without an error."""
    if isinstance(target, Path):
        target = follow_link(target)
        # The folder may have been removed during a long run.
        make_folder(target.parent)
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


_OTHER_FORMAT_HINT = "use an output that ends in .csv or .parquet"
_ENCODING_HINT = "set `encoding: utf-8` for the file to write"


class FileLimits(Struct, frozen=True):
    """The limits of one file. None: no limit. `name` is the file's key and path, for messages.

    `max_rows` does not count the header. `cell_length` counts a cell as the format does.
    """

    name: str
    encoding: str | None = None
    max_rows: int | None = None
    max_columns: int | None = None
    max_cell: int | None = None
    cell_length: Callable[[str], int] = len
    #: Whether a spreadsheet would run text in this file as a formula.
    runs_formulas: bool = False

    def check_columns(self, columns: Sequence[str], source: object) -> None:
        """Raise FileProblem, about the input `source`, if the file cannot have these columns."""
        if self.max_columns is not None and len(columns) > self.max_columns:
            message = f"{source}: {self.name} would have {len(columns):,} columns; a sheet has at most"
            raise FileProblem(f"{message} {self.max_columns:,}", _OTHER_FORMAT_HINT)
        for name in columns:
            if problem := self._cell_problem(name):
                self._refuse(f"{source}: the header", name, problem)

    def check_rows(self, frame: pl.DataFrame, first_position: int, source: object) -> None:
        """Raise FileProblem, about the input `source`, for the first cell of a frame of text that cannot be written."""
        if self.max_rows is not None and first_position + frame.height > self.max_rows:
            message = f"{source}: row {self.max_rows + 1:,}: {self.name} is a sheet, which has at most"
            raise FileProblem(f"{message} {self.max_rows:,} rows under its header", _OTHER_FORMAT_HINT)
        suspected = frame[:, self._columns_to_check(frame)]
        for row, cells in enumerate(suspected.iter_rows(), first_position + 1):
            for name, cell in zip(suspected.columns, cells, strict=True):
                if problem := self._cell_problem(cell):
                    self._refuse(f"{source}: row {row}", name, problem)

    def fit(self, cells: pl.Series) -> tuple[pl.Series, dict[int, str]]:
        """Cut text that is too long, and write `?` for what the encoding lacks. Also returns why, by changed cell."""
        if not self._columns_to_check(cells.to_frame()):
            return cells, {}
        texts, reasons = cells.to_list(), {}
        for index, text in enumerate(texts):
            if text is not None and self._cell_problem(text):
                texts[index], reasons[index] = self._fit_text(text)
        return pl.Series(cells.name, texts, pl.String), reasons

    def fit_answers(self, cells: Mapping[str, pl.Series]) -> dict[str, pl.Series]:
        """Make the new cells of some rows fit into the file, and add the reasons to the column `enrich_error`."""
        fitted, notes = dict(cells), dict[int, list[str]]()
        for name in self._columns_to_check(pl.DataFrame(cells)):
            fitted[name], reasons = self.fit(cells[name])
            for index, reason in reasons.items() if name != "enrich_error" else ():
                notes.setdefault(index, []).append(f"{name}: {reason}")
        if notes:
            errors = fitted["enrich_error"].to_list()
            for index, reasons_of_row in notes.items():
                errors[index] = "; ".join([*filter(None, [errors[index]]), *reasons_of_row])
            fitted["enrich_error"], _ = self.fit(pl.Series("enrich_error", errors, pl.String))
        return fitted

    def _columns_to_check(self, frame: pl.DataFrame) -> list[str]:
        """Return the columns of text that may have a cell that does not fit."""
        return [
            longest.name
            for longest in frame.select_seq(pl.col(pl.String).str.len_bytes().max())
            if (self.max_cell is not None and (longest.item() or 0) > self.max_cell)
            or (self.encoding is not None and not self._can_encode("".join(filter(None, frame[longest.name]))))
        ]

    def _can_encode(self, text: str) -> bool:
        """Check whether a text can be written and read back. Some encodings write two characters as the same bytes."""
        if self.encoding is None or (text.isascii() and _has_ascii(self.encoding)):
            return True
        try:
            return text.encode(self.encoding).decode(self.encoding) == text
        except UnicodeError:
            return False

    def _cell_problem(self, text: str) -> tuple[str, str] | None:
        """Return why a text cannot be a cell, and a hint. None: it can."""
        if self.max_cell is not None and len(text) * 2 > self.max_cell and self.cell_length(text) > self.max_cell:
            return f"a cell of {self.name} has at most {self.max_cell:,} characters", _OTHER_FORMAT_HINT
        if not self._can_encode(text):
            return (
                f"`{self.encoding}`, the encoding of {self.name}, cannot encode a character of this cell",
                _ENCODING_HINT,
            )
        return None

    def _fit_text(self, text: str) -> tuple[str, str]:
        reasons = []
        if not self._can_encode(text):
            text = "".join(letter if self._can_encode(letter) else "?" for letter in text)
            reasons.append(f"characters that {self.encoding} lacks are `?`")
        if self.max_cell is not None and self.cell_length(text) > self.max_cell:
            excess = self.cell_length(text) - self.max_cell
            text = text[: self.max_cell]
            while self.cell_length(text) > self.max_cell:
                text = text[: -max(1, (self.cell_length(text) - self.max_cell) // 2)]
            reasons.append(f"cut by {excess:,} to {self.max_cell:,} characters")
        return text, ", ".join(reasons)

    def _refuse(self, position: str, column: str, problem: tuple[str, str]) -> None:
        message, hint = problem
        raise FileProblem(f"{position}, column {quote_column(column)}: {message}", hint)


#: For a file that holds everything.
NO_LIMITS = FileLimits("")


def limits_of(kind: str, output: Output) -> FileLimits:
    """Return the limits of a file of the run. `kind` is its key in the job file."""
    name = f"the {kind} ({output.path})"
    match format_of(output.path):
        case "xlsx":
            return FileLimits(
                name,
                max_rows=excel_format.MAX_ROWS - 1,
                max_columns=excel_format.MAX_COLUMNS,
                max_cell=excel_format.MAX_CELL_CHARACTERS,
                cell_length=excel_format.cell_length,
            )
        case "csv":
            # Every Unicode encoding has all characters.
            encoding = None if codecs.lookup(output.encoding).name.startswith("utf") else output.encoding
            return FileLimits(name, encoding, max_cell=csv_format.MAX_CELL_CHARACTERS, runs_formulas=True)
        case "jsonl" | "parquet" | None:
            return FileLimits(name)


@cache
def _has_ascii(encoding: str) -> bool:
    """Check whether an encoding has all of ASCII, so that such text needs no test."""
    try:
        return all(sign.encode(encoding).decode(encoding) == sign for sign in map(chr, range(128)))
    except UnicodeError:
        return False

"""The input as one table: whatever its format, one file or several, here, in a storage or through a pipe."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import BinaryIO

import polars as pl

from enrich.errors import Refused
from enrich.place import STDIN, Place, Url, is_pattern
from enrich.spec import Input
from enrich.tables import csvfile, excel, jsonl, parquet, storage
from enrich.tables.cells import JSON
from enrich.tables.textfile import CALLED, TableFile, TableProblem

Schema = dict[str, pl.DataType]
_GZIP = b"\x1f\x8b"


class Source:
    """A table that can be read again and again; what is not a file of its own is copied to a private one once."""

    def __init__(self, where: Place, told: Input) -> None:
        """Find the files and read their headers. Raises Refused that names the very file and the remedy."""
        self._where = where
        self._told = told
        self._fetched: storage.Stamp | None = None
        with _refusing():
            self._files = self._find()
            self.schema = _common_schema(self._files)

    def stamp(self) -> object:
        """Return what is another when files were replaced, changed or added. None: the only one is gone."""
        if isinstance(self._where, Url):
            try:
                return storage.stamp(self._where)
            except Refused:  # the copy stands as long as nothing newer is known
                return self._fetched
        if self._where == STDIN:
            return True
        if is_pattern(self._where):
            return [(path, _identity(path)) for path in matching(self._where)]
        return _identity(self._where)

    def digest(self) -> str:
        """Hash the bytes of all files (SHA-256, hex)."""
        total = sha256()
        with _refusing():
            for file in self._files:
                try:
                    with file.path.open("rb") as raw:
                        total.update(file_digest(raw, "sha256").digest())
                except OSError as error:
                    raise TableProblem(f"{file} cannot be read: {error.strerror}") from None
        return total.hexdigest()

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows of all files in order, each column in its type. Raises Refused."""
        with _refusing():
            for file in self._files:
                yield from _batches(file, self.schema)

    def _find(self) -> list[TableFile]:
        where = self._where
        if isinstance(where, Url):
            with self._copy(where.name) as (path, into):
                self._fetched = storage.fetch(where, into)
            return [_file(path, self._told, str(where))]
        if where == STDIN:
            return [_file(self._received(), self._told, "standard input")]
        if not is_pattern(where):
            return [_file(where, self._told)]
        paths = matching(where)
        if not paths:
            raise TableProblem(f"{where}: no file matches", "check the pattern, which is relative to the job file")
        # What the ending says, each file says for itself: the pattern may be `leads/*`.
        said = self._told.model_dump(exclude_unset=True)
        files = [_file(path, Input.model_validate(said | {"path": str(path)})) for path in paths]
        for file in files:
            if file.format != files[0].format:
                hint = "narrow the pattern, or set `format`"
                raise TableProblem(f"{file} is {CALLED[file.format]}, but {files[0]} is not", hint)
        return files

    def _received(self) -> Path:
        """Copy what comes through the pipe: it is read more than once."""
        if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
            raise TableProblem("standard input is a terminal, or closed", "pipe the leads into it: cat FILE | enrich …")
        beginning = sys.stdin.buffer.read(len(_GZIP))
        with self._copy("stdin.gz" if beginning == _GZIP else "stdin") as (path, into):
            into.write(beginning)
            shutil.copyfileobj(sys.stdin.buffer, into, 1 << 20)
        return path

    @contextmanager
    def _copy(self, name: str) -> Iterator[tuple[Path, BinaryIO]]:
        """Make a file that only we can read and that goes when this object does, at the latest at exit."""
        folder = Path(tempfile.mkdtemp(prefix="enrich-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = folder / name
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as into:
                yield path, into
        except OSError as error:
            raise TableProblem(f"{path} cannot be written: {error.strerror}", "make room, or set TMPDIR") from None


def _file(path: Path, told: Input, called: str | None = None) -> TableFile:
    return TableFile(path, told.separator, told.encoding, told.format, told.sheet, called)


def matching(pattern: Path) -> list[Path]:
    """Return the files that match a pattern, sorted by their paths; hidden ones do not."""
    return sorted(path for path in map(Path, glob.glob(str(pattern))) if path.is_file())  # noqa: PTH207 - Path.glob finds hidden files


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except TableProblem as problem:
        raise Refused(problem.message, problem.hint) from problem


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _common_schema(files: list[TableFile]) -> Schema:
    """Return the columns that all files have; JSON Lines, which may leave out keys, have those of any."""
    first = files[0]
    schema = _schema(first)
    for file in files[1:]:
        other = _schema(file)
        if file.format == "jsonl":
            schema |= {name: kind for name, kind in other.items() if schema.get(name) != JSON}
        elif difference := _difference(list(schema.items()), list(other.items())):
            raise TableProblem(f"{file}: its header differs from that of {first}: {difference}", "make them equal")
    return schema


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


def _batches(file: TableFile, schema: Schema) -> Iterator[pl.DataFrame]:
    match file.format:
        case "csv":
            return csvfile.read_batches(file)
        case "xlsx":
            return excel.read_batches(file)
        case "jsonl":
            return jsonl.read_batches(file, schema)
        case "parquet":
            return parquet.read_batches(file)

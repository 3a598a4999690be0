"""Private copies of what is no file of its own: an object of a storage, or what comes through a pipe."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from enrich.place import Url
from enrich.tables import parquet, storage
from enrich.tables.finding import Leaf
from enrich.tables.textfile import TableFile, TableProblem

#: So many bytes of an object are fetched at once; what is smaller is fetched whole.
SMALL = 1 << 20
_GZIP = b"\x1f\x8b"


class Copies:
    """Holds the copy that was made last, for our eyes only; it goes when this object does, at the latest at exit."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        #: With what the object was when it was fetched.
        self._held: tuple[Url, Path, storage.Stamp] | None = None

    def file(self, leaf: Leaf) -> TableFile:
        """Return the file to read a leaf from. Raises TableProblem, and Refused for what a storage says."""
        if isinstance(leaf.where, Path):
            return leaf.file(leaf.where)
        if self._held is None or self._held[0] != leaf.where:
            self._drop()
            with self._new(leaf.where.name) as (path, into):
                stamp = storage.fetch(leaf.where, into)
            self._held = leaf.where, path, stamp
        _, path, stamp = self._held
        if leaf.stamp is not None and leaf.stamp != stamp:
            raise TableProblem(f"{leaf} changed since the run began", "start again when the files are complete")
        return leaf.file(path)

    def outline(self, leaf: Leaf) -> TableFile | None:
        """Return a file that says the columns of a leaf as the leaf does, and of Parquet the number of rows.

        Of an object little is fetched for it; None: it takes all of the object.
        """
        if isinstance(leaf.where, Path):
            return leaf.file(leaf.where)
        if leaf.stamp is None or (size := leaf.stamp[1]) <= SMALL:
            return None
        if leaf.told.format == "csv":
            with self._new("beginning" + ".gz" * leaf.where.name.lower().endswith(".gz")) as (path, into):
                into.write(storage.fetch_range(leaf.where, 0, SMALL))
            return leaf.file(path)
        length = None
        if leaf.told.format == "parquet":
            length = parquet.footer_length(storage.fetch_range(leaf.where, size - parquet.TAIL, parquet.TAIL))
        if length is None or length + parquet.TAIL > size:
            return None
        with self._new("outline.parquet") as (path, into):
            end = length + parquet.TAIL
            parquet.write_outline(into, size, storage.fetch_range(leaf.where, size - end, end))
        return leaf.file(path)

    def received(self) -> Path:
        """Copy what comes through the pipe: it is read more than once."""
        if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
            raise TableProblem("standard input is a terminal, or closed", "pipe the leads into it: cat FILE | enrich …")
        status = os.fstat(sys.stdin.fileno())
        if stat.S_ISCHR(status.st_mode) and not os.path.samestat(status, Path(os.devnull).stat()):
            raise TableProblem("standard input is a device", "pipe the leads into it: cat FILE | enrich …")
        beginning = sys.stdin.buffer.read(len(_GZIP))
        with self._new("stdin.gz" if beginning == _GZIP else "stdin") as (path, into):
            into.write(beginning)
            shutil.copyfileobj(sys.stdin.buffer, into, 1 << 20)
        return path

    def _drop(self) -> None:
        if self._held is not None:
            self._held[1].unlink(missing_ok=True)
            self._held = None

    @contextmanager
    def _new(self, name: str) -> Iterator[tuple[Path, BinaryIO]]:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="enrich-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / name
        path.unlink(missing_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as into:
                yield path, into
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise TableProblem(f"{path} cannot be written: {error.strerror}", "make room, or set TMPDIR") from None
            raise

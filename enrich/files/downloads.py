"""Makes private local copies of inputs that are not local files: storage objects, web addresses, standard input.

A copy of a killed process is removed by the next one that starts.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from enrich.files import object_store, parquet_format
from enrich.files.discovery import InputFile
from enrich.files.text import FileProblem, TableFile
from enrich.job.locations import ObjectUrl, WebUrl

#: Number of bytes downloaded to read a file's columns. A smaller object is downloaded completely.
HEAD_BYTES = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_PREFIX = "enrich-copies-"
#: A younger folder may belong to a process that has not locked it yet.
_MIN_AGE_S = 60.0


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a private folder (mode 0700) for copies of leads, and remove it at the end of the block."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_abandoned_folders(min_age_s: float = _MIN_AGE_S) -> None:
    """Remove this user's folders that no process has locked: those of killed processes."""
    with suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with suppress(OSError):
                _remove_if_abandoned(path, min_age_s)


#: The same, once for this process.
remove_abandoned_folders_once = cache(remove_abandoned_folders)


def _remove_if_abandoned(path: Path, min_age_s: float) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or time.time() - status.st_mtime < min_age_s:
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


class LocalCopies:
    """Keeps the latest copy, readable only by its owner. It is removed with this object, at the latest at exit."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        #: URL, local copy, and version of the object at the time of the download.
        self._current: tuple[ObjectUrl, Path, object_store.ObjectVersion] | None = None

    def table_file(self, file: InputFile) -> TableFile:
        """Return a local file with the content of an input file. Raises FileProblem, CommandRefused (storage)."""
        if isinstance(file.location, Path):
            return file.table_file(file.location)
        if self._current is None or self._current[0] != file.location:
            if self._current is not None:
                self._current[1].unlink(missing_ok=True)
                self._current = None
            with self._new_file(file.location.name) as (path, into):
                version = object_store.download(file.location, into)
            self._current = file.location, path, version
        _, path, version = self._current
        if file.version is not None and file.version != version:
            raise FileProblem(f"{file} changed since the run began", "start again when the files are complete")
        return file.table_file(path)

    def metadata_file(self, file: InputFile) -> TableFile | None:
        """Return a local file with the columns and, for Parquet, the row count of a file. None: all of it is needed."""
        if isinstance(file.location, Path):
            return file.table_file(file.location)
        if file.version is None or (size := file.version[1]) <= HEAD_BYTES:
            return None
        if file.settings.format == "csv":
            with self._new_file("beginning" + ".gz" * file.location.name.lower().endswith(".gz")) as (path, into):
                into.write(object_store.download_range(file.location, 0, HEAD_BYTES))
            return file.table_file(path)
        if file.settings.format != "parquet":
            return None
        tail = object_store.download_range(file.location, size - parquet_format.TAIL_BYTES, parquet_format.TAIL_BYTES)
        if (end := parquet_format.end_length(tail)) is None or end > size:
            return None
        with self._new_file("outline.parquet") as (path, into):
            parquet_format.write_footer_copy(into, size, object_store.download_range(file.location, size - end, end))
        return file.table_file(path)

    def copy_stdin(self) -> Path:
        """Copy standard input to a file, because the input is read more than once."""
        if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
            raise FileProblem("standard input is a terminal, or closed", "pipe the leads into it: cat FILE | enrich …")
        status = os.fstat(sys.stdin.fileno())
        if stat.S_ISCHR(status.st_mode) and not os.path.samestat(status, Path(os.devnull).stat()):
            raise FileProblem("standard input is a device", "pipe the leads into it: cat FILE | enrich …")
        beginning = sys.stdin.buffer.read(len(_GZIP_MAGIC))
        with self._new_file("stdin.gz" if beginning == _GZIP_MAGIC else "stdin") as (path, into):
            into.write(beginning)
            shutil.copyfileobj(sys.stdin.buffer, into, 1 << 20)
        return path

    def copy_web(self, url: WebUrl) -> Path:
        """Copy what a web address answers to a file. Raises CommandRefused."""
        from enrich.files import web_download  # noqa: PLC0415 - few inputs need an HTTP client

        with self._new_file("download") as (path, into):
            web_download.download(url, into)
        with path.open("rb") as file:
            is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        return path.rename(path.with_suffix(".gz")) if is_gzip else path

    @contextmanager
    def _new_file(self, name: str) -> Iterator[tuple[Path, BinaryIO]]:
        if self._folder is None:
            stack = ExitStack()
            self._folder = stack.enter_context(temporary_folder())
            weakref.finalize(self, stack.close)
        path = self._folder / name
        path.unlink(missing_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as into:
                yield path, into
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise FileProblem(
                    f"{path} cannot be written: {error.strerror}", "free some space, or set TMPDIR"
                ) from None
            raise

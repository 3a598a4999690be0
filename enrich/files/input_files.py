"""Finds the files of an input: one file, all matches of a pattern, or a folder. Copies those that are not local.

Storage objects, web addresses and standard input get a private local copy. A copy of a killed process is removed by the
next one that starts.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from msgspec import Struct
from msgspec.structs import replace

from enrich.files import object_store, parquet_format
from enrich.files.parquet_dataset import MANIFEST, read_manifest
from enrich.files.text import FORMAT_NAMES, FileProblem, TableFile
from enrich.job.local_files import is_leftover, is_visible, matches_key, why_no_file
from enrich.job.locations import Location, ObjectUrl, WebUrl, has_wildcards, is_pattern
from enrich.job.spec import Input

#: A folder name `COLUMN=VALUE`, as written by Hive, Spark and Polars: a column's value for all files in the folder.
_PARTITION = re.compile(r"([^=]+)=(.*)", re.DOTALL)
_ESCAPED_WILDCARD = re.compile(r"\[[*?\[]\]")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


class InputFile(Struct, frozen=True):
    """One file of the input: its location, its settings, and the column values in its folder names.

    `version` is the version of an object when it was found. It must be the same when the object is read.
    """

    location: Location
    settings: Input
    display_name: str | None = None
    partition_values: tuple[tuple[str, str | None], ...] = ()
    version: object_store.ObjectVersion | None = None

    def table_file(self, path: Path) -> TableFile:
        """Return the table file to read at `path`, which is a local copy in case of an object."""
        settings = self.settings
        return TableFile(path, settings.separator, settings.encoding, settings.format, settings.sheet, str(self))

    def __str__(self) -> str:
        return self.display_name or str(self.location)


def find_input_files(location: Location, settings: Input) -> list[InputFile]:
    """Find the files of an input. Raises FileProblem that names the file and the remedy."""
    if isinstance(location, ObjectUrl):
        found = [InputFile(url, settings, version=stamp) for url, stamp in find_objects(location).items()]
    else:
        if reason := why_no_file(location):
            raise FileProblem(f"{location}: {reason}", "choose another input")
        try:
            if location.exists() and not (location.is_file() or location.is_dir()):
                raise FileProblem(f"{location} is a pipe or a device, not a file", "pipe the leads in: --input -")
            found = [InputFile(path, settings) for path in find_paths(location)]
        except PermissionError as error:
            raise FileProblem(f"{error.filename} cannot be read by this user", "change its permissions") from None
    if [file.location for file in found] == [location]:
        return found
    if not found and is_pattern(location):
        raise FileProblem(f"{location}: no file matches", "check the pattern")
    if not found:
        raise FileProblem(f"{location} has no files in it", "hidden files and names that begin with `_` are ignored")
    return _check_consistent(
        [
            replace(
                file,
                partition_values=_partition_values(location, file.location),
                # With defaults from the file's own extension: the input's path may be a folder.
                settings=Input.model_validate(settings.model_dump(exclude_unset=True) | {"path": file.location.name}),
            )
            for file in found
        ]
    )


def find_paths(location: Path) -> list[Path]:
    """Return the files of a path, folder or pattern, sorted, without hidden ones. Raises FileProblem for a folder."""
    if is_pattern(location):
        matches = map(Path, glob.glob(str(location)))  # noqa: PTH207 - Path.glob also finds hidden files
        return sorted(path for path in matches if path.is_file() and not is_leftover(path.name))
    return sorted(_walk_folder(location)) if os.path.isdir(location) else [location]  # noqa: PTH112 - as in local_files


def _walk_folder(folder: Path) -> Iterator[Path]:
    def raise_problem(error: OSError) -> None:
        hint = "change its permissions"
        raise FileProblem(f"{error.filename} cannot be read: {error.strerror}", hint) from None

    for parent, folders, names in os.walk(folder, onerror=raise_problem):
        folders[:] = [name for name in folders if is_visible(name)]
        yield from (path for name in names if is_visible(name) and (path := Path(parent, name)).is_file())


def find_objects(url: ObjectUrl) -> dict[ObjectUrl, object_store.ObjectVersion | None]:
    """Return the objects of a URL by key, with versions (None: it is missing). Raises CommandRefused, FileProblem."""
    if not url.is_folder:
        version = object_store.object_version(url)
        if version is not None or not is_pattern(url):
            return {url: version}
    parts = url.key.split("/")
    folder = "".join(f"{part}/" for part in parts[: _fixed_part_count(parts)]) if is_pattern(url) else url.key
    listed = dict(object_store.list_objects(replace(url, key=folder)))
    found = {key: stamp for key, stamp in listed.items() if matches_key(url, key, folder)}
    if url.is_folder and folder + MANIFEST in listed:
        # Ignore parts that are not in the manifest. They belong to a writer that is running or was killed.
        manifest = read_manifest(object_store.read_object(replace(url, key=folder + MANIFEST)))
        if manifest is not None:
            named = {url.key + name for name in manifest.part_names}
            if missing := named - found.keys():
                raise FileProblem(f"{url} is incomplete, a part is missing: {min(missing)}", "write the dataset again")
            found = {key: found[key] for key in named}
    return {replace(url, key=key): found[key] for key in sorted(found, key=lambda key: key.split("/"))}


def _partition_values(location: Location, file_location: Location) -> tuple[tuple[str, str | None], ...]:
    """Return the column values in the folder names between the input's location and the file."""
    file_parts, location_parts = _path_parts(file_location), _path_parts(location)
    matches = (_PARTITION.fullmatch(part) for part in file_parts[_fixed_part_count(location_parts) : -1])
    try:
        pairs = [(_decode_percent(match[1]), _decode_percent(match[2])) for match in matches if match]
    except UnicodeError:
        message = f"{file_location}: the name of a folder is not text"
        raise FileProblem(message, "write it in UTF-8, also its percent codes, and without NUL") from None
    return tuple((name, None if value == _NULL_PARTITION else value) for name, value in pairs)


def _decode_percent(text: str) -> str:
    """Decode the percent codes. Raises UnicodeError for what is not UTF-8 text, and for NUL."""
    decoded = unquote(text, errors="strict")
    if b"\0" in decoded.encode():
        raise UnicodeError
    return decoded


def _path_parts(location: Location) -> Sequence[str]:
    return location.parts if isinstance(location, Path) else location.key.rstrip("/").split("/")


def _fixed_part_count(parts: Sequence[str]) -> int:
    """Count the path parts before the first pattern. An escaped wildcard, such as `[*]`, is not a pattern."""
    return next(
        (place for place, part in enumerate(parts) if has_wildcards(_ESCAPED_WILDCARD.sub("", part))), len(parts)
    )


def _check_consistent(input_files: list[InputFile]) -> list[InputFile]:
    first = input_files[0]
    for file in input_files:
        if file.settings.format != first.settings.format:
            hint = "keep files of one format together, or set `format`"
            raise FileProblem(f"{file} is {FORMAT_NAMES[file.settings.format]}, but {first} is not", hint)
        names = [name for name, _ in file.partition_values]
        if len(set(names)) < len(names):
            raise FileProblem(
                f"{file}: its folders have a column twice: {_partition_names(names)}", "rename one of them"
            )
        if names != [name for name, _ in first.partition_values]:
            message = (
                f"{file}: its folders name {_partition_names(names)}, "
                f"those of {first} {_partition_names([n for n, _ in first.partition_values])}"
            )
            raise FileProblem(message, "use the same columns in the same order in all folder names")
    return input_files


def _partition_names(names: list[str]) -> str:
    return " / ".join(f"`{name}=`" for name in names) or "no column"


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

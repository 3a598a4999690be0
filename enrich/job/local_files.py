"""Local files: which names are possible, which are one file, what a folder or pattern includes; reads small ones."""

from __future__ import annotations

import errno
import os
import re
import select
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from enrich.errors import closest_name
from enrich.job.locations import STDIN, InputLocation, LedgerLocation, Location, ObjectUrl, is_dataset, is_pattern

#: How many bytes the names of files beside a ledger are longer than its own: its lock, its journals, the sandbox's.
_LEDGER_SUFFIX_BYTES = 24
#: The name of a folder that a shell would replace. A new folder of this name would be a mistake.
_SHELL_NAME = re.compile(r"~[\w.-]*|\$\w+|\$\{\w+\}")
#: The bytes that a job's name has at most: it is a part of the names of temporary files.
MAX_JOB_NAME_BYTES = 200


def real_path(path: Path) -> Path:
    """Follow the links of a path as far as they lead. `Path.resolve` raises RuntimeError for a loop of links."""
    return Path(os.path.realpath(path))


def is_same_file(one: InputLocation | LedgerLocation, other: InputLocation | LedgerLocation) -> bool:
    """Check whether two locations are the same file, also through links."""
    if isinstance(one, Path) and isinstance(other, Path):
        with suppress(OSError):  # one of them is missing or not accessible
            return one.samefile(other)
        return real_path(one) == real_path(other)
    return one == other


def why_no_file(location: InputLocation) -> str | None:
    """Return why no file can have this name: it is too long, a loop of links, or meant for a shell. None: one can."""
    if isinstance(location, Path):
        try:
            os.stat(location)  # noqa: PTH116 - as short as Path.stat
        except ValueError:
            return "it has a null character"
        except OSError as error:
            if error.errno == errno.ELOOP:
                return "its links lead in a circle"
            if error.errno == errno.ENAMETOOLONG:
                return "its name is too long"
            for folder in location.parents:
                if _SHELL_NAME.fullmatch(folder.name) and not os.path.lexists(folder):
                    return f"`{folder.name}` is for a shell only: write the whole path"
    return None


def why_no_ledger(location: LedgerLocation) -> str | None:
    """Return why a ledger, its lock and its journals cannot have this name: it is too long."""
    if isinstance(location, Path) and location.name:
        return why_no_file(location.with_name(location.name + "x" * _LEDGER_SUFFIX_BYTES))
    return None


def is_missing(path: Path) -> bool:
    """Check whether a file could be at a path, and is not. False if this user has no permission to check."""
    if path == STDIN or why_no_file(path) is not None:
        return False
    try:
        path.stat()  # from Python 3.14 on, Path.exists is False without permission to check
    except OSError as error:
        return not isinstance(error, PermissionError)
    return False


_LEFTOVERS = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
#: The name of a file in an output folder.
_PART = "part-0000000000-00000000.parquet"


def missing_file_hint(path: Path, written: str, folder: Path) -> str:
    """Return a hint about a missing file. `written` is its path in the job file, relative to `folder`."""
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, which is missing"
    if (from_here := Path.cwd() / written).exists():
        return f"a path in the job file is relative to that file: write {os.path.relpath(from_here, folder)}"
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    if (closest := closest_name(path.name, names)) is not None:
        return f"did you mean {os.path.relpath(path.with_name(closest), folder)}? It is relative to the job file"
    return "check the path; it is relative to the job file"


def inclusion_problem(location: InputLocation, target: InputLocation, kind: str) -> tuple[str, str] | None:
    """Return the problem of a file to write that the input would include, with a hint. None: it would not."""
    is_folder = kind == "output" and isinstance(target, Location) and is_dataset(target)
    if not _would_include(location, target, is_folder=is_folder):
        return None
    pattern_hint = f", or a narrower pattern than {location.name}" if is_pattern(location) else ""
    return f"{target}: the {kind} would be read as input by the next run", f"choose another `{kind}`{pattern_hint}"


def _would_include(location: InputLocation, target: InputLocation, *, is_folder: bool) -> bool:
    """Check whether a folder or pattern would include a file, or those in a folder, which need not exist yet."""
    if isinstance(location, ObjectUrl) and isinstance(target, ObjectUrl):
        key = target.key + _PART if is_folder else target.key
        same_bucket = (target.scheme, target.bucket) == (location.scheme, location.bucket)
        return same_bucket and (location.is_folder or is_pattern(location)) and matches_key(location, key, location.key)
    if not isinstance(location, Path) or not isinstance(target, Path):
        return False
    file = target / _PART if is_folder else target
    # The target may be a link, which is read as the file that it leads to.
    places = (real_path(file), real_path(file.parent) / file.name)
    if is_pattern(location):
        return any(_matches_parts(place.parts, location.parts) for place in (file, *places))
    folder = real_path(location)
    return os.path.isdir(location) and any(  # noqa: PTH112 - Path.is_dir raises PermissionError
        place.is_relative_to(folder) and all(map(is_visible, place.relative_to(folder).parts)) for place in places
    )


def matches_key(url: ObjectUrl, key: str, folder: str) -> bool:
    """Check whether an object is in a folder or matches a pattern, and is visible."""
    if url.is_folder:
        return key.startswith(folder) and not key.endswith("/") and all(map(is_visible, key[len(folder) :].split("/")))
    return _matches_parts(key.split("/"), url.key.split("/"))


def _matches_parts(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Check whether a path matches a pattern, part by part. `*` matches no hidden name, as in a shell."""
    return (
        len(parts) == len(patterns)
        and not is_leftover(parts[-1])
        and all(
            fnmatchcase(part, sign) and (sign.startswith(".") or not part.startswith("."))
            for part, sign in zip(parts, patterns, strict=True)
        )
    )


def is_visible(name: str) -> bool:
    """Check whether a file or folder in the folder of an input is read."""
    return not name.startswith((".", "_")) and not is_leftover(name)


def is_leftover(name: str) -> bool:
    """Check whether a file is what Windows, macOS or Excel leave in a folder. `~$` marks a workbook that is open."""
    return name.startswith("~$") or name.lower() in _LEFTOVERS


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Create a folder and its parents, if they are missing. Raises OSError; for a file of this name ENOTDIR."""
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is not a folder") from None


#: Default size limit in bytes. Key files, job files, plans and address lists are far smaller.
MAX_BYTES = 1 << 20
PIPE_TIMEOUT_S = 10.0


def read_bounded(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file or a pipe. Raises OSError, with the reason in `strerror`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.isatty(descriptor):
            raise OSError(errno.EINVAL, "it is a terminal")
        if stat.S_ISCHR(status.st_mode):  # such as /dev/zero
            max_bytes = min(max_bytes, MAX_BYTES)
        content = bytearray()
        deadline = time.monotonic() + PIPE_TIMEOUT_S
        while chunk := _read_chunk(descriptor, max_bytes + 1 - len(content), deadline):
            content += chunk
            if len(content) > max_bytes:
                raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes")
        if not content and stat.S_ISFIFO(status.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe without a writer")
        return bytes(content)
    finally:
        os.close(descriptor)


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark. Raises OSError, UnicodeDecodeError."""
    return read_bounded(path).decode("utf-8-sig")


def _read_chunk(descriptor: int, size: int, deadline: float) -> bytes:
    while True:
        try:
            return os.read(descriptor, min(size, MAX_BYTES))
        except BlockingIOError:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(errno.ETIMEDOUT, "it is a pipe that does not end") from None

"""Compares local files by their names, and says of a name that it can be none."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from enrich.job.locations import STDIN, InputLocation, LedgerLocation

#: How many bytes the names of files beside a ledger are longer than its own: its lock, its journals, the sandbox's.
_LEDGER_SUFFIX_BYTES = 24
#: The bytes that a job's name has at most: it is a part of the names of temporary files.
MAX_JOB_NAME_BYTES = 200


def real_path(path: Path) -> Path:
    """Follow the links of a path as far as they lead. `Path.resolve` raises RuntimeError for a loop of links."""
    return Path(os.path.realpath(path))


def is_same_file(one: InputLocation, other: InputLocation) -> bool:
    """Check whether two locations are the same file, also through links."""
    if isinstance(one, Path) and isinstance(other, Path):
        with suppress(OSError):  # one of them is missing or not accessible
            return one.samefile(other)
        return real_path(one) == real_path(other)
    return one == other


def why_no_file(location: InputLocation) -> str | None:
    """Return why no file can have this name: it is too long, or a loop of links. None: one can."""
    if isinstance(location, Path):
        try:
            os.stat(location)  # noqa: PTH116 - as short as Path.stat
        except OSError as error:
            if error.errno == errno.ELOOP:
                return "its links lead in a circle"
            if error.errno == errno.ENAMETOOLONG:
                return "its name is too long"
    return None


def why_no_ledger(location: LedgerLocation) -> str | None:
    """Return why a ledger, its lock and its journals cannot have this name: it is too long."""
    if isinstance(location, Path) and location.name:
        return why_no_file(location.with_name(location.name + "x" * _LEDGER_SUFFIX_BYTES))
    return None


def is_missing(path: Path) -> bool:
    """Check whether a file could be at a path, and is not."""
    return path != STDIN and why_no_file(path) is None and not path.exists()

"""Private folders for copies of leads. A folder of a killed process is removed by the next one that starts."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

_PREFIX = "enrich-copies-"
#: A younger folder may belong to a process that has not locked it yet.
_MIN_AGE_S = 60.0


def make_folder() -> tuple[Path, int]:
    """Make a folder (mode 0700). Returns it and the descriptor of its lock, to be given to `remove_folder`."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return folder, descriptor


def remove_folder(folder: Path, descriptor: int) -> None:
    """Remove a folder with everything in it."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for the duration of the block."""
    folder, descriptor = make_folder()
    try:
        yield folder
    finally:
        remove_folder(folder, descriptor)


def sweep(min_age_s: float = _MIN_AGE_S) -> None:
    """Remove this user's folders that no living process has locked."""
    with suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with suppress(OSError):
                _remove_if_abandoned(path, min_age_s)


#: Once for this process.
sweep_once = cache(sweep)


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

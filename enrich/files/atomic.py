"""Writes files atomically, readable only by their owner. Write errors carry a hint on how to recover."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import polars as pl

from enrich.errors import CommandRefused
from enrich.job.local_files import make_folder
from enrich.job.locations import Location

COLLECT_HINT = "the ledger has the results: `enrich collect JOB` writes them for free"
_RERUN_HINT = "the ledger has the results: the next run writes the file, and sends nothing again for it"
#: How to get a file of the run that was not written, by its key in the job file: `collect` writes the output alone.
_RECOVERY_HINTS = {"output": COLLECT_HINT, "rejects": _RERUN_HINT, "changes": _RERUN_HINT}
#: The disk, a quota or the limit of a process (`ulimit -f`) allows no more.
NO_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def recovery_hint(remedy: str | None, kind: str) -> str | None:
    """Add to a remedy how to get the file then. `kind` is the file's key in the job file."""
    return "; ".join(filter(None, (remedy, _RECOVERY_HINTS.get(kind)))) or None


class WriteProblem(CommandRefused):
    """Why a file cannot be written. The caller adds which file."""


@contextmanager
def as_write_refused(target: Location, kind: str) -> Iterator[None]:
    """Convert errors while writing a file of the run into CommandRefused. `kind` is the file's key in the job file."""
    try:
        yield
    except WriteProblem as problem:
        raise CommandRefused(f"{target}: {problem.message}", problem.hint) from problem
    except (OSError, pl.exceptions.ComputeError) as error:  # polars' sink reports disk errors as ComputeError
        needs_space = not isinstance(error, OSError) or error.errno in NO_SPACE_ERRORS
        hint = recovery_hint("free some space" if needs_space else "check its folder", kind)
        reason = getattr(error, "strerror", None) or error
        raise CommandRefused(f"{target}: the {kind} cannot be written: {reason}", hint) from error


def follow_link(target: Path) -> Path:
    """Return the file or folder that a link leads to, which is replaced instead of the link."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


@contextmanager
def atomic_write(target: Path, temporary: Path) -> Iterator[BinaryIO]:
    """Open a new temporary file that replaces the target if the block ends without an error."""
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        with os.fdopen(descriptor, "w+b") as raw:
            os.fchmod(raw.fileno(), 0o600)  # whatever the umask is
            yield raw
            raw.flush()
            os.fsync(raw.fileno())
            if not os.path.samestat(os.fstat(raw.fileno()), temporary.stat()):
                raise FileExistsError(errno.EEXIST, f"another run of a job with this name writes {temporary}")
            temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_dir(target.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file (mode 0600) atomically, also while other processes do the same. Raises OSError.

    The target of a link is replaced, not the link. Missing folders are made.
    """
    path = follow_link(path)
    make_folder(path.parent)
    with atomic_write(path, path.with_name(f".enrich.{uuid4().hex}")) as file:
        file.write(content)


def fsync_dir(folder: Path) -> None:
    """Sync a folder to disk, if it may be listed, so that changes of its files survive a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

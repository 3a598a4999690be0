"""Files that appear whole or not at all, readable by their owner only; what goes wrong is told with the way out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import polars as pl

from enrich.errors import CommandRefused
from enrich.files.text import FileProblem
from enrich.job.locations import Location

COLLECT_HINT = "the ledger has the answers: `enrich collect` writes them without paying"
_SPACE_HINT = f"make room for it; {COLLECT_HINT}"


@contextmanager
def as_write_refused(target: Location, kind: str) -> Iterator[None]:
    """Turn what fails while a file of the run is written into Refused; `kind` is its key of the job file."""
    try:
        yield
    except FileProblem as problem:
        raise CommandRefused(f"{target}: {problem.message}", problem.hint) from problem
    except OSError as error:
        raise CommandRefused(
            f"{target}: the {kind} cannot be written: {error.strerror or error}", _SPACE_HINT
        ) from error
    except pl.exceptions.ComputeError as error:
        # What the disk says comes out of polars' sink as this.
        raise CommandRefused(f"{target}: the {kind} cannot be written: {error}", _SPACE_HINT) from error


@contextmanager
def atomic_write(target: Path, temporary: Path) -> Iterator[BinaryIO]:
    """Open a new file, which takes the target's place when the block ends well."""
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        with os.fdopen(descriptor, "w+b") as raw:
            yield raw
            raw.flush()
            os.fsync(raw.fileno())
            if not os.path.samestat(os.fstat(raw.fileno()), temporary.stat()):
                raise FileExistsError(17, f"another run of a job of this name writes {temporary}")
            temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_dir(target.parent)


def fsync_dir(folder: Path) -> None:
    """Let what was made, renamed or removed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

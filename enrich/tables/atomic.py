"""Files that appear whole or not at all, readable by their owner only; what goes wrong is told with the way out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import polars as pl

from enrich.errors import Refused
from enrich.place import Place
from enrich.tables.textfile import TableProblem

AGAIN = "the ledger has the answers: `enrich collect` writes them without paying"
_LATER = f"make room for it; {AGAIN}"


@contextmanager
def telling(target: Place, kind: str) -> Iterator[None]:
    """Turn what fails while a file of the run is written into Refused; `kind` is its key of the job file."""
    try:
        yield
    except TableProblem as problem:
        raise Refused(f"{target}: {problem.message}", problem.hint) from problem
    except OSError as error:
        raise Refused(f"{target}: the {kind} cannot be written: {error.strerror or error}", _LATER) from error
    except pl.exceptions.ComputeError as error:
        # What the disk says comes out of polars' sink as this.
        raise Refused(f"{target}: the {kind} cannot be written: {error}", _LATER) from error


@contextmanager
def growing(target: Path, part: Path) -> Iterator[BinaryIO]:
    """Open a new file, which takes the target's place when the block ends well."""
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        with os.fdopen(descriptor, "w+b") as raw:
            yield raw
            raw.flush()
            os.fsync(raw.fileno())
            if not os.path.samestat(os.fstat(raw.fileno()), part.stat()):
                raise FileExistsError(17, f"another run of a job of this name writes {part}")
            part.replace(target)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    keep_names(target.parent)


def keep_names(folder: Path) -> None:
    """Let what was made, renamed or removed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

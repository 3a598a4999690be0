"""The files of a job: which a run reads and writes, whether it may, and whether they are each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from itertools import combinations
from pathlib import Path

from enrich.errors import EnrichError, JobError, Refused
from enrich.job import Job


def written(job: Job, now: datetime) -> dict[str, Path]:
    """The files that a run writes, by their key in the job file."""
    model = job.model
    named = {"rejects": model.rejects and model.rejects.path, "changes": model.changes and model.changes.path}
    paths = {"output": job.output_path(now), "ledger": job.ledger_path}
    paths |= {key: job.path(path, now) for key, path in named.items() if path}
    return paths | ({"metrics": job.path(model.metrics)} if model.metrics else {})


def read_files(job: Job) -> dict[str, Path]:
    """The files that a run reads, by their key in the job file."""
    paths = {"the job file": job.document.path.resolve(), "input": job.input_path}
    optional = {"suppress": job.model.suppress, "notify": job.model.notify}
    return paths | {key: job.path(path) for key, path in optional.items() if path}


def clashes(job: Job) -> Iterator[EnrichError]:
    """Yield what is wrong with the places of a job's files; the input is read elsewhere."""
    now = datetime.now().astimezone()
    outgoing, incoming = written(job, now), read_files(job)
    for (one, path), (other, same) in combinations((outgoing | incoming).items(), 2):
        if one in outgoing and _is_same(path, same):
            yield JobError(f"{path}: `{one}` and `{other}` are the same file", f"choose another `{one}`")
    for key, path in outgoing.items():
        if reason := _unwritable(path):
            yield Refused(f"{path}: `{key}` cannot be written: {reason}", "mend the rights, or choose another folder")
    if _is_seen(job.ledger_path) and not os.access(job.ledger_path, os.R_OK | os.W_OK):
        yield Refused(f"{job.ledger_path}: this user may not write the ledger", "run as its owner, or mend the rights")
    for key, path in incoming.items():
        if key not in ("input", "the job file") and (not os.access(path, os.R_OK) or path.is_dir()):
            yield Refused(f"{path}: `{key}` cannot be read", "make it, or leave the key out")
    if _is_database(outgoing["output"]):
        yield JobError(f"{outgoing['output']}: the output would replace a ledger", "choose another `output`")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)
    except OSError:  # one of them is not there, or not to be seen
        return False


def _is_database(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Tell whether a file is there. Raises Refused where this user may not look."""
    try:
        return path.exists()
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}", "mend the rights of its folder, or run as its owner") from error


def existing(path: Path) -> Path:
    """Return the nearest part of a path that this user can see."""
    return next(each for each in (path, *path.parents) if _is_seen(each))


def _is_seen(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - false, too, where this user may not look


def _unwritable(path: Path) -> str | None:
    try:
        if path.is_dir():
            return "it is a folder"
        folder = existing(path.parent)
        if not folder.is_dir():
            return f"{folder} is no folder"
        return None if os.access(folder, os.W_OK | os.X_OK) else f"no right to write in {folder}"
    except OSError as error:
        return error.strerror or str(error)

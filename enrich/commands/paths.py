"""The local files that a run of a job reads and writes: their permissions and conflicts between them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from enrich.commands.report import is_report
from enrich.errors import UNWRITABLE_HINT, CommandRefused, EnrichError, JobError
from enrich.files.input_files import find_paths
from enrich.files.parquet_dataset import check_own_folder
from enrich.files.text import FileProblem
from enrich.files.writer import is_sqlite_file
from enrich.job.job import Job
from enrich.job.local_files import is_same_file
from enrich.job.locations import STDIN, is_dataset
from enrich.ledger.file_identity import check_has_one_name, ledger_file_exists


def absolute_path(path: Path) -> Path:
    """Return an absolute path without `..`, which systemd does not accept. Links stay where there is none."""
    return path.parent.resolve() / path.name if ".." in path.parts else path.absolute()


def files_written(job: Job, now: datetime) -> dict[str, Path]:
    """Return the local files that a run writes, by their key in the job file. Raises JobError if two are the same."""
    files = job.file_locations(now)
    keys = ("output", "ledger", "rejects", "changes", "report", "metrics")
    return {key: path for key in keys if isinstance(path := files.get(key), Path)}


def local_input_files(job: Job) -> list[Path]:
    """Return the local input files. Empty for object storage, a pipe and a folder that cannot be read."""
    location = job.input_path
    try:
        return find_paths(location) if isinstance(location, Path) and location != STDIN else []
    except FileProblem:
        return []


def files_read(job: Job) -> dict[str, Path]:
    """Return the local files that a run reads, by their key in the job file."""
    found = local_input_files(job)
    numbered = {"input" if len(found) == 1 else f"input {number}": path for number, path in enumerate(found, 1)}
    optional = {"suppress": job.model.suppress, "notify": job.model.notify}
    return {"the job file": job.document.path.resolve(), **numbered} | {
        key: job.resolve_path(path) for key, path in optional.items() if path
    }


def path_problems(job: Job) -> Iterator[EnrichError]:
    """Yield the problems with the paths of a job. The content of the input is not checked here."""
    try:
        outgoing, incoming = files_written(job, datetime.now().astimezone()), files_read(job)
    except JobError as error:
        yield error
        return
    several = {key: path for key, path in incoming.items() if key.startswith("input ")}
    for one, path in outgoing.items():  # the files of a folder or pattern; all others are compared above
        for other in (other for other, same in several.items() if is_same_file(path, same)):
            yield JobError(f"{path}: `{one}` and `{other}` are the same file", f"choose another `{one}`")
    for key, path in outgoing.items():
        if reason := _why_not_writable(path, may_be_folder=key == "output" and is_dataset(path)):
            yield CommandRefused(f"{path}: `{key}` cannot be written: {reason}", UNWRITABLE_HINT)
    if isinstance(job.ledger, Path):
        yield from _ledger_problems(job.ledger)
    for key, path in incoming.items():
        if key == "notify" and (not os.access(path, os.R_OK) or path.is_dir()):
            yield CommandRefused(f"{path}: `{key}` cannot be read", f"create it, or remove `{key}` from the job file")
    yield from _overwrite_problems(outgoing)


def _ledger_problems(ledger: Path) -> Iterator[EnrichError]:
    """Yield why a ledger cannot be written, or must not be."""
    try:
        if not ledger_file_exists(ledger):
            return
        check_has_one_name(ledger)
    except CommandRefused as refusal:
        yield refusal
    if _is_visible(ledger) and not os.access(ledger, os.R_OK | os.W_OK):
        yield CommandRefused(
            f"{ledger}: this user cannot write the ledger", "run as its owner, or change its permissions"
        )


def _overwrite_problems(outgoing: Mapping[str, Path]) -> Iterator[EnrichError]:
    """Yield a problem for each file that a run would replace but must not."""
    output, report = outgoing.get("output"), outgoing.get("report")
    with suppress(OSError):  # a file that cannot be read cannot be written either
        if output is not None and is_sqlite_file(output):
            yield JobError(f"{output}: the output would replace a ledger", "choose another `output`")
    if output is not None and is_dataset(output) and output.is_dir():
        with suppress(OSError):
            try:
                check_own_folder(output)
            except JobError as error:
                yield error
    with suppress(OSError):
        if report is not None and report.exists() and not is_report(report):
            yield JobError(f"{report} exists and is not a report of enrich", "choose another `report`")


def nearest_existing(path: Path) -> Path:
    """Return the path or its nearest parent that exists and is visible to this user."""
    return next(each for each in (path, *path.parents) if _is_visible(each))


def _is_visible(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - also False without permission to check


def _why_not_writable(path: Path, *, may_be_folder: bool) -> str | None:
    try:
        if path.is_dir() and not may_be_folder:
            return "it is a folder"
        if may_be_folder and path.is_file():
            return "it is a file, not a folder"
        folder = nearest_existing(path.parent)
        if not folder.is_dir():
            return f"{folder} is no folder"
        return None if os.access(folder, os.W_OK | os.X_OK) else f"no permission to write in {folder}"
    except OSError as error:
        return error.strerror or str(error)

"""Keeps a sandbox run from replacing a file that a real run wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from enrich.errors import CommandRefused
from enrich.job.job import Job
from enrich.job.locations import Location, sandbox_file_name
from enrich.ledger import execution_records
from enrich.ledger.database import try_read
from enrich.ledger.neighbours import find_ledger_files
from enrich.run.earlier_output import has_real_tasks


def with_own_output(job: Job, now: datetime) -> tuple[Job, str | None]:
    """Return the job with an output that replaces no real one, and a note when that differs from `--output`.

    Raises CommandRefused when a real run wrote a file under the sandbox run's own name.
    """
    if not job.sandbox:
        return job, None
    note = None
    given = job.output_path(now)
    if job.output_is_given and is_written_by_run(job, given):
        own_name = job.output.model_copy(update={"path": sandbox_file_name(job.output.path)})
        job = replace(job, output=own_name)
        note = f"{given} was written by a real run, so the sandbox writes {job.output_path(now)}"
    files: Mapping[str, Location] = {"output": job.output_path(now), **job.extra_output_paths(now)}
    for kind, location in files.items():
        if is_written_by_run(job, location):
            message = f"{location}: the {kind} of the sandbox would replace a file of a real run"
            raise CommandRefused(message, "move that file, or choose another name")
    return job, note


def is_written_by_run(job: Job, location: Location) -> bool:
    """Check whether a real run has written a file, or the file holds tasks that the sandbox did not issue."""
    folder = job.ledger.parent if isinstance(job.ledger, Path) else job.ledger.local_folder
    return has_real_tasks(job, location) or any(
        try_read(ledger, lambda db: execution_records.has_written(db, str(location)))
        for ledger in find_ledger_files(folder)
    )

"""Makes the paths of a report relative, so that the page can be shared and its commands can be copied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from enrich.job.job import Job
from enrich.report.data import Report


def with_relative_paths(report: Report, job: Job, now: datetime, folder: Path) -> Report:
    """Return the report with paths relative to `folder` if the job file is in it, else to that of the job file."""
    job_file = Path(os.path.abspath(job.document.path))  # noqa: PTH100 - without `..`, but with symbolic links
    is_inside = folder != Path(folder.anchor) and folder in job_file.parents
    relative = _relative_paths(job, now, folder if is_inside else job_file.parent)

    def shorten(text: str) -> str:
        for path, short in relative.items():
            text = text.replace(path, short)
        return text

    return replace(
        report,
        job_file=shorten(str(job_file)),
        input=shorten(report.input),
        output=shorten(report.output),
        ledger=shorten(report.ledger),
        actions=[
            replace(action, text=shorten(action.text), commands=tuple(map(shorten, action.commands)))
            for action in report.actions
        ],
        notes=[shorten(note) for note in report.notes],
    )


def _relative_paths(job: Job, now: datetime, base: Path) -> Mapping[str, str]:
    """Return the local paths of the job with their relative forms, the longest first, and the folder itself."""
    named = [job.document.path, job.input_path, job.ledger, *job.file_locations(now).values()]
    paths = {path.absolute() for path in named if isinstance(path, Path)}
    paths |= {path.resolve() for path in paths}
    relative = {str(path): os.path.relpath(path, base) for path in paths} | {f"{base}{os.sep}": ""}
    return dict(sorted(relative.items(), key=lambda pair: -len(pair[0])))

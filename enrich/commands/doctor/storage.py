"""Checks that the objects of a job can be reached with cron's credentials. Reads no object."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from enrich.commands.doctor.checks import Finding
from enrich.errors import CommandRefused, EnrichError
from enrich.files import object_store
from enrich.files.discovery import find_objects
from enrich.job.job import Job
from enrich.job.locations import InputLocation, ObjectUrl


def storage_findings(job: Job, next_run: datetime) -> Iterator[Finding]:
    """Check the job's objects in object storage, with the variables of this process, which are cron's."""
    files: dict[str, InputLocation] = {"input": job.input_path, "output": job.output_path(next_run)}
    urls = {key: url for key, url in (files | job.extra_output_paths(next_run)).items() if isinstance(url, ObjectUrl)}
    for key, url in urls.items():
        try:
            _check_access(key, url)
        except EnrichError as error:
            remedies = (error.hint, "variables must be in the crontab: pass each with --env NAME")
            remedy = "; ".join(filter(None, remedies))
            yield Finding("fail", "storage", error.message, remedy, error.exit_code)
        else:
            yield Finding("ok", "storage", f"{url} can be reached with cron's environment")


def _check_access(key: str, url: ObjectUrl) -> None:
    """Raise CommandRefused if the object, or its bucket if it is not the input, cannot be reached."""
    if key != "input":
        object_store.check_bucket(url)
        return
    if not any(find_objects(url).values()):
        raise CommandRefused(f"{url} does not exist", "check the URL")

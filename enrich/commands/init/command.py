"""`enrich init`: from a CSV and a waterfall to a job file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from enrich.commands.init.column_matching import count_matched_params
from enrich.commands.init.sample import Sample
from enrich.commands.init.template import JobDraft, render_job_file
from enrich.databar.waterfall import Waterfall
from enrich.errors import CommandRefused, JobError
from enrich.job.job import suggest_name
from enrich.job.spec import json_schema


def draft_job(sample: Sample, available: Sequence[Waterfall], identifier: str, source: str, target: Path | None) -> str:
    """Write the text of a job file that will lie at `target`, None: in the working directory.

    Raises JobError when the waterfall is not on offer.
    """
    waterfall = next((each for each in available if each.identifier == identifier), None)
    if waterfall is None:
        hint = suggest_name(identifier, [each.identifier for each in available])
        raise JobError(f"--waterfall: there is no `{identifier}`, says {source}", hint)
    job_folder = target.resolve().parent if target else Path.cwd()
    leads = sample.format.path
    stem = leads.name.removesuffix(".gz").rsplit(".", 1)[0]
    return render_job_file(
        JobDraft(
            sample,
            waterfall,
            source,
            input=_path_in_job_file(leads, job_folder),
            output=f"{stem}_enriched.csv".replace("%", "%%"),
            schema="schema.json" if _is_our_schema(job_folder / "schema.json") else None,
        )
    )


def _path_in_job_file(path: Path, job_folder: Path) -> str:
    """Write a path as the job file reads it; from far away the absolute one is clearer."""
    relative = os.path.relpath(path.absolute(), job_folder)
    return relative if relative.count("..") <= 1 else str(path.absolute())


def _is_our_schema(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == json_schema())
    except (OSError, ValueError):
        return False


def write_new_file(text: str, target: Path, *, force: bool) -> None:
    """Write a file (0600). Raises JobError when there is one already, unless `force`; Refused when it cannot be."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if force:
            target.unlink(missing_ok=True)
        descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise JobError(f"{target}: there is a file of this name already", "-o another name, or --force") from None
    except OSError as error:
        raise CommandRefused(f"{target}: cannot be written: {error.strerror or error}") from error


def rank_waterfalls(available: Sequence[Waterfall], sample: Sample) -> Iterator[str]:
    """Tell how well each waterfall fits the columns, the best first."""
    rated = [(count_matched_params(waterfall, sample.columns), waterfall) for waterfall in available]
    rated.sort(key=lambda each: (each[0][1] - each[0][0], -each[0][1], each[1].identifier))
    width = max((len(waterfall.identifier) for waterfall in available), default=0)
    for (found, needed), waterfall in rated:
        required_names = (
            ", ".join(param.name for param in waterfall.input_params if param.required) or "no params named"
        )
        yield f"  {waterfall.identifier:<{width}}  {found} of {needed} required params have a column: {required_names}"

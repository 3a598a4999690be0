"""`enrich init`: writes a commented job file for a CSV and a waterfall."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from enrich.commands import options
from enrich.commands.init.column_matching import count_matched_params
from enrich.commands.init.sample import Sample, take_sample
from enrich.commands.init.template import JobDraft, render_job_file
from enrich.commands.waterfalls import read_waterfalls
from enrich.databar.waterfall import DOCUMENTED_ON, DOCUMENTED_WATERFALLS, Waterfall
from enrich.errors import ApiKeyRejected, ApiUnreachable, CommandRefused, JobError
from enrich.job.job import suggest_name
from enrich.job.spec import json_schema


def draft_job(sample: Sample, available: Sequence[Waterfall], identifier: str, source: str, target: Path | None) -> str:
    """Return the text of a job file to be saved at `target` (None: in the working directory).

    Raises JobError if the waterfall is not available.
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
    """Return a path relative to the job file, or absolute if it is more than one folder up, which is clearer."""
    relative = os.path.relpath(path.absolute(), job_folder)
    return relative if relative.count("..") <= 1 else str(path.absolute())


def _is_our_schema(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == json_schema())
    except (OSError, ValueError):
        return False


def write_new_file(text: str, target: Path, *, force: bool) -> None:
    """Write a file (mode 0600). Raises JobError if it exists (without `force`), CommandRefused if that fails."""
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
    """Yield a line about how well each waterfall fits the columns, best first."""
    rated = [(count_matched_params(waterfall, sample.columns), waterfall) for waterfall in available]
    rated.sort(key=lambda each: (each[0][1] - each[0][0], -each[0][1], each[1].identifier))
    width = max((len(waterfall.identifier) for waterfall in available), default=0)
    for (found, needed), waterfall in rated:
        required_names = (
            ", ".join(param.name for param in waterfall.input_params if param.required) or "no params named"
        )
        yield f"  {waterfall.identifier:<{width}}  {found} of {needed} required params have a column: {required_names}"


def _read_available(*, use_sandbox: bool, offline: bool) -> tuple[list[Waterfall], str]:
    """Return the waterfalls, from the API or else from the documentation, and a text that names the source."""
    documented = (
        list(DOCUMENTED_WATERFALLS.values()),
        f"the public documentation of {DOCUMENTED_ON}, which may be out of date",
    )
    if offline:
        return documented
    try:
        with options.open_access(None, use_sandbox=use_sandbox) as access:
            api_name = "the built-in sandbox" if use_sandbox else f"the API at {access.host}"
            return read_waterfalls(access, None), f"{api_name}, asked on {datetime.now(UTC):%Y-%m-%d}"
    except (ApiKeyRejected, ApiUnreachable) as error:
        click.echo(f"note: {error.message}; so the waterfalls are those of the documentation", err=True)
    return documented


@click.command()
@click.argument("leads", metavar="CSV", type=options.FILE)
@click.option("--waterfall", "identifier", metavar="ID", help="What to ask; without it, say which waterfalls fit.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="JOB.yaml",
    help="The job file to write; - prints it. Default: <the CSV's stem>.yaml here.",
)
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Ask the built-in sandbox for the waterfalls.")
@click.option("--offline", is_flag=True, help="Ask nobody: take the waterfalls of the documentation.")
@click.option("--force", is_flag=True, help="Replace a job file that is there.")
def init(leads: Path, identifier: str | None, out: Path | None, use_sandbox: bool, offline: bool, force: bool) -> None:
    """Write a commented job file for CSV: its columns matched to the params of a waterfall.

    Each guess says how it was made. Then: enrich check JOB.
    """
    if use_sandbox and offline:
        raise click.UsageError("--sandbox asks, --offline does not: choose one")
    sample = take_sample(leads)
    available, source = _read_available(use_sandbox=use_sandbox, offline=offline)
    if identifier is None:
        click.echo(f"Waterfalls of {source}, those that fit {leads} best first:", err=True)
        click.echo("\n".join(rank_waterfalls(available, sample)), err=True)
        raise JobError("which one?", shlex.join(["enrich", "init", str(leads), "--waterfall", "ID"]))
    printed = out == Path("-")
    target = out or Path(leads.name.removesuffix(".gz")).with_suffix(".yaml")
    text = draft_job(sample, available, identifier, source, None if printed else target)
    if printed:
        click.echo(text, nl=False)
        return
    write_new_file(text, target, force=force)
    if sys.stderr.isatty():
        click.echo(f"{target} is written; read it, then: enrich check {target}", err=True)

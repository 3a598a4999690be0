"""`enrich init`, `check`, `waterfalls` and `schema`: what sets a job up."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enrich.commands import options
from enrich.errors import JobError

if TYPE_CHECKING:
    from enrich.databar.waterfall import Waterfall


@click.command(short_help="Show what the API offers, with params and prices.")
@click.argument("identifier", required=False)
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Ask the built-in sandbox.")
@options.JSON_OPTION
def waterfalls(identifier: str | None, use_sandbox: bool, as_json: bool) -> None:
    """Show what the API offers: waterfalls, their params, fields, providers and prices."""
    from enrich.commands.waterfalls import format_waterfalls, read_waterfalls

    with options.open_access(None, use_sandbox=use_sandbox) as access:
        available = read_waterfalls(access, identifier)
    if as_json:
        documents = [waterfall.model_dump() for waterfall in available]
        click.echo(json.dumps(documents[0] if identifier else documents, ensure_ascii=False))
    else:
        click.echo("\n".join(format_waterfalls(available, detailed=identifier is not None)))


@click.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    from enrich.job.spec import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@click.command(short_help="Write a commented job file for a CSV.")
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
    from enrich.commands.init.command import draft_job, rank_waterfalls, write_new_file
    from enrich.commands.init.sample import take_sample

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


def _read_available(*, use_sandbox: bool, offline: bool) -> tuple[list[Waterfall], str]:
    """Ask the API for its waterfalls, else take the documented ones; and say which these are."""
    from datetime import UTC, datetime

    from enrich.commands.waterfalls import read_waterfalls
    from enrich.databar.waterfall import DOCUMENTED_ON, DOCUMENTED_WATERFALLS
    from enrich.errors import ApiKeyRejected, ApiUnreachable

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


@click.command(short_help="Check JOB before it runs; pays and changes nothing.")
@options.JOB_ARGUMENT
@options.path_options
@click.option("--online", is_flag=True, help="Ask the API, too: what did it change since the last run?")
@options.JSON_OPTION
def check(
    job_file: Path,
    input_path: str | None,
    output: str | None,
    ledger: str | None,
    use_sandbox: bool,
    online: bool,
    as_json: bool,
) -> int:
    """Check JOB before it runs: the file, the input to its end, the paths, the ledger. Pays and changes nothing."""
    import os

    from enrich.commands import check
    from enrich.databar.credentials import find_base_url, host_of
    from enrich.run.preflight import query_api

    job = options.load_job_file(job_file, input_path, output, ledger, use_sandbox)
    live = None
    bound_to: dict[str, str | None] = {} if use_sandbox else {"api_host": host_of(find_base_url(os.environ))}
    if online:
        with options.open_access(None, use_sandbox=use_sandbox) as access:
            live = query_api(access, job.model.waterfall)
        if not use_sandbox:
            bound_to["workspace"] = live.user.workspace
    result = check.check_job(job, bound_to, live.waterfall if live else None)
    if as_json:
        click.echo(json.dumps(check.check_as_json(job, result), ensure_ascii=False))
    elif not result.problems:
        click.echo(f"ok: {check.check_summary(job, result)}")
    for note in [*result.changes, *result.notes]:
        click.echo(f"note: {note}", err=True)
    for problem in result.problems:
        click.echo(f"error: {problem.message}", err=True)
        if problem.hint:
            click.echo(f"hint: {problem.hint}", err=True)
    return result.exit_code

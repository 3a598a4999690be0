"""`enrich ledger`: checks, backs up or copies a ledger."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import click

from enrich.commands import options
from enrich.commands.options import LEDGER_INSTEAD_OPTION, SANDBOX_OPTION
from enrich.exit_codes import ExitCode
from enrich.job.locations import LedgerLocation, parse_ledger_location
from enrich.ledger.sqlite import RESTORE_HINT
from enrich.ledger.verify import LedgerVerifier, check_ledger

JOB_OR_LEDGER_ARGUMENT = click.argument("place", metavar="JOB_OR_LEDGER")


def _is_job_file(place: str) -> bool:
    return place.lower().endswith((".yaml", ".yml"))


def _resolve_ledger(
    place: str, instead: str | None = None, *, use_sandbox: bool = False, job_folder: Path | None = None
) -> LedgerLocation:
    """Return the ledger of a job file, or the ledger at `place`. Raises a usage error for an unusable URL.

    Local files of a ledger on a server are in `.enrich` in the `job_folder` (None: the working directory).
    """
    if _is_job_file(place):
        return options.JobOptions(Path(place), ledger=instead, use_sandbox=use_sandbox).load().ledger
    if instead is not None or use_sandbox:
        raise click.UsageError(f"{place} is taken as a ledger: --ledger and --sandbox go with a job file")
    try:
        ledger = parse_ledger_location(Path(), place, (job_folder or Path.cwd()) / ".enrich")
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    options.record_ledger(ledger)
    return ledger


@click.group()
def ledger() -> None:
    """Check a ledger, or copy it; a job's or any file."""


@ledger.command()
@JOB_OR_LEDGER_ARGUMENT
@LEDGER_INSTEAD_OPTION
@SANDBOX_OPTION
@options.JSON_OPTION
def check(place: str, instead: str | None, use_sandbox: bool, as_json: bool) -> int:
    """Verify that a ledger is whole and agrees with itself; a run may go on meanwhile."""
    path = _resolve_ledger(place, instead, use_sandbox=use_sandbox)
    report = check_ledger(path)
    code = ExitCode.REFUSED if report.problems else ExitCode.OK
    if as_json:
        click.echo(json.dumps({"exit_code": int(code), "ledger": str(path)} | asdict(report), ensure_ascii=False))
    elif not report.problems:
        click.echo(f"ok: {report.requests:,} requests, {report.attempts:,} attempts, {report.executions:,} executions")
    else:
        click.echo("\n".join(report.problems))
    if report.problems:
        click.echo(f"error: {path}: the ledger is not sound", err=True)
        hint = RESTORE_HINT if isinstance(path, Path) else "restore a backup of its schema: pg_restore"
        click.echo(f"hint: {hint}", err=True)
    return code


@ledger.command()
@JOB_OR_LEDGER_ARGUMENT
@click.argument("target", type=options.FILE)
@LEDGER_INSTEAD_OPTION
@SANDBOX_OPTION
def backup(place: str, target: Path, instead: str | None, use_sandbox: bool) -> None:
    """Copy a ledger to TARGET, consistent though a run goes on; an older copy is replaced."""
    with closing(LedgerVerifier(_resolve_ledger(place, instead, use_sandbox=use_sandbox), any_version=True)) as ledger_:
        ledger_.backup(target)


@ledger.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@options.JSON_OPTION
def copy(source: str, target: str, as_json: bool) -> None:
    """Copy the ledger FROM into the ledger TO, a file or postgresql://…, and prove that both say the same.

    FROM and TO are ledgers or job files. TO must be new or empty; no run may be at work with either.
    """
    from enrich.ledger.copy import copy_ledger  # it imports polars, which the other commands need not wait for

    job_folder = next((Path(place).absolute().parent for place in (source, target) if _is_job_file(place)), None)
    old, new = (_resolve_ledger(place, job_folder=job_folder) for place in (source, target))
    copied = copy_ledger(old, new)
    if as_json:
        result = {"exit_code": 0, "from": str(old), "to": str(new), "key": copied.key and str(copied.key)}
        click.echo(json.dumps(result | {"rows": copied.rows, "digest": copied.digest}, ensure_ascii=False))
        return
    click.echo(f"ok: {sum(copied.rows.values()):,} rows were copied and read again, both say the same: {copied.digest}")
    if copied.key is not None:
        click.echo(f"The key to those who were forgotten is {copied.key}")
    click.echo(
        "Name it as `ledger` in the job file, and run no more with the old one: what it buys, this one buys again."
    )

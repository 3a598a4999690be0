"""`enrich ledger`, `enrich forget`, `enrich purge`: looking after the record."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import click

from enrich.commands import options
from enrich.errors import ExitCode
from enrich.job.locations import LedgerLocation, parse_ledger_location

JOB_OR_LEDGER_ARGUMENT = click.argument("place", metavar="JOB_OR_LEDGER")
LEDGER_INSTEAD_OPTION = options.ledger_option("instead", what="Take")
SANDBOX_OPTION = click.option("--sandbox", "use_sandbox", is_flag=True, help="Take the ledger of the sandbox.")


@click.group()
def ledger() -> None:
    """Check a ledger, or copy it; a job's or any file."""


def _is_job_file(place: str) -> bool:
    return place.lower().endswith((".yaml", ".yml"))


def _resolve_ledger(
    place: str, instead: str | None = None, *, use_sandbox: bool = False, job_folder: Path | None = None
) -> LedgerLocation:
    """Find the ledger of a job, or any; `home` is the folder of the job that a ledger on a server is for."""
    if _is_job_file(place):
        return options.load_job_file(Path(place), None, None, instead, use_sandbox).ledger
    if instead is not None or use_sandbox:
        raise click.UsageError(f"{place} is taken as a ledger: --ledger and --sandbox go with a job file")
    try:
        ledger = parse_ledger_location(Path(), place, (job_folder or Path.cwd()) / ".enrich")
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    options.record_ledger(ledger)
    return ledger


@ledger.command()
@JOB_OR_LEDGER_ARGUMENT
@LEDGER_INSTEAD_OPTION
@SANDBOX_OPTION
@options.JSON_OPTION
def check(place: str, instead: str | None, use_sandbox: bool, as_json: bool) -> int:
    """Verify that a ledger is whole and agrees with itself; a run may go on meanwhile."""
    from enrich.ledger import verify
    from enrich.ledger.sqlite import RESTORE_HINT

    path = _resolve_ledger(place, instead, use_sandbox=use_sandbox)
    report = verify.check_ledger(path)
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
    from enrich.ledger.verify import LedgerVerifier

    with closing(LedgerVerifier(_resolve_ledger(place, instead, use_sandbox=use_sandbox), any_version=True)) as records:
        records.backup(target)


@ledger.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@options.JSON_OPTION
def copy(source: str, target: str, as_json: bool) -> None:
    """Copy the ledger FROM into the ledger TO, a file or postgresql://…, and prove that both say the same.

    FROM and TO are ledgers or job files. TO must be new or empty; no run may be at work with either.
    """
    from enrich.ledger import copy

    job_folder = next((Path(place).absolute().parent for place in (source, target) if _is_job_file(place)), None)
    old, new = (_resolve_ledger(place, job_folder=job_folder) for place in (source, target))
    copied = copy.copy_ledger(old, new)
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


YES_OPTION = click.option("--yes", is_flag=True, help="Do not ask.")


@click.command(short_help="Erase what the ledger of JOB holds of a person.")
@options.JOB_ARGUMENT
@click.option("--match", "matches", multiple=True, required=True, metavar="NAME=VALUE", help="Whom; all must hold.")
@LEDGER_INSTEAD_OPTION
@SANDBOX_OPTION
@YES_OPTION
@options.JSON_OPTION
def forget(
    job_file: Path, matches: tuple[str, ...], instead: str | None, use_sandbox: bool, yes: bool, as_json: bool
) -> None:
    """Erase what the ledger of JOB holds of a person, who is never asked about again.

    NAME is a column of the input, a param or a new column. Outputs and backups are yours to erase.
    """
    from enrich.commands.forget import forget_person

    job = options.load_job_file(job_file, None, None, instead, use_sandbox)
    count = forget_person(
        job, matches, lambda found: _confirmed(f"{_count_text(found)} will be erased for good.", yes=yes)
    )
    _echo_count(count, "forgotten", as_json=as_json)


@click.command(short_help="Drop old params and answers from the ledger of JOB.")
@options.JOB_ARGUMENT
@click.option("--older-than", callback=options.parse_seconds, required=True, metavar="90d", help="Settled longer ago.")
@LEDGER_INSTEAD_OPTION
@SANDBOX_OPTION
@YES_OPTION
@options.JSON_OPTION
def purge(job_file: Path, older_than: float, instead: str | None, use_sandbox: bool, yes: bool, as_json: bool) -> None:
    """Drop old params and answers from the ledger of JOB; that they were paid for is remembered.

    Leads that are still in the input come without these answers from then on.
    """
    from datetime import timedelta

    from enrich.commands.forget import purge_answers

    job = options.load_job_file(job_file, None, None, instead, use_sandbox)
    confirmed = _confirmed("What was answered before then will be erased for good; outputs will lack it.", yes=yes)
    count = purge_answers(job, timedelta(seconds=older_than)) if confirmed else 0
    _echo_count(count, "purged", as_json=as_json)


def _confirmed(prompt: str, *, yes: bool) -> bool:
    """Ask a person; off a terminal --yes must be there."""
    if yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise click.UsageError(f"{prompt} Off a terminal this needs --yes")
    click.echo(prompt, err=True)
    return click.confirm("Go on?", err=True)


def _echo_count(count: int, done: str, *, as_json: bool) -> None:
    click.echo(json.dumps({"exit_code": 0, "requests": count}) if as_json else f"{_count_text(count)} {done}")


def _count_text(count: int) -> str:
    return f"{count:,} request{'' if count == 1 else 's'}"

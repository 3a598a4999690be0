"""`enrich ledger`: is the record sound, and a copy of it."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import click

from enrich.commands import options
from enrich.errors import Exit

PLACE = click.argument("place", metavar="JOB_OR_FILE", type=options.FILE)
LEDGER = click.option("--ledger", "instead", type=options.FILE, help="Take this ledger instead of the job's.")
SANDBOX = click.option("--sandbox", "use_sandbox", is_flag=True, help="Take the ledger of the sandbox.")


@click.group()
def ledger() -> None:
    """Check a ledger, or copy it; a job's or any file."""


def _ledger_of(place: Path, instead: Path | None, *, use_sandbox: bool) -> Path:
    if place.suffix.lower() in (".yaml", ".yml"):
        return options.load(place, None, None, instead, use_sandbox).ledger_path
    if instead is not None or use_sandbox:
        raise click.UsageError(f"{place} is taken as a ledger: --ledger and --sandbox go with a job file")
    return place


@ledger.command()
@PLACE
@LEDGER
@SANDBOX
@options.AS_JSON
def check(place: Path, instead: Path | None, use_sandbox: bool, as_json: bool) -> int:
    """Verify that a ledger is whole and agrees with itself; a run may go on meanwhile."""
    from enrich import records
    from enrich.database import RESTORE

    path = _ledger_of(place, instead, use_sandbox=use_sandbox)
    found = records.check(path)
    code = Exit.REFUSED if found.problems else Exit.OK
    if as_json:
        click.echo(json.dumps({"exit_code": int(code), "ledger": str(path)} | asdict(found), ensure_ascii=False))
    elif not found.problems:
        click.echo(f"ok: {found.requests:,} requests, {found.attempts:,} attempts, {found.executions:,} executions")
    else:
        click.echo("\n".join(found.problems))
    if found.problems:
        click.echo(f"error: {path}: the ledger is not sound", err=True)
        click.echo(f"hint: {RESTORE}", err=True)
    return code


@ledger.command()
@PLACE
@click.argument("target", type=options.FILE)
@LEDGER
@SANDBOX
def backup(place: Path, target: Path, instead: Path | None, use_sandbox: bool) -> None:
    """Copy a ledger to TARGET, consistent though a run goes on; an older copy is replaced."""
    from enrich.records import Records

    with closing(Records(_ledger_of(place, instead, use_sandbox=use_sandbox))) as records:
        records.backup(target)

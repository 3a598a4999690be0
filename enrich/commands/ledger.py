"""`enrich ledger`: checks, backs up or copies a ledger."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click
from msgspec.structs import asdict

from enrich.commands import options
from enrich.commands.streams import echo_error
from enrich.exit_codes import ExitCode
from enrich.job.local_files import why_no_ledger
from enrich.job.locations import LedgerLocation, parse_ledger_location
from enrich.ledger import verify
from enrich.ledger.database import open_existing
from enrich.ledger.sqlite_errors import restore_hint
from enrich.ledger.verify import check_ledger
from enrich.models import pluralize

_place_options = options.add_options(
    click.argument("place", metavar="JOB_OR_LEDGER"),
    options.LEDGER_OPTION,
    click.option("--sandbox", "use_sandbox", is_flag=True, help="Use the ledger of the sandbox."),
)


def _is_job_file(place: str) -> bool:
    return place.lower().endswith((".yaml", ".yml"))


def _resolve_ledger(
    place: str, given_ledger: str | None = None, *, use_sandbox: bool = False, job_folder: Path | None = None
) -> LedgerLocation:
    """Return the ledger of a job file, or the ledger at `place`. Raises a usage error for an unusable URL.

    `given_ledger` is the value of --ledger. Local files of a ledger on a server are in `.enrich` in the `job_folder`
    (None: the working directory).
    """
    if _is_job_file(place):
        return options.JobOptions(Path(place), ledger=given_ledger, use_sandbox=use_sandbox).load().ledger
    if given_ledger is not None or use_sandbox:
        raise click.UsageError(f"{place} is a ledger. --ledger and --sandbox need a job file")
    try:
        ledger = parse_ledger_location(Path(), place, (job_folder or Path.cwd()) / ".enrich")
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if reason := why_no_ledger(ledger):
        raise click.UsageError(f"{ledger}: {reason}")
    options.record_ledger(ledger)
    return ledger


@click.group()
def ledger() -> None:
    """Check, back up or copy a ledger."""


@ledger.command()
@_place_options
@options.JSON_OPTION
def check(place: str, ledger: str | None, use_sandbox: bool, as_json: bool) -> int:
    """Check that a ledger is complete and consistent. Works during a run."""
    path = _resolve_ledger(place, ledger, use_sandbox=use_sandbox)
    report = check_ledger(path)
    code = ExitCode.REFUSED if report.problems else ExitCode.OK
    counts = {"request": report.requests, "attempt": report.attempts, "run": report.executions}
    lines = report.problems or [f"ok: {', '.join(pluralize(count or 0, name) for name, count in counts.items())}"]
    options.echo_result({"exit_code": int(code), "ledger": str(path)} | asdict(report), lines, as_json=as_json)
    if report.problems:
        echo_error(f"{path}: the ledger is damaged", restore_hint(path))
    return code


@ledger.command()
@_place_options
@click.argument("target", type=options.FILE)
def backup(place: str, target: Path, ledger: str | None, use_sandbox: bool) -> None:
    """Copy a ledger to TARGET. Works during a run. Replaces an older copy."""
    path = _resolve_ledger(place, ledger, use_sandbox=use_sandbox)
    with closing(open_existing(path, any_version=True, skip_integrity_check=True)) as opened:
        verify.backup(opened, target)


@ledger.command(short_help="Copy a ledger into another, and verify the copy.")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@options.JSON_OPTION
def copy(source: str, target: str, as_json: bool) -> None:
    """Copy the ledger FROM into the ledger TO, a file or postgresql://…, and verify the copy.

    FROM and TO are ledgers or job files. TO must be new or empty. No run may use either of them.
    """
    from enrich.ledger.database_copy import copy_ledger  # it imports polars, which the other commands need not wait for

    job_folder = next((Path(place).absolute().parent for place in (source, target) if _is_job_file(place)), None)
    old, new = (_resolve_ledger(place, job_folder=job_folder) for place in (source, target))
    copied = copy_ledger(old, new)
    result = {"exit_code": 0, "from": str(old), "to": str(new), "key": copied.key and str(copied.key)}
    lines = [
        f"ok: {pluralize(sum(copied.rows.values()), 'row')} copied and verified: {copied.digest}",
        *([] if copied.key is None else [f"The key of the erased people is {copied.key}"]),
        "Set it as `ledger` in the job file. Don't run with the old ledger again: its leads would be charged twice.",
    ]
    options.echo_result(result | {"rows": copied.rows, "digest": copied.digest}, lines, as_json=as_json)

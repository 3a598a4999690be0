"""`enrich ledger` checks, backs up or copies a ledger; `enrich reconcile` compares it with the account's balance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
from msgspec.structs import asdict

from enrich.commands import options
from enrich.commands.streams import echo_error
from enrich.databar.environment import ApiAccess
from enrich.errors import ApiUnreachable, CommandRefused
from enrich.exit_codes import ExitCode
from enrich.job.job import Job
from enrich.job.local_files import why_no_ledger
from enrich.job.locations import LedgerLocation, parse_ledger_location
from enrich.ledger import queries, records, verify
from enrich.ledger.database import Database, open_existing
from enrich.ledger.lock import is_locked
from enrich.ledger.sqlite_errors import restore_hint
from enrich.ledger.verify import check_ledger
from enrich.models import pluralize, read_balance
from enrich.run.balance import (
    PART_LABELS,
    ROUNDING_CREDITS,
    DifferencePart,
    Reconciliation,
    choose_baseline,
    explain_balance,
)

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


@ledger.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@options.JSON_OPTION
def copy(source: str, target: str, as_json: bool) -> None:
    """Copy the ledger FROM into the ledger TO, a file or postgresql://…, and verify the copy.

    FROM and TO are ledgers or job files. TO must be new or empty. No run may use either of them.
    """
    from enrich.ledger.database_copy import copy_ledger  # slow to import, too

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


def reconcile_job(job: Job, access: ApiAccess, since: int | None) -> Reconciliation:
    """Fetch the balance and compare it with the ledger from execution `since` on (None: chosen). Raises EnrichError."""
    from enrich.run.context import check_ledger_exists  # slow imports, which the other commands need not wait for
    from enrich.run.preflight import call_api

    check_ledger_exists(job)
    with closing(Database(job.ledger, read_only=True)) as ledger:
        executions, in_doubt = records.list_executions(ledger), queries.in_doubt_summary(ledger)
        if since is None:
            start = choose_baseline(executions, None if in_doubt is None else in_doubt.oldest_execution_id)
        else:
            named = [row for row in executions if row.id == since and row.balance_before is not None]
            start = named[0] if named else None
        if start is None or start.balance_before is None:
            which = "any run" if since is None else f"run {since}"
            raise CommandRefused(f"{job.ledger} has no balance of {which}", "`enrich runs JOB` lists the runs")
        movements = queries.credit_movements(ledger, start.id)
    now = read_balance(call_api(access, lambda client: client.get_user()).balance)
    if now is None:
        raise ApiUnreachable("the API reports no balance", "reconcile needs it")
    return explain_balance(start.id, start.balance_before, now, movements)


def format_reconciliation(result: Reconciliation) -> Iterator[str]:
    """Format the result as text lines."""
    is_unchanged = abs(result.difference) < ROUNDING_CREDITS
    if is_unchanged:
        yield f"Balance unchanged since run {result.since}: {result.balance_now:,.2f}"
    else:
        yield f"Since run {result.since}: balance {result.balance_before:,.2f}, now {result.balance_now:,.2f}"
        yield f"  {result.difference:>10,.2f}  credits less. The ledger explains:"
    for name, words in PART_LABELS.items():
        part: DifferencePart = getattr(result, name)
        if part.number:
            exact = abs(part.most - part.least) < ROUNDING_CREDITS
            amount = f"{part.most:,.2f}" if exact else f"{part.least:,.2f} to {part.most:,.2f}"
            yield f"  {amount:>20}  {part.number:,} {words}"
    if result.unexplained > 0:
        yield (
            f"  {result.unexplained:>20,.2f}  not explained: other users of the account, other ledgers, price changes"
        )
    elif result.unexplained < 0:
        yield f"  {-result.unexplained:>20,.2f}  added: a top-up, or refunds"
    elif not is_unchanged:
        yield "  The ledger explains the whole difference."
    if result.in_doubt.number:
        yield "For unconfirmed requests: enrich run JOB --retry in_doubt (may charge again) or --accept in_doubt"


@click.command()
@options.job_options(sandbox="Use the ledger and the account of the sandbox.")
@click.option(
    "--since",
    type=options.Number(),
    metavar="RUN",
    help="Compare from this run on. Default: the last one, or the oldest with unconfirmed requests.",
)
@options.JSON_OPTION
def reconcile(job_options: options.JobOptions, since: int | None, as_json: bool) -> None:
    """Compare the account balance with the ledger of JOB, and explain the difference. Free, changes nothing."""
    job = job_options.load()
    is_running = is_locked(job.ledger)
    with options.open_access(job, use_sandbox=job_options.use_sandbox) as access:
        result = reconcile_job(job, access, since)
    if is_running:
        click.echo("note: a run of this ledger is in progress, and what it spends is not explained", err=True)
    lines = map(job_options.arguments(as_typed=True).in_hint, format_reconciliation(result))
    options.echo_result({"exit_code": 0, **result.as_json()}, lines, as_json=as_json)

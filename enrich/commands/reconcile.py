"""`enrich reconcile`: compares the change of the account's balance with the ledger. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import click

from enrich.commands import options
from enrich.databar.environment import ApiAccess
from enrich.errors import ApiUnreachable, CommandRefused
from enrich.job.job import Job
from enrich.ledger import queries, records
from enrich.ledger.database import Database
from enrich.ledger.lock import is_locked
from enrich.models import pluralize, read_balance
from enrich.run.balance import (
    PART_LABELS,
    ROUNDING_CREDITS,
    DifferencePart,
    Reconciliation,
    choose_baseline,
    explain_balance,
)
from enrich.run.context import check_ledger_exists
from enrich.run.preflight import call_api


def reconcile_job(job: Job, access: ApiAccess, since: int | None) -> Reconciliation:
    """Fetch the balance and compare it with the ledger from execution `since` on (None: chosen). Raises EnrichError."""
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
        direction = "less" if result.difference > 0 else "more"
        yield f"  {abs(result.difference):>10,.2f}  credits {direction}. The ledger explains:"
    for name, (noun, words) in PART_LABELS.items():
        part: DifferencePart = getattr(result, name)
        if part.number:
            exact = abs(part.most - part.least) < ROUNDING_CREDITS
            amount = f"{part.most:,.2f}" if exact else f"{part.least:,.2f} to {part.most:,.2f}"
            yield f"  {amount:>20}  {pluralize(part.number, noun)}{words}"
    if result.unexplained > 0:
        yield (
            f"  {result.unexplained:>20,.2f}  not explained: other users of the account, other ledgers, price changes"
        )
    elif result.unexplained < 0:
        yield f"  {-result.unexplained:>20,.2f}  added: a top-up, or refunds"
    elif not is_unchanged:
        yield "  The ledger explains the whole difference."
    if result.in_doubt.number:
        yield "Unconfirmed requests: retry them (may charge again) or mark them as failed:"
        yield "  enrich run JOB --retry in_doubt"
        yield "  enrich run JOB --accept in_doubt"


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

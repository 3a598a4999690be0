"""`enrich status`, `runs`, `explain` and `reconcile`: what only looks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from enrich.commands import options


@click.command(short_help="Show what the ledger of JOB knows.")
@options.JOB_ARGUMENT
@options.LEDGER_OPTION
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger of the sandbox.")
@click.option("--watch", "watching", is_flag=True, help="Show the run that is at work, until it ends.")
@click.option(
    "--every",
    callback=options.parse_seconds,
    metavar="2s",
    help="With --watch: look so often; default: every 2 seconds.",
)
@options.JSON_OPTION
def status(
    job_file: Path, ledger: str | None, use_sandbox: bool, watching: bool, every: float | None, as_json: bool
) -> int:
    """Show what the ledger of JOB knows: counts, credits, what expires when, past executions.

    With --watch it shows the run that is at work, again and again, and leaves with 0 when that ends, however it does.
    When none is at work it waits for the next; Ctrl-C leaves. Off a terminal each look is a line, with --json an
    object. A run is not disturbed by it.
    """
    from enrich.commands.status import format_status, read_status

    job = options.load_job_file(job_file, None, None, ledger, use_sandbox)
    if watching:
        from enrich.commands.status_watch import DEFAULT_INTERVAL_S, RunWatcher, watch_job

        if every == 0:
            raise click.UsageError("--every 0s is too often: at least 1s")
        return watch_job(RunWatcher(job), sys.stdout, os.environ, every or DEFAULT_INTERVAL_S, as_json=as_json)
    if every is not None:
        raise click.UsageError("--every says how often --watch looks: it needs --watch")
    result = read_status(job)
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(format_status(result)))
    return 0


@click.command(short_help="Hold the account's balance against the ledger of JOB.")
@options.JOB_ARGUMENT
@options.LEDGER_OPTION
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger and the account of the sandbox.")
@click.option("--since", type=int, metavar="EXECUTION", help="From this execution on; default: the last one.")
@options.JSON_OPTION
def reconcile(job_file: Path, ledger: str | None, use_sandbox: bool, since: int | None, as_json: bool) -> None:
    """Hold the balance against the ledger of JOB: what explains the difference, and what cannot be known."""
    from enrich.commands.reconcile import format_reconciliation, reconcile_job

    job = options.load_job_file(job_file, None, None, ledger, use_sandbox)
    with options.open_access(job, use_sandbox=use_sandbox) as access:
        result = reconcile_job(job, access, since)
    click.echo(
        json.dumps({"exit_code": 0, **result.as_json()}) if as_json else "\n".join(format_reconciliation(result))
    )


@click.command()
@options.JOB_ARGUMENT
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="Show the newest N executions.")
@options.LEDGER_OPTION
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger of the sandbox.")
@options.JSON_OPTION
def runs(job_file: Path, last: int, ledger: str | None, use_sandbox: bool, as_json: bool) -> None:
    """List the executions of JOB, newest first (times are UTC)."""
    from enrich.commands.runs import format_runs, read_runs

    result = read_runs(options.load_job_file(job_file, None, None, ledger, use_sandbox), last)
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(format_runs(result)))


@click.command(short_help="Tell all that ever happened to one lead of JOB.")
@options.JOB_ARGUMENT
@click.option("--row", type=click.IntRange(min=1), metavar="N", help="This row of the input; 1 is the first lead.")
@click.option("--match", metavar="COLUMN=VALUE", help="The rows with this value, whatever the case of its letters.")
@options.INPUT_OPTION
@options.LEDGER_OPTION
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger of the sandbox.")
@options.JSON_OPTION
def explain(
    job_file: Path,
    row: int | None,
    match: str | None,
    input_path: str | None,
    ledger: str | None,
    use_sandbox: bool,
    as_json: bool,
) -> None:
    """Tell everything that ever happened to one lead of JOB, without network."""
    from enrich.commands.explain import explain_leads as tell
    from enrich.commands.explain import format_explanation

    if (row is None) == (match is None):
        raise click.UsageError('say which lead: --row N or --match "Email=ada@engine.example"')
    result = tell(options.load_job_file(job_file, input_path, None, ledger, use_sandbox), row, match)
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(format_explanation(result)))

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
@options.LEDGER
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger of the sandbox.")
@click.option("--watch", "watching", is_flag=True, help="Show the run that is at work, until it ends.")
@click.option(
    "--every", callback=options.seconds, metavar="2s", help="With --watch: look so often; default: every 2 seconds."
)
@options.AS_JSON
def status(
    job_file: Path, ledger: str | None, use_sandbox: bool, watching: bool, every: float | None, as_json: bool
) -> int:
    """Show what the ledger of JOB knows: counts, credits, what expires when, past executions.

    With --watch it shows the run that is at work, again and again, and leaves with 0 when that ends, however it does.
    When none is at work it waits for the next; Ctrl-C leaves. Off a terminal each look is a line, with --json an
    object. A run is not disturbed by it.
    """
    from enrich.look.status import lines, read_status

    job = options.load(job_file, None, None, ledger, use_sandbox)
    if watching:
        from enrich.look.lookout import Lookout
        from enrich.look.watch import EVERY_S, watch_job

        if every == 0:
            raise click.UsageError("--every 0s is too often: at least 1s")
        return watch_job(Lookout(job), sys.stdout, os.environ, every or EVERY_S, as_json=as_json)
    if every is not None:
        raise click.UsageError("--every says how often --watch looks: it needs --watch")
    known = read_status(job)
    click.echo(json.dumps(known, ensure_ascii=False) if as_json else "\n".join(lines(known)))
    return 0


@click.command(short_help="Hold the account's balance against the ledger of JOB.")
@options.JOB_ARGUMENT
@options.LEDGER
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger and the account of the sandbox.")
@click.option("--since", type=int, metavar="EXECUTION", help="From this execution on; default: the last one.")
@options.AS_JSON
def reconcile(job_file: Path, ledger: str | None, use_sandbox: bool, since: int | None, as_json: bool) -> None:
    """Hold the balance against the ledger of JOB: what explains the difference, and what cannot be known."""
    from enrich.look.reconcile import lines, reconcile_job

    job = options.load(job_file, None, None, ledger, use_sandbox)
    with options.access(job, use_sandbox=use_sandbox) as access:
        told = reconcile_job(job, access, since)
    click.echo(json.dumps({"exit_code": 0, **told.as_json()}) if as_json else "\n".join(lines(told)))


@click.command()
@options.JOB_ARGUMENT
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="Show the newest N executions.")
@options.LEDGER
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger of the sandbox.")
@options.AS_JSON
def runs(job_file: Path, last: int, ledger: str | None, use_sandbox: bool, as_json: bool) -> None:
    """List the executions of JOB, newest first (times are UTC)."""
    from enrich.look.runs import lines, read_runs

    known = read_runs(options.load(job_file, None, None, ledger, use_sandbox), last)
    click.echo(json.dumps(known, ensure_ascii=False) if as_json else "\n".join(lines(known)))


@click.command(short_help="Tell all that ever happened to one lead of JOB.")
@options.JOB_ARGUMENT
@click.option("--row", type=click.IntRange(min=1), metavar="N", help="This row of the input; 1 is the first lead.")
@click.option("--match", metavar="COLUMN=VALUE", help="The rows with this value, whatever the case of its letters.")
@options.INPUT
@options.LEDGER
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger of the sandbox.")
@options.AS_JSON
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
    from enrich.look.explain import explain as tell
    from enrich.look.explain import lines

    if (row is None) == (match is None):
        raise click.UsageError('say which lead: --row N or --match "Email=ada@engine.example"')
    told = tell(options.load(job_file, input_path, None, ledger, use_sandbox), row, match)
    click.echo(json.dumps(told, ensure_ascii=False) if as_json else "\n".join(lines(told)))

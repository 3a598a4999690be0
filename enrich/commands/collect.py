"""`enrich collect`: writes the output from the input and the ledger, without network."""

from __future__ import annotations

import sys

import click

from enrich.commands import options
from enrich.commands.run import print_summary
from enrich.ledger.database import check_ledger_exists
from enrich.ledger.lock import lock_ledger
from enrich.run.other_ledgers import with_own_output
from enrich.run.output import rebuild_output


@click.command()
@options.RUN_JOB_OPTIONS
@click.option("--partial", is_flag=True, help="Write the output although leads are pending.")
@options.JSON_OPTION
def collect(job_options: options.JobOptions, partial: bool, as_json: bool) -> int:
    """Write the output of JOB from the ledger, without network and cost."""
    job, note = with_own_output(job_options.load())
    if note is not None:
        click.echo(f"note: {note}", err=True)
    check_ledger_exists(job.ledger)
    with lock_ledger(job.ledger, 0):
        summary = rebuild_output(job, partial=partial)
    print_summary(summary, job_options.arguments(as_typed=True), as_json=as_json, show=sys.stderr.isatty())
    return summary.exit_code

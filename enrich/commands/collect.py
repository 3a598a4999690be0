"""`enrich collect`: writes the output from the input and the ledger, without network."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from enrich.commands import options
from enrich.commands.run import print_summary
from enrich.ledger.lock import lock_ledger
from enrich.run.rebuild import rebuild_output


@click.command()
@options.JOB_ARGUMENT
@options.path_options
@click.option("--partial", is_flag=True, help="Write the output even when rows are pending.")
@options.JSON_OPTION
def collect(
    job_file: Path,
    input_path: str | None,
    output: str | None,
    ledger: str | None,
    use_sandbox: bool,
    partial: bool,
    as_json: bool,
) -> int:
    """Write the output of JOB from the ledger alone, without network."""
    job = options.load_job_file(job_file, input_path, output, ledger, use_sandbox)
    with lock_ledger(job.ledger, 0):
        summary = rebuild_output(job, partial=partial)
    print_summary(summary, as_json=as_json, show=sys.stderr.isatty())
    return summary.exit_code

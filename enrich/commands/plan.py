"""`enrich plan`: shows what a run would send and cost, and saves the plan on request."""

from __future__ import annotations

import json
from pathlib import Path

import click

from enrich.commands import options
from enrich.errors import LedgerLocked
from enrich.ledger.lock import is_locked
from enrich.models import State
from enrich.run.context import RunOptions
from enrich.run.plan import format_plan, make_plan
from enrich.run.plan_file import write_plan


@click.command()
@options.JOB_ARGUMENT
@options.path_options
@options.selection_options
@click.option("-o", "freeze", type=options.FILE, help="Freeze the plan for `enrich run --plan`.")
@click.option("--rows", "rows_file", type=options.FILE, help="Write each row's decision to this file.")
@options.JSON_OPTION
def plan(
    job_file: Path,
    input_path: str | None,
    output: str | None,
    ledger: str | None,
    use_sandbox: bool,
    limit: int | None,
    sample: int | None,
    seed: int,
    max_credits: float | None,
    retry: frozenset[str],
    freeze: Path | None,
    rows_file: Path | None,
    as_json: bool,
) -> None:
    """Show what a run of JOB would ask and cost, and why each row is or isn't paid for; costs nothing."""
    job = options.load_job_file(job_file, input_path, output, ledger, use_sandbox, max_credits)
    run_options = RunOptions(limit=limit, sample=sample, seed=seed, retry=frozenset(map(State, retry)))
    if freeze is not None and is_locked(job.ledger):
        raise LedgerLocked(f"{job.ledger}: a run is at work, so no plan can be kept to", "freeze one after it")
    with options.open_access(job, use_sandbox=use_sandbox) as access:
        planned, saved_plan = make_plan(job, access, run_options, rows_file.absolute() if rows_file else None)
    if freeze is not None:
        write_plan(freeze, saved_plan)
    click.echo(json.dumps(planned.as_json(), ensure_ascii=False) if as_json else "\n".join(format_plan(planned)))

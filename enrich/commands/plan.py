"""`enrich plan`: shows what a run would send and cost, and saves the plan on request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import polars as pl

from enrich.commands import options
from enrich.databar.client import Client
from enrich.databar.clock import SystemClock
from enrich.databar.credentials import ApiAccess
from enrich.errors import CommandRefused, JobError, LedgerLocked
from enrich.files.writer import prepare_file, write_file
from enrich.job.job import Job
from enrich.job.spec import Output
from enrich.ledger.database import ledger_exists
from enrich.ledger.ledger import Ledger
from enrich.ledger.lock import is_locked
from enrich.models import (
    DECISIONS_TO_SEND,
    Decision,
    RowDecision,
    RowStatus,
    State,
    iso_time,
)
from enrich.rows.reader import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.budget import check_balance, make_budget
from enrich.run.context import RunOptions, select_requests
from enrich.run.plan import DECISION_REASONS, Plan, build_plan, format_plan
from enrich.run.plan_file import SavedPlan, gather_plan_inputs, write_plan
from enrich.run.preflight import Preflight, preflight, read_binding
from enrich.run.state import Timeouts


@click.command()
@options.RUN_JOB_OPTIONS
@options.selection_options
@click.option("-o", "freeze", type=options.FILE, help="Freeze the plan for `enrich run --plan`.")
@click.option("--rows", "rows_file", type=options.FILE, help="Write each row's decision to this file.")
@options.JSON_OPTION
def plan(
    job_options: options.JobOptions,
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
    job = job_options.load(max_credits)
    run_options = RunOptions(limit=limit, sample=sample, seed=seed, retry=frozenset(map(State, retry)))
    if freeze is not None and is_locked(job.ledger):
        raise LedgerLocked(f"{job.ledger}: a run is at work, so no plan can be kept to", "freeze one after it")
    with options.open_access(job, use_sandbox=job_options.use_sandbox) as access:
        planned, saved_plan = make_plan(job, access, run_options, rows_file.absolute() if rows_file else None)
    if freeze is not None:
        write_plan(freeze, saved_plan)
    click.echo(json.dumps(planned.as_json(), ensure_ascii=False) if as_json else "\n".join(format_plan(planned)))


#: The columns that `--rows` adds to the input's.
PLAN_COLUMNS = {
    "plan_decision": pl.String(),
    "plan_why": pl.String(),
    "plan_same_as_row": pl.Int64(),
    "plan_answered_at": pl.String(),
    "plan_age_days": pl.Float64(),
}


def make_plan(
    job: Job, access: ApiAccess, options: RunOptions, rows_file: Path | None = None
) -> tuple[Plan, SavedPlan]:
    """Plan a run. Returns the plan to show and the plan to save. Writes each row's decision to `rows_file`, if given.

    Raises what a run would raise before it spends.
    """
    with _open_ledger(job) as ledger:
        job_input = JobInput(job, ledger.load_forgotten())
        file_versions = job_input.file_versions()
        if rows_file is not None:
            if rows_file.exists() and rows_file.samefile(job.document.path):
                raise JobError(f"{rows_file}: the rows would replace the job file", "choose another name")
            prepare_file(rows_file, job.input_path, job.name, "plan")
        preflight_result = asyncio.run(_preflight(job, access, ledger, options))
        job_input.check_new_columns(preflight_result.template)
        clock = SystemClock()
        now_ms = clock.now_ms()
        template = preflight_result.template
        budget = make_budget(job, template, preflight_result.balance)
        counts = dict.fromkeys(DECISION_REASONS, 0)
        is_running = bool(is_locked(job.ledger))
        ledger.begin_pass(replace(select_requests(job, options, now_ms), no_active_run=not is_running))
        row_count = requesting_rows = 0
        for batch in job_input.batches(template, job_input.queue_order()):
            ledger.preview(batch.requests())
            row_count += batch.frame.height
            requesting_rows += sum(fingerprint is not None for fingerprint in batch.fingerprints)
            counts[Decision.INVALID] += batch.statuses.count(RowStatus.INVALID)
            counts[Decision.FILTERED] += batch.statuses.count(RowStatus.FILTERED)
        ledger.apply_limits()
        request_counts = ledger.decision_counts()
        counts |= request_counts
        counts[Decision.DUPLICATE] = requesting_rows - sum(request_counts.values())
        if rows_file is not None:
            _write_rows(rows_file, job, job_input, ledger, (template, now_ms))
        to_submit = sum(counts[decision] for decision in DECISIONS_TO_SEND)
        saved_plan = SavedPlan(
            made_ms=now_ms,
            ground=gather_plan_inputs(job, template, preflight_result.waterfall, job_input),
            limit=options.limit,
            sample=options.sample,
            seed=options.seed,
            retry=sorted(options.retry),
            max_credits=job.max_credits,
            to_submit=to_submit,
            after_execution=max((row["id"] for row in ledger.executions(last=1)), default=0),
        )
        if job_input.file_versions() != file_versions:
            raise CommandRefused(f"{job.input_path}: the input changed while the plan was made", "plan again")
        plan = build_plan(job, preflight_result, ledger, row_count, counts, budget.cap)
        return replace(
            plan, notes=[*plan.notes, *_notes(job, preflight_result, to_submit, is_running=is_running)]
        ), saved_plan


def _notes(job: Job, preflight_result: Preflight, to_submit: int, *, is_running: bool) -> Iterator[str]:
    if is_running:
        yield "a run is at work in this ledger: what it does from now on is not in this plan"
    if to_submit:
        try:
            check_balance(job, preflight_result.template, preflight_result.balance)
        except CommandRefused as error:
            yield f"a run would be refused: {error.message}"


@contextmanager
def _open_ledger(job: Job) -> Iterator[Ledger]:
    """Open the job's ledger read-only, or an empty one where there is none yet."""
    with TemporaryDirectory() as folder:
        is_known = ledger_exists(job.ledger)
        ledger = Ledger(job.ledger if is_known else Path(folder) / "none.db", read_only=is_known)
        with closing(ledger):
            yield ledger


async def _preflight(job: Job, access: ApiAccess, ledger: Ledger, options: RunOptions) -> Preflight:
    async with Client(access, SystemClock()) as client:
        return await preflight(
            client,
            read_binding(ledger, job.model.waterfall),
            job,
            access.host,
            timeout_s=Timeouts().startup_s,
            update_providers=options.update_providers,
        )


def _write_rows(
    target: Path, job: Job, job_input: JobInput, ledger: Ledger, template_and_time: tuple[RequestTemplate, int]
) -> None:
    """Write the input with each row's decision. The time is in ms (UTC)."""
    template, now_ms = template_and_time
    filters = [name for name in ("where", "only_if_empty") if getattr(job.model, name)]
    filtered_reason = f"left out by {' or '.join(filters)}"

    def frames() -> Iterator[pl.DataFrame]:
        for batch in job_input.batches(template):
            decisions = {row_decision.position: row_decision for row_decision in ledger.row_decisions(batch.requests())}
            if len(decisions) != batch.statuses.count(None):
                raise CommandRefused(f"{job.input_path}: the input changed while the plan was made", "plan again")
            cells = [
                _decision_cells(decisions[position], now_ms)
                if status is None
                else _skipped_cells(status, error or filtered_reason)
                for position, (status, error) in enumerate(
                    zip(batch.statuses, batch.errors, strict=True), batch.first_position
                )
            ]
            new = [
                pl.Series(name, [row[place] for row in cells], dtype)
                for place, (name, dtype) in enumerate(PLAN_COLUMNS.items())
            ]
            yield batch.frame.select(pl.exclude(*PLAN_COLUMNS)).hstack(new)

    # The columns of an earlier plan are replaced.
    schema = {name: kind for name, kind in job_input.schema.items() if name not in PLAN_COLUMNS} | PLAN_COLUMNS
    output = Output(path=str(target))
    write_file(target, output, job=job.name, schema=schema, frames=frames(), new_columns=len(PLAN_COLUMNS), kind="plan")


def _skipped_cells(status: RowStatus, reason: str) -> list[object]:
    return [Decision(status.value), reason, None, None, None]


def _decision_cells(row_decision: RowDecision, now_ms: int) -> list[object]:
    answered_at, age_days = None, None
    if (
        row_decision.decision in (Decision.FOUND, Decision.NOT_FOUND, Decision.REFRESH)
        and row_decision.settled_ms is not None
    ):
        answered_at, age_days = (
            iso_time(row_decision.settled_ms),
            round((now_ms - row_decision.settled_ms) / 86_400_000, 2),
        )
    if row_decision.first_position == row_decision.position:
        return [row_decision.decision, DECISION_REASONS[row_decision.decision], None, answered_at, age_days]
    reason = f"{DECISION_REASONS[Decision.DUPLICATE]}: {row_decision.decision.value}"
    return [Decision.DUPLICATE, reason, row_decision.first_position + 1, answered_at, age_days]

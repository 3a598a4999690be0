"""`enrich plan`: shows what a run would send and cost, and saves the plan and the decision for each row on request."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import polars as pl
from msgspec.structs import replace
from pydantic import ValidationError

from enrich.commands import options
from enrich.commands.streams import echo_message
from enrich.databar.clock import SystemClock
from enrich.databar.environment import ApiAccess
from enrich.errors import CommandRefused, JobError, LedgerLocked
from enrich.files.reader import InputTable
from enrich.files.writer import prepare_file, write_file
from enrich.job.job import Job
from enrich.job.local_files import is_same_file
from enrich.job.locations import sandbox_file_name
from enrich.job.spec import Input, Output
from enrich.ledger import enroll, erasure, records, step_results
from enrich.ledger.database import Database, open_or_empty
from enrich.ledger.decisions import review_refreshes
from enrich.ledger.enroll import RowDecision
from enrich.ledger.lock import is_locked
from enrich.models import DECISIONS_TO_SEND, Decision, RequestSelection, iso_time
from enrich.rows.batches import RowCounts
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.budget import check_balance, make_budget
from enrich.run.context import RunOptions, find_job_rescue_files, select_requests
from enrich.run.enrolling import StepInput
from enrich.run.other_ledgers import (
    find_output_of_other_ledger,
    find_overlap,
    is_written_by_run,
    overlap_notes,
    refusal_to_pay_again,
)
from enrich.run.plan import DECISION_REASONS, Plan, build_plan, format_plan
from enrich.run.plan_file import SavedPlan, gather_plan_inputs, write_plan
from enrich.run.preflight import Preflight, preflight, read_binding, with_client
from enrich.run.startup import make_step_rows
from enrich.run.step_batch import StepBatch
from enrich.run.step_plan import StepDecisions, StepsPlan, decide_steps, format_steps_plan, plan_steps
from enrich.run.step_rows import StepRows

#: How the note begins that says why a run would not start.
_REFUSED = "a run would be refused"
#: Size of the first run that the plan suggests, and of the sample for an estimate.
SUGGESTED_LIMIT, SUGGESTED_SAMPLE = 10, 20
#: The columns that `--rows` adds to the input's.
PLAN_COLUMNS = {
    "plan_decision": pl.String(),
    "plan_why": pl.String(),
    "plan_same_as_row": pl.Int64(),
    "plan_answered_at": pl.String(),
    "plan_age_days": pl.Float64(),
}
#: The last column of a file of `--rows`: of a job without steps, and with steps.
_LAST_COLUMN = re.compile(r"plan_age_days|plan_[a-z][a-z0-9_]*_why")


@click.command()
@options.RUN_JOB_OPTIONS
@options.selection_options
@click.option("-o", "plan_file", type=options.FILE, help="Save the plan for `enrich run JOB --plan FILE`.")
@click.option(
    "--rows",
    "rows_file",
    type=options.FILE,
    help="Write the decision for each row to this file. `.sandbox` is added to its name in a sandbox.",
)
@click.option("-v", "--verbose", is_flag=True, help="Add each decision, the prices of the providers and the time.")
@options.JSON_OPTION
def plan(
    job_options: options.JobOptions,
    selected: RunOptions,
    max_credits: float | None,
    plan_file: Path | None,
    rows_file: Path | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Show what a run of JOB would send and the most it can cost. Free.

    Reads the input and the ledger, and gets prices and balance from Databar. Changes nothing.
    """
    planned, note = plan_with_access(job_options.load(max_credits), selected, plan_file, rows_file)
    if note is not None:
        echo_message(note, label="note: ")
    command = f"enrich run {job_options.arguments(as_typed=True).run_args}"
    if plan_file is not None:
        chosen = f" --plan {shlex.quote(str(plan_file))}"
    else:
        chosen = _selection_arguments(selected, max_credits)
    chosen += " --update-providers" if selected.update_providers else ""
    next_lines = list(_next_lines(planned, command, chosen))
    if isinstance(planned, StepsPlan):
        lines = format_steps_plan(planned, next_lines)
    else:
        lines = format_plan(planned, next_lines, details=verbose)
    options.echo_result(planned.as_json(), lines, as_json=as_json)


def _selection_arguments(selected: RunOptions, max_credits: float | None) -> str:
    """Return the options of the plan as arguments of a run."""
    chosen = {"--limit": selected.limit, "--sample": selected.sample, "--seed": selected.seed or None}
    texts = [f" {name} {value}" for name, value in chosen.items() if value is not None]
    texts += [] if max_credits is None else [f" --max-credits {max_credits:.15g}"]
    texts += [f" --retry {','.join(sorted(selected.retry))}"] if selected.retry else []
    return "".join(texts)


def _next_lines(planned: Plan | StepsPlan, command: str, chosen: str) -> Iterator[str]:
    """Yield the commands that come after the plan, or nothing if a run would be refused."""
    if any(note.startswith(_REFUSED) for note in planned.notes):
        return
    if not planned.to_submit:
        yield f"Next (free, writes the output): {command}{chosen}"
        return
    is_new = planned.cost.likely is None and not chosen and planned.cost.maximum is not None
    if is_new and planned.to_submit > SUGGESTED_SAMPLE:
        yield f"No history yet: `{command} --sample {SUGGESTED_SAMPLE}` gives an estimate"
    suggested = f" --limit {SUGGESTED_LIMIT}" if is_new and planned.to_submit > SUGGESTED_LIMIT else chosen
    yield f"Next: {command}{suggested}"


def plan_with_access(
    job: Job, run_options: RunOptions, plan_file: Path | None, rows_file: Path | None
) -> tuple[Plan | StepsPlan, str | None]:
    """Plan a run with the job's access to the API, and save the plan in `plan_file`, if given (see `make_plan`).

    Also returns a note if the plan was saved in another file: a sandbox run does not replace the plan of a real run.
    """
    job.file_locations(datetime.now().astimezone())  # raises if two are the same
    if plan_file is not None:
        job.check_not_own(plan_file.absolute(), "plan")
        if rows_file is not None and is_same_file(plan_file.absolute(), rows_file.absolute()):
            raise JobError(f"{plan_file}: the plan and the rows would be the same file", "give each its own name")
    if plan_file is not None and is_locked(job.ledger):
        raise LedgerLocked(f"{job.ledger}: a run is in progress, so a plan cannot be saved", "save it after the run")
    with options.open_access(job, use_sandbox=job.sandbox) as access:
        rows_file = rows_file.absolute() if rows_file else None
        planned, saved_plan = make_plan(job, access, run_options, rows_file, is_saved=plan_file is not None)
    if plan_file is None or saved_plan is None or (written := write_plan(plan_file, saved_plan)) == plan_file:
        return planned, None
    return planned, f"{plan_file} is the plan of a real run. The plan of the sandbox is in {written}"


def make_plan(
    job: Job, access: ApiAccess, run_options: RunOptions, rows_file: Path | None = None, *, is_saved: bool = True
) -> tuple[Plan | StepsPlan, SavedPlan | None]:
    """Plan a run. Returns the plan to show and, with `is_saved`, the plan to save, whose digest reads the input again.

    Writes each row's decision to `rows_file`, if given; in the sandbox, the file gets the sandbox's own name. Raises
    the errors that a run would raise before it spends.
    """
    with open_or_empty(job.ledger) as ledger:
        job_input = JobInput(job, erasure.load_forgotten(ledger))
        file_versions = job_input.full_table.file_versions()
        rows_file = _prepare_rows_file(job, rows_file)
        stored = [read_binding(ledger, step) for step in job.steps]
        clock = SystemClock()
        preflight_result = with_client(
            access,
            lambda client, timeout_s: preflight(
                client, stored, access.host, timeout_s, update_providers=run_options.update_providers
            ),
            clock,
        )
        step_rows = make_step_rows(job_input, ledger, preflight_result, run_options)
        budgets = [
            make_budget(step, of_step.template, of_step.balance)
            for step, of_step in zip(job.steps, preflight_result.steps, strict=True)
        ]
        now_ms, is_running = clock.earliest_ms(), is_locked(job.ledger)
        selections = [
            replace(select_requests(step, run_options, now_ms), no_active_run=not is_running) for step in job.steps
        ]
        plan: Plan | StepsPlan
        if step_rows is not None:
            plan = _plan_steps(step_rows, preflight_result, selections, budgets[0].cap, rows_file)
            requests = [step.at_most for step in plan.steps]
        else:
            read = _read_input(job_input, preflight_result.template, ledger, selections[0])
            if rows_file is not None:
                _write_rows(rows_file, job_input, ledger, preflight_result.template, now_ms)
            plan = build_plan(job, preflight_result, ledger, read, budgets[0].cap)
            requests = [plan.to_submit]
        saved_plan = None
        if is_saved:
            saved_plan = SavedPlan(
                made_ms=now_ms,
                ground=gather_plan_inputs(job, preflight_result, job_input),
                limit=run_options.limit,
                sample=run_options.sample,
                seed=run_options.seed,
                retry=sorted(run_options.retry),
                max_credits=job.max_credits,
                requests=requests,
                after_execution=records.newest_execution_id(ledger),
                sandbox=job.sandbox,
            )
        if job_input.full_table.file_versions() != file_versions:
            raise CommandRefused(f"{job.input_path}: the input changed while it was read", "run the command again")
        notes = [
            *job_input.notes(),
            *plan.notes,
            *_notes(job.steps[0], preflight_result.steps[0], plan.to_submit, is_running=is_running),
            *_other_ledger_notes(job, preflight_result, ledger, step_rows, plan.to_submit),
        ]
        return replace(plan, notes=notes), saved_plan


def _read_input(
    job_input: JobInput, template: RequestTemplate, ledger: Database, selection: RequestSelection
) -> RowCounts:
    """Read the input once, and decide in a pass of the ledger what a run would do with its requests."""
    read = RowCounts()
    enroll.begin_pass(ledger)
    # A run that is in progress may store a request that this pass has counted as a new one.
    known = ledger if selection.no_active_run else None
    for batch in job_input.batches(template, job_input.queue_order(), known):
        enroll.preview(ledger, batch.requests(), selection)
        read += RowCounts.from_batch(batch)
    review_refreshes(ledger, selection, template.columns.values(), keep_matches=False)
    enroll.apply_limits(ledger, selection)
    return read


def _plan_steps(
    rows: StepRows, result: Preflight, selections: Sequence[RequestSelection], cap: int | None, rows_file: Path | None
) -> StepsPlan:
    """Plan a run of a job with steps, and write each row's decisions, if a file is given."""
    StepInput(rows, 0).begin(selections[0])
    selections = [replace(selection, limit=None, sample=None) for selection in selections]
    plan = plan_steps(rows, rows.ledger, result, selections, cap)
    if rows_file is not None:
        _write_step_rows(rows_file, rows, selections)
    return plan


def _prepare_rows_file(job: Job, rows_file: Path | None) -> Path | None:
    """Return where the rows are written: a sandbox run has its own name. Raises EnrichError if it cannot be written."""
    if rows_file is None:
        return None
    if job.sandbox:
        rows_file = rows_file.with_name(sandbox_file_name(rows_file.name))
    job.check_not_own(rows_file, "rows")
    if is_written_by_run(job, rows_file):
        raise JobError(f"{rows_file}: the rows would replace a file that a run has written", "choose another name")
    prepare_file(rows_file, job.input_path, job.temporary_name, "plan")
    _check_replaceable(rows_file)
    return rows_file


def _notes(job: Job, preflight_result: Preflight, to_submit: int, *, is_running: bool) -> Iterator[str]:
    if is_running:
        yield "a run of this ledger is in progress: what it does from now on is not in this plan"
    elif rescue_files := find_job_rescue_files(job):
        yield f"a run first imports {rescue_files[0]}: it does not send again what that has"
    if to_submit:
        try:
            check_balance(job, preflight_result.template, preflight_result.balance)
        except CommandRefused as error:
            yield f"{_REFUSED}: {error.message}"


def _other_ledger_notes(
    job: Job, preflight_result: Preflight, ledger: Database, step_rows: StepRows | None, to_submit: int
) -> Iterator[str]:
    """Yield whether a run would be refused because another ledger has paid for the leads, or what is not known."""

    async def submit(function: Callable[..., Any], *args: object) -> object:
        return function(ledger, *args)

    if not job.sandbox:
        refusal, problem = asyncio.run(find_output_of_other_ledger(job, submit))
        if refusal is not None:
            yield f"{_REFUSED}: {refusal.message}; {refusal.hint}"
            return
        if problem is not None:
            yield problem
    overlap = find_overlap(ledger, job, preflight_result.bound_to, step_rows) if to_submit else None
    if overlap is not None:
        error = refusal_to_pay_again(job, overlap)
        yield from (overlap_notes(overlap) if error is None else (f"{_REFUSED}: {error.message}; {error.hint}",))


def _check_replaceable(path: Path) -> None:
    """Raise JobError if a file exists, has content, and was not written by `--rows`."""
    columns: Sequence[str] = ()
    with suppress(CommandRefused, OSError, ValidationError):
        if not path.exists() or not path.stat().st_size:
            return
        columns = list(InputTable(path, Input(path=str(path))).schema)
    if not _LAST_COLUMN.fullmatch("".join(columns[-1:])):
        raise JobError(
            f"{path}: this file exists and was not written by `plan --rows`", "choose another name, or remove the file"
        )


def _write_rows(target: Path, job_input: JobInput, ledger: Database, template: RequestTemplate, now_ms: int) -> None:
    """Write the input with each row's decision. The time is in ms (UTC)."""
    job = job_input.job
    filters = [name for name in ("where", "only_if_empty") if getattr(job.model, name)]
    filtered_reason = f"filtered by {' or '.join(filters)}"

    def frames() -> Iterator[pl.DataFrame]:
        for batch in job_input.batches(template):
            decisions = {decided.position: decided for decided in enroll.row_decisions(ledger, batch.requests())}
            if len(decisions) != batch.statuses.count(None):
                raise CommandRefused(f"{job.input_path}: the input changed while it was read", "run the command again")
            cells = [
                _decision_cells(decisions[position], now_ms)
                if status is None
                else [Decision(status.value), error or filtered_reason, None, None, None]
                for position, (status, error) in enumerate(
                    zip(batch.statuses, batch.errors, strict=True), batch.first_position
                )
            ]
            frame = batch.frame.drop(list(PLAN_COLUMNS), strict=False)  # those of an earlier plan
            yield frame.hstack(pl.DataFrame(cells, PLAN_COLUMNS, orient="row"))

    _write(target, job_input, frames(), PLAN_COLUMNS)


def _write_step_rows(target: Path, rows: StepRows, selections: Sequence[RequestSelection]) -> None:
    """Write the input with each row's decision in every step."""
    columns = [(f"plan_{step.job.step}_decision", f"plan_{step.job.step}_why") for step in rows.steps]
    added = {name: pl.String() for names in columns for name in names}

    def frames() -> Iterator[pl.DataFrame]:
        step_results.begin_plan(rows.ledger)
        for table in rows.step_tables():
            frame = table.frame.drop(list(added), strict=False)  # those of an earlier plan
            for number, made in enumerate(decide_steps(rows, table, selections)):
                cells = list(_step_cells(rows, number, table.steps[number][0], made))
                frame = frame.hstack(pl.DataFrame(cells, dict.fromkeys(columns[number], pl.String), orient="row"))
            yield frame

    _write(target, rows.job_input, frames(), added)


def _step_cells(
    rows: StepRows, number: int, step_batch: StepBatch, made: StepDecisions
) -> Iterator[tuple[Decision, str]]:
    step = rows.steps[number]
    known = [
        name if decision in (*DECISIONS_TO_SEND, Decision.POSSIBLE) and not changes else None
        for name, decision, changes in zip(step_batch.built.fingerprints, made.decisions, made.may_change, strict=True)
    ]
    first_rows = step_results.add_planned(rows.ledger, step.job.step, filter(None, known))
    depends_on = ", ".join(rows.steps[earlier].job.step for earlier in sorted(step.depends_on))
    models = (rows.job_input.job.model, step.job.model)
    filters = [name for name in ("where", "only_if_empty") if any(getattr(model, name) for model in models)]
    for row, decision in enumerate(made.decisions):
        name = known[row]
        if name is not None and name not in first_rows:
            yield Decision.DUPLICATE, f"{DECISION_REASONS[Decision.DUPLICATE]}: {decision.value}"
            continue
        first_rows.discard(name or b"")
        reason = DECISION_REASONS.get(decision, f"sent if the results of {depends_on} require it")
        if decision in (Decision.INVALID, Decision.FILTERED):
            why = step_batch.batch.errors[row] or step_batch.built.errors[row]
            reason = why or f"filtered by {' or '.join(filters)}"
        elif decision is Decision.OVER_LIMIT:
            reason = "over --limit or --sample"
        yield decision, reason


def _write(
    target: Path, job_input: JobInput, frames: Iterator[pl.DataFrame], columns: Mapping[str, pl.DataType]
) -> None:
    schema = {name: kind for name, kind in job_input.schema.items() if name not in columns} | dict(columns)
    output, job = Output(path=str(target)), job_input.job.temporary_name
    write_file(target, output, job=job, schema=schema, frames=frames, new_columns=len(columns), kind="plan")


def _decision_cells(row_decision: RowDecision, now_ms: int) -> list[object]:
    answered_at, age_days, settled_ms = None, None, row_decision.settled_ms
    has_answer = row_decision.decision in (Decision.FOUND, Decision.NOT_FOUND, Decision.REFRESH)
    if has_answer and settled_ms is not None:
        answered_at, age_days = iso_time(settled_ms), round((now_ms - settled_ms) / 86_400_000, 2)
    if row_decision.first_position == row_decision.position:
        return [row_decision.decision, DECISION_REASONS[row_decision.decision], None, answered_at, age_days]
    reason = f"{DECISION_REASONS[Decision.DUPLICATE]}: {row_decision.decision.value}"
    return [Decision.DUPLICATE, reason, row_decision.first_position + 1, answered_at, age_days]

"""Writes the file of `enrich plan --rows`: the input with the decision for each row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import polars as pl
from pydantic import ValidationError

from enrich.errors import CommandRefused, JobError
from enrich.files.reader import InputTable
from enrich.files.writer import write_file
from enrich.job.spec import Input, Output
from enrich.ledger import enroll, step_results
from enrich.ledger.database import Database
from enrich.ledger.enroll import RowDecision
from enrich.models import DECISIONS_TO_SEND, Decision, RequestSelection, iso_time
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.plan import DECISION_REASONS
from enrich.run.step_batch import StepBatch
from enrich.run.step_plan import StepDecisions, decide_steps
from enrich.run.step_rows import StepRows

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


def check_replaceable(path: Path) -> None:
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


def write_rows(target: Path, job_input: JobInput, ledger: Database, template: RequestTemplate, now_ms: int) -> None:
    """Write the input with each row's decision. The time is in ms (UTC)."""
    job = job_input.job
    filters = [name for name in ("where", "only_if_empty") if getattr(job.model, name)]
    filtered_reason = f"filtered by {' or '.join(filters)}"

    def frames() -> Iterator[pl.DataFrame]:
        for batch in job_input.batches(template):
            decisions = {
                row_decision.position: row_decision for row_decision in enroll.row_decisions(ledger, batch.requests())
            }
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


def write_step_rows(target: Path, rows: StepRows, selections: Sequence[RequestSelection]) -> None:
    """Write the input with each row's decision in every step."""
    columns: dict[str, pl.DataType] = {
        name: pl.String() for step in rows.steps for name in _step_columns(step.job.step)
    }

    def frames() -> Iterator[pl.DataFrame]:
        step_results.begin_plan(rows.ledger)
        for table in rows.step_tables():
            frame = table.frame.drop(list(columns), strict=False)  # those of an earlier plan
            for number, made in enumerate(decide_steps(rows, table, selections)):
                cells = list(_step_cells(rows, number, table.steps[number][0], made))
                names = _step_columns(rows.steps[number].job.step)
                frame = frame.hstack(pl.DataFrame(cells, dict.fromkeys(names, pl.String), orient="row"))
            yield frame

    _write(target, rows.job_input, frames(), columns)


def _step_columns(step: str) -> tuple[str, str]:
    return f"plan_{step}_decision", f"plan_{step}_why"


def _step_cells(
    rows: StepRows, number: int, step_batch: StepBatch, made: StepDecisions
) -> Iterator[tuple[Decision, str]]:
    step = rows.steps[number]
    known = [
        name if decision in (*DECISIONS_TO_SEND, Decision.POSSIBLE) and not changes else None
        for name, decision, changes in zip(made.fingerprints, made.decisions, made.may_change, strict=True)
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

"""Makes the plan: what a run would ask and cost, and why each row is or isn't paid for. Pays and changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from enrich.api.client import Client
from enrich.api.credentials import Access
from enrich.budget import make_budget
from enrich.connect import Connection, connect, recall
from enrich.consent import check_balance
from enrich.errors import JobError, Refused
from enrich.execution import Timing
from enrich.forecast import WHY, Plan, foresee
from enrich.job import Job
from enrich.model import ASKED, Decided, Decision, RowStatus, SystemClock, iso
from enrich.planfile import FrozenPlan, ground
from enrich.question import Question
from enrich.rows import Rows
from enrich.spec import Output
from enrich.store.database import exists
from enrich.store.ledger import Ledger
from enrich.store.lock import is_held
from enrich.surroundings import Options, wish
from enrich.tables.writing import prepare, write

#: The columns that `--rows` adds to the input's.
ROW_COLUMNS = {
    "plan_decision": pl.String(),
    "plan_why": pl.String(),
    "plan_same_as_row": pl.Int64(),
    "plan_answered_at": pl.String(),
    "plan_age_days": pl.Float64(),
}


def make_plan(job: Job, access: Access, options: Options, rows_file: Path | None = None) -> tuple[Plan, FrozenPlan]:
    """Plan a run, for a person and to be kept to; write each row's decision to `rows_file`, if there is one.

    Raises what a run would raise before it spends.
    """
    with _ledger(job) as ledger:
        rows = Rows(job, ledger.forgotten())
        stamp = rows.stamp()
        if rows_file is not None:
            if rows_file.exists() and rows_file.samefile(job.document.path):
                raise JobError(f"{rows_file}: the rows would replace the job file", "choose another name")
            prepare(rows_file, job.input_path, job.name, "plan")
        connection = asyncio.run(_connect(job, access, ledger, options))
        rows.check_new_columns(connection.question)
        clock = SystemClock()
        now_ms = clock.now_ms()
        question = connection.question
        budget = make_budget(job, question, connection.balance)
        counts = dict.fromkeys(WHY, 0)
        at_work = bool(is_held(job.ledger))
        ledger.begin_pass(replace(wish(job, options, now_ms), killed=not at_work))
        total = asked = 0
        for batch in rows.batches(question, rows.order()):
            ledger.look(batch.asked())
            total += batch.frame.height
            asked += sum(fingerprint is not None for fingerprint in batch.fingerprints)
            counts[Decision.INVALID] += batch.statuses.count(RowStatus.INVALID)
            counts[Decision.FILTERED] += batch.statuses.count(RowStatus.FILTERED)
        ledger.choose()
        decided = ledger.decided()
        counts |= decided
        counts[Decision.DUPLICATE] = asked - sum(decided.values())
        if rows_file is not None:
            _write_rows(rows_file, job, rows, ledger, (question, now_ms))
        to_submit = sum(counts[decision] for decision in ASKED)
        frozen = FrozenPlan(
            made_ms=now_ms,
            ground=ground(job, question, connection.waterfall, rows),
            limit=options.limit,
            sample=options.sample,
            seed=options.seed,
            retry=sorted(options.retry),
            max_credits=job.max_credits,
            to_submit=to_submit,
            after_execution=max((row["id"] for row in ledger.executions(last=1)), default=0),
        )
        if rows.stamp() != stamp:
            raise Refused(f"{job.input_path}: the input changed while the plan was made", "plan again")
        plan = foresee(job, connection, ledger, total, counts, budget.cap)
        return replace(plan, notes=[*plan.notes, *_notes(job, connection, to_submit, at_work=at_work)]), frozen


def _notes(job: Job, connection: Connection, to_submit: int, *, at_work: bool) -> Iterator[str]:
    if at_work:
        yield "a run is at work in this ledger: what it does from now on is not in this plan"
    if to_submit:
        try:
            check_balance(job, connection.question, connection.balance)
        except Refused as error:
            yield f"a run would be refused: {error.message}"


@contextmanager
def _ledger(job: Job) -> Iterator[Ledger]:
    """Look into the job's ledger, or into an empty one where there is none yet."""
    with TemporaryDirectory() as folder:
        known = exists(job.ledger)
        ledger = Ledger(job.ledger if known else Path(folder) / "none.db", read_only=known)
        with closing(ledger):
            yield ledger


async def _connect(job: Job, access: Access, ledger: Ledger, options: Options) -> Connection:
    async with Client(access, SystemClock()) as client:
        return await connect(
            client,
            recall(ledger, job.model.waterfall),
            job,
            access.host,
            at_most_s=Timing().start_s,
            update_providers=options.update_providers,
        )


def _write_rows(target: Path, job: Job, rows: Rows, ledger: Ledger, now: tuple[Question, int]) -> None:
    """Write the input with each row's decision; `now` is the question and the time (ms)."""
    question, now_ms = now
    named = [name for name in ("where", "only_if_empty") if getattr(job.model, name)]
    filtered = f"left out by {' or '.join(named)}"

    def frames() -> Iterator[pl.DataFrame]:
        for batch in rows.batches(question):
            known = {told.position: told for told in ledger.decisions(batch.asked())}
            if len(known) != batch.statuses.count(None):
                raise Refused(f"{job.input_path}: the input changed while the plan was made", "plan again")
            cells = [
                _cells(known[position], now_ms) if status is None else _not_asked(status, error or filtered)
                for position, (status, error) in enumerate(zip(batch.statuses, batch.errors, strict=True), batch.first)
            ]
            new = [
                pl.Series(name, [row[place] for row in cells], dtype)
                for place, (name, dtype) in enumerate(ROW_COLUMNS.items())
            ]
            yield batch.frame.select(pl.exclude(*ROW_COLUMNS)).hstack(new)

    # The columns of an earlier plan are replaced.
    schema = {name: kind for name, kind in rows.schema.items() if name not in ROW_COLUMNS} | ROW_COLUMNS
    output = Output(path=str(target))
    write(target, output, job=job.name, schema=schema, frames=frames(), new=len(ROW_COLUMNS), kind="plan")


def _not_asked(status: RowStatus, why: str) -> list[object]:
    return [Decision(status.value), why, None, None, None]


def _cells(told: Decided, now_ms: int) -> list[object]:
    at, age = None, None
    if told.decision in (Decision.FOUND, Decision.NOT_FOUND, Decision.REFRESH) and told.settled_ms is not None:
        at, age = iso(told.settled_ms), round((now_ms - told.settled_ms) / 86_400_000, 2)
    if told.first == told.position:
        return [told.decision, WHY[told.decision], None, at, age]
    why = f"{WHY[Decision.DUPLICATE]}: {told.decision.value}"
    return [Decision.DUPLICATE, why, told.first + 1, at, age]

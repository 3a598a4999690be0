"""Enrolls the input of a run: marks its requests in the ledger, and decides which of them to send."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

import polars as pl
from msgspec import Struct
from msgspec.structs import replace

from enrich.errors import EnrichError
from enrich.exit_codes import ExitCode
from enrich.ledger import enroll, erasure, queries, queue, step_results
from enrich.ledger.database import Database
from enrich.ledger.decisions import review_refreshes
from enrich.ledger.step_results import StepChoice, choose_requests
from enrich.models import COUNTED_TOWARDS_LIMIT, DECISIONS_TO_SEND, Decision, RequestSelection, State, pluralize
from enrich.rows.batches import RowBatch, RowCounts, store_batch
from enrich.rows.job_input import JobInput
from enrich.rows.job_steps import StepDecision
from enrich.run.background import start_phase
from enrich.run.budget import Cost
from enrich.run.context import ClusterCallbacks, ClusterEngine, RunContext, RunFiles, RunOptions, select_requests
from enrich.run.progress import Phase
from enrich.run.run_state import Enrolled, RunState
from enrich.run.startup import make_step_rows
from enrich.run.step_batch import LeadSelection, StepBatch
from enrich.run.step_plan import note_on_target
from enrich.run.step_rows import StepRows

INPUT_CHANGED = "the input changed during the run"
#: States of requests whose stored result is reused.
REUSED_STATES = (State.FOUND, State.NOT_FOUND, State.FAILED)
#: What a run does with a request that the ledger does not have.
NEW_REQUEST = StepChoice(Decision.NEW, sent_before=False)
#: Decisions about requests that are not sent again. A row beyond the limit shows their outcome.
FINAL_DECISIONS = (Decision.FOUND, Decision.NOT_FOUND, Decision.FAILED, Decision.EXPIRED, Decision.IN_DOUBT)


class StepInput(Struct, frozen=True):
    """The rows as one step sees them, with the requests that the run may send."""

    rows: StepRows
    number: int

    def begin(self, selection: RequestSelection) -> None:
        """Choose the leads that a limited run begins in this step. Raises JobError, see `StepRows.begin`."""
        if not self.number:
            self.rows.begin()
        if (leads := self.rows.leads) is not None:
            leads.choose(self._candidates(leads, selection), self._queue_order())

    def _candidates(self, leads: LeadSelection, selection: RequestSelection) -> Iterator[tuple[int, bytes | None]]:
        """Yield the rows that would be sent, but for those that the run may send anyway."""
        for step_batch in self.rows.step_batches(self.number, limited=False):
            first_position, names = step_batch.batch.first_position, step_batch.to_send().fingerprints
            choices = self._choose(filter(None, names), selection)
            may_send = leads.may_send(first_position, step_batch.results)
            for row, name in enumerate(names):
                choice = choices.get(name, NEW_REQUEST) if name is not None else None
                if choice is not None and choice.decision in COUNTED_TOWARDS_LIMIT and not may_send[row]:
                    yield first_position + row, name if choice.sent_before else None

    def batches(self, selection: RequestSelection) -> Iterator[RowBatch]:
        """Read the whole input once. Yield the requests that the run may send, and those with a result."""
        for step_batch in self.rows.requesting_batches(self.number, self._queue_order()):
            yield step_batch.to_send(self._final_rows(step_batch, selection))

    def _queue_order(self) -> pl.Series | None:
        return self.rows.job_input.queue_order(self.rows.check_stopped)

    def _final_rows(self, step_batch: StepBatch, selection: RequestSelection) -> set[int]:
        """Return the rows beyond the limit whose request has a result, or is unconfirmed, and is not sent again."""
        if self.rows.leads is None:
            return set()
        names = step_batch.batch.fingerprints
        kept = {
            row: name
            for row in step_batch.requesting_rows
            if step_batch.decisions[row] is StepDecision.KEEP and (name := names[row]) is not None
        }
        choices = self._choose(kept.values(), selection)
        return {row for row, name in kept.items() if choices[name].decision in FINAL_DECISIONS}

    def _choose(self, names: Iterable[bytes], selection: RequestSelection) -> dict[bytes, StepChoice]:
        columns = self.rows.steps[self.number].template.columns.values()
        return choose_requests(self.rows.ledger, names, selection, columns)


async def enroll_input(context: RunContext, run_state: RunState, files: RunFiles, step_number: int) -> None:
    """Mark the requests of a step that the user selected. Nothing is sent before the whole input was read."""
    rows = files.job_input if files.step_rows is None else StepInput(files.step_rows, step_number)
    if not run_state.enrolled:
        run_state.file_versions = files.job_input.full_table.file_versions()
    await _enroll(context, run_state, rows, context.options)


async def enroll_changed_input(context: RunContext, run_state: RunState, files: RunFiles) -> RunFiles:
    """Enroll the input again when its files changed during the run. The next run sends what is new."""
    if context.signals.received is not None:  # the next run reads the input anew
        return files
    versions = await input_versions(files)
    if versions == run_state.file_versions:
        return files
    job_input = JobInput(context.job, await context.ledger_writer.submit(erasure.load_forgotten))
    step_rows = make_step_rows(
        job_input, context.ledger, context.preflight, context.options, context.signals.raise_if_received
    )
    if step_rows is None:
        await _enroll(context, run_state, job_input, RunOptions())
    else:  # the output of a job with steps needs no pass
        await context.ledger_writer.submit(lambda _: step_rows.begin())
    run_state.file_versions = versions
    run_state.exit_reasons.setdefault(ExitCode.API, EnrichError(INPUT_CHANGED, "run again for the new rows"))
    return replace(files, job_input=job_input, step_rows=step_rows)


async def input_versions(files: RunFiles) -> object:
    """Return a value that differs if a file of the input has changed."""
    # In a thread, as a web address is downloaded again.
    return await asyncio.to_thread(files.job_input.full_table.file_versions)


async def _enroll(context: RunContext, run_state: RunState, rows: JobInput | StepInput, options: RunOptions) -> None:
    template, ledger_writer, step = context.preflight.template, context.ledger_writer, context.job.step
    run_state.selection = select_requests(context.job, options, run_state.clock.earliest_ms())
    if isinstance(rows, StepInput):
        await ledger_writer.submit(lambda _: rows.begin(run_state.selection))
        # In a job with steps, `--limit` counts leads, not requests. A plan foresees how many a later step sends.
        limit = options.plan.requests[rows.number] if options.plan and rows.number else None
        sent_in = run_state.execution_id if rows.number else None
        run_state.selection = replace(run_state.selection, limit=limit, sample=None, sent_in=sent_in)
    await start_phase(context, run_state, Phase.ENROLL)
    engine = context.environment.engine
    if engine is None or isinstance(rows, StepInput) or not rows.can_be_enrolled_in_parts:
        read, accepted = await ledger_writer.submit(_enroll_locally, context, run_state.selection, rows)
    else:
        read, accepted = await _enroll_on_cluster(context, run_state, rows, engine)
    if isinstance(rows, StepInput):
        # Steps often read the same cell for a param. Then it counts once.
        read = replace(read, left_out=run_state.read.left_out | read.left_out)
    run_state.read = read
    run_state.accepted_in_doubt += accepted
    decided = await ledger_writer.submit(enroll.decision_counts)
    run_state.requests_to_submit = to_submit = sum(decided.get(decision, 0) for decision in DECISIONS_TO_SEND)
    run_state.new_requests = decided.get(Decision.NEW, 0)
    requests = await ledger_writer.submit(enroll.enrolled_counts)
    if isinstance(rows, StepInput):
        if beyond := decided.get(Decision.OVER_LIMIT):
            run_state.add_note(f"{step}: {pluralize(beyond, 'request')} over the plan left for a later run")
        if to_submit and (note := await ledger_writer.submit(note_on_target, rows.rows.steps, rows.number)) is not None:
            run_state.notes.append(note)
    if (earlier := run_state.enrolled.get(step)) is not None:
        run_state.enrolled[step] = replace(earlier, requests=requests)
        return
    average_price = await ledger_writer.submit(queries.average_price, template.target) if to_submit else None
    cost = Cost.for_requests(to_submit, average_price, template.worst_price).within(context.job.step_max_credits)
    reused = sum(requests[state] for state in REUSED_STATES)
    run_state.enrolled[step] = Enrolled(requests, reused, cost)


async def count_enrolled(context: RunContext, run_state: RunState) -> None:
    """Count the requests of a step by state again, before the pass of the next step begins."""
    enrolled, step = run_state.enrolled, context.job.step
    enrolled[step] = replace(enrolled[step], requests=await context.ledger_writer.submit(enroll.enrolled_counts))


async def count_unsent(context: RunContext, run_state: RunState) -> None:
    """Count the requests of a step at its end. Those that were to be sent again, but were not, keep their answers."""
    await count_enrolled(context, run_state)
    unsent = await context.ledger_writer.submit(queue.queued_count, REUSED_STATES)
    enrolled, step = run_state.enrolled, context.job.step
    enrolled[step] = replace(enrolled[step], reused=enrolled[step].reused + unsent)


def _enroll_locally(
    ledger: Database, context: RunContext, selection: RequestSelection, rows: JobInput | StepInput
) -> tuple[RowCounts, int]:
    """Enroll the input in this process, in one transaction."""
    template, check_stopped = context.preflight.template, context.signals.raise_if_received
    enroll.begin_pass(ledger)
    read = RowCounts()
    if isinstance(rows, StepInput):
        batches = rows.batches(selection)
    else:
        batches = rows.batches(template, rows.queue_order(check_stopped), ledger)
    for batch in batches:
        check_stopped()
        ids = enroll.enroll(ledger, template.target, batch.requests(), selection)
        store_batch(ledger, context.job, batch, ids)
        read += RowCounts.from_batch(batch)
    if context.job.step:
        step_results.record_requesting_rows(ledger, context.job.step)
    return read, _apply_selection(ledger, context, selection)


async def _enroll_on_cluster(
    context: RunContext, run_state: RunState, job_input: JobInput, engine: ClusterEngine
) -> tuple[RowCounts, int]:
    """Enroll the input in many processes. Work done before a kill is repeated."""
    template, selection = context.preflight.template, run_state.selection
    await context.ledger_writer.submit(enroll.begin_pass)
    callbacks = ClusterCallbacks.for_run(run_state, context.signals.raise_if_received)
    read = await asyncio.to_thread(engine.enroll, job_input, template, selection, callbacks)
    return read, await context.ledger_writer.submit(_apply_selection, context, selection)


def _apply_selection(ledger: Database, context: RunContext, selection: RequestSelection) -> int:
    """Decide what to send, once the whole input was read. Returns how many unconfirmed requests became failed."""
    accepts_in_doubt = context.options.accept_in_doubt
    accepted_in_doubt = enroll.accept_in_doubt_as_failed(ledger, selection.sent_in) if accepts_in_doubt else 0
    review_refreshes(
        ledger,
        selection,
        context.preflight.template.columns.values(),
        keep_matches=True,
        check_stopped=context.signals.raise_if_received,
    )
    enroll.apply_limits(ledger, selection)
    queue.fill_queue(ledger, selection)
    return accepted_in_doubt

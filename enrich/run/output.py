"""Writes the files of a run, and counts the rows by status: the output, rejects and changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from hashlib import blake2b

import polars as pl
from msgspec import Struct
from msgspec.structs import replace

from enrich.errors import NOTHING_SENT, CommandRefused, JobError
from enrich.exit_codes import OUTPUT_WRITING_CODES, ExitCode
from enrich.files.values import as_text
from enrich.files.writer import limits_of, prepare_file, write_file
from enrich.job.job import Job
from enrich.job.locations import Location, is_dataset
from enrich.job.spec import Changes, Output
from enrich.ledger import enroll, erasure, queries, records
from enrich.ledger.database import Database
from enrich.models import RequestSelection, RowStatus, State
from enrich.rows.batches import CHANGE_COLUMNS
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.background import out_of_time_error, start_phase
from enrich.run.collector import Collector, OutputCounts
from enrich.run.context import ClusterCallbacks, RunContext, RunFiles, RunOptions, select_requests
from enrich.run.output_cells import JoinedBatch, answer_cells
from enrich.run.preflight import steps_from_ledger, template_from_ledger
from enrich.run.progress import Phase
from enrich.run.run_state import RunState
from enrich.run.step_rows import StepRows
from enrich.run.summary import RunSummary, cost_per_lead, summarize_steps

#: An interrupted run counts the rows for its summary only up to this many, so that it exits quickly.
MAX_ROWS_WHEN_INTERRUPTED = 100_000


class Outcome(Struct, frozen=True):
    """How a run ended. `counts` None: the rows were not counted."""

    code: ExitCode
    counts: OutputCounts | None = None


async def write_known_output(context: RunContext, run_state: RunState, files: RunFiles) -> Outcome:
    """Write the output from the ledger alone, because the API cannot be reached.

    Nothing is written if no run of this ledger has sent anything, or if the ledger cannot have what the job asks for:
    an earlier output may have more. A note gives the reason.
    """

    def prepare(ledger: Database) -> Collector:
        return prepare_collector(ledger, files.job_input, template_from_ledger(ledger, context.job))

    reason = NOTHING_SENT
    if await context.ledger_writer.submit(records.has_own_submissions):
        try:
            collector = await context.ledger_writer.submit(prepare)
        except (JobError, CommandRefused) as error:
            reason = error.message
        else:
            return await write_output(context, run_state, files, collector)
    problem = f"no output is written, and an earlier one is unchanged: {reason}"
    run_state.notes.append(problem)
    context.environment.on_problem(problem)
    return Outcome(run_state.exit_code({}))


async def write_output(
    context: RunContext, run_state: RunState, files: RunFiles, known: Collector | None = None
) -> Outcome:
    """Write the output if the exit code allows it, and count the rows by status.

    `known`: joins an input that this run did not enroll with the results of earlier runs.
    """
    ledger_writer = context.ledger_writer
    await start_phase(context, run_state, Phase.COLLECT)
    settled = run_state.counters.settled
    some_failed = bool(settled.get(State.FAILED) or settled.get(State.EXPIRED) or run_state.accepted_in_doubt)
    code = run_state.exit_code({ExitCode.SOME_FAILED: some_failed})
    template = context.preflight.template
    collector = known or Collector(context.ledger, template, files.job_input, step_rows=files.step_rows)
    if code not in OUTPUT_WRITING_CODES:
        if run_state.read.rows > MAX_ROWS_WHEN_INTERRUPTED:
            return Outcome(code)
        return Outcome(code, await ledger_writer.submit(lambda _: collector.count_rows()))
    collector = replace(collector, check_stopped=context.signals.raise_if_received)
    counts = await _write_target(context, run_state, collector, files.target)
    run_state.files_written["output"] = str(files.target)
    await _write_extra_outputs(context, run_state, collector, files.extra_output_paths)
    # A row whose request is unconfirmed may still show an older result.
    unconfirmed = counts.statuses[RowStatus.IN_DOUBT] or any(
        step.requests[State.IN_DOUBT] for step in run_state.enrolled.values()
    )
    if collector.step_rows is not None and run_state.out_of_time and counts.statuses[RowStatus.PENDING]:
        run_state.exit_reasons.setdefault(ExitCode.TIME, out_of_time_error())
    conditions = {ExitCode.SOME_FAILED: some_failed, ExitCode.IN_DOUBT: bool(unconfirmed)}
    return Outcome(run_state.exit_code(conditions), counts)


async def _write_target(
    context: RunContext, run_state: RunState, collector: Collector, target: Location
) -> OutputCounts:
    """Write the output. With a cluster engine, many processes write a dataset of what was enrolled."""
    engine, dedupe = context.environment.engine, context.job.model.dedupe
    if (
        engine is None
        or not run_state.enrolled
        or collector.step_rows is not None
        or not is_dataset(target)
        or not dedupe
    ):
        return await context.ledger_writer.submit(lambda _: collector.write(target))
    return await asyncio.to_thread(
        engine.collect,
        collector.job_input,
        context.preflight.template,
        run_state.selection,
        target,
        ClusterCallbacks.for_run(run_state, context.signals.raise_if_received),
    )


async def _write_extra_outputs(
    context: RunContext, run_state: RunState, collector: Collector, paths: Mapping[str, Location]
) -> None:
    """Write the rejects and changes files. The ledger records which changes were written."""
    rejects, changes = context.job.model.rejects, context.job.model.changes
    if rejects is not None:
        rejects_path = paths["rejects"]
        rejected = await context.ledger_writer.submit(lambda _: write_rejects(collector, rejects_path, rejects))
        run_state.files_written |= {"rejects": str(rejects_path), "rejected": rejected}
    if changes is not None:
        changes_path = paths["changes"]
        changed = await context.ledger_writer.submit(lambda _: write_changes(collector, changes_path, changes))
        run_state.files_written |= {"changes": str(changes_path), "changed": changed}


#: Rows with these statuses can be corrected or sent again.
REJECTED_STATUSES = (RowStatus.INVALID, RowStatus.FAILED, RowStatus.EXPIRED)
#: The columns of a rejects file after those of the input. They are replaced when the file is used as input.
REJECT_COLUMNS = ("enrich_status", "enrich_error")


def write_rejects(collector: Collector, target: Location, output: Output) -> int:
    """Write the invalid, failed and expired rows unchanged, with the reason. Returns how many."""
    limits = limits_of("rejects", output)

    def rejected(joined: JoinedBatch) -> pl.DataFrame:
        reason_cells = [limits.fit(joined.cells[name])[0] for name in REJECT_COLUMNS]
        return joined.batch.frame.hstack(reason_cells).filter(pl.col("enrich_status").is_in(REJECTED_STATUSES))

    schema = collector.job_input.schema | dict.fromkeys(REJECT_COLUMNS, pl.String())
    return _write_selected(collector, rejected, target, output, kind="rejects", schema=schema, new=REJECT_COLUMNS)


def write_changes(collector: Collector, target: Location, changes: Changes) -> int:
    """Write what is new since the last change feed, one line per field. Returns the number of lines.

    Delivery is recorded in the caller's transaction: if that fails, the same changes are written again.
    """
    key = collector.job_input.change_key
    schema = dict.fromkeys([*key, *CHANGE_COLUMNS], pl.String())
    limits = limits_of("changes", changes)

    records.begin_feed(collector.ledger)

    def changed(joined: JoinedBatch) -> pl.DataFrame:
        frame = pl.DataFrame(list(_changed_cells(collector, joined, key)), schema=schema, orient="row")
        return pl.DataFrame([limits.fit(cells)[0] for cells in frame.get_columns()])

    return _write_selected(collector, changed, target, changes, kind="changes", schema=schema, new=CHANGE_COLUMNS)


def _write_selected(  # noqa: PLR0913 - all of these describe one file
    collector: Collector,
    select: Callable[[JoinedBatch], pl.DataFrame],
    target: Location,
    output: Output,
    *,
    kind: str,
    schema: Mapping[str, pl.DataType],
    new: Sequence[str],
) -> int:
    """Write what is selected of each batch, whose last columns are `new`. Returns the number of rows."""
    count = 0

    def frames() -> Iterator[pl.DataFrame]:
        nonlocal count
        for joined in collector.joined_batches():
            frame = select(joined)
            count += frame.height
            yield frame

    new_columns = len(new)
    write_file(
        target,
        output,
        job=collector.job.temporary_name,
        schema=schema,
        frames=frames(),
        new_columns=new_columns,
        kind=kind,
    )
    return count


class _FeedValue(Struct, frozen=True, gc=False):
    """A value that the output has from an answer. Not tracked by the garbage collector: there are many."""

    value: str
    delivery: records.Delivery
    provider: str | None
    at: str | None


def _changed_cells(collector: Collector, joined: JoinedBatch, key: list[str]) -> Iterator[list[str | None]]:
    """Yield the changes of a batch, and record them as delivered."""
    ledger, job = collector.ledger, collector.job.name
    frame = joined.batch.frame
    keys = frame.select(as_text(frame.get_column(name)) for name in key).rows()
    merged = {
        name: (as_text(frame.get_column(name)).to_list(), as_text(collector.merge_column(joined, name)).to_list())
        for name in collector.merged_columns
    }
    values = _feed_values(joined, {name: cells for name, (_, cells) in merged.items()})
    changes = collector.job.model.changes
    # Equal cells of another `key` are another record. Without one, the cells that are sent are the record.
    named = (changes and changes.key) or []
    row_keys = {index: _row_key(named, keys[index]) for index in sorted(values)}
    # Rows with the same key cells differ in the first request that they have.
    for index in records.repeated_rows(ledger, row_keys):
        requests = (step.fingerprints[index] for step in joined.steps)
        row_keys[index] = _row_key(named, keys[index], next(filter(None, requests), b""))
    delivered = records.delivered_values(ledger, job, row_keys)
    changed = [
        (index, name, found, last)
        for index in row_keys
        for name, found in values[index].items()
        if (last := delivered.get((index, name))) != found.delivery
    ]
    answers = queries.answers(ledger, {last.attempt_id for *_, last in changed if last is not None})
    for index, name, found, last in changed:
        answer = None if last is None else answers[last.attempt_id]
        before = "" if last is None or answer is None else answer_cells(answer, [last.path])[0] or ""
        old = merged[name][0][index] if name in merged else before
        if found.value not in (before, old):
            yield [*keys[index], name, old, found.value, found.provider, found.at]
    records.mark_delivered(ledger, job, [(row_keys[index], name, found.delivery) for index, name, found, _ in changed])


def _feed_values(joined: JoinedBatch, merged: Mapping[str, Sequence[str]]) -> dict[int, dict[str, _FeedValue]]:
    """Return the values of a batch that the output has from answers, by the index of the row, and column."""
    values: dict[int, dict[str, _FeedValue]] = {}
    for step in joined.steps:
        cells_of_status = (step.cells[name].to_list() for name in ("enrich_status", "enrich_provider", "enrich_at"))
        columns = [(name, path, step.cells[name].to_list()) for name, path in step.columns.items()]
        for index, (result, status, *source) in enumerate(zip(step.results(), *cells_of_status, strict=True)):
            if status != RowStatus.FOUND or result is None or result.attempt_id is None or result.erased_ms is not None:
                continue
            for name, path, cells in columns:
                # `merge` may keep the cell of the input.
                if (value := cells[index]) and (name not in merged or merged[name][index] == value):
                    values.setdefault(index, {})[name] = _FeedValue(
                        value, records.Delivery(result.attempt_id, path), *source
                    )
    return values


def _row_key(columns: Sequence[str], cells: Sequence[str], fingerprint: bytes = b"") -> bytes:
    content = json.dumps([columns, cells]).encode() + fingerprint
    return blake2b(content, digest_size=16, person=b"enrich-delivered").digest()


def rebuild_output(job: Job, *, partial: bool) -> RunSummary:
    """Write the output. The caller must hold the ledger's lock.

    Raises CommandRefused when rows are pending and `partial` is not set, or when the ledger does not exist.
    """
    with closing(Database(job.ledger, read_only=True)) as ledger:
        template = template_from_ledger(ledger, job)
        now = datetime.now().astimezone()
        target = job.output_path(now)
        job.extra_output_paths(now)  # raises when the output is one of these files
        prepare_file(target, job.input_path, job.temporary_name)
        job_input = JobInput(job, erasure.load_forgotten(ledger))
        counts = prepare_collector(ledger, job_input, template).write(target, partial=partial)
        _, unknown = queries.spent_totals(ledger) if job.step_jobs else (0, 0)
    summary = RunSummary(
        job.name,
        int(ExitCode.OK),
        sandbox=job.sandbox,
        output=str(target),
        steps=summarize_steps(job, {}, {}, counts),
        cost_per_lead=cost_per_lead(counts, unknown),
    )
    return summary.with_row_counts(counts.statuses, counts.filled_by_column)


def prepare_collector(ledger: Database, job_input: JobInput, template: RequestTemplate) -> Collector:
    """Prepare to join the current input with the ledger alone. Raises EnrichError when the input cannot be read."""
    job = job_input.job
    job_input.check_new_columns(template)
    if job.step_jobs:
        step_rows = StepRows(job_input, ledger, steps_from_ledger(ledger, job, job_input))
        step_rows.begin()
        return Collector(ledger, template, job_input, step_rows=step_rows)
    selection = preview_caps(ledger, template, job_input)
    return Collector(ledger, template, job_input, selection=selection)


def preview_caps(ledger: Database, template: RequestTemplate, job_input: JobInput) -> RequestSelection:
    """Begin a pass of the ledger. If the job has `caps`, decide about all requests, with the selection returned."""
    selection = select_requests(job_input.job, RunOptions(), 0)
    enroll.begin_pass(ledger)
    if job_input.job.model.caps is not None:
        for batch in job_input.batches(template, job_input.queue_order()):
            enroll.preview(ledger, batch.requests(), selection)
        enroll.apply_limits(ledger, selection)
    return selection

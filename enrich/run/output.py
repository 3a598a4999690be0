"""Writes the files of a run, and counts the rows by status."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from enrich.exit_codes import OUTPUT_WRITING_CODES, ExitCode
from enrich.job.locations import Location, is_dataset
from enrich.models import RowStatus, State
from enrich.run.cluster_protocol import ClusterCallbacks
from enrich.run.collector import Collector, OutputCounts
from enrich.run.context import RunContext, RunFiles
from enrich.run.early_end import out_of_time_error
from enrich.run.extra_outputs import write_changes, write_rejects
from enrich.run.progress import Phase
from enrich.run.progress_reports import start_phase
from enrich.run.run_state import RunState

#: An interrupted run counts the rows for its summary only up to this many, so that it exits quickly.
MAX_ROWS_WHEN_INTERRUPTED = 100_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `counts` None: the rows were not counted. `output` None: no output was written."""

    code: ExitCode
    counts: OutputCounts | None = None
    output: Location | None = None


async def write_output(context: RunContext, run_state: RunState, files: RunFiles) -> Outcome:
    """Write the output if the exit code allows it, and count the rows by status."""
    template, ledger_writer = context.preflight.template, context.ledger_writer
    await start_phase(context, run_state, Phase.COLLECT)
    settled = run_state.counters.settled
    some_failed = bool(settled.get(State.FAILED) or settled.get(State.EXPIRED) or run_state.accepted_in_doubt)
    code = run_state.exit_code({ExitCode.SOME_FAILED: some_failed})
    if code not in OUTPUT_WRITING_CODES:
        if (run_state.rows_read or 0) > MAX_ROWS_WHEN_INTERRUPTED:
            return Outcome(code)
        collector = Collector(context.ledger, context.job, template, files.job_input, step_rows=files.step_rows)
        return Outcome(code, await ledger_writer.submit(lambda _: collector.count_rows()))
    collector = Collector(
        context.ledger,
        context.job,
        template,
        files.job_input,
        context.signals.raise_if_received,
        step_rows=files.step_rows,
    )
    counts = await _write_target(context, run_state, collector, files.target)
    await _write_extra_outputs(context, run_state, collector, files.extra_output_paths)
    # A row whose request is unconfirmed may still show an older result.
    unconfirmed = counts.statuses[RowStatus.IN_DOUBT] or (run_state.enrolled.requests() or {}).get(State.IN_DOUBT)
    if files.step_rows is not None and run_state.out_of_time and counts.statuses[RowStatus.PENDING]:
        run_state.exit_reasons.setdefault(ExitCode.TIME, out_of_time_error())
    conditions = {ExitCode.SOME_FAILED: some_failed, ExitCode.IN_DOUBT: bool(unconfirmed)}
    return Outcome(run_state.exit_code(conditions), counts, files.target)


async def _write_target(
    context: RunContext, run_state: RunState, collector: Collector, target: Location
) -> OutputCounts:
    """Write the output. With a cluster engine, many processes write a dataset."""
    job, engine = context.job, context.environment.engine
    if engine is None or collector.step_rows is not None or not is_dataset(target) or not job.model.dedupe:
        return await context.ledger_writer.submit(lambda _: collector.write(target))
    return await asyncio.to_thread(
        engine.collect,
        job,
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
        run_state.extra_outputs |= {"rejects": str(rejects_path), "rejected": rejected}
    if changes is not None:
        changes_path = paths["changes"]
        changed = await context.ledger_writer.submit(lambda _: write_changes(collector, changes_path, changes))
        run_state.extra_outputs |= {"changes": str(changes_path), "changed": changed}

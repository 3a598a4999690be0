"""One run, from the open ledger to the run summary: startup checks, phases, shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from enrich.databar.client import Client
from enrich.errors import LOCKED_HINT, CommandRefused, EnrichError, Interrupted, LedgerLocked, WorkspaceMismatch
from enrich.exit_codes import ExitCode
from enrich.files.writer import prepare_file
from enrich.job.locations import Location
from enrich.ledger.ledger import Ledger
from enrich.ledger.rescue_file import RescueFile
from enrich.ledger.rescue_import import import_rescue_files, remove_imported_files
from enrich.ledger.sqlite import damaged_ledger_error
from enrich.ledger.takeover import LeaseHolder
from enrich.ledger.writer import LOCK_TIMEOUT_S, LedgerWriter
from enrich.rows.reader import JobInput
from enrich.run.budget import Budget, make_run_budget
from enrich.run.context import RunContext, RunOptions, rescue_folders
from enrich.run.earlier_output import find_output_of_other_ledger
from enrich.run.early_end import EarlyEnd
from enrich.run.latencies import save_latencies_periodically
from enrich.run.phases import RunPhases
from enrich.run.poll_schedule import PollSchedule
from enrich.run.preflight import LedgerBinding, Preflight, check_api_host, offline_preflight, preflight, read_binding
from enrich.run.progress import Phase, ProgressReporter
from enrich.run.rate_limit import AdaptiveRateLimiter
from enrich.run.signals import SignalHandler
from enrich.run.state import RunState
from enrich.run.summary import RunSummary

T = TypeVar("T")
#: Seconds between checks whether the processes of an earlier run are gone.
RECHECK_S = 0.5


def run(context: RunContext, options: RunOptions) -> RunSummary:
    """Run a job. The caller must hold the lock of the job's ledger.

    Raises EnrichError for failures before the run is recorded in the ledger.
    """
    return asyncio.run(_run_async(context, options))


async def _run_async(context: RunContext, options: RunOptions) -> RunSummary:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - asyncio.run created it
    signals = SignalHandler(on_first_signal=lambda _: task.cancel())
    timing = context.timeouts
    try:
        with signals.installed():
            client = Client(context.access, context.clock, post_timeout_s=timing.post_s, get_timeout_s=timing.get_s)
            async with client, _open_ledger_writer(context) as ledger_writer:
                return await _execute(context, options, signals, client, ledger_writer)
    except asyncio.CancelledError:
        signals.raise_if_received()
        raise


def _open_ledger_writer(context: RunContext) -> LedgerWriter:
    """Open the ledger writer. For SQLite, what cannot be written to the ledger goes to a rescue file next to it."""
    location = context.ledger.location
    if not isinstance(location, Path):
        return LedgerWriter(context.ledger)
    rescue = partial(RescueFile, location, rescue_folders(context.job))
    ledger_writer = LedgerWriter(context.ledger, new_rescue_file=rescue, lock_timeout_s=LOCK_TIMEOUT_S)
    ledger_writer.on_lock_wait = context.on_message
    return ledger_writer


async def _import_rescue_files(context: RunContext, ledger_writer: LedgerWriter) -> list[str]:
    """Import what an earlier run could not write into the ledger. Returns one note per rescue file.

    Raises CommandRefused for a damaged rescue file.
    """
    job = context.job
    imported = await ledger_writer.submit(import_rescue_files, rescue_folders(job), job.name, context.clock.now_ms())
    return [f"{path} was taken in: {what}" for path, what in remove_imported_files(imported)]


async def _execute(
    context: RunContext, options: RunOptions, signals: SignalHandler, client: Client, ledger_writer: LedgerWriter
) -> RunSummary:
    job, clock = context.job, context.clock
    started_at_s = clock.monotonic()
    await _wait_for_other_processes(context, ledger_writer)
    startup_errors = StartupErrors(context, ledger_writer)
    rescue_notes = await startup_errors.try_step(_import_rescue_files(context, ledger_writer)) or []
    unconfirmed = await ledger_writer.submit(Ledger.recover, clock.now_ms())
    binding = await ledger_writer.submit(read_binding, job.model.waterfall)
    check_api_host(binding, job, context.access.host)
    files = await startup_errors.try_step(_open_files(context, signals, ledger_writer))
    await startup_errors.try_step(_check_new_ledger(context, options, signals, ledger_writer, rescue_notes))
    preflight_result = await startup_errors.try_step(
        _run_preflight(context, options, client, ledger_writer, binding, files)
    )
    phases = await _start_run(
        context, options, signals, client, ledger_writer, preflight_result, startup_errors, started_at_s
    )
    used_preflight = phases.preflight
    run_state = phases.run_state
    if unconfirmed:
        phases.add_note(f"{unconfirmed} requests were on the wire when the last execution was killed: now in doubt")
    for note in [*rescue_notes, *used_preflight.notes]:
        phases.add_note(note)
    with _in_background(
        phases.early_end.enforce_max_time(),
        phases.progress.report_periodically(),
        save_latencies_periodically(run_state, ledger_writer, used_preflight.template, context.job),
    ):
        try:
            await phases.collect_open_tasks()
            if startup_errors.errors or files is None:
                raise startup_errors.errors[0]
            phases.extra_output_paths = files.extra_output_paths
            return await phases.run_phases(files.job_input, files.target)
        except (EnrichError, JSONDecodeError) as failure:
            reason = failure if isinstance(failure, EnrichError) else damaged_ledger_error(job.ledger)
            code = reason.exit_code
            if code is ExitCode.REFUSED and run_state.counters.submitted:
                code = ExitCode.BUG  # exit code 5 promises that nothing was spent
            run_state.exit_reasons.setdefault(code, reason)
            await phases.progress.start_phase(Phase.COLLECT)
            return await phases.finish(run_state.exit_code({}))


async def _wait_for_other_processes(context: RunContext, ledger_writer: LedgerWriter) -> None:
    """Wait until the processes of earlier runs are gone. A SQLite ledger never has any.

    Raises LedgerLocked when another run's leader renews its lease: it is alive, and it lost the server's lock when the
    server restarted.
    """
    first_seen: dict[int, LeaseHolder] = {}
    while others := await ledger_writer.submit(Ledger.other_holders):
        remaining_s = max(other.remaining_s for other in others)
        if not first_seen:
            context.on_message(
                f"an earlier run left processes behind: waiting {remaining_s:.0f} s at most until their leases end"
            )
        for other in others:
            if other.is_leader and other.expires_at_s > first_seen.setdefault(other.id, other).expires_at_s:
                raise LedgerLocked(f"{context.job.ledger}: another execution is at work: {other.name}", LOCKED_HINT)
        if not others[0].is_leader:
            await ledger_writer.submit(Ledger.revoke_leases, others)
        await asyncio.sleep(min(max(remaining_s, 0.01), RECHECK_S))


@contextmanager
def _in_background(*loops: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Run `loops` as tasks during the block, and cancel them at its end."""
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The input, and the locations of the output and of the files written beside it."""

    job_input: JobInput
    target: Location
    extra_output_paths: Mapping[str, Location]


async def _open_files(context: RunContext, signals: SignalHandler, ledger_writer: LedgerWriter) -> RunFiles:
    """Open the input and prepare the location of every file. Raises EnrichError when one of them cannot be used."""
    job, now = context.job, datetime.now().astimezone()
    job.report_path(now)
    target, extra_output_paths = job.output_path(now), job.extra_output_paths(now)
    forgotten = await ledger_writer.submit(Ledger.load_forgotten)
    with signals.interruptible():  # a pipe or object storage may block
        for kind, location in {"output": target, **extra_output_paths}.items():
            prepare_file(location, job.input_path, job.name, kind)
        return RunFiles(JobInput(job, forgotten), target, extra_output_paths)


async def _run_preflight(  # noqa: PLR0913, PLR0917 - every argument is used once
    context: RunContext,
    options: RunOptions,
    client: Client,
    ledger_writer: LedgerWriter,
    binding: LedgerBinding,
    files: RunFiles | None,
) -> Preflight:
    """Query the API before the run. Raises EnrichError when job, input, API and ledger do not match."""
    job = context.job
    result = await preflight(
        client,
        binding,
        job,
        context.access.host,
        timeout_s=context.timeouts.startup_s,
        update_providers=options.update_providers,
        workspace_renamed=options.workspace_renamed,
    )
    workspace = result.bound_to["workspace"]
    if options.workspace_renamed and workspace is not None:
        await ledger_writer.submit(Ledger.rename_workspace, workspace)
    if files is not None:
        files.job_input.check_new_columns(result.template)
    return result


@dataclass(slots=True)
class StartupErrors:
    """Errors that stop a run from starting.

    An error is kept while the API may hold paid results, so that these are collected first. Otherwise it is raised at
    once.
    """

    context: RunContext
    ledger_writer: LedgerWriter
    errors: list[EnrichError] = field(default_factory=list)

    async def try_step(self, work: Awaitable[T]) -> T | None:
        """Await one startup step. Returns None when it fails and the error is kept."""
        try:
            return await work
        except Interrupted:
            raise
        except EnrichError as error:
            if not await self.ledger_writer.submit(_has_open_tasks, self.context):
                raise
            self.errors.append(error)
            return None


def _has_open_tasks(ledger: Ledger, context: RunContext) -> bool:
    """Return whether the API may still hold a result that was paid for."""
    return bool(ledger.submitted_tasks() or ledger.written_off_tasks(context.results_kept_since_ms()))


async def _check_new_ledger(
    context: RunContext, options: RunOptions, signals: SignalHandler, ledger_writer: LedgerWriter, notes: list[str]
) -> None:
    """Refuse a new ledger when an earlier output was paid for from another one, unless the user agrees.

    Raises CommandRefused. Appends a note to `notes` when an earlier output cannot be read.
    """
    if options.new_ledger or await ledger_writer.submit(Ledger.has_own_submissions):
        return
    output, note = await find_output_of_other_ledger(context.job, ledger_writer, signals.interruptible)
    notes += [note] if note is not None else []
    if output is None:
        return
    message = (
        f"{output} was paid for from another ledger: with the new ledger {context.job.ledger} its leads are paid again"
    )
    error = CommandRefused(message, "name the ledger that paid in `ledger:`, or restore it; --new-ledger pays again")
    if options.confirm_new_ledger is not None:
        with signals.interruptible():
            if options.confirm_new_ledger(message):
                return
        error = CommandRefused("cancelled: nothing was sent")
    raise error


async def _start_run(  # noqa: PLR0913, PLR0917 - every argument is used once
    context: RunContext,
    options: RunOptions,
    signals: SignalHandler,
    client: Client,
    ledger_writer: LedgerWriter,
    preflight_result: Preflight | None,
    startup_errors: StartupErrors,
    started_at_s: float,
) -> RunPhases:
    """Record the start of the run with its budget. Without `preflight_result` the run only collects open tasks."""
    job, clock = context.job, context.clock
    effective_preflight = preflight_result or offline_preflight(job)
    if preflight_result is None:
        budget = Budget(0, 0, startup_errors.errors[0].message, startup_errors.errors[0].hint or "")
    else:
        plan = None if options.plan is None else (options.plan.to_submit, options.plan.after_execution)
        budget, cap_error = await ledger_writer.submit(
            make_run_budget, job, effective_preflight.template, effective_preflight.balance, plan
        )
        startup_errors.errors += [cap_error] if cap_error is not None else []
        waterfall = effective_preflight.waterfall
        await ledger_writer.submit(
            Ledger.save_waterfall, waterfall.identifier, waterfall.model_dump(), effective_preflight.providers
        )
    template = effective_preflight.template
    execution_id = await ledger_writer.submit(
        Ledger.start_execution,
        job.name,
        budget.cap,
        clock.now_ms(),
        effective_preflight.balance,
        list(template.columns.values()),
    )
    limits = job.model.limits
    run_state = RunState(
        execution_id,
        clock,
        AdaptiveRateLimiter(limits.requests_per_second),
        context.timeouts,
        max_open_tasks=limits.in_flight,
        result_ttl_s=job.model.policy.result_ttl.total_seconds(),
        lease_valid=context.lease_valid,
        poll_schedule=PollSchedule(
            await ledger_writer.submit(Ledger.load_latencies, template.call, job.model.dispatch.bulk)
        ),
    )
    progress = ProgressReporter(context, run_state, ledger_writer, started_at_s)
    early_end = EarlyEnd(context, run_state, ledger_writer, started_at_s, options.max_time_s)
    phases = RunPhases(
        context, options, signals, client, ledger_writer, effective_preflight, run_state, budget, progress, early_end
    )
    phases.answers_only = any(isinstance(error, WorkspaceMismatch) for error in startup_errors.errors)
    signals.on_first_signal = early_end.interrupt
    ledger_writer.on_failure = early_end.on_ledger_failed
    return phases

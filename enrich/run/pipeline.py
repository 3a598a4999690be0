"""One run, from top to bottom: what may refuse it, its phases, its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from enrich.databar.client import Client
from enrich.databar.environment import ApiAccess
from enrich.errors import CommandRefused, EnrichError, RunDeclined
from enrich.exit_codes import ExitCode
from enrich.job.job import Job
from enrich.ledger import records
from enrich.ledger.database import Database
from enrich.ledger.rescue_file import RescueFile
from enrich.ledger.writer import LedgerWriter
from enrich.run.background import (
    enforce_max_time,
    load_schedule,
    report_progress,
    save_latencies,
    save_latencies_periodically,
)
from enrich.run.budget import NO_BUDGET
from enrich.run.context import RunContext, RunEnvironment, RunFiles, RunOptions, rescue_folders
from enrich.run.dispatcher import max_posts_in_flight
from enrich.run.enrolling import count_unsent, enroll_changed_input, enroll_input
from enrich.run.finish import finish_failed_run, finish_run
from enrich.run.output import write_known_output, write_output
from enrich.run.phases import check_before_spending, collect_open_tasks, repoll_before_resubmitting, submit_and_poll
from enrich.run.plan_file import check_plan, gather_plan_inputs
from enrich.run.preflight import offline_preflight
from enrich.run.run_state import RunState
from enrich.run.signals import SignalHandler, restored_signals
from enrich.run.startup import (
    Startup,
    check_ledger_host,
    check_new_ledger,
    import_rescue_files,
    open_files,
    recover_requests,
    run_preflight,
    start_run,
    wait_for_other_processes,
)
from enrich.run.summary import RunSummary


def run(job: Job, access: ApiAccess, ledger: Database, options: RunOptions, environment: RunEnvironment) -> RunSummary:
    """Run a job. The caller must hold the lock of the job's ledger.

    Raises EnrichError for failures before the run is recorded in the ledger.
    """
    if (plan := options.plan) is not None:
        options = replace(options, limit=plan.limit, sample=plan.sample, seed=plan.seed, retry=frozenset(plan.retry))
    with restored_signals():
        return run_in_event_loop(_open_and_run(job, access, ledger, options, environment))


async def _open_and_run(
    job: Job, access: ApiAccess, ledger: Database, options: RunOptions, environment: RunEnvironment
) -> RunSummary:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - the runner created it
    signals = SignalHandler(on_first_signal=lambda _: task.cancel())
    signals.install()
    loop, timeouts = asyncio.get_running_loop(), environment.timeouts
    environment.stop.add_done_callback(lambda _: signals.stop_soon(loop, ExitCode.INTERRUPTED))
    try:
        client = Client(access, environment.clock, post_timeout_s=timeouts.post_s, get_timeout_s=timeouts.get_s)
        async with client, _open_ledger_writer(job, ledger, environment) as ledger_writer:
            context = RunContext(
                job,
                access,
                ledger,
                options,
                environment,
                signals,
                client,
                ledger_writer,
                started_at_s=environment.clock.monotonic(),
                preflight=offline_preflight(job),
                budgets=(NO_BUDGET,) * len(job.steps),
                max_attempts_by_step=job.max_attempts_by_step,
            )
            return await _run_phases(context)
    except asyncio.CancelledError:
        signals.raise_if_received()
        raise
    finally:
        signals.on_first_signal = lambda _: None  # too late: the run has ended


async def _run_phases(context: RunContext) -> RunSummary:
    """Run the phases in order. Nothing that costs is sent before `submit_and_poll`."""
    # Each check may refuse the run. While tasks of earlier runs are open at the API, its error is postponed.
    startup = Startup(context)
    await wait_for_other_processes(context)
    await startup.check(import_rescue_files)
    await recover_requests(startup)
    await check_ledger_host(context)
    await startup.check(open_files)
    await startup.check(check_new_ledger)
    await startup.check(run_preflight)
    # From here on the run is in the ledger, and ends with a summary.
    context, run_state = await start_run(startup)
    with _in_background(
        enforce_max_time(context, run_state),
        report_progress(context, run_state),
        save_latencies_periodically(context, run_state),
    ):
        try:
            await collect_open_tasks(context, run_state)
            if (outage := startup.outage) is not None and startup.files is not None:
                run_state.exit_reasons.setdefault(outage.exit_code, outage)
                outcome = await write_known_output(context, run_state, startup.files)
                return await finish_run(context, run_state, outcome)
            files = startup.opened_files()
            for number in range(len(context.job.steps)):
                await _run_step(context, run_state, files, number)
            files = await enroll_changed_input(context, run_state, files)
            outcome = await write_output(context, run_state, files)
            return await finish_run(context, run_state, outcome)
        except RunDeclined as refusal:
            # A run in which nothing happened leaves no trace. One that collected open tasks ends with a summary.
            if await context.ledger_writer.submit(records.delete_unless_used, run_state.execution_id):
                raise
            return await finish_failed_run(context, run_state, refusal)
        except (EnrichError, JSONDecodeError) as failure:
            return await finish_failed_run(context, run_state, failure, startup.files)


async def _run_step(job_context: RunContext, run_state: RunState, files: RunFiles, number: int) -> None:
    """Run one step of the job. Its rows see the answers of the steps before. A job without steps is one step."""
    context = job_context.steps()[number]
    if number:
        if run_state.stop_submitting.is_set():
            return
        await save_latencies(context, run_state)
        await load_schedule(context, run_state)
    await enroll_input(context, run_state, files, number)
    await repoll_before_resubmitting(context, run_state)
    if not number and (plan := job_context.options.plan) is not None:
        check_plan(plan, gather_plan_inputs(job_context.job, job_context.preflight, files.job_input))
    try:
        await check_before_spending(context, run_state, files, number)
    except CommandRefused as refusal:
        if not run_state.counters.submitted:
            raise
        # An earlier step has spent, so the output is written, and the rows of this step stay pending.
        run_state.exit_reasons.setdefault(ExitCode.CREDITS, refusal)
    else:
        await submit_and_poll(context, run_state)
    finally:
        if run_state.requests_to_submit:
            await count_unsent(context, run_state)


def _open_ledger_writer(job: Job, ledger: Database, environment: RunEnvironment) -> LedgerWriter:
    """Open the ledger writer. For SQLite, what cannot be written to the ledger goes to a rescue file next to it."""
    location = ledger.location
    if not isinstance(location, Path):
        return LedgerWriter(ledger)
    sizes = [step.model.dispatch.bulk for step in job.steps]
    requests_in_flight = max(max_posts_in_flight(size) * (size or 1) for size in sizes)
    rescue = partial(RescueFile, location, rescue_folders(job), requests_in_flight)
    ledger_writer = LedgerWriter(ledger, rescue)
    ledger_writer.on_lock_wait = environment.on_message
    return ledger_writer


@contextmanager
def _in_background(*loops: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Run `loops` as tasks during the block, and cancel them at its end."""
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


T = TypeVar("T")


def run_in_event_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in a new event loop: uvloop where it is installed (extra `fast`)."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with suppress(ImportError):
        import uvloop  # noqa: PLC0415 - optional, and not needed by commands that run nothing

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)

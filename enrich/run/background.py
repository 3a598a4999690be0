"""What runs beside the phases of a run: shows and stores its progress, saves how long tasks take, ends the run early.

A run ends early after a signal, at --max-time, or when the ledger cannot be written. Nothing new is sent then, answers
in flight are recorded, and ready results are fetched.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from enrich.databar.clock import SystemClock
from enrich.errors import EnrichError, Interrupted, LedgerFailed
from enrich.exit_codes import ExitCode
from enrich.ledger import records
from enrich.models import State, to_credits
from enrich.run.context import RunContext
from enrich.run.poll_schedule import PollSchedule
from enrich.run.progress import Phase, Progress, ProgressSnapshot, TrafficCounts
from enrich.run.run_state import RunState

#: Largest share of --max-time that is reserved for collecting submitted tasks.
COLLECT_TIME_SHARE = 0.2


def out_of_time_error() -> EnrichError:
    """Return the reason of a run that `--max-time` has ended."""
    return EnrichError("--max-time is reached", "the rest is pending; the next run resumes")


def interrupt(context: RunContext, run_state: RunState, code: ExitCode) -> None:
    """End the run after a signal: send no new POST, record answers to POSTs in flight, fetch ready results."""
    run_state.stop(code, Interrupted(code))
    context.ledger_writer.shorten_waits()
    _start_winding_down(context, run_state, run_state.timeouts.drain_posts_s)


def end_without_ledger(context: RunContext, run_state: RunState, error: LedgerFailed) -> None:
    """End the run when the ledger cannot be written: send nothing new; answers in flight go to the rescue file."""
    run_state.stop(error.exit_code, error)
    _start_winding_down(context, run_state, run_state.timeouts.post_s)


async def enforce_max_time(context: RunContext, run_state: RunState) -> None:
    """Stop submitting early enough to collect; abort when --max-time is reached and no POST is in flight."""
    max_time_s = context.options.max_time_s
    if max_time_s is None:
        return
    while (remaining_s := max_time_s - context.elapsed_s() - _collect_reserve_s(run_state, max_time_s)) > 0:
        await run_state.pause(min(remaining_s, 1.0), run_state.abort)
    run_state.out_of_time = True
    run_state.stop_submitting.set()
    run_state.notify_change()
    await asyncio.sleep(max_time_s - context.elapsed_s())
    context.ledger_writer.shorten_waits()
    # A slow POST that is cut off now would be unconfirmed.
    await run_state.wait_for_posts(run_state.timeouts.drain_posts_s)
    run_state.abort_now()
    context.ledger.shorten_waits()


def _collect_reserve_s(run_state: RunState, max_time_s: float) -> float:
    """Return how many seconds to reserve for collecting the running tasks."""
    return min(COLLECT_TIME_SHARE * max_time_s, max(10.0, 4 * run_state.poll_schedule.median_s))


def _start_winding_down(context: RunContext, run_state: RunState, drain_posts_s: float) -> None:
    async def wind_down() -> None:
        run_state.finish_polling()
        await run_state.wait_for_posts(drain_posts_s)
        await asyncio.sleep(run_state.timeouts.ready_results_s)
        run_state.abort_now()
        context.ledger.shorten_waits()

    run_state.early_ends.add(asyncio.create_task(wind_down()))


SHOW_INTERVAL_S = 0.2
STORE_INTERVAL_S = 2.0
#: Interval in seconds at which learned task durations are saved. A kill loses no more than that.
SAVE_EVERY_S = 30.0


async def report_progress(context: RunContext, run_state: RunState) -> None:
    """Show and store the progress until cancelled at the end of the run."""

    async def show_periodically() -> None:
        while True:
            _show(context, run_state)
            await asyncio.sleep(SHOW_INTERVAL_S)

    async def store_periodically() -> None:
        while True:
            await _store(context, run_state)
            await asyncio.sleep(STORE_INTERVAL_S)

    await asyncio.gather(show_periodically(), store_periodically())


async def start_phase(context: RunContext, run_state: RunState, phase: Phase) -> None:
    """Start the next phase, and store the progress so far."""
    run_state.phase = phase
    await _store(context, run_state)


def _show(context: RunContext, run_state: RunState) -> None:
    counters = run_state.counters
    run_state.traffic.record(
        context.elapsed_s(),
        TrafficCounts(counters.submitted, sum(counters.settled.values()), counters.polls, counters.rate_limited),
    )
    context.environment.on_progress(
        Progress(
            total=run_state.total_requests,
            done=counters.completed,
            found=counters.settled.get(State.FOUND, 0),
            spent=to_credits(counters.spent),
            in_flight=run_state.open_tasks,
            submitted=counters.submitted,
            polls=counters.polls,
            rate_limited=counters.rate_limited,
        )
    )


async def _store(context: RunContext, run_state: RunState) -> None:
    _show(context, run_state)
    counters = run_state.counters
    states = {state.value: count for state, count in counters.settled.items() if count}
    if counters.unconfirmed:
        states[State.IN_DOUBT.value] = states.get(State.IN_DOUBT.value, 0) + counters.unconfirmed
    snapshot = ProgressSnapshot(
        at_ms=SystemClock().now_ms(),
        elapsed_s=round(context.elapsed_s(), 3),
        doing=run_state.phase,
        total=run_state.total_requests,
        done=counters.completed,
        found=counters.settled.get(State.FOUND, 0),
        spent=counters.spent,
        in_flight=run_state.open_tasks,
        states=states,
        traffic=run_state.traffic.traffic(),
    )
    with suppress(LedgerFailed):  # the next write reports it
        await context.ledger_writer.submit(records.save_progress, run_state.execution_id, snapshot.as_text())


async def save_latencies(context: RunContext, run_state: RunState) -> None:
    """Save the task durations that this run has learned, if any."""
    schedule, scheduled = run_state.poll_schedule, run_state.scheduled_target
    if schedule.answers_recorded and scheduled is not None:
        target, bulk = scheduled
        await context.ledger_writer.submit(records.save_latencies, target, schedule.weights_by_age, bulk)


async def load_schedule(context: RunContext, run_state: RunState) -> None:
    """Schedule polls by the durations of earlier tasks of the same target."""
    scheduled = context.preflight.template.target, context.job.model.dispatch.bulk
    run_state.poll_schedule = PollSchedule(await context.ledger_writer.submit(records.load_latencies, *scheduled))
    run_state.scheduled_target = scheduled


async def save_latencies_periodically(context: RunContext, run_state: RunState) -> None:
    """Save the task durations until the task is cancelled, so that a kill does not lose them."""
    with suppress(LedgerFailed):  # the next write reports it
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            await save_latencies(context, run_state)

"""What a run does at intervals: shows its progress, and stores it in the ledger with how long tasks take."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from enrich.databar.clock import SystemClock
from enrich.errors import LedgerFailed
from enrich.ledger import records
from enrich.models import State, to_credits
from enrich.run.context import RunContext
from enrich.run.poll_schedule import PollSchedule
from enrich.run.progress import Phase, Progress, ProgressSnapshot, TrafficCounts
from enrich.run.run_state import RunState

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

"""Saves how long tasks take, for the poll times of the next run."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from enrich.errors import LedgerFailed
from enrich.ledger import bindings
from enrich.run.context import RunContext
from enrich.run.poll_schedule import PollSchedule
from enrich.run.run_state import RunState

#: Interval in seconds at which learned task durations are saved. A kill loses no more than that.
SAVE_EVERY_S = 30.0


async def save_latencies(context: RunContext, run_state: RunState) -> None:
    """Save the task durations that this run has learned, if any."""
    schedule, scheduled = run_state.poll_schedule, run_state.scheduled_target
    if schedule.answers_recorded and scheduled is not None:
        target, bulk = scheduled
        await context.ledger_writer.submit(bindings.save_latencies, target, schedule.weights_by_age, bulk)


async def load_schedule(context: RunContext, run_state: RunState) -> None:
    """Schedule polls by the durations of earlier tasks of the same target."""
    scheduled = context.preflight.template.target, context.job.model.dispatch.bulk
    run_state.poll_schedule = PollSchedule(await context.ledger_writer.submit(bindings.load_latencies, *scheduled))
    run_state.scheduled_target = scheduled


async def save_latencies_periodically(context: RunContext, run_state: RunState) -> None:
    """Save the task durations until the task is cancelled, so that a kill does not lose them."""
    with suppress(LedgerFailed):  # the next write reports it
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            await save_latencies(context, run_state)

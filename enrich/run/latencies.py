"""Saves how long tasks take, so that the next run knows when to poll."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from enrich.errors import LedgerFailed
from enrich.job.job import Job
from enrich.ledger.ledger import Ledger
from enrich.ledger.writer import LedgerWriter
from enrich.rows.template import RequestTemplate
from enrich.run.state import RunState

#: Interval in seconds at which learned task durations are saved. A kill loses no more than that.
SAVE_EVERY_S = 30.0


async def save_latencies(run_state: RunState, ledger_writer: LedgerWriter, template: RequestTemplate, job: Job) -> None:
    """Save the task durations that this run has learned, if any."""
    schedule = run_state.poll_schedule
    if schedule.answers_recorded:
        await ledger_writer.submit(
            Ledger.save_latencies, template.call, schedule.weights_by_age, job.model.dispatch.bulk
        )


async def save_latencies_periodically(
    run_state: RunState, ledger_writer: LedgerWriter, template: RequestTemplate, job: Job
) -> None:
    """Save the task durations until the task is cancelled, so that a kill does not lose them."""
    with suppress(LedgerFailed):  # the next write reports it
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            await save_latencies(run_state, ledger_writer, template, job)

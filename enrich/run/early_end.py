"""Ends a run before its work is done: after a signal, at --max-time, or when the ledger cannot be written."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from enrich.errors import Interrupted, LedgerFailed
from enrich.exit_codes import ExitCode
from enrich.ledger.writer import LedgerWriter
from enrich.run.cluster import WorkerPool
from enrich.run.context import RunContext
from enrich.run.poller import Poller
from enrich.run.state import RunState

#: Largest share of --max-time that is reserved for collecting submitted tasks.
COLLECT_TIME_SHARE = 0.2


@dataclass(slots=True)
class EarlyEnd:
    """Winds a run down: nothing new is sent, answers in flight are recorded, ready results are fetched."""

    context: RunContext
    run_state: RunState
    ledger_writer: LedgerWriter
    #: The monotonic time of the run's start, in seconds.
    started_at_s: float
    #: `--max-time` in seconds; None: no limit.
    max_time_s: float | None
    out_of_time: bool = False
    #: Polls each open task once more when the run winds down.
    active_poller: Poller | WorkerPool | None = None
    _background_tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def interrupt(self, code: ExitCode) -> None:
        """Wind down after a signal: send no new POST, record answers to POSTs in flight, fetch ready results."""
        self.run_state.stop(code, Interrupted(code))
        self.ledger_writer.shorten_waits()
        self._start(self.context.timeouts.drain_posts_s)

    def on_ledger_failed(self, error: LedgerFailed) -> None:
        """Wind down when the ledger cannot be written: send nothing new; answers in flight go to the rescue file."""
        self.run_state.stop(error.exit_code, error)
        self._start(self.context.timeouts.post_s)

    async def enforce_max_time(self) -> None:
        """Stop submitting early enough to collect; abort when --max-time is over and no POST is in flight."""
        if self.max_time_s is None:
            return
        clock, deadline = self.context.clock, self.started_at_s + self.max_time_s
        while (remaining_s := deadline - clock.monotonic() - self._collect_reserve_s(self.max_time_s)) > 0:
            await self.run_state.pause(min(remaining_s, 1.0), self.run_state.abort)
        self.out_of_time = True
        self.run_state.stop_submitting.set()
        self.run_state.notify_change()
        await asyncio.sleep(deadline - clock.monotonic())
        self.ledger_writer.shorten_waits()
        # A slow POST that is cut off now would be unconfirmed.
        await self.run_state.wait_for_posts(self.context.timeouts.drain_posts_s)
        self.run_state.abort_now()

    def _collect_reserve_s(self, max_time_s: float) -> float:
        """Return how many seconds to reserve for collecting the running tasks."""
        return min(COLLECT_TIME_SHARE * max_time_s, max(10.0, 4 * self.run_state.poll_schedule.median_s))

    def _start(self, drain_posts_s: float) -> None:
        self._background_tasks.add(asyncio.create_task(self._wind_down(drain_posts_s)))

    async def _wind_down(self, drain_posts_s: float) -> None:
        if self.active_poller is not None:
            self.active_poller.finish_early()
        await self.run_state.wait_for_posts(drain_posts_s)
        await asyncio.sleep(self.context.timeouts.ready_results_s)
        self.run_state.abort_now()
        self.context.ledger.shorten_waits()

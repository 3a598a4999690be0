"""The heartbeat of an execution: while it is at work, it is shown and written down how far it is."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

from enrich.errors import LedgerFailed
from enrich.execution import RunState
from enrich.ledger.ledger import Ledger
from enrich.ledger.writer import LedgerWriter
from enrich.model import State, SystemClock, to_credits
from enrich.pulse import Phase, ProgressSnapshot, TrafficCounts, TrafficRecorder
from enrich.surroundings import Progress, RunContext

SHOW_INTERVAL_S = 0.2
STORE_INTERVAL_S = 2.0


@dataclass(slots=True)
class ProgressReporter:
    """Tells how far an execution is. `started` is the monotonic time of its start."""

    context: RunContext
    run_state: RunState
    ledger_writer: LedgerWriter
    started_at_s: float
    phase: Phase = Phase.RESCUE
    #: How many requests it brings to an end; None: not known yet.
    total_requests: int | None = None
    _traffic: TrafficRecorder = field(default_factory=TrafficRecorder)

    async def report_periodically(self) -> None:
        """Show and write for as long as it is at work; is cancelled at its end."""
        await asyncio.gather(self._show_periodically(), self._store_periodically())

    @property
    def done_requests(self) -> int:
        """How many requests came to their end; a doubt is one for this execution."""
        counters = self.run_state.counters
        return sum(counters.settled.values()) + counters.unconfirmed

    async def start_phase(self, phase: Phase) -> None:
        """Go on to the next step, and write down all that happened before."""
        self.phase = phase
        await self._store()

    async def _show_periodically(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(SHOW_INTERVAL_S)

    async def _store_periodically(self) -> None:
        while True:
            await self._store()
            await asyncio.sleep(STORE_INTERVAL_S)

    def _show(self) -> None:
        counters = self.run_state.counters
        self._traffic.record(self._elapsed_s(), self._traffic_counts())
        self.context.on_progress(
            Progress(
                total=self.total_requests,
                done=self.done_requests,
                found=counters.settled.get(State.FOUND, 0),
                spent=to_credits(counters.spent),
                in_flight=self.run_state.open_tasks,
                submitted=counters.submitted,
                polls=counters.polls,
                rate_limited=counters.rate_limited,
            )
        )

    async def _store(self) -> None:
        self._show()
        with suppress(LedgerFailed):  # whoever writes next tells it
            await self.ledger_writer.submit(
                Ledger.save_progress, self.run_state.execution_id, self._snapshot().model_dump_json()
            )

    def _snapshot(self) -> ProgressSnapshot:
        counters = self.run_state.counters
        states = {state.value: count for state, count in counters.settled.items() if count}
        if counters.unconfirmed:
            states[State.IN_DOUBT.value] = states.get(State.IN_DOUBT.value, 0) + counters.unconfirmed
        return ProgressSnapshot(
            at_ms=SystemClock().now_ms(),
            elapsed_s=round(self._elapsed_s(), 3),
            doing=self.phase,
            total=self.total_requests,
            done=self.done_requests,
            found=counters.settled.get(State.FOUND, 0),
            spent=counters.spent,
            in_flight=self.run_state.open_tasks,
            states=states,
            traffic=self._traffic.traffic(),
        )

    def _traffic_counts(self) -> TrafficCounts:
        counters = self.run_state.counters
        return TrafficCounts(counters.submitted, sum(counters.settled.values()), counters.polls, counters.rate_limited)

    def _elapsed_s(self) -> float:
        return self.context.clock.monotonic() - self.started_at_s

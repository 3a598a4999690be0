"""The heartbeat of an execution: while it is at work, it is shown and written down how far it is."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

from enrich.errors import LedgerFailed
from enrich.execution import Execution
from enrich.model import State, SystemClock, to_credits
from enrich.pulse import Counts, Doing, Meter, Pulse
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from enrich.surroundings import Progress, Surroundings

SHOWN_EVERY_S = 0.2
WRITTEN_EVERY_S = 2.0


@dataclass(slots=True)
class Heartbeat:
    """Tells how far an execution is. `started` is the monotonic time of its start."""

    around: Surroundings
    execution: Execution
    journal: Journal
    started: float
    doing: Doing = Doing.RESCUE
    #: How many requests it brings to an end; None: not known yet.
    total: int | None = None
    _meter: Meter = field(default_factory=Meter)

    async def beat(self) -> None:
        """Show and write for as long as it is at work; is cancelled at its end."""
        await asyncio.gather(self._keep_showing(), self._keep_writing())

    @property
    def done(self) -> int:
        """How many requests came to their end; a doubt is one for this execution."""
        tally = self.execution.tally
        return sum(tally.settled.values()) + tally.doubtful

    async def begin(self, doing: Doing) -> None:
        """Go on to the next step, and write down all that happened before."""
        self.doing = doing
        await self._write()

    async def _keep_showing(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(SHOWN_EVERY_S)

    async def _keep_writing(self) -> None:
        while True:
            await self._write()
            await asyncio.sleep(WRITTEN_EVERY_S)

    def _show(self) -> None:
        tally = self.execution.tally
        self._meter.count(self._elapsed_s(), self._counts())
        self.around.show(
            Progress(
                total=self.total,
                done=self.done,
                found=tally.settled.get(State.FOUND, 0),
                spent=to_credits(tally.spent),
                in_flight=self.execution.in_flight,
                submitted=tally.submitted,
                polls=tally.polls,
                rate_limited=tally.rate_limited,
            )
        )

    async def _write(self) -> None:
        self._show()
        with suppress(LedgerFailed):  # whoever writes next tells it
            await self.journal.do(Ledger.write_pulse, self.execution.id, self._pulse().model_dump_json())

    def _pulse(self) -> Pulse:
        tally = self.execution.tally
        states = {state.value: count for state, count in tally.settled.items() if count}
        if tally.doubtful:
            states[State.IN_DOUBT.value] = states.get(State.IN_DOUBT.value, 0) + tally.doubtful
        return Pulse(
            at_ms=SystemClock().now_ms(),
            elapsed_s=round(self._elapsed_s(), 3),
            doing=self.doing,
            total=self.total,
            done=self.done,
            found=tally.settled.get(State.FOUND, 0),
            spent=tally.spent,
            in_flight=self.execution.in_flight,
            states=states,
            traffic=self._meter.traffic(),
        )

    def _counts(self) -> Counts:
        tally = self.execution.tally
        return Counts(tally.submitted, sum(tally.settled.values()), tally.polls, tally.rate_limited)

    def _elapsed_s(self) -> float:
        return self.around.clock.monotonic() - self.started

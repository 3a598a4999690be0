"""Lets several workers send and poll: has them started, passes on when to stop, adds up what they tell.

They share the queue, which is the ledger: each claims what is next, so no request is claimed by two. The budget is in
the ledger, too, the rate is shared, and what may be in flight is divided among them. How a worker comes to be is its
carrier's to know.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from math import inf
from typing import Protocol

from enrich.allowance import share, unshare
from enrich.errors import EnrichError, LedgerFailed
from enrich.execution import Execution, Tally
from enrich.model import Task
from enrich.pace import Pace
from enrich.place import Postgres
from enrich.store.dialect import DatabaseFailed
from enrich.worker import Errand, Told, Word

#: So long a worker that shall leave may take to write down what it knows.
LEAVE_S = 3.0
#: How often the boss looks after those who say nothing.
LOOK_S = 0.5
#: Who has not said a word so long after it was hired will not come; it may be that its cluster has no room.
START_S = 120.0
#: Who has said nothing for so many leases will not speak again.
LEASES = 2
#: So many are hired in the place of each that was lost, all told.
SPARES = 3


class Hand(Protocol):
    """One worker, as its boss knows it."""

    @property
    def told(self) -> Told:
        """What it told last."""

    @property
    def gone(self) -> asyncio.Event:
        """Whether it is not there any more; it has told all that it ever will."""

    @property
    def listening(self) -> bool:
        """Whether it has its errand, and hears words."""

    @property
    def why(self) -> str:
        """Why it went before its work was done."""

    async def hand_over(self, errand: Errand) -> None:
        """Tell it what to do; takes as long as its start."""

    def say(self, word: Word) -> None:
        """Tell it how to go on, if it is still there."""

    async def end(self) -> None:
        """End it, if it is still there, and forget it."""


#: Starts a worker; whoever asks is called whenever it tells something, or is gone. Raises OSError without room for it.
Hire = Callable[[Callable[[Hand], None]], Hand]


class Carrier(Protocol):
    """Knows how a worker comes to be, and how they share the pace."""

    @property
    def heirs(self) -> bool:
        """Whether the others inherit what one was at that is gone, so that they may go on."""

    def sharing(self, pace: Pace) -> AbstractAsyncContextManager[Hire]:
        """Share the pace while workers are hired and at work. Raises OSError when the system has no room for it."""


@asynccontextmanager
async def shared(ledger: Postgres, pace: Pace) -> AsyncIterator[None]:
    """Share a pace by the ledger's row; who shared it goes on with what all have learned."""
    try:
        await asyncio.to_thread(share, ledger, pace)
        try:
            yield
        finally:
            learned = await asyncio.to_thread(unshare, ledger)
            if learned is not None:
                vars(pace).update(vars(learned))
    except DatabaseFailed as error:
        raise LedgerFailed(f"the ledger cannot be written: {error}", "then run the same command again") from error


@dataclass(slots=True)
class Crew:
    """Several workers that do together what dispatcher and poller of one would.

    `errand` is what each is told, but for its part of the tasks.
    """

    execution: Execution
    errand: Errand
    carrier: Carrier
    #: Why workers went before their work was done, or could not be started. Unless they have heirs the others are
    #: stopped then; what is left is another's.
    lost: list[str] = field(default_factory=list)
    _hands: list[Hand] = field(default_factory=list)
    #: For how many looks in a row each has told nothing.
    _silent: dict[Hand, int] = field(default_factory=dict)
    #: Those who have told anything at all, those who told nothing more, and those who came when all was done.
    _spoke: set[Hand] = field(default_factory=set)
    _mute: set[Hand] = field(default_factory=set)
    _late: set[Hand] = field(default_factory=set)
    #: In whose place others are to be hired: not of those who never came.
    _missed: int = 0
    _before: Tally = field(default_factory=Tally)

    async def run(self, tasks: Sequence[Task]) -> None:
        """Send and poll to the end; `tasks` were left at the API before. No worker is left when this returns."""
        execution = self.execution
        self._before = execution.tally
        passing_on: list[asyncio.Task[None]] = []
        try:
            async with self.carrier.sharing(execution.pace) as hire:
                try:
                    await self._start_all(hire, tasks)
                    for event, word in ((execution.closing, Word.CLOSE), (execution.giving_up, Word.GIVE_UP)):
                        passing_on.append(asyncio.create_task(self._pass_on(event, word)))
                    await self._attend(hire)
                finally:
                    for passing in passing_on:
                        passing.cancel()
                    await self._dismiss()
                    execution.in_flight = execution.on_the_wire = 0
        except OSError as error:  # the system has no room for what they share
            self.lost.append(error.strerror or str(error))

    def hurry(self) -> None:
        """Let every task be asked once more, now."""
        self._say(Word.HURRY)
        self._add_up()  # what was told before is not all that is on the wire

    @property
    def _present(self) -> list[Hand]:
        return [hand for hand in self._hands if not hand.gone.is_set()]

    async def _start_all(self, hire: Hire, tasks: Sequence[Task]) -> None:
        """Start the workers, and give each its part of the tasks."""
        count = self.errand.shift.processes
        try:
            for _ in range(count):
                self._hands.append(hire(self._hear))
        except OSError as error:  # the system has no room for another
            self.lost.append(error.strerror or str(error))
        for number, hand in enumerate(self._hands):
            await hand.hand_over(replace(self.errand, tasks=tuple(tasks[number::count])))
        if self.lost and not self.carrier.heirs:
            self._say(Word.CLOSE)

    async def _attend(self, hire: Hire) -> None:
        """Wait until all are gone; hire others for those who were lost, where that helps."""
        while present := await self._replaced(hire):
            if self._all_done(present):
                self._late.update(present)
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await present[0].gone.wait()
                continue
            if self.carrier.heirs:
                await self._give_up_silent(present)

    def _all_done(self, present: Sequence[Hand]) -> bool:
        """Tell whether nothing is left for those who have not begun yet: nothing is theirs beforehand."""
        none_begun = self._spoke.isdisjoint(present)
        return self.carrier.heirs and none_begun and any(hand.told.ended for hand in self._hands)

    async def _replaced(self, hire: Hire) -> Sequence[Hand]:
        """Hire others for those who were lost; return all who are there."""
        while self._missed and not self.execution.closing.is_set():
            self._missed -= 1
            with suppress(OSError):
                self._hands.append(hand := hire(self._hear))
                await hand.hand_over(self.errand)
        return self._present

    async def _give_up_silent(self, present: Sequence[Hand]) -> None:
        """End those who have said nothing for so long that what they were at is another's by now."""
        for hand in present:
            # Looks are counted, not seconds: all are silent while the machine sleeps.
            self._silent[hand] = self._silent.get(hand, 0) + 1
            if self._silent[hand] * LOOK_S > (self._lease_s * LEASES if hand in self._spoke else START_S):
                self._mute.add(hand)
                await hand.end()

    @property
    def _lease_s(self) -> float:
        return self.errand.ledger.lease_s if isinstance(self.errand.ledger, Postgres) else inf

    def _hear(self, hand: Hand) -> None:
        """Hear how far a worker is, or that it is gone."""
        if not hand.gone.is_set():
            self._spoke.add(hand)
            self._silent[hand] = 0
        elif not hand.told.ended and hand not in self._late:
            self.lost.append("it said nothing any more" if hand in self._mute else hand.why)
            if not self.carrier.heirs:
                self._say(Word.CLOSE)
            elif self._had_come(hand) and len(self.lost) <= SPARES * self.errand.shift.processes:
                self._missed += 1
        self._add_up()

    def _had_come(self, hand: Hand) -> bool:
        """Tell whether a worker that is lost was there: one that died was, one for which there is no room was not."""
        return hand in self._spoke or hand not in self._mute

    def _add_up(self) -> None:
        """Know of the execution what all of them know."""
        execution, all_told = self.execution, [hand.told for hand in self._hands]
        execution.tally = sum((told.tally for told in all_told), self._before)
        execution.in_flight = sum(hand.told.in_flight for hand in self._present)
        execution.poll_times = next((told.poll_times for told in all_told if told.poll_times), execution.poll_times)
        for told in all_told:
            for code, (message, hint) in told.reasons.items():
                execution.reasons.setdefault(code, EnrichError(message, hint))
            if self.carrier.heirs or not self.lost:  # else they close since we say so
                if told.giving_up:
                    execution.giving_up.set()
                if told.closing:
                    execution.closing.set()
        closing = execution.closing.is_set()
        execution.on_the_wire = sum(on_the_wire(hand, closing=closing) for hand in self._present)
        execution.notify()

    async def _pass_on(self, event: asyncio.Event, word: Word) -> None:
        await event.wait()
        self._say(word)

    def _say(self, word: Word) -> None:
        for hand in self._hands:
            hand.say(word)

    async def _dismiss(self) -> None:
        """Let them leave, and end who doesn't; listen to the last word of each."""
        self._say(Word.LEAVE)
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                for hand in self._hands:
                    await hand.gone.wait()
        for hand in self._hands:
            await hand.end()


def on_the_wire(hand: Hand, *, closing: bool) -> int:
    """Tell how many POSTs a worker has on the wire; until it tells that it sends no more, at least one may be there."""
    told = hand.told
    unknown = closing and hand.listening and not (told.closing or told.ended or hand.gone.is_set())
    return max(told.on_the_wire, int(unknown))

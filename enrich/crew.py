"""Lets several workers send and poll: has them started, passes on when to stop, adds up what they tell.

They share the queue, which is the ledger: each claims what is next, so no request is claimed by two. The budget is in
the ledger, too, the rate is shared, and what may be in flight is divided among them. How a worker comes to be is its
carrier's to know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from enrich.errors import EnrichError
from enrich.execution import Execution, Tally
from enrich.model import Task
from enrich.pace import Pace
from enrich.worker import Errand, Told, Word

#: So long a worker that shall leave may take to write down what it knows.
LEAVE_S = 3.0


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

    def sharing(self, pace: Pace) -> AbstractContextManager[Hire]:
        """Share the pace while workers are hired and at work. Raises OSError when the system has no room for it."""


@dataclass(slots=True)
class Crew:
    """Several workers that do together what dispatcher and poller of one would.

    `errand` is what each is told, but for its part of the tasks.
    """

    execution: Execution
    errand: Errand
    carrier: Carrier
    #: Whether one ended before its work did, killed perhaps, or could not be started. The others are stopped then;
    #: what is left is another's.
    lost: bool = False
    _hands: list[Hand] = field(default_factory=list)
    _before: Tally = field(default_factory=Tally)

    async def run(self, tasks: Sequence[Task]) -> None:
        """Send and poll to the end; `tasks` were left at the API before. No worker is left when this returns."""
        execution = self.execution
        self._before = execution.tally
        passing_on: list[asyncio.Task[None]] = []
        try:
            with self.carrier.sharing(execution.pace) as hire:
                try:
                    await self._start_all(hire, tasks)
                    for event, word in ((execution.closing, Word.CLOSE), (execution.giving_up, Word.GIVE_UP)):
                        passing_on.append(asyncio.create_task(self._pass_on(event, word)))
                    for hand in self._hands:
                        await hand.gone.wait()
                finally:
                    for passing in passing_on:
                        passing.cancel()
                    await self._dismiss()
                    execution.in_flight = execution.on_the_wire = 0
        except OSError:  # the system has no room for what they share
            self.lost = True

    def hurry(self) -> None:
        """Let every task be asked once more, now."""
        self._say(Word.HURRY)
        self._add_up()  # what was told before is not all that is on the wire

    async def _start_all(self, hire: Hire, tasks: Sequence[Task]) -> None:
        """Start the workers, and give each its part of the tasks."""
        count = self.errand.shift.processes
        try:
            for _ in range(count):
                self._hands.append(hire(self._hear))
        except OSError:  # the system has no room for another
            self.lost = True
        for number, hand in enumerate(self._hands):
            await hand.hand_over(replace(self.errand, tasks=tuple(tasks[number::count])))
        if self.lost:
            self._say(Word.CLOSE)

    def _hear(self, hand: Hand) -> None:
        """Hear how far a worker is, or that it is gone."""
        if hand.gone.is_set() and not hand.told.ended:
            self.lost = True
            self._say(Word.CLOSE)
        self._add_up()

    def _add_up(self) -> None:
        """Know of the execution what all of them know."""
        execution, all_told = self.execution, [hand.told for hand in self._hands]
        execution.tally = sum((told.tally for told in all_told), self._before)
        execution.in_flight = sum(told.in_flight for told in all_told)
        execution.poll_times = next((told.poll_times for told in all_told if told.poll_times), execution.poll_times)
        for told in all_told:
            for code, (message, hint) in told.reasons.items():
                execution.reasons.setdefault(code, EnrichError(message, hint))
            if not self.lost:  # then they close since we say so
                if told.giving_up:
                    execution.giving_up.set()
                if told.closing:
                    execution.closing.set()
        closing = execution.closing.is_set()
        execution.on_the_wire = sum(on_the_wire(hand, closing=closing) for hand in self._hands)
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

"""Lets several workers submit and poll: starts them, passes on when to stop, adds up their reports.

They share the queue, which is the ledger: each claims what is next, so no request is claimed by two. The budget and the
rate are in the ledger, too, and what may be in flight is divided among them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from enrich.allowance import share, unshare
from enrich.dispatcher import posts_on_the_wire
from enrich.engine import Hand
from enrich.errors import EnrichError, LedgerFailed
from enrich.execution import Execution, Tally
from enrich.pace import Pace
from enrich.place import Postgres
from enrich.shift import Shift
from enrich.store.dialect import DatabaseFailed
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from enrich.surroundings import Surroundings
from enrich.worker import Errand, Word

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
#: How often it is looked whether the lease of a lost worker ran out, in seconds.
LOOK_AGAIN_S = 0.5


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
    """Several workers that do together what dispatcher and poller of one would; each gets the same errand.

    One that is lost is replaced, and the others take on what it held.
    """

    execution: Execution
    errand: Errand
    #: Starts a worker; see `Engine`.
    hire: Callable[[Errand, Callable[[Hand], None]], Hand]
    #: Why workers ended before their work was done.
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

    async def run(self) -> None:
        """Submit and poll to the end. No worker is left when this returns."""
        execution = self.execution
        self._before = execution.tally
        passing_on: list[asyncio.Task[None]] = []
        async with shared(self.errand.ledger, execution.pace):
            try:
                for _ in range(self.errand.shift.workers):
                    self._hire()
                for event, word in ((execution.closing, Word.CLOSE), (execution.giving_up, Word.GIVE_UP)):
                    passing_on.append(asyncio.create_task(self._pass_on(event, word)))
                await self._attend()
            finally:
                for passing in passing_on:
                    passing.cancel()
                await self._dismiss()
                execution.in_flight = execution.on_the_wire = 0

    def hurry(self) -> None:
        """Let every task be asked once more, now."""
        self._say(Word.HURRY)
        self._add_up()  # what was told before is not all that is on the wire

    @property
    def _present(self) -> list[Hand]:
        return [hand for hand in self._hands if not hand.gone.is_set()]

    def _hire(self) -> None:
        self._hands.append(self.hire(self.errand, self._hear))

    async def _attend(self) -> None:
        """Wait until all are gone; start others for those that were lost, where that helps."""
        while present := self._replaced():
            if self._all_done(present):
                self._late.update(present)
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await present[0].gone.wait()
                continue
            await self._give_up_silent(present)

    def _all_done(self, present: Sequence[Hand]) -> bool:
        """Tell whether nothing is left for those who have not begun yet: nothing is theirs beforehand."""
        none_begun = self._spoke.isdisjoint(present)
        return none_begun and any(hand.told.ended for hand in self._hands)

    def _replaced(self) -> Sequence[Hand]:
        """Start others for those that were lost; return all that are there."""
        while self._missed and not self.execution.closing.is_set():
            self._missed -= 1
            self._hire()
        return self._present

    async def _give_up_silent(self, present: Sequence[Hand]) -> None:
        """End those who have said nothing for so long that what they were at is another's by now."""
        for hand in present:
            # Looks are counted, not seconds: all are silent while the machine sleeps.
            self._silent[hand] = self._silent.get(hand, 0) + 1
            if self._silent[hand] * LOOK_S > (self.errand.ledger.lease_s * LEASES if hand in self._spoke else START_S):
                self._mute.add(hand)
                await hand.end()

    def _hear(self, hand: Hand) -> None:
        """Hear how far a worker is, or that it is gone."""
        if not hand.gone.is_set():
            self._spoke.add(hand)
            self._silent[hand] = 0
        elif not hand.told.ended and hand not in self._late:
            self.lost.append("it said nothing any more" if hand in self._mute else hand.why)
            if self._had_come(hand) and len(self.lost) <= SPARES * self.errand.shift.workers:
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


def make_crew(around: Surroundings, execution: Execution, shift: Shift, work: int) -> Crew | None:
    """Make the crew for so many requests; None: there is no engine, or no need of workers."""
    ledger, engine = around.ledger.place, around.engine
    if engine is None or not isinstance(ledger, Postgres):
        return None
    workers = min(engine.workers, execution.in_flight_limit, posts_on_the_wire(shift.bulk), work)
    if workers < 1:
        return None
    errand = Errand(
        replace(shift, workers=workers),
        around.access,
        ledger,
        execution.id,
        around.timing,
        execution.in_flight_limit // workers,
        execution.result_ttl_s / workers,  # each has its share of the rate to fetch with
        execution.poll_times,
        around.ledger.owner,
    )
    return Crew(execution, errand, engine.hire)


async def settle_lost_workers(crew: Crew, journal: Journal, note: Callable[[str], None]) -> None:
    """Tell that workers were lost, and wait until what they held is in doubt, or free for any poller."""
    execution = crew.execution
    lost = ", ".join(f"{count} times: {why}" if count > 1 else why for why, count in Counter(crew.lost).items())
    note(f"workers were lost ({lost}): what they were at was given to others")
    while (others := await journal.do(Ledger.others)) and not execution.giving_up.is_set():
        left_s = max(other.left_s for other in others)
        await execution.pause(min(max(left_s, 0.01), LOOK_AGAIN_S), execution.giving_up)
    await journal.do(Ledger.recover, execution.clock.now_ms())

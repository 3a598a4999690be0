"""One of several workers over a ledger on a server: submits and polls, reports how far it is, and takes words.

It holds a lease of its own. It takes on what workers that are gone have left, and begins anew when its lease ran out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from enrich.allowance import Allowance
from enrich.api.client import Client
from enrich.api.credentials import Access
from enrich.errors import EnrichError, Exit, LeaderGone, LeaseLost
from enrich.execution import Execution, Tally, Timing
from enrich.model import SystemClock, Task
from enrich.pace import Pace
from enrich.place import Postgres
from enrich.poller import Poller
from enrich.polls import PollTimes
from enrich.shift import Shift
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from enrich.store.opening import leased

#: How often a worker looks for tasks that nobody holds, in seconds.
ADOPT_S = 1.0


class Word(Enum):
    """What a worker is told while it works."""

    CLOSE = auto()  # no new POST leaves
    GIVE_UP = auto()  # nothing more is asked
    HURRY = auto()  # every task is asked once more
    LEAVE = auto()  # nothing is waited for any more


@dataclass(frozen=True, slots=True)
class Errand:
    """What a worker is told at its start; it has an equal share of what may be in flight."""

    shift: Shift
    access: Access
    ledger: Postgres
    execution: int
    timing: Timing
    in_flight_limit: int
    result_ttl_s: float
    poll_times: PollTimes
    #: The owner that leads the execution.
    leader: int | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """How far a worker is; `ended` comes once, when all that it knew is in the ledger."""

    tally: Tally = field(default_factory=Tally)
    in_flight: int = 0
    on_the_wire: int = 0
    reasons: dict[Exit, tuple[str, str | None]] = field(default_factory=dict)
    closing: bool = False
    giving_up: bool = False
    poll_times: PollTimes | None = None
    ended: bool = False


class Worker:
    """Does one errand. May be told words, and asked how far it is, at any time."""

    def __init__(self, errand: Errand) -> None:
        """Make ready; nothing is sent before `work`."""
        self._errand = errand
        self._poller: Poller | None = None
        self._hurried = False
        self._execution = Execution(
            errand.execution,
            SystemClock(),
            Pace(None),
            errand.timing,
            in_flight_limit=errand.in_flight_limit,
            result_ttl_s=errand.result_ttl_s,
            poll_times=errand.poll_times,
        )

    def obey(self, word: Word) -> None:
        """Go on as the word says."""
        execution = self._execution
        match word:
            case Word.CLOSE:
                execution.closing.set()
                execution.notify()
            case Word.GIVE_UP:
                execution.closing.set()
                execution.giving_up.set()
                execution.notify()
            case Word.HURRY:
                self._hurried = True
                if self._poller is not None:
                    self._poller.hurry()
            case Word.LEAVE:
                execution.leave()

    async def leave_alone(self, at_most_s: float) -> None:
        """Without anybody to obey write down what is on the wire, and leave."""
        self.obey(Word.CLOSE)
        await self._execution.wire_empty(at_most_s)
        self._execution.leave()

    def told(self, *, ended: bool = False) -> Told:
        """Tell how far it is."""
        execution = self._execution
        return Told(
            execution.tally,
            execution.in_flight,
            execution.on_the_wire,
            {code: (error.message, error.hint) for code, error in execution.reasons.items()},
            execution.closing.is_set(),
            execution.giving_up.is_set(),
            execution.poll_times,
            ended,
        )

    async def work(self) -> None:
        """Do the errand; what goes wrong is told."""
        execution = self._execution
        try:
            with Allowance(self._errand.ledger) as execution.pace:
                while not await self._live() and not execution.closing.is_set():
                    execution.in_flight = execution.on_the_wire = 0
        except EnrichError as error:
            # 5 promises that nothing was spent.
            execution.stop(Exit.BUG if error.exit_code is Exit.REFUSED else error.exit_code, error)

    async def _live(self) -> bool:
        """Work for as long as one lease holds; tell whether there was nothing more to do before it was lost."""
        errand, execution = self._errand, self._execution
        try:
            with leased(errand.ledger, follows=errand.leader) as (ledger, lease):
                execution.clock, execution.holds = lease, lease.holds
                client = Client(errand.access, lease, post_s=errand.timing.post_s, get_s=errand.timing.get_s)
                async with client, Journal(ledger) as journal:
                    tasks = await self._free(journal)
                    while tasks := await self._send(journal, client, tasks):
                        pass
        except LeaderGone:
            pass  # we were asleep, and may wake up long after
        except LeaseLost:
            return False
        return True

    async def _send(self, journal: Journal, client: Client, tasks: Sequence[Task]) -> Sequence[Task]:
        """Submit and poll, also what others leave behind meanwhile; return what they left in the last moment."""
        execution, ended = self._execution, asyncio.Event()
        late: list[Task] = []
        poller = self._poller = self._errand.shift.poller(execution, journal, client)
        if self._hurried:
            poller.hurry()
        poller.adopt(tasks, asked_before=True)

        async def send() -> None:
            try:
                await self._errand.shift.work(poller)
            finally:
                ended.set()

        async def keep_adopting() -> None:
            while not ended.is_set():
                await execution.pause(ADOPT_S, ended)
                found = await self._free(journal)
                if ended.is_set():
                    late.extend(found)
                else:
                    poller.adopt(found, asked_before=True)

        await execution.until_leaving(send(), keep_adopting())
        return late

    async def _free(self, journal: Journal) -> Sequence[Task]:
        """Take tasks that nobody holds, as many as there is room for."""
        execution = self._execution
        room = execution.in_flight_limit - execution.in_flight - execution.on_the_wire
        if room <= 0 or self._hurried or execution.giving_up.is_set():
            return ()
        return await journal.do(Ledger.adopt, room)

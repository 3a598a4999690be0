"""One worker of a crew: sends and polls, tells how far it is, and obeys.

How it came to be, and whom it obeys, is nothing to it. At a ledger that is a file it shares a slate with the others; at
one on a server it is an owner of its own, by a lease: what others leave behind who are gone it takes on, and when its
own lease ran out it begins anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from pathlib import Path

from enrich.allowance import Allowance
from enrich.api.client import Client
from enrich.api.credentials import Access
from enrich.errors import EnrichError, Exit, LeaderGone, LeaseLost, LedgerFailed
from enrich.execution import Execution, Tally, Timing
from enrich.model import SystemClock, Task
from enrich.pace import Pace
from enrich.place import LedgerPlace, Postgres
from enrich.poller import Poller
from enrich.polls import PollTimes
from enrich.sharedpace import SharedPace, Slate
from enrich.shift import Shift
from enrich.store.journal import LOCKED_S, Journal
from enrich.store.ledger import Ledger
from enrich.store.opening import leased
from enrich.store.rescue_file import RescueFile

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
    ledger: LedgerPlace
    execution: int
    timing: Timing
    in_flight_limit: int
    result_ttl_s: float
    clock_offset_ms: int
    poll_times: PollTimes
    #: The owner that leads the execution, at a ledger on a server.
    leader: int | None = None
    #: The descriptor of its slate.
    pace: int = -1
    #: What was left at the API before, and is this worker's to collect.
    tasks: tuple[Task, ...] = ()
    #: Where a rescue file may lie when the ledger's folder is gone.
    rescue_folders: tuple[Path, ...] = ()


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
        self._helper: asyncio.Task[None] | None = None
        self._execution = Execution(
            errand.execution,
            SystemClock(errand.clock_offset_ms),
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

    def _ledger_failed(self, error: LedgerFailed) -> None:
        """Send nothing more; what is on the wire is waited for, as it is kept elsewhere."""
        self._execution.stop(error.exit_code, error)
        self.obey(Word.HURRY)
        self._helper = asyncio.create_task(self._wind_down())

    async def _wind_down(self) -> None:
        timing = self._errand.timing
        await self._execution.wire_empty(timing.post_s)
        await asyncio.sleep(timing.ready_s)
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
        place = self._errand.ledger
        try:
            await (self._work_on_server(place) if isinstance(place, Postgres) else self._work_in_file(place))
        except EnrichError as error:
            # 5 promises that nothing was spent.
            self._execution.stop(Exit.BUG if error.exit_code is Exit.REFUSED else error.exit_code, error)

    async def _work_in_file(self, path: Path) -> None:
        """Share the ledger with processes of this machine, which write in turn."""
        slate = Slate(self._errand.pace)
        self._execution.pace = SharedPace(slate)
        with closing(Ledger(path)) as ledger:
            ledger.watch_files()
            door = Journal(
                ledger,
                slate.turn,
                rescue=partial(RescueFile, path, self._errand.rescue_folders),
                lock_patience_s=LOCKED_S,
            )
            async with self._client() as client, door as journal:
                journal.on_failure = self._ledger_failed
                poller = self._new_poller(journal, client)
                poller.adopt(self._errand.tasks, asked_before=True)
                await self._errand.shift.work(poller)

    async def _work_on_server(self, place: Postgres) -> None:
        """Share the ledger with whoever has a lease; begin anew when ours was lost."""
        execution = self._execution
        with Allowance(place) as execution.pace:
            while not await self._live(place) and not execution.closing.is_set():
                execution.in_flight = execution.on_the_wire = 0

    async def _live(self, place: Postgres) -> bool:
        """Work for as long as one lease holds; tell whether there was nothing more to do before it was lost."""
        execution = self._execution
        try:
            with leased(place, follows=self._errand.leader) as (ledger, lease):
                execution.clock, execution.holds = lease, lease.holds
                async with self._client() as client, Journal(ledger) as journal:
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
        poller = self._new_poller(journal, client)
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

    def _client(self) -> Client:
        timing = self._errand.timing
        return Client(self._errand.access, self._execution.clock, post_s=timing.post_s, get_s=timing.get_s)

    def _new_poller(self, journal: Journal, client: Client) -> Poller:
        poller = self._poller = self._errand.shift.poller(self._execution, journal, client)
        if self._hurried:
            poller.hurry()
        return poller

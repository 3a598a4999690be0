"""One of the processes of `enrich run --processes`: sends and polls, and obeys the process that started it.

`crew` starts it with every signal that could end it blocked: who began the run decides when it ends.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import closing, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from multiprocessing.connection import Connection

from enrich.api.client import Client
from enrich.api.credentials import Access
from enrich.errors import EnrichError, Exit
from enrich.execution import Execution, Tally, Timing
from enrich.model import SystemClock, Task
from enrich.place import LedgerPlace
from enrich.poller import Poller
from enrich.polls import PollTimes
from enrich.sharedpace import SharedPace, Slate
from enrich.shift import Shift
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger

TELLING_S = 0.2
#: Left alone, a process waits so long for answers to its POSTs: cut off, they would be in doubt.
ORPHAN_S = 5.0


class Word(Enum):
    """What a process is told while it works."""

    CLOSE = auto()  # no new POST leaves
    GIVE_UP = auto()  # nothing more is asked
    HURRY = auto()  # every task is asked once more
    LEAVE = auto()  # nothing is waited for any more


@dataclass(frozen=True, slots=True)
class Errand:
    """What a process is told at its start; it has an equal share of what may be in flight."""

    shift: Shift
    access: Access
    ledger: LedgerPlace
    execution: int
    timing: Timing
    in_flight_limit: int
    result_ttl_s: float
    clock_offset_ms: int
    poll_times: PollTimes
    #: The descriptor of its slate.
    pace: int = -1
    #: What was left at the API before, and is this process' to collect.
    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True, slots=True)
class Told:
    """How far a process is; `ended` comes once, when all that it knew is in the ledger."""

    tally: Tally = field(default_factory=Tally)
    in_flight: int = 0
    on_the_wire: int = 0
    reasons: dict[Exit, tuple[str, str | None]] = field(default_factory=dict)
    closing: bool = False
    giving_up: bool = False
    poll_times: PollTimes | None = None
    ended: bool = False


@dataclass(slots=True)
class Member:
    """A process at work, as the one that started it knows it."""

    boss: Connection
    execution: Execution
    poller: Poller
    _orphaned: asyncio.Task[None] | None = None

    async def keep_telling(self) -> None:
        """Tell how far we are, now and then."""
        while True:
            tell(self.boss, self.execution)
            await asyncio.sleep(TELLING_S)

    def hear(self) -> None:
        """Obey a word; without anybody to obey write down what is on the wire, and leave."""
        execution = self.execution
        try:
            word = self.boss.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self.boss.fileno())
            self._orphaned = asyncio.create_task(self._leave_alone())
            return
        match word:
            case Word.CLOSE:
                execution.closing.set()
                execution.notify()
            case Word.GIVE_UP:
                execution.closing.set()
                execution.giving_up.set()
                execution.notify()
            case Word.HURRY:
                self.poller.hurry()
            case Word.LEAVE:
                execution.leave()

    async def _leave_alone(self) -> None:
        self.execution.closing.set()
        await self.execution.wire_empty(ORPHAN_S)
        self.execution.leave()


def tell(boss: Connection, execution: Execution, *, ended: bool = False) -> None:
    """Say how far we are; nobody may be there to hear it."""
    with suppress(OSError):
        boss.send(
            Told(
                execution.tally,
                execution.in_flight,
                execution.on_the_wire,
                {code: (error.message, error.hint) for code, error in execution.reasons.items()},
                execution.closing.is_set(),
                execution.giving_up.is_set(),
                execution.poll_times,
                ended,
            )
        )


async def work(boss: Connection, errand: Errand) -> None:
    """Do the errand, and tell how it ended."""
    clock = SystemClock(errand.clock_offset_ms)
    slate = Slate(errand.pace)
    execution = Execution(
        errand.execution,
        clock,
        SharedPace(slate),
        errand.timing,
        in_flight_limit=errand.in_flight_limit,
        result_ttl_s=errand.result_ttl_s,
        poll_times=errand.poll_times,
    )
    try:
        with closing(Ledger(errand.ledger)) as ledger:
            client = Client(errand.access, clock, post_s=errand.timing.post_s, get_s=errand.timing.get_s)
            async with client, Journal(ledger, slate.turn) as journal:
                poller = errand.shift.poller(execution, journal, client)
                poller.adopt(errand.tasks, asked_before=True)
                member = Member(boss, execution, poller)
                loop = asyncio.get_running_loop()
                loop.add_reader(boss.fileno(), member.hear)
                telling = asyncio.create_task(member.keep_telling())
                try:
                    await errand.shift.work(poller)
                finally:
                    telling.cancel()
                    loop.remove_reader(boss.fileno())
    except EnrichError as error:
        # 5 promises that nothing was spent.
        execution.stop(Exit.BUG if error.exit_code is Exit.REFUSED else error.exit_code, error)
    tell(boss, execution, ended=True)


def main() -> None:
    """Take the errand from the socket whose descriptor is the argument, and do it."""
    with Connection(int(sys.argv[1])) as boss:
        try:
            errand = boss.recv()
        except (EOFError, OSError):
            return  # nobody is there any more
        asyncio.run(work(boss, errand))

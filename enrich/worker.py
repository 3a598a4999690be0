"""One worker of a crew: sends and polls, tells how far it is, and obeys.

How it came to be and who it obeys is nothing to it: `hands` starts it as a process of this machine.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum, auto

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
    #: The descriptor of its slate.
    pace: int = -1
    #: What was left at the API before, and is this worker's to collect.
    tasks: tuple[Task, ...] = ()


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
        self._slate = Slate(errand.pace)
        self._poller: Poller | None = None
        self._hurried = False
        self._execution = Execution(
            errand.execution,
            SystemClock(errand.clock_offset_ms),
            SharedPace(self._slate),
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
        self._execution.closing.set()
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
        errand, execution, timing = self._errand, self._execution, self._errand.timing
        try:
            with closing(Ledger(errand.ledger)) as ledger:
                client = Client(errand.access, execution.clock, post_s=timing.post_s, get_s=timing.get_s)
                async with client, Journal(ledger, self._slate.turn) as journal:
                    self._poller = errand.shift.poller(execution, journal, client)
                    self._poller.adopt(errand.tasks, asked_before=True)
                    if self._hurried:
                        self._poller.hurry()
                    await errand.shift.work(self._poller)
        except EnrichError as error:
            # 5 promises that nothing was spent.
            execution.stop(Exit.BUG if error.exit_code is Exit.REFUSED else error.exit_code, error)

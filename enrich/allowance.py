"""One pace for processes on several machines: its state is a row of the ledger, by the clock of its server.

A process takes slots for the next moment, a few at a time, and tells at the same time what it heard since. A slot that
was not used in its time is gone, so that nobody who was held up sends all at once: in any second no more leave than the
rate allows for LATE_S more than that, and what `Pace` lets catch up.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil
from typing import Any, NamedTuple

from enrich.errors import LedgerFailed, Refused
from enrich.pace import Pace
from enrich.place import Postgres
from enrich.store.allowance import AllowanceRow
from enrich.store.dialect import OUTAGE_S, DatabaseFailed

#: Slots are taken for so many seconds ahead at most, and by one process for so many seconds of the rate at once.
AHEAD_S, AT_ONCE_S = 0.2, 0.1
#: Between two looks at the row at least so many seconds.
LOOK_EVERY_S = 0.02
#: A slot may be used so late: the row's answer, a timer and a processor may keep us waiting.
LATE_S = 0.1
#: What was heard is told after so many seconds at most.
TELL_S = 0.2

#: The times of a pace.
_TIMES = ("_next_free", "_blocked_until", "_taken_at", "_forgotten_at")


class Heard(NamedTuple):
    """What is told of a request that was answered, and of one that was not: the name of the method of `Pace`."""

    what: str
    retry_after: float | None = None


class Taken(NamedTuple):
    """What a look at the row brought: in how many seconds each slot begins, and for how many nothing may leave."""

    slots: list[float]
    shut_s: float
    rate: float
    scarce: bool


@dataclass(slots=True)
class Slots:
    """The slots that a process has, by its own clock."""

    _times: deque[float] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._times)

    def add(self, asked: float, waits: Iterable[float]) -> None:
        """Take on slots that begin so many seconds after we asked: never earlier than the row says."""
        self._times.extend(asked + wait for wait in waits)

    def delay(self, now: float) -> float | None:
        """Tell how long to wait for the next, 0: it may be used; None: there is none whose time is not over."""
        while self._times and self._times[0] < now - LATE_S:
            self._times.popleft()
        return max(0.0, self._times[0] - now) if self._times else None

    def use(self) -> None:
        """Use the next."""
        self._times.popleft()

    def give_back(self, now: float, slots: int) -> None:
        """Have so many more after all that are to be used now."""
        self._times.extendleft([now] * slots)

    def clear(self) -> None:
        """Have none any more."""
        self._times.clear()


def take_slots(state: str | None, now: float, heard: Iterable[Heard], wanted: int) -> tuple[str, Taken]:
    """Tell the pace of a row what was heard, and take slots; return what is to be written there, and what was taken."""
    pace = Pace(None) if state is None else read(state)
    for what, retry_after in heard:
        if what == "throttled":
            pace.throttled(now, retry_after)
        else:
            getattr(pace, what)(now)
    slots: list[float] = []
    most = min(wanted, ceil(pace.rate * AT_ONCE_S))
    while len(slots) < most and (wait := pace.delay(now)) <= AHEAD_S:
        pace.take(now + wait)
        slots.append(wait)
    return written(pace, 0.0), Taken(slots, pace.shut(now), pace.rate, pace.scarce)


def written(pace: Pace, ahead: float) -> str:
    """Write the state of a pace (JSON), whose clock is so many seconds behind the one that all share."""
    state = {name: list(value) if isinstance(value, deque) else value for name, value in vars(pace).items()}
    for name in _TIMES:
        if (at := getattr(pace, name)) is not None:
            state[name] = at + ahead
    return json.dumps(state)


def read(state: str, ahead: float = 0.0) -> Pace:
    """Read what `written` wrote."""
    told: dict[str, Any] = json.loads(state)
    pace = Pace(None)
    for name in _TIMES:
        told[name] = None if told[name] is None else told[name] - ahead
    vars(pace).update(told | {"_wire": deque(told["_wire"])})
    return pace


def share(place: Postgres, pace: Pace) -> None:
    """Begin to share a pace, as far as it has learned. Raises DatabaseFailed."""
    row = AllowanceRow(place, patience_s=OUTAGE_S)
    try:
        # The person's ceiling is in it: lost, all would go by what the API allows.
        row.change(lambda _, now: (written(pace, now - time.monotonic()), None), durable=True)
    finally:
        row.close()


def unshare(place: Postgres) -> Pace | None:
    """Go on alone with what all have learned; None when nothing was shared, or the server is away."""
    try:
        row = AllowanceRow(place)
    except Refused:
        return None
    row.hurry()
    try:
        state, ahead = row.change(lambda state, now: (state or "", (state, now - time.monotonic())))
    except DatabaseFailed:
        return None
    finally:
        row.close()
    return None if state is None else read(state, ahead)


class Allowance(Pace):
    """A pace that many share. Use as a context manager; see `Pace` for what the methods mean."""

    def __init__(self, place: Postgres) -> None:
        """Connect. Raises Refused."""
        super().__init__(None)
        self._row = AllowanceRow(place, patience_s=OUTAGE_S)
        self._slots = Slots()
        self._news: list[Heard] = []
        self._wanted = 0
        self._scarce = False
        self._shut_until = 0.0
        self._refused = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ended = False
        self._broken: DatabaseFailed | None = None
        self._thread = threading.Thread(target=self._work, name="allowance", daemon=True)

    def __enter__(self) -> Allowance:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._row.hurry()
        self._wake.set()
        self._thread.join()
        self._row.close()

    @property
    def scarce(self) -> bool:
        """Tell whether the rate is what holds us back."""
        return self._scarce

    def expect(self, wanted: int) -> None:
        """Hear how many would leave now."""
        with self._lock:
            self._wanted = wanted

    def delay(self, now: float) -> float:
        """Tell how long to wait before a look is worth it, in seconds; 0: one may leave now."""
        if self._broken is not None:
            raise LedgerFailed(f"the ledger cannot be written: {self._broken}", "then run the same command again")
        with self._lock:
            if now < self._shut_until:
                return self._shut_until - now
            wait = self._slots.delay(now)
            if wait is not None:
                return wait
            self._wanted = max(1, self._wanted)
        self._wake.set()
        return LOOK_EVERY_S / 2

    def take(self, now: float) -> None:
        """One request leaves."""
        del now
        with self._lock:
            self._slots.use()

    def give_back(self, slots: int) -> None:
        """Nothing left in these slots after all: they are there for the next, for as long as they last."""
        with self._lock:
            self._slots.give_back(time.monotonic(), slots)

    def answered(self, now: float) -> None:
        """One request was answered, and not by 429."""
        del now
        self._tell(Heard("answered"))

    def lost(self, now: float) -> None:
        """One request got no answer, or one that says nothing about the rate."""
        del now
        self._tell(Heard("lost"))

    def throttled(self, now: float, retry_after: float | None) -> None:
        """Hear a 429: all others shall hear it at once, and what we have taken is void."""
        with self._lock:
            self._refused += 1
            self._shut(now + LOOK_EVERY_S)
        self._tell(Heard("throttled", retry_after))
        self._wake.set()

    def _shut(self, until: float) -> None:
        self._slots.clear()
        self._shut_until = max(self._shut_until, until)

    def _tell(self, heard: Heard) -> None:
        with self._lock:
            self._news.append(heard)

    def _work(self) -> None:
        """Take slots when some are wanted, and tell what was heard."""
        try:
            while not self._ended:
                self._wake.wait(TELL_S)
                self._wake.clear()
                self._look()
                time.sleep(LOOK_EVERY_S)
            self._look(last=True)
        except DatabaseFailed as error:
            self._broken = error

    def _look(self, *, last: bool = False) -> None:
        with self._lock:
            heard, self._news = self._news, []
            wanted = 0 if last else self._wanted - len(self._slots)
            self._wanted, refused = 0, self._refused
        if not heard and wanted <= 0:
            return

        def take(state: str | None, now: float) -> tuple[str, tuple[float, Taken]]:
            # The server told its time before this: by our clock it is not later than now.
            asked = time.monotonic()
            state, taken = take_slots(state, now, heard, wanted)
            return state, (asked, taken)

        try:
            asked, taken = self._row.change(take)
        except DatabaseFailed:
            with self._lock:
                self._news = heard + self._news
            raise
        self.rate, self._scarce = taken.rate, taken.scarce
        with self._lock:
            if taken.shut_s:
                self._shut(asked + taken.shut_s)
            if self._refused == refused:  # else they were given before that was known
                self._slots.add(asked, taken.slots)

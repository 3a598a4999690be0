"""One pace for processes on several machines: its state is a row of the ledger, by the clock of its server.

A process takes slots for the next moment, a few at a time, and tells at the same time what it heard since. A slot that
was not used in its time is gone, so that nobody who was held up sends all at once.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from math import ceil
from typing import Any

from enrich.errors import LedgerFailed
from enrich.pace import Pace
from enrich.place import Postgres
from enrich.store.allowance import AllowanceRow
from enrich.store.dialect import OUTAGE_S, DatabaseFailed

#: Slots are taken for so many seconds ahead at most, and by one process for so many seconds of the rate at once.
AHEAD_S, AT_ONCE_S = 0.2, 0.1
#: Between two looks at the row at least so many seconds.
LOOK_EVERY_S = 0.02
#: A slot may be used so late: with what `Pace` lets catch up this is the burst.
LATE_S = 0.05
#: What was heard is told after so many seconds at most.
TELL_S = 0.2

#: The times of a pace.
_TIMES = ("_next_free", "_blocked_until", "_taken_at", "_forgotten_at")
#: What is told of a request that was answered, and of one that was not: the name of the method of `Pace`.
_Heard = tuple[str, float | None]


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
    """Go on alone with what all have learned; None when nothing was shared. Raises DatabaseFailed."""
    row = AllowanceRow(place, patience_s=OUTAGE_S)
    try:
        found = row.change(lambda state, now: (state or "", (state, now - time.monotonic())))
    finally:
        row.close()
    state, ahead = found
    return None if state is None else read(state, ahead)


class Allowance(Pace):
    """A pace that many share. Use as a context manager; see `Pace` for what the methods mean."""

    def __init__(self, place: Postgres) -> None:
        """Connect. Raises Refused."""
        super().__init__(None)
        self._row = AllowanceRow(place, patience_s=OUTAGE_S)
        self._slots: deque[float] = deque()
        self._news: list[_Heard] = []
        self._wanted = 0
        self._scarce = False
        self._shut_until = 0.0
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
            while self._slots and self._slots[0] < now - LATE_S:
                self._slots.popleft()
            if now < self._shut_until:
                return self._shut_until - now
            if self._slots:
                return max(0.0, self._slots[0] - now)
            self._wanted = max(1, self._wanted)
        self._wake.set()
        return LOOK_EVERY_S / 2

    def take(self, now: float) -> None:
        """One request leaves."""
        del now
        with self._lock:
            self._slots.popleft()

    def give_back(self, slots: int) -> None:
        """Nothing left in these slots after all: they are there for the next, for as long as they last."""
        if slots:
            with self._lock:
                self._slots.extendleft([time.monotonic()] * slots)

    def answered(self, now: float) -> None:
        """One request was answered, and not by 429."""
        del now
        self._tell("answered", None)

    def lost(self, now: float) -> None:
        """One request got no answer, or one that says nothing about the rate."""
        del now
        self._tell("lost", None)

    def throttled(self, now: float, retry_after: float | None) -> None:
        """Hear a 429: all others shall hear it at once, and what we have taken is void."""
        with self._lock:
            self._slots.clear()
            self._shut_until = max(self._shut_until, now + LOOK_EVERY_S)
        self._tell("throttled", retry_after)
        self._wake.set()

    def _tell(self, what: str, retry_after: float | None) -> None:
        with self._lock:
            self._news.append((what, retry_after))

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
        if not heard and wanted <= 0:
            return
        try:
            slots = self._row.change(self._taking(heard, wanted))
        except DatabaseFailed:
            with self._lock:
                self._news = heard + self._news
            raise
        arrived = time.monotonic()
        with self._lock:
            # The answer took its time: each slot is a little later than the row says, never earlier.
            if arrived >= self._shut_until:
                self._slots.extend(arrived + wait for wait in slots)
            self._wanted = 0

    def _taking(self, heard: list[_Heard], wanted: int) -> Callable[[str | None, float], tuple[str, list[float]]]:
        def take(state: str | None, now: float) -> tuple[str, list[float]]:
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
            self.rate, self._scarce = pace.rate, pace.scarce
            return written(pace, 0.0), slots

        return take

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

from enrich.errors import CommandRefused, LedgerFailed
from enrich.job.locations import PostgresLocation
from enrich.ledger.dialect import OUTAGE_TIMEOUT_S, DatabaseFailed
from enrich.ledger.shared_rate import SharedRateRow
from enrich.run.rate_limit import AdaptiveRateLimiter

#: Slots are taken for so many seconds ahead at most, and by one process for so many seconds of the rate at once.
MAX_LOOKAHEAD_S, MAX_BATCH_S = 0.2, 0.1
#: Between two looks at the row at least so many seconds.
SYNC_EVERY_S = 0.02
#: A slot may be used so late: the row's answer, a timer and a processor may keep us waiting.
SLOT_LIFETIME_S = 0.1
#: What was heard is told after so many seconds at most.
REPORT_EVERY_S = 0.2

#: The times of a pace.
_TIME_ATTRIBUTES = ("_next_free", "_blocked_until", "_consumed_at", "_forget_at")


class RateEvent(NamedTuple):
    """What is told of a request that was answered, and of one that was not: the name of the method of `Pace`."""

    method: str
    retry_after: float | None = None


class SlotGrant(NamedTuple):
    """What a look at the row brought: in how many seconds each slot begins, and for how many nothing may leave."""

    slots: list[float]
    blocked_s: float
    rate: float
    is_limiting: bool


@dataclass(slots=True)
class SlotQueue:
    """The slots that a process has, by its own clock."""

    _times: deque[float] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._times)

    def add(self, asked: float, waits: Iterable[float]) -> None:
        """Take on slots that begin so many seconds after we asked: never earlier than the row says."""
        self._times.extend(asked + wait for wait in waits)

    def delay(self, now: float) -> float | None:
        """Tell how long to wait for the next, 0: it may be used; None: there is none whose time is not over."""
        while self._times and self._times[0] < now - SLOT_LIFETIME_S:
            self._times.popleft()
        return max(0.0, self._times[0] - now) if self._times else None

    def consume(self) -> None:
        """Use the next."""
        self._times.popleft()

    def refund(self, now: float, slots: int) -> None:
        """Have so many more after all that are to be used now."""
        self._times.extendleft([now] * slots)

    def clear(self) -> None:
        """Have none any more."""
        self._times.clear()


def take_slots(state: str | None, now: float, events: Iterable[RateEvent], wanted: int) -> tuple[str, SlotGrant]:
    """Tell the pace of a row what was heard, and take slots; return what is to be written there, and what was taken."""
    limiter = AdaptiveRateLimiter(None) if state is None else load_limiter(state)
    for what, retry_after in events:
        if what == "record_throttled":
            limiter.record_throttled(now, retry_after)
        else:
            getattr(limiter, what)(now)
    slots: list[float] = []
    most = min(wanted, ceil(limiter.rate * MAX_BATCH_S))
    while len(slots) < most and (wait := limiter.delay(now)) <= MAX_LOOKAHEAD_S:
        limiter.consume(now + wait)
        slots.append(wait)
    return dump_limiter(limiter, 0.0), SlotGrant(slots, limiter.blocked_for_s(now), limiter.rate, limiter.is_limiting)


def dump_limiter(limiter: AdaptiveRateLimiter, ahead: float) -> str:
    """Write the state of a pace (JSON), whose clock is so many seconds behind the one that all share."""
    state = {name: list(value) if isinstance(value, deque) else value for name, value in vars(limiter).items()}
    for name in _TIME_ATTRIBUTES:
        if (at := getattr(limiter, name)) is not None:
            state[name] = at + ahead
    return json.dumps(state)


def load_limiter(state: str, ahead: float = 0.0) -> AdaptiveRateLimiter:
    """Read what `written` wrote."""
    attributes: dict[str, Any] = json.loads(state)
    limiter = AdaptiveRateLimiter(None)
    for name in _TIME_ATTRIBUTES:
        attributes[name] = None if attributes[name] is None else attributes[name] - ahead
    vars(limiter).update(attributes | {"_rates_in_flight": deque(attributes["_rates_in_flight"])})
    return limiter


def start_sharing(location: PostgresLocation, limiter: AdaptiveRateLimiter) -> None:
    """Begin to share a pace, as far as it has learned. Raises DatabaseFailed."""
    row = SharedRateRow(location, open_timeout_s=OUTAGE_TIMEOUT_S)
    try:
        # The person's ceiling is in it: lost, all would go by what the API allows.
        row.update(lambda _, now: (dump_limiter(limiter, now - time.monotonic()), None), durable=True)
    finally:
        row.close()


def stop_sharing(location: PostgresLocation) -> AdaptiveRateLimiter | None:
    """Go on alone with what all have learned; None when nothing was shared, or the server is away."""
    try:
        row = SharedRateRow(location)
    except CommandRefused:
        return None
    row.shorten_waits()
    try:
        state, ahead = row.update(lambda state, now: (state or "", (state, now - time.monotonic())))
    except DatabaseFailed:
        return None
    finally:
        row.close()
    return None if state is None else load_limiter(state, ahead)


class SharedRateLimiter(AdaptiveRateLimiter):
    """A pace that many share. Use as a context manager; see `Pace` for what the methods mean."""

    def __init__(self, location: PostgresLocation) -> None:
        """Connect. Raises Refused."""
        super().__init__(None)
        self._row = SharedRateRow(location, open_timeout_s=OUTAGE_TIMEOUT_S)
        self._slots = SlotQueue()
        self._unreported: list[RateEvent] = []
        self._wanted = 0
        self._is_limiting = False
        self._blocked_until_s = 0.0
        self._throttled_count = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._failure: DatabaseFailed | None = None
        self._thread = threading.Thread(target=self._run_thread, name="allowance", daemon=True)

    def __enter__(self) -> SharedRateLimiter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._row.shorten_waits()
        self._wake.set()
        self._thread.join()
        self._row.close()

    @property
    def is_limiting(self) -> bool:
        """Tell whether the rate is what holds us back."""
        return self._is_limiting

    def announce_demand(self, requested: int) -> None:
        """Hear how many would leave now."""
        with self._lock:
            self._wanted = requested

    def delay(self, now: float) -> float:
        """Tell how long to wait before a look is worth it, in seconds; 0: one may leave now."""
        if self._failure is not None:
            raise LedgerFailed(f"the ledger cannot be written: {self._failure}", "then run the same command again")
        with self._lock:
            if now < self._blocked_until_s:
                return self._blocked_until_s - now
            wait = self._slots.delay(now)
            if wait is not None:
                return wait
            self._wanted = max(1, self._wanted)
        self._wake.set()
        return SYNC_EVERY_S / 2

    def consume(self, now: float) -> None:
        """One request leaves."""
        del now
        with self._lock:
            self._slots.consume()

    def refund(self, slots: int) -> None:
        """Nothing left in these slots after all: they are there for the next, for as long as they last."""
        with self._lock:
            self._slots.refund(time.monotonic(), slots)

    def record_answer(self, now: float) -> None:
        """One request was answered, and not by 429."""
        del now
        self._report(RateEvent("record_answer"))

    def record_lost(self, now: float) -> None:
        """One request got no answer, or one that says nothing about the rate."""
        del now
        self._report(RateEvent("record_lost"))

    def record_throttled(self, now: float, retry_after: float | None) -> None:
        """Hear a 429: all others shall hear it at once, and what we have taken is void."""
        with self._lock:
            self._throttled_count += 1
            self._block_until(now + SYNC_EVERY_S)
        self._report(RateEvent("record_throttled", retry_after))
        self._wake.set()

    def _block_until(self, until: float) -> None:
        self._slots.clear()
        self._blocked_until_s = max(self._blocked_until_s, until)

    def _report(self, event: RateEvent) -> None:
        with self._lock:
            self._unreported.append(event)

    def _run_thread(self) -> None:
        """Take slots when some are wanted, and tell what was heard."""
        try:
            while not self._stopping:
                self._wake.wait(REPORT_EVERY_S)
                self._wake.clear()
                self._sync()
                time.sleep(SYNC_EVERY_S)
            self._sync(last=True)
        except DatabaseFailed as error:
            self._failure = error

    def _sync(self, *, last: bool = False) -> None:
        with self._lock:
            heard, self._unreported = self._unreported, []
            wanted = 0 if last else self._wanted - len(self._slots)
            self._wanted, refused = 0, self._throttled_count
        if not heard and wanted <= 0:
            return

        def take(state: str | None, now: float) -> tuple[str, tuple[float, SlotGrant]]:
            # The server told its time before this: by our clock it is not later than now.
            asked = time.monotonic()
            state, taken = take_slots(state, now, heard, wanted)
            return state, (asked, taken)

        try:
            asked, taken = self._row.update(take)
        except DatabaseFailed:
            with self._lock:
                self._unreported = heard + self._unreported
            raise
        self.rate, self._is_limiting = taken.rate, taken.is_limiting
        with self._lock:
            if taken.blocked_s:
                self._block_until(asked + taken.blocked_s)
            if self._throttled_count == refused:  # else they were given before that was known
                self._slots.add(asked, taken.slots)

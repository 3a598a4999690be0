"""One rate limit for processes on several machines. Its state is a row of the ledger, by the clock of its server.

A process takes a few slots at a time for the next moment, and reports the responses since its last update. A slot
that is not used in time expires, so that a process that was held up does not send a burst. In any second, all processes
together send at most what the rate allows in 1 s + SLOT_LIFETIME_S, plus the burst that `AdaptiveRateLimiter` allows.
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

#: How many seconds ahead slots are taken at most, and how many seconds of the rate one process takes at once.
MAX_LOOKAHEAD_S, MAX_BATCH_S = 0.2, 0.1
#: The shortest time between two updates of the row, in seconds.
SYNC_EVERY_S = 0.02
#: How late a slot may be used, in seconds: the database, a timer or the CPU may delay the process.
SLOT_LIFETIME_S = 0.1
#: Responses are reported after this many seconds at most.
REPORT_EVERY_S = 0.2

#: The attributes of a limiter that are times.
_TIME_ATTRIBUTES = ("_next_free", "_blocked_until", "_consumed_at", "_forget_at")


class RateEvent(NamedTuple):
    """A response, or a request without one: the method of `AdaptiveRateLimiter` to call, and its argument."""

    method: str
    retry_after: float | None = None


class SlotGrant(NamedTuple):
    """The result of an update: seconds until each slot begins, and for how many seconds nothing may be sent."""

    slots: list[float]
    blocked_s: float
    rate: float
    is_limiting: bool


@dataclass(slots=True)
class SlotQueue:
    """The slots that a process has taken, by its own clock."""

    _times: deque[float] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._times)

    def add(self, asked: float, waits: Iterable[float]) -> None:
        """Add slots that begin `waits` seconds after `asked`, and so never earlier than the row allows."""
        self._times.extend(asked + wait for wait in waits)

    def delay(self, now: float) -> float | None:
        """Return the seconds until the next slot; 0: use it now; None: no unexpired slot is left."""
        while self._times and self._times[0] < now - SLOT_LIFETIME_S:
            self._times.popleft()
        return max(0.0, self._times[0] - now) if self._times else None

    def consume(self) -> None:
        """Use the next slot."""
        self._times.popleft()

    def refund(self, now: float, slots: int) -> None:
        """Return this many unused slots, to be used now."""
        self._times.extendleft([now] * slots)

    def clear(self) -> None:
        """Drop all slots."""
        self._times.clear()


def take_slots(state: str | None, now: float, events: Iterable[RateEvent], wanted: int) -> tuple[str, SlotGrant]:
    """Apply events to the stored limiter and take slots. Return the new state of the row, and the slots."""
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
    """Return the state of a limiter (JSON), whose clock is `ahead` seconds behind the shared clock."""
    state = {name: list(value) if isinstance(value, deque) else value for name, value in vars(limiter).items()}
    for name in _TIME_ATTRIBUTES:
        if (at := getattr(limiter, name)) is not None:
            state[name] = at + ahead
    return json.dumps(state)


def load_limiter(state: str, ahead: float = 0.0) -> AdaptiveRateLimiter:
    """Return the limiter that `dump_limiter` wrote."""
    attributes: dict[str, Any] = json.loads(state)
    limiter = AdaptiveRateLimiter(None)
    for name in _TIME_ATTRIBUTES:
        attributes[name] = None if attributes[name] is None else attributes[name] - ahead
    vars(limiter).update(attributes | {"_rates_in_flight": deque(attributes["_rates_in_flight"])})
    return limiter


def start_sharing(location: PostgresLocation, limiter: AdaptiveRateLimiter) -> None:
    """Start to share a limiter with all that it has learned. Raises DatabaseFailed."""
    row = SharedRateRow(location, open_timeout_s=OUTAGE_TIMEOUT_S)
    try:
        # Durable, because the state holds the user's ceiling: without it only the API would limit the rate.
        row.update(lambda _, now: (dump_limiter(limiter, now - time.monotonic()), None), durable=True)
    finally:
        row.close()


def stop_sharing(location: PostgresLocation) -> AdaptiveRateLimiter | None:
    """Return the shared limiter with all it has learned. None: it was not shared, or the server is unreachable."""
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
    """A rate limiter shared by several processes; a context manager. See AdaptiveRateLimiter for its methods."""

    def __init__(self, location: PostgresLocation) -> None:
        """Connect. Raises CommandRefused."""
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
        """Return whether the rate limit is what slows the run down."""
        return self._is_limiting

    def announce_demand(self, requested: int) -> None:
        """Set how many requests are ready to be sent."""
        with self._lock:
            self._wanted = requested

    def delay(self, now: float) -> float:
        """Return the seconds until the next check is useful; 0: a request may be sent now."""
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
        """Use a slot for a request."""
        del now
        with self._lock:
            self._slots.consume()

    def refund(self, slots: int) -> None:
        """Return unused slots. The next requests can use them until they expire."""
        with self._lock:
            self._slots.refund(time.monotonic(), slots)

    def record_answer(self, now: float) -> None:
        """Record an answer other than a 429."""
        del now
        self._report(RateEvent("record_answer"))

    def record_lost(self, now: float) -> None:
        """Record a request without an answer, or with one that shows nothing about the rate."""
        del now
        self._report(RateEvent("record_lost"))

    def record_throttled(self, now: float, retry_after: float | None) -> None:
        """Record a 429: report it to the other processes at once and drop our slots."""
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
        """Take slots when requests are waiting, and report responses."""
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
            # The server read its clock before this, so its time is not later than ours now.
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
            if self._throttled_count == refused:  # otherwise the slots were granted before this 429 was known
                self._slots.add(asked, taken.slots)

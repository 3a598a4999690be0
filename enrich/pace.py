"""When the next request may leave, when a poll is worth it, when an ill API is left alone: pure, time is passed in.

The rate follows additive increase, multiplicative decrease (Chiu and Jain, "Analysis of the Increase
and Decrease Algorithms for Congestion Avoidance in Computer Networks", 1989), with TCP's slow start.
"""

from __future__ import annotations

from collections import deque
from statistics import median

SLOW_START = 10.0  # requests per second, before anything is known
TOLD_START = 50.0  # likewise, when the person names a ceiling
SLOWEST = 0.2
DECREASE = 0.7
RECOVERY_S = 1.0  # the 429s of one burst slow us once
BURST_S = 0.05  # timers are late; what they cost may be caught up
MAX_RETRY_AFTER_S = 600.0


class Pace:
    """The rate of all requests to the API, submits and polls together."""

    def __init__(self, ceiling: float | None) -> None:
        """Never exceed `ceiling` requests per second; None: find what the API allows."""
        self._ceiling = ceiling
        self.rate = SLOW_START if ceiling is None else min(ceiling, TOLD_START)
        self._slow_start = True
        self._next_free = 0.0
        self._blocked_until = 0.0
        self._recovered_at = 0.0
        self._held_back = False

    def delay(self, now: float) -> float:
        """Tell how long the next request must wait, in seconds; 0: it may leave now."""
        wait = max(self._blocked_until - now, self._next_free - now, 0.0)
        if wait:
            self._held_back = True
        return wait

    def take(self, now: float) -> None:
        """One request leaves."""
        self._next_free = max(self._next_free, now - BURST_S) + 1 / self.rate

    def give_back(self, slots: int) -> None:
        """Nothing left in these slots after all."""
        self._next_free -= slots / self.rate

    def answered(self) -> None:
        """One request was answered, and not by 429: a rate that held us back may grow."""
        if not self._held_back:
            return
        self._held_back = False
        step = 1.0 if self._slow_start else max(1.0, self.rate / 20) / self.rate
        self.rate = self.rate + step if self._ceiling is None else min(self._ceiling, self.rate + step)

    def throttled(self, now: float, retry_after: float | None) -> None:
        """Hear a 429: everybody waits as long as the API says, and is slower afterwards."""
        wait = 1 / self.rate if retry_after is None else min(retry_after, MAX_RETRY_AFTER_S)
        self._blocked_until = max(self._blocked_until, now + wait)
        if now < self._recovered_at:
            return
        self._slow_start = False
        self.rate = max(min(SLOWEST, self.rate), self.rate * DECREASE)
        self._recovered_at = max(self._blocked_until, now) + RECOVERY_S


class Breaker:
    """Stops the POSTs to an API that is ill: after a few bad answers in a row, one at a time with growing pauses."""

    TRIP = 3
    FIRST_PAUSE_S = 1.0
    LONGEST_PAUSE_S = 60.0

    def __init__(self) -> None:
        self._bad = 0
        self._retry_at = 0.0
        self.ill_since: float | None = None

    @property
    def healthy(self) -> bool:
        """Tell whether several POSTs may leave at once."""
        return self._bad < self.TRIP

    def delay(self, now: float, on_the_wire: int) -> float | None:
        """Tell how long a POST must wait, in seconds; None: until one that is on the wire was answered."""
        if self.healthy:
            return 0.0
        if on_the_wire:
            return None
        return max(0.0, self._retry_at - now)

    def bad(self, now: float) -> None:
        """Hear an answer that may or may not be one, or none at all.

        POSTs that had left before a pause began say nothing new: a full wire is one hiccup, not thirty-two.
        """
        if self.ill_since is None:
            self.ill_since = now
        if not self.healthy and now < self._retry_at:
            return
        self._bad += 1
        pause = self.FIRST_PAUSE_S * 2.0 ** min(self._bad - self.TRIP, 10)
        self._retry_at = now + min(self.LONGEST_PAUSE_S, pause)

    def good(self) -> None:
        """Hear a clear answer."""
        self._bad = 0
        self.ill_since = None


class PollTimes:
    """When to ask how a task is: first when half of the last tasks were done, then less and less often."""

    FIRST_GUESS_S = 1.0
    GROWTH = 0.35
    SHORTEST_S = 0.5
    LONGEST_S = 30.0
    REMEMBERED = 200

    def __init__(self) -> None:
        self._latencies: deque[float] = deque(maxlen=self.REMEMBERED)
        self._heard = 0
        self._typical = self.FIRST_GUESS_S

    def finished(self, age: float) -> None:
        """Hear how old a task was when its answer was seen, in seconds."""
        self._latencies.append(age)
        self._heard += 1
        if self._heard % 10 == 1:
            self._typical = median(self._latencies)

    @property
    def typical(self) -> float:
        """How long a task takes, in seconds: the median of the last ones."""
        return self._typical

    def wait(self, age: float) -> float:
        """Tell in how many seconds a task of this age is worth a poll."""
        if age < self._typical * 0.8:
            return self._typical * 0.9 - age
        return min(self.LONGEST_S, max(self.SHORTEST_S, age * self.GROWTH))

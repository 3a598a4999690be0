"""Limits what is sent: the adaptive rate of all requests, POSTs to a failing API, open tasks. Pure, time is passed in.

The rate never exceeds the configured ceiling, and is otherwise as high as the API allows. It follows CUBIC (RFC 9438),
applied to a rate and relative to the limit: after a 429 the rate is cut a little, returns quickly to just
below the refused rate, stays near it, and then probes for more at a growing pace. Until the first 429 the rate grows as
in slow start, but is never far above what was just proven (RFC 7661, and the adaptive mode of the AWS SDKs).
"""

from __future__ import annotations

from collections import deque
from math import ceil, inf

from msgspec import Struct

START_RATE = 10.0  # requests per second, before anything is known
START_RATE_WITH_CEILING = 50.0  # the same, when the user sets a ceiling
MIN_RATE = 0.2
#: Until the first 429, each answer adds this many requests per second to the rate.
SLOW_START_STEP = 4.0
#: The rate is at most this multiple of the rate of the last answered request: at most 25% too much is in flight.
MAX_OVER_PROVEN_RATE = 1.25

#: Share by which the rate is cut: at the first 429; when the raised rate is soon refused again; after it had held.
#: Returning from a cut of depth d in RETURN_S costs d / 4 * RETURN_S seconds of the allowance.
FIRST_CUT, REPEATED_CUT, CUT = 0.5, 0.2, 0.1
#: The resting rate, as a share of the refused rate.
RESTING_SHARE = 0.98
#: How far the rate is above the resting rate after twice the return time, as a share.
PROBE_GAIN = 0.2
RETURN_S = 4.0
MAX_RETURN_S = 60.0
#: Probing for more costs some 429s, and pauses when the API requests them. The next probe is delayed until 429s are
#: about the first share of the requests, and pauses about the second share of the time.
THROTTLED_SHARE, BLOCKED_SHARE = 0.01, 1 / 15

#: Pause in seconds after a 429 without Retry-After. Doubled while the API still answers 429 after the pause.
PAUSE_S, MAX_PAUSE_S = 0.1, 10.0
MAX_RETRY_AFTER_S = 600.0
#: Requests in flight at a cut that got no answer are forgotten this many seconds after the pause.
FORGET_AFTER_S = 2.0
#: Answers can overtake each other: this many times the requests in flight at a cut may have been sent before it.
REORDER_FACTOR = 1.1
#: Slots that passed unused, because a timer fired late or the process did not run, are caught up: at most
#: this number, or those of this many seconds at a higher rate. Not more, as the API's buckets are small: what waited
#: for a commit or is being sent arrives with what is caught up, and a refused burst looks like a rate that is too high.
MAX_BURST, BURST_S = 4.0, 0.008
#: At a low rate, slots are caught up for at most this many seconds.
MAX_BURST_S = 0.05
#: When more than this share of the rate was unused in the last second, the rate is not the bottleneck.
MAX_IDLE_SHARE = 0.1


class AdaptiveRateLimiter:
    """The rate of all requests to the API, submits and polls together."""

    def __init__(self, ceiling: float | None) -> None:
        """Never exceed `ceiling` requests per second; None: find the API's limit."""
        self.ceiling = inf if ceiling is None else ceiling
        self.rate = START_RATE if ceiling is None else min(ceiling, START_RATE_WITH_CEILING)
        self._next_free = 0.0
        self._blocked_until = 0.0
        #: The resting rate, in requests per second; None: no 429 yet.
        self._resting_rate: float | None = None
        self._cut_depth = FIRST_CUT
        #: Seconds since the last cut, counted by answers: it stands still while nothing is sent or answered.
        self._growth_time_s = 0.0
        self._return_s = RETURN_S
        self._throttled_count = 0
        self._blocked_s = 0.0
        self._pause_s = PAUSE_S
        self._idle_s = 0.0
        self._consumed_at: float | None = None
        #: Send rates of the requests in flight, oldest first, and how many of them were sent before the last cut.
        self._rates_in_flight: deque[float] = deque()
        self._sent_before_cut = 0
        self._forget_at = 0.0

    @property
    def is_limiting(self) -> bool:
        """Whether the rate is the bottleneck."""
        return self._idle_s <= MAX_IDLE_SHARE

    def delay(self, now: float) -> float:
        """Return how many seconds the next request must wait; 0: it may be sent now."""
        return max(self._blocked_until - now, self._next_free - now, 0.0)

    def consume(self, now: float, waiting_since: float | None = None) -> None:
        """Count one request as sent. `waiting_since` is since when it waits for a slot; None: it did not wait."""
        burst_s = min(MAX_BURST_S, max(BURST_S, MAX_BURST / self.rate))
        unused_s = max(0.0, now - burst_s - self._next_free)
        if self._consumed_at is not None:
            # Slots that pass while a request waits are lost, but they don't show that the rate is not needed.
            idle_s = max(0.0, unused_s - (0.0 if waiting_since is None else now - waiting_since))
            self._idle_s = self._idle_s * max(0.0, 1 - (now - self._consumed_at)) + min(1.0, idle_s)
        self._consumed_at = now
        self._next_free += unused_s + 1 / self.rate
        self._rates_in_flight.append(self.rate)

    def refund(self, slots: int) -> None:
        """Give back slots that were not used."""
        self._next_free -= slots / self.rate
        for _ in range(min(slots, len(self._rates_in_flight))):
            self._rates_in_flight.pop()

    def record_answer(self, now: float) -> None:
        """Record an answer other than 429. If the rate is the bottleneck, it may grow."""
        proven_rate = self._record_response(now)
        if proven_rate is None:
            return
        self._pause_s = PAUSE_S
        if not self.is_limiting:
            return
        if self._resting_rate is None:
            rate = self.rate + SLOW_START_STEP
        else:
            self._growth_time_s += 1 / self.rate
            left = 1 - self._growth_time_s / self._return_s
            rate = self._resting_rate * (1 - (self._cut_depth if left > 0 else PROBE_GAIN) * left**3)
        self.rate = max(self.rate, min(self.ceiling, MAX_OVER_PROVEN_RATE * proven_rate, rate))

    def record_lost(self, now: float) -> None:
        """Record a request without an answer, or with one that has no information about the rate."""
        self._record_response(now)

    def record_throttled(self, now: float, retry_after: float | None) -> None:
        """Record a 429. All requests wait for `retry_after` seconds, and the rate is lower afterwards.

        Requests that were in flight at the first 429 give no new information about the rate.
        """
        refused_rate = self._record_response(now)
        if retry_after is not None:
            self._block(now + min(retry_after, MAX_RETRY_AFTER_S))
        self._throttled_count += 1
        if refused_rate is not None:
            if retry_after is None:
                self._block(now + max(self._pause_s, 1 / self.rate))
                self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s)
            self._cut_rate(now, refused_rate)
        if self._resting_rate is not None:
            return_s = max(
                self._throttled_count / (THROTTLED_SHARE * self._resting_rate), self._blocked_s / BLOCKED_SHARE
            )
            self._return_s = min(MAX_RETURN_S, max(RETURN_S, return_s))

    def _cut_rate(self, now: float, refused_rate: float) -> None:
        """Cut the rate after a 429 to a request that was sent at `refused_rate`."""
        if self._resting_rate is None:
            self._cut_depth, self._resting_rate = FIRST_CUT, RESTING_SHARE * refused_rate
        elif not self._growth_time_s:
            # Refused again directly after the pause: this gives little information about the allowed rate.
            self._cut_depth = 1 - (1 - REPEATED_CUT) * self.rate / self._resting_rate
        else:
            self._cut_depth = CUT if self._growth_time_s > self._return_s / 2 else REPEATED_CUT
            self._resting_rate = RESTING_SHARE * refused_rate
        self.rate = max(min(MIN_RATE, self.rate), self._resting_rate * (1 - self._cut_depth))
        self._growth_time_s = 0.0
        self._throttled_count = 1
        self._blocked_s = self._blocked_until - now
        self._sent_before_cut = ceil(REORDER_FACTOR * len(self._rates_in_flight))
        self._forget_at = self._blocked_until + FORGET_AFTER_S

    def _block(self, until: float) -> None:
        """Send nothing before `until`. Slots missed in the meantime are not caught up."""
        self._blocked_until = max(self._blocked_until, until)
        self._next_free = max(self._next_free, self._blocked_until)

    def _record_response(self, now: float) -> float | None:
        """Remove one request from those in flight. Returns its send rate; None: it was sent before the last cut."""
        if self._sent_before_cut and now >= self._forget_at:
            for _ in range(min(self._sent_before_cut, len(self._rates_in_flight))):
                self._rates_in_flight.popleft()
            self._sent_before_cut = 0
        sent_rate = self._rates_in_flight.popleft() if self._rates_in_flight else self.rate
        if not self._sent_before_cut:
            return sent_rate
        self._sent_before_cut -= 1
        return None


class CircuitBreaker:
    """Limits POSTs to a failing API: after a few failures in a row, one POST at a time with growing pauses."""

    FAILURE_THRESHOLD = 3
    FIRST_PAUSE_S = 1.0
    MAX_PAUSE_S = 60.0

    def __init__(self) -> None:
        self._failures = 0
        self._retry_at = 0.0
        self.failing_since: float | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether several POSTs may be sent at once."""
        return self._failures < self.FAILURE_THRESHOLD

    def delay(self, now: float, posts_in_flight: int) -> float | None:
        """Return how many seconds a POST must wait; None: until a POST in flight was answered."""
        if self.is_healthy:
            return 0.0
        if posts_in_flight:
            return None
        return max(0.0, self._retry_at - now)

    def record_failure(self, now: float) -> None:
        """Record a POST without a clear answer, or without any.

        POSTs that were sent before a pause began give no new information: 32 POSTs that fail together count as one
        failure.
        """
        if self.failing_since is None:
            self.failing_since = now
        if not self.is_healthy and now < self._retry_at:
            return
        self._failures += 1
        pause = self.FIRST_PAUSE_S * 2.0 ** min(self._failures - self.FAILURE_THRESHOLD, 10)
        self._retry_at = now + min(self.MAX_PAUSE_S, pause)

    def record_success(self) -> None:
        """Record a clear answer."""
        self._failures = 0
        self.failing_since = None


#: How many tasks may be open before anything is known. The limit never falls below this.
START_OPEN_TASKS = 200
MAX_OPEN_TASKS = 10_000
#: The limit starts to follow the rate and the age after this many answers.
MIN_ANSWERS = 20
#: Tasks vary in age, and are open until the poll after their end. With room to spare, polls can wait for a better time.
OPEN_TASKS_MARGIN = 2.0
#: All open tasks must be fetchable within this share of the time for which the API keeps results.
FETCH_WINDOW_SHARE = 0.25


class InFlightLimit(Struct, frozen=True):
    """The limit of open tasks of a run, or the share that one of its `workers` has. `configured` None: it is found.

    By Little's law, the tasks that are open on average are the tasks submitted per second times the seconds that each
    is open. Each takes two requests or more, so the rate of all requests times the learned age is limit enough.
    """

    configured: int | None = None
    workers: int = 1
    #: For how long the API keeps a result.
    result_ttl_s: float = 86_400.0

    @property
    def start(self) -> int:
        """The limit of the whole run before anything is known."""
        return START_OPEN_TASKS if self.configured is None else self.configured

    @property
    def fetch_window_s(self) -> float:
        """In how many seconds all open tasks must be fetchable."""
        return self.result_ttl_s * FETCH_WINDOW_SHARE

    def max_open_tasks(self, rate: float, *, answers: int, age_s: float) -> int:
        """Return how many tasks may be open here, at least one.

        `rate` is in requests per second, submits and polls together, `answers` the number of tasks that `age_s`, their
        mean duration, was learned from; all three are those of this worker.
        """
        limit = self.start / self.workers
        if self.configured is None and answers * self.workers >= MIN_ANSWERS:
            limit = min(max(limit, OPEN_TASKS_MARGIN * rate * age_s), MAX_OPEN_TASKS / self.workers)
        return max(1, int(min(limit, rate * self.fetch_window_s)))

"""When the next request may leave: never faster than told, as fast as the API allows; pure, time is passed in.

The rate follows CUBIC (RFC 9438), as a rate and relative to the limit: after a 429 it is cut a little, comes back
quickly to just below the rate that was refused, stays near it, and then feels ever faster for more. Until the first
429 it grows as in slow start, but is never far above what was just proven (RFC 7661, and the AWS SDKs' adaptive mode).
"""

from __future__ import annotations

from collections import deque
from math import ceil, inf

START_RATE = 10.0  # requests per second, before anything is known
START_RATE_WITH_CEILING = 50.0  # likewise, when the person names a ceiling
MIN_RATE = 0.2
#: Until the first 429 each answer makes the rate so much larger.
SLOW_START_STEP = 3.0
#: No rate is further above that of the request which was just answered: in flight is at most a quarter too much.
MAX_OVER_PROVEN_RATE = 1.25

#: By what share the rate is cut: from a rate that was only grown into, from one that soon was too high again, and
#: from one that held. Coming back from a cut of depth d in RETURN_S costs d / 4 * RETURN_S seconds of the allowance.
FIRST_CUT, REPEATED_CUT, CUT = 0.5, 0.2, 0.1
#: Where the rate rests, as a share of the rate that was refused.
RESTING_SHARE = 0.98
#: How far above its rest the rate is after twice the time in which it came back.
PROBE_GAIN = 0.2
RETURN_S = 4.0
MAX_RETURN_S = 60.0
#: To feel for more costs some 429s, and silence when the API asks for it: the next time comes so late that those are
#: about this share of the requests, and this share of the time.
THROTTLED_SHARE, BLOCKED_SHARE = 0.01, 1 / 15

#: How long nothing leaves after a 429 without Retry-After; twice as long when the door is still shut after it.
PAUSE_S, MAX_PAUSE_S = 0.1, 10.0
MAX_RETRY_AFTER_S = 600.0
#: Requests on the wire at a cut whose answer never came are forgotten so long after it.
FORGET_AFTER_S = 2.0
#: Answers overtake each other: so many more than were on the wire at a cut may have left before it.
REORDER_FACTOR = 1.1
BURST_S = 0.05  # timers are late; what they cost may be caught up
#: A rate of which more than this share was not used in the last second is not what held us back.
MAX_IDLE_SHARE = 0.1


class AdaptiveRateLimiter:
    """The rate of all requests to the API, submits and polls together."""

    def __init__(self, ceiling: float | None) -> None:
        """Never exceed `ceiling` requests per second; None: find what the API allows."""
        self._ceiling = inf if ceiling is None else ceiling
        self.rate = START_RATE if ceiling is None else min(ceiling, START_RATE_WITH_CEILING)
        self._next_free = 0.0
        self._blocked_until = 0.0
        #: Where the rate rests; None: no 429 came yet.
        self._resting_rate: float | None = None
        self._cut_depth = FIRST_CUT
        #: The time since the last cut as answers tell it: it stands still while nothing is sent or heard.
        self._growth_time_s = 0.0
        self._return_s = RETURN_S
        self._throttled_count = 0
        self._blocked_s = 0.0
        self._pause_s = PAUSE_S
        self._idle_s = 0.0
        self._consumed_at: float | None = None
        #: The rates at which those on the wire left, oldest first, and how many of them left before the last cut.
        self._rates_in_flight: deque[float] = deque()
        self._sent_before_cut = 0
        self._forget_at = 0.0

    @property
    def is_limiting(self) -> bool:
        """Tell whether the rate is what holds us back."""
        return self._idle_s <= MAX_IDLE_SHARE

    def announce_demand(self, requested: int) -> None:
        """Hear how many would leave now, before it is asked when they may."""

    def delay(self, now: float) -> float:
        """Tell how long the next request must wait, in seconds; 0: it may leave now."""
        return max(self._blocked_until - now, self._next_free - now, 0.0)

    def blocked_for_s(self, now: float) -> float:
        """Tell for how many seconds nothing may leave, since the API said so."""
        return max(0.0, self._blocked_until - now)

    def consume(self, now: float) -> None:
        """One request leaves."""
        unused_s = max(0.0, now - BURST_S - self._next_free)
        if self._consumed_at is not None:
            self._idle_s = self._idle_s * max(0.0, 1 - (now - self._consumed_at)) + min(1.0, unused_s)
        self._consumed_at = now
        self._next_free += unused_s + 1 / self.rate
        self._rates_in_flight.append(self.rate)

    def refund(self, slots: int) -> None:
        """Nothing left in these slots after all."""
        self._next_free -= slots / self.rate
        for _ in range(min(slots, len(self._rates_in_flight))):
            self._rates_in_flight.pop()

    def record_answer(self, now: float) -> None:
        """One request was answered, and not by 429: a rate that held us back may grow."""
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
        self.rate = max(self.rate, min(self._ceiling, MAX_OVER_PROVEN_RATE * proven_rate, rate))

    def record_lost(self, now: float) -> None:
        """One request got no answer, or one that says nothing about the rate."""
        self._record_response(now)

    def record_throttled(self, now: float, retry_after: float | None) -> None:
        """Hear a 429: everybody waits as long as the API says, and is slower afterwards.

        What was on the wire when the first one came says nothing new about the rate.
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
        """Slow down from the rate that was refused."""
        if self._resting_rate is None:
            self._cut_depth, self._resting_rate = FIRST_CUT, RESTING_SHARE * refused_rate
        elif not self._growth_time_s:
            # The door is still shut: that says little about the rate that it will let in.
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
        """Let nothing leave before; what was missed meanwhile is not caught up."""
        self._blocked_until = max(self._blocked_until, until)
        self._next_free = max(self._next_free, self._blocked_until)

    def _record_response(self, now: float) -> float | None:
        """Take one request off the wire; tell at which rate it left, None: before the last cut."""
        if self._sent_before_cut and now >= self._forget_at:
            for _ in range(min(self._sent_before_cut, len(self._rates_in_flight))):
                self._rates_in_flight.popleft()
            self._sent_before_cut = 0
        sent_rate = self._rates_in_flight.popleft() if self._rates_in_flight else self.rate
        if not self._sent_before_cut:
            return sent_rate
        self._sent_before_cut -= 1
        return None

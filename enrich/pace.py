"""When the next request may leave: never faster than told, as fast as the API allows; pure, time is passed in.

The rate follows CUBIC (RFC 9438), as a rate and relative to the limit: after a 429 it is cut a little, comes back
quickly to just below the rate that was refused, stays near it, and then feels ever faster for more. Until the first
429 it grows as in slow start, but is never far above what was just proven (RFC 7661, and the AWS SDKs' adaptive mode).
"""

from __future__ import annotations

from collections import deque
from math import ceil, inf

SLOW_START = 10.0  # requests per second, before anything is known
TOLD_START = 50.0  # likewise, when the person names a ceiling
SLOWEST = 0.2
#: Until the first 429 each answer makes the rate so much larger.
STEP = 3.0
#: No rate is further above that of the request which was just answered: in flight is at most a quarter too much.
PROVEN = 1.25

#: By what share the rate is cut: from a rate that was only grown into, from one that soon was too high again, and
#: from one that held. Coming back from a cut of depth d in RETURN_S costs d / 4 * RETURN_S seconds of the allowance.
CUT_FIRST, CUT_AGAIN, CUT = 0.5, 0.2, 0.1
#: Where the rate rests, as a share of the rate that was refused.
REST = 0.98
#: How far above its rest the rate is after twice the time in which it came back.
GAIN = 0.2
RETURN_S = 4.0
LONGEST_RETURN_S = 60.0
#: To feel for more costs some 429s, and silence when the API asks for it: the next time comes so late that those are
#: about this share of the requests, and this share of the time.
REFUSED_SHARE, SILENT_SHARE = 0.01, 1 / 15

#: How long nothing leaves after a 429 without Retry-After; twice as long when the door is still shut after it.
PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
MAX_RETRY_AFTER_S = 600.0
#: Requests on the wire at a cut whose answer never came are forgotten so long after it.
RECOVERY_S = 2.0
#: Answers overtake each other: so many more than were on the wire at a cut may have left before it.
OVERTAKEN = 1.1
BURST_S = 0.05  # timers are late; what they cost may be caught up
#: A rate of which more than this share was not used in the last second is not what held us back.
IDLE_SHARE = 0.1


class Pace:
    """The rate of all requests to the API, submits and polls together."""

    def __init__(self, ceiling: float | None) -> None:
        """Never exceed `ceiling` requests per second; None: find what the API allows."""
        self._ceiling = inf if ceiling is None else ceiling
        self.rate = SLOW_START if ceiling is None else min(ceiling, TOLD_START)
        self._next_free = 0.0
        self._blocked_until = 0.0
        #: Where the rate rests; None: no 429 came yet.
        self._rest: float | None = None
        self._depth = CUT_FIRST
        #: The time since the last cut as answers tell it: it stands still while nothing is sent or heard.
        self._grown_s = 0.0
        self._return_s = RETURN_S
        self._refused = 0
        self._silence_s = 0.0
        self._pause_s = PAUSE_S
        self._idle_s = 0.0
        self._taken_at: float | None = None
        #: The rates at which those on the wire left, oldest first, and how many of them left before the last cut.
        self._wire: deque[float] = deque()
        self._old = 0
        self._forgotten_at = 0.0

    @property
    def scarce(self) -> bool:
        """Tell whether the rate is what holds us back."""
        return self._idle_s <= IDLE_SHARE

    def expect(self, wanted: int) -> None:
        """Hear how many would leave now, before it is asked when they may."""

    def delay(self, now: float) -> float:
        """Tell how long the next request must wait, in seconds; 0: it may leave now."""
        return max(self._blocked_until - now, self._next_free - now, 0.0)

    def shut(self, now: float) -> float:
        """Tell for how many seconds nothing may leave, since the API said so."""
        return max(0.0, self._blocked_until - now)

    def take(self, now: float) -> None:
        """One request leaves."""
        missed = max(0.0, now - BURST_S - self._next_free)
        if self._taken_at is not None:
            self._idle_s = self._idle_s * max(0.0, 1 - (now - self._taken_at)) + min(1.0, missed)
        self._taken_at = now
        self._next_free += missed + 1 / self.rate
        self._wire.append(self.rate)

    def give_back(self, slots: int) -> None:
        """Nothing left in these slots after all."""
        self._next_free -= slots / self.rate
        for _ in range(min(slots, len(self._wire))):
            self._wire.pop()

    def answered(self, now: float) -> None:
        """One request was answered, and not by 429: a rate that held us back may grow."""
        proven = self._heard(now)
        if proven is None:
            return
        self._pause_s = PAUSE_S
        if not self.scarce:
            return
        if self._rest is None:
            rate = self.rate + STEP
        else:
            self._grown_s += 1 / self.rate
            left = 1 - self._grown_s / self._return_s
            rate = self._rest * (1 - (self._depth if left > 0 else GAIN) * left**3)
        self.rate = max(self.rate, min(self._ceiling, PROVEN * proven, rate))

    def lost(self, now: float) -> None:
        """One request got no answer, or one that says nothing about the rate."""
        self._heard(now)

    def throttled(self, now: float, retry_after: float | None) -> None:
        """Hear a 429: everybody waits as long as the API says, and is slower afterwards.

        What was on the wire when the first one came says nothing new about the rate.
        """
        refused = self._heard(now)
        if retry_after is not None:
            self._block(now + min(retry_after, MAX_RETRY_AFTER_S))
        self._refused += 1
        if refused is not None:
            if retry_after is None:
                self._block(now + max(self._pause_s, 1 / self.rate))
                self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
            self._cut(now, refused)
        if self._rest is not None:
            wanted = max(self._refused / (REFUSED_SHARE * self._rest), self._silence_s / SILENT_SHARE)
            self._return_s = min(LONGEST_RETURN_S, max(RETURN_S, wanted))

    def _cut(self, now: float, refused: float) -> None:
        """Slow down from the rate that was refused."""
        if self._rest is None:
            self._depth, self._rest = CUT_FIRST, REST * refused
        elif not self._grown_s:
            # The door is still shut: that says little about the rate that it will let in.
            self._depth = 1 - (1 - CUT_AGAIN) * self.rate / self._rest
        else:
            self._depth = CUT if self._grown_s > self._return_s / 2 else CUT_AGAIN
            self._rest = REST * refused
        self.rate = max(min(SLOWEST, self.rate), self._rest * (1 - self._depth))
        self._grown_s = 0.0
        self._refused = 1
        self._silence_s = self._blocked_until - now
        self._old = ceil(OVERTAKEN * len(self._wire))
        self._forgotten_at = self._blocked_until + RECOVERY_S

    def _block(self, until: float) -> None:
        """Let nothing leave before; what was missed meanwhile is not caught up."""
        self._blocked_until = max(self._blocked_until, until)
        self._next_free = max(self._next_free, self._blocked_until)

    def _heard(self, now: float) -> float | None:
        """Take one request off the wire; tell at which rate it left, None: before the last cut."""
        if self._old and now >= self._forgotten_at:
            for _ in range(min(self._old, len(self._wire))):
                self._wire.popleft()
            self._old = 0
        left_at = self._wire.popleft() if self._wire else self.rate
        if not self._old:
            return left_at
        self._old -= 1
        return None

"""When an API that is ill is left alone: pure, time is passed in."""

from __future__ import annotations


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

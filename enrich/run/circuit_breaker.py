"""When an API that is ill is left alone: pure, time is passed in."""

from __future__ import annotations


class CircuitBreaker:
    """Stops the POSTs to an API that is ill: after a few bad answers in a row, one at a time with growing pauses."""

    FAILURE_THRESHOLD = 3
    FIRST_PAUSE_S = 1.0
    MAX_PAUSE_S = 60.0

    def __init__(self) -> None:
        self._failures = 0
        self._retry_at = 0.0
        self.failing_since: float | None = None

    @property
    def is_healthy(self) -> bool:
        """Tell whether several POSTs may leave at once."""
        return self._failures < self.FAILURE_THRESHOLD

    def delay(self, now: float, posts_in_flight: int) -> float | None:
        """Tell how long a POST must wait, in seconds; None: until one that is on the wire was answered."""
        if self.is_healthy:
            return 0.0
        if posts_in_flight:
            return None
        return max(0.0, self._retry_at - now)

    def record_failure(self, now: float) -> None:
        """Hear an answer that may or may not be one, or none at all.

        POSTs that had left before a pause began say nothing new: a full wire is one hiccup, not thirty-two.
        """
        if self.failing_since is None:
            self.failing_since = now
        if not self.is_healthy and now < self._retry_at:
            return
        self._failures += 1
        pause = self.FIRST_PAUSE_S * 2.0 ** min(self._failures - self.FAILURE_THRESHOLD, 10)
        self._retry_at = now + min(self.MAX_PAUSE_S, pause)

    def record_success(self) -> None:
        """Hear a clear answer."""
        self._failures = 0
        self.failing_since = None

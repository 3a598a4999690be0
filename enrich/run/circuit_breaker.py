"""Pauses POSTs to a failing API. Pure, time is passed in."""

from __future__ import annotations


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

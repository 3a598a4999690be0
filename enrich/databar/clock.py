"""The clock of a run: this machine's time, corrected by the API's `Date` headers."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

#: A local clock that is off by more than this (5 minutes) is corrected.
CLOCK_TOLERANCE_MS = 5 * 60 * 1000
#: Number of consecutive API responses that must agree on the clock's offset, and their maximum difference.
CLOCK_SAMPLES, CLOCK_SAMPLE_SPREAD_MS = 3, 5_000


class Clock(Protocol):
    """The clock, injected so that tests can replace it."""

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps, for rates and pauses."""

    def now_ms(self) -> int:
        """Milliseconds since 1970, UTC, for stored and displayed times and the age of earlier runs' data."""

    def earliest_ms(self) -> int:
        """The earliest possible current time (ms, UTC) by any clock, for decisions that cost credits after a delay."""

    def observe(self, api_ms: int) -> None:
        """Record the API's current time (milliseconds since 1970, UTC)."""


def boottime() -> float:
    """Seconds on a clock that never jumps and includes time asleep, if the system has such a clock."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


@dataclass(slots=True)
class SystemClock:
    """This machine's clock, read once at program start. Later changes of the system time have no effect.

    If several API responses agree that it is off by more than 5 minutes, it is set to the API's `Date`.
    """

    offset_ms: int = 0
    #: Local time of the machine's boot (milliseconds since 1970, UTC).
    _boot_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000 - int(boottime() * 1000), init=False)
    #: Offsets of the latest API responses from the local clock, in milliseconds.
    _api_offsets_ms: deque[int] = field(default_factory=lambda: deque(maxlen=CLOCK_SAMPLES), init=False)

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps."""
        return time.monotonic()

    def now_ms(self) -> int:
        """Milliseconds since 1970, UTC."""
        return self._local_ms() + self.offset_ms

    def earliest_ms(self) -> int:
        """The earliest current time (ms, UTC) by this machine's clock or by any of the latest API responses."""
        behind = (off for off in (self.offset_ms, *self._api_offsets_ms) if off < -CLOCK_TOLERANCE_MS)
        return self._local_ms() + min(behind, default=0)

    @property
    def api_ahead_ms(self) -> int | None:
        """By how many milliseconds the API's clock is ahead of this machine's. None: the API has sent no time."""
        return self._api_offsets_ms[-1] if self._api_offsets_ms else None

    def observe(self, api_ms: int) -> None:
        """Record the API's time. Adopt it if several matching responses show that the local clock is too far off."""
        self._api_offsets_ms.append(api_ms - self._local_ms())
        low, high = min(self._api_offsets_ms), max(self._api_offsets_ms)
        if len(self._api_offsets_ms) == CLOCK_SAMPLES and high - low <= CLOCK_SAMPLE_SPREAD_MS:
            self.offset_ms = high if abs(high) > CLOCK_TOLERANCE_MS else 0

    def _local_ms(self) -> int:
        return self._boot_ms + int(boottime() * 1000)

"""The sandbox's own time: the wall clock, plus what `/__advance` has added to it."""

import time
from collections.abc import Callable
from email.utils import formatdate


class Clock:
    """Tells the time of day and how to write it as an HTTP date."""

    def __init__(self, offset: float = 0, date_offset: float = 0, wall: Callable[[], float] = time.time) -> None:
        self.offset = offset
        self._date_offset = date_offset
        self._wall = wall
        self._second = 0
        self._date = b""

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._wall() + self.offset

    def date(self) -> bytes:
        """Give the `Date` header of this second."""
        second = int(self.now() + self._date_offset)
        if second != self._second:
            self._second = second
            self._date = self.http_date(second).encode()
        return self._date

    @staticmethod
    def http_date(seconds: float) -> str:
        """Write a moment the way HTTP headers do."""
        return formatdate(seconds, usegmt=True)

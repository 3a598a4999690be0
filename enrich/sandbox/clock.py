"""The sandbox's clock: the wall clock plus the seconds that `/__advance` added."""

import time
from email.utils import formatdate


class Clock:
    """Returns the sandbox's time, and formats it as an HTTP date; offsets are in seconds."""

    def __init__(self, offset: float, date_offset: float) -> None:
        self.offset = offset
        self._date_offset = date_offset
        self._second = 0
        self._date = b""

    def now(self) -> float:
        """Return the time in seconds since the epoch."""
        return time.time() + self.offset

    def date(self) -> bytes:
        """Return the `Date` header of the current second."""
        second = int(self.now() + self._date_offset)
        if second != self._second:
            self._second = second
            self._date = self.http_date(second).encode()
        return self._date

    @staticmethod
    def http_date(seconds: float) -> str:
        """Format a time (seconds since the epoch) as an HTTP date."""
        return formatdate(seconds, usegmt=True)

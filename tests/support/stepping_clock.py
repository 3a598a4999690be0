"""Runs `enrich` under a clock that steps: `python -m tests.support.stepping_clock CLOCK run job.yaml …`.

`time.time` and `time.time_ns` are shifted by the seconds in the file CLOCK, which may change at any time. Not shifted:
`datetime.now`, the clocks of the file system and of SQLite, and processes that `enrich` starts.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

#: How long an offset is cached, in seconds.
CACHE_S = 0.02


class SteppingClock:
    """This machine's clock with an offset; without a file the offset is 0."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._time_ns = time.time_ns
        self._offset_ns = 0
        self._read_at = float("-inf")

    def time_ns(self) -> int:
        """Replacement of `time.time_ns`."""
        now = time.monotonic()
        if self.path is not None and now - self._read_at > CACHE_S:
            self._read_at = now
            with suppress(OSError, ValueError):  # not written yet, or being written
                self._offset_ns = int(float(self.path.read_text()) * 1e9)
        return self._time_ns() + self._offset_ns

    def time(self) -> float:
        """Replacement of `time.time`."""
        return self.time_ns() / 1e9


def main() -> None:
    """Replace the clock before the program is imported, then run the program."""
    clock = SteppingClock(Path(sys.argv.pop(1)))
    time.time, time.time_ns = clock.time, clock.time_ns
    from databar_enrich import end_process  # noqa: PLC0415
    from enrich.cli import main as enrich  # noqa: PLC0415 - imported after the clock was replaced

    sys.argv[0] = "enrich"
    end_process(enrich())


if __name__ == "__main__":
    main()

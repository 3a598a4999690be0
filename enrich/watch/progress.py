"""Shows how far an execution is, on a terminal."""

from __future__ import annotations

import sys
from typing import Never

from tqdm import tqdm

from enrich.surroundings import Progress


class Bar:
    """A plain tqdm bar on stderr that knows requests, hits, credits and the time to go."""

    def __init__(self) -> None:
        self._bar: tqdm[Never] | None = None

    def show(self, progress: Progress) -> None:
        """Draw the bar; it appears once there is something to do."""
        if self._bar is None:
            if not progress.total:
                return
            self._bar = tqdm(total=progress.total, unit=" requests", dynamic_ncols=True, smoothing=0.05)
        self._bar.n = progress.done
        hits = f"{progress.found / progress.done:.0%}" if progress.done else "-"
        self._bar.set_postfix_str(f"{hits} hits, {progress.spent:.2f} credits, {progress.in_flight} in flight")

    def tell(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

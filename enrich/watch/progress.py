"""Shows how far an execution is, on a terminal."""

from __future__ import annotations

import sys
from typing import Never

from tqdm import tqdm

from enrich.surroundings import Progress

UNIT = " requests"
#: Of a terminal that does not say how wide it is.
COLUMNS = 80


def postfix(progress: Progress, elapsed_s: float, columns: int) -> str:
    """Write hits, credits and what is in flight, as far as a bar of ten columns and the time to go leave room."""
    hits = f"{progress.found / progress.done:.0%}" if progress.done else "-"
    told = [f"{hits} hits", f"{progress.spent:.2f} credits", f"{progress.in_flight} in flight"]
    while told and len(_meter(progress, elapsed_s, ", ".join(told))) > columns:
        told.pop()
    return ", ".join(told)


def _meter(progress: Progress, elapsed_s: float, said: str) -> str:
    """Write the bar as wide as it likes to be."""
    return tqdm.format_meter(progress.done, progress.total or 0, elapsed_s, unit=UNIT, postfix=said)


class Bar:
    """A plain tqdm bar on stderr that knows requests, hits, credits and the time to go."""

    def __init__(self) -> None:
        self._bar: tqdm[Never] | None = None

    def show(self, progress: Progress) -> None:
        """Draw the bar; it appears once there is something to do."""
        if self._bar is None:
            if not progress.total:
                return
            self._bar = tqdm(total=progress.total, unit=UNIT, dynamic_ncols=True, smoothing=0.05)
        self._bar.n = progress.done
        looks = self._bar.format_dict
        self._bar.set_postfix_str(postfix(progress, looks["elapsed"], looks["ncols"] or COLUMNS))

    def tell(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

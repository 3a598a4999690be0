"""Shows how far an execution is, on a terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Never

from tqdm import tqdm

from enrich.run.context import Progress

UNIT = " requests"
#: tqdm's own form without the speed.
SHORT_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
#: Of a terminal that does not say how wide it is.
DEFAULT_COLUMNS = 80


@dataclass(frozen=True, slots=True)
class BarLayout:
    """How tqdm draws a bar: its `bar_format`, and what it says at the end."""

    bar_format: str | None
    postfix: str


def choose_layout(progress: Progress, elapsed_s: float, columns: int) -> BarLayout:
    """Tell as much as a bar of ten columns and the time to go leave room for; the speed goes first."""
    hits = f"{progress.found / progress.done:.0%}" if progress.done else "-"
    details = [f"{hits} hits", f"{progress.spent:.2f} credits", f"{progress.in_flight} in flight"]
    layouts = [
        BarLayout(None, ", ".join(details)),
        *(BarLayout(SHORT_FORMAT, ", ".join(details[:some])) for some in (3, 2, 1, 0)),
    ]
    return next((layout for layout in layouts if len(render_bar(progress, elapsed_s, layout)) <= columns), layouts[-1])


def render_bar(  # noqa: PLR0913 - a bar has these
    progress: Progress,
    elapsed_s: float,
    layout: BarLayout,
    *,
    columns: int | None = None,
    rate: float | None = None,
    ascii_only: bool = False,
) -> str:
    """Draw a bar so wide, or as wide as it likes to be, `plain` without block letters; `rate` in requests/s."""
    return tqdm.format_meter(
        progress.done,
        progress.total or 0,
        elapsed_s,
        ncols=columns,
        ascii=ascii_only,
        unit=UNIT,
        rate=rate,
        bar_format=layout.bar_format,
        postfix=layout.postfix,
    )


class ProgressBar:
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
        format_dict = self._bar.format_dict
        layout = choose_layout(progress, format_dict["elapsed"], format_dict["ncols"] or DEFAULT_COLUMNS)
        self._bar.bar_format = layout.bar_format
        self._bar.set_postfix_str(layout.postfix)

    def write_line(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

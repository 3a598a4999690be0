"""Shows the progress of a run on a terminal."""

from __future__ import annotations

import sys
from typing import Never

from msgspec import Struct
from tqdm import tqdm

from enrich.run.progress import Progress

UNIT = " requests"
#: tqdm's default format without the rate.
SHORT_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
#: Width of a terminal that does not report its width.
DEFAULT_COLUMNS = 80


class BarLayout(Struct, frozen=True):
    """How tqdm draws a bar: its `bar_format` (None: tqdm's default), and the text at the end."""

    bar_format: str | None
    postfix: str


def choose_layout(progress: Progress, elapsed_s: float, columns: int) -> BarLayout:
    """Choose the most detailed layout that fits next to a bar of ten columns; the rate is dropped first."""
    matches = f"{progress.found / progress.done:.0%}" if progress.done else "-"
    details = [f"{matches} match", f"{progress.spent:.2f} credits", f"{progress.in_flight} in flight"]
    layouts = [
        BarLayout(None, ", ".join(details)),
        *(BarLayout(SHORT_FORMAT, ", ".join(details[:some])) for some in (3, 2, 1, 0)),
    ]
    return next((layout for layout in layouts if len(render_bar(progress, elapsed_s, layout)) <= columns), layouts[-1])


def render_bar(  # noqa: PLR0913 - all are options of the bar
    progress: Progress,
    elapsed_s: float,
    layout: BarLayout,
    *,
    columns: int | None = None,
    rate: float | None = None,
    ascii_only: bool = False,
) -> str:
    """Render a bar in `columns` (None: its natural width), `ascii_only` without blocks; `rate` in requests/s."""
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
    """A tqdm bar on stderr with requests, match rate, credits and the remaining time."""

    def __init__(self) -> None:
        self._bar: tqdm[Never] | None = None

    def show(self, progress: Progress) -> None:
        """Draw the bar; it appears once the total is known and not 0."""
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
        """Close the bar; its last state stays on the screen."""
        if self._bar is not None:
            self._bar.close()

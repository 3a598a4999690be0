"""`enrich status --watch`: the picture of a run, again and again, until it ends."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TextIO

import click

from enrich.errors import Exit, Interrupted
from enrich.look.lookout import Lookout
from enrich.look.picture import Picture, Sign, line, lines
from enrich.streams import failure

WAITING = "no run is at work: waiting for the next; Ctrl-C leaves"
HOPING = "waiting for a sign of life, or for the next run; Ctrl-C leaves"
#: Another screen without a cursor, and back (xterm's control sequences, as all terminals of today know them).
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, END_OF_LINE, BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
#: How soon the picture follows a window that changes its size.
RESIZED_S = 0.2
EVERY_S = 2.0
COLOURS = {Sign.AT_WORK: "green", Sign.SILENT: "red"}


def _wait(picture: Picture) -> str:
    """Say what is waited for."""
    return HOPING if picture.sign is Sign.SILENT else WAITING


def _flush(out: TextIO) -> None:
    """Show what was written. Raises BrokenPipeError when it can't be shown any more: then watching is over."""
    if failure(out) is not None:
        raise BrokenPipeError


class View(Protocol):
    """Where pictures are shown."""

    def show(self, picture: Picture, *, waiting: bool) -> None:
        """Show a picture instead of the last one, or below it; `waiting` for a run."""

    def pause(self, seconds: float) -> None:
        """Let the picture stand."""


def watch(lookout: Lookout, view: View, every_s: float) -> int:
    """Show the job's newest run until it ends; without one at work wait for the next. Return the exit code."""
    ended_before: int | None = None
    try:
        while True:
            picture = lookout.look()
            ended = picture.run.id if picture.run is not None and picture.sign is Sign.ENDED else 0
            if ended_before is None:
                ended_before = ended
            over = ended > ended_before
            view.show(picture, waiting=not over and picture.sign is not Sign.AT_WORK)
            if over:
                return Exit.OK
            view.pause(every_s)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except Interrupted as signal:
        return signal.exit_code


@dataclass(frozen=True, slots=True)
class Lines:
    """One line for each look: text, or a JSON object."""

    out: TextIO
    as_json: bool

    def show(self, picture: Picture, *, waiting: bool) -> None:
        """Write a line, now."""
        if self.as_json:
            said = json.dumps(picture.as_json(), ensure_ascii=False)
        else:
            said = line(picture) + (f"; {_wait(picture)}" if waiting else "")
        self.out.write(said + "\n")
        _flush(self.out)

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)


@dataclass(slots=True)
class Screen:
    """A terminal: each picture is drawn over the last one, on a screen of its own."""

    out: TextIO
    coloured: bool
    size: Callable[[], tuple[int, int]] = shutil.get_terminal_size
    _last: tuple[Picture, bool] | None = None
    _drawn_for: tuple[int, int] | None = None

    def show(self, picture: Picture, *, waiting: bool) -> None:
        """Draw the picture as the window is now: no line is longer, and there are not more."""
        self._last, self._drawn_for = (picture, waiting), self.size()
        columns, rows = self._drawn_for
        # In the last column a terminal may go on to the next line.
        shown = self._lines(picture, columns - 1, waiting=waiting)[: max(1, rows)]
        self.out.write(HOME + "\r\n".join(text + END_OF_LINE for text in shown) + BELOW)
        _flush(self.out)

    def pause(self, seconds: float) -> None:
        """Let the picture stand; draw it again when the window changes its size."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, RESIZED_S))
            if self._last is not None and self.size() != self._drawn_for:
                picture, waiting = self._last
                self.show(picture, waiting=waiting)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the terminal, give it back as it was, and leave how the run ended on it."""
        try:
            self.out.write(ENTER)
            yield
        finally:
            with suppress(OSError):  # the window was closed
                self.out.write(LEAVE)
                if self._last is not None and self._last[0].sign is Sign.ENDED and not self._last[1]:
                    self.out.write("\n".join(self._lines(self._last[0], self.size()[0] - 1, waiting=False)) + "\n")
                self.out.flush()

    def _lines(self, picture: Picture, columns: int, *, waiting: bool) -> list[str]:
        plain = "utf" not in (self.out.encoding or "").lower()
        head, *rest = lines(picture, columns, plain=plain)
        if self.coloured:
            head = click.style(head, bold=True, fg=COLOURS.get(picture.sign))
        return [head, *rest, *(("", _wait(picture)[: max(0, columns)]) if waiting else ())]


def watch_job(lookout: Lookout, out: TextIO, environ: Mapping[str, str], every_s: float, *, as_json: bool) -> int:
    """Watch on a terminal that can be drawn on, or else line by line."""
    if as_json or not out.isatty() or environ.get("TERM", "dumb") in ("dumb", ""):
        return watch(lookout, Lines(out, as_json), every_s)
    screen = Screen(out, coloured=not environ.get("NO_COLOR"))
    with screen.taken():
        return watch(lookout, screen, every_s)

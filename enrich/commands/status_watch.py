"""`enrich status --watch`: the picture of a run, again and again, until it ends."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TextIO

import click

from enrich.commands.run_view import RunStatus, RunView, format_view, format_view_line, run_status
from enrich.commands.streams import flush_error
from enrich.databar.clock import SystemClock
from enrich.errors import Interrupted
from enrich.exit_codes import ExitCode
from enrich.job.job import Job
from enrich.ledger.database import ledger_exists
from enrich.ledger.history import LatestExecutionRow, LedgerReader
from enrich.ledger.lock import is_locked
from enrich.run.progress import read_snapshot

#: A run writes its pulse every 2 s; on a busy disk it may take a while.
HEARTBEAT_TIMEOUT_S = 15.0


@dataclass(slots=True)
class RunWatcher:
    """Looks at a job now and then. A run that gave no sign of life for longer than `patience_s` is not at work.

    Two clocks may differ, and one may be set: a pulse that changed between two looks is fresh whatever its time.
    """

    job: Job
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    clock: Callable[[], float] = time.monotonic
    _last_heartbeat: tuple[int, str | None] | None = None
    _changed_at: float = 0.0
    _has_changed: bool = False

    def read_view(self) -> RunView:
        """Look once. Raises Refused when the ledger is none, or can't be read."""
        job, now_ms = self.job, SystemClock().now_ms()
        ttl_ms = int(job.model.policy.result_ttl.total_seconds() * 1000)
        if not ledger_exists(job.ledger):
            return RunView(job.name, job.ledger, ttl_ms, now_ms, RunStatus.NO_LEDGER)
        # Closed again at once: who has a ledger open keeps its run from tidying up at the end.
        with closing(LedgerReader(job.ledger)) as history:
            run = history.latest_execution(job.name)
        if run is None:
            return RunView(job.name, job.ledger, ttl_ms, now_ms, RunStatus.NEVER_RUN)
        snapshot = read_snapshot(run.pulse)
        heartbeat_age_s = self._heartbeat_age_s(run, now_ms - (run.started_ms if snapshot is None else snapshot.at_ms))
        lock_held = run.id == run.newest and is_locked(job.ledger)
        status = run_status(run, snapshot, heartbeat_age_s, self.heartbeat_timeout_s, lock_held=lock_held)
        return RunView(job.name, job.ledger, ttl_ms, now_ms, status, run, snapshot)

    def _heartbeat_age_s(self, run: LatestExecutionRow, age_ms: int) -> float:
        """Tell how long the run has given no sign, by what the clock says and by what was seen."""
        now, heartbeat = self.clock(), (run.id, run.pulse)
        if self._last_heartbeat != heartbeat:
            self._has_changed = self._last_heartbeat is not None
            self._last_heartbeat, self._changed_at = heartbeat, now
        unchanged_s = now - self._changed_at
        return unchanged_s if self._has_changed else max(abs(age_ms) / 1000, unchanged_s)


WAITING_TEXT = "no run is at work: waiting for the next; Ctrl-C leaves"
NO_HEARTBEAT_TEXT = "waiting for a sign of life, or for the next run; Ctrl-C leaves"
#: Another screen without a cursor, and back (xterm's control sequences, as all terminals of today know them).
ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
CURSOR_HOME, ERASE_LINE, ERASE_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
#: How soon the picture follows a window that changes its size.
RESIZE_CHECK_S = 0.2
DEFAULT_INTERVAL_S = 2.0
STATUS_COLORS = {RunStatus.RUNNING: "green", RunStatus.NO_HEARTBEAT: "red"}


def _waiting_text(view: RunView) -> str:
    """Say what is waited for."""
    return NO_HEARTBEAT_TEXT if view.status is RunStatus.NO_HEARTBEAT else WAITING_TEXT


def _flush(out: TextIO) -> None:
    """Show what was written. Raises BrokenPipeError when it can't be shown any more: then watching is over."""
    if flush_error(out) is not None:
        raise BrokenPipeError


class Display(Protocol):
    """Where pictures are shown."""

    def show(self, view: RunView, *, waiting: bool) -> None:
        """Show a picture instead of the last one, or below it; `waiting` for a run."""

    def pause(self, seconds: float) -> None:
        """Let the picture stand."""


def run_watch_loop(watcher: RunWatcher, display: Display, interval_s: float) -> int:
    """Show the job's newest run until it ends; without one at work wait for the next. Return the exit code."""
    ended_before: int | None = None
    try:
        while True:
            view = watcher.read_view()
            ended = view.run.id if view.run is not None and view.status is RunStatus.ENDED else 0
            if ended_before is None:
                ended_before = ended
            has_ended = ended > ended_before
            display.show(view, waiting=not has_ended and view.status is not RunStatus.RUNNING)
            if has_ended:
                return ExitCode.OK
            display.pause(interval_s)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Interrupted as signal:
        return signal.exit_code


@dataclass(frozen=True, slots=True)
class LineDisplay:
    """One line for each look: text, or a JSON object."""

    out: TextIO
    as_json: bool

    def show(self, view: RunView, *, waiting: bool) -> None:
        """Write a line, now."""
        if self.as_json:
            text = json.dumps(view.as_json(), ensure_ascii=False)
        else:
            text = format_view_line(view) + (f"; {_waiting_text(view)}" if waiting else "")
        self.out.write(text + "\n")
        _flush(self.out)

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)


@dataclass(slots=True)
class TerminalDisplay:
    """A terminal: each picture is drawn over the last one, on a screen of its own."""

    out: TextIO
    use_color: bool
    size: Callable[[], tuple[int, int]] = shutil.get_terminal_size
    _last_shown: tuple[RunView, bool] | None = None
    _drawn_size: tuple[int, int] | None = None

    def show(self, view: RunView, *, waiting: bool) -> None:
        """Draw the picture as the window is now: no line is longer, and there are not more."""
        self._last_shown, self._drawn_size = (view, waiting), self.size()
        columns, rows = self._drawn_size
        # In the last column a terminal may go on to the next line.
        shown = self._format_lines(view, columns - 1, waiting=waiting)[: max(1, rows)]
        self.out.write(CURSOR_HOME + "\r\n".join(text + ERASE_LINE for text in shown) + ERASE_BELOW)
        _flush(self.out)

    def pause(self, seconds: float) -> None:
        """Let the picture stand; draw it again when the window changes its size."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, RESIZE_CHECK_S))
            if self._last_shown is not None and self.size() != self._drawn_size:
                view, waiting = self._last_shown
                self.show(view, waiting=waiting)

    @contextmanager
    def alternate_screen(self) -> Iterator[None]:
        """Take the terminal, give it back as it was, and leave how the run ended on it."""
        try:
            self.out.write(ENTER_SCREEN)
            yield
        finally:
            with suppress(OSError):  # the window was closed
                self.out.write(LEAVE_SCREEN)
                if (
                    self._last_shown is not None
                    and self._last_shown[0].status is RunStatus.ENDED
                    and not self._last_shown[1]
                ):
                    self.out.write(
                        "\n".join(self._format_lines(self._last_shown[0], self.size()[0] - 1, waiting=False)) + "\n"
                    )
                self.out.flush()

    def _format_lines(self, view: RunView, columns: int, *, waiting: bool) -> list[str]:
        ascii_only = "utf" not in (self.out.encoding or "").lower()
        head, *rest = format_view(view, columns, ascii_only=ascii_only)
        if self.use_color:
            head = click.style(head, bold=True, fg=STATUS_COLORS.get(view.status))
        return [head, *rest, *(("", _waiting_text(view)[: max(0, columns)]) if waiting else ())]


def watch_job(watcher: RunWatcher, out: TextIO, environ: Mapping[str, str], interval_s: float, *, as_json: bool) -> int:
    """Watch on a terminal that can be drawn on, or else line by line."""
    if as_json or not out.isatty() or environ.get("TERM", "dumb") in ("dumb", ""):
        return run_watch_loop(watcher, LineDisplay(out, as_json), interval_s)
    display = TerminalDisplay(out, use_color=not environ.get("NO_COLOR"))
    with display.alternate_screen():
        return run_watch_loop(watcher, display, interval_s)

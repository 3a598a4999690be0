"""`enrich status --watch`: shows a run repeatedly until it ends."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from math import inf
from typing import TextIO

import click
from msgspec import Struct
from msgspec.structs import replace

from enrich.commands.run_view import RunStatus, RunView, format_view, format_view_line, run_status
from enrich.commands.streams import flush_error
from enrich.databar.clock import SystemClock
from enrich.errors import CommandRefused, Interrupted
from enrich.exit_codes import ExitCode
from enrich.job.job import Job
from enrich.job.locations import PostgresLocation
from enrich.ledger import queries, records
from enrich.ledger.database import ledger_exists, open_existing
from enrich.ledger.dialect import OUTAGE_TIMEOUT_S, DatabaseFailed
from enrich.ledger.lock import is_locked
from enrich.ledger.records import ExecutionRow
from enrich.models import to_ms
from enrich.run.progress import read_snapshot

#: A run writes a heartbeat every 2 s. A busy disk may delay it up to this time (seconds).
HEARTBEAT_TIMEOUT_S = 15.0
WAITING_TEXT = "no run in progress: waiting for the next one; Ctrl-C quits"
NO_HEARTBEAT_TEXT = "waiting for a heartbeat, or for the next run; Ctrl-C quits"
#: Switch to an alternate screen without a cursor, and back (xterm control sequences, which all terminals support).
ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
CURSOR_HOME, ERASE_LINE, ERASE_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
#: Seconds between checks for a changed window size.
RESIZE_CHECK_S = 0.2
DEFAULT_INTERVAL_S = 2.0
STATUS_COLORS = {RunStatus.RUNNING: "green", RunStatus.NO_HEARTBEAT: "red", RunStatus.KILLED: "red"}


@dataclass(slots=True)
class RunWatcher:
    """Reads the state of a job's newest run. Without a heartbeat for `heartbeat_timeout_s` it is not running.

    Two machines' clocks may differ, and a clock may be set. So a heartbeat that changed between two reads is fresh,
    whatever its time.
    """

    job: Job
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    clock: Callable[[], float] = time.monotonic
    _last_heartbeat: tuple[int, str | None] | None = None
    _changed_at: float = 0.0
    _has_changed: bool = False

    def read_view(self) -> RunView:
        """Read the current state. Raises CommandRefused if the file is not a ledger or cannot be read."""
        job, now_ms = self.job, SystemClock().now_ms()
        view = RunView(job.name, job.ledger, now_ms, RunStatus.NO_LEDGER, sandbox=job.sandbox)
        if not ledger_exists(job.ledger):
            return view
        lock_held = is_locked(job.ledger)  # before reading: a run that ends meanwhile was not killed
        # Close it at once: an open ledger keeps the run from cleaning up at its end.
        with closing(open_existing(job.ledger)) as ledger:
            executions = records.list_executions(ledger, job.name, last=1)
            newest = records.newest_execution_id(ledger)
            oldest_open_ms = queries.oldest_open_submission_ms(ledger)
        if not executions:
            return replace(view, status=RunStatus.NEVER_RUN)
        run = executions[0]
        snapshot = read_snapshot(run.progress)
        heartbeat_age_s = self._heartbeat_age_s(run, now_ms - (run.started_ms if snapshot is None else snapshot.at_ms))
        is_active = lock_held and run.id == newest
        status = run_status(run, snapshot, heartbeat_age_s, self.heartbeat_timeout_s, lock_held=is_active)
        next_expiry_ms = None if oldest_open_ms is None else oldest_open_ms + to_ms(job.result_ttl)
        return replace(view, status=status, run=run, snapshot=snapshot, next_expiry_ms=next_expiry_ms)

    def _heartbeat_age_s(self, run: ExecutionRow, age_ms: int) -> float:
        """Return the seconds since the last heartbeat, by its time (`age_ms` ago) and by the changes seen so far."""
        now, heartbeat = self.clock(), (run.id, run.progress)
        if self._last_heartbeat != heartbeat:
            self._has_changed = self._last_heartbeat is not None
            self._last_heartbeat, self._changed_at = heartbeat, now
        unchanged_s = now - self._changed_at
        return unchanged_s if self._has_changed else max(abs(age_ms) / 1000, unchanged_s)


def _waiting_text(view: RunView) -> str:
    """Return what the watcher is waiting for."""
    return NO_HEARTBEAT_TEXT if view.status is RunStatus.NO_HEARTBEAT else WAITING_TEXT


def _flush(out: TextIO) -> None:
    """Flush the output. Raises BrokenPipeError if that fails, which ends watching."""
    if flush_error(out) is not None:
        raise BrokenPipeError


def run_watch_loop(watcher: RunWatcher, display: LineDisplay | TerminalDisplay, interval_s: float) -> int:
    """Show the job's newest run until it ends. If none is running, wait for the next. Return the exit code.

    While a PostgreSQL server restarts, wait for it as a run does. Raises CommandRefused and DatabaseFailed.
    """
    ended_before: int | None = None
    last_read_at = -inf
    try:
        while True:
            try:
                view = watcher.read_view()
            except (CommandRefused, DatabaseFailed):
                may_return = isinstance(watcher.job.ledger, PostgresLocation)
                if not may_return or watcher.clock() - last_read_at > OUTAGE_TIMEOUT_S:
                    raise
                display.pause(interval_s)
                continue
            last_read_at = watcher.clock()
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


class LineDisplay(Struct, frozen=True):
    """Shows each view as one line: text or a JSON object."""

    out: TextIO
    as_json: bool

    def show(self, view: RunView, *, waiting: bool) -> None:
        """Write one line and flush it. `waiting`: the watcher waits for a run or heartbeat."""
        if self.as_json:
            text = json.dumps(view.as_json(), ensure_ascii=False)
        else:
            text = format_view_line(view) + (f"; {_waiting_text(view)}" if waiting else "")
        self.out.write(text + "\n")
        _flush(self.out)

    def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


@dataclass(slots=True)
class TerminalDisplay:
    """Draws each view over the last one, on the terminal's alternate screen."""

    out: TextIO
    use_color: bool
    size: Callable[[], tuple[int, int]] = shutil.get_terminal_size
    _last_shown: tuple[RunView, bool] | None = None
    _drawn_size: tuple[int, int] | None = None

    def show(self, view: RunView, *, waiting: bool) -> None:
        """Draw the view, limited to the current width and height of the window. `waiting`: as of `LineDisplay`."""
        self._last_shown, self._drawn_size = (view, waiting), self.size()
        columns, rows = self._drawn_size
        # Leave the last column free: text there may move the cursor to the next line.
        shown = self._format_lines(view, columns - 1, waiting=waiting)[: max(1, rows)]
        self.out.write(CURSOR_HOME + "\r\n".join(text + ERASE_LINE for text in shown) + ERASE_BELOW)
        _flush(self.out)

    def pause(self, seconds: float) -> None:
        """Wait, and draw the view again if the window size changes."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, RESIZE_CHECK_S))
            if self._last_shown is not None and self.size() != self._drawn_size:
                view, waiting = self._last_shown
                self.show(view, waiting=waiting)

    @contextmanager
    def alternate_screen(self) -> Iterator[None]:
        """Use the alternate screen during the block. Then restore the terminal and print how the run ended."""
        try:
            self.out.write(ENTER_SCREEN)
            yield
        finally:
            with suppress(OSError):  # the window was closed
                self.out.write(LEAVE_SCREEN)
                view, waiting = self._last_shown or (None, False)
                if view is not None and view.status is RunStatus.ENDED and not waiting:
                    lines = self._format_lines(view, self.size()[0] - 1, waiting=False)
                    self.out.write("\n".join(lines) + "\n")
                self.out.flush()

    def _format_lines(self, view: RunView, columns: int, *, waiting: bool) -> list[str]:
        ascii_only = "utf" not in (self.out.encoding or "").lower()
        head, *rest = format_view(view, columns, ascii_only=ascii_only)
        if self.use_color:
            head = click.style(head, bold=True, fg=STATUS_COLORS.get(view.status))
        return [head, *rest, *(("", _waiting_text(view)[: max(0, columns)]) if waiting else ())]


def watch_job(watcher: RunWatcher, out: TextIO, environ: Mapping[str, str], interval_s: float, *, as_json: bool) -> int:
    """Watch by redrawing a terminal that supports it, else line by line."""
    if as_json or not out.isatty() or environ.get("TERM", "dumb") in ("dumb", ""):
        return run_watch_loop(watcher, LineDisplay(out, as_json), interval_s)
    display = TerminalDisplay(out, use_color=not environ.get("NO_COLOR"))
    with display.alternate_screen():
        return run_watch_loop(watcher, display, interval_s)

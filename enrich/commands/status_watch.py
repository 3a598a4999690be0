"""`enrich status --watch`: shows a run repeatedly until it ends, on a terminal, line by line or as JSON."""

from __future__ import annotations

import json
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Any, TextIO

import click
from msgspec import Struct
from msgspec.structs import replace

from enrich.commands.streams import flush_error
from enrich.databar.clock import SystemClock
from enrich.errors import CommandRefused, Interrupted
from enrich.exit_codes import ExitCode, exit_label
from enrich.job.job import Job
from enrich.job.locations import LedgerLocation, PostgresLocation
from enrich.ledger import queries, records
from enrich.ledger.database import Database, ledger_exists, open_existing
from enrich.ledger.dialect import OUTAGE_TIMEOUT_S, DatabaseFailed
from enrich.ledger.lock import is_locked
from enrich.ledger.records import ExecutionRow
from enrich.models import STATUS_WORDS, format_elapsed, iso_time, job_title, pluralize, to_credits, to_ms
from enrich.run.progress import Progress, ProgressSnapshot, TrafficCounts, read_snapshot

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
#: Minimum width of the view in columns, for readability. A narrower terminal cuts the lines off.
MIN_COLUMNS = 20


class RunStatus(StrEnum):
    """Status of the newest run of a job, as far as it is visible from another process."""

    NO_LEDGER = "no ledger"
    NEVER_RUN = "never run"
    RUNNING = "running"
    NO_HEARTBEAT = "no heartbeat"
    KILLED = "killed"
    ENDED = "ended"


class RunView(Struct, frozen=True):
    """State of a job's newest run at the time `now_ms` (milliseconds since 1970, UTC).

    `next_expiry_ms` is when the API deletes the first uncollected result.
    """

    job: str
    ledger: LedgerLocation
    now_ms: int
    status: RunStatus
    run: ExecutionRow | None = None
    snapshot: ProgressSnapshot | None = None
    next_expiry_ms: int | None = None
    sandbox: bool = False

    @property
    def last_heartbeat_ms(self) -> int | None:
        """Time of the last heartbeat, or the start of the run (milliseconds since 1970, UTC). None without a run."""
        if self.snapshot is not None:
            return self.snapshot.at_ms
        return None if self.run is None else self.run.started_ms

    @property
    def recent_traffic(self) -> tuple[TrafficCounts, float]:
        """Recent traffic, and the number of seconds that it covers."""
        if self.snapshot is None or self.status is not RunStatus.RUNNING:
            return TrafficCounts(), 0.0
        return self.snapshot.traffic.recent(self.snapshot.elapsed_s)

    @property
    def remaining_s(self) -> float | None:
        """Estimated remaining time in seconds at the recent speed. None if unknown."""
        recent, over_s = self.recent_traffic
        if self.snapshot is None or self.snapshot.total is None or not recent.answered:
            return None
        return max(0, self.snapshot.total - self.snapshot.done) / recent.answered * over_s

    def as_json(self) -> dict[str, Any]:
        """Return the object that `enrich status --watch --json` prints. None means unknown."""
        run, snapshot = self.run, self.snapshot
        result: dict[str, Any] = {"at": iso_time(self.now_ms), "job": self.job, "sandbox": self.sandbox}
        result["sign"] = self.status.value
        if run is None:
            return result
        recent, over_s = self.recent_traffic
        totals = snapshot.traffic.totals() if snapshot else None
        return result | {
            "execution": run.id,
            "started_at": iso_time(run.started_ms),
            "last_sign_at": iso_time(self.last_heartbeat_ms),
            "ended_at": iso_time(run.ended_ms),
            "exit_code": run.exit_code,
            "outcome": None if run.exit_code is None else exit_label(run.exit_code),
            "doing": snapshot.doing.key if snapshot and self.status is not RunStatus.ENDED else None,
            **{name: getattr(snapshot, name, None) for name in ("elapsed_s", "total", "done", "states", "in_flight")},
            "submitted": run.submitted,
            "credits_spent": to_credits(run.spent),
            "credits_unknown": run.unknown,
            "credits_reserved": to_credits(run.reserved),
            "max_credits": to_credits(run.cap),
            **{name: getattr(totals, name, None) for name in ("polls", "rate_limited")},
            "submitted_per_s": round(recent.submitted / over_s, 2) if over_s else None,
            "answered_per_s": round(recent.answered / over_s, 2) if over_s else None,
            "to_go_s": None if self.remaining_s is None else round(self.remaining_s),
            "next_expiry": iso_time(self.next_expiry_ms),
        }


def format_headline(view: RunView) -> str:
    """Describe the status of the newest run in one line."""
    job, run, last_heartbeat_ms = job_title(view.job, sandbox=view.sandbox), view.run, view.last_heartbeat_ms
    if view.status is RunStatus.NO_LEDGER:
        return f"{job}: no ledger yet ({view.ledger})"
    if run is None or last_heartbeat_ms is None:
        return f"{job} has never run ({view.ledger})"
    if run.ended_ms is not None:
        how = "" if run.exit_code is None else f": exit {run.exit_code} ({exit_label(run.exit_code)})"
        lasted = format_elapsed((run.ended_ms - run.started_ms) / 1000)
        return f"{job}: run {run.id} ended at {iso_time(run.ended_ms)} after {lasted}{how}"
    phase = "" if view.snapshot is None else view.snapshot.doing.value
    while_ = phase and f" while {phase}"
    heartbeat_at = iso_time(last_heartbeat_ms)
    if view.status is RunStatus.KILLED:
        return f"{job}: run {run.id} was killed{while_}; its last heartbeat was at {heartbeat_at}"
    if view.status is RunStatus.NO_HEARTBEAT:
        return f"{job}: run {run.id}, no heartbeat since {heartbeat_at}: suspended or stopped{while_}"
    since = f"since {iso_time(run.started_ms)} ({format_elapsed((view.now_ms - run.started_ms) / 1000)})"
    return f"{job}: run {run.id}, running {since}{f': {phase}' if phase else ''}"


def format_bar(view: RunView, columns: int, *, ascii_only: bool) -> str | None:
    """Draw the progress bar of the run, with `ascii_only` without block characters. None if the total is unknown."""
    from enrich.monitoring.progress_bar import choose_layout, render_bar  # `status` alone draws no bar

    run, snapshot = view.run, view.snapshot
    if run is None or snapshot is None or not snapshot.total:
        return None
    recent, over_s = view.recent_traffic
    progress = Progress(snapshot.total, snapshot.done, snapshot.found, to_credits(run.spent), snapshot.in_flight)
    rate = recent.answered / over_s if over_s else None
    layout = choose_layout(progress, snapshot.elapsed_s, columns)
    return render_bar(progress, snapshot.elapsed_s, layout, columns=columns, rate=rate, ascii_only=ascii_only)


def run_facts(view: RunView) -> Iterator[tuple[str, str]]:
    """Yield the facts about the newest run as (name, text)."""
    run, snapshot = view.run, view.snapshot
    if run is None:
        return
    # After the last heartbeat the counts are out of date. Newer ones would have to be counted in the ledger.
    is_stopped = view.status in (RunStatus.NO_HEARTBEAT, RunStatus.KILLED)
    then = " at the last heartbeat" if snapshot is not None and is_stopped else ""
    yield "results", _answer_counts(run, snapshot) + then
    cap = "" if run.cap is None else f" of at most {to_credits(run.cap):,.2f}"
    unknown = f" and {pluralize(run.unknown, 'result')} of unknown price" if run.unknown else ""
    reserved = f"; {to_credits(run.reserved):,.2f} more reserved" if run.reserved else ""
    yield "credits", f"{to_credits(run.spent):,.2f}{cap} spent{unknown}{reserved}"
    if run.balance_after is not None:
        yield "balance", f"{to_credits(run.balance_after):,.2f} after the run"
    if snapshot is None:
        return
    totals, (recent, over_s) = snapshot.traffic.totals(), view.recent_traffic
    if over_s:
        sent, answered = recent.submitted / over_s, recent.answered / over_s
        yield "speed", f"{sent:,.1f} sent/s, {answered:,.1f} results/s in the last {over_s:.0f} s"
    requests = f"{pluralize(run.submitted, 'request')}, {pluralize(totals.polls, 'poll')}"
    yield "sent", f"{requests}, {totals.rate_limited:,} rate-limited (429)"
    if view.next_expiry_ms is not None:
        at = iso_time(view.next_expiry_ms)
        if view.status is RunStatus.RUNNING:
            yield "running", f"{snapshot.in_flight:,} at Databar; the first result expires at {at}"
        else:
            yield "expires", f"uncollected results, from {at} on"
    if view.status is RunStatus.RUNNING:
        yield "heartbeat", f"{max(0, view.now_ms - snapshot.at_ms) / 1000:.0f} s ago"


def _answer_counts(run: ExecutionRow, snapshot: ProgressSnapshot | None) -> str:
    """Format the number of answers by state. It is unknown for an execution without a snapshot."""
    if snapshot is None:
        return f"unknown; {run.submitted:,} sent"
    states = ", ".join(
        f"{count:,} {STATUS_WORDS.get(state, state)}"
        for state, count in sorted(snapshot.states.items(), key=lambda each: -each[1])
    )
    total = "" if snapshot.total is None else f" of {snapshot.total:,}"
    return f"{snapshot.done:,}{total}{': ' if states else ''}{states}"


def format_view(view: RunView, columns: int, *, ascii_only: bool = False) -> Iterator[str]:
    """Format the view for a terminal with `columns` columns."""
    columns = max(columns, MIN_COLUMNS)
    yield from textwrap.wrap(format_headline(view), columns, subsequent_indent="  ")
    bar_line = format_bar(view, columns, ascii_only=ascii_only)
    if bar_line is not None:
        yield bar_line
    for name, text in run_facts(view):
        yield from textwrap.wrap(f"  {name:<9} {text}", columns, subsequent_indent="    ")


def format_view_line(view: RunView) -> str:
    """Format the view as one line."""
    parts = [f"{iso_time(view.now_ms)} {format_headline(view)}"]
    parts += [f"{name} {fact}" for name, fact in run_facts(view) if name != "heartbeat"]
    if view.remaining_s is not None:
        parts.append(f"{format_elapsed(view.remaining_s)} left")
    return "; ".join(parts)


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

    def read_view(self, opened: Database | None = None) -> RunView:
        """Read the current state, from an open ledger if given. Raises CommandRefused if it cannot be opened."""
        job, now_ms = self.job, SystemClock().now_ms()
        view = RunView(job.name, job.ledger, now_ms, RunStatus.NO_LEDGER, sandbox=job.sandbox)
        if opened is None and not ledger_exists(job.ledger):
            return view
        lock_held = is_locked(job.ledger)  # before reading: a run that ends meanwhile was not killed
        # Close it at once: an open ledger keeps the run from cleaning up at its end.
        with closing(open_existing(job.ledger)) if opened is None else nullcontext(opened) as ledger:
            executions = records.list_executions(ledger, job.name, last=1)
            newest = records.newest_execution_id(ledger)
            oldest_open_ms = queries.oldest_open_submission_ms(ledger)
        if not executions:
            return replace(view, status=RunStatus.NEVER_RUN)
        run = executions[0]
        snapshot = read_snapshot(run.progress)
        heartbeat_age_s = self._heartbeat_age_s(run, now_ms - (run.started_ms if snapshot is None else snapshot.at_ms))
        pauses_heartbeat = snapshot is not None and snapshot.doing.blocks_snapshots
        status = RunStatus.RUNNING
        if run.ended_ms is not None:
            status = RunStatus.ENDED
        elif not lock_held or run.id != newest:
            status = RunStatus.KILLED
        elif heartbeat_age_s > self.heartbeat_timeout_s and not pauses_heartbeat:
            status = RunStatus.NO_HEARTBEAT
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
            ended_before = ended if ended_before is None else ended_before
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
        if flush_error(self.out) is not None:
            raise BrokenPipeError  # which ends watching

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
        if flush_error(self.out) is not None:
            raise BrokenPipeError  # which ends watching

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

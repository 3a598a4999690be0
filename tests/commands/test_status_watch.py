"""`enrich status --watch`: shows a run from another process without affecting it."""

from __future__ import annotations

import io
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.commands.status import read_status
from enrich.commands.status_watch import (
    ENTER_SCREEN,
    LEAVE_SCREEN,
    NO_HEARTBEAT_TEXT,
    WAITING_TEXT,
    LineDisplay,
    RunStatus,
    RunView,
    RunWatcher,
    TerminalDisplay,
    format_headline,
    format_view,
    format_view_line,
    watch_job,
)
from enrich.databar.clock import SystemClock
from enrich.errors import CommandRefused
from enrich.job.job import load_job
from enrich.ledger import records
from enrich.ledger.lock import lock_ledger
from enrich.ledger.records import ExecutionRow
from enrich.models import iso_time
from enrich.monitoring.progress_bar import choose_layout, render_bar
from enrich.run.progress import Phase, Progress, ProgressSnapshot, TrafficCounts, TrafficRecorder
from tests.support.ledger import CommittingLedger
from tests.support.workspace import BOTH_BACKENDS, Workspace

NOW = 1_795_000_000_000
RUN = ExecutionRow(
    id=7,
    job="leads",
    started_ms=NOW - 252_000,
    ended_ms=None,
    exit_code=None,
    cap=100_000_000,
    reserved=30_000_000,
    spent=41_200_000,
    unknown=0,
    submitted=200,
    balance_before=None,
    balance_after=None,
    summary=None,
    progress=None,
)


def make_progress(phase: Phase = Phase.SEND, total: int | None = 500) -> ProgressSnapshot:
    """Make the progress of an execution that sent 12 and received 10 requests a second for twenty seconds."""
    traffic = TrafficRecorder()
    for second in range(20):
        traffic.record(second + 0.5, TrafficCounts(12 * (second + 1), 10 * (second + 1), 20 * (second + 1), 3))
    return ProgressSnapshot(
        at_ms=NOW - 1_000,
        elapsed_s=20.0,
        doing=phase,
        total=total,
        done=200,
        found=140,
        spent=41_000_000,
        in_flight=40,
        states={"found": 140, "not_found": 58, "failed": 2},
        traffic=traffic.traffic(),
    )


def make_view(status: RunStatus = RunStatus.RUNNING, progress: ProgressSnapshot | None = None, **run: Any) -> RunView:
    """Make a view of execution 7."""
    return RunView(
        "leads",
        Path("/jobs/.enrich/leads.db"),
        NOW,
        status,
        replace(RUN, **run),
        progress or make_progress(),
        next_expiry_ms=NOW - 60_000 + 86_400_000,
    )


# What is shown


@pytest.mark.parametrize(("phase", "key"), [*zip(Phase, ["rescue", "enroll", "canary", "ask", "collect"], strict=True)])
def test_phase_in_json(phase: Phase, key: str) -> None:
    """The keys of JSON are those of the documentation, whatever the phases are named."""
    assert make_view(progress=make_progress(phase)).as_json()["doing"] == key


def test_view_contents() -> None:
    """Shows progress, speed, cost, expiry and heartbeat."""
    shown = list(format_view(make_view(), 79))

    assert shown[0] == f"leads: run 7, running since {iso_time(RUN.started_ms)} (4 min 12 s): sending"
    text = "\n".join(shown)
    for message in (
        "200/500",
        "70% match, 41.20 credits, 40 in flight",
        "200 of 500: 140 found, 58 no match, 2 failed",
        "41.20 of at most 100.00 spent; 30.00 more reserved",
        "12.0 sent/s, 10.0 results/s in the last 10 s",
        "200 requests, 400 polls, 3 rate-limited (429)",
        "40 at Databar; the first result expires at",
        "1 s ago",
    ):
        assert message in text
    assert "30 s left" in format_view_line(make_view())
    assert "\n" not in format_view_line(make_view())


def test_unknown_values_are_omitted() -> None:
    """Omits unknown counts of an execution that just began or of an older version; JSON has null."""
    before_first_run = RunView("leads", Path("x.db"), NOW, RunStatus.RUNNING, RUN)
    text = "\n".join(format_view(before_first_run, 79))

    assert "unknown" in text
    assert "%" not in text
    result = before_first_run.as_json()
    assert (
        result["done"] is result["total"] is result["polls"] is result["submitted_per_s"] is result["to_go_s"] is None
    )
    reading = make_view(progress=make_progress(Phase.ENROLL, total=None))
    assert "reading the input" in format_headline(reading)
    assert reading.remaining_s is None


def test_silent_run_shows_last_progress() -> None:
    """Shows the last reported counts of a silent run and keeps watching."""
    silent = make_view(RunStatus.NO_HEARTBEAT)

    assert "200 of 500: 140 found, 58 no match, 2 failed at the last heartbeat" in "\n".join(format_view(silent, 99))
    out = io.StringIO()
    LineDisplay(out, as_json=False).show(silent, waiting=True)
    assert "suspended or stopped while sending" in out.getvalue()
    assert out.getvalue().endswith(f"; {NO_HEARTBEAT_TEXT}\n")


VIEWS = (
    make_view(),
    make_view(RunStatus.NO_HEARTBEAT),
    make_view(RunStatus.KILLED),
    make_view(RunStatus.ENDED, ended_ms=NOW, exit_code=10, balance_after=9_000_000),
    make_view(progress=make_progress(Phase.RESCUE, total=None)),
    RunView("leads", Path("/a/long/way/to/leads.db"), NOW, RunStatus.NO_LEDGER),
    RunView("leads", Path("/a/long/way/to/leads.db"), NOW, RunStatus.NEVER_RUN),
)


@given(st.sampled_from(VIEWS), st.integers(20, 200))
def test_line_width(shown: RunView, columns: int) -> None:
    """Fits the terminal down to twenty columns."""
    assert max(map(len, format_view(shown, columns))) <= columns


@given(
    st.builds(Progress, *[st.integers(1, 10_000_000)] * 3, st.floats(0, 100_000), st.integers(0, 5_000)),
    st.floats(0, 100_000),
)
def test_progress_bar_width(progress: Progress, elapsed_s: float) -> None:
    """Shows the match rate at 80 columns and at least the progress at 40."""
    progress = replace(progress, done=min(progress.done, progress.total or 0))
    for columns in (80, 40):
        chosen = choose_layout(progress, elapsed_s, columns)
        drawn = render_bar(progress, elapsed_s, chosen, columns=columns)
        assert len(drawn) <= columns
        assert f"{progress.done}/{progress.total}" in drawn or columns == 40
    assert "match" in choose_layout(replace(progress, total=500, done=100, found=50), 60.0, 80).postfix


class Terminal(io.StringIO):
    """A terminal that records what is written to it."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        """Return True."""
        return True


def interrupt_after(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Press Ctrl-C after this number of pauses."""
    pauses = iter(range(after))

    def sleep(_: float) -> None:
        if next(pauses, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr("enrich.commands.status_watch.time.sleep", sleep)


def test_views_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never prints more lines than the window has, and redraws when its size changes."""
    sizes = [(80, 24)]
    out = Terminal()
    screen = TerminalDisplay(out, use_color=False, size=lambda: sizes[-1])
    screen.show(make_view(RunStatus.ENDED, ended_ms=NOW), waiting=True)
    first = out.getvalue()
    monkeypatch.setattr("enrich.commands.status_watch.time.sleep", lambda _: sizes.append((30, 4)))
    screen.pause(0.01)

    assert "\x1b[2J" not in out.getvalue()
    assert WAITING_TEXT in first
    second = out.getvalue()[len(first) :].split("\x1b[H")[1]
    shown = re.sub(r"\x1b\[\w", "", second).split("\r\n")
    assert len(shown) == 4
    assert max(map(len, shown)) < 30


@pytest.mark.parametrize(
    ("environ", "draws", "colours"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({}, False, False),
    ],
)
def test_terminal_capabilities(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], *, draws: bool, colours: bool
) -> None:
    """Prints plain lines on a dumb terminal; honors NO_COLOR; Ctrl-C restores the terminal without a message."""
    interrupt_after(monkeypatch, after=0)
    out = Terminal()
    code = watch_job(RunWatcher(load_job(workspace.job_file)), out, environ, 1.0, as_json=False)

    assert code == 130
    assert out.getvalue().startswith(ENTER_SCREEN) == out.getvalue().endswith(LEAVE_SCREEN) == draws
    assert ("\x1b[1m" in out.getvalue()) == colours
    assert ("\x1b" in out.getvalue()) == draws


def test_watching_waits_for_a_server(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that restarts does not end the view, as it does not end the run; without a first view it is refused."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    job = load_job(workspace.write_job(ledger="postgresql://enrich@127.0.0.1/enrich"))
    down = CommandRefused("connection refused")
    ended = make_view(RunStatus.ENDED, ended_ms=NOW, exit_code=0)

    def watch(*reads: RunView | CommandRefused) -> str:
        out = io.StringIO()
        monkeypatch.setattr(RunWatcher, "read_view", Mock(side_effect=reads))
        assert watch_job(RunWatcher(job), out, {}, 1.0, as_json=True) == 0
        return out.getvalue()

    assert watch(make_view(), down, down, ended).count("\n") == 2
    with pytest.raises(CommandRefused):
        watch(down, ended)


# Runs without a heartbeat


def ledger_with_progress(workspace: Workspace, progress: ProgressSnapshot) -> CommittingLedger:
    """Open a ledger with an execution that has this progress."""
    ledger = CommittingLedger.open(load_job(workspace.job_file).ledger)
    ledger.now = NOW
    ledger.start_execution()
    ledger.commit(records.save_progress, ledger.execution, progress.as_text())
    return ledger


@BOTH_BACKENDS
def test_clock_change_does_not_end_run(workspace: Workspace) -> None:
    """A heartbeat with a wrong time keeps a run alive for the timeout after each change."""
    now = 0.0
    result = make_progress()
    ledger = ledger_with_progress(workspace, result)
    watcher = RunWatcher(load_job(workspace.job_file), heartbeat_timeout_s=15.0, clock=lambda: now)
    with lock_ledger(workspace.ledger_location, 0):
        assert watcher.read_view().status is RunStatus.NO_HEARTBEAT

        now = 2.0
        ledger.commit(records.save_progress, ledger.execution, replace(result, at_ms=1).as_text())
        assert watcher.read_view().status is RunStatus.RUNNING
        now = 17.0
        assert watcher.read_view().status is RunStatus.RUNNING
        now = 17.1
        assert watcher.read_view().status is RunStatus.NO_HEARTBEAT
    ledger.commit(records.end_execution, ledger.execution, 0, {}, NOW)
    assert watcher.read_view().status is RunStatus.ENDED
    ledger.wrapped.close()


@BOTH_BACKENDS
def test_free_lock_shows_killed_run_at_once(workspace: Workspace) -> None:
    """A run without an end was killed when the lock is free or a newer run holds it, however fresh its heartbeat."""
    ledger = ledger_with_progress(workspace, make_progress())
    fresh = replace(make_progress(), at_ms=SystemClock().now_ms())
    ledger.commit(records.save_progress, ledger.execution, fresh.as_text())
    watcher = RunWatcher(load_job(workspace.job_file))
    with lock_ledger(workspace.ledger_location, 0):
        assert watcher.read_view().status is RunStatus.RUNNING
    killed = watcher.read_view()
    assert killed.status is RunStatus.KILLED
    assert f"run 1 was killed while sending; its last heartbeat was at {iso_time(fresh.at_ms)}" in format_headline(
        killed
    )
    assert read_status(watcher.job)["at_work"] is None

    with lock_ledger(workspace.ledger_location, 0):
        ledger.commit(records.start_execution, "other", None, NOW)
        assert watcher.read_view().status is RunStatus.KILLED
    ledger.wrapped.close()


@BOTH_BACKENDS
def test_lock_keeps_silent_run_alive(workspace: Workspace) -> None:
    """A silent run that cannot store a heartbeat counts as running while it holds its ledger's lock."""
    ledger = ledger_with_progress(workspace, make_progress(Phase.ENROLL, total=None))
    watcher = RunWatcher(load_job(workspace.job_file), heartbeat_timeout_s=1.0)
    with lock_ledger(workspace.ledger_location, 0):
        assert watcher.read_view().status is RunStatus.RUNNING
    assert watcher.read_view().status is RunStatus.KILLED
    ledger.wrapped.close()


def test_watch_takes_no_lock(workspace: Workspace) -> None:
    """Takes no lock: a run can start at any moment, and its files can be cleaned up."""
    job = load_job(workspace.job_file)
    watcher = RunWatcher(job)
    assert watcher.read_view().status is RunStatus.NO_LEDGER
    assert not workspace.ledger_path.parent.exists()
    ledger = ledger_with_progress(workspace, make_progress())
    watcher.read_view()

    assert not list(workspace.ledger_path.parent.glob("*.lock"))
    with closing(sqlite3.connect(workspace.ledger_path)) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    ledger.wrapped.close()

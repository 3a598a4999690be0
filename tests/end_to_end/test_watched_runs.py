"""Real runs that are watched from another process, killed, suspended and logged, without an effect on the run."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import struct
import termios
import threading
from pathlib import Path
from typing import Any

import pytest

from enrich.commands.status import read_status
from enrich.commands.status_watch import (
    ENTER_SCREEN,
    LEAVE_SCREEN,
    WAITING_TEXT,
    RunStatus,
    RunWatcher,
    format_headline,
    watch_job,
)
from enrich.job.job import load_job
from enrich.monitoring import log_file
from tests.support.request_recorder import log_lines
from tests.support.workspace import (
    Workspace,
    kill_process,
    make_leads,
    read_terminal,
    serve_api,
    wait_until,
)

pytestmark = pytest.mark.long


def json_lines(text: str) -> list[dict[str, Any]]:
    """Parse one object a line."""
    return [json.loads(row) for row in text.splitlines()]


def test_watching_does_not_affect_run(tmp_path: Path, workspace: Workspace) -> None:
    """Two watchers from start to end: same summary, clean audit, and the same numbers."""
    workspace.write_leads(make_leads(8))
    other = Workspace(tmp_path / "other")
    other.folder.mkdir()
    other.write_job()
    other.write_leads(make_leads(8))
    with serve_api(tmp_path / "other.db") as api:
        unwatched = other.run_in_process("run", "job.yaml", "--json", api=api).json_output
    watchers = [
        workspace.start_subprocess("status", "job.yaml", "--watch", "--every", "1s", *more)
        for more in ((), ("--json",))
    ]
    first = [watcher.stdout.readline() for watcher in watchers if watcher.stdout is not None]
    with serve_api(tmp_path / "api.db", latency="fixed(1)") as api:
        summary = workspace.run_subprocess("run", "job.yaml", "--json", api=api).json_output
        audit = api.audit()
    result = [watcher.communicate(timeout=90) for watcher in watchers]

    assert ("no ledger yet" in first[0], json.loads(first[1])["sign"]) == (True, "no ledger")
    assert [watcher.returncode for watcher in watchers] == [0, 0]
    assert [err for _, err in result] == ["", ""]
    excluded_keys = {"polls", "elapsed_s", "output", "rate_limited"}
    assert {k: v for k, v in summary.items() if k not in excluded_keys} == {
        k: v for k, v in unwatched.items() if k not in excluded_keys
    }
    assert (audit["accepted"], audit["paid_twice"]) == (8, 0)
    last = json_lines(result[1][0])[-1]
    assert (last["sign"], last["exit_code"], last["outcome"]) == ("ended", 0, "ok")
    assert (last["done"], last["total"], last["submitted"]) == (8, 8, 8)
    assert last["credits_spent"] == summary["credits_spent"] == pytest.approx(audit["credits_charged"])
    assert (last["polls"], last["states"].get("found")) == (summary["polls"], summary["found"])
    assert "exit 0 (ok)" in result[0][0].splitlines()[-1]
    assert read_status(load_job(workspace.job_file))["at_work"] is None


def test_stopped_and_killed_runs_are_detected(tmp_path: Path, workspace: Workspace) -> None:
    """A suspended run can resume; a killed one is detected, and the next run is watched to its end."""
    workspace.write_leads(make_leads(3))
    watcher = RunWatcher(load_job(workspace.job_file), heartbeat_timeout_s=3.0)
    with serve_api(tmp_path / "api.db", latency="fixed(600)") as api:
        run = workspace.start_subprocess("run", "job.yaml", api=api)
        wait_until(lambda: (watcher.read_view().as_json().get("in_flight") or 0) == 3)
        status = workspace.run_in_process("status", "job.yaml", "--json").json_output
        assert (status["at_work"]["execution"], status["at_work"]["total"], status["at_work"]["done"]) == (1, 3, 0)
        assert "running since" in workspace.run_in_process("status", "job.yaml").stdout
        run.send_signal(signal.SIGSTOP)
        wait_until(lambda: watcher.read_view().status is RunStatus.NO_HEARTBEAT)
        run.send_signal(signal.SIGCONT)
        wait_until(lambda: watcher.read_view().status is RunStatus.RUNNING)
        kill_process(run)
        assert watcher.read_view().status is RunStatus.KILLED
        assert "was killed while sending" in format_headline(watcher.read_view())
        assert workspace.run_in_process("status", "job.yaml", "--json").json_output["at_work"] is None
        (listed,) = workspace.run_in_process("runs", "job.yaml", "--json").json_output["executions"]
        assert listed["outcome"] == "killed"

        result = io.StringIO()
        watching = threading.Thread(target=watch_job, args=(watcher, result, {}, 0.05), kwargs={"as_json": True})
        watching.start()
        wait_until(lambda: "killed" in result.getvalue())
        api.advance(601)
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
        watching.join(timeout=90)

    assert json_lines(result.getvalue())[0]["sign"] == "killed"
    assert (json_lines(result.getvalue())[-1]["execution"], json_lines(result.getvalue())[-1]["exit_code"]) == (2, 0)


def test_interrupt_restores_terminal(workspace: Workspace) -> None:
    """On a real terminal of 40 columns: exit 130, no message, screen and cursor restored."""
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 40, 0, 0))
    process = workspace.start_subprocess("status", "job.yaml", "--watch", terminal=terminal, TERM="xterm")
    os.close(terminal)
    shown = read_terminal(controller, up_to=WAITING_TEXT.encode()[:30])
    process.send_signal(signal.SIGINT)
    shown += read_terminal(controller)
    assert process.wait(timeout=90) == 130
    os.close(controller)

    text = shown.decode()
    assert text.startswith(ENTER_SCREEN)
    assert text.endswith(LEAVE_SCREEN)
    assert "error" not in text
    # A signal in the middle of a write makes Python write its buffer once more.
    drawn = text.replace(ENTER_SCREEN, "").replace(LEAVE_SCREEN, "").split("\x1b[H")[1]
    # The terminal adds a carriage return.
    assert max(len(re.sub(r"\x1b\[[\d;]*\w|\r", "", row)) for row in drawn.split("\n")) < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--every", "2s"), "--watch"),
        (("--watch", "--every", "0s"), "at least 1s"),
        (("--watch", "--every", "200000d"), "too long: at most 100000d"),
    ],
)
def test_invalid_interval_is_exit_2(workspace: Workspace, options: tuple[str, ...], message: str) -> None:
    """Exits with 2."""
    result = workspace.run_in_process("status", "job.yaml", *options)

    assert (result.exit_code, message in result.stderr) == (2, True)


# One progress event a minute


@pytest.mark.parametrize("way", ["canary", "outage", "left"])
def test_progress_events_in_every_phase(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Logs progress also under --quiet: in the canary, in an outage, while collecting earlier tasks."""
    monkeypatch.setattr(log_file, "PROGRESS_INTERVAL_S", 0.4)
    workspace.write_leads(make_leads(6))
    options = ["run", "job.yaml", "--quiet", "--log-file", "run.log"]
    if way == "canary":
        workspace.write_job(canary="{rows: 5, min_hit_rate: 0.01}")
    with serve_api(tmp_path / "api.db", latency="fixed(600)" if way == "left" else "fixed(1)") as api:
        if way == "left":
            workspace.submit_without_collecting(api)
            api.advance(601)
            api.inject_fault("slow", 6, "get", seconds=1)
        if way == "outage":
            api.inject_fault("error-before", 6, "get")
        result = workspace.run_in_process(*options, api=api)

    progress_lines = [row for row in log_lines(workspace) if row["event"] == "progress"]
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert progress_lines
    assert {"done", "found", "in_flight", "credits", "polls", "rate_limited"} < progress_lines[-1].keys()
    assert progress_lines[0]["execution"] == (2 if way == "left" else 1)
    assert sum(row["submitted_per_minute"] for row in progress_lines) > 0 or way == "left"

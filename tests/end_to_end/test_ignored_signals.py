"""Signals that were ignored when the program started (`nohup`, a shell's `&`) stay ignored to its end."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.workspace import (
    SandboxApi,
    Workspace,
    make_leads,
    read_terminal,
    serve_api,
    wait_until,
)

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.long
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_ignored_signal_does_not_stop_run(tmp_path: Path, workspace: Workspace, number: signal.Signals) -> None:
    """Ignores the signal at the start, while tasks are open, and until the output is written; others still work."""
    workspace.write_leads(make_leads(20))
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        api.inject_fault("slow", 1, "me", seconds=1)
        process = workspace.start_subprocess("run", "job.yaml", "--json", api=api, ignoring=[number])
        wait_until(lambda: api.audit()["requests"].get("me", 0) == 1)
        process.send_signal(number)
        wait_until(lambda: api.audit()["accepted"] == 20)
        process.send_signal(number)
        process.send_signal(number)
        api.advance(100)
        out, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (0, "")
    assert '"pending": 0' in out


@pytest.mark.long
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_other_signals_stop_run(tmp_path: Path, workspace: Workspace, number: signal.Signals) -> None:
    """Only the ignored signal is ignored."""
    workspace.write_leads(make_leads(5))
    others = [other for other in NUMBERS if other != number]
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        process = workspace.start_subprocess("run", "job.yaml", "--json", api=api, ignoring=others)
        wait_until(lambda: api.audit()["accepted"] == 5)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143)


@pytest.mark.long
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_ignored_signal_while_reading_stdin(api: SandboxApi, workspace: Workspace, number: signal.Signals) -> None:
    """Keeps the signal's disposition while it reads a slow pipe."""
    workspace.write_leads(make_leads(3))
    arguments = ("run", "job.yaml", "--input", "-")
    process = workspace.start_subprocess(
        *arguments, api=api, ignoring=[number], stdin=subprocess.PIPE, TMPDIR=str(workspace.folder)
    )
    leads = (workspace.folder / "leads.csv").read_text(encoding="utf-8")
    assert process.stdin is not None
    process.stdin.write(leads[:20])
    process.stdin.flush()
    wait_until(lambda: any(workspace.folder.glob("enrich-*")))
    process.send_signal(number)
    process.send_signal(number)
    _, err = process.communicate(leads[20:], timeout=60)
    assert (process.returncode, err) == (0, "")
    assert len(workspace.read_output()) == 3


@pytest.mark.long
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_ignored_signal_during_prompt(api: SandboxApi, workspace: Workspace, number: signal.Signals) -> None:
    """Keeps the signal ignored during a prompt on a terminal."""
    workspace.write_leads(make_leads(3))
    controller, terminal = os.openpty()
    process = workspace.start_subprocess("run", "job.yaml", api=api, ignoring=[number], terminal=terminal, TERM="dumb")
    os.close(terminal)
    read_terminal(controller, up_to=b"[y/N]")
    process.send_signal(number)
    os.write(controller, b"y\n")
    read_terminal(controller)
    os.close(controller)
    assert process.wait(60) == 0


@pytest.mark.long
def test_ignored_signal_does_not_stop_sandbox(workspace: Workspace) -> None:
    """`enrich sandbox &` in a script is not ended by the script's Ctrl-C."""
    process = workspace.start_subprocess("sandbox", ignoring=[signal.SIGINT, signal.SIGHUP])
    assert process.stdout is not None
    environ = dict(process.stdout.readline().strip().split("=", 1) for _ in range(2))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGHUP)
    assert SandboxApi(environ["DATABAR_BASE_URL"], environ["DATABAR_API_KEY"]).audit()["accepted"] == 0
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert process.returncode == 0

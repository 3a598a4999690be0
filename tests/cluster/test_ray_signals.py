"""Whoever ends a run that starts Ray, or ends it, is heard at whatever moment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.postgres import PostgresServer
from tests.support.workspace import SandboxApi, Workspace, make_leads, reset_signals, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with the extra `cluster`"),
]

ON_RAY = ("run", "job.yaml", "--engine", "ray", "--workers", "1")


@pytest.fixture
def workspace(tmp_path: Path, postgres: PostgresServer) -> Workspace:
    """Make an office whose ledger is on the server."""
    made = Workspace(tmp_path, postgres.ledger_url(), postgres.environ)
    made.write_job()
    made.write_leads(make_leads(300))
    return made


@pytest.fixture
def unresponsive_address() -> Iterator[str]:
    """Listen as a server does that is busy, or is none of Ray's; return its address."""
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("heard", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("after_s", [0.0, 1.0])
def test_signal_during_ray_start(
    api: SandboxApi, workspace: Workspace, heard: tuple[signal.Signals, int], after_s: float
) -> None:
    """Ray has handlers of its own, and swallows what is raised in the middle of it; the exit code is ours."""
    number, code = heard
    api.inject_fault("slow", 1000, "post", seconds=1)
    run = workspace.start_subprocess(*ON_RAY, api=api)
    wait_until(lambda: has_children(run.pid), timeout_s=40)  # Ray begins with a process of its own
    time.sleep(after_s)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)

    assert run.returncode == code, err
    assert out == ""
    assert "Traceback" not in err


SHUTDOWN_SCRIPT = """
import os, signal
from enrich.cluster.connection import connected

signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"heard "))
with connected(None):
    os.write(1, b"leaving ")
os.write(1, b"left ")
os.kill(os.getpid(), signal.SIGTERM)
os._exit(0)
"""


def test_signal_during_ray_shutdown() -> None:
    """It hears no signal meanwhile, and has its own handlers afterwards: Ray would let SIGTERM kill it."""
    leaving = subprocess.Popen(
        [sys.executable, "-c", SHUTDOWN_SCRIPT], stdout=subprocess.PIPE, preexec_fn=reset_signals
    )
    assert leaving.stdout is not None
    message = os.read(leaving.stdout.fileno(), 100)
    for _ in range(10):
        leaving.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    message += leaving.communicate(timeout=60)[0]

    assert leaving.returncode == 0
    before, _, after = message.partition(b"left")
    assert before.count(b"heard") <= 1  # in the moment before it leaves
    assert b"heard" in after


def test_non_ray_address_fails_fast(api: SandboxApi, workspace: Workspace, unresponsive_address: str) -> None:
    """Ray would wait for minutes, and hear nobody meanwhile."""
    result = workspace.run_subprocess(*ON_RAY, "--address", unresponsive_address, api=api)

    assert result.exit_code == 4
    assert f"the Ray cluster at {unresponsive_address} can't be reached: it does not answer" in result.stderr
    assert "hint: does it run there" in result.stderr


def test_second_signal_stops_waiting_for_ray(api: SandboxApi, workspace: Workspace, unresponsive_address: str) -> None:
    """Ray's own calls can't be interrupted."""
    run = workspace.start_subprocess(*ON_RAY, "--address", unresponsive_address, "--json", api=api)
    wait_until(lambda: "_raylet" in Path(f"/proc/{run.pid}/maps").read_text(encoding="utf-8"))
    begun = time.monotonic()
    while run.poll() is None:
        run.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    out, _ = run.communicate()

    assert time.monotonic() - begun < 10
    assert (run.returncode, json.loads(out)["exit_code"]) == (143, 143)


def has_children(pid: int) -> bool:
    """Tell whether a process has started others, in whichever thread."""
    return any(path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/task").glob("*/children"))

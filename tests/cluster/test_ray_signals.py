"""A signal takes effect at any time while a run starts or stops Ray."""

from __future__ import annotations

import json
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
from tests.support.program import reset_signals
from tests.support.ray_head import RayHead
from tests.support.workspace import SandboxApi, Workspace, make_leads, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with the extra `cluster`"),
]

ON_RAY = ("run", "job.yaml", "--engine", "ray", "--workers", "1")


@pytest.fixture
def workspace(tmp_path: Path, postgres: PostgresServer) -> Workspace:
    """Return a workspace whose ledger is on the server."""
    made = Workspace(tmp_path, postgres.ledger_url(), postgres.environ)
    made.write_job()
    made.write_leads(make_leads(300))
    return made


@pytest.fixture
def unresponsive_address() -> Iterator[str]:
    """Listen without answering, like a busy server or one that is not Ray; return the address."""
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(("number", "after_s"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 1.0)])
def test_signal_during_ray_start(api: SandboxApi, workspace: Workspace, number: signal.Signals, after_s: float) -> None:
    """A signal during Ray's start gives our exit code, though Ray has its own handlers and swallows exceptions."""
    api.inject_fault("slow", 1000, "post", seconds=1)
    run = workspace.start_subprocess(*ON_RAY, api=api)
    wait_until(lambda: has_children(run.pid), timeout_s=40)  # Ray starts another process first
    time.sleep(after_s)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)

    assert run.returncode == 128 + number, err
    assert out == ""
    assert "Traceback" not in err


SHUTDOWN_SCRIPT = """
import os, signal
from enrich.cluster.connection import connect_ray

signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"heard "))
with connect_ray(None):
    import ray

    ray_shutdown = ray.shutdown

    def shutdown_after_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        ray_shutdown()

    ray.shutdown = shutdown_after_signal
    os.write(1, b"leaving ")
os.write(1, b"left ")
os.kill(os.getpid(), signal.SIGTERM)
os._exit(0)
"""


def test_signal_during_ray_shutdown() -> None:
    """A signal during Ray's shutdown is ignored, and afterwards the handlers from before Ray's start apply again."""
    result = subprocess.run(
        [sys.executable, "-c", SHUTDOWN_SCRIPT], check=False, capture_output=True, timeout=100, preexec_fn=reset_signals
    )

    assert result.returncode == 0
    assert result.stdout == b"leaving left heard "


SHARED_SCRIPT = """
import os, sys
from enrich.cluster.connection import connect_ray
from enrich.errors import ClusterFailed

address = sys.argv[1]

def refused():
    try:
        with connect_ray(address):
            return False
    except ClusterFailed as error:
        return "uses Ray already" in error.message

with connect_ray(address):  # and print shows nothing
    import ray
    os.write(1, f"{refused()} {ray.is_initialized()} ".encode())
ray.init(address, log_to_driver=False)
print(refused(), ray.is_initialized())
ray.shutdown()
"""


def test_ray_of_the_process_is_left_alone(ray_head: RayHead) -> None:
    """A second run in a process that uses Ray is refused, and does not end the Ray of the first or of the program."""
    command = [sys.executable, "-c", SHARED_SCRIPT, ray_head.address]
    result = subprocess.run(command, check=False, capture_output=True, timeout=100)

    assert result.stdout.split() == [b"True"] * 4


IMPATIENT_SCRIPT = """
import os
from enrich.cli import main
from enrich.cluster import connection

connection.CONNECT_TIMEOUT_S = 2.0
os._exit(main())
"""


def test_non_ray_address_fails_fast(api: SandboxApi, workspace: Workspace, unresponsive_address: str) -> None:
    """An address without Ray fails fast; Ray itself would wait for minutes and block signals."""
    result = subprocess.run(
        [sys.executable, "-c", IMPATIENT_SCRIPT, *ON_RAY, "--address", unresponsive_address],
        cwd=workspace.folder,
        env=workspace.environment(api),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert result.returncode == 4
    assert f"the Ray cluster at {unresponsive_address} can't be reached: it does not respond" in result.stderr
    assert "hint: check that it runs there" in result.stderr


def test_second_signal_stops_waiting_for_ray(api: SandboxApi, workspace: Workspace, unresponsive_address: str) -> None:
    """A second signal ends the wait for Ray, whose own calls can't be interrupted."""
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
    """Return whether any thread of a process has started child processes."""
    return any(path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/task").glob("*/children"))

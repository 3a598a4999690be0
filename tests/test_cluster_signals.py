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

from tests.harness import Api, Office, people, until, usual_signals
from tests.postgres import Postgres

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with the extra `cluster`"),
]

ON_RAY = ("run", "job.yaml", "--engine", "ray", "--workers", "1")


@pytest.fixture
def office(tmp_path: Path, postgres: Postgres) -> Office:
    """Make an office whose ledger is on the server."""
    made = Office(tmp_path, postgres.url(), postgres.environ)
    made.write_job()
    made.write_leads(people(300))
    return made


@pytest.fixture
def mute() -> Iterator[str]:
    """Listen as a server does that is busy, or is none of Ray's; return its address."""
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("heard", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("after_s", [0.0, 1.0])
def test_a_signal_is_heard_while_ray_starts(
    api: Api, office: Office, heard: tuple[signal.Signals, int], after_s: float
) -> None:
    """Ray has handlers of its own, and swallows what is raised in the middle of it; the exit code is ours."""
    number, code = heard
    api.fault("slow", 1000, "post", seconds=1)
    run = office.start(*ON_RAY, api=api)
    until(lambda: has_children(run.pid), at_most=40)  # Ray begins with a process of its own
    time.sleep(after_s)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)

    assert run.returncode == code, err
    assert out == ""
    assert "Traceback" not in err


LEAVING = """
import os, signal
from enrich.cluster.connection import connected

signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"heard "))
with connected(None):
    os.write(1, b"leaving ")
os.write(1, b"left ")
os.kill(os.getpid(), signal.SIGTERM)
os._exit(0)
"""


def test_who_leaves_ray_does_what_is_left_to_do() -> None:
    """It hears no signal meanwhile, and has its own handlers afterwards: Ray would let SIGTERM kill it."""
    leaving = subprocess.Popen([sys.executable, "-c", LEAVING], stdout=subprocess.PIPE, preexec_fn=usual_signals)
    assert leaving.stdout is not None
    said = os.read(leaving.stdout.fileno(), 100)
    for _ in range(10):
        leaving.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    said += leaving.communicate(timeout=60)[0]

    assert leaving.returncode == 0
    before, _, after = said.partition(b"left")
    assert before.count(b"heard") <= 1  # in the moment before it leaves
    assert b"heard" in after


def test_who_is_not_ray_is_not_waited_for(api: Api, office: Office, mute: str) -> None:
    """Ray would wait for minutes, and hear nobody meanwhile."""
    done = office.enrich(*ON_RAY, "--address", mute, api=api)

    assert done.code == 4
    assert f"the Ray cluster at {mute} can't be reached: it does not answer" in done.stderr
    assert "hint: does it run there" in done.stderr


def test_a_second_signal_ends_the_wait_for_ray(api: Api, office: Office, mute: str) -> None:
    """Ray's own calls can't be interrupted."""
    run = office.start(*ON_RAY, "--address", mute, "--json", api=api)
    until(lambda: "_raylet" in Path(f"/proc/{run.pid}/maps").read_text(encoding="utf-8"))
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

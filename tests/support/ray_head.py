"""Starts a Ray cluster of one machine, which runs of the tests connect to instead of starting one each."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.workspace import wait_until


@dataclass(frozen=True)
class RayHead:
    """A cluster of one machine with two CPUs: its address, the process id of its head, and the folder of its files."""

    address: str
    pid: int
    folder: Path


def is_listening(port: int) -> bool:
    """Return whether a server listens on this port."""
    with closing(socket.socket()) as probe:
        return not probe.connect_ex(("127.0.0.1", port))


@contextmanager
def start_ray_head(environ: Mapping[str, str]) -> Iterator[RayHead]:
    """Start a cluster whose processes have these variables."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Ray's sockets lie in this folder: a name in pytest's would be too long for them.
    folder = Path(tempfile.mkdtemp(prefix="enrich-ray-"))
    words = ["start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2"]
    # Without the parts that nothing here uses, as they cost processor time.
    more = ["--include-dashboard=false", "--include-log-monitor=false", "--disable-usage-stats"]
    head = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), *words, *more, f"--object-store-memory={100 << 20}"],
        cwd=folder,
        env={
            "PATH": os.defpath,
            "HOME": str(folder),
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_niceness": "0",
            # No processes that wait for work: each takes a second of processor time to start.
            "RAY_prestart_worker_first_driver": "0",
            **environ,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        wait_until(lambda: is_listening(port), 60)
        yield RayHead(f"127.0.0.1:{port}", head.pid, folder)
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)

"""Starts Ray on this machine, or connects to a cluster, for as long as a run needs it: quietly, and deaf to signals.

Ray reads its settings when it is imported, so nothing here does that before they are made.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path

from enrich.errors import ClusterFailed, EnrichError, Exit, Interrupted
from enrich.signals import CODES

#: Ray's own settings, where the person has none. It would start itself again in a thread that outlives its end.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_ENABLE_AUTO_CONNECT": "0"}
#: So many seconds a cluster that does not answer is asked again.
PATIENCE_S = 10
#: What our signals are to a run, they are not to the Ray that it starts: SIGTERM is what Ray itself ends with.
DEAF_TO = (signal.SIGINT, signal.SIGHUP)


@contextmanager
def connected(address: str | None) -> Iterator[int]:
    """Be connected to the cluster at an address, or to one of this machine alone; tell how many CPUs it has.

    Nothing that Ray says comes to stdout or stderr. Raises ClusterFailed when it can't be reached or started.
    """
    with ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        # Ray prints there what becomes of its workers; the crew tells it in its own words.
        stack.enter_context(redirect_stdout(nowhere))
        try:
            folder = _connect(address, nowhere.fileno())
        except EnrichError:
            _disconnect(None)
            raise
        except SystemExit as error:  # what Ray makes of a SIGTERM while it starts
            _disconnect(None)
            raise Interrupted(Exit.TERMINATED) from error
        except Exception as error:  # whatever Ray raises, the run has not begun
            raise _failed(address, error) from error
        stack.callback(_disconnect, folder if address is None else None)
        import ray  # noqa: PLC0415 - as below

        yield max(1, int(ray.cluster_resources().get("CPU", 1)))


def _connect(address: str | None, nowhere: int) -> Path:
    """Start Ray or connect to it; tell where the files of its session are."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if address is not None:
        _knock(address)
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(PATIENCE_S))
        if _has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    logger = logging.getLogger("ray")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    with _aside(nowhere):
        import ray.data  # noqa: PLC0415 - it reads its settings when it is imported

        context = ray.init(
            address or "local",  # else RAY_ADDRESS would have a say
            log_to_driver=False,
            configure_logging=False,
            **({} if address else {"include_dashboard": False}),
        )
    return Path(context.address_info["session_dir"])


def _disconnect(folder: Path | None) -> None:
    """Leave the cluster; one that was started for us ends, and the folder of its session goes with it."""
    import ray  # noqa: PLC0415 - as above

    ray.shutdown()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _aside(nowhere: int) -> Iterator[None]:
    """Start processes that do not hear our signals, write files of our own (0600), and say nothing on stderr."""
    sys.stderr.flush()
    stderr, umask = os.dup(2), os.umask(0o077)
    heard: list[int] = []
    # Raised in the middle of Ray, an interruption may get lost there.
    handlers = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in CODES}
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.umask(umask)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if heard:
        raise Interrupted(CODES[signal.Signals(heard[0])])


def _knock(address: str) -> None:
    """Raise OSError when nobody is there: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S):
        pass


def _has_token() -> bool:
    """Tell whether a token for Ray's authentication lies where Ray looks for one."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    with suppress(OSError, RuntimeError):  # nobody knows a home
        return (Path.home() / ".ray" / "auth_token").is_file()
    return False


def _failed(address: str | None, error: Exception) -> ClusterFailed:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if address is None:
        return ClusterFailed(f"Ray can't be started on this machine: {said}", "look into /tmp/ray/session_latest/logs")
    return ClusterFailed(
        f"the Ray cluster at {address} can't be reached: {said}",
        "does it run there, with the same versions of Ray and Python, and is its token in ~/.ray/auth_token?",
    )

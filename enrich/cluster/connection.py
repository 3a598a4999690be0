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
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from math import inf
from pathlib import Path
from typing import Any

from enrich.errors import ClusterFailed, ExitCode, Interrupted
from enrich.run.signals import EXIT_CODE_BY_SIGNAL, handled_signals

#: Ray's own settings, where the person has none. It would start itself again in a thread that outlives its end.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
#: So many seconds a cluster that does not answer is asked again.
PORT_TIMEOUT_S = 10
#: Somebody who answers, but not as Ray does, is waited for so long; Ray itself would wait for minutes.
CONNECT_TIMEOUT_S = 20.0
#: Who is silent is given up by the crew and by the watch over the blocks, not by Ray.
NO_TIMEOUT_S = 10**8
#: So long the end of a connection may take; what was done is in the ledger by then.
DISCONNECT_TIMEOUT_S = 10.0
#: Ray sets handlers of its own in the middle of its calls: so often ours are set again, in seconds.
SIGNAL_CHECK_S = 0.02
#: What our signals are to a run, they are not to the Ray that it starts: SIGTERM is what Ray itself ends with.
BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGHUP)


@contextmanager
def connect_ray(address: str | None) -> Iterator[int]:
    """Be connected to the cluster at an address, or to one of this machine alone; tell how many CPUs it has.

    Nothing that Ray says comes to stdout or stderr. A signal is heard when Ray has begun, and is nothing to its end:
    what was done by then is still to be told. Raises ClusterFailed when it can't be reached or started.
    """
    with ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        # Ray prints there what becomes of its workers; the crew tells it in its own words.
        stack.enter_context(redirect_stdout(nowhere))
        # Only the main thread hears signals. The processes that Ray starts end with the thread that started them.
        thread = ThreadPoolExecutor(1, "ray", signal.pthread_sigmask, (signal.SIG_BLOCK, BLOCKED_SIGNALS))
        stack.callback(thread.shutdown, wait=False)
        with _silenced(nowhere.fileno()):
            connecting = thread.submit(_connect, address)
            heard = _wait(connecting, CONNECT_TIMEOUT_S if address else inf, signals=2)
        if connecting.done():
            stack.callback(lambda: _wait(thread.submit(_disconnect, connecting), DISCONNECT_TIMEOUT_S))
        if heard:
            raise Interrupted(heard[0])
        try:
            cpus, _ = connecting.result(timeout=0)
        except Exception as error:  # whatever Ray raises, the run has not begun
            raise _connection_error(address, error) from error
        yield cpus


def _connect(address: str | None) -> tuple[int, Path | None]:
    """Start Ray or connect to it; tell how many CPUs it has, and where the files are of one that was started for us."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is not None:
        _check_port(address)
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(PORT_TIMEOUT_S))
        # A minute after the head was lost Ray would end this process from within, without a receipt; and it says much.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(NO_TIMEOUT_S))
        if _has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    logger = logging.getLogger("ray")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    import ray.data  # noqa: PLC0415 - it reads its settings when it is imported

    context = ray.init(
        address or "local",  # else RAY_ADDRESS would have a say
        log_to_driver=False,
        configure_logging=False,
        **({} if address else {"include_dashboard": False}),
    )
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    return cpus, None if address else Path(context.address_info["session_dir"])


def _disconnect(connecting: Future[tuple[int, Path | None]]) -> None:
    """Leave the cluster; one that was started for us ends, and the folder of its session goes with it."""
    import ray  # noqa: PLC0415 - as above

    ray.shutdown()
    _, folder = connecting.result()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(call: Future[Any], at_most_s: float, signals: float = inf) -> list[ExitCode]:
    """Wait for the end of a call into Ray, or until so many signals came; tell which came."""
    heard: list[ExitCode] = []
    latest = time.monotonic() + at_most_s
    handlers = {number: signal.getsignal(number) for number in EXIT_CODE_BY_SIGNAL}
    listening = handled_signals()
    try:
        while not call.done() and len(heard) < signals and time.monotonic() < latest:
            for number in EXIT_CODE_BY_SIGNAL:
                if number in listening:
                    signal.signal(number, lambda number, _: heard.append(EXIT_CODE_BY_SIGNAL[signal.Signals(number)]))
                else:
                    signal.signal(number, signal.SIG_IGN)
            wait([call], SIGNAL_CHECK_S)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return heard


@contextmanager
def _silenced(nowhere: int) -> Iterator[None]:
    """Start processes that write files of our own (0600), and say nothing on stderr."""
    sys.stderr.flush()
    stderr, umask = os.dup(2), os.umask(0o077)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.umask(umask)


def _check_port(address: str) -> None:
    """Raise OSError when nobody is there: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), PORT_TIMEOUT_S):
        pass


def _has_token() -> bool:
    """Tell whether a token for Ray's authentication lies where Ray looks for one."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    with suppress(OSError, RuntimeError):  # nobody knows a home
        return (Path.home() / ".ray" / "auth_token").is_file()
    return False


def _connection_error(address: str | None, error: Exception) -> ClusterFailed:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    said = said or ("it does not answer" if isinstance(error, TimeoutError) else type(error).__name__)
    if address is None:
        return ClusterFailed(f"Ray can't be started on this machine: {said}", "look into /tmp/ray/session_latest/logs")
    return ClusterFailed(
        f"the Ray cluster at {address} can't be reached: {said}",
        "does it run there, with the same versions of Ray and Python, and is its token in ~/.ray/auth_token?",
    )

"""Starts Ray on this machine or connects to a cluster for one run, without Ray's output and signal handlers.

Ray reads its settings when it is imported, so this module sets them first and imports Ray later.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from math import inf
from pathlib import Path
from typing import Any

from enrich.errors import ClusterFailed, Interrupted
from enrich.exit_codes import ExitCode
from enrich.run.signals import EXIT_CODE_BY_SIGNAL, handled_signals

#: How long to retry a cluster's port, in seconds.
PORT_TIMEOUT_S = 10
#: How long to wait for a port that answers, but not like Ray, in seconds. Ray itself would wait for minutes.
CONNECT_TIMEOUT_S = 20.0
#: A timeout that never expires, in seconds: the worker pool and the heartbeat monitor detect silent machines, not Ray.
NO_TIMEOUT_S = 10**8
#: Ray's settings, unless the user has set them. With auto-connect a thread that outlives Ray would start it again.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Ray would end this process a minute after the head process is lost, here too, without a summary, and log a lot.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_gcs_rpc_server_reconnect_timeout_s": str(NO_TIMEOUT_S),
    # Ray would start a task again forever when it has run out of memory.
    "RAY_task_oom_retries": "3",
}
#: How long disconnecting may take, in seconds. All results are in the ledger by then.
DISCONNECT_TIMEOUT_S = 10.0
#: How often our signal handlers are installed again, in seconds, because Ray replaces them during its calls. Until then
#: a SIGTERM ends this process; all answers are in the ledger.
SIGNAL_CHECK_S = 0.002
#: Signals for the run that a local Ray must not receive. SIGTERM is not blocked: Ray ends its own processes with it.
BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGHUP)
#: Held by the run that uses Ray: a process has one connection.
_RAY_LOCK = threading.Lock()


@contextmanager
def connect_ray(address: str | None) -> Iterator[int]:
    """Connect to the cluster at an address, or start Ray on this machine (None). Yield the number of CPUs.

    Ray's output does not reach stdout or stderr. A signal while connecting takes effect once Ray has started, a second
    one at once. Signals during the disconnect are ignored, because the results are still to be reported. Raises
    ClusterFailed when Ray cannot be reached or started, or is used by this process already, and Interrupted.
    """
    with ExitStack() as stack:
        if not _RAY_LOCK.acquire(blocking=False):
            raise _already_used_error()
        stack.callback(_RAY_LOCK.release)
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        # Ray prints the end of its workers to stdout. The worker pool reports that itself.
        stack.enter_context(redirect_stdout(nowhere))
        # Only the main thread receives signals. Ray's processes inherit the blocked signals and end with this thread.
        thread = ThreadPoolExecutor(1, "ray", signal.pthread_sigmask, (signal.SIG_BLOCK, BLOCKED_SIGNALS))
        stack.callback(thread.shutdown, wait=False)
        with _silenced(nowhere.fileno()):
            connecting = thread.submit(_connect, address)
            exit_codes = _wait(connecting, CONNECT_TIMEOUT_S if address else inf, signals=2)
        if connecting.done() and not isinstance(connecting.exception(), ClusterFailed):
            stack.callback(lambda: _wait(thread.submit(_disconnect, connecting), DISCONNECT_TIMEOUT_S))
        if exit_codes:
            raise Interrupted(exit_codes[0])
        try:
            cpus, _ = connecting.result(timeout=0)
        except ClusterFailed:
            raise
        except Exception as error:  # any error of Ray: the run has not started
            raise _connection_error(address, error) from error
        yield cpus


def _connect(address: str | None) -> tuple[int, Path | None]:
    """Start Ray or connect to it. Return the number of CPUs, and the session folder if Ray was started here.

    Raises ClusterFailed if the program uses Ray itself, and what Ray raises.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is not None:
        host, _, port = address.rpartition(":")
        # Ray would retry for minutes where nothing accepts connections.
        socket.create_connection((host.strip("[]"), int(port)), PORT_TIMEOUT_S).close()
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(PORT_TIMEOUT_S))
        if _has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    logger = logging.getLogger("ray")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    import ray  # noqa: PLC0415 - Ray reads its settings when it is imported

    if ray.is_initialized():
        raise _already_used_error()
    context = ray.init(
        address or "local",  # None would let RAY_ADDRESS decide
        log_to_driver=False,
        configure_logging=False,
        **({} if address else {"include_dashboard": False}),
    )
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    return cpus, None if address else Path(context.address_info["session_dir"])


def _disconnect(connecting: Future[tuple[int, Path | None]]) -> None:
    """Disconnect. A Ray that was started here is stopped and its session folder deleted."""
    import ray  # noqa: PLC0415 - as above

    ray.shutdown()
    _, folder = connecting.result()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(call: Future[Any], at_most_s: float, signals: float = inf) -> list[ExitCode]:
    """Wait for a call into Ray, up to `at_most_s` seconds or `signals` signals; return the signals' exit codes."""
    exit_codes: list[ExitCode] = []
    deadline = time.monotonic() + at_most_s
    is_main = threading.current_thread() is threading.main_thread()  # only that one can have handlers
    handlers = {number: signal.getsignal(number) for number in EXIT_CODE_BY_SIGNAL if is_main}
    handled = handled_signals()
    try:
        while not call.done() and len(exit_codes) < signals and time.monotonic() < deadline:
            for number in handlers:
                if number in handled:
                    signal.signal(
                        number, lambda number, _: exit_codes.append(EXIT_CODE_BY_SIGNAL[signal.Signals(number)])
                    )
                else:
                    signal.signal(number, signal.SIG_IGN)
            wait([call], SIGNAL_CHECK_S)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return exit_codes


@contextmanager
def _silenced(nowhere: int) -> Iterator[None]:
    """Redirect stderr, and let processes that are started in this block create files with mode 0600."""
    sys.stderr.flush()
    stderr, umask = os.dup(2), os.umask(0o077)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.umask(umask)


def _has_token() -> bool:
    """Return whether a token for Ray's authentication exists where Ray looks for one."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    with suppress(OSError, RuntimeError):  # no home directory is known
        return (Path.home() / ".ray" / "auth_token").is_file()
    return False


def _already_used_error() -> ClusterFailed:
    return ClusterFailed("this process uses Ray already", "start the run in another process, or later")


def _connection_error(address: str | None, error: Exception) -> ClusterFailed:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    reason = reason or ("it does not respond" if isinstance(error, TimeoutError) else type(error).__name__)
    if address is None:
        return ClusterFailed(
            f"Ray can't be started on this machine: {reason}", "see the logs in /tmp/ray/session_latest/logs"
        )
    return ClusterFailed(
        f"the Ray cluster at {address} can't be reached: {reason}",
        "check that it runs there with the same versions of Ray and Python, and its token in ~/.ray/auth_token",
    )

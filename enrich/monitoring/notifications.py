"""Pings a healthcheck at the start and the end of a run, and sends notifications at its end. Never blocks the run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from msgspec import Struct

from enrich.errors import Interrupted, JobError, install_hint
from enrich.exit_codes import NEUTRAL_CODES, SUCCESS_CODES
from enrich.files.web_download import open_web_client
from enrich.job.local_files import read_text

TRIES = 3
REQUEST_TIMEOUT_S = 5.0
RETRY_PAUSE_S = 0.5
#: The end of a run waits this long for its pings.
END_TIMEOUT_S = 10.0


class BackgroundTask:
    """Work in a daemon thread: it ends when the program ends."""

    def __init__(self, work: Callable[[], str | None]) -> None:
        """Start the thread. `work` returns a problem, or None."""
        self._work = work
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._problem = self._work()
        except Exception as error:  # noqa: BLE001 - no error may harm the run; the error's text may hold secrets
            self._problem = type(error).__name__

    def wait(self, seconds: float) -> str | None:
        """Wait up to `seconds`; return the problem, or None. A signal ends the wait, not the program."""
        try:
            self._thread.join(max(0.0, seconds))
        except (KeyboardInterrupt, Interrupted):
            return "not waited for"
        return "it took too long" if self._thread.is_alive() else self._problem


class Healthcheck:
    """The pings of one run, which share a run id. Only the URL's host may be shown: the path is a secret."""

    def __init__(self, url: str) -> None:
        """Parse the URL. Raises ValueError, without the URL in its text, when it is invalid."""
        try:
            self._url = httpx.URL(url)
        except httpx.InvalidURL:
            raise ValueError("must be a web address") from None
        self._run_id = str(uuid4())
        self._start_ping: BackgroundTask | None = None

    def start(self) -> None:
        """Ping the start of a run, without waiting."""
        self._start_ping = BackgroundTask(lambda: self._ping("/start", ""))

    def end(self, code: int, text: str) -> str | None:
        """Ping the end of a run with its exit code; return the problem, or None when all pings arrived."""
        if code in NEUTRAL_CODES:
            return None
        deadline = time.monotonic() + END_TIMEOUT_S
        start_problem = self._start_ping.wait(END_TIMEOUT_S / 2) if self._start_ping else None
        path = "" if code in SUCCESS_CODES else "/fail"
        problem = BackgroundTask(lambda: self._ping(path, text)).wait(deadline - time.monotonic()) or start_problem
        return f"the healthcheck at {self._url.host} could not be pinged: {problem}" if problem else None

    def _ping(self, path: str, text: str) -> str | None:
        url = self._url.copy_with(path=self._url.path.rstrip("/") + path).copy_merge_params({"rid": self._run_id})
        problem: str | None = None
        try:
            http = open_web_client(str(url), timeout_s=REQUEST_TIMEOUT_S, follow_redirects=True)
        except JobError as error:
            return error.message
        with http:
            for number in range(TRIES):
                time.sleep(RETRY_PAUSE_S * number)
                try:
                    response = http.post(url, content=text.encode())
                except httpx.HTTPError as error:
                    # The error's text may hold the URL.
                    problem = "no connection" if isinstance(error, httpx.ConnectError) else "no answer"
                    continue
                problem = None if response.is_success else f"HTTP {response.status_code}"
                if not response.is_server_error:
                    break
        return problem


SEND_TIMEOUT_S = 20.0
GROUP_AND_OTHERS = 0o077


class Notifier(Struct, frozen=True):
    """The recipients, as (line number, Apprise client). Their URLs are secrets: only file and line may be shown."""

    path: Path
    addresses: list[tuple[int, Any]]

    def send(self, title: str, text: str) -> str | None:
        """Send a message to all addresses; return the problem, or None."""
        if not self.addresses:
            return None
        problem = BackgroundTask(lambda: _send(self.addresses, title, text)).wait(SEND_TIMEOUT_S)
        return f"{self.path}: some notifications failed: {problem}" if problem else None


def read_addresses(path: Path) -> tuple[Notifier, list[str]]:
    """Read a file of Apprise URLs, one per line; also return its problems, without any URL in their text."""
    problems = []
    if find_spec("apprise") is None:
        return Notifier(path, []), [f"notifications are not installed: {install_hint('notify')}"]
    clients: list[tuple[int, Any]] = []
    try:
        if path.stat().st_mode & GROUP_AND_OTHERS:
            problems.append(f"{path}: other users can read the addresses: chmod 600 {path}")
        lines = [(number, line.strip()) for number, line in enumerate(read_text(path).splitlines(), start=1)]
        clients = [(number, _apprise_client(line)) for number, line in lines if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        problems.append(f"{path}: notifications cannot be sent: {reason}")
    except Exception as error:  # noqa: BLE001 - of Apprise: it must not end the run, and its text may hold the URL
        problems.append(f"{path}: notifications cannot be sent: {type(error).__name__} in Apprise")
    else:
        if invalid := [number for number, client in clients if not client]:
            problems.append(f"{path}: no Apprise URL in line {_join_numbers(invalid)}")
        elif not clients:
            problems.append(f"{path}: no address for notifications")
    return Notifier(path, [each for each in clients if each[1]]), problems


def _apprise_client(url: str) -> Any | None:  # noqa: ANN401 - an apprise.Apprise
    """Return what sends to an Apprise URL. None: it is not one."""
    import apprise  # noqa: PLC0415 - optional, and slow to import

    logger = logging.getLogger("apprise")
    # Apprise would log its errors, with the addresses, to stderr.
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    client = apprise.Apprise()
    return client if client.add(url) else None


def _send(addresses: list[tuple[int, Any]], title: str, text: str) -> str | None:
    failed = [number for number, client in addresses if not client.notify(title=title, body=text, body_format="text")]
    return f"not delivered to line {_join_numbers(failed)}" if failed else None


def _join_numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))

"""Sends notifications through Apprise (optional extra) when action is required."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

from msgspec import Struct

from enrich.extras import install_hint
from enrich.job.bounded_read import read_text
from enrich.monitoring.healthcheck import BackgroundTask

SEND_TIMEOUT_S = 20.0
GROUP_AND_OTHERS = 0o077


class Notifier(Struct, frozen=True):
    """The recipients, as (line number, Apprise URL). The URLs are secrets: only their file and line may be shown."""

    path: Path
    addresses: list[tuple[int, str]]

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
    addresses: list[tuple[int, str]] = []
    try:
        if path.stat().st_mode & GROUP_AND_OTHERS:
            problems.append(f"{path}: other users can read the addresses: chmod 600 {path}")
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if (url := line.strip()) and not url.startswith("#"):
                addresses.append((number, url))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        problems.append(f"{path}: notifications cannot be sent: {reason}")
    else:
        if not addresses:
            problems.append(f"{path}: no address for notifications")
    return Notifier(path, addresses), problems


def _send(addresses: list[tuple[int, str]], title: str, text: str) -> str | None:
    import apprise  # noqa: PLC0415 - optional, and slow to import

    logger = logging.getLogger("apprise")
    # Apprise would log its errors, with the addresses, to stderr.
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    invalid, failed = [], []
    for number, url in addresses:
        apprise_client = apprise.Apprise()
        if not apprise_client.add(url):
            invalid.append(number)
        elif not apprise_client.notify(title=title, body=text, body_format=apprise.NotifyFormat.TEXT):
            failed.append(number)
    problems = [f"line {_join_numbers(invalid)} is not an Apprise URL"] if invalid else []
    problems += [f"line {_join_numbers(failed)} was rejected"] if failed else []
    return "; ".join(problems) or None


def _join_numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))

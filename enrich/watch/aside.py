"""What may hang runs beside the run, and is waited for only so long."""

from __future__ import annotations

import threading
from collections.abc import Callable

from enrich.errors import Interrupted


class BackgroundTask:
    """Work in a thread that dies with the program."""

    def __init__(self, work: Callable[[], str | None]) -> None:
        """Start it. `work` returns what went wrong, None when nothing did."""
        self._work = work
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._problem = self._work()
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not harm the run; its text may hold secrets
            self._problem = type(error).__name__

    def wait(self, seconds: float) -> str | None:
        """Wait so long at most; return what went wrong. A signal ends the waiting, not the program."""
        try:
            self._thread.join(max(0.0, seconds))
        except (KeyboardInterrupt, Interrupted):
            return "not waited for"
        return "it took too long" if self._thread.is_alive() else self._problem

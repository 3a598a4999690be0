"""Signal handling: the first signal winds a run down, the second exits at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from enrich.errors import Interrupted
from enrich.exit_codes import ExitCode

EXIT_CODE_BY_SIGNAL = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.TERMINATED,  # the terminal was closed
}


def handled_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a run, without those ignored at the program's start (`nohup`, a shell's `&`)."""
    return tuple(number for number in EXIT_CODE_BY_SIGNAL if signal.getsignal(number) is not signal.SIG_IGN)


@dataclass(slots=True)
class SignalHandler:
    """Handles the signals of a run. `on_first_signal` is called once, in the event loop."""

    on_first_signal: Callable[[ExitCode], object]
    received: ExitCode | None = field(default=None, init=False)
    _signals: tuple[signal.Signals, ...] = field(default_factory=handled_signals, init=False)
    #: The handlers from before the run: only where it runs in the main thread.
    _previous: dict[signal.Signals, Any] = field(default_factory=dict, init=False)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals while the block runs."""
        self._install()
        try:
            yield
        finally:
            self._uninstall()
            for number, handler in self._previous.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python cannot install again

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals interrupt a block that blocks the event loop, such as a prompt to the user."""
        self._uninstall()
        for number in self._previous:
            if number != signal.SIGINT:  # Python raises KeyboardInterrupt for it
                signal.signal(number, _raise_interrupted)
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(ExitCode.INTERRUPTED) from None
        finally:
            self._install()

    def raise_if_received(self) -> None:
        """Raise Interrupted when a signal was received."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _install(self) -> None:
        for number in self._signals:
            with suppress(ValueError, RuntimeError):  # possible in the main thread's loop only
                previous = signal.getsignal(number)
                asyncio.get_running_loop().add_signal_handler(number, self.stop, EXIT_CODE_BY_SIGNAL[number])
                self._previous.setdefault(number, previous)

    def _uninstall(self) -> None:
        for number in self._previous:
            asyncio.get_running_loop().remove_signal_handler(number)

    def stop(self, code: ExitCode) -> None:
        """Stop the run; the second time, end the process at once."""
        if self.received is not None:
            os._exit(code)
        self.received = code
        self.on_first_signal(code)


def _raise_interrupted(number: int, _frame: object) -> None:
    raise Interrupted(EXIT_CODE_BY_SIGNAL[signal.Signals(number)])

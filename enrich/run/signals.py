"""The first signal winds an execution down, the second leaves at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from enrich.errors import ExitCode, Interrupted

EXIT_CODE_BY_SIGNAL = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.TERMINATED,  # the terminal was closed
}


def handled_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a run: not those that were ignored when the program started (`nohup`, a shell's `&`)."""
    return tuple(number for number in EXIT_CODE_BY_SIGNAL if signal.getsignal(number) is not signal.SIG_IGN)


@dataclass(slots=True)
class SignalHandler:
    """What was heard so far; `on_first` is called once, in the event loop."""

    on_first_signal: Callable[[ExitCode], object]
    received: ExitCode | None = field(default=None, init=False)
    _signals: tuple[signal.Signals, ...] = field(default_factory=handled_signals, init=False)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Listen while the block runs."""
        self._install()
        try:
            yield
        finally:
            self._uninstall()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals end what blocks the event loop, such as a question to the person."""
        self._uninstall()
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(ExitCode.INTERRUPTED) from None
        finally:
            self._install()

    def raise_if_received(self) -> None:
        """Raise Interrupted when a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _install(self) -> None:
        for number in self._signals:
            with suppress(ValueError, RuntimeError):  # only the main thread's loop can
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal, EXIT_CODE_BY_SIGNAL[number])

    def _uninstall(self) -> None:
        for number in self._signals:
            with suppress(ValueError, RuntimeError):
                asyncio.get_running_loop().remove_signal_handler(number)
                if number != signal.SIGINT:  # which raises KeyboardInterrupt by itself
                    signal.signal(number, _raise_interrupted)

    def _on_signal(self, code: ExitCode) -> None:
        if self.received is not None:
            os._exit(code)
        self.received = code
        self.on_first_signal(code)


def _raise_interrupted(number: int, _frame: object) -> None:
    raise Interrupted(EXIT_CODE_BY_SIGNAL[signal.Signals(number)])

"""Signal handling: the first signal winds a run down, the second exits at once."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from enrich.errors import Interrupted
from enrich.exit_codes import ExitCode

EXIT_CODE_BY_SIGNAL = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.TERMINATED,  # the terminal was closed
}


def handled_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a run, without those ignored at the program's start (`nohup`, a shell's `&`)."""
    if threading.current_thread() is not threading.main_thread():
        return ()  # Python allows no handler there
    return tuple(number for number in EXIT_CODE_BY_SIGNAL if signal.getsignal(number) is not signal.SIG_IGN)


@contextmanager
def restored_signals() -> Iterator[None]:
    """Restore the handlers of signals after the block, which includes the end of the event loop.

    A handler that raises there would lose the exception, and the loop would print it.
    """
    previous = {number: signal.getsignal(number) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python cannot install again


@dataclass(slots=True)
class SignalHandler:
    """Handles the signals of a run. `on_first_signal` is called once, in the event loop."""

    on_first_signal: Callable[[ExitCode], object]
    received: ExitCode | None = field(default=None, init=False)
    _signals: tuple[signal.Signals, ...] = field(default_factory=handled_signals, init=False)

    def install(self) -> None:
        """Handle signals in the running event loop, until `restored_signals`."""
        loop = asyncio.get_running_loop()
        for number in self._signals:
            signal.signal(number, lambda number, _: self.stop_soon(loop, EXIT_CODE_BY_SIGNAL[signal.Signals(number)]))
            signal.siginterrupt(number, False)  # noqa: FBT003 - positional only

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals interrupt a block that blocks the event loop, such as a prompt to the user."""
        for number in self._signals:
            signal.signal(number, _raise_interrupted)
        try:
            yield
        finally:
            self.install()

    def raise_if_received(self) -> None:
        """Raise Interrupted when a signal was received."""
        if self.received is not None:
            raise Interrupted(self.received)

    def stop_soon(self, loop: asyncio.AbstractEventLoop, code: ExitCode) -> None:
        """Stop the run in its event loop, from any thread. Does nothing if the loop has ended."""
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._stop, code)

    def _stop(self, code: ExitCode) -> None:
        """Stop the run; the second time, end the process at once."""
        if self.received is not None:
            os._exit(code)
        self.received = code
        self.on_first_signal(code)


def _raise_interrupted(number: int, _frame: object) -> None:
    raise Interrupted(EXIT_CODE_BY_SIGNAL[signal.Signals(number)])

"""The first signal winds an execution down, the second leaves at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from enrich.errors import Exit, Interrupted

CODES = {
    signal.SIGINT: Exit.INTERRUPTED,
    signal.SIGTERM: Exit.TERMINATED,
    signal.SIGHUP: Exit.TERMINATED,  # the terminal was closed
}


def heeded() -> tuple[signal.Signals, ...]:
    """The signals that end a run: not those that were ignored when the program started (`nohup`, a shell's `&`)."""
    return tuple(number for number in CODES if signal.getsignal(number) is not signal.SIG_IGN)


@dataclass(slots=True)
class Signals:
    """What was heard so far; `on_first` is called once, in the event loop."""

    on_first: Callable[[Exit], object]
    heard: Exit | None = field(default=None, init=False)
    _numbers: tuple[signal.Signals, ...] = field(default_factory=heeded, init=False)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Listen while the block runs."""
        self._listen()
        try:
            yield
        finally:
            self._ignore()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Let signals end what blocks the event loop, such as a question to the person."""
        self._ignore()
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(Exit.INTERRUPTED) from None
        finally:
            self._listen()

    def check(self) -> None:
        """Raise Interrupted when a signal came."""
        if self.heard is not None:
            raise Interrupted(self.heard)

    def _listen(self) -> None:
        for number in self._numbers:
            with suppress(ValueError, RuntimeError):  # only the main thread's loop can
                asyncio.get_running_loop().add_signal_handler(number, self._hear, CODES[number])

    def _ignore(self) -> None:
        for number in self._numbers:
            with suppress(ValueError, RuntimeError):
                asyncio.get_running_loop().remove_signal_handler(number)
                if number != signal.SIGINT:  # which raises KeyboardInterrupt by itself
                    signal.signal(number, _raise)

    def _hear(self, code: Exit) -> None:
        if self.heard is not None:
            os._exit(code)
        self.heard = code
        self.on_first(code)


def _raise(number: int, _frame: object) -> None:
    raise Interrupted(CODES[signal.Signals(number)])

"""Workers of a crew that are processes of this machine: both ends of the pipe between one and who started it.

It is started with every signal that could end it blocked: who began the run decides when it ends.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from subprocess import DEVNULL
from typing import IO

from enrich.crew import Hand, Hire, shared
from enrich.pace import Pace
from enrich.place import Postgres
from enrich.sharedpace import Slate
from enrich.signals import CODES
from enrich.worker import Errand, Told, Word, Worker

TELLING_S = 0.2
#: Left alone, a process waits so long for answers to its POSTs: cut off, they would be in doubt.
ORPHAN_S = 5.0
#: Whose pipe is closed is dead a moment later, and then it can be told how it died.
DYING_S = 0.2
#: Not `-m`: what it tells is of modules that would be called `__main__`.
START = "from enrich.hands import main; main()"


@dataclass(slots=True, eq=False)
class Subprocess:
    """A process, as its boss knows it; `pace` is the descriptor of its slate, -1: it needs none."""

    process: subprocess.Popen[bytes]
    line: Connection
    pace: int
    heard: Callable[[Hand], None]
    told: Told = field(default_factory=Told)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    listening: bool = False

    @classmethod
    def start(cls, pace: int, inherited: Sequence[int], heard: Callable[[Hand], None]) -> Subprocess:
        """Start a process. Raises OSError when the system has no room for another."""
        ours, theirs = Pipe()
        command = [sys.executable, "-P", "-c", START, str(theirs.fileno())]
        descriptors = [theirs.fileno(), *inherited]
        with theirs, _deaf():
            process = subprocess.Popen(command, stdin=DEVNULL, stdout=DEVNULL, pass_fds=descriptors)  # noqa: S603 - ourselves
        hand = cls(process, ours, pace, heard)
        asyncio.get_running_loop().add_reader(ours.fileno(), hand._hear)
        return hand

    async def hand_over(self, errand: Errand) -> None:
        """Tell it what to do; takes as long as its start."""
        with suppress(OSError):  # not there any more: its line will tell
            await asyncio.to_thread(self.line.send, replace(errand, pace=self.pace))
            self.listening = True

    def say(self, word: Word) -> None:
        """Tell it how to go on, if it is still there."""
        with suppress(OSError):
            if self.listening:
                self.line.send(word)

    @property
    def why(self) -> str:
        """Why it went before its work was done."""
        code = self.process.poll()
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else "a process that ended"

    async def end(self) -> None:
        """End it, if it is still there."""
        if not self.gone.is_set():
            self.process.kill()
        await self.gone.wait()
        await asyncio.to_thread(self.process.wait)
        self.line.close()

    def _hear(self) -> None:
        try:
            self.told = self.line.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self.line.fileno())
            if not self.told.ended:
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(DYING_S)
            self.gone.set()
        self.heard(self)


@dataclass(frozen=True, slots=True)
class AtFile:
    """Processes at a ledger that is a file: they share its lock, and a slate for the pace."""

    #: The descriptor that keeps others from the ledger while one of them lives.
    lock: int | None
    #: What one of them was at is in doubt until all are gone.
    heirs: bool = False

    @asynccontextmanager
    async def sharing(self, pace: Pace) -> AsyncIterator[Hire]:
        """Let processes that are started meanwhile share the pace. Raises OSError when the system has no room."""
        with _paper() as file:
            slate = Slate(file.fileno())
            slate.write(vars(pace))
            inherited = [file.fileno(), *([] if self.lock is None else [self.lock])]
            try:
                yield lambda heard: Subprocess.start(file.fileno(), inherited, heard)
            finally:
                vars(pace).update(slate.read())
                slate.close()


@dataclass(frozen=True, slots=True)
class AtServer:
    """Processes at a ledger on a server: they have nothing in common but that."""

    ledger: Postgres
    heirs: bool = True

    @asynccontextmanager
    async def sharing(self, pace: Pace) -> AsyncIterator[Hire]:
        """Let processes that are started meanwhile share the pace."""
        async with shared(self.ledger, pace):
            yield lambda heard: Subprocess.start(-1, (), heard)


def _paper() -> IO[bytes]:
    """Make the file of a slate; its room is taken now, since who finds none later in its memory is killed."""
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        file.write(bytes(Slate.SIZE))
        file.flush()
        stack.pop_all()
        return file


@contextmanager
def _deaf() -> Iterator[None]:
    """Block the signals that end a run: a process that is started meanwhile never hears them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def obey(boss: Connection, errand: Errand) -> None:
    """Do the errand and obey; without anybody to obey write down what is on the wire, and leave."""
    worker = Worker(errand)
    loop = asyncio.get_running_loop()
    orphaned: list[asyncio.Task[None]] = []

    def tell(told: Told) -> None:
        with suppress(OSError):  # nobody may be there to hear it
            boss.send(told)

    def hear() -> None:
        try:
            worker.obey(boss.recv())
        except (EOFError, OSError):
            loop.remove_reader(boss.fileno())
            worker.obey(Word.CLOSE)
            orphaned.append(asyncio.create_task(worker.leave_alone(ORPHAN_S)))

    async def keep_telling() -> None:
        while True:
            tell(worker.told())
            await asyncio.sleep(TELLING_S)

    loop.add_reader(boss.fileno(), hear)
    telling = asyncio.create_task(keep_telling())
    try:
        await worker.work()
    finally:
        telling.cancel()
        loop.remove_reader(boss.fileno())
    tell(worker.told(ended=True))


def main() -> None:
    """Take the errand from the socket whose descriptor is the argument, and do it."""
    with Connection(int(sys.argv[1])) as boss:
        try:
            errand = boss.recv()
        except (EOFError, OSError):
            return  # nobody is there any more
        asyncio.run(obey(boss, errand))

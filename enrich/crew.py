"""Lets several processes send and poll (`--processes`): starts them, passes on when to stop, adds up what they tell.

They share the queue, which is the ledger: each claims what is next, so no request is claimed by two. The budget is in
the ledger, too, the rate in a slate, and what may be in flight is divided among them.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from subprocess import DEVNULL
from typing import IO

from enrich.errors import EnrichError
from enrich.execution import Execution, Tally
from enrich.model import Task
from enrich.sharedpace import Slate
from enrich.signals import CODES
from enrich.worker import Errand, Told, Word

#: So long a process that shall leave may take to write down what it knows.
LEAVE_S = 3.0
#: Not `-m`: what it tells is of the module `enrich.worker`, which would be called `__main__`.
START = "from enrich.worker import main; main()"


@dataclass(slots=True)
class Worker:
    """A process of the crew, as its boss knows it."""

    process: subprocess.Popen[bytes]
    line: Connection
    told: Told = field(default_factory=Told)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    #: It has its errand, and hears words.
    listening: bool = False

    def on_the_wire(self, *, closing: bool) -> int:
        """Tell how many POSTs it has on the wire; until it tells that it sends no more, at least one may be there."""
        unknown = closing and self.listening and not (self.told.closing or self.told.ended or self.gone.is_set())
        return max(self.told.on_the_wire, int(unknown))

    def hand_over(self, errand: Errand) -> None:
        """Tell it what to do; takes as long as its start."""
        with suppress(OSError):  # not there any more: its line will tell
            self.line.send(errand)
            self.listening = True

    def say(self, word: Word) -> None:
        """Tell it how to go on, if it is still there."""
        with suppress(OSError):
            if self.listening:
                self.line.send(word)


@dataclass(slots=True)
class Crew:
    """Several processes that do together what dispatcher and poller of one would.

    `errand` is what each is told, but for its part of the tasks; `lock` is the descriptor that keeps others from the
    ledger while one of them lives.
    """

    execution: Execution
    errand: Errand
    lock: int | None
    #: Whether one ended before its work did, killed perhaps, or could not be started. The others are stopped then;
    #: what is left is another's.
    lost: bool = False
    _workers: list[Worker] = field(default_factory=list)
    _before: Tally = field(default_factory=Tally)

    async def run(self, tasks: Sequence[Task]) -> None:
        """Send and poll to the end; `tasks` were left at the API before. No process is left when this returns."""
        execution = self.execution
        self._before = execution.tally
        try:
            file = _paper()
        except OSError:  # the system has no room for it
            self.lost = True
            return
        with file:
            slate = Slate(file.fileno())
            slate.write(vars(execution.pace))
            passing_on: list[asyncio.Task[None]] = []
            try:
                await self._start_all(file, tasks)
                for event, word in ((execution.closing, Word.CLOSE), (execution.giving_up, Word.GIVE_UP)):
                    passing_on.append(asyncio.create_task(self._pass_on(event, word)))
                for worker in self._workers:
                    await worker.gone.wait()
            finally:
                for passing in passing_on:
                    passing.cancel()
                await self._dismiss()
                vars(execution.pace).update(slate.read())
                slate.close()
                execution.in_flight = execution.on_the_wire = 0

    def hurry(self) -> None:
        """Let every task be asked once more, now."""
        self._say(Word.HURRY)
        self._add_up()  # what was told before is not all that is on the wire

    async def _start_all(self, pace: IO[bytes], tasks: Sequence[Task]) -> None:
        """Start the processes, and give each its part of the tasks."""
        count = self.errand.shift.processes
        try:
            for _ in range(count):
                self._start(pace.fileno())
        except OSError:  # the system has no room for another
            self.lost = True
        for number, worker in enumerate(self._workers):
            errand = replace(self.errand, pace=pace.fileno(), tasks=tuple(tasks[number::count]))
            await asyncio.to_thread(worker.hand_over, errand)
        if self.lost:
            self._say(Word.CLOSE)

    def _start(self, pace: int) -> None:
        ours, theirs = Pipe()
        inherited = [theirs.fileno(), pace, *([] if self.lock is None else [self.lock])]
        command = [sys.executable, "-P", "-c", START, str(theirs.fileno())]
        with theirs, _deaf():
            process = subprocess.Popen(command, stdin=DEVNULL, stdout=DEVNULL, pass_fds=inherited)  # noqa: S603 - ourselves
        worker = Worker(process, ours)
        self._workers.append(worker)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._hear, worker)

    def _hear(self, worker: Worker) -> None:
        """Hear how far a worker is, or that it is gone."""
        try:
            worker.told = worker.line.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(worker.line.fileno())
            worker.gone.set()
            if not worker.told.ended:
                self.lost = True
                self._say(Word.CLOSE)
        self._add_up()

    def _add_up(self) -> None:
        """Know of the execution what all of them know."""
        execution, all_told = self.execution, [worker.told for worker in self._workers]
        execution.tally = sum((told.tally for told in all_told), self._before)
        execution.in_flight = sum(told.in_flight for told in all_told)
        execution.poll_times = next((told.poll_times for told in all_told if told.poll_times), execution.poll_times)
        for told in all_told:
            for code, (message, hint) in told.reasons.items():
                execution.reasons.setdefault(code, EnrichError(message, hint))
            if not self.lost:  # then they close since we say so
                if told.giving_up:
                    execution.giving_up.set()
                if told.closing:
                    execution.closing.set()
        closing = execution.closing.is_set()
        execution.on_the_wire = sum(worker.on_the_wire(closing=closing) for worker in self._workers)
        execution.notify()

    async def _pass_on(self, event: asyncio.Event, word: Word) -> None:
        await event.wait()
        self._say(word)

    def _say(self, word: Word) -> None:
        for worker in self._workers:
            worker.say(word)

    async def _dismiss(self) -> None:
        """Let them leave, and end who doesn't; listen to the last word of each."""
        self._say(Word.LEAVE)
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                for worker in self._workers:
                    await worker.gone.wait()
        for worker in self._workers:
            if not worker.gone.is_set():
                worker.process.kill()
            await worker.gone.wait()
            await asyncio.to_thread(worker.process.wait)
            worker.line.close()


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

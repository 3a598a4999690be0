"""Workers of a crew that are actors of Ray, on whatever machine has room: both ends of what their boss hears of them.

An actor is detached: Ray would kill it with the process that made it, and what it has on the wire would be in doubt.
It leaves by itself when nobody has asked for long how far it is.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError

from enrich import __version__
from enrich.cluster.presence import require_same_version
from enrich.cluster.worker import Worker, WorkerCommand, WorkerStatus, WorkerTask
from enrich.cluster.worker_pool import WorkerHandle

T = TypeVar("T")
#: How often an actor is asked how far it is, in seconds.
STATUS_EVERY_S = 0.2
#: An actor that was not asked at so many looks, one a second, is alone.
ORPHAN_CHECKS = 10
#: An actor without an errand waits so long for one: who made it may be gone.
START_TIMEOUT_S = 60.0
#: Left alone, it waits so long for answers to its POSTs: cut off, they would be in doubt.
ORPHAN_TIMEOUT_S = 5.0
#: So long it may take to end it.
TERMINATE_TIMEOUT_S = 3.0
#: A worker waits more than it computes: more of them than cores find room.
CPUS_PER_WORKER = 0.25
#: It is told and asked while it works.
MAX_CONCURRENCY = 16


class WorkerActor:
    """A worker, in a process of its own."""

    def __init__(self) -> None:
        self._idle = threading.Timer(START_TIMEOUT_S, os._exit, (0,))
        self._idle.daemon = True
        self._idle.start()
        self._worker: Worker | None = None
        self._ended = False
        self._unasked = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, version: str, worker_task: WorkerTask) -> None:
        """Begin with the errand. It comes as an argument of a call: those of a constructor Ray would keep."""
        self._idle.cancel()
        require_same_version(version)
        self._worker = Worker(worker_task)
        self._tasks = [asyncio.create_task(self._work(self._worker)), asyncio.create_task(self._watch(self._worker))]

    async def told(self) -> WorkerStatus:
        """Tell how far it is."""
        self._unasked = 0
        assert self._worker is not None  # noqa: S101 - it was begun
        if (work := self._tasks[0]).done() and (error := work.exception()) is not None:
            raise error
        return self._worker.status(is_done=self._ended)

    async def say(self, word: WorkerCommand) -> None:
        """Go on as the word says."""
        assert self._worker is not None  # noqa: S101 - it was begun
        self._worker.handle(word)

    async def _work(self, worker: Worker) -> None:
        await worker.run()
        self._ended = True

    async def _watch(self, worker: Worker) -> None:
        """Leave when nobody asks any more."""
        while self._unasked < ORPHAN_CHECKS:
            await asyncio.sleep(1.0)
            self._unasked += 1
        await worker.finish_orphaned(ORPHAN_TIMEOUT_S)
        with suppress(Exception):
            await self._tasks[0]
        ray.actor.exit_actor()


@dataclass(slots=True, eq=False)
class ActorHandle:
    """An actor, seen from the run that started it."""

    actor: Any
    worker_task: WorkerTask
    on_status: Callable[[WorkerHandle], None]
    status: WorkerStatus = field(default_factory=WorkerStatus)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    is_ready: bool = False
    exit_reason: str = "a worker of the cluster that ended"
    _polling: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        """Hand over the errand; the actor may have to wait for room in the cluster."""
        self._polling = asyncio.create_task(self._poll_status())

    def send(self, command: WorkerCommand) -> None:
        """Tell it how to go on, if it is still there."""
        if self.is_ready and not self.gone.is_set():
            self.actor.say.remote(command)

    async def end(self) -> None:
        """End it, if it is still there."""
        with suppress(RayError, ValueError, TimeoutError):
            async with asyncio.timeout(TERMINATE_TIMEOUT_S):
                await _call_in_thread(lambda: ray.kill(self.actor))
        self._polling.cancel()
        await asyncio.wait([self._polling])
        self._mark_exited()

    async def _poll_status(self) -> None:
        """Ask it again and again how far it is, until it is gone or its work is done."""
        try:
            await self.actor.begin.remote(__version__, self.worker_task)
            self.is_ready = True
            while not self.status.is_done:
                self.status = await self.actor.told.remote()
                if self.status.is_done:
                    break
                self.on_status(self)
                await asyncio.sleep(STATUS_EVERY_S)
        except RayError as error:
            self.exit_reason = _short_reason(error)
        self._mark_exited()

    def _mark_exited(self) -> None:
        if not self.gone.is_set():
            self.gone.set()
            self.on_status(self)


def start_actor() -> Any:  # noqa: ANN401 - an actor of Ray
    """Start an actor on whatever machine of the cluster has room."""
    options = {
        "num_cpus": CPUS_PER_WORKER,
        "max_restarts": 0,
        "max_concurrency": MAX_CONCURRENCY,
        "lifetime": "detached",
    }
    return ray.remote(WorkerActor).options(**options, scheduling_strategy="SPREAD").remote()


def _call_in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Call where nobody is held up: without its head a cluster ends no actor, and says nothing."""
    done: Future[T] = Future()

    def do() -> None:
        done.set_running_or_notify_cancel()
        try:
            done.set_result(call())
        except Exception as error:  # noqa: BLE001 - it is raised by who waits
            done.set_exception(error)

    threading.Thread(target=do, name="actor", daemon=True).start()
    return asyncio.wrap_future(done)


def _short_reason(error: RayError) -> str:
    """Say in a few words what Ray says in many."""
    if isinstance(error, RayActorError):
        return "an actor of the cluster died"
    cause = getattr(error, "cause", None)
    said = cause if isinstance(cause, Exception) else error
    return f"{type(said).__name__}: {next(iter(str(said).splitlines()), '')}"

"""Workers that are Ray actors on any machine of the cluster, and the handle through which the run polls their status.

An actor is detached: otherwise Ray would kill it with the process that started it, and requests it is sending would
become unconfirmed. It exits when its status was not polled for a while.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError

from enrich import __version__
from enrich.cluster.presence import require_same_version
from enrich.cluster.worker import Worker, WorkerCommand, WorkerStatus, WorkerTask
from enrich.cluster.worker_pool import WorkerHandle

T = TypeVar("T")
#: How often an actor's status is polled, in seconds.
STATUS_EVERY_S = 0.2
#: An actor that was not polled in this many checks, one per second, is an orphan.
ORPHAN_CHECKS = 10
#: An actor without a task waits this many seconds for one: the process that started it may have ended.
START_TIMEOUT_S = 60.0
#: How long an orphan waits for answers to its POSTs, in seconds. Cut off, they would become unconfirmed.
ORPHAN_TIMEOUT_S = 5.0
#: How long to wait for a kill, in seconds.
TERMINATE_TIMEOUT_S = 3.0
#: A worker waits more than it computes, so several of them fit on one core.
CPUS_PER_WORKER = 0.25
#: An actor handles commands and status polls while it works.
MAX_CONCURRENCY = 16


class WorkerActor:
    """A worker in a process of its own."""

    def __init__(self) -> None:
        self._idle = threading.Timer(START_TIMEOUT_S, os._exit, (0,))
        self._idle.daemon = True
        self._idle.start()
        self._worker: Worker | None = None
        self._ended = False
        self._unasked = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, version: str, worker_task: WorkerTask) -> None:
        """Start with the task. It is an argument of this call, because Ray would store arguments of a constructor."""
        self._idle.cancel()
        require_same_version(version)
        self._worker = Worker(worker_task)
        self._tasks = [asyncio.create_task(self._work(self._worker)), asyncio.create_task(self._watch(self._worker))]

    async def told(self) -> WorkerStatus:
        """Return the worker's status. Raises the error that ended its work, if any."""
        self._unasked = 0
        assert self._worker is not None  # noqa: S101 - `begin` was called before
        if (work := self._tasks[0]).done() and (error := work.exception()) is not None:
            raise error
        return self._worker.status(is_done=self._ended)

    async def say(self, word: WorkerCommand) -> None:
        """Pass a command to the worker."""
        assert self._worker is not None  # noqa: S101 - `begin` was called before
        self._worker.handle(word)

    async def _work(self, worker: Worker) -> None:
        await worker.run()
        self._ended = True

    async def _watch(self, worker: Worker) -> None:
        """Exit when the status is no longer polled."""
        while self._unasked < ORPHAN_CHECKS:
            await asyncio.sleep(1.0)
            self._unasked += 1
        await worker.finish_orphaned(ORPHAN_TIMEOUT_S)
        with suppress(Exception):
            await self._tasks[0]
        ray.actor.exit_actor()


@dataclass(slots=True, eq=False)
class ActorHandle:
    """An actor, as seen by the run that started it."""

    actor: Any
    worker_task: WorkerTask
    on_status: Callable[[WorkerHandle], None]
    status: WorkerStatus = field(default_factory=WorkerStatus)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    is_ready: bool = False
    exit_reason: str = "a worker of the cluster that ended"
    _polling: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        """Send the task to the actor, which may have to wait for free resources in the cluster."""
        self._polling = asyncio.create_task(self._poll_status())

    def send(self, command: WorkerCommand) -> None:
        """Send a command to the actor, if it is still running."""
        if self.is_ready and not self.gone.is_set():
            self.actor.say.remote(command)

    async def end(self) -> None:
        """Kill the actor, if it is still running."""
        with suppress(RayError, ValueError, TimeoutError):
            async with asyncio.timeout(TERMINATE_TIMEOUT_S):
                await _call_in_thread(lambda: ray.kill(self.actor))
        self._polling.cancel()
        await asyncio.wait([self._polling])
        self._mark_exited()

    async def _poll_status(self) -> None:
        """Poll the status until the actor has exited or its work is done."""
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


@cache
def _actor_class() -> Any:  # noqa: ANN401 - a Ray actor class
    """Return the class that Ray starts actors of. Ray sends it to the cluster once."""
    options = {
        "num_cpus": CPUS_PER_WORKER,
        "max_restarts": 0,
        "max_concurrency": MAX_CONCURRENCY,
        "lifetime": "detached",
    }
    return ray.remote(WorkerActor).options(**options, scheduling_strategy="SPREAD")


def start_actor() -> Any:  # noqa: ANN401 - a Ray actor
    """Start an actor on any machine of the cluster with free resources."""
    return _actor_class().remote()


def _call_in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run a blocking call in a thread: without the cluster's head node, killing an actor does not return."""
    done: Future[T] = Future()

    def do() -> None:
        done.set_running_or_notify_cancel()
        try:
            done.set_result(call())
        except Exception as error:  # noqa: BLE001 - raised in the awaiting task
            done.set_exception(error)

    threading.Thread(target=do, name="actor", daemon=True).start()
    return asyncio.wrap_future(done)


def _short_reason(error: RayError) -> str:
    """Shorten Ray's error to a few words."""
    if isinstance(error, RayActorError):
        return "an actor of the cluster died"
    cause = getattr(error, "cause", None)
    said = cause if isinstance(cause, Exception) else error
    return f"{type(said).__name__}: {next(iter(str(said).splitlines()), '')}"

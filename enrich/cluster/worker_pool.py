"""Workers that are Ray actors: starts them, passes on when to stop, adds up their reports, replaces lost ones.

They claim requests from the same queue, the ledger. Tasks in flight and the ceiling of the rate are divided among them.
Why Ray's own restarts (`max_restarts`) are not used: docs/internals/leases.md.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from enrich import __version__
from enrich.cluster.heartbeats import require_same_version
from enrich.cluster.worker import StopRequest, Worker, WorkerStatus, WorkerTask
from enrich.errors import EnrichError
from enrich.run.run_state import RunCounters, RunState

#: How often a worker's status is polled, in seconds.
STATUS_EVERY_S = 0.2
#: A worker that does not start within this many seconds is given up; the cluster may have no room for it.
START_TIMEOUT_S = 120.0
#: A worker that does not answer for this many lease lengths is killed: others have taken over its tasks.
SILENT_LEASES = 2
#: The number of replacements per worker in the whole run.
REPLACEMENTS_PER_WORKER = 3
#: How long stopping workers may take to record answers, in seconds.
STOP_TIMEOUT_S = 3.0
#: How long to wait for a kill, in seconds.
KILL_TIMEOUT_S = 3.0
#: An actor whose status was not polled in this many checks, one per second, is an orphan.
ORPHAN_CHECKS = 10
#: An actor that was never polled exits after this many seconds: the process that started it may have ended.
IDLE_TIMEOUT_S = 60.0
#: How long an orphan waits for answers to its POSTs, in seconds. Cut off, they would become unconfirmed.
ORPHAN_TIMEOUT_S = 5.0
#: A worker waits more than it computes, so several of them fit on one core.
CPUS_PER_WORKER = 0.25


class WorkerActor:
    """A worker in a process of its own.

    An actor is detached: otherwise Ray would kill it with the process that started it, and requests it is sending would
    become unconfirmed. It exits when its status was not polled for a while.
    """

    def __init__(self) -> None:
        self._idle = threading.Timer(IDLE_TIMEOUT_S, os._exit, (0,))
        self._idle.daemon = True
        self._idle.start()
        self._unpolled_checks = 0
        self._worker: Worker | None = None
        self._run: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def work(self, version: str, worker_task: WorkerTask, request: StopRequest) -> WorkerStatus:
        """Run the task to its end and return the last status.

        The task is an argument of this call, because Ray would store arguments of a constructor.
        """
        require_same_version(version)
        self._worker = worker = Worker(worker_task)
        worker.stop(request)
        self._run = asyncio.create_task(worker.run())
        await self._run
        return worker.status()

    async def exchange(self, request: StopRequest) -> WorkerStatus:
        """Take what the worker should stop, and return its status. The first call comes before that of `work`."""
        self._unpolled_checks = 0
        if self._watch is None:
            self._idle.cancel()
            self._watch = asyncio.create_task(self._exit_when_orphaned())
        if self._worker is None:
            return WorkerStatus()
        self._worker.stop(request)
        return self._worker.status()

    async def _exit_when_orphaned(self) -> None:
        while self._unpolled_checks < ORPHAN_CHECKS:
            await asyncio.sleep(1.0)
            self._unpolled_checks += 1
        if self._worker is not None and self._run is not None:
            await self._worker.finish_orphaned(ORPHAN_TIMEOUT_S)
            await asyncio.wait([self._run])
        ray.actor.exit_actor()


@cache
def _actor_class() -> Any:  # noqa: ANN401 - a Ray actor class
    """Return the class that Ray starts actors of. Ray sends it to the cluster once."""
    options = {"num_cpus": CPUS_PER_WORKER, "max_restarts": 0, "lifetime": "detached", "scheduling_strategy": "SPREAD"}
    return ray.remote(WorkerActor).options(**options)


def start_actor() -> Any:  # noqa: ANN401 - a Ray actor
    """Start an actor on any machine of the cluster with free resources."""
    return _actor_class().remote()


@dataclass(slots=True, eq=False)
class StartedWorker:
    """An actor of the run: its last status, and whether it has reported and still runs."""

    status: WorkerStatus = field(default_factory=WorkerStatus)
    has_reported: bool = False
    is_running: bool = True

    def posts_in_flight(self, *, closing: bool) -> int:
        """Return its POSTs in flight: at least one until it has reported that it sends no more."""
        if not self.is_running:
            return 0
        may_be_sending = closing and self.has_reported and not self.status.stop_submitting
        return max(self.status.posts_in_flight, int(may_be_sending))


@dataclass(slots=True)
class WorkerPool:
    """Several workers with the same task, which together do what one dispatcher and one poller would do."""

    run_state: RunState
    worker_task: WorkerTask
    start_actor: Callable[[], Any] = start_actor
    #: Why workers ended before their work was done.
    lost_reasons: list[str] = field(default_factory=list)
    _workers: list[StartedWorker] = field(default_factory=list)
    _initial_counters: RunCounters = field(default_factory=RunCounters)
    _finishing_early: bool = False
    _aborting: bool = False

    async def run(self) -> None:
        """Submit and poll to the end. No worker is left when this returns."""
        self._initial_counters = self.run_state.counters
        running = {asyncio.create_task(self._keep_working()) for _ in range(self.worker_task.in_flight_limit.workers)}
        is_done = False
        try:
            while running and not (is_done and self._none_has_reported()):
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                is_done = is_done or any(task.result() for task in ended)
        finally:
            self._aborting = True
            if running:
                await asyncio.wait(running, timeout=0 if self._none_has_reported() else STOP_TIMEOUT_S)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self.run_state.open_tasks = self.run_state.posts_in_flight = 0

    def finish_early(self) -> None:
        """Poll every open task once more, now."""
        self._finishing_early = True
        self._update_run_state()  # earlier reports may lack POSTs in flight

    def _none_has_reported(self) -> bool:
        """Return whether no running worker has started. They are not needed when the others have done all work."""
        return not any(worker.is_running and worker.has_reported for worker in self._workers)

    async def _keep_working(self) -> bool:
        """Run a worker, and another one when it is lost. Return whether one has done its work."""
        for _ in range(1 + REPLACEMENTS_PER_WORKER):
            self._workers.append(worker := StartedWorker())
            try:
                await self._run_worker(worker)
            except RayError as error:
                self.lost_reasons.append(_short_reason(error))
            except TimeoutError:
                self.lost_reasons.append("it stopped responding")
                if not worker.has_reported:
                    return False
            except OSError as error:
                self.lost_reasons.append(error.strerror or str(error))
                return False
            except asyncio.CancelledError:
                if worker.has_reported:
                    self.lost_reasons.append("a worker of the cluster that did not stop")
                raise
            else:
                return True
            finally:
                worker.is_running = False
                self._update_run_state()
            if self.run_state.stop_submitting.is_set():
                return False
        return False

    async def _run_worker(self, worker: StartedWorker) -> None:
        """Run one actor to its end.

        Raises OSError when it cannot be started, TimeoutError when it does not answer, and RayError when it is lost.
        """
        actor = self.start_actor()
        work: asyncio.Future[WorkerStatus] | None = None
        try:
            await _answer(actor.exchange.remote(self._stop_request), START_TIMEOUT_S)
            work = asyncio.ensure_future(actor.work.remote(__version__, self.worker_task, self._stop_request))
            timeout_s = START_TIMEOUT_S
            while not work.done():
                worker.status = await _answer(actor.exchange.remote(self._stop_request), timeout_s)
                worker.has_reported, timeout_s = True, SILENT_LEASES * self.worker_task.ledger.lease_s
                self._update_run_state()
                await asyncio.wait([work], timeout=STATUS_EVERY_S)
            worker.status = work.result()
        finally:
            if work is not None:
                work.cancel()
                await asyncio.wait([work])
            await _kill(actor)

    @property
    def _stop_request(self) -> StopRequest:
        run_state = self.run_state
        return StopRequest(
            run_state.stop_submitting.is_set(), run_state.stop_polling.is_set(), self._finishing_early, self._aborting
        )

    def _update_run_state(self) -> None:
        """Add up the workers' reports in the run state."""
        run_state, statuses = self.run_state, [worker.status for worker in self._workers]
        run_state.counters = sum((status.counters for status in statuses), self._initial_counters)
        run_state.open_tasks = sum(worker.status.open_tasks for worker in self._workers if worker.is_running)
        run_state.poll_schedule = next(
            (status.poll_schedule for status in statuses if status.poll_schedule), run_state.poll_schedule
        )
        for status in statuses:
            for code, (message, hint) in status.exit_reasons.items():
                run_state.exit_reasons.setdefault(code, EnrichError(message, hint))
            if status.stop_polling:
                run_state.stop_polling.set()
            if status.stop_submitting:
                run_state.stop_submitting.set()
        closing = run_state.stop_submitting.is_set()
        run_state.posts_in_flight = sum(worker.posts_in_flight(closing=closing) for worker in self._workers)
        run_state.notify_change()


async def _answer(call: Any, timeout_s: float) -> WorkerStatus:  # noqa: ANN401 - Ray has no usable type hints
    """Wait for the answer to a call. Raises TimeoutError.

    `asyncio.timeout` would expire even when the answer came while this process was stopped.
    """
    answer = asyncio.ensure_future(call)
    try:
        await asyncio.wait([answer], timeout=timeout_s)
        if not answer.done():
            raise TimeoutError
        status: WorkerStatus = answer.result()
        return status
    finally:
        answer.cancel()


async def _kill(actor: Any) -> None:  # noqa: ANN401 - a Ray actor
    """End an actor, if it is still running, in a thread: without the cluster's head node a kill does not return."""
    killed, loop = asyncio.Event(), asyncio.get_running_loop()

    def kill() -> None:
        with suppress(RayError, ValueError):
            ray.kill(actor)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(killed.set)

    threading.Thread(target=kill, name="kill", daemon=True).start()
    with suppress(TimeoutError):
        async with asyncio.timeout(KILL_TIMEOUT_S):
            await killed.wait()


def _short_reason(error: RayError) -> str:
    """Shorten Ray's error to a few words."""
    if isinstance(error, RayActorError):
        return "a worker process of the cluster ended unexpectedly"
    cause = getattr(error, "cause", None)
    shown_error = cause if isinstance(cause, Exception) else error
    return f"{type(shown_error).__name__}: {next(iter(str(shown_error).splitlines()), '')}"

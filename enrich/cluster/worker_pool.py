"""Lets several workers submit and poll: starts them, passes on when to stop, adds up their reports.

They share the queue, which is the ledger: each claims what is next, so no request is claimed by two. The budget and the
rate are in the ledger, too, and what may be in flight is divided among them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from enrich.cluster.shared_rate import start_sharing, stop_sharing
from enrich.cluster.worker import WorkerCommand, WorkerStatus, WorkerTask
from enrich.errors import EnrichError, LedgerFailed
from enrich.job.locations import PostgresLocation
from enrich.ledger.dialect import DatabaseFailed
from enrich.run.rate_limit import AdaptiveRateLimiter
from enrich.run.state import RunCounters, RunState

#: Seconds that a stopping worker has to record what it knows.
STOP_TIMEOUT_S = 3.0
#: Interval in seconds at which silent workers are checked.
CHECK_EVERY_S = 0.5
#: A worker without a report this many seconds after its start is given up; the cluster may have no room for it.
START_TIMEOUT_S = 120.0
#: A worker without a report for this many lease lengths is ended.
SILENT_LEASES = 2
#: The number of replacements per worker in the whole run.
REPLACEMENTS_PER_WORKER = 3


class WorkerHandle(Protocol):
    """One worker, seen from the run that started it."""

    @property
    def status(self) -> WorkerStatus:
        """The worker's last report."""

    @property
    def gone(self) -> asyncio.Event:
        """Set when it has ended; there is no report after that."""

    @property
    def is_ready(self) -> bool:
        """Whether it has its task and accepts commands."""

    @property
    def exit_reason(self) -> str:
        """Why it ended before its work was done."""

    def send(self, word: WorkerCommand) -> None:
        """Send it a command, if it is still running."""

    async def end(self) -> None:
        """End it, if it is still running."""


@asynccontextmanager
async def share_rate(ledger: PostgresLocation, limiter: AdaptiveRateLimiter) -> AsyncIterator[None]:
    """Share a rate limiter through the ledger; afterwards `limiter` has what all workers have learned."""
    try:
        await asyncio.to_thread(start_sharing, ledger, limiter)
        try:
            yield
        finally:
            learned = await asyncio.to_thread(stop_sharing, ledger)
            if learned is not None:
                vars(limiter).update(vars(learned))
    except DatabaseFailed as error:
        raise LedgerFailed(f"the ledger cannot be written: {error}", "then run the same command again") from error


@dataclass(slots=True)
class WorkerPool:
    """Several workers with the same task, which together do what one dispatcher and one poller would do.

    A worker that is lost is replaced, and the others take over its open tasks.
    """

    run_state: RunState
    worker_task: WorkerTask
    #: Starts a worker. The callback is called at each of its reports, and when it has ended.
    start_worker: Callable[[WorkerTask, Callable[[WorkerHandle], None]], WorkerHandle]
    #: Why workers ended before their work was done.
    lost_reasons: list[str] = field(default_factory=list)
    _workers: list[WorkerHandle] = field(default_factory=list)
    #: The number of checks in a row without a report, by worker.
    _silent_checks: dict[WorkerHandle, int] = field(default_factory=dict)
    #: Workers that have reported, workers that were ended for silence, and workers that started when nothing was left.
    _started: set[WorkerHandle] = field(default_factory=set)
    _timed_out: set[WorkerHandle] = field(default_factory=set)
    _not_needed: set[WorkerHandle] = field(default_factory=set)
    #: The number of workers to replace. Workers that never started do not count.
    _to_replace: int = 0
    _initial_counters: RunCounters = field(default_factory=RunCounters)

    async def run(self) -> None:
        """Submit and poll to the end. No worker is left when this returns."""
        run_state = self.run_state
        self._initial_counters = run_state.counters
        forwarders: list[asyncio.Task[None]] = []
        async with share_rate(self.worker_task.ledger, run_state.rate_limiter):
            try:
                for _ in range(self.worker_task.work_config.workers):
                    self._start_worker()
                for event, command in (
                    (run_state.stop_submitting, WorkerCommand.STOP_SUBMITTING),
                    (run_state.stop_polling, WorkerCommand.STOP_POLLING),
                ):
                    forwarders.append(asyncio.create_task(self._forward(event, command)))
                await self._supervise()
            finally:
                for forwarder in forwarders:
                    forwarder.cancel()
                await self._stop_all()
                run_state.open_tasks = run_state.posts_in_flight = 0

    def finish_early(self) -> None:
        """Poll every open task once more, now."""
        self._send_to_all(WorkerCommand.FINISH_EARLY)
        self._update_run_state()  # earlier reports may lack POSTs in flight

    @property
    def _running(self) -> list[WorkerHandle]:
        return [worker for worker in self._workers if not worker.gone.is_set()]

    def _start_worker(self) -> None:
        """Start a worker. One that cannot be started counts as lost: its work is left to the others."""
        try:
            self._workers.append(self.start_worker(self.worker_task, self._on_status))
        except OSError as error:
            self.lost_reasons.append(error.strerror or str(error))

    async def _supervise(self) -> None:
        """Wait until all workers have ended; replace lost ones where that helps."""
        while running := self._replace_lost():
            if self._all_done(running):
                self._not_needed.update(running)
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_EVERY_S):
                    await running[0].gone.wait()
                continue
            await self._terminate_silent(running)

    def _all_done(self, running: Sequence[WorkerHandle]) -> bool:
        """Return whether nothing is left for workers that have not started: no work is assigned beforehand."""
        none_begun = self._started.isdisjoint(running)
        return none_begun and any(worker.status.is_done for worker in self._workers)

    def _replace_lost(self) -> Sequence[WorkerHandle]:
        """Replace lost workers; return all running ones."""
        while self._to_replace and not self.run_state.stop_submitting.is_set():
            self._to_replace -= 1
            self._start_worker()
        return self._running

    async def _terminate_silent(self, running: Sequence[WorkerHandle]) -> None:
        """End workers that were silent for so long that others have taken over their tasks."""
        for worker in running:
            # Count checks, not seconds: no worker reports while the machine sleeps.
            self._silent_checks[worker] = self._silent_checks.get(worker, 0) + 1
            if self._silent_checks[worker] * CHECK_EVERY_S > (
                self.worker_task.ledger.lease_s * SILENT_LEASES if worker in self._started else START_TIMEOUT_S
            ):
                self._timed_out.add(worker)
                await worker.end()

    def _on_status(self, worker: WorkerHandle) -> None:
        """Handle a worker's report, or its end."""
        if not worker.gone.is_set():
            self._started.add(worker)
            self._silent_checks[worker] = 0
        elif not worker.status.is_done and worker not in self._not_needed:
            self.lost_reasons.append("it said nothing any more" if worker in self._timed_out else worker.exit_reason)
            if (
                self._had_started(worker)
                and len(self.lost_reasons) <= REPLACEMENTS_PER_WORKER * self.worker_task.work_config.workers
            ):
                self._to_replace += 1
        self._update_run_state()

    def _had_started(self, worker: WorkerHandle) -> bool:
        """Return whether a lost worker had started; one for which the cluster had no room had not."""
        return worker in self._started or worker not in self._timed_out

    def _update_run_state(self) -> None:
        """Add up the workers' reports in the run state."""
        run_state, statuses = self.run_state, [worker.status for worker in self._workers]
        run_state.counters = sum((status.counters for status in statuses), self._initial_counters)
        run_state.open_tasks = sum(worker.status.open_tasks for worker in self._running)
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
        run_state.posts_in_flight = sum(posts_in_flight(worker, closing=closing) for worker in self._running)
        run_state.notify_change()

    async def _forward(self, event: asyncio.Event, command: WorkerCommand) -> None:
        await event.wait()
        self._send_to_all(command)

    def _send_to_all(self, command: WorkerCommand) -> None:
        for worker in self._workers:
            worker.send(command)

    async def _stop_all(self) -> None:
        """Let the workers stop and send their last report; end those that do not stop."""
        self._send_to_all(WorkerCommand.ABORT)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                for worker in self._workers:
                    await worker.gone.wait()
        for worker in self._workers:
            await worker.end()


def posts_in_flight(worker: WorkerHandle, *, closing: bool) -> int:
    """Return a worker's POSTs in flight: at least one until it has reported that it sends no more."""
    status = worker.status
    may_be_sending = (
        closing and worker.is_ready and not (status.stop_submitting or status.is_done or worker.gone.is_set())
    )
    return max(status.posts_in_flight, int(may_be_sending))

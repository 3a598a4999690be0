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

#: So long a worker that shall leave may take to write down what it knows.
STOP_TIMEOUT_S = 3.0
#: How often the boss looks after those who say nothing.
CHECK_EVERY_S = 0.5
#: Who has not said a word so long after it was hired will not come; it may be that its cluster has no room.
START_TIMEOUT_S = 120.0
#: Who has said nothing for so many leases will not speak again.
SILENT_LEASES = 2
#: So many are hired in the place of each that was lost, all told.
REPLACEMENTS_PER_WORKER = 3


class WorkerHandle(Protocol):
    """One worker, seen from the run that started it."""

    @property
    def status(self) -> WorkerStatus:
        """Its last report."""

    @property
    def gone(self) -> asyncio.Event:
        """Set when it has ended; there is no report after that."""

    @property
    def is_ready(self) -> bool:
        """Whether it has its errand, and takes words."""

    @property
    def exit_reason(self) -> str:
        """Why it ended before its work was done."""

    def send(self, word: WorkerCommand) -> None:
        """Tell it how to go on, if it is still there."""

    async def end(self) -> None:
        """End it, if it is still there."""


@asynccontextmanager
async def share_rate(ledger: PostgresLocation, limiter: AdaptiveRateLimiter) -> AsyncIterator[None]:
    """Share a pace by the ledger's row; who shared it goes on with what all have learned."""
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
    """Several workers that do together what dispatcher and poller of one would; each gets the same errand.

    One that is lost is replaced, and the others take on what it held.
    """

    run_state: RunState
    worker_task: WorkerTask
    #: Starts a worker; see `Engine`.
    start_worker: Callable[[WorkerTask, Callable[[WorkerHandle], None]], WorkerHandle]
    #: Why workers ended before their work was done.
    lost_reasons: list[str] = field(default_factory=list)
    _workers: list[WorkerHandle] = field(default_factory=list)
    #: For how many looks in a row each has told nothing.
    _silent_checks: dict[WorkerHandle, int] = field(default_factory=dict)
    #: Those who have told anything at all, those who told nothing more, and those who came when all was done.
    _started: set[WorkerHandle] = field(default_factory=set)
    _timed_out: set[WorkerHandle] = field(default_factory=set)
    _not_needed: set[WorkerHandle] = field(default_factory=set)
    #: In whose place others are to be hired: not of those who never came.
    _to_replace: int = 0
    _initial_counters: RunCounters = field(default_factory=RunCounters)

    async def run(self) -> None:
        """Submit and poll to the end. No worker is left when this returns."""
        run_state = self.run_state
        self._initial_counters = run_state.counters
        passing_on: list[asyncio.Task[None]] = []
        async with share_rate(self.worker_task.ledger, run_state.rate_limiter):
            try:
                for _ in range(self.worker_task.work_config.workers):
                    self._start_worker()
                for event, word in (
                    (run_state.stop_submitting, WorkerCommand.STOP_SUBMITTING),
                    (run_state.stop_polling, WorkerCommand.STOP_POLLING),
                ):
                    passing_on.append(asyncio.create_task(self._forward(event, word)))
                await self._supervise()
            finally:
                for passing in passing_on:
                    passing.cancel()
                await self._stop_all()
                run_state.open_tasks = run_state.posts_in_flight = 0

    def finish_early(self) -> None:
        """Let every task be asked once more, now."""
        self._send_to_all(WorkerCommand.FINISH_EARLY)
        self._update_run_state()  # what was told before is not all that is on the wire

    @property
    def _running(self) -> list[WorkerHandle]:
        return [hand for hand in self._workers if not hand.gone.is_set()]

    def _start_worker(self) -> None:
        self._workers.append(self.start_worker(self.worker_task, self._on_status))

    async def _supervise(self) -> None:
        """Wait until all are gone; start others for those that were lost, where that helps."""
        while present := self._replace_lost():
            if self._all_done(present):
                self._not_needed.update(present)
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_EVERY_S):
                    await present[0].gone.wait()
                continue
            await self._terminate_silent(present)

    def _all_done(self, present: Sequence[WorkerHandle]) -> bool:
        """Tell whether nothing is left for those who have not begun yet: nothing is theirs beforehand."""
        none_begun = self._started.isdisjoint(present)
        return none_begun and any(hand.status.is_done for hand in self._workers)

    def _replace_lost(self) -> Sequence[WorkerHandle]:
        """Start others for those that were lost; return all that are there."""
        while self._to_replace and not self.run_state.stop_submitting.is_set():
            self._to_replace -= 1
            self._start_worker()
        return self._running

    async def _terminate_silent(self, present: Sequence[WorkerHandle]) -> None:
        """End those who have said nothing for so long that what they were at is another's by now."""
        for hand in present:
            # Looks are counted, not seconds: all are silent while the machine sleeps.
            self._silent_checks[hand] = self._silent_checks.get(hand, 0) + 1
            if self._silent_checks[hand] * CHECK_EVERY_S > (
                self.worker_task.ledger.lease_s * SILENT_LEASES if hand in self._started else START_TIMEOUT_S
            ):
                self._timed_out.add(hand)
                await hand.end()

    def _on_status(self, worker: WorkerHandle) -> None:
        """Hear how far a worker is, or that it is gone."""
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
        """Tell whether a worker that is lost was there: one that died was, one for which there is no room was not."""
        return worker in self._started or worker not in self._timed_out

    def _update_run_state(self) -> None:
        """Know of the execution what all of them know."""
        run_state, all_told = self.run_state, [hand.status for hand in self._workers]
        run_state.counters = sum((told.counters for told in all_told), self._initial_counters)
        run_state.open_tasks = sum(hand.status.open_tasks for hand in self._running)
        run_state.poll_schedule = next(
            (told.poll_schedule for told in all_told if told.poll_schedule), run_state.poll_schedule
        )
        for told in all_told:
            for code, (message, hint) in told.exit_reasons.items():
                run_state.exit_reasons.setdefault(code, EnrichError(message, hint))
            if told.stop_polling:
                run_state.stop_polling.set()
            if told.stop_submitting:
                run_state.stop_submitting.set()
        closing = run_state.stop_submitting.is_set()
        run_state.posts_in_flight = sum(posts_in_flight(hand, closing=closing) for hand in self._running)
        run_state.notify_change()

    async def _forward(self, event: asyncio.Event, command: WorkerCommand) -> None:
        await event.wait()
        self._send_to_all(command)

    def _send_to_all(self, command: WorkerCommand) -> None:
        for hand in self._workers:
            hand.send(command)

    async def _stop_all(self) -> None:
        """Let them leave, and end who doesn't; listen to the last word of each."""
        self._send_to_all(WorkerCommand.ABORT)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                for hand in self._workers:
                    await hand.gone.wait()
        for hand in self._workers:
            await hand.end()


def posts_in_flight(worker: WorkerHandle, *, closing: bool) -> int:
    """Tell how many POSTs a worker has on the wire; until it tells that it sends no more, at least one may be there."""
    status = worker.status
    may_be_sending = (
        closing and worker.is_ready and not (status.stop_submitting or status.is_done or worker.gone.is_set())
    )
    return max(status.posts_in_flight, int(may_be_sending))

"""One of several workers on a PostgreSQL ledger: submits and polls, reports its status, and stops on request.

It holds its own lease. It takes over tasks of workers that are gone, and starts again after its lease has expired.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from msgspec import Struct, field

from enrich.databar.client import Client
from enrich.databar.clock import SystemClock
from enrich.databar.environment import ApiAccess
from enrich.errors import EnrichError, LeaseLost, LedgerFailed, RunEnded
from enrich.exit_codes import ExitCode
from enrich.job.locations import PostgresLocation
from enrich.ledger import resume
from enrich.ledger.dialect import DatabaseFailed
from enrich.ledger.lock import open_leased
from enrich.ledger.writer import LedgerWriter
from enrich.models import Task
from enrich.run.dispatcher import submit_and_poll
from enrich.run.poll_schedule import PollSchedule
from enrich.run.poller import Poller
from enrich.run.rate_limit import AdaptiveRateLimiter, InFlightLimit
from enrich.run.run_state import RunCounters, RunState, Timeouts, WorkConfig

if TYPE_CHECKING:  # it needs psycopg
    from enrich.ledger.lock import Lease

#: How often a worker looks for tasks that no process holds, in seconds.
TAKE_OVER_EVERY_S = 1.0
#: How often a worker looks whether it has a share of the rate, in seconds.
SHARE_CHECK_EVERY_S = 0.1


class StopRequest(Struct, frozen=True):
    """What a running worker should stop, as a state: it may be received twice, or by the replacement of a worker."""

    submitting: bool = False  # send no more POSTs
    polling: bool = False  # send nothing more
    finish_early: bool = False  # poll every task once more
    abort: bool = False  # stop waiting for anything


class WorkerTask(Struct, frozen=True):
    """What a worker is started with."""

    work_config: WorkConfig
    access: ApiAccess
    ledger: PostgresLocation
    execution_id: int
    timeouts: Timeouts
    in_flight_limit: InFlightLimit
    #: The most requests per second of all workers together; `inf`: no limit of ours.
    rate_ceiling: float
    poll_schedule: PollSchedule
    #: The lease of the run.
    leader_id: int | None = None


class WorkerStatus(Struct, frozen=True):
    """What a worker has counted and learned."""

    counters: RunCounters = field(default_factory=RunCounters)
    open_tasks: int = 0
    posts_in_flight: int = 0
    exit_reasons: dict[ExitCode, tuple[str, str | None]] = {}
    stop_submitting: bool = False
    stop_polling: bool = False
    poll_schedule: PollSchedule | None = None


class WorkerRateLimiter(AdaptiveRateLimiter):
    """The rate limiter of one of several workers. It finds the API's limit itself, and has an equal share of a ceiling.

    If there is a ceiling, nothing is sent without a valid lease and a share.
    """

    def __init__(self, total_ceiling: float) -> None:
        super().__init__(total_ceiling)
        self._total_ceiling = total_ceiling
        #: The lease that this worker has now.
        self.lease: Lease | None = None

    def delay(self, now: float) -> float:
        """Return how many seconds the next request must wait; 0: it may be sent now. Raises LeaseLost."""
        if self._total_ceiling < inf:
            if self.lease is None or not self.lease.rate_share or not self.lease.is_valid():
                return SHARE_CHECK_EVERY_S
            self.ceiling = self._total_ceiling * self.lease.rate_share
            self.rate = min(self.rate, self.ceiling)
        return super().delay(now)


class Worker:
    """Runs one worker task. It can be stopped, and its status read, at any time."""

    def __init__(self, worker_task: WorkerTask) -> None:
        """Prepare; nothing is sent before `run`."""
        self._task = worker_task
        self._poller: Poller | None = None
        self._finishing_early = False
        self._rate_limiter = WorkerRateLimiter(worker_task.rate_ceiling)
        self._state = RunState(
            worker_task.execution_id,
            SystemClock(),
            self._rate_limiter,
            worker_task.timeouts,
            in_flight_limit=worker_task.in_flight_limit,
            poll_schedule=worker_task.poll_schedule,
        )

    def stop(self, request: StopRequest) -> None:
        """Stop what is requested and not stopped yet."""
        run_state = self._state
        if request.polling:
            run_state.stop_polling.set()
        if request.polling or request.submitting:
            run_state.stop_submitting.set()
            run_state.notify_change()
        if request.finish_early and not self._finishing_early:
            self._finishing_early = True
            if self._poller is not None:
                self._poller.finish_early()
        if request.abort:
            run_state.abort_now()

    async def finish_orphaned(self, at_most_s: float) -> None:
        """Stop because the run is gone: wait up to `at_most_s` seconds for running POSTs, store them, and abort."""
        self.stop(StopRequest(submitting=True))
        await self._state.wait_for_posts(at_most_s)
        self._state.abort_now()

    def status(self) -> WorkerStatus:
        """Return the current status."""
        run_state = self._state
        return WorkerStatus(
            run_state.counters,
            run_state.open_tasks,
            run_state.posts_in_flight,
            {code: (error.message, error.hint) for code, error in run_state.exit_reasons.items()},
            run_state.stop_submitting.is_set(),
            run_state.stop_polling.is_set(),
            run_state.poll_schedule,
        )

    async def run(self) -> None:
        """Run the task. Errors become exit reasons in the status."""
        run_state = self._state
        try:
            while not await self._run_with_lease() and not run_state.stop_submitting.is_set():
                run_state.open_tasks = run_state.posts_in_flight = 0
        except EnrichError as error:
            # Exit code REFUSED promises that nothing was spent, which is not certain here
            run_state.stop(ExitCode.BUG if error.exit_code is ExitCode.REFUSED else error.exit_code, error)
        except DatabaseFailed as error:
            reason = LedgerFailed(f"the ledger cannot be written: {error}", "then run the same command again")
            run_state.stop(reason.exit_code, reason)

    async def _run_with_lease(self) -> bool:
        """Work under one lease. Return False when it was lost before all work was done."""
        worker_task, run_state = self._task, self._state
        try:
            with open_leased(worker_task.ledger, leader_id=worker_task.leader_id) as (ledger, lease):
                run_state.clock, run_state.lease_valid, self._rate_limiter.lease = lease, lease.is_valid, lease
                client = Client(
                    worker_task.access,
                    lease,
                    post_timeout_s=worker_task.timeouts.post_s,
                    get_timeout_s=worker_task.timeouts.get_s,
                )
                writer = LedgerWriter(ledger)
                async with client, writer as ledger_writer:
                    tasks = await self._take_over(ledger_writer)
                    while tasks := await self._submit_and_poll(ledger_writer, client, tasks):
                        pass
        except RunEnded:
            pass  # the machine was suspended, and the run has ended meanwhile
        except LeaseLost:
            return False
        return True

    async def _submit_and_poll(
        self, ledger_writer: LedgerWriter, client: Client, tasks: Sequence[Task]
    ) -> Sequence[Task]:
        """Submit and poll, also tasks that other workers leave. Return those taken over after the poller ended."""
        run_state, ended = self._state, asyncio.Event()
        late: list[Task] = []
        poller = self._poller = Poller(run_state, ledger_writer, client, self._task.work_config)
        if self._finishing_early:
            poller.finish_early()
        poller.add_earlier_tasks(tasks, polled_before=True)

        async def send() -> None:
            try:
                await submit_and_poll(poller)
            finally:
                ended.set()

        async def take_over_tasks() -> None:
            while not ended.is_set():
                await run_state.pause(TAKE_OVER_EVERY_S, ended)
                found = await self._take_over(ledger_writer)
                if ended.is_set():
                    late.extend(found)
                else:
                    poller.add_earlier_tasks(found, polled_before=True)

        await run_state.run_until_abort(send(), take_over_tasks())
        return late

    async def _take_over(self, ledger_writer: LedgerWriter) -> Sequence[Task]:
        """Take over as many tasks that no process holds as there are free slots."""
        run_state = self._state
        free_slots = run_state.free_capacity
        if free_slots <= 0 or self._finishing_early or run_state.stop_polling.is_set():
            return ()
        return await ledger_writer.submit(resume.take_over_tasks, free_slots)

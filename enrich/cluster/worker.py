"""One of several workers on a PostgreSQL ledger: submits and polls, reports its status, and handles commands.

It holds its own lease. It takes over tasks of workers that are gone, and starts again after its lease has expired.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from enrich.cluster.shared_rate import SharedRateLimiter
from enrich.databar.client import Client
from enrich.databar.clock import SystemClock
from enrich.databar.credentials import ApiAccess
from enrich.errors import EnrichError, LeaseLost, RunEnded
from enrich.exit_codes import ExitCode
from enrich.job.locations import PostgresLocation
from enrich.ledger.ledger import Ledger
from enrich.ledger.lock import open_leased
from enrich.ledger.writer import LedgerWriter
from enrich.models import Task
from enrich.run.loops import WorkConfig
from enrich.run.poll_schedule import PollSchedule
from enrich.run.poller import Poller
from enrich.run.rate_limit import AdaptiveRateLimiter
from enrich.run.state import RunCounters, RunState, Timeouts

#: How often a worker looks for tasks that no process holds, in seconds.
TAKE_OVER_EVERY_S = 1.0


class WorkerCommand(Enum):
    """A command to a running worker."""

    STOP_SUBMITTING = auto()  # send no more POSTs
    STOP_POLLING = auto()  # send nothing more
    FINISH_EARLY = auto()  # poll every task once more
    ABORT = auto()  # stop waiting for anything


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """What a worker is started with. `max_open_tasks` is its equal share of the run's limit."""

    work_config: WorkConfig
    access: ApiAccess
    ledger: PostgresLocation
    execution_id: int
    timeouts: Timeouts
    max_open_tasks: int
    result_ttl_s: float
    poll_schedule: PollSchedule
    #: The owner that leads the run.
    leader_id: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """The status of a worker. `is_done` is set once, when all that it learned is in the ledger."""

    counters: RunCounters = field(default_factory=RunCounters)
    open_tasks: int = 0
    posts_in_flight: int = 0
    exit_reasons: dict[ExitCode, tuple[str, str | None]] = field(default_factory=dict)
    stop_submitting: bool = False
    stop_polling: bool = False
    poll_schedule: PollSchedule | None = None
    is_done: bool = False


class Worker:
    """Runs one worker task. Commands and status requests are possible at any time."""

    def __init__(self, worker_task: WorkerTask) -> None:
        """Prepare; nothing is sent before `run`."""
        self._task = worker_task
        self._poller: Poller | None = None
        self._finishing_early = False
        self._state = RunState(
            worker_task.execution_id,
            SystemClock(),
            AdaptiveRateLimiter(None),
            worker_task.timeouts,
            max_open_tasks=worker_task.max_open_tasks,
            result_ttl_s=worker_task.result_ttl_s,
            poll_schedule=worker_task.poll_schedule,
        )

    def handle(self, command: WorkerCommand) -> None:
        """Execute a command."""
        run_state = self._state
        match command:
            case WorkerCommand.STOP_SUBMITTING:
                run_state.stop_submitting.set()
                run_state.notify_change()
            case WorkerCommand.STOP_POLLING:
                run_state.stop_submitting.set()
                run_state.stop_polling.set()
                run_state.notify_change()
            case WorkerCommand.FINISH_EARLY:
                self._finishing_early = True
                if self._poller is not None:
                    self._poller.finish_early()
            case WorkerCommand.ABORT:
                run_state.abort_now()

    async def finish_orphaned(self, at_most_s: float) -> None:
        """Stop because the run is gone: wait up to `at_most_s` seconds for running POSTs, store them, and abort."""
        self.handle(WorkerCommand.STOP_SUBMITTING)
        await self._state.wait_for_posts(at_most_s)
        self._state.abort_now()

    def status(self, *, is_done: bool = False) -> WorkerStatus:
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
            is_done,
        )

    async def run(self) -> None:
        """Run the task. Errors become exit reasons in the status."""
        execution = self._state
        try:
            with SharedRateLimiter(self._task.ledger) as execution.rate_limiter:
                while not await self._run_with_lease() and not execution.stop_submitting.is_set():
                    execution.open_tasks = execution.posts_in_flight = 0
        except EnrichError as error:
            # Exit code REFUSED promises that nothing was spent, which is not certain here
            execution.stop(ExitCode.BUG if error.exit_code is ExitCode.REFUSED else error.exit_code, error)

    async def _run_with_lease(self) -> bool:
        """Work under one lease. Return False when it was lost before all work was done."""
        worker_task, run_state = self._task, self._state
        try:
            with open_leased(worker_task.ledger, leader_id=worker_task.leader_id) as (ledger, lease):
                run_state.clock, run_state.lease_valid = lease, lease.is_valid
                client = Client(
                    worker_task.access,
                    lease,
                    post_timeout_s=worker_task.timeouts.post_s,
                    get_timeout_s=worker_task.timeouts.get_s,
                )
                async with client, LedgerWriter(ledger) as ledger_writer:
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
        poller = self._poller = self._task.work_config.make_poller(run_state, ledger_writer, client)
        if self._finishing_early:
            poller.finish_early()
        poller.add_earlier_tasks(tasks, polled_before=True)

        async def send() -> None:
            try:
                await self._task.work_config.submit_and_poll(poller)
            finally:
                ended.set()

        async def keep_adopting() -> None:
            while not ended.is_set():
                await run_state.pause(TAKE_OVER_EVERY_S, ended)
                found = await self._take_over(ledger_writer)
                if ended.is_set():
                    late.extend(found)
                else:
                    poller.add_earlier_tasks(found, polled_before=True)

        await run_state.run_until_abort(send(), keep_adopting())
        return late

    async def _take_over(self, ledger_writer: LedgerWriter) -> Sequence[Task]:
        """Take over as many tasks that no process holds as there are free slots."""
        run_state = self._state
        free_slots = run_state.max_open_tasks - run_state.open_tasks - run_state.posts_in_flight
        if free_slots <= 0 or self._finishing_early or run_state.stop_polling.is_set():
            return ()
        return await ledger_writer.submit(Ledger.take_over_tasks, free_slots)

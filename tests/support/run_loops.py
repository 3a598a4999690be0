"""Runs the dispatcher and the poller over a real ledger, writer and client, against the sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from enrich.databar.client import Client
from enrich.databar.clock import Clock, SystemClock
from enrich.databar.task_results import TaskReply
from enrich.job.target import Target
from enrich.ledger import transitions
from enrich.ledger.writer import LedgerWriter
from enrich.run.budget import NO_BUDGET, Budget
from enrich.run.dispatcher import Dispatcher
from enrich.run.poll_schedule import PollSchedule
from enrich.run.poller import Poller
from enrich.run.rate_limit import AdaptiveRateLimiter, CircuitBreaker, InFlightLimit
from enrich.run.run_state import RunState, Timeouts, WorkConfig
from tests.support.ledger import BINDING, CALL, CommittingLedger
from tests.support.workspace import SHORT_TIMEOUTS, SandboxApi

#: The maximum price of `CALL` in the sandbox, in millionths.
SANDBOX_MAX_PRICE = 3_510_000
PARAMS = frozenset({"first_name", "last_name", "company"})
CONFIG = WorkConfig(
    CALL, PARAMS, NO_BUDGET, BINDING, bulk=None, column_paths=("email",), max_attempts=3, patience_s=60.0
)


class FastPollSchedule(PollSchedule):
    """Polls early: the sandbox answers immediately."""

    FIRST_GUESS_S = 0.05
    MIN_DELAY_S = 0.1


class FastCircuitBreaker(CircuitBreaker):
    """Pauses only briefly."""

    FIRST_PAUSE_S = 0.05
    MAX_PAUSE_S = 0.2


@dataclass
class RequestLog:
    """What the client recorded about its requests."""

    run_state: RunState
    posts: int = 0
    posts_in_flight: int = 0
    max_posts_in_flight: int = 0
    max_open_tasks: int = 0
    #: POSTs wait until this many were in flight at the same time.
    awaited_posts_in_flight: int = 0
    polled_task_ids: list[str] = field(default_factory=list)


class RecordingClient(Client):
    """The real client; records every request."""

    request_log: RequestLog

    async def submit(self, target: Target, body: bytes, params: Collection[str] = (), rows: int | None = None) -> str:
        """Count the POSTs, and those in flight."""
        log = self.request_log
        log.posts += 1
        log.posts_in_flight += 1
        log.max_posts_in_flight = max(log.max_posts_in_flight, log.posts_in_flight)
        open_tasks = log.run_state.posts_in_flight + log.run_state.open_tasks
        log.max_open_tasks = max(log.max_open_tasks, open_tasks)
        try:
            await wait_until(lambda: log.max_posts_in_flight >= log.awaited_posts_in_flight)
            return await super().submit(target, body, params, rows)
        finally:
            log.posts_in_flight -= 1

    async def poll_task(self, task_id: str, *, new_connection: bool = False) -> TaskReply:
        """Record the ids of polled tasks, in order."""
        self.request_log.polled_task_ids.append(task_id)
        return await super().poll_task(task_id, new_connection=new_connection)


@dataclass
class LoopHarness:
    """One execution with everything its loops need."""

    api: SandboxApi
    ledger: CommittingLedger
    run_state: RunState
    writer: LedgerWriter
    client: Client
    request_log: RequestLog

    def make_poller(self, max_attempts: int = 3, patience_s: float = 60.0) -> Poller:
        """Make a poller that looks for an email."""
        config = replace(CONFIG, max_attempts=max_attempts, patience_s=patience_s)
        return Poller(self.run_state, self.writer, self.client, config)

    def make_dispatcher(
        self,
        poller: Poller,
        target: Target = CALL,
        price: int = SANDBOX_MAX_PRICE,
        bulk: int | None = None,
        new_up_to: int | None = None,
    ) -> Dispatcher:
        """Make a dispatcher that passes its tasks to the poller."""
        budget = Budget(None, price, "the credits cap is reached", "raise it")
        config = replace(poller.config, target=target, budget=budget, bulk=bulk)
        return Dispatcher(self.run_state, self.writer, self.client, config, poller.add_task, new_up_to)

    async def dispatch(self, dispatcher: Dispatcher, poller: Poller) -> None:
        """Run a dispatcher to its end; no new tasks come after that."""
        try:
            await dispatcher.run()
        finally:
            poller.no_new_tasks = True
            self.run_state.notify_change()

    async def submit_all(self, poller: Poller) -> None:
        """Submit every request, without polling."""
        submitting = asyncio.create_task(self.make_dispatcher(poller).run())
        await wait_until(lambda: self.run_state.queue_is_empty and not self.run_state.posts_in_flight)
        submitting.cancel()
        await asyncio.wait([submitting])
        self.run_state.queue_is_empty = False

    async def run_loops(self, poller: Poller | None = None, **dispatching: Any) -> None:
        """Submit and poll concurrently to the end, as the pipeline does."""
        poller = poller or self.make_poller()
        dispatcher = self.make_dispatcher(poller, **dispatching)
        await self.run_state.run_until_abort(self.dispatch(dispatcher, poller), poller.run())

    async def poll_once(self, poller: Poller) -> None:
        """Poll once the tasks that earlier executions left at the API."""
        poller.poll_once_more = True
        poller.add_earlier_tasks(await self.writer.submit(transitions.submitted_tasks), polled_before=False)
        await self.run_state.run_until_abort(poller.run())

    def add_open_tasks(self, *tasks: tuple[str, float], acknowledged: bool = False) -> None:
        """Add tasks of an earlier execution to the ledger: ids, and ages in seconds."""
        for task_id, age_s in tasks:
            claim = self.ledger.claim()
            at = self.run_state.clock.now_ms() - int(age_s * 1000)
            self.ledger.commit(transitions.record_accepted, [(claim.attempt_id, task_id, at)], BINDING)
            if acknowledged:
                self.ledger.commit(transitions.mark_acknowledged, [claim.attempt_id])

    async def poll_open_tasks(self, poller: Poller, *, polled_before: bool = False) -> None:
        """Poll to the end the tasks that earlier executions left at the API."""
        poller.add_earlier_tasks(await self.writer.submit(transitions.submitted_tasks), polled_before=polled_before)
        poller.no_new_tasks = True
        await self.run_state.run_until_abort(poller.run())


async def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Let the loops run until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition has no event to wait for
            await asyncio.sleep(0.001)


@asynccontextmanager
async def open_loops(
    api: SandboxApi,
    path: Path,
    leads: Iterable[int] = (),
    *,
    cap: int | None = None,
    in_flight: int = 200,
    rate: float | None = 1000.0,
    timing: Timeouts = SHORT_TIMEOUTS,
    clock: Clock | None = None,
) -> AsyncIterator[LoopHarness]:
    """Open a ledger, start an execution for these leads, and connect to the API."""
    ledger = CommittingLedger.open(path)
    clock = clock or SystemClock()
    ledger.now = clock.now_ms()
    ledger.start_execution(cap)
    ledger.enroll(leads)
    run_state = RunState(
        ledger.execution,
        clock,
        AdaptiveRateLimiter(rate),
        timing,
        in_flight_limit=InFlightLimit(in_flight),
        circuit_breaker=FastCircuitBreaker(),
        poll_schedule=FastPollSchedule(),
    )
    if rate is not None:
        run_state.rate_limiter.rate = rate  # a known rate is not probed, as with a real API
    client = RecordingClient(api.access, clock, post_timeout_s=timing.post_s, get_timeout_s=timing.get_s)
    client.request_log = RequestLog(run_state)
    try:
        async with client, LedgerWriter(ledger.wrapped) as writer:
            yield LoopHarness(api, ledger, run_state, writer, client, client.request_log)
    finally:
        ledger.wrapped.close()

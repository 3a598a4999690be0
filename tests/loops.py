"""The dispatcher and the poller over a real ledger, journal and client, against the sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enrich.api.answer import TaskReply
from enrich.api.client import Client
from enrich.breaker import Breaker
from enrich.budget import Budget
from enrich.dispatcher import Dispatcher
from enrich.execution import Execution, Timing
from enrich.model import Call, Clock, SystemClock
from enrich.pace import Pace
from enrich.poller import Poller
from enrich.polls import PollTimes
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from tests.books import BINDING, CALL, CommittingLedger
from tests.harness import SHORT_TIMEOUTS, SandboxApi

#: What `CALL` costs at worst in the sandbox, in millionths.
SANDBOX_MAX_PRICE = 3_510_000


class FastPollSchedule(PollTimes):
    """Asks early: the sandbox answers at once."""

    FIRST_GUESS_S = 0.05
    SHORTEST_S = 0.1


class FastCircuitBreaker(Breaker):
    """Does not pause for long."""

    FIRST_PAUSE_S = 0.05
    LONGEST_PAUSE_S = 0.2


@dataclass
class RequestLog:
    """What was seen of the requests."""

    execution: Execution
    posts: int = 0
    on_the_wire: int = 0
    most_on_the_wire: int = 0
    most_at_the_api: int = 0
    #: No POST leaves before so many have been on the wire at once.
    together: int = 0
    asked: list[str] = field(default_factory=list)


class RecordingClient(Client):
    """The real client; every request is seen."""

    watch: RequestLog

    async def run(self, waterfall: str, body: bytes, rows: int | None = None) -> str:
        """Count the POSTs, and those on the wire."""
        log = self.watch
        log.posts += 1
        log.on_the_wire += 1
        log.most_on_the_wire = max(log.most_on_the_wire, log.on_the_wire)
        open_tasks = log.execution.on_the_wire + log.execution.in_flight
        log.most_at_the_api = max(log.most_at_the_api, open_tasks)
        try:
            await wait_until(lambda: log.most_on_the_wire >= log.together)
            return await super().run(waterfall, body, rows)
        finally:
            log.on_the_wire -= 1

    async def task(self, task_id: str, *, fresh: bool = False) -> TaskReply:
        """Remember who was asked, in order."""
        self.watch.asked.append(task_id)
        return await super().task(task_id, fresh=fresh)


@dataclass
class LoopHarness:
    """One execution at work."""

    api: SandboxApi
    books: CommittingLedger
    execution: Execution
    journal: Journal
    client: Client
    watch: RequestLog

    def poller(self, max_attempts: int = 3, patience_s: float = 60.0) -> Poller:
        """Make a poller that looks for an e-mail."""
        return Poller(self.execution, self.journal, self.client, ("email",), max_attempts, patience_s)

    def dispatcher(
        self,
        poller: Poller,
        limit: int | None = None,
        call: Call = CALL,
        price: int = SANDBOX_MAX_PRICE,
        bulk: int | None = None,
    ) -> Dispatcher:
        """Make a dispatcher that hands its tasks to the poller."""
        budget = Budget(None, price, "the credits cap is reached", "raise it")
        return Dispatcher(
            self.execution, self.journal, self.client, call, budget, BINDING, poller.add, limit, bulk=bulk
        )

    async def dispatch(self, dispatcher: Dispatcher, poller: Poller) -> None:
        """Run a dispatcher to its end; then no more tasks can come."""
        try:
            await dispatcher.run()
        finally:
            poller.no_more = True
            self.execution.notify()

    async def work(self, poller: Poller | None = None, **dispatching: Any) -> None:
        """Submit and poll side by side to the end, as the pipeline does."""
        poller = poller or self.poller()
        dispatcher = self.dispatcher(poller, **dispatching)
        await self.execution.until_leaving(self.dispatch(dispatcher, poller), poller.run())

    async def rescue(self, poller: Poller) -> None:
        """Ask once for what earlier executions left at the API."""
        poller.last_round = True
        poller.adopt(await self.journal.do(Ledger.tasks), asked_before=False)
        await self.execution.until_leaving(poller.run())

    def left_behind(self, *tasks: tuple[str, float], alive: bool = False) -> None:
        """Put tasks of an earlier execution into the ledger: their ids, and how old they are in seconds."""
        for task_id, age_s in tasks:
            claim = self.books.claim()
            at = self.execution.clock.now_ms() - int(age_s * 1000)
            self.books.do(Ledger.accepted, [(claim.attempt_id, task_id, at)], BINDING)
            if alive:
                self.books.do(Ledger.alive, [claim.attempt_id])

    async def adopt(self, poller: Poller, *, asked_before: bool = False) -> None:
        """Poll to the end what earlier executions left at the API."""
        poller.adopt(await self.journal.do(Ledger.tasks), asked_before=asked_before)
        poller.no_more = True
        await self.execution.until_leaving(poller.run())


async def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Let the loops run until something holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is looked at tells nobody of a change
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
    timing: Timing = SHORT_TIMEOUTS,
    clock: Clock | None = None,
) -> AsyncIterator[LoopHarness]:
    """Open a ledger, start an execution that wants these leads, and connect to the API."""
    ledger = CommittingLedger.open(path)
    clock = clock or SystemClock()
    ledger.now = clock.now_ms()
    ledger.start(cap)
    ledger.enroll(leads)
    execution = Execution(
        ledger.execution,
        clock,
        Pace(rate),
        timing,
        in_flight_limit=in_flight,
        breaker=FastCircuitBreaker(),
        poll_times=FastPollSchedule(),
    )
    if rate is not None:
        execution.pace.rate = rate  # not felt for, as is right for a real API
    client = RecordingClient(api.access, clock, post_s=timing.post_s, get_s=timing.get_s)
    client.watch = RequestLog(execution)
    try:
        async with client, Journal(ledger.ledger) as writer:
            yield LoopHarness(api, ledger, execution, writer, client, client.watch)
    finally:
        ledger.ledger.close()

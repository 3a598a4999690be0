"""A pool of several workers, without ledger and Ray: reports are summed, and lost workers are replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from enrich.cluster import worker_pool
from enrich.cluster.worker import WorkerCommand, WorkerStatus, WorkerTask
from enrich.cluster.worker_pool import REPLACEMENTS_PER_WORKER, WorkerHandle, WorkerPool, posts_in_flight
from enrich.databar.clock import SystemClock
from enrich.databar.credentials import ApiAccess
from enrich.exit_codes import ExitCode
from enrich.job.locations import PostgresLocation as Server
from enrich.models import Call
from enrich.run.budget import Budget
from enrich.run.loops import WorkConfig
from enrich.run.poll_schedule import PollSchedule
from enrich.run.rate_limit import AdaptiveRateLimiter
from enrich.run.state import RunCounters, RunState, Timeouts


@dataclass(slots=True, eq=False)
class FakeWorker:
    """A worker that the test controls."""

    on_status: Callable[[WorkerHandle], None]
    status: WorkerStatus = field(default_factory=WorkerStatus)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    is_ready: bool = True
    exit_reason: str = "it fell"
    commands: list[WorkerCommand] = field(default_factory=list)

    def send(self, command: WorkerCommand) -> None:
        """Record a command, and exit on ABORT."""
        self.commands.append(command)
        if command is WorkerCommand.ABORT:
            self.exit(ended=True)

    async def end(self) -> None:
        """End without having finished."""
        self.exit(ended=False)

    def report(self, **status_fields: Any) -> None:
        """Report a status, unless the worker is gone."""
        if not self.gone.is_set():
            self.status = WorkerStatus(**status_fields)
            self.on_status(self)

    def exit(self, *, ended: bool) -> None:
        """Exit, with the work done (`ended`) or not."""
        if not self.gone.is_set():
            self.status = WorkerStatus(self.status.counters, is_done=ended)
            self.gone.set()
            self.on_status(self)


@dataclass(slots=True)
class FakeBackend:
    """The backend that starts fake workers."""

    workers: list[FakeWorker] = field(default_factory=list)
    #: This many of the next starts fail.
    failing_starts: int = 0

    def start_worker(self, _: WorkerTask, on_status: Callable[[WorkerHandle], None]) -> WorkerHandle:
        """Start one more fake worker."""
        if self.failing_starts:
            self.failing_starts -= 1
            raise ConnectionError("the cluster does not answer")
        self.workers.append(FakeWorker(on_status))
        return self.workers[-1]


def run_pool(
    *,
    steps: Sequence[Callable[[FakeBackend], None]],
    monkeypatch: pytest.MonkeyPatch,
    lease_s: float = 60.0,
    failing_starts: int = 0,
) -> WorkerPool:
    """Run a pool of three workers, apply the steps one after the other, and return when all workers have exited."""
    monkeypatch.setattr(worker_pool, "CHECK_EVERY_S", 0.02)
    monkeypatch.setattr(worker_pool, "START_TIMEOUT_S", 0.5)
    monkeypatch.setattr(worker_pool, "share_rate", lambda *_: nullcontext())
    run_state = RunState(1, SystemClock(), AdaptiveRateLimiter(None))
    budget = Budget(None, 0, "", "")
    work_config = WorkConfig(Call("email_getter", (833,)), budget, {}, None, ("email",), 3, 60.0, workers=3)
    ledger_location = Server("postgresql://nowhere", "enrich", Path(), lease_s)
    access = ApiAccess("http://127.0.0.1", SecretStr("none"))
    worker_task = WorkerTask(work_config, access, ledger_location, 1, Timeouts(), 10, 60.0, PollSchedule())
    backend = FakeBackend(failing_starts=failing_starts)
    pool = WorkerPool(run_state, worker_task, backend.start_worker)

    async def run_steps() -> None:
        run = asyncio.create_task(pool.run())
        for step in steps:
            await asyncio.sleep(0.1)
            step(backend)
        async with asyncio.timeout(10):
            await run

    asyncio.run(run_steps())
    return pool


def finish_all(backend: FakeBackend) -> None:
    """Let all workers that are left finish."""
    for worker in backend.workers:
        worker.report()
        worker.exit(ended=True)


@pytest.mark.parametrize("failing_starts", [1, 3])
def test_worker_that_cannot_be_started_is_lost(failing_starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others do the work. Without any, the pool ends, and the process that started it does the work."""
    pool = run_pool(steps=[finish_all], monkeypatch=monkeypatch, failing_starts=failing_starts)

    assert pool.lost_reasons == ["the cluster does not answer"] * failing_starts


def test_status_of_all_workers_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of exited workers count too; a worker that stops because its key was refused stops all others."""

    def report_and_lose_first(backend: FakeBackend) -> None:
        for worker in backend.workers:
            worker.report(counters=RunCounters(submitted=2))
        backend.workers[0].exit(ended=False)

    def refuse_key(backend: FakeBackend) -> None:
        refused = {ExitCode.KEY: ("the API refuses the key", None)}
        backend.workers[1].report(counters=RunCounters(submitted=3), exit_reasons=refused, stop_submitting=True)

    sent_commands: list[list[WorkerCommand]] = []

    def finish_others(backend: FakeBackend) -> None:
        sent_commands.extend(worker.commands for worker in backend.workers)
        for worker in backend.workers[1:]:
            worker.exit(ended=True)

    pool = run_pool(steps=[report_and_lose_first, refuse_key, finish_others], monkeypatch=monkeypatch)

    assert pool.run_state.counters.submitted == 2 + 3 + 2
    assert pool.run_state.exit_reasons[ExitCode.KEY].message == "the API refuses the key"
    assert all(WorkerCommand.STOP_SUBMITTING in commands for commands in sent_commands[1:])
    assert pool.lost_reasons == ["it fell"]


def test_lost_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost worker is replaced while the others continue."""
    seen: list[FakeBackend] = []

    def lose_first_worker(backend: FakeBackend) -> None:
        seen.append(backend)
        for worker in backend.workers:
            worker.report()
        backend.workers[0].exit(ended=False)

    pool = run_pool(steps=[lose_first_worker, finish_all], monkeypatch=monkeypatch)

    assert len(seen[0].workers) == 4
    assert WorkerCommand.STOP_SUBMITTING not in seen[0].workers[1].commands
    assert pool.lost_reasons == ["it fell"]


def test_worker_lost_before_first_status_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker lost before its first report is replaced: it had started and was killed."""
    seen: list[FakeBackend] = []

    def lose_second_worker(backend: FakeBackend) -> None:
        seen.append(backend)
        backend.workers[1].exit(ended=False)

    pool = run_pool(steps=[lose_second_worker, finish_all], monkeypatch=monkeypatch)

    assert len(seen[0].workers) == 4
    assert pool.lost_reasons == ["it fell"]


def test_replacement_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker is replaced a limited number of times; then the pool ends, and the driver does the rest."""

    def lose_all_workers(backend: FakeBackend) -> None:
        for worker in backend.workers:
            worker.report()
            worker.exit(ended=False)

    pool = run_pool(steps=[lose_all_workers] * (REPLACEMENTS_PER_WORKER + 2), monkeypatch=monkeypatch)

    assert len(pool.lost_reasons) == 3 + REPLACEMENTS_PER_WORKER * 3


def test_silent_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker silent for two leases is replaced, when its tasks belong to other workers."""

    def report_all_but_third(backend: FakeBackend) -> None:
        for worker in [*backend.workers[:2], *backend.workers[3:]]:
            worker.report()

    def report_all(backend: FakeBackend) -> None:
        for worker in backend.workers:
            worker.report()

    pool = run_pool(steps=[report_all, *[report_all_but_third] * 5, finish_all], monkeypatch=monkeypatch, lease_s=0.2)

    assert pool.lost_reasons == ["it said nothing any more"]


def test_late_worker_is_not_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool does not wait for a worker that the cluster has no room for."""

    def finish_two_workers(backend: FakeBackend) -> None:
        for worker in backend.workers[:2]:
            worker.report()
            worker.exit(ended=True)

    assert run_pool(steps=[finish_two_workers], monkeypatch=monkeypatch).lost_reasons == []


def test_worker_that_never_starts_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """When no worker starts, the pool ends and the driver does the work."""
    pool = run_pool(steps=[], monkeypatch=monkeypatch)

    assert set(pool.lost_reasons) == {"it said nothing any more"}


def test_post_counts_as_in_flight_until_worker_stops() -> None:
    """Until a worker reports that it has stopped submitting, one POST counts as in flight once the run closes."""
    worker = FakeWorker(lambda _: None)

    assert (posts_in_flight(worker, closing=False), posts_in_flight(worker, closing=True)) == (0, 1)
    worker.status = WorkerStatus(posts_in_flight=3)
    assert posts_in_flight(worker, closing=True) == 3
    worker.status = WorkerStatus(stop_submitting=True)
    assert posts_in_flight(worker, closing=True) == 0

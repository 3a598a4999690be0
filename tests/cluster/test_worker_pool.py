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

    def report(self, **told: Any) -> None:
        """Report a status, unless the worker is gone."""
        if not self.gone.is_set():
            self.status = WorkerStatus(**told)
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

    def start_worker(self, _: WorkerTask, on_status: Callable[[WorkerHandle], None]) -> WorkerHandle:
        """Start one more fake worker."""
        self.workers.append(FakeWorker(on_status))
        return self.workers[-1]


def run_pool(
    *, steps: Sequence[Callable[[FakeBackend], None]], monkeypatch: pytest.MonkeyPatch, lease_s: float = 60.0
) -> WorkerPool:
    """Run a pool of three workers, apply the steps one after the other, and return when all workers have exited."""
    monkeypatch.setattr(worker_pool, "CHECK_EVERY_S", 0.02)
    monkeypatch.setattr(worker_pool, "START_TIMEOUT_S", 0.5)
    monkeypatch.setattr(worker_pool, "share_rate", lambda *_: nullcontext())
    execution = RunState(1, SystemClock(), AdaptiveRateLimiter(None))
    budget = Budget(None, 0, "", "")
    shift = WorkConfig(Call("email_getter", (833,)), budget, {}, None, ("email",), 3, 60.0, workers=3)
    ledger_location = Server("postgresql://nowhere", "enrich", Path(), lease_s)
    access = ApiAccess("http://127.0.0.1", SecretStr("none"))
    worker_task = WorkerTask(shift, access, ledger_location, 1, Timeouts(), 10, 60.0, PollSchedule())
    stage = FakeBackend()
    pool = WorkerPool(execution, worker_task, stage.start_worker)

    async def live() -> None:
        run = asyncio.create_task(pool.run())
        for scene in steps:
            await asyncio.sleep(0.1)
            scene(stage)
        async with asyncio.timeout(10):
            await run

    asyncio.run(live())
    return pool


def finish_all(backend: FakeBackend) -> None:
    """Let all workers that are left finish."""
    for worker in backend.workers:
        worker.report()
        worker.exit(ended=True)


def test_status_of_all_workers_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of exited workers count too; a worker that stops because its key was refused stops all others."""

    def work(backend: FakeBackend) -> None:
        for worker in backend.workers:
            worker.report(counters=RunCounters(submitted=2))
        backend.workers[0].exit(ended=False)

    def stop(backend: FakeBackend) -> None:
        refused = {ExitCode.KEY: ("the API refuses the key", None)}
        backend.workers[1].report(counters=RunCounters(submitted=3), exit_reasons=refused, stop_submitting=True)

    words: list[list[WorkerCommand]] = []

    def end(backend: FakeBackend) -> None:
        words.extend(puppet.commands for puppet in backend.workers)
        for worker in backend.workers[1:]:
            worker.exit(ended=True)

    pool = run_pool(steps=[work, stop, end], monkeypatch=monkeypatch)

    assert pool.run_state.counters.submitted == 2 + 3 + 2
    assert pool.run_state.exit_reasons[ExitCode.KEY].message == "the API refuses the key"
    assert all(WorkerCommand.STOP_SUBMITTING in said for said in words[1:])
    assert pool.lost_reasons == ["it fell"]


def test_a_worker_that_is_lost_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost worker is replaced while the others continue."""
    seen: list[FakeBackend] = []

    def fall(stage: FakeBackend) -> None:
        seen.append(stage)
        for puppet in stage.workers:
            puppet.report()
        stage.workers[0].exit(ended=False)

    crew = run_pool(steps=[fall, finish_all], monkeypatch=monkeypatch)

    assert len(seen[0].workers) == 4
    assert WorkerCommand.STOP_SUBMITTING not in seen[0].workers[1].commands
    assert crew.lost_reasons == ["it fell"]


def test_worker_lost_before_first_status_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker lost before its first report is replaced: it had started and was killed."""
    seen: list[FakeBackend] = []

    def fall(backend: FakeBackend) -> None:
        seen.append(backend)
        backend.workers[1].exit(ended=False)

    pool = run_pool(steps=[fall, finish_all], monkeypatch=monkeypatch)

    assert len(seen[0].workers) == 4
    assert pool.lost_reasons == ["it fell"]


def test_replacement_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker is replaced a limited number of times; then the pool ends, and the driver does the rest."""

    def fall(backend: FakeBackend) -> None:
        for worker in backend.workers:
            worker.report()
            worker.exit(ended=False)

    pool = run_pool(steps=[fall] * (REPLACEMENTS_PER_WORKER + 2), monkeypatch=monkeypatch)

    assert len(pool.lost_reasons) == 3 + REPLACEMENTS_PER_WORKER * 3


def test_silent_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker silent for two leases is replaced, when its tasks belong to other workers."""

    def speak(backend: FakeBackend) -> None:
        for worker in [*backend.workers[:2], *backend.workers[3:]]:
            worker.report()

    def begin(backend: FakeBackend) -> None:
        for worker in backend.workers:
            worker.report()

    pool = run_pool(steps=[begin, *[speak] * 5, finish_all], monkeypatch=monkeypatch, lease_s=0.2)

    assert pool.lost_reasons == ["it said nothing any more"]


def test_late_worker_is_not_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool does not wait for a worker that the cluster has no room for."""

    def some_end(backend: FakeBackend) -> None:
        for worker in backend.workers[:2]:
            worker.report()
            worker.exit(ended=True)

    assert run_pool(steps=[some_end], monkeypatch=monkeypatch).lost_reasons == []


def test_worker_that_never_starts_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """When no worker starts, the pool ends and the driver does the work."""
    pool = run_pool(steps=[], monkeypatch=monkeypatch)

    assert set(pool.lost_reasons) == {"it said nothing any more"}


def test_a_post_may_be_on_the_wire_until_a_worker_says_that_it_sends_no_more() -> None:
    """Until a worker reports that it has stopped submitting, one POST counts as in flight once the run closes."""
    puppet = FakeWorker(lambda _: None)

    assert (posts_in_flight(puppet, closing=False), posts_in_flight(puppet, closing=True)) == (0, 1)
    puppet.status = WorkerStatus(posts_in_flight=3)
    assert posts_in_flight(puppet, closing=True) == 3
    puppet.status = WorkerStatus(stop_submitting=True)
    assert posts_in_flight(puppet, closing=True) == 0

"""A pool of several workers, without ledger and cluster: reports are summed, and lost workers are replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr

from enrich.cluster.worker import StopRequest, WorkerStatus, WorkerTask
from enrich.databar.clock import SystemClock
from enrich.databar.environment import ApiAccess
from enrich.exit_codes import ExitCode
from enrich.job.locations import PostgresLocation as Server
from enrich.job.target import Target, TargetKind
from enrich.run.budget import Budget
from enrich.run.poll_schedule import PollSchedule
from enrich.run.rate_limit import AdaptiveRateLimiter, InFlightLimit
from enrich.run.run_state import RunCounters, RunState, Timeouts, WorkConfig

if TYPE_CHECKING:
    from enrich.cluster.worker_pool import WorkerPool

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with the extra `cluster`"),
]


@dataclass(frozen=True, slots=True)
class FakeMethod:
    """A method of a fake actor, called as one of Ray."""

    remote: Callable[..., Awaitable[WorkerStatus]]


@dataclass(slots=True, eq=False)
class FakeActor:
    """An actor that the test controls. It answers once it has `started`."""

    status: WorkerStatus = field(default_factory=WorkerStatus)
    request: StopRequest = field(default_factory=StopRequest)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    is_lost: bool = False

    @property
    def exchange(self) -> FakeMethod:
        """Return the method that takes a stop request and returns the status."""
        return FakeMethod(self._exchange)

    @property
    def work(self) -> FakeMethod:
        """Return the method that works until the test ends it."""
        return FakeMethod(self._work)

    async def _exchange(self, request: StopRequest) -> WorkerStatus:
        await self.started.wait()
        self._raise_if_lost()
        self.request = request
        if request.abort:
            self.ended.set()
        return self.status

    async def _work(self, _version: str, _task: WorkerTask, _request: StopRequest) -> WorkerStatus:
        await self.ended.wait()
        self._raise_if_lost()
        return self.status

    def _raise_if_lost(self) -> None:
        if self.is_lost:
            from ray.exceptions import ActorDiedError  # noqa: PLC0415 - slow to import, and not always installed

            raise ActorDiedError

    def report(self, **status_fields: Any) -> None:
        """Start, and have this status from now on."""
        self.status = WorkerStatus(**status_fields)
        self.started.set()

    def exit(self, *, ended: bool) -> None:
        """Exit, with the work done (`ended`) or not."""
        self.is_lost = not ended and not self.ended.is_set()
        self.started.set()
        self.ended.set()


@dataclass(slots=True)
class FakeBackend:
    """The backend that starts fake actors."""

    workers: list[FakeActor] = field(default_factory=list)
    #: This many of the next starts fail.
    failing_starts: int = 0

    def start_actor(self) -> FakeActor:
        """Start one more fake actor."""
        if self.failing_starts:
            self.failing_starts -= 1
            raise ConnectionError("the cluster does not answer")
        self.workers.append(FakeActor())
        return self.workers[-1]


def run_pool(
    *,
    steps: Sequence[Callable[[FakeBackend], None]],
    monkeypatch: pytest.MonkeyPatch,
    lease_s: float = 60.0,
    failing_starts: int = 0,
) -> WorkerPool:
    """Run a pool of three workers, apply the steps one after the other, and return when all workers have exited."""
    from enrich.cluster import worker_pool  # noqa: PLC0415 - imports Ray

    monkeypatch.setattr(worker_pool, "STATUS_EVERY_S", 0.02)
    monkeypatch.setattr(worker_pool, "START_TIMEOUT_S", 0.5)
    monkeypatch.setattr("ray.kill", lambda actor: actor.exit(ended=False))
    run_state = RunState(1, SystemClock(), AdaptiveRateLimiter(None))
    budget = Budget(None, 0, "", "")
    work_config = WorkConfig(
        Target(TargetKind.WATERFALL, "email_getter", (833,)),
        frozenset(),
        budget,
        {},
        None,
        ("email",),
        3,
        60.0,
    )
    ledger_location = Server("postgresql://nowhere", "enrich", Path(), lease_s)
    access = ApiAccess("http://127.0.0.1", SecretStr("none"))
    worker_task = WorkerTask(
        work_config, access, ledger_location, 1, Timeouts(), InFlightLimit(30, 3), inf, PollSchedule()
    )

    async def run_steps() -> WorkerPool:
        backend = FakeBackend(failing_starts=failing_starts)
        pool = worker_pool.WorkerPool(run_state, worker_task, backend.start_actor)
        run = asyncio.create_task(pool.run())
        for step in steps:
            await asyncio.sleep(0.1)
            step(backend)
        async with asyncio.timeout(10):
            await run
        return pool

    return asyncio.run(run_steps())


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

    def report(backend: FakeBackend) -> None:
        for worker in backend.workers:
            worker.report(counters=RunCounters(submitted=2))

    def lose_first(backend: FakeBackend) -> None:
        backend.workers[0].exit(ended=False)

    def refuse_key(backend: FakeBackend) -> None:
        refused = {ExitCode.KEY: ("the API rejects the key", None)}
        backend.workers[1].report(counters=RunCounters(submitted=3), exit_reasons=refused, stop_submitting=True)

    requests: list[StopRequest] = []

    def finish_others(backend: FakeBackend) -> None:
        requests.extend(worker.request for worker in backend.workers[1:3])
        for worker in backend.workers[1:]:
            worker.exit(ended=True)

    pool = run_pool(steps=[report, lose_first, refuse_key, finish_others], monkeypatch=monkeypatch)

    assert pool.run_state.counters.submitted == 2 + 3 + 2
    assert pool.run_state.exit_reasons[ExitCode.KEY].message == "the API rejects the key"
    assert all(request.submitting for request in requests)
    assert pool.lost_reasons == ["a worker process of the cluster ended unexpectedly"]


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
    assert not seen[0].workers[1].request.submitting
    assert pool.lost_reasons == ["a worker process of the cluster ended unexpectedly"]


def test_worker_lost_before_first_status_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker lost before its first report is replaced: it had started and was killed."""
    seen: list[FakeBackend] = []

    def lose_second_worker(backend: FakeBackend) -> None:
        seen.append(backend)
        backend.workers[1].exit(ended=False)

    pool = run_pool(steps=[lose_second_worker, finish_all], monkeypatch=monkeypatch)

    assert len(seen[0].workers) == 4
    assert pool.lost_reasons == ["a worker process of the cluster ended unexpectedly"]


def test_replacement_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker is replaced a limited number of times; then the pool ends, and the driver does the rest."""
    from enrich.cluster.worker_pool import REPLACEMENTS_PER_WORKER  # noqa: PLC0415 - imports Ray

    def lose_all_workers(backend: FakeBackend) -> None:
        for worker in backend.workers:
            worker.report()
            worker.exit(ended=False)

    pool = run_pool(steps=[lose_all_workers] * (REPLACEMENTS_PER_WORKER + 2), monkeypatch=monkeypatch)

    assert len(pool.lost_reasons) == 3 + REPLACEMENTS_PER_WORKER * 3


def test_silent_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker silent for two leases is replaced, when its tasks belong to other workers."""
    seen: list[FakeBackend] = []

    def report_all(backend: FakeBackend) -> None:
        seen.append(backend)
        for worker in backend.workers:
            worker.report()

    def silence_third(backend: FakeBackend) -> None:
        backend.workers[2].started.clear()

    steps = [report_all, silence_third, *[lambda _: None] * 5, finish_all]
    pool = run_pool(steps=steps, monkeypatch=monkeypatch, lease_s=0.2)

    assert pool.lost_reasons == ["it stopped responding"]
    assert len(seen[0].workers) == 4


def test_worker_that_starts_late_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that starts when nothing more may be sent learns this before it has its task."""
    requests: list[StopRequest] = []

    class RecordingActor(FakeActor):
        async def _work(self, _version: str, _task: WorkerTask, request: StopRequest) -> WorkerStatus:
            requests.append(request)
            return await super()._work(_version, _task, request)

    monkeypatch.setattr("tests.cluster.test_worker_pool.FakeActor", RecordingActor)

    def refuse_key(backend: FakeBackend) -> None:
        for worker in backend.workers[:2]:
            worker.report(stop_submitting=True)

    pool = run_pool(steps=[refuse_key, finish_all], monkeypatch=monkeypatch)

    assert [request.submitting for request in requests] == [False, False, True]
    assert pool.lost_reasons == []


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

    assert set(pool.lost_reasons) == {"it stopped responding"}


def test_post_counts_as_in_flight_until_worker_stops() -> None:
    """Until a worker reports that it has stopped submitting, one POST counts as in flight once the run closes."""
    from enrich.cluster.worker_pool import StartedWorker  # noqa: PLC0415 - imports Ray

    worker = StartedWorker(has_reported=True)

    assert (worker.posts_in_flight(closing=False), worker.posts_in_flight(closing=True)) == (0, 1)
    worker.status = WorkerStatus(posts_in_flight=3)
    assert worker.posts_in_flight(closing=True) == 3
    worker.status = WorkerStatus(stop_submitting=True)
    assert worker.posts_in_flight(closing=True) == 0

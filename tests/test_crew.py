"""Several workers: their reports are added up, one that is lost is replaced. Without a ledger and without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from enrich import crew as crews
from enrich.api.credentials import Access
from enrich.budget import Budget
from enrich.crew import SPARES, Crew, on_the_wire
from enrich.engine import Hand
from enrich.errors import Exit
from enrich.execution import Execution, Tally, Timing
from enrich.model import Call, SystemClock
from enrich.pace import Pace
from enrich.place import Postgres as Server
from enrich.polls import PollTimes
from enrich.shift import Shift
from enrich.worker import Errand, Told, Word


@dataclass(slots=True, eq=False)
class FakeWorker:
    """A worker that does what a test says."""

    heard: Callable[[Hand], None]
    told: Told = field(default_factory=Told)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    listening: bool = True
    why: str = "it fell"
    words: list[Word] = field(default_factory=list)

    def say(self, word: Word) -> None:
        """Remember what was said, and leave when told so."""
        self.words.append(word)
        if word is Word.LEAVE:
            self.leave(ended=True)

    async def end(self) -> None:
        """Go."""
        self.leave(ended=False)

    def tell(self, **told: Any) -> None:
        """Tell something, if it is there."""
        if not self.gone.is_set():
            self.told = Told(**told)
            self.heard(self)

    def leave(self, *, ended: bool) -> None:
        """Go, with the work done or not."""
        if not self.gone.is_set():
            self.told = Told(self.told.tally, ended=ended)
            self.gone.set()
            self.heard(self)


@dataclass(slots=True)
class FakeBackend:
    """Where puppets come from."""

    hired: list[FakeWorker] = field(default_factory=list)

    def hire(self, _: Errand, heard: Callable[[Hand], None]) -> Hand:
        """Have one more."""
        self.hired.append(FakeWorker(heard))
        return self.hired[-1]


def run_pool(
    *, steps: Sequence[Callable[[FakeBackend], None]], monkeypatch: pytest.MonkeyPatch, lease_s: float = 60.0
) -> Crew:
    """Let a crew of three live through scenes, one after the other, until none of them is left."""
    monkeypatch.setattr(crews, "LOOK_S", 0.02)
    monkeypatch.setattr(crews, "START_S", 0.5)
    monkeypatch.setattr(crews, "shared", lambda *_: nullcontext())
    execution = Execution(1, SystemClock(), Pace(None))
    budget = Budget(None, 0, "", "")
    shift = Shift(Call("email_getter", (833,)), budget, {}, None, ("email",), 3, 60.0, workers=3)
    ledger_location = Server("postgresql://nowhere", "enrich", Path(), lease_s)
    access = Access("http://127.0.0.1", SecretStr("none"))
    worker_task = Errand(shift, access, ledger_location, 1, Timing(), 10, 60.0, PollTimes())
    stage = FakeBackend()
    pool = Crew(execution, worker_task, stage.hire)

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
    """Let all end in peace who are there."""
    for worker in backend.hired:
        worker.tell()
        worker.leave(ended=True)


def test_status_of_all_workers_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what those told who are gone; one that sends no more, as its key is refused, stops all."""

    def work(backend: FakeBackend) -> None:
        for worker in backend.hired:
            worker.tell(tally=Tally(submitted=2))
        backend.hired[0].leave(ended=False)

    def stop(backend: FakeBackend) -> None:
        refused = {Exit.KEY: ("the API refuses the key", None)}
        backend.hired[1].tell(tally=Tally(submitted=3), reasons=refused, closing=True)

    words: list[list[Word]] = []

    def end(backend: FakeBackend) -> None:
        words.extend(puppet.words for puppet in backend.hired)
        for worker in backend.hired[1:]:
            worker.leave(ended=True)

    pool = run_pool(steps=[work, stop, end], monkeypatch=monkeypatch)

    assert pool.execution.tally.submitted == 2 + 3 + 2
    assert pool.execution.reasons[Exit.KEY].message == "the API refuses the key"
    assert all(Word.CLOSE in said for said in words[1:])
    assert pool.lost == ["it fell"]


def test_a_worker_that_is_lost_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on meanwhile."""
    seen: list[FakeBackend] = []

    def fall(stage: FakeBackend) -> None:
        seen.append(stage)
        for puppet in stage.hired:
            puppet.tell()
        stage.hired[0].leave(ended=False)

    crew = run_pool(steps=[fall, finish_all], monkeypatch=monkeypatch)

    assert len(seen[0].hired) == 4
    assert Word.CLOSE not in seen[0].hired[1].words
    assert crew.lost == ["it fell"]


def test_worker_lost_before_first_status_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there: somebody has killed it."""
    seen: list[FakeBackend] = []

    def fall(backend: FakeBackend) -> None:
        seen.append(backend)
        backend.hired[1].leave(ended=False)

    pool = run_pool(steps=[fall, finish_all], monkeypatch=monkeypatch)

    assert len(seen[0].hired) == 4
    assert pool.lost == ["it fell"]


def test_replacement_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end nobody is left, and what is left is the boss's."""

    def fall(backend: FakeBackend) -> None:
        for worker in backend.hired:
            worker.tell()
            worker.leave(ended=False)

    pool = run_pool(steps=[fall] * (SPARES + 2), monkeypatch=monkeypatch)

    assert len(pool.lost) == 3 + SPARES * 3


def test_silent_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two leases, when what it was at is another's; one is hired in its place."""

    def speak(backend: FakeBackend) -> None:
        for worker in [*backend.hired[:2], *backend.hired[3:]]:
            worker.tell()

    def begin(backend: FakeBackend) -> None:
        for worker in backend.hired:
            worker.tell()

    pool = run_pool(steps=[begin, *[speak] * 5, finish_all], monkeypatch=monkeypatch, lease_s=0.2)

    assert pool.lost == ["it said nothing any more"]


def test_late_worker_is_not_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster may have no room for all: the others do it."""

    def some_end(backend: FakeBackend) -> None:
        for worker in backend.hired[:2]:
            worker.tell()
            worker.leave(ended=True)

    assert run_pool(steps=[some_end], monkeypatch=monkeypatch).lost == []


def test_worker_that_never_starts_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """When there is room for none, the boss does it."""
    pool = run_pool(steps=[], monkeypatch=monkeypatch)

    assert set(pool.lost) == {"it said nothing any more"}


def test_a_post_may_be_on_the_wire_until_a_worker_says_that_it_sends_no_more() -> None:
    """A signal may come before the first report of a worker that has sent just now: its answer is waited for."""
    puppet = FakeWorker(lambda _: None)

    assert (on_the_wire(puppet, closing=False), on_the_wire(puppet, closing=True)) == (0, 1)
    puppet.told = Told(on_the_wire=3)
    assert on_the_wire(puppet, closing=True) == 3
    puppet.told = Told(closing=True)
    assert on_the_wire(puppet, closing=True) == 0

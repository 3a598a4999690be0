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
class Puppet:
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
class Stage:
    """Where puppets come from."""

    hired: list[Puppet] = field(default_factory=list)

    def hire(self, _: Errand, heard: Callable[[Hand], None]) -> Hand:
        """Have one more."""
        self.hired.append(Puppet(heard))
        return self.hired[-1]


def play(*, scenes: Sequence[Callable[[Stage], None]], monkeypatch: pytest.MonkeyPatch, lease_s: float = 60.0) -> Crew:
    """Let a crew of three live through scenes, one after the other, until none of them is left."""
    monkeypatch.setattr(crews, "LOOK_S", 0.02)
    monkeypatch.setattr(crews, "START_S", 0.5)
    monkeypatch.setattr(crews, "shared", lambda *_: nullcontext())
    execution = Execution(1, SystemClock(), Pace(None))
    budget = Budget(None, 0, "", "")
    shift = Shift(Call("email_getter", (833,)), budget, {}, None, ("email",), 3, 60.0, workers=3)
    place = Server("postgresql://nowhere", "enrich", Path(), lease_s)
    access = Access("http://127.0.0.1", SecretStr("none"))
    errand = Errand(shift, access, place, 1, Timing(), 10, 60.0, PollTimes())
    stage = Stage()
    crew = Crew(execution, errand, stage.hire)

    async def live() -> None:
        run = asyncio.create_task(crew.run())
        for scene in scenes:
            await asyncio.sleep(0.1)
            scene(stage)
        async with asyncio.timeout(10):
            await run

    asyncio.run(live())
    return crew


def all_end(stage: Stage) -> None:
    """Let all end in peace who are there."""
    for puppet in stage.hired:
        puppet.tell()
        puppet.leave(ended=True)


def test_what_all_have_told_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what those told who are gone; one that sends no more, as its key is refused, stops all."""

    def work(stage: Stage) -> None:
        for puppet in stage.hired:
            puppet.tell(tally=Tally(submitted=2))
        stage.hired[0].leave(ended=False)

    def stop(stage: Stage) -> None:
        refused = {Exit.KEY: ("the API refuses the key", None)}
        stage.hired[1].tell(tally=Tally(submitted=3), reasons=refused, closing=True)

    words: list[list[Word]] = []

    def end(stage: Stage) -> None:
        words.extend(puppet.words for puppet in stage.hired)
        for puppet in stage.hired[1:]:
            puppet.leave(ended=True)

    crew = play(scenes=[work, stop, end], monkeypatch=monkeypatch)

    assert crew.execution.tally.submitted == 2 + 3 + 2
    assert crew.execution.reasons[Exit.KEY].message == "the API refuses the key"
    assert all(Word.CLOSE in said for said in words[1:])
    assert crew.lost == ["it fell"]


def test_a_worker_that_is_lost_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on meanwhile."""
    seen: list[Stage] = []

    def fall(stage: Stage) -> None:
        seen.append(stage)
        for puppet in stage.hired:
            puppet.tell()
        stage.hired[0].leave(ended=False)

    crew = play(scenes=[fall, all_end], monkeypatch=monkeypatch)

    assert len(seen[0].hired) == 4
    assert Word.CLOSE not in seen[0].hired[1].words
    assert crew.lost == ["it fell"]


def test_who_falls_before_its_first_word_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there: somebody has killed it."""
    seen: list[Stage] = []

    def fall(stage: Stage) -> None:
        seen.append(stage)
        stage.hired[1].leave(ended=False)

    crew = play(scenes=[fall, all_end], monkeypatch=monkeypatch)

    assert len(seen[0].hired) == 4
    assert crew.lost == ["it fell"]


def test_those_who_always_fall_are_not_replaced_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end nobody is left, and what is left is the boss's."""

    def fall(stage: Stage) -> None:
        for puppet in stage.hired:
            puppet.tell()
            puppet.leave(ended=False)

    crew = play(scenes=[fall] * (SPARES + 2), monkeypatch=monkeypatch)

    assert len(crew.lost) == 3 + SPARES * 3


def test_who_says_nothing_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two leases, when what it was at is another's; one is hired in its place."""

    def speak(stage: Stage) -> None:
        for puppet in [*stage.hired[:2], *stage.hired[3:]]:
            puppet.tell()

    def begin(stage: Stage) -> None:
        for puppet in stage.hired:
            puppet.tell()

    crew = play(scenes=[begin, *[speak] * 5, all_end], monkeypatch=monkeypatch, lease_s=0.2)

    assert crew.lost == ["it said nothing any more"]


def test_who_comes_when_all_is_done_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster may have no room for all: the others do it."""

    def some_end(stage: Stage) -> None:
        for puppet in stage.hired[:2]:
            puppet.tell()
            puppet.leave(ended=True)

    assert play(scenes=[some_end], monkeypatch=monkeypatch).lost == []


def test_who_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """When there is room for none, the boss does it."""
    crew = play(scenes=[], monkeypatch=monkeypatch)

    assert set(crew.lost) == {"it said nothing any more"}


def test_a_post_may_be_on_the_wire_until_a_worker_says_that_it_sends_no_more() -> None:
    """A signal may come before the first report of a worker that has sent just now: its answer is waited for."""
    puppet = Puppet(lambda _: None)

    assert (on_the_wire(puppet, closing=False), on_the_wire(puppet, closing=True)) == (0, 1)
    puppet.told = Told(on_the_wire=3)
    assert on_the_wire(puppet, closing=True) == 3
    puppet.told = Told(closing=True)
    assert on_the_wire(puppet, closing=True) == 0

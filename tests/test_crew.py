"""`--processes` at a ledger on a server: who is lost is replaced, and what he was at is another's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from enrich import crew as crews
from enrich.api.credentials import Access
from enrich.budget import Budget
from enrich.crew import SPARES, Crew, Hand, Hire
from enrich.execution import Execution, Tally, Timing
from enrich.model import Call, SystemClock
from enrich.pace import Pace
from enrich.place import Postgres as Server
from enrich.polls import PollTimes
from enrich.receipt import Receipt
from enrich.shift import Shift
from enrich.worker import Errand, Told, Word
from tests.harness import Api, Office, kill, people, serving, until
from tests.postgres import Postgres
from tests.test_processes import RUN, accepted, alive, all_answered_once, answers, workers

#: Seconds of a lease here.
LEASE_S = 2


@pytest.fixture
def office(tmp_path: Path, postgres: Postgres) -> Office:
    """Make an office whose ledger is on the server, with short leases."""
    folder = tmp_path / "office"
    folder.mkdir()
    made = Office(folder, f"{postgres.url()}&lease={LEASE_S}", postgres.environ)
    made.write_job(limits="{requests_per_second: 120}")
    return made


@contextmanager
def at_work(office: Office, api: Api, processes: int = 3, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run with several processes; whatever happens, none of them is left."""
    process = office.start(*RUN, "--processes", str(processes), *more, api=api)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill(process)
        for stream in (process.stdout, process.stderr):
            stream.close() if stream else None


def end_of(process: subprocess.Popen[str]) -> Receipt:
    """Wait for the end of a run."""
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return Receipt(**json.loads(out))


def busy(process: subprocess.Popen[str], office: Office) -> list[int]:
    """Wait until all workers of a run are at work; return them."""
    until(lambda: len(workers(process)) == 3)
    until(lambda: office.sql("SELECT count(DISTINCT owner_id) FROM attempts") == [(3,)])
    return workers(process)


@pytest.mark.long
def test_several_processes_answer_as_one_does(tmp_path: Path, office: Office, postgres: Postgres) -> None:
    """The same output, each lead is bought once, all keep to one rate; no lease is left."""
    office.write_job(limits="{requests_per_second: 50}")
    office.write_leads(people(60))
    told = []
    for number in (1, 3):
        with serving(tmp_path / f"{number}.db", failure_rate=0.1, rate=55.0, burst=15) as api:
            done = office.command(*RUN, "--processes", str(number), "--ledger", postgres.url(), "--new-ledger", api=api)
            assert api.audit()["paid_twice"] == 0
        told.append((done.code, answers(office), done.receipt["credits_spent"], done.receipt["rate_limited"]))

    assert told[0] == told[1]
    assert told[0][3] == 0


@pytest.mark.long
def test_who_is_killed_has_heirs(tmp_path: Path, office: Office) -> None:
    """What it had on the wire is in doubt and told so; all else is answered, by the others and one in its place."""
    office.write_job(limits="{requests_per_second: 60}")
    office.write_leads(people(250))
    with serving(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api, at_work(office, api) as process:
        before = busy(process, office)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: len(set(workers(process)) - set(before)) == 1)
        receipt = end_of(process)
        all_answered_once(office, api, receipt, 250)

    assert receipt.exit_code == (14 if receipt.in_doubt else 0)
    assert any("killed by SIGKILL" in note for note in receipt.notes)
    assert office.sql("SELECT count(*) FROM owners") == [(0,)]


@pytest.mark.long
def test_who_sleeps_past_its_lease_begins_anew(tmp_path: Path, office: Office) -> None:
    """Its tasks are the others' meanwhile; woken up it overwrites nothing, and helps again."""
    office.write_job(limits="{requests_per_second: 40}")
    office.write_leads(people(300))
    with serving(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api, at_work(office, api) as process:
        sleeper = busy(process, office)[0]
        os.kill(sleeper, signal.SIGSTOP)
        until(lambda: office.sql("SELECT count(*) FROM owners WHERE name LIKE ?", f"% {sleeper}") == [(0,)])
        os.kill(sleeper, signal.SIGCONT)
        until(lambda: office.sql("SELECT count(*) FROM owners WHERE name LIKE ?", f"% {sleeper}") == [(1,)])
        receipt = end_of(process)
        all_answered_once(office, api, receipt, 300)

    assert receipt.exit_code == (14 if receipt.in_doubt else 0)
    assert not any("lost" in note for note in receipt.notes)


@pytest.mark.long
def test_who_never_wakes_up_is_given_up(tmp_path: Path, office: Office) -> None:
    """The run ends without it."""
    office.write_leads(people(150))
    with serving(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api, at_work(office, api) as process:
        stopped = busy(process, office)[0]
        os.kill(stopped, signal.SIGSTOP)
        receipt = end_of(process)
        all_answered_once(office, api, receipt, 150)

    assert not alive(stopped)
    assert any("said nothing any more" in note for note in receipt.notes)


@pytest.mark.long
def test_the_cap_is_kept_whoever_is_lost(tmp_path: Path, office: Office) -> None:
    """What a lost one had reserved stays so until its tasks are answered; none stops while some may come free."""
    office.write_job(limits="{requests_per_second: 120, max_credits: 15}")
    office.write_leads(people(200))
    with serving(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api, at_work(office, api, 3, "--yes") as process:
        until(lambda: accepted(api) >= 5 and len(workers(process)) == 3)
        os.kill(workers(process)[0], signal.SIGKILL)
        receipt = end_of(process)
        audit = api.audit()
    (worst,) = office.sql("SELECT max(reserved) FROM attempts")[0]
    unknown = receipt.in_doubt or 0

    assert receipt.exit_code == 12
    assert audit["paid_twice"] == 0
    assert 15 - (1 + unknown) * worst / 1e6 < audit["credits_charged"] <= 15


@pytest.mark.long
def test_killed_as_a_whole(tmp_path: Path, office: Office) -> None:
    """Left alone, the processes write down what is on the wire and go; the next run collects and goes on."""
    office.write_leads(people(150))
    with serving(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api:
        with at_work(office, api) as process:
            left = busy(process, office)
            api.fault("slow", 500, "post", seconds=1)
            bought = accepted(api)
            until(lambda: accepted(api) > bought)
            process.kill()
            process.wait()
            until(lambda: not any(map(alive, left)))
        api.heal()
        receipt = Receipt(**office.enrich(*RUN, api=api).receipt)
        all_answered_once(office, api, receipt, 150)

    assert (receipt.exit_code, receipt.in_doubt) == (0, 0)


@pytest.mark.long
def test_a_signal_lets_all_write_down_what_they_know(tmp_path: Path, office: Office) -> None:
    """Nothing is in doubt, everything is the next run's to collect."""
    office.write_leads(people(150))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api, at_work(office, api) as process:
        left = busy(process, office)
        process.send_signal(signal.SIGTERM)
        receipt = end_of(process)

        assert (process.returncode, receipt.in_doubt) == (143, 0)
        assert not any(map(alive, left))
        assert office.at_the_api() == accepted(api)


# The will of a crew, without workers


@dataclass(slots=True, eq=False)
class Puppet:
    """A worker that does what a test says."""

    heard: Callable[[Hand], None]
    told: Told = field(default_factory=Told)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    listening: bool = True
    why: str = "it fell"
    words: list[Word] = field(default_factory=list)

    async def hand_over(self, errand: Errand) -> None:
        """Take the errand, and do nothing."""

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

    heirs: bool
    hired: list[Puppet] = field(default_factory=list)

    @asynccontextmanager
    async def sharing(self, pace: Pace) -> AsyncIterator[Hire]:
        """Share nothing."""
        del pace

        def hire(heard: Callable[[Hand], None]) -> Hand:
            self.hired.append(Puppet(heard))
            return self.hired[-1]

        yield hire


def play(
    *, heirs: bool, scenes: Sequence[Callable[[Stage], None]], monkeypatch: pytest.MonkeyPatch, lease_s: float = 60.0
) -> Crew:
    """Let a crew of three live through scenes, one after the other, until none of them is left."""
    monkeypatch.setattr(crews, "LOOK_S", 0.02)
    monkeypatch.setattr(crews, "START_S", 0.5)
    execution = Execution(1, SystemClock(), Pace(None))
    budget = Budget(None, 0, "", "")
    shift = Shift(Call("email_getter", (833,)), budget, {}, None, ("email",), 3, 60.0, processes=3)
    place: Any = Server("postgresql://nowhere", "enrich", Path(), lease_s)
    access = Access("http://127.0.0.1", SecretStr("none"))
    errand = Errand(shift, access, place, 1, Timing(), 10, 60.0, 0, PollTimes())
    stage = Stage(heirs)
    crew = Crew(execution, errand, stage)

    async def live() -> None:
        run = asyncio.create_task(crew.run([]))
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
    """Also what those told who are gone; who closes lets all close."""

    def work(stage: Stage) -> None:
        for puppet in stage.hired:
            puppet.tell(tally=Tally(submitted=2))
        stage.hired[0].leave(ended=False)

    def stop(stage: Stage) -> None:
        stage.hired[1].tell(tally=Tally(submitted=3), closing=True)

    words: list[list[Word]] = []

    def end(stage: Stage) -> None:
        words.extend(puppet.words for puppet in stage.hired)
        for puppet in stage.hired[1:]:
            puppet.leave(ended=True)

    crew = play(heirs=True, scenes=[work, stop, end], monkeypatch=monkeypatch)

    assert crew.execution.tally.submitted == 2 + 3 + 2
    assert all(Word.CLOSE in said for said in words[1:])
    assert crew.lost == ["it fell"]


@pytest.mark.parametrize(("heirs", "hired"), [(True, 4), (False, 3)])
def test_who_has_heirs_is_replaced(heirs: bool, hired: int, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001 - a case
    """Where nobody inherits, the others are stopped instead."""
    seen: list[Stage] = []

    def fall(stage: Stage) -> None:
        seen.append(stage)
        for puppet in stage.hired:
            puppet.tell()
        stage.hired[0].leave(ended=False)

    crew = play(heirs=heirs, scenes=[fall, all_end], monkeypatch=monkeypatch)

    assert len(seen[0].hired) == hired
    assert (Word.CLOSE in seen[0].hired[1].words) is not heirs
    assert crew.lost == ["it fell"]


def test_who_falls_before_its_first_word_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there: somebody has killed it."""
    seen: list[Stage] = []

    def fall(stage: Stage) -> None:
        seen.append(stage)
        stage.hired[1].leave(ended=False)

    crew = play(heirs=True, scenes=[fall, all_end], monkeypatch=monkeypatch)

    assert len(seen[0].hired) == 4
    assert crew.lost == ["it fell"]


def test_those_who_always_fall_are_not_replaced_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end nobody is left, and what is left is the boss's."""

    def fall(stage: Stage) -> None:
        for puppet in stage.hired:
            puppet.tell()
            puppet.leave(ended=False)

    crew = play(heirs=True, scenes=[fall] * (SPARES + 2), monkeypatch=monkeypatch)

    assert len(crew.lost) == 3 + SPARES * 3


def test_who_says_nothing_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two leases, when what it was at is another's; one is hired in its place."""

    def speak(stage: Stage) -> None:
        for puppet in [*stage.hired[:2], *stage.hired[3:]]:
            puppet.tell()

    def begin(stage: Stage) -> None:
        for puppet in stage.hired:
            puppet.tell()

    crew = play(heirs=True, scenes=[begin, *[speak] * 5, all_end], monkeypatch=monkeypatch, lease_s=0.2)

    assert crew.lost == ["it said nothing any more"]


def test_who_comes_when_all_is_done_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster may have no room for all: the others do it."""

    def some_end(stage: Stage) -> None:
        for puppet in stage.hired[:2]:
            puppet.tell()
            puppet.leave(ended=True)

    assert play(heirs=True, scenes=[some_end], monkeypatch=monkeypatch).lost == []


def test_who_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """When there is room for none, the boss does it."""
    crew = play(heirs=True, scenes=[], monkeypatch=monkeypatch)

    assert set(crew.lost) == {"it said nothing any more"}

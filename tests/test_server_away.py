"""A server that is restarted while somebody writes or reads: nothing is lost, nothing is written twice."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from enrich.allowance import share, unshare
from enrich.pace import Pace
from enrich.place import LedgerPlace, locate_ledger
from enrich.place import Postgres as Place
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from enrich.store.records import check
from tests.books import Books
from tests.harness import Api, Office, kill, people, serving, until
from tests.postgres import Postgres


@pytest.fixture
def place(own_postgres: Postgres, tmp_path: Path) -> LedgerPlace:
    """Name a place on a server that may be restarted."""
    return locate_ledger(tmp_path, own_postgres.url(), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_a_restart_between_two_moves_loses_neither(
    books: Books, own_postgres: Postgres, how: Literal["fast", "immediate"]
) -> None:
    """The second finds its connection gone before it wrote anything, and is made all the same."""

    async def scene() -> None:
        async with Journal(books.ledger) as journal:
            await journal.do(Ledger.start_execution, "before", None, 1)
            await asyncio.to_thread(own_postgres.restart, how)
            await journal.do(Ledger.start_execution, "after", None, 2)

    asyncio.run(scene())

    assert books.all("SELECT job FROM executions ORDER BY id") == [("before",), ("after",)]


@pytest.mark.long
@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_restarts_in_the_middle_make_no_move_twice(
    books: Books, own_postgres: Postgres, how: Literal["fast", "immediate"]
) -> None:
    """Of a commit whose end was not heard the server tells afterwards whether it was one."""
    stop = threading.Event()
    made: list[str] = []

    def reached(number: int) -> bool:
        return len(made) > number

    async def ask(journal: Journal, asker: int) -> None:
        while not stop.is_set():
            name = f"{asker} {len(made)}"
            made.append(name)
            await journal.do(Ledger.start_execution, name, None, 1)

    async def disturb() -> None:
        for _ in range(3):
            enough = len(made) + 50
            await asyncio.to_thread(until, partial(reached, enough))
            await asyncio.to_thread(own_postgres.restart, how)
        stop.set()

    async def scene() -> None:
        async with Journal(books.ledger) as journal:
            await asyncio.gather(disturb(), *(ask(journal, asker) for asker in range(5)))

    asyncio.run(scene())

    assert sorted(name for (name,) in books.all("SELECT job FROM executions")) == sorted(made)


@pytest.mark.long
@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_a_run_outlives_its_server(tmp_path: Path, own_postgres: Postgres, how: Literal["fast", "immediate"]) -> None:
    """Restarted twice in the thick of it, and away for a while: every lead is answered, none is paid for twice."""
    office = Office(tmp_path, f"{own_postgres.url()}&lease=3", own_postgres.environ)
    office.write_job(limits="{requests_per_second: 60}")
    office.write_leads(people(150))
    with serving(tmp_path / "api.db", latency="uniform(0.1,0.5)") as api:
        process = office.start("run", "job.yaml", "--json", api=api)
        try:
            for enough in (30, 70):
                until(partial(sent, api, enough))
                own_postgres.restart(how)
            until(partial(sent, api, 100))
            own_postgres.stop(how)
            time.sleep(2)
            own_postgres.start()
            out, err = process.communicate(timeout=60)
        finally:
            kill(process)
        audit = api.audit()

    assert process.returncode == 0, err
    receipt = json.loads(out)
    assert (receipt["rows"], receipt["submitted"], receipt["in_doubt"], receipt["pending"]) == (150, 150, 0, 0)
    assert (audit["accepted"], audit["accepted_more_than_once"], audit["paid_twice"]) == (150, 0, 0)
    assert check(office.place).problems == []


def sent(api: Api, enough: int) -> bool:
    """Tell whether so many requests were sent."""
    return bool(api.audit()["requests"].get("run", 0) >= enough)


@pytest.mark.long
def test_what_was_learned_is_not_waited_for(own_postgres: Postgres, tmp_path: Path) -> None:
    """Who goes on alone, or leaves, does so without the others' pace when the server is away."""
    place = locate_ledger(tmp_path, own_postgres.url(), tmp_path)
    assert isinstance(place, Place)
    Ledger(place).close()
    pace = Pace(None)
    pace.rate = 42.0
    share(place, pace)
    own_postgres.stop()
    away = unshare(place)
    own_postgres.start()
    back = unshare(place)

    assert away is None
    assert back is not None
    assert back.rate == 42.0

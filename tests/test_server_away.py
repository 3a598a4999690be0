"""A server that is restarted while somebody writes or reads: nothing is lost, nothing is written twice."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from enrich.place import LedgerPlace, locate_ledger
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from tests.books import Books
from tests.harness import until
from tests.postgres import Postgres


@pytest.fixture
def place(own_postgres: Postgres, tmp_path: Path) -> LedgerPlace:
    """Name a place on a server that may be restarted."""
    return locate_ledger(tmp_path, own_postgres.url(), tmp_path)


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

"""The journal: what it says is done is on disk, in order, many moves to a commit."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from enrich.errors import EnrichError, LedgerFailed
from enrich.model import State
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from enrich.store.moves import CapReached
from tests.books import PRICE, Books


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    """Open a new ledger with an execution."""
    opened = Books.open(tmp_path / "ledger.db").begin(*range(100))
    yield opened
    opened.ledger.close()


def sleep(_: Ledger) -> None:
    """Keep the journal busy, so that moves come together behind it."""
    time.sleep(0.05)


def fill(ledger: Ledger) -> None:
    """Write more than a full disk takes."""
    ledger.remember_waterfall("big", {"description": "x" * 10_000_000}, [])


def test_a_move_is_durable_before_its_future_is_done(books: Books) -> None:
    """Who awaited a move finds it through another connection, at once."""

    async def one(journal: Journal, number: int) -> None:
        await asyncio.sleep(number % 7 / 1000)
        execution = await journal.do(Ledger.start_execution, f"job {number}", None, number)
        assert books.one("SELECT job FROM executions WHERE id = ?", execution) == (f"job {number}",)

    async def scene() -> None:
        async with Journal(books.ledger) as journal:
            await asyncio.gather(*(one(journal, number) for number in range(100)))

    asyncio.run(scene())


def test_moves_are_made_in_the_order_they_were_asked_for(books: Books) -> None:
    """First asked, first made, first resolved."""
    resolved: list[int] = []

    async def scene() -> list[int]:
        async with Journal(books.ledger) as journal:
            futures = [journal.do(Ledger.start_execution, "job", None, number) for number in range(50)]
            for number, future in enumerate(futures):
                future.add_done_callback(partial(lambda number, _: resolved.append(number), number))
            return await asyncio.gather(*futures)

    made = asyncio.run(scene())

    assert made == sorted(made)
    assert resolved == list(range(50))


def test_moves_that_come_together_share_a_commit(books: Books) -> None:
    """A hundred moves behind a slow one cost one sync of the disk, not a hundred."""
    statements: list[str] = []

    async def scene() -> None:
        async with Journal(books.ledger) as journal:
            slow = journal.do(sleep)
            await asyncio.sleep(0.01)
            claims = [journal.do(Ledger.claim, books.execution, PRICE, 1) for _ in range(100)]
            await asyncio.gather(slow, *claims)

    books.ledger._db.set_trace_callback(statements.append)
    asyncio.run(scene())

    assert statements.count("COMMIT") == 2
    assert books.ledger.counts() == {State.SUBMITTING: 100}


def test_a_move_that_fails_harms_no_other(books: Books) -> None:
    """Its own changes are taken back, the others of its batch stay."""

    def stumble(ledger: Ledger) -> None:
        ledger.claim(books.execution, PRICE, 1)
        raise CapReached

    async def scene() -> list[object]:
        async with Journal(books.ledger) as journal:
            moves: list[asyncio.Future[Any]] = [journal.do(sleep)]
            moves += [journal.do(Ledger.claim, books.execution, PRICE, 1), journal.do(stumble)]
            moves += [journal.do(Ledger.claim, books.execution, PRICE, 1) for _ in range(2)]
            return list(await asyncio.gather(*moves, return_exceptions=True))

    results = asyncio.run(scene())

    assert [type(result).__name__ for result in results] == ["NoneType", "list", "CapReached", "list", "list"]
    assert books.money == (0, 3 * PRICE, 0, 0)


def test_a_move_is_made_even_when_nobody_waits_any_more(books: Books) -> None:
    """What was asked for is written down, though its asker was cancelled and the journal is being closed."""

    async def scene() -> None:
        async with Journal(books.ledger) as journal:
            journal.do(sleep)
            abandoned = asyncio.ensure_future(journal.do(Ledger.claim, books.execution, PRICE, 1))
            abandoned.cancel()
            journal.do(Ledger.claim, books.execution, PRICE, 1)

    asyncio.run(scene())

    assert books.ledger.counts()[State.SUBMITTING] == 2


@pytest.mark.parametrize("trouble", ["full", "locked"])
def test_when_a_commit_fails_nothing_is_written_any_more(books: Books, trouble: str) -> None:
    """Every move of the batch fails with LedgerFailed, and so does every later one, though the trouble be over."""
    pages = books.one("PRAGMA page_count")[0]
    db = books.ledger._db
    other = sqlite3.connect(books.path, isolation_level=None)
    if trouble == "full":
        db.execute(f"PRAGMA max_page_count = {pages + 2}")
    else:
        db.execute("PRAGMA busy_timeout = 50")
        other.execute("BEGIN IMMEDIATE")

    async def scene() -> None:
        async with Journal(books.ledger) as journal:
            batch: list[asyncio.Future[Any]] = [journal.do(Ledger.claim, books.execution, PRICE, 1), journal.do(fill)]
            batch.append(journal.do(Ledger.claim, books.execution, PRICE, 1))
            for result in await asyncio.gather(*batch, return_exceptions=True):
                assert isinstance(result, LedgerFailed)
                assert trouble in result.message
            if trouble == "full":
                db.execute("PRAGMA max_page_count = 1000000")
            else:
                other.execute("ROLLBACK")
            with pytest.raises(EnrichError, match=trouble):
                await journal.do(Ledger.claim, books.execution, PRICE, 1)

    try:
        asyncio.run(scene())
    finally:
        other.close()

    assert books.ledger.counts() == {State.PENDING: 100}
    assert books.money == (0, 0, 0, 0)


def test_waiting_for_moves_costs_nothing(books: Books) -> None:
    """An idle journal sleeps."""

    async def scene() -> float:
        async with Journal(books.ledger):
            before = time.process_time()
            await asyncio.sleep(0.5)
            return time.process_time() - before

    assert asyncio.run(scene()) < 0.1

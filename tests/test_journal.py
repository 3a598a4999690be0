"""The journal: what it says is done is on disk, in order, many moves to a commit."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from enrich.errors import EnrichError, LedgerFailed
from enrich.model import State
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from enrich.store.moves import CapReached
from tests.books import BOUND, COST, FOUND, FREE_FAILURE, MISSED, PRICE, Books, listen
from tests.harness import BOTH


@pytest.fixture(params=BOTH)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


@pytest.fixture
def books(books: Books) -> Books:
    """Begin an execution that wants a hundred."""
    return books.begin(*range(100))


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
    begun, asked = threading.Event(), threading.Event()

    def slow(_: Ledger) -> None:
        begun.set()
        asked.wait(10)

    async def scene() -> None:
        async with Journal(books.ledger) as journal:
            moves: list[asyncio.Future[Any]] = [journal.do(slow)]
            await asyncio.to_thread(begun.wait, 10)
            moves += [journal.do(Ledger.claim, books.execution, PRICE, 1) for _ in range(100)]
            await asyncio.sleep(0)
            asked.set()
            await asyncio.gather(*moves)

    listen(books.ledger, statements)
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


def test_what_comes_together_is_told_in_one(books: Books) -> None:
    """Each asker gets its own part of what the move returned, though it was made once for all."""
    attempts = [books.submit(f"task {number}") for number in range(4)]
    answers = [MISSED, FOUND, FREE_FAILURE, FOUND]
    statements: list[str] = []

    async def scene() -> list[list[State]]:
        async with Journal(books.ledger) as journal:
            asked = threading.Event()
            slow = journal.do(lambda _: asked.wait(10))
            told = [(attempt, answer, 5) for attempt, answer in zip(attempts, answers, strict=True)]
            parts = [told[:1], told[1:3], told[3:]]
            states = [journal.together(Ledger.settle, part, books.execution, 3) for part in parts]
            await asyncio.sleep(0)  # all are handed over
            asked.set()
            await slow
            return list(await asyncio.gather(*states))

    listen(books.ledger, statements)
    assert asyncio.run(scene()) == [[State.NOT_FOUND], [State.FOUND, State.PENDING], [State.FOUND]]
    assert sum(statement.startswith("UPDATE requests") for statement in statements) == 1
    assert books.money == (2 * COST, 0, 0, 4)


def test_what_differs_is_not_told_in_one(books: Books) -> None:
    """Other arguments, or another move: a group of its own, in the order asked for."""
    attempts = [books.submit(f"task {number}") for number in range(3)]

    async def scene() -> list[object]:
        async with Journal(books.ledger) as journal:
            last, again = (
                journal.together(Ledger.settle, [(attempt, FREE_FAILURE, 5)], books.execution, max_attempts)
                for attempt, max_attempts in zip(attempts, (1, 2), strict=False)
            )
            lost = journal.together(Ledger.doubt, [(attempts[2], "404", 5, None)])
            return list(await asyncio.gather(last, again, lost))

    assert asyncio.run(scene()) == [[State.FAILED], [State.PENDING], None]


def test_a_group_that_fails_harms_no_other(books: Books) -> None:
    """Who told what cannot be fails with those who told it with him; nothing of it stays, all else does."""
    first, second, third = (books.submit(f"task {number}") for number in range(3))
    books.settle(third)

    async def scene() -> list[object]:
        async with Journal(books.ledger) as journal:
            moves: list[asyncio.Future[Any]] = [
                journal.together(Ledger.settle, [(first, FOUND, 5)], books.execution, 3),
                journal.together(Ledger.settle, [(third, FOUND, 5)], books.execution, 3),
                journal.together(Ledger.doubt, [(second, "404", 5, None)]),
            ]
            return list(await asyncio.gather(*moves, return_exceptions=True))

    results = asyncio.run(scene())

    assert [type(result).__name__ for result in results] == ["AssertionError", "AssertionError", "NoneType"]
    assert [books.state(number) for number in range(3)] == [State.SUBMITTED, State.IN_DOUBT, State.FOUND]
    assert books.money == (COST, 2 * PRICE, 0, 3)


@pytest.mark.parametrize("bulk", [False, True])
def test_32_requests_take_less_than_a_statement_each(books: Books, *, bulk: bool) -> None:
    """From the claim over the task ids to the answers: what comes at once is written at once."""
    statements: list[str] = []

    async def scene() -> None:
        async with Journal(books.ledger) as journal:
            claims = await journal.do(Ledger.claim, books.execution, PRICE, 1, 32, bulk=bulk)
            attempts = [claim.attempt_id for claim in claims]
            accepted = [(attempt, "bundle" if bulk else f"task {attempt}", 2) for attempt in attempts]
            await asyncio.gather(*(journal.together(Ledger.accepted, [told], BOUND) for told in accepted))
            if bulk:
                told = [(attempt, replace(FOUND, credits=None), 3) for attempt in attempts]
                await journal.do(Ledger.settle_bundle, told, books.execution, 3, 32 * COST)
            else:
                moves = (
                    journal.together(Ledger.settle, [(attempt, FOUND, 3)], books.execution, 3) for attempt in attempts
                )
                await asyncio.gather(*moves)

    listen(books.ledger, statements)
    asyncio.run(scene())

    assert len(statements) < 32, statements
    assert books.ledger.counts() == {State.PENDING: 68, State.FOUND: 32}
    assert books.money == (32 * COST, 0, 0, 32)


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


@pytest.mark.parametrize("where", ["file"])
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

    assert asyncio.run(scene()) < 0.25

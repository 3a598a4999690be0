"""The ledger writer: finished transitions are on disk, in order, with many of them in one commit."""

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
from enrich.ledger import queries, queue, records, transitions
from enrich.ledger.database import Database
from enrich.ledger.queue import CapReached
from enrich.ledger.writer import LedgerWriter
from enrich.models import State
from tests.support.ledger import (
    BINDING,
    CALL,
    COST,
    FOUND,
    FREE_FAILURE,
    MAX_PRICE,
    NO_MATCH,
    CommittingLedger,
    record_statements,
)
from tests.support.workspace import both_backends

backend = both_backends


@pytest.fixture
def ledger(ledger: CommittingLedger) -> CommittingLedger:
    """Start an execution with a hundred requests."""
    return ledger.start_and_enroll(*range(100))


def slow_move(_: Database) -> None:
    """Keep the writer busy, so that transitions gather behind this one."""
    time.sleep(0.05)


def fill_disk(ledger: Database) -> None:
    """Write more than fits on the full disk."""
    records.save_description(ledger, CALL, {"description": "x" * 10_000_000}, [])


def test_transition_is_committed_before_future_resolves(ledger: CommittingLedger) -> None:
    """When a future resolves, another connection sees its transition."""

    async def one(writer: LedgerWriter, number: int) -> None:
        await asyncio.sleep(number % 7 / 1000)
        execution = await writer.submit(records.start_execution, f"job {number}", None, number)
        assert ledger.query_one("SELECT job FROM executions WHERE id = ?", execution) == (f"job {number}",)

    async def scenario() -> None:
        async with LedgerWriter(ledger.wrapped) as writer:
            await asyncio.gather(*(one(writer, number) for number in range(100)))

    asyncio.run(scenario())


def test_transitions_keep_order(ledger: CommittingLedger) -> None:
    """Transitions are made and resolved in the order of submission."""
    resolved: list[int] = []

    async def scenario() -> list[int]:
        async with LedgerWriter(ledger.wrapped) as writer:
            futures = [writer.submit(records.start_execution, "job", None, number) for number in range(50)]
            for number, future in enumerate(futures):
                future.add_done_callback(partial(lambda number, _: resolved.append(number), number))
            return await asyncio.gather(*futures)

    made = asyncio.run(scenario())

    assert made == sorted(made)
    assert resolved == list(range(50))


@pytest.mark.long
def test_concurrent_transitions_share_a_commit(ledger: CommittingLedger) -> None:
    """A hundred transitions that wait behind a slow one share one commit."""
    statements: list[str] = []
    slow_started, all_submitted = threading.Event(), threading.Event()

    def slow(_: Database) -> None:
        slow_started.set()
        all_submitted.wait(10)

    async def scenario() -> None:
        async with LedgerWriter(ledger.wrapped) as writer:
            moves: list[asyncio.Future[Any]] = [writer.submit(slow)]
            await asyncio.to_thread(slow_started.wait, 10)
            moves += [writer.submit(queue.claim, ledger.execution, MAX_PRICE, 1) for _ in range(100)]
            await asyncio.sleep(0)
            all_submitted.set()
            await asyncio.gather(*moves)

    record_statements(ledger.wrapped, statements)
    asyncio.run(scenario())

    assert statements.count("COMMIT") == 2
    assert not [statement for statement in statements if "SAVEPOINT" in statement]
    assert queries.state_counts(ledger.wrapped) == {State.SUBMITTING: 100}


@pytest.mark.parametrize("bulk", [False, True])
def test_statements_do_not_grow_with_requests(ledger: CommittingLedger, *, bulk: bool) -> None:
    """A claim, its acceptance and its answers take as many statements for forty requests as for two."""
    statements: list[str] = []
    counts: list[int] = []
    answer = replace(FOUND, credits=None) if bulk else FOUND
    record_statements(ledger.wrapped, statements)
    for size in (1, 1, 2, 40):  # the first two read what stays known
        statements.clear()
        claimed = ledger.commit(queue.claim, ledger.execution, MAX_PRICE, 1, size, bulk=bulk)
        attempts = [request.attempt_id for request in claimed]
        accepted = [(attempt, f"task {attempts[0] if bulk else attempt}", 2) for attempt in attempts]
        ledger.commit(transitions.record_accepted, accepted, BINDING)
        answers = [(attempt, answer, 3) for attempt in attempts]
        if bulk:
            ledger.commit(transitions.settle_bulk_task, answers, ledger.execution, 3, COST)
        else:
            ledger.commit(transitions.settle, answers, ledger.execution, 3)
        counts.append(sum(not statement.startswith(("BEGIN", "COMMIT")) for statement in statements))

    assert counts[2] == counts[3]
    if ledger.wrapped.dialect.joins_writes:
        assert counts[3] == (11 if bulk else 9)


def test_failed_transition_is_rolled_back_alone(ledger: CommittingLedger) -> None:
    """A transition that fails is rolled back alone; the others in its batch are kept."""

    def failing_move(raw_ledger: Database) -> None:
        queue.claim(raw_ledger, ledger.execution, MAX_PRICE, 1)
        raise CapReached

    async def scenario() -> list[object]:
        async with LedgerWriter(ledger.wrapped) as writer:
            moves: list[asyncio.Future[Any]] = [writer.submit(slow_move)]
            moves += [writer.submit(queue.claim, ledger.execution, MAX_PRICE, 1), writer.submit(failing_move)]
            moves += [writer.submit(queue.claim, ledger.execution, MAX_PRICE, 1) for _ in range(2)]
            return list(await asyncio.gather(*moves, return_exceptions=True))

    results = asyncio.run(scenario())

    assert [type(result).__name__ for result in results] == ["NoneType", "list", "CapReached", "list", "list"]
    assert ledger.execution_counters == (0, 3 * MAX_PRICE, 0, 0)


def test_facts_of_a_repeated_transaction_are_stored(ledger: CommittingLedger) -> None:
    """What the ledger is bound to is stored, although a third transition fails and the others are made again."""
    attempts = [ledger.claim().attempt_id for _ in range(2)]

    def failing_move(_: Database) -> None:
        raise CapReached

    async def scenario() -> list[object]:
        async with LedgerWriter(ledger.wrapped) as writer:
            moves: list[asyncio.Future[Any]] = [writer.submit(slow_move)]
            moves += [
                writer.submit(transitions.record_accepted, [(attempt, f"task {attempt}", 2)], BINDING)
                for attempt in attempts
            ]
            moves.append(writer.submit(failing_move))
            return list(await asyncio.gather(*moves, return_exceptions=True))

    results = asyncio.run(scenario())

    assert [type(result).__name__ for result in results] == ["NoneType", "list", "list", "CapReached"]
    assert {name: records.read_fact(ledger.wrapped, name) for name in BINDING} == BINDING


def test_equal_calls_are_batched(ledger: CommittingLedger) -> None:
    """Equal calls are made as one, and each caller gets its own part of the result."""
    attempts = [ledger.submit(f"task {number}") for number in range(4)]
    answers = [NO_MATCH, FOUND, FREE_FAILURE, FOUND]
    statements: list[str] = []

    async def scenario() -> list[list[State]]:
        async with LedgerWriter(ledger.wrapped) as writer:
            all_submitted = threading.Event()
            slow = writer.submit(lambda _: all_submitted.wait(10))
            result = [(attempt, answer, 5) for attempt, answer in zip(attempts, answers, strict=True)]
            parts = [result[:1], result[1:3], result[3:]]
            states = [writer.submit_batch(transitions.settle, part, ledger.execution, 3) for part in parts]
            await asyncio.sleep(0)  # all are submitted
            all_submitted.set()
            await slow
            return list(await asyncio.gather(*states))

    record_statements(ledger.wrapped, statements)
    assert asyncio.run(scenario()) == [[State.NOT_FOUND], [State.FOUND, State.PENDING], [State.FOUND]]
    assert sum("UPDATE requests" in statement for statement in statements) == 1
    assert ledger.execution_counters == (2 * COST, 0, 0, 4)


def test_different_calls_are_not_batched(ledger: CommittingLedger) -> None:
    """Calls with other arguments or of another transition are made separately, in order."""
    attempts = [ledger.submit(f"task {number}") for number in range(3)]

    async def scenario() -> list[object]:
        async with LedgerWriter(ledger.wrapped) as writer:
            last, again = (
                writer.submit_batch(transitions.settle, [(attempt, FREE_FAILURE, 5)], ledger.execution, max_attempts)
                for attempt, max_attempts in zip(attempts, (1, 2), strict=False)
            )
            lost = writer.submit_batch(transitions.mark_in_doubt, [(attempts[2], "404", 5, None)])
            return list(await asyncio.gather(last, again, lost))

    assert asyncio.run(scenario()) == [[State.FAILED], [State.PENDING], None]


def test_failed_batch_is_rolled_back_alone(ledger: CommittingLedger) -> None:
    """A batch that fails does so for all its callers and leaves nothing; other batches are kept."""
    first, second, third = (ledger.submit(f"task {number}") for number in range(3))
    ledger.settle(third)

    async def scenario() -> list[object]:
        async with LedgerWriter(ledger.wrapped) as writer:
            moves: list[asyncio.Future[Any]] = [
                writer.submit_batch(transitions.settle, [(first, FOUND, 5)], ledger.execution, 3),
                writer.submit_batch(transitions.settle, [(third, FOUND, 5)], ledger.execution, 3),
                writer.submit_batch(transitions.mark_in_doubt, [(second, "404", 5, None)]),
            ]
            return list(await asyncio.gather(*moves, return_exceptions=True))

    results = asyncio.run(scenario())

    assert [type(result).__name__ for result in results] == ["AssertionError", "AssertionError", "NoneType"]
    assert [ledger.state_of(number) for number in range(3)] == [State.SUBMITTED, State.IN_DOUBT, State.FOUND]
    assert ledger.execution_counters == (COST, 2 * MAX_PRICE, 0, 3)


@pytest.mark.parametrize("bulk", [False, True])
def test_batched_statement_count(ledger: CommittingLedger, *, bulk: bool) -> None:
    """Claims, task ids and answers that come together are written together: under 32 statements for 32 requests."""
    statements: list[str] = []

    async def scenario() -> None:
        async with LedgerWriter(ledger.wrapped) as writer:
            claims = await writer.submit(queue.claim, ledger.execution, MAX_PRICE, 1, 32, bulk=bulk)
            attempts = [claim.attempt_id for claim in claims]
            accepted = [(attempt, "bundle" if bulk else f"task {attempt}", 2) for attempt in attempts]
            await asyncio.gather(
                *(writer.submit_batch(transitions.record_accepted, [record], BINDING) for record in accepted)
            )
            if bulk:
                result = [(attempt, replace(FOUND, credits=None), 3) for attempt in attempts]
                await writer.submit(transitions.settle_bulk_task, result, ledger.execution, 3, 32 * COST)
            else:
                moves = (
                    writer.submit_batch(transitions.settle, [(attempt, FOUND, 3)], ledger.execution, 3)
                    for attempt in attempts
                )
                await asyncio.gather(*moves)

    record_statements(ledger.wrapped, statements)
    asyncio.run(scenario())

    # On a server each is a round trip: 5 or 6 to claim, 4 or 5 to accept (one of them once in a run), 2 to settle.
    limit = 16 if ledger.wrapped.dialect.joins_writes else 32
    assert len(statements) <= limit, statements
    assert queries.state_counts(ledger.wrapped) == {State.PENDING: 68, State.FOUND: 32}
    assert ledger.execution_counters == (32 * COST, 0, 0, 32)


def test_transition_runs_after_cancelled_caller(ledger: CommittingLedger) -> None:
    """A transition is made although its caller was cancelled and the writer is closing."""

    async def scenario() -> None:
        async with LedgerWriter(ledger.wrapped) as writer:
            writer.submit(slow_move)
            abandoned = asyncio.ensure_future(writer.submit(queue.claim, ledger.execution, MAX_PRICE, 1))
            abandoned.cancel()
            writer.submit(queue.claim, ledger.execution, MAX_PRICE, 1)

    asyncio.run(scenario())

    assert queries.state_counts(ledger.wrapped)[State.SUBMITTING] == 2


@pytest.mark.parametrize("backend", ["file"])
@pytest.mark.parametrize("trouble", ["full", "locked"])
def test_failed_commit_stops_writer(ledger: CommittingLedger, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed commit, the batch and all later transitions fail with `LedgerFailed`, even with the cause gone."""
    monkeypatch.setattr("enrich.ledger.writer.LOCK_TIMEOUT_S", 0.1)
    pages = ledger.query_one("PRAGMA page_count")[0]
    db = ledger.wrapped.session
    other = sqlite3.connect(ledger.path, isolation_level=None)
    if trouble == "full":
        db.execute(f"PRAGMA max_page_count = {pages + 2}")
    else:
        db.execute("PRAGMA busy_timeout = 50")
        other.execute("BEGIN IMMEDIATE")

    async def scenario() -> None:
        async with LedgerWriter(ledger.wrapped) as writer:
            batch: list[asyncio.Future[Any]] = [
                writer.submit(queue.claim, ledger.execution, MAX_PRICE, 1),
                writer.submit(fill_disk),
            ]
            batch.append(writer.submit(queue.claim, ledger.execution, MAX_PRICE, 1))
            for result in await asyncio.gather(*batch, return_exceptions=True):
                assert isinstance(result, LedgerFailed)
                assert trouble in result.message
            if trouble == "full":
                db.execute("PRAGMA max_page_count = 1000000")
            else:
                other.execute("ROLLBACK")
            with pytest.raises(EnrichError, match=trouble):
                await writer.submit(queue.claim, ledger.execution, MAX_PRICE, 1)

    try:
        asyncio.run(scenario())
    finally:
        other.close()

    assert queries.state_counts(ledger.wrapped) == {State.PENDING: 100}
    assert ledger.execution_counters == (0, 0, 0, 0)


@pytest.mark.long
def test_idle_writer_uses_no_cpu(ledger: CommittingLedger) -> None:
    """An idle writer uses no processor time."""

    async def scenario() -> float:
        async with LedgerWriter(ledger.wrapped):
            before = time.process_time()
            await asyncio.sleep(0.5)
            return time.process_time() - before

    assert asyncio.run(scenario()) < 0.25

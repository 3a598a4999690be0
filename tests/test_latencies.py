"""How long tasks take is kept in the ledger from night to night."""

from __future__ import annotations

from pathlib import Path

import pytest

from enrich.store.ledger import Ledger
from enrich.store.records import check
from tests.books import CALL, Books
from tests.harness import BOTH_IN_TIME, Office, people, serving


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def test_what_was_learned_is_remembered_by_call(tmp_path: Path) -> None:
    """Another call has its own latencies; the newest replace the older ones."""
    books = Books.open(tmp_path / "ledger.db")
    other = type(CALL)(CALL.waterfall, (*CALL.enrichments, 99))
    books.do(Ledger.remember_latencies, CALL, [(1.0, 3.0), (2.0, 0.5)])
    books.do(Ledger.remember_latencies, other, [(9.0, 1.0)])
    books.do(Ledger.remember_latencies, CALL, [(4.0, 2.0)])
    assert books.ledger.latencies(CALL) == [(4.0, 2.0)]
    assert books.ledger.latencies(other) == [(9.0, 1.0)]
    books.do(Ledger.remember_latencies, CALL, [(30.0, 1.0)], 100)
    assert books.ledger.latencies(CALL, 100) == [(30.0, 1.0)]
    assert books.ledger.latencies(CALL) == [(4.0, 2.0)]
    assert check(books.path).problems == []
    books.ledger.close()


@pytest.mark.long
def test_the_second_night_knows_when_to_ask(tmp_path: Path) -> None:
    """It asks for each row about once, when the first had to find out."""
    office = Office(tmp_path)
    office.write_job()
    polls = []
    with serving(tmp_path / "api.db", latency="fixed(0.8)") as api:
        for night in range(2):
            office.write_leads(people(30, start=100 * night))
            receipt = office.run(api)
            polls.append(receipt.polls)
    assert polls[1] < polls[0]
    assert polls[1] <= 1.5 * 30
    ((rows, seconds),) = office.sql("SELECT count(*), sum(seconds * answers) / sum(answers) FROM latencies")
    assert rows < 151
    assert 0.5 < seconds < 1.5

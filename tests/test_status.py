"""The status: what the ledger knows, at any time and without touching it."""

from __future__ import annotations

import pytest

from enrich.errors import Refused
from enrich.job import load_job
from enrich.look.status import lines, read_status
from enrich.model import Answer, State, iso
from enrich.store.ledger import Ledger
from tests.books import FREE_FAILURE, MISSED, Books
from tests.harness import BOTH_IN_TIME, IN_A_FILE, Api, Office, people

CREDIT = 1_000_000
DAY_MS = 86_400_000


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def open_books(office: Office) -> Books:
    """Open the ledger of the office's job, as a run does."""
    return Books.open(load_job(office.job_file).ledger)


def test_a_job_that_never_ran_has_a_status(office: Office) -> None:
    """All is 0, nothing is made on disk, and a person is told so."""
    status = read_status(load_job(office.job_file))

    assert status["requests"] == status["pending"] == status["credits_spent"] == status["at_the_api"] == 0
    assert status["next_expiry"] is None
    assert status["executions"] == []
    assert not office.ledger_path.parent.exists()
    assert "never run" in next(lines(status))


def test_the_status_agrees_with_the_ledger(office: Office) -> None:
    """Counts, credits and what is not known are what happened, request by request."""
    books = open_books(office)
    books.now = 1_750_000_000_000
    books.begin(*range(9))
    books.settle(books.submit(), Answer(State.FOUND, credits=CREDIT // 2))
    books.settle(books.submit(), Answer(State.FOUND))
    books.settle(books.submit(), MISSED)
    books.settle(books.submit(), Answer(State.FAILED, credits=2 * CREDIT))
    books.settle(books.submit(), Answer(State.EXPIRED))
    books.settle(books.submit(), FREE_FAILURE)
    books.do(Ledger.doubt, [(books.claim().attempt_id, "reset", books.now, None)])
    books.submit()
    books.now += 5_000
    books.submit()
    books.do(Ledger.end_execution, books.execution, 10, {"rows": 9}, books.now)
    books.ledger.close()

    status = read_status(load_job(office.job_file))

    assert status["job"] == "job"
    assert status["requests"] == 9
    assert {name: status[name] for name in ("found", "not_found", "failed", "expired", "in_doubt", "pending")} == {
        "found": 2,
        "not_found": 1,
        "failed": 1,
        "expired": 1,
        "in_doubt": 1,
        "pending": 3,
    }
    assert (status["credits_spent"], status["credits_unknown"]) == (2.5, 2)
    assert status["at_the_api"] == 2
    assert status["next_expiry"] == iso(books.now - 5_000 + DAY_MS)
    assert status["last_expiry"] == iso(books.now + DAY_MS)
    (execution,) = status["executions"]
    assert (execution["exit_code"], execution["submitted"], execution["credits_spent"]) == (10, 8, 2.5)
    assert (execution["credits_unknown"], execution["receipt"]) == (2, {"rows": 9})
    shown = "\n".join(lines(status))
    assert "2.50" in shown
    assert "2 answers of unknown price" in shown
    assert status["next_expiry"] in shown


def test_the_status_can_be_asked_while_a_run_is_at_work(office: Office) -> None:
    """It waits for nobody, shows what is committed, and the execution as not ended."""
    books = open_books(office).begin(1, 2)
    books.submit()
    with books.ledger.transaction():
        books.ledger.claim(books.execution, 1, 1)
        status = read_status(load_job(office.job_file))
    books.ledger.close()

    assert (status["requests"], status["pending"], status["at_the_api"]) == (2, 2, 1)
    (execution,) = status["executions"]
    assert execution["ended_at"] is execution["exit_code"] is execution["receipt"] is None
    assert "not ended" in "\n".join(lines(status))


def test_the_status_can_be_asked_after_a_crash(office: Office) -> None:
    """What was committed is shown though nobody closed the ledger, and the doubt waits for the next run."""
    books = open_books(office).begin(1)
    books.claim()

    status = read_status(load_job(office.job_file))

    assert (status["pending"], status["in_doubt"]) == (1, 0)
    books.ledger.close()


def test_only_the_last_executions_of_this_job_are_shown(office: Office) -> None:
    """Newest first, at most ten, and none of another job that shares the ledger."""
    books = open_books(office)
    started = [books.start() for _ in range(12)]
    books.do(Ledger.start_execution, "other", None, books.now)
    books.ledger.close()

    status = read_status(load_job(office.job_file))

    assert [row["execution"] for row in status["executions"]] == started[:1:-1]


def test_the_status_of_a_real_run_is_its_bill(api: Api, office: Office) -> None:
    """After a run, the credits are those that the API charged."""
    office.write_leads(people(8))
    receipt = office.run(api)

    status = read_status(load_job(office.job_file))

    assert status["credits_spent"] == pytest.approx(api.audit()["credits_charged"])
    assert (status["found"], status["not_found"]) == (receipt.found, receipt.not_found)
    assert status["executions"][0]["receipt"]["credits_spent"] == status["credits_spent"]


@IN_A_FILE
def test_a_ledger_that_is_none_is_refused(office: Office) -> None:
    """The message names the file."""
    office.ledger_path.parent.mkdir()
    office.ledger_path.write_text("First Name,Last Name\n" * 200, encoding="utf-8")

    with pytest.raises(Refused, match=r"job\.db"):
        read_status(load_job(office.job_file))

"""The list of executions: what each came to, newest first."""

from __future__ import annotations

from pathlib import Path

import pytest

from enrich.job import load_job
from enrich.look.runs import lines, read_runs
from enrich.store.ledger import Ledger
from enrich.store.lock import hold, is_held
from tests.books import MISSED, Books
from tests.harness import BOTH_IN_TIME, Api, Office, people, serving


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def books_of(office: Office) -> Books:
    """Open the ledger of the office's job."""
    return Books.open(load_job(office.job_file).ledger)


def test_a_job_that_never_ran_says_so(office: Office) -> None:
    """No ledger is made by looking."""
    done = office.command("runs", "job.yaml")

    assert done.code == 0
    assert done.stdout.startswith("job has never run")
    assert not office.ledger_path.parent.exists()


def test_executions_are_listed_newest_first(tmp_path: Path, office: Office) -> None:
    """Each with its time, its exit code in words, its rows, its share of hits, its credits and the balance."""
    office.write_leads(people(20))
    with serving(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0) as api:
        receipts = [office.command("run", "job.yaml", "--json", api=api).receipt for _ in range(2)]

    told = office.command("runs", "job.yaml", "--json").receipt

    assert [run["execution"] for run in told["executions"]] == [2, 1]
    newest, first = told["executions"]
    assert (newest["exit_code"], newest["outcome"]) == (0, "ok")
    assert (first["exit_code"], first["outcome"]) == (10, "some failed")
    for run, receipt in zip((first, newest), receipts, strict=True):
        for name in ("rows", "submitted", "found", "credits_spent", "credits_unknown", "balance_after"):
            assert run[name] == receipt[name]
        assert run["found_share"] == pytest.approx(receipt["found"] / 20)
    assert told["totals"]["executions"] == 2
    assert told["totals"]["credits_spent"] == pytest.approx(receipts[0]["credits_spent"])

    shown = office.command("runs", "job.yaml").stdout.splitlines()
    assert len(shown) == 4
    assert "10 some failed" in shown[2]
    assert f"{receipts[0]['balance_after']:,.2f}" in shown[2]
    assert shown[3].startswith("in all 2 executions: ")


def test_only_the_last_are_shown_but_all_are_counted(office: Office) -> None:
    """`--last N`; executions of another job that shares the ledger are not ours."""
    books = books_of(office)
    for number in range(4):
        books.begin(number)
        books.settle(books.submit())
        books.do(Ledger.end_execution, books.execution, 0, {"rows": 1, "found": 1}, books.now + 3_723_000)
    books.do(Ledger.start_execution, "other", None, books.now)
    books.ledger.close()

    told = office.command("runs", "job.yaml", "--last", "2", "--json").receipt

    assert [run["execution"] for run in told["executions"]] == [4, 3]
    assert (told["totals"]["executions"], told["totals"]["submitted"]) == (4, 4)
    assert "1:02:03" in office.command("runs", "job.yaml").stdout


def test_an_execution_that_never_ended_was_killed_or_is_at_work(office: Office) -> None:
    """Whoever holds the lock is at work; all others that have no end were killed."""
    books = books_of(office)
    books.start()
    books.start()
    books.ledger.close()

    with hold(office.place, 0):
        at_work = office.command("runs", "job.yaml", "--json").receipt["executions"]
    killed = office.command("runs", "job.yaml", "--json").receipt["executions"]

    assert [run["outcome"] for run in at_work] == ["at work now", "killed"]
    assert [run["outcome"] for run in killed] == ["killed", "killed"]
    assert killed[0]["exit_code"] is killed[0]["ended_at"] is killed[0]["found_share"] is None
    assert "killed" in office.command("runs", "job.yaml").stdout


def test_where_the_system_does_not_tell_of_locks_nothing_is_claimed(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is one of both."""
    books = books_of(office)
    books.start()
    books.ledger.close()
    monkeypatch.setattr("enrich.look.runs.is_held", lambda _: None)

    (run,) = read_runs(load_job(office.job_file), 5)["executions"]

    assert run["outcome"] == "at work, killed"


def test_to_look_at_the_lock_does_not_take_it(office: Office) -> None:
    """A run that starts at that moment must not be refused."""
    assert is_held(office.place) is False
    with hold(office.place, 0):
        assert is_held(office.place) is True
    assert is_held(office.place) is False


def test_lines_fit_a_terminal(office: Office) -> None:
    """Also with large numbers: at most 100 columns, all columns under their heads."""
    books = books_of(office).begin(1)
    books.settle(books.submit(), MISSED)
    receipt = {"rows": 1_234_567, "found": 1_234_567}
    books.do(Ledger.end_execution, books.execution, 13, receipt, books.now + 86_400_000 * 4, 999_999_900_000)
    books.ledger.close()

    shown = list(lines(read_runs(load_job(office.job_file), 5)))

    assert max(map(len, shown)) <= 100
    assert "1,234,567" in shown[1]
    assert len(shown[0]) == len(shown[1])


def test_it_can_be_asked_while_a_run_writes(api: Api, office: Office) -> None:
    """It waits for nobody."""
    office.write_leads(people(1))
    office.command("run", "job.yaml", api=api)
    ledger = Ledger(office.place)
    with ledger.transaction():
        ledger.start_execution("job", None, 1)
        told = office.command("runs", "job.yaml", "--json").receipt
    ledger.close()

    assert [run["execution"] for run in told["executions"]] == [1]

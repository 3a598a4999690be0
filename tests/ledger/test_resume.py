"""Tasks that an earlier run wrote off: which are polled, and what their answers change in the counts of both runs."""

from __future__ import annotations

import pytest

from enrich.ledger import queue, records, resume, transitions
from enrich.ledger.verify import check_ledger
from enrich.models import Answer, State
from tests.support.ledger import BINDING, COST, FOUND, MAX_PRICE, CommittingLedger
from tests.support.workspace import both_backends

backend = both_backends

EXPIRED = Answer(State.EXPIRED, "HTTP 404")


def write_off(ledger: CommittingLedger, how: str, *, bulk: bool = False) -> list[int]:
    """Send two leads, or one, and write their task off; return its attempts."""
    ledger.start_and_enroll(*((1, 2) if bulk else (1,)))
    if how == "error with an id":
        claims = ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, 1 + bulk, bulk=bulk)
        attempts = [claim.attempt_id for claim in claims]
        unclear = [(attempt, "HTTP 500", ledger.now, "task") for attempt in attempts]
        ledger.commit(transitions.mark_in_doubt, unclear)
    elif bulk:
        attempts = ledger.submit_bulk(2)
        ledger.settle_bulk(attempts, EXPIRED, credits_=None)
    else:
        attempts = [ledger.submit()]
        ledger.settle(attempts[0], EXPIRED)
    return attempts


def written_off(ledger: CommittingLedger) -> list[list[int]]:
    """List the attempts of each written-off task that is polled."""
    return [list(task.attempts) for task in resume.written_off_tasks(ledger.wrapped, 0)]


def counters(ledger: CommittingLedger, execution: int) -> tuple[int, int, int]:
    """Return spent, unknown and submitted of a run; the ledger must be sound."""
    assert check_ledger(ledger.location).problems == []
    row = records.read_execution(ledger.wrapped, execution)
    return row.spent, row.unknown, row.submitted


@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
@pytest.mark.parametrize("how", ["404", "error with an id"])
def test_late_answer_counts_in_the_run_that_gets_it(ledger: CommittingLedger, how: str, *, bulk: bool) -> None:
    """The earlier run keeps only the POST: it did not get the answer, so the price is no longer unknown there."""
    attempts = write_off(ledger, how, bulk=bulk)
    size, first = len(attempts), ledger.execution
    assert written_off(ledger) == [attempts]
    assert counters(ledger, first) == ((0, size, size) if how == "404" else (0, 0, 0))

    second = ledger.start_execution()
    ledger.commit(resume.revive, attempts, second)

    assert ledger.state_of(1) is State.SUBMITTED
    assert counters(ledger, first) == (0, 0, size)
    assert ledger.execution_counters == (0, size * MAX_PRICE, 0, 0)
    assert written_off(ledger) == []

    if bulk:
        ledger.settle_bulk(attempts, FOUND, credits_=COST)
    else:
        ledger.settle(attempts[0], FOUND)

    assert ledger.state_of(1) is State.FOUND
    assert counters(ledger, first) == (0, 0, size)
    assert ledger.execution_counters == (COST, 0, 0, 0)


@pytest.mark.parametrize("later_run", [False, True], ids=["same run", "later run"])
@pytest.mark.parametrize("how", ["404", "error with an id"])
def test_late_answer_of_a_resent_request_settles_its_own_price(
    ledger: CommittingLedger, how: str, *, later_run: bool
) -> None:
    """The request was sent again. Only the reservation of the earlier attempt ends, and its price is known now."""
    (attempt,) = write_off(ledger, how)
    first = ledger.execution
    submitted = int(how == "404")
    if later_run:
        ledger.start_execution()
    ledger.enroll([1], retry={State.EXPIRED, State.IN_DOUBT})
    again = ledger.submit("again")
    assert written_off(ledger) == [[attempt]]

    ledger.commit(resume.settle_superseded, attempt, FOUND, ledger.now, ledger.execution)

    assert ledger.state_of(1) is State.SUBMITTED
    if later_run:
        assert counters(ledger, first) == (0, 0, submitted)
    assert counters(ledger, ledger.execution) == (COST, 0, 1 if later_run else 1 + submitted)
    assert ledger.query_all("SELECT sum(reserved) FROM executions") == [(MAX_PRICE,)]
    assert written_off(ledger) == []

    ledger.settle(again)

    assert ledger.state_of(1) is State.FOUND
    assert ledger.query_all("SELECT sum(reserved), sum(spent) FROM executions") == [(0, 2 * COST)]


@pytest.mark.parametrize("earlier", [False, True], ids=["a later attempt", "an earlier attempt"])
def test_id_of_another_attempt_is_not_polled(ledger: CommittingLedger, *, earlier: bool) -> None:
    """The API returned one id twice. Which of the attempts its answer belongs to is not known."""
    ledger.start_and_enroll(1)
    lost, kept = (1, 0) if earlier else (0, 1)
    attempts = []
    for place in range(2):
        attempts.append(ledger.claim().attempt_id)
        ledger.commit(transitions.record_accepted, [(attempts[place], "task", ledger.now)], BINDING)
        if place == lost:
            ledger.commit(transitions.mark_in_doubt, [(attempts[place], "HTTP 404", ledger.now, None)])
        else:
            ledger.settle(attempts[place])
        ledger.enroll([1], retry={State.IN_DOUBT}, stale={State.FOUND: ledger.now + 1})

    assert ledger.query_all("SELECT state, task_id FROM attempts WHERE id = ?", attempts[lost]) == [
        ("in_doubt", "task")
    ]
    assert ledger.query_all("SELECT state, task_id FROM attempts WHERE id = ?", attempts[kept]) == [("found", "task")]
    assert written_off(ledger) == []

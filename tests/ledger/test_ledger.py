"""The ledger: every transition with its credits, durability, and who may open the file."""

from __future__ import annotations

import itertools
import os
import re
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from enrich.errors import CommandRefused
from enrich.job.target import Target, TargetKind
from enrich.ledger import enroll, queries, queue, records, resume, schema, transitions
from enrich.ledger.database import Database
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.queue import CapReached
from enrich.models import Answer, State, Task
from tests.support.cases import in_turn
from tests.support.ledger import (
    BINDING,
    CALL,
    COST,
    DEFAULT_SELECTION,
    FOUND,
    FREE_FAILURE,
    MAX_PRICE,
    NO_MATCH,
    CommittingLedger,
    RowRequest,
    as_batch,
    params,
    results_of,
    row_requests,
    sqlite_connection,
)
from tests.support.workspace import both_backends

backend = both_backends


class TestTransitions:
    """The lettered edges of the state diagram, each with its effect on credits."""

    def test_claim_reserves_price(self, ledger: CommittingLedger) -> None:
        """Edge a: the request is `submitting` and its maximum price is reserved."""
        claim = ledger.start_and_enroll(1).claim()

        assert claim.params == params(1)
        assert ledger.state_of(1) is State.SUBMITTING
        assert ledger.execution_counters == (0, MAX_PRICE, 0, 0)
        assert ledger.query_one("SELECT state, reserved FROM attempts") == ("submitting", MAX_PRICE)

    def test_accept_keeps_reservation(self, ledger: CommittingLedger) -> None:
        """Edge b: the task id is stored; nothing is spent yet."""
        ledger.start_and_enroll(1).submit("task-1")

        assert ledger.state_of(1) is State.SUBMITTED
        assert ledger.execution_counters == (0, MAX_PRICE, 0, 1)
        assert ledger.query_one("SELECT task_id, submitted_ms FROM attempts") == ("task-1", ledger.now)
        assert ledger.query_one("SELECT attempt_count FROM requests") == (1,)

    def test_refused_request_is_released(self, ledger: CommittingLedger) -> None:
        """Edge c: the reservation is released and the attempt does not count."""
        claim = ledger.start_and_enroll(1).claim()
        ledger.commit(transitions.record_refused, [(claim.attempt_id, "HTTP 429", ledger.now)])

        assert ledger.state_of(1) is State.PENDING
        assert ledger.execution_counters == (0, 0, 0, 0)
        assert ledger.query_one("SELECT attempt_count FROM requests") == (0,)
        assert ledger.query_one("SELECT state, error, credits FROM attempts") == ("refused", "HTTP 429", 0)
        assert ledger.claim().attempt_id != claim.attempt_id

    def test_rejected_request_fails_free(self, ledger: CommittingLedger) -> None:
        """Edge c: a request whose param the API rejects fails at no cost."""
        claim = ledger.start_and_enroll(1).claim()
        ledger.commit(transitions.record_rejected, [(claim.attempt_id, "company: unknown", ledger.now)])

        assert ledger.state_of(1) is State.FAILED
        assert ledger.execution_counters == (0, 0, 0, 0)

    def test_in_doubt_keeps_reservation(self, ledger: CommittingLedger) -> None:
        """Edge d: it is unknown whether the request was charged, so its price stays reserved."""
        claim = ledger.start_and_enroll(1).claim()
        ledger.commit(transitions.mark_in_doubt, [(claim.attempt_id, "no answer", ledger.now, None)])

        assert ledger.state_of(1) is State.IN_DOUBT
        assert ledger.execution_counters == (0, MAX_PRICE, 0, 0)
        assert queries.spent_totals(ledger.wrapped) == (0, 0)

    @pytest.mark.parametrize("answer", [FOUND, NO_MATCH, Answer(State.FAILED, "broken", credits=1)])
    def test_answer_settles_reservation(self, ledger: CommittingLedger, answer: Answer) -> None:
        """Edge e: the actual price is spent, and the rest of the reservation is released."""
        attempt = ledger.start_and_enroll(1).submit()

        assert ledger.settle(attempt, answer) is answer.state
        assert ledger.state_of(1) is answer.state
        assert ledger.execution_counters == (answer.credits, 0, 0, 1)

    @pytest.mark.long
    @pytest.mark.parametrize("state", [State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED])
    def test_unknown_price_keeps_reservation(self, ledger: CommittingLedger, state: State) -> None:
        """Edge e: an unknown price counts as unknown, never as 0, and stays reserved."""
        attempt = ledger.start_and_enroll(1).submit()
        ledger.settle(attempt, Answer(state))

        assert ledger.state_of(1) is state
        assert ledger.execution_counters == (0, MAX_PRICE, 1, 1)
        assert queries.spent_totals(ledger.wrapped) == (0, 1)

    def test_lost_task_is_in_doubt(self, ledger: CommittingLedger) -> None:
        """Edge e: a lost task keeps its reservation, because it may have been charged."""
        attempt = ledger.start_and_enroll(1).submit()
        ledger.commit(transitions.mark_in_doubt, [(attempt, "404", ledger.now, None)])

        assert ledger.state_of(1) is State.IN_DOUBT
        assert ledger.execution_counters == (0, MAX_PRICE, 0, 1)
        assert ledger.query_one("SELECT attempt_count FROM requests") == (1,)

    @pytest.mark.long
    @pytest.mark.parametrize("state", [State.FAILED, State.EXPIRED, State.IN_DOUBT])
    def test_retry_requeues_state(self, ledger: CommittingLedger, state: State) -> None:
        """Edge f: `--retry` queues a request, which keeps its state until claimed; its old attempt stays on record."""
        attempt = ledger.start_and_enroll(1).submit()
        if state is State.IN_DOUBT:
            ledger.commit(transitions.mark_in_doubt, [(attempt, "404", ledger.now, None)])
        else:
            ledger.settle(attempt, Answer(state, "gone"))
        ledger.enroll([1])
        assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []

        ledger.enroll([1], retry={state})

        assert ledger.state_of(1) is state
        assert enroll.enrolled_counts(ledger.wrapped) == {State.PENDING: 1}
        assert ledger.submit("again") != attempt
        assert ledger.query_all("SELECT task_id FROM attempts ORDER BY id") == [(f"task-{attempt}",), ("again",)]

    def test_free_failure_is_requeued(self, ledger: CommittingLedger) -> None:
        """Edge g: a free failure goes back to its place in the queue automatically."""
        attempt = ledger.start_and_enroll(1, 2).submit()

        assert ledger.settle(attempt, FREE_FAILURE) is State.PENDING
        assert ledger.execution_counters == (0, 0, 0, 1)
        assert ledger.claim().params == params(1)

    def test_free_failure_respects_max_attempts(self, ledger: CommittingLedger) -> None:
        """Edge g ends at `max_attempts`; POSTs that the API refused do not count."""
        ledger.start_and_enroll(1)
        for _ in range(2):
            ledger.commit(transitions.record_refused, [(ledger.claim().attempt_id, "HTTP 429", ledger.now)])

        outcomes = [ledger.settle(ledger.submit(), FREE_FAILURE, max_attempts=3) for _ in range(3)]

        assert outcomes == [State.PENDING, State.PENDING, State.FAILED]

    def test_retry_resets_attempt_count(self, ledger: CommittingLedger) -> None:
        """Edge f: `--retry` allows `max_attempts` attempts again."""
        ledger.start_and_enroll(1)
        assert ledger.settle(ledger.submit(), FREE_FAILURE, max_attempts=1) is State.FAILED

        ledger.enroll([1], retry={State.FAILED})

        assert ledger.settle(ledger.submit(), FREE_FAILURE, max_attempts=2) is State.PENDING
        assert ledger.settle(ledger.submit(), FREE_FAILURE, max_attempts=2) is State.FAILED

    def test_retry_only_for_rows_in_input(self, ledger: CommittingLedger) -> None:
        """Edge f: a lead that is no longer in the input is not retried."""
        ledger.start_and_enroll(1, 2)
        for _ in range(2):
            ledger.settle(ledger.submit(), Answer(State.FAILED, credits=0))

        ledger.enroll([2], retry={State.FAILED})

        assert ledger.claim().params == params(2)
        assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []

    @pytest.mark.long
    @pytest.mark.parametrize("state", [State.FAILED, State.EXPIRED, State.IN_DOUBT])
    def test_retry_lasts_one_execution(self, ledger: CommittingLedger, state: State) -> None:
        """Edge f: `--retry` lasts one run; what it did not reach keeps its state, and the next run leaves it."""
        attempt = ledger.start_and_enroll(1).submit()
        if state is State.IN_DOUBT:
            ledger.commit(transitions.mark_in_doubt, [(attempt, "404", ledger.now, None)])
        else:
            ledger.settle(attempt, Answer(state, "gone"))
        ledger.enroll([1], retry={state})
        ledger.commit(transitions.record_refused, [(ledger.claim().attempt_id, "HTTP 429", ledger.now)])

        assert ledger.state_of(1) is state
        assert enroll.enrolled_counts(ledger.wrapped) == {State.PENDING: 1}
        ledger.start_execution()
        ledger.enroll([1])
        assert enroll.enrolled_counts(ledger.wrapped) == {state: 1}
        assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []

    def test_failed_retry_is_not_repeated(self, ledger: CommittingLedger) -> None:
        """Edge f: a retry that fails is not repeated, so it can't pay in an endless loop."""
        ledger.start_and_enroll(1)
        ledger.settle(ledger.submit(), Answer(State.FAILED, credits=COST))
        ledger.enroll([1], retry={State.FAILED})
        ledger.settle(ledger.submit("again"), Answer(State.FAILED, credits=COST))

        assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []

    @pytest.mark.long
    @pytest.mark.parametrize("answer", [FOUND, NO_MATCH])
    def test_refresh_requeues_old_answers(self, ledger: CommittingLedger, answer: Answer) -> None:
        """Edge h: only answers older than the given time are refreshed, and only in states named by the policy."""
        ledger.start_and_enroll(1, 2)
        ledger.settle(ledger.submit(), answer)
        ledger.now += 10
        ledger.settle(ledger.submit(), answer)

        ledger.enroll([1, 2], stale={answer.state: ledger.now})

        assert enroll.enrolled_counts(ledger.wrapped) == {State.PENDING: 1, answer.state: 1}
        assert ledger.claim().params == params(1)
        other = State.NOT_FOUND if answer.state is State.FOUND else State.FOUND
        ledger.enroll([1, 2], stale={other: ledger.now + 1})
        assert ledger.state_of(2) is answer.state

    @pytest.mark.parametrize(
        "move",
        [
            lambda ledger, attempt: transitions.record_refused(ledger, [(attempt, "x", 1)]),
            lambda ledger, attempt: transitions.record_rejected(ledger, [(attempt, "x", 1)]),
            lambda ledger, attempt: transitions.record_accepted(ledger, [(attempt, "other", 1)], BINDING),
            lambda ledger, attempt: transitions.mark_in_doubt(ledger, [(attempt, "x", 1, None)]),
            lambda ledger, attempt: transitions.settle(ledger, [(attempt, FOUND, 1)], 1, 3),
        ],
        ids=["refused", "rejected", "accepted", "doubt", "settle"],
    )
    def test_illegal_transition_changes_nothing(
        self, ledger: CommittingLedger, move: Callable[[Database, int], object]
    ) -> None:
        """An illegal transition of a settled request raises and changes neither state nor credits."""
        attempt = ledger.start_and_enroll(1).submit()
        ledger.settle(attempt)
        before = ledger.query_all("SELECT * FROM attempts, requests, executions")

        with pytest.raises(AssertionError), ledger.wrapped.transaction():
            move(ledger.wrapped, attempt)

        assert ledger.query_all("SELECT * FROM attempts, requests, executions") == before

    def test_late_transition_of_old_attempt(self, ledger: CommittingLedger) -> None:
        """A late transition of a refused attempt does not change the attempt that followed it."""
        first = ledger.start_and_enroll(1).claim()
        ledger.commit(transitions.record_refused, [(first.attempt_id, "HTTP 429", ledger.now)])
        ledger.claim()

        with pytest.raises(AssertionError), ledger.wrapped.transaction():
            transitions.record_accepted(ledger.wrapped, [(first.attempt_id, "late", ledger.now)], BINDING)

        assert ledger.state_of(1) is State.SUBMITTING


class TestCurrentResult:
    """The result a row has while its request is sent again."""

    def current_result(self, ledger: CommittingLedger, number: int = 1) -> tuple[State, str | None]:
        """Return the state and the answer of a lead's row."""
        ledger.commit(enroll.begin_pass)
        (known,) = results_of(ledger.wrapped, row_requests([number]), DEFAULT_SELECTION)
        return State(known.state), known.answer

    def refresh(self, ledger: CommittingLedger) -> int:
        """Refresh old answers; return the new attempt."""
        ledger.now += 10
        ledger.enroll([1], stale=dict.fromkeys((State.FOUND, State.NOT_FOUND), ledger.now))
        return ledger.submit()

    @pytest.mark.long
    def test_found_answer_is_kept_until_replaced(self, ledger: CommittingLedger) -> None:
        """A found answer stays during a refresh and after no match or in doubt; only a newer one replaces it."""
        ledger.settle(ledger.start_and_enroll(1).submit())
        old = (State.FOUND, FOUND.raw)

        attempt = self.refresh(ledger)
        assert self.current_result(ledger) == old
        ledger.settle(attempt, NO_MATCH)
        assert ledger.state_of(1) is State.NOT_FOUND
        assert self.current_result(ledger) == old
        ledger.settle(self.refresh(ledger), Answer(State.FOUND, credits=1, raw="{}"))

        assert self.current_result(ledger) == (State.FOUND, "{}")

    def test_no_match_does_not_hide_in_doubt(self, ledger: CommittingLedger) -> None:
        """No match is not kept: when its refresh is lost, the result is in doubt."""
        ledger.settle(ledger.start_and_enroll(1).submit(), NO_MATCH)
        assert self.current_result(ledger) == (State.NOT_FOUND, NO_MATCH.raw)

        attempt = self.refresh(ledger)
        assert self.current_result(ledger)[0] is State.SUBMITTED
        ledger.commit(transitions.mark_in_doubt, [(attempt, "404", ledger.now, None)])

        assert self.current_result(ledger)[0] is State.IN_DOUBT

    def test_unknown_request_has_no_result(self, ledger: CommittingLedger) -> None:
        """An unknown request has no result."""
        ledger.start_and_enroll(1)

        assert [known.position for known in results_of(ledger.wrapped, row_requests([9, 1]))] == [1]

    def test_first_row_of_request_is_marked(self, ledger: CommittingLedger) -> None:
        """On a second pass each batch returns a request once, and `first` is true once, across batches."""
        ledger.start_and_enroll(1, 2)
        ledger.settle(ledger.submit())
        ledger.commit(enroll.begin_pass)

        batches = [row_requests([2, 1, 2]), row_requests([1, 2, 1], 3)]
        firsts = [
            (known.position, known.first)
            for batch in batches
            for known in results_of(ledger.wrapped, batch, DEFAULT_SELECTION)
        ]

        assert firsts == [(0, True), (1, True), (3, False), (4, False)]


def fail_after(_: object) -> None:
    """Raise after a transition."""
    raise ZeroDivisionError


class TestQueue:
    """From the input to the claims."""

    def test_duplicates_share_request(self, ledger: CommittingLedger) -> None:
        """Duplicates within a batch and across batches share one request."""
        ledger.start_execution()
        ledger.enroll([1, 2, 1], [2, 3, 3, 1])

        assert enroll.enrolled_counts(ledger.wrapped) == {State.PENDING: 3}
        assert ledger.query_all("SELECT queue_position FROM requests ORDER BY id") == [(0,), (1,), (4,)]

    def test_claims_follow_input_order(self, ledger: CommittingLedger) -> None:
        """Claims follow the file's order, not the order in which leads were enrolled."""
        ledger.start_and_enroll(1, 2, 3)
        ledger.enroll([3, 5], [1, 4, 2])

        assert [ledger.claim().params for _ in range(5)] == [params(number) for number in (3, 5, 1, 4, 2)]
        assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []

    def test_lead_not_in_input_is_not_claimed(self, ledger: CommittingLedger) -> None:
        """A lead that is not in the current input is not claimed."""
        ledger.start_and_enroll(1, 2)
        ledger.enroll([2])

        assert ledger.claim().params == params(2)
        assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []

    def test_free_failure_not_in_input_is_not_resent(self, ledger: CommittingLedger) -> None:
        """Edge g makes a free failure pending; without its row in the input it is not resent."""
        attempt = ledger.start_and_enroll(1).submit()
        ledger.enroll([2])
        ledger.settle(attempt, FREE_FAILURE)

        assert ledger.claim().params == params(2)
        assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []

    def test_answered_requests_are_not_claimed(self, ledger: CommittingLedger) -> None:
        """Requests that are found, not found, failed or in doubt are reused, not claimed."""
        ledger.start_and_enroll(1, 2, 3, 4)
        for answer in (FOUND, NO_MATCH, Answer(State.FAILED)):
            ledger.settle(ledger.submit(), answer)
        ledger.commit(transitions.mark_in_doubt, [(ledger.claim().attempt_id, "reset", ledger.now, None)])

        ledger.enroll([1, 2, 3, 4])

        assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []
        assert enroll.enrolled_counts(ledger.wrapped) == dict.fromkeys(
            (State.FOUND, State.NOT_FOUND, State.FAILED, State.IN_DOUBT), 1
        )

    def test_cap_is_never_exceeded(self, ledger: CommittingLedger) -> None:
        """The cap counts reserved credits; credits that are released can be claimed again."""
        ledger.start_and_enroll(*range(9), cap=2 * MAX_PRICE + COST)
        first = ledger.submit()
        ledger.submit()
        with pytest.raises(CapReached), ledger.wrapped.transaction():
            queue.claim(ledger.wrapped, ledger.execution, MAX_PRICE, ledger.now)
        assert ledger.execution_counters[:2] == (0, 2 * MAX_PRICE)

        ledger.settle(first)
        ledger.claim()

        assert ledger.execution_counters[:2] == (COST, 2 * MAX_PRICE)
        with pytest.raises(CapReached), ledger.wrapped.transaction():
            queue.claim(ledger.wrapped, ledger.execution, MAX_PRICE, ledger.now)

    def test_open_requests_may_release_credits_until_timeout(self, ledger: CommittingLedger) -> None:
        """At the cap, a worker waits for open requests that may release credits, but not for those past the timeout."""
        has_open = [ledger.start_and_enroll(1).commit(queries.has_open_since, 0)]
        claim = ledger.claim()
        has_open.append(ledger.commit(queries.has_open_since, 0))
        ledger.commit(transitions.record_accepted, [(claim.attempt_id, "task", 5_000)], BINDING)
        has_open += [ledger.commit(queries.has_open_since, since) for since in (4_000, 6_000)]

        assert has_open == [False, True, True, False]

    def test_empty_queue_is_not_cap_reached(self, ledger: CommittingLedger) -> None:
        """With an empty queue, a cap of 0 is not reached."""
        ledger.start_and_enroll(cap=0)

        assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []


class TestExecutions:
    """What one execution leaves to the next."""

    def test_recovery_marks_submitting_in_doubt(self, ledger: CommittingLedger) -> None:
        """Edge d: `submitting` at the start means a killed run and becomes in doubt; other states stay."""
        ledger.start_and_enroll(1, 2, 3)
        ledger.submit("living")
        ledger.claim()
        ledger.reopen()

        assert ledger.commit(resume.recover, 7) == 1
        assert [ledger.state_of(number) for number in (1, 2, 3)] == [State.SUBMITTED, State.IN_DOUBT, State.PENDING]
        assert ledger.commit(resume.recover, 8) == 0
        assert ledger.query_one("SELECT settled_ms, error IS NOT NULL FROM attempts WHERE state = 'in_doubt'") == (7, 1)
        assert ledger.query_one("SELECT attempt_count FROM requests WHERE state = 'in_doubt'") == (1,)

    def test_open_reservations_are_adopted(self, ledger: CommittingLedger) -> None:
        """Open tasks settle in the new execution and count against its cap; in-doubt reservations stay behind."""
        attempt = ledger.start_and_enroll(1, 2, 3).submit()
        ledger.commit(transitions.mark_in_doubt, [(ledger.claim().attempt_id, "reset", ledger.now, None)])
        first = ledger.execution

        second = ledger.start_execution(cap=2 * MAX_PRICE - 1)
        ledger.enroll([1, 2, 3])
        assert ledger.execution_counters == (0, MAX_PRICE, 0, 0)
        with pytest.raises(CapReached), ledger.wrapped.transaction():
            queue.claim(ledger.wrapped, second, MAX_PRICE, ledger.now)
        ledger.settle(attempt)

        assert ledger.execution_counters == (COST, 0, 0, 0)
        assert ledger.query_one("SELECT execution_id, settled_execution_id FROM attempts WHERE id = ?", attempt) == (
            first,
            second,
        )
        assert ledger.claim().params == params(3)

    def test_execution_ends_with_summary(self, ledger: CommittingLedger) -> None:
        """The newest executions come first, and each job sees its own."""
        ledger.start_execution()
        ledger.commit(records.start_execution, "other", 3, ledger.now)
        ledger.commit(records.end_execution, ledger.execution, 10, {"rows": 2}, 77)

        assert [row.job for row in records.list_executions(ledger.wrapped)] == ["other", "job"]
        (row,) = records.list_executions(ledger.wrapped, "job", 5)
        assert (row.ended_ms, row.exit_code, row.summary) == (77, 10, '{"rows": 2}')

    def test_ledger_used_flag(self, ledger: CommittingLedger) -> None:
        """`has_submitted` is true once the API has accepted a request."""
        ledger.start_and_enroll(1)
        ledger.commit(transitions.record_refused, [(ledger.claim().attempt_id, "HTTP 429", ledger.now)])
        assert not records.has_submitted(ledger.wrapped, "job")

        ledger.submit()

        assert records.has_submitted(ledger.wrapped, "job")

    def test_tasks_ordered_by_expiry(self, ledger: CommittingLedger) -> None:
        """The task submitted first expires first and comes first, whatever its row."""
        ledger.start_and_enroll(1, 2, 3)
        claims = [ledger.claim() for _ in range(3)]
        for at, claim in zip((30, 10, 20), claims, strict=True):
            ledger.commit(transitions.record_accepted, [(claim.attempt_id, f"t{at}", at)], BINDING)
        ledger.commit(transitions.mark_acknowledged, [claims[2].attempt_id])

        assert transitions.submitted_tasks(ledger.wrapped) == [
            Task((claims[1].attempt_id,), "t10", 10),
            Task((claims[2].attempt_id,), "t20", 20, acknowledged=True),
            Task((claims[0].attempt_id,), "t30", 30),
        ]

    def test_ledger_binding_is_set_once(self, ledger: CommittingLedger) -> None:
        """The first accepted POST sets each fact of the binding; unknown facts set nothing."""
        ledger.start_and_enroll(1, 2)
        ledger.commit(
            transitions.record_accepted, [(ledger.claim().attempt_id, "t", 1)], {"api_host": "first", "workspace": None}
        )
        ledger.commit(
            transitions.record_accepted,
            [(ledger.claim().attempt_id, "u", 1)],
            {"api_host": "second", "workspace": "ours"},
        )

        assert records.read_fact(ledger.wrapped, "api_host") == "first"
        assert records.read_fact(ledger.wrapped, "workspace") == "ours"
        assert records.read_fact(ledger.wrapped, "other") is None

    def test_stored_waterfall_is_replaced(self, ledger: CommittingLedger) -> None:
        """The newest description of a target replaces the old one, and no other's."""
        assert records.load_description(ledger.wrapped, CALL) is None
        ledger.commit(records.save_description, CALL, {"name": "é"}, [1])
        ledger.commit(records.save_description, CALL, {"name": "new"}, [2, 1])

        assert records.load_description(ledger.wrapped, CALL) == ({"name": "new"}, [2, 1])
        assert records.load_description(ledger.wrapped, Target(TargetKind.ENRICHMENT, CALL.id)) is None


class TestTransactions:
    """What is kept and undone, and what other connections see."""

    def test_transaction_rolls_back(self, ledger: CommittingLedger) -> None:
        """A transaction that raises changes nothing."""
        ledger.start_and_enroll(1)
        with pytest.raises(ZeroDivisionError), ledger.wrapped.transaction():
            fail_after(queue.claim(ledger.wrapped, ledger.execution, MAX_PRICE, 1))

        assert ledger.state_of(1) is State.PENDING
        assert ledger.execution_counters == (0, 0, 0, 0)

    def test_savepoint_rolls_back_one_transition(self, ledger: CommittingLedger) -> None:
        """When one transition of a transaction raises, the others are kept."""
        ledger.start_and_enroll(1, 2)
        with ledger.wrapped.transaction():
            queue.claim(ledger.wrapped, ledger.execution, MAX_PRICE, 1)
            with pytest.raises(ZeroDivisionError), ledger.wrapped.savepoint():
                fail_after(queue.claim(ledger.wrapped, ledger.execution, MAX_PRICE, 1))

        assert (ledger.state_of(1), ledger.state_of(2)) == (State.SUBMITTING, State.PENDING)

    def test_savepoint_forgets_the_facts_it_rolls_back(self, ledger: CommittingLedger) -> None:
        """What a failed operation bound the ledger to, and read again, is bound by the next operation."""

        def bind_twice() -> None:
            records.bind(ledger.wrapped, {"api_host": BINDING["api_host"]})
            records.bind(ledger.wrapped, BINDING)

        with ledger.wrapped.transaction():
            with pytest.raises(ZeroDivisionError), ledger.wrapped.savepoint():
                fail_after(bind_twice())  # type: ignore[func-returns-value]
            records.bind(ledger.wrapped, BINDING)

        assert {name: records.read_fact(ledger.wrapped, name) for name in BINDING} == BINDING

    def test_readers_do_not_block(self, ledger: CommittingLedger) -> None:
        """A reader sees committed data, waits for no writer and can't change anything."""
        ledger.start_and_enroll(1, 2)
        ledger.submit()
        with ledger.wrapped.transaction():
            queue.claim(ledger.wrapped, ledger.execution, MAX_PRICE, ledger.now)
            reader = Database(ledger.location, read_only=True)
            assert queries.state_counts(reader) == {State.SUBMITTED: 1, State.PENDING: 1}
            with pytest.raises(DATABASE_ERRORS, match=r"read-?only"):
                resume.recover(reader, 1)
        assert queries.state_counts(reader) == {State.SUBMITTED: 1, State.SUBMITTING: 1}
        reader.close()

    def test_invalid_fingerprint_length_fails(self, ledger: CommittingLedger) -> None:
        """A fingerprint of the wrong length raises, so that no request gets lost."""
        with pytest.raises(DATABASE_ERRORS), ledger.wrapped.transaction():
            enroll.enroll(ledger.wrapped, CALL, as_batch([RowRequest(0, b"short", "{}")]), DEFAULT_SELECTION)


class TestFile:
    """The SQLite file: opening, permissions, durability."""

    @pytest.fixture
    def backend(self) -> str:
        """Use a SQLite file only."""
        return "file"

    def test_ledger_files_are_0600(self, tmp_path: Path) -> None:
        """The ledger and its -wal and -shm files are for their owner only, because they hold personal data."""
        before = os.umask(0)
        try:
            ledger = CommittingLedger.open(tmp_path / "new" / "ledger.db").start_and_enroll(1)
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in ledger.path.parent.iterdir()}
            ledger.wrapped.close()
        finally:
            os.umask(before)

        assert modes == dict.fromkeys(("ledger.db", "ledger.db-wal", "ledger.db-shm"), 0o600)

    def test_commits_are_durable(self, ledger: CommittingLedger) -> None:
        """Commits are durable: WAL with synchronous=FULL syncs each of them."""
        (synchronous,) = ledger.wrapped.session.execute("PRAGMA synchronous").fetchone()

        assert synchronous == 2
        assert ledger.query_one("PRAGMA journal_mode") == ("wal",)

    def test_newer_ledger_is_refused(self, ledger: CommittingLedger) -> None:
        """A ledger of a later version is neither written nor read."""
        ledger.wrapped.session.execute("PRAGMA user_version = 99")

        for read_only in (True, False):
            with pytest.raises(CommandRefused, match=r"ledger\.db: .*newer") as refusal:
                Database(ledger.path, read_only=read_only)
            assert "99" in str(refusal.value.hint)

    def test_older_ledger_is_migrated_by_writer(
        self, ledger: CommittingLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Reading never changes an older file; the next run migrates it once, in one transaction."""
        first = schema.MIGRATIONS
        column, index = "CREATE TABLE more (x INTEGER) STRICT", "CREATE INDEX mores ON more (x)"
        monkeypatch.setattr(schema, "MIGRATIONS", [*first, f"{column};\n\nCREATE INDEX mores ON more (y)"])
        with pytest.raises(CommandRefused, match=r"ledger\.db: .*older"):
            Database(ledger.path, read_only=True)
        with pytest.raises(CommandRefused, match=r"ledger\.db"):
            Database(ledger.path)
        assert ledger.query_one("PRAGMA user_version") == (len(first),)

        monkeypatch.setattr(schema, "MIGRATIONS", [*first, f"{column};\n\n{index};\n"])
        Database(ledger.path).close()

        assert ledger.query_one("PRAGMA user_version") == (len(first) + 1,)
        assert ledger.query_all("SELECT * FROM more") == []

    def test_prerelease_ledger_is_refused(self, ledger: CommittingLedger) -> None:
        """A ledger from before the first release is neither read nor changed; the error shows what to do."""
        for mark, read_only in itertools.product(schema.UNRELEASED_IDS, (True, False)):
            ledger.wrapped.session.execute(f"PRAGMA application_id = {mark}")
            with pytest.raises(CommandRefused, match=r"ledger\.db: .*before its first release") as refusal:
                Database(ledger.path, read_only=read_only)
            assert "another one" in str(refusal.value.hint)

    @in_turn("read_only", [True, False])
    @in_turn("content", [b"First Name,Last Name\n" * 99, b"SQLite format 3\x00" + b"\xff" * 4080])
    def test_not_a_database_is_refused(self, tmp_path: Path, content: bytes, *, read_only: bool) -> None:
        """A file that is no database is refused by name and not changed."""
        path = tmp_path / "leads.csv"
        path.write_bytes(content)

        with pytest.raises(CommandRefused, match=r"leads\.csv"):
            Database(path, read_only=read_only)

        assert path.read_bytes() == content

    @pytest.mark.parametrize("version", [0, 1])
    def test_foreign_database_is_refused(self, tmp_path: Path, version: int) -> None:
        """A foreign database is refused and not changed, whatever version number it has."""
        path = tmp_path / "other.db"
        db = sqlite3.connect(path)
        db.executescript(f"CREATE TABLE theirs (x); PRAGMA user_version = {version}")
        db.close()
        content = path.read_bytes()

        for read_only in (True, False):
            with pytest.raises(CommandRefused, match=r"other\.db"):
                Database(path, read_only=read_only)

        assert path.read_bytes() == content

    def test_truncated_ledger_is_refused(self, tmp_path: Path) -> None:
        """A truncated ledger is refused, because requests missing in it would be paid for again."""
        path = tmp_path / "ledger.db"
        Database(path).close()
        os.truncate(path, path.stat().st_size // 2)

        with pytest.raises(CommandRefused, match=r"ledger\.db"):
            Database(path)

    def test_invalid_path_is_refused(self, tmp_path: Path) -> None:
        """A folder, a path below a file and an unwritable place are refused."""
        (tmp_path / "file").touch()
        for path in (tmp_path, tmp_path / "file" / "ledger.db", Path("/proc/enrich/ledger.db")):
            with pytest.raises(CommandRefused, match=re.escape(str(path))):
                Database(path)
        for path in (tmp_path, tmp_path / "nothing.db"):
            with pytest.raises(CommandRefused, match=re.escape(str(path))):
                Database(path, read_only=True)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_unwritable_ledger_is_refused(self, ledger: CommittingLedger) -> None:
        """The error for an unwritable ledger names the file."""
        ledger.path.chmod(0o400)
        with pytest.raises(CommandRefused, match=re.escape(str(ledger.path))):
            Database(ledger.path)

    def test_views_are_readable_with_sqlite3(self, ledger: CommittingLedger) -> None:
        """The views show credits as decimals and times as text."""
        ledger.now = 1_750_000_000_000
        ledger.start_and_enroll(1, cap=2_500_000)
        ledger.commit(transitions.record_accepted, [(ledger.claim(2_000_000).attempt_id, "t", ledger.now)], BINDING)
        ledger.settle(1, Answer(State.FOUND, provider="Mailhound", credits=1_500_000))

        assert ledger.query_one("SELECT state, provider, credits, task_id, settled_at FROM readable_requests") == (
            "found",
            "Mailhound",
            1.5,
            "t",
            "2025-06-15T15:06:40Z",
        )
        assert ledger.query_one("SELECT state, reserved, credits, claimed_at FROM readable_attempts") == (
            "found",
            2.0,
            1.5,
            "2025-06-15T15:06:40Z",
        )
        assert ledger.query_one(
            "SELECT job, credits_spent, credits_reserved, max_credits FROM readable_executions"
        ) == (
            "job",
            1.5,
            0.0,
            2.5,
        )

    def test_transitions_use_indexes(self, ledger: CommittingLedger) -> None:
        """Every transition finds its rows through an index, because a ledger may hold millions of requests."""
        statements: dict[str, None] = {}
        sqlite_connection(ledger.wrapped).set_trace_callback(statements.setdefault)
        ledger.commit(resume.recover, 1)
        ledger.start_execution()
        ledger.enroll([1, 2, 3], retry={State.FAILED}, stale={State.FOUND: 1})
        ledger.settle(ledger.submit())
        ledger.commit(transitions.record_refused, [(ledger.claim().attempt_id, "", 1)])
        ledger.commit(transitions.mark_in_doubt, [(ledger.claim().attempt_id, "", 1, None)])
        ledger.enroll([2], retry={State.IN_DOUBT})
        ledger.commit(transitions.record_refused, [(ledger.claim().attempt_id, "", 1)])
        transitions.submitted_tasks(ledger.wrapped)
        resume.written_off_tasks(ledger.wrapped, 0)
        resume.written_off_tasks(ledger.wrapped, 0, only_queued=True)
        list(results_of(ledger.wrapped, row_requests([1])))
        sqlite_connection(ledger.wrapped).set_trace_callback(None)

        plans: dict[str, list[str]] = {}
        for sql in statements:
            if sql.split()[0] in ("SELECT", "UPDATE", "INSERT"):
                plans[sql] = [str(row[3]) for row in ledger.wrapped.session.execute(f"EXPLAIN QUERY PLAN {sql}")]
        used = {match for plan in plans.values() for step in plan for match in re.findall(r"INDEX (\w+)", step)}

        assert {"queue", "open_attempts", "written_off"} <= used
        assert not [step for plan in plans.values() for step in plan if "task_ids (task_id>?)" in step]
        # Clearing the queue reads the whole queue, which holds no more than the last input. Whether any request was
        # erased is read from the first entry of the index.
        scans = {step for plan in plans.values() for step in plan if re.match(r"SCAN (requests|attempts|r|a)\b", step)}
        assert scans <= {"SCAN requests USING INDEX queue", "SCAN requests USING INDEX erased"}

    def test_progress_query_uses_indexes(self, ledger: CommittingLedger) -> None:
        """The progress queries use indexes: they read one execution's rows, not all earlier ones."""
        ledger.start_and_enroll(1, 2, 3)
        ledger.settle(ledger.submit("old"))
        carried = ledger.submit("carried")
        ledger.submit("left")
        ledger.start_and_enroll(4, 5)
        ledger.settle(carried)
        ledger.settle(ledger.submit("new"))
        statements: dict[str, None] = {}
        sqlite_connection(ledger.wrapped).set_trace_callback(statements.setdefault)
        moved = queries.credit_movements(ledger.wrapped, ledger.execution)
        sqlite_connection(ledger.wrapped).set_trace_callback(None)

        assert sorted(moved) == [
            ("known", 0, 1, COST, MAX_PRICE),
            ("known", 1, 1, COST, MAX_PRICE),
            ("submitted", 0, 1, 0, MAX_PRICE),
        ]
        assert len(queries.credit_movements(ledger.wrapped, 1)) == 2
        (sql,) = statements
        steps = [str(row[3]) for row in ledger.wrapped.session.execute(f"EXPLAIN QUERY PLAN {sql}")]
        assert "MULTI-INDEX OR" in steps
        assert "SCAN a" not in steps

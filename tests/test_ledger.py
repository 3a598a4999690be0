"""The ledger: every move with its money, what it survives, and who may open it."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from enrich.errors import Refused
from enrich.model import Answer, State, Task, Wanted
from enrich.store import schema
from enrich.store.dialect import FAILURES
from enrich.store.ledger import Ledger
from enrich.store.moves import CapReached
from tests.books import BOUND, CALL, COST, FOUND, FREE_FAILURE, MISSED, PRICE, Books, file_of, params, wanted
from tests.cases import in_turn
from tests.harness import BOTH


@pytest.fixture(params=BOTH)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


class TestMoves:
    """The lettered edges, each with what it does to the money."""

    def test_a_claim_writes_the_intent_and_reserves_the_worst_price(self, books: Books) -> None:
        """Edge a: the request is `submitting` and its price is set aside."""
        claim = books.begin(1).claim()

        assert claim.params == params(1)
        assert books.state(1) is State.SUBMITTING
        assert books.money == (0, PRICE, 0, 0)
        assert books.one("SELECT state, reserved FROM attempts") == ("submitting", PRICE)

    def test_an_accepted_request_keeps_its_reservation(self, books: Books) -> None:
        """Edge b: the task id is written down; nothing is spent yet."""
        books.begin(1).submit("task-1")

        assert books.state(1) is State.SUBMITTED
        assert books.money == (0, PRICE, 0, 1)
        assert books.one("SELECT task_id, submitted_ms FROM attempts") == ("task-1", books.now)
        assert books.one("SELECT attempts FROM requests") == (1,)

    def test_a_refused_request_goes_back_and_costs_nothing(self, books: Books) -> None:
        """Edge c: the reservation is released and the attempt does not count."""
        claim = books.begin(1).claim()
        books.do(Ledger.refused, [(claim.attempt_id, "HTTP 429", books.now)])

        assert books.state(1) is State.PENDING
        assert books.money == (0, 0, 0, 0)
        assert books.one("SELECT attempts FROM requests") == (0,)
        assert books.one("SELECT state, error, credits FROM attempts") == ("refused", "HTTP 429", 0)
        assert books.claim().attempt_id != claim.attempt_id

    def test_a_rejected_request_fails_free(self, books: Books) -> None:
        """Edge c: a param that the API names fails the request, at no cost."""
        claim = books.begin(1).claim()
        books.do(Ledger.rejected, [(claim.attempt_id, "company: unknown", books.now)])

        assert books.state(1) is State.FAILED
        assert books.money == (0, 0, 0, 0)

    def test_a_doubt_keeps_its_reservation(self, books: Books) -> None:
        """Edge d: nobody can tell whether it was charged, so the price stays set aside."""
        claim = books.begin(1).claim()
        books.do(Ledger.doubt, [(claim.attempt_id, "no answer", books.now, None)])

        assert books.state(1) is State.IN_DOUBT
        assert books.money == (0, PRICE, 0, 0)
        assert books.ledger.totals() == (0, 0)

    @pytest.mark.parametrize("answer", [FOUND, MISSED, Answer(State.FAILED, "broken", credits=1)])
    def test_an_answer_settles_the_reservation(self, books: Books, answer: Answer) -> None:
        """Edge e: the true price is spent and the rest of the reservation is free."""
        attempt = books.begin(1).submit()

        assert books.settle(attempt, answer) is answer.state
        assert books.state(1) is answer.state
        assert books.money == (answer.credits, 0, 0, 1)

    @pytest.mark.parametrize("state", [State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED])
    def test_an_answer_of_unknown_price_keeps_its_reservation(self, books: Books, state: State) -> None:
        """Edge e: what is not known is counted as not known, never as 0."""
        attempt = books.begin(1).submit()
        books.settle(attempt, Answer(state))

        assert books.state(1) is state
        assert books.money == (0, PRICE, 1, 1)
        assert books.ledger.totals() == (0, 1)

    def test_a_task_that_was_never_known_is_in_doubt(self, books: Books) -> None:
        """Edge e: a lost task keeps its reservation, as it may have been charged."""
        attempt = books.begin(1).submit()
        books.do(Ledger.doubt, [(attempt, "404", books.now, None)])

        assert books.state(1) is State.IN_DOUBT
        assert books.money == (0, PRICE, 0, 1)
        assert books.one("SELECT attempts FROM requests") == (1,)

    @pytest.mark.parametrize("state", [State.FAILED, State.EXPIRED, State.IN_DOUBT])
    def test_a_persons_word_sends_back_what_failed(self, books: Books, state: State) -> None:
        """Edge f: `--retry` names the state, which lasts until it is claimed; its old attempt stays on record."""
        attempt = books.begin(1).submit()
        if state is State.IN_DOUBT:
            books.do(Ledger.doubt, [(attempt, "404", books.now, None)])
        else:
            books.settle(attempt, Answer(state, "gone"))
        books.enroll([1])
        assert books.do(Ledger.claim, books.execution, PRICE, books.now) == []

        books.enroll([1], retry={state})

        assert books.state(1) is state
        assert books.ledger.enrolled() == {State.PENDING: 1}
        assert books.submit("again") != attempt
        assert books.all("SELECT task_id FROM attempts ORDER BY id") == [(f"task-{attempt}",), ("again",)]

    def test_a_free_failure_is_asked_again(self, books: Books) -> None:
        """Edge g: at no charge the request goes back to its place in the queue by itself."""
        attempt = books.begin(1, 2).submit()

        assert books.settle(attempt, FREE_FAILURE) is State.PENDING
        assert books.money == (0, 0, 0, 1)
        assert books.claim().params == params(1)

    def test_a_free_failure_is_asked_only_so_often(self, books: Books) -> None:
        """Edge g ends at `max_attempts`; what the API refused does not count."""
        books.begin(1)
        for _ in range(2):
            books.do(Ledger.refused, [(books.claim().attempt_id, "HTTP 429", books.now)])

        outcomes = [books.settle(books.submit(), FREE_FAILURE, max_attempts=3) for _ in range(3)]

        assert outcomes == [State.PENDING, State.PENDING, State.FAILED]

    def test_a_retry_starts_a_new_count_of_attempts(self, books: Books) -> None:
        """Edge f: the person's word allows `max_attempts` tries again."""
        books.begin(1)
        assert books.settle(books.submit(), FREE_FAILURE, max_attempts=1) is State.FAILED

        books.enroll([1], retry={State.FAILED})

        assert books.settle(books.submit(), FREE_FAILURE, max_attempts=2) is State.PENDING
        assert books.settle(books.submit(), FREE_FAILURE, max_attempts=2) is State.FAILED

    def test_a_retry_is_only_for_what_this_input_wants(self, books: Books) -> None:
        """Edge f: a lead that left the file is not sent back."""
        books.begin(1, 2)
        for _ in range(2):
            books.settle(books.submit(), Answer(State.FAILED, credits=0))

        books.enroll([2], retry={State.FAILED})

        assert books.claim().params == params(2)
        assert books.do(Ledger.claim, books.execution, PRICE, books.now) == []

    @pytest.mark.parametrize("state", [State.FAILED, State.EXPIRED, State.IN_DOUBT])
    def test_a_persons_word_lasts_for_one_execution(self, books: Books, state: State) -> None:
        """Edge f: what was not asked again stands where it stood, and the next run without the word leaves it."""
        attempt = books.begin(1).submit()
        if state is State.IN_DOUBT:
            books.do(Ledger.doubt, [(attempt, "404", books.now, None)])
        else:
            books.settle(attempt, Answer(state, "gone"))
        books.enroll([1], retry={state})
        books.do(Ledger.refused, [(books.claim().attempt_id, "HTTP 429", books.now)])

        assert books.state(1) is state
        assert books.ledger.enrolled() == {State.PENDING: 1}
        books.start()
        books.enroll([1])
        assert books.ledger.enrolled() == {state: 1}
        assert books.do(Ledger.claim, books.execution, PRICE, books.now) == []

    def test_what_fails_again_is_not_asked_again_in_the_same_run(self, books: Books) -> None:
        """Edge f: the person's word is good for one try, not for a circle that pays for ever."""
        books.begin(1)
        books.settle(books.submit(), Answer(State.FAILED, credits=COST))
        books.enroll([1], retry={State.FAILED})
        books.settle(books.submit("again"), Answer(State.FAILED, credits=COST))

        assert books.do(Ledger.claim, books.execution, PRICE, books.now) == []

    @pytest.mark.parametrize("answer", [FOUND, MISSED])
    def test_an_answer_that_is_too_old_is_asked_again(self, books: Books, answer: Answer) -> None:
        """Edge h: only what came before the given time, and only where the policy names its state."""
        books.begin(1, 2)
        books.settle(books.submit(), answer)
        books.now += 10
        books.settle(books.submit(), answer)

        books.enroll([1, 2], stale={answer.state: books.now})

        assert books.ledger.enrolled() == {State.PENDING: 1, answer.state: 1}
        assert books.claim().params == params(1)
        other = State.NOT_FOUND if answer.state is State.FOUND else State.FOUND
        books.enroll([1, 2], stale={other: books.now + 1})
        assert books.state(2) is answer.state

    @pytest.mark.parametrize(
        "move",
        [
            lambda ledger, attempt: ledger.refused([(attempt, "x", 1)]),
            lambda ledger, attempt: ledger.rejected([(attempt, "x", 1)]),
            lambda ledger, attempt: ledger.accepted([(attempt, "other", 1)], BOUND),
            lambda ledger, attempt: ledger.doubt([(attempt, "x", 1, None)]),
            lambda ledger, attempt: ledger.settle([(attempt, FOUND, 1)], 1, 3),
        ],
        ids=["refused", "rejected", "accepted", "doubt", "settle"],
    )
    def test_an_illegal_move_changes_nothing(self, books: Books, move: Callable[[Ledger, int], object]) -> None:
        """A request that is settled cannot be moved, and the money stays as it is."""
        attempt = books.begin(1).submit()
        books.settle(attempt)
        before = books.all("SELECT * FROM attempts, requests, executions")

        with pytest.raises(AssertionError), books.ledger.transaction():
            move(books.ledger, attempt)

        assert books.all("SELECT * FROM attempts, requests, executions") == before

    def test_an_attempt_that_is_not_the_newest_moves_nothing(self, books: Books) -> None:
        """A late word about a refused attempt does not touch the attempt that followed it."""
        first = books.begin(1).claim()
        books.do(Ledger.refused, [(first.attempt_id, "HTTP 429", books.now)])
        books.claim()

        with pytest.raises(AssertionError), books.ledger.transaction():
            books.ledger.accepted([(first.attempt_id, "late", books.now)], BOUND)

        assert books.state(1) is State.SUBMITTING


class TestStandingAnswer:
    """What a row is told while its request is asked again."""

    def standing(self, books: Books, number: int = 1) -> tuple[State, str | None]:
        """Tell the state and the answer that the row of a lead has."""
        books.do(Ledger.begin_pass)
        (known,) = books.ledger.standing(wanted([number]))
        return State(known.state), known.answer

    def refresh(self, books: Books) -> int:
        """Ask again what is old; return the new attempt."""
        books.now += 10
        books.enroll([1], stale=dict.fromkeys((State.FOUND, State.NOT_FOUND), books.now))
        return books.submit()

    def test_the_last_found_answer_stands_until_a_newer_one_comes(self, books: Books) -> None:
        """A found answer outlives the question, a miss and a doubt; a newer one replaces it."""
        books.settle(books.begin(1).submit())
        old = (State.FOUND, FOUND.raw)

        attempt = self.refresh(books)
        assert self.standing(books) == old
        books.settle(attempt, MISSED)
        assert books.state(1) is State.NOT_FOUND
        assert self.standing(books) == old
        books.settle(self.refresh(books), Answer(State.FOUND, credits=1, raw="{}"))

        assert self.standing(books) == (State.FOUND, "{}")

    def test_a_miss_does_not_hide_what_became_of_asking_again(self, books: Books) -> None:
        """Only a found answer stands: a miss that is asked again and gets lost is in doubt, and says so."""
        books.settle(books.begin(1).submit(), MISSED)
        assert self.standing(books) == (State.NOT_FOUND, MISSED.raw)

        attempt = self.refresh(books)
        assert self.standing(books)[0] is State.SUBMITTED
        books.do(Ledger.doubt, [(attempt, "404", books.now, None)])

        assert self.standing(books)[0] is State.IN_DOUBT

    def test_a_request_that_was_never_enrolled_is_left_out(self, books: Books) -> None:
        """The ledger says nothing of what it does not know."""
        books.begin(1)

        assert [known.position for known in books.ledger.standing(wanted([9, 1]))] == [1]

    def test_the_first_row_of_a_request_is_told_apart(self, books: Books) -> None:
        """On a second pass each batch tells a request once, and `first` holds once, across batches."""
        books.begin(1, 2)
        books.settle(books.submit())
        books.do(Ledger.begin_pass)

        batches = [wanted([2, 1, 2]), wanted([1, 2, 1], 3)]
        firsts = [(known.position, known.first) for batch in batches for known in books.ledger.standing(batch)]

        assert firsts == [(0, True), (1, True), (3, False), (4, False)]


def fail_after(_: object) -> None:
    """Fail when a move was made."""
    raise ZeroDivisionError


class TestQueue:
    """From the input to the claims."""

    def test_duplicates_share_one_request(self, books: Books) -> None:
        """Within a batch and across batches, a question is enrolled once."""
        books.start()
        books.enroll([1, 2, 1], [2, 3, 3, 1])

        assert books.ledger.enrolled() == {State.PENDING: 3}
        assert books.all("SELECT position FROM requests ORDER BY id") == [(0,), (1,), (4,)]

    def test_claims_come_in_the_order_of_the_input(self, books: Books) -> None:
        """The file's order decides, not the order in which the ledger learned of the leads."""
        books.begin(1, 2, 3)
        books.enroll([3, 5], [1, 4, 2])

        assert [books.claim().params for _ in range(5)] == [params(number) for number in (3, 5, 1, 4, 2)]
        assert books.do(Ledger.claim, books.execution, PRICE, books.now) == []

    def test_a_lead_that_left_the_file_is_not_claimed(self, books: Books) -> None:
        """Only what this execution wants is paid for."""
        books.begin(1, 2)
        books.enroll([2])

        assert books.claim().params == params(2)
        assert books.do(Ledger.claim, books.execution, PRICE, books.now) == []

    def test_a_failure_of_a_lead_that_left_the_file_is_not_asked_again(self, books: Books) -> None:
        """Edge g puts it to pending, and there it waits until a file wants it."""
        attempt = books.begin(1).submit()
        books.enroll([2])
        books.settle(attempt, FREE_FAILURE)

        assert books.claim().params == params(2)
        assert books.do(Ledger.claim, books.execution, PRICE, books.now) == []

    def test_what_is_answered_is_not_asked(self, books: Books) -> None:
        """Found, missed, failed and doubtful requests are reused, not claimed."""
        books.begin(1, 2, 3, 4)
        for answer in (FOUND, MISSED, Answer(State.FAILED)):
            books.settle(books.submit(), answer)
        books.do(Ledger.doubt, [(books.claim().attempt_id, "reset", books.now, None)])

        books.enroll([1, 2, 3, 4])

        assert books.do(Ledger.claim, books.execution, PRICE, books.now) == []
        assert books.ledger.enrolled() == dict.fromkeys((State.FOUND, State.NOT_FOUND, State.FAILED, State.IN_DOUBT), 1)

    def test_the_cap_is_never_exceeded(self, books: Books) -> None:
        """What is reserved counts against the cap; what is freed may be claimed again."""
        books.begin(*range(9), cap=2 * PRICE + COST)
        first = books.submit()
        books.submit()
        with pytest.raises(CapReached), books.ledger.transaction():
            books.ledger.claim(books.execution, PRICE, books.now)
        assert books.money[:2] == (0, 2 * PRICE)

        books.settle(first)
        books.claim()

        assert books.money[:2] == (COST, 2 * PRICE)
        with pytest.raises(CapReached), books.ledger.transaction():
            books.ledger.claim(books.execution, PRICE, books.now)

    def test_what_may_free_some_of_the_cap_is_known_by_its_age(self, books: Books) -> None:
        """A worker that met the cap waits for what others may free, but not for what is no longer waited for."""
        told = [books.begin(1).do(Ledger.awaits, 0)]
        claim = books.claim()
        told.append(books.do(Ledger.awaits, 0))
        books.do(Ledger.accepted, [(claim.attempt_id, "task", 5_000)], BOUND)
        told += [books.do(Ledger.awaits, since) for since in (4_000, 6_000)]

        assert told == [False, True, True, False]

    def test_an_empty_queue_is_no_matter_of_the_cap(self, books: Books) -> None:
        """With nothing left to ask, a cap of 0 is not reached."""
        books.begin(cap=0)

        assert books.do(Ledger.claim, books.execution, PRICE, books.now) == []


class TestExecutions:
    """What one execution leaves to the next."""

    def test_recovery_puts_in_doubt_what_was_on_the_wire(self, books: Books) -> None:
        """Edge d: `submitting` at the start means killed; all else stays as it was."""
        books.begin(1, 2, 3)
        books.submit("living")
        books.claim()
        books.reopen()

        assert books.do(Ledger.recover, 7) == 1
        assert [books.state(number) for number in (1, 2, 3)] == [State.SUBMITTED, State.IN_DOUBT, State.PENDING]
        assert books.do(Ledger.recover, 8) == 0
        assert books.one("SELECT settled_ms, error IS NOT NULL FROM attempts WHERE state = 'in_doubt'") == (7, 1)
        assert books.one("SELECT attempts FROM requests WHERE state = 'in_doubt'") == (1,)

    def test_an_execution_adopts_the_reservations_of_living_tasks(self, books: Books) -> None:
        """What is in flight settles in the new execution, so it counts against its cap; doubts stay behind."""
        attempt = books.begin(1, 2, 3).submit()
        books.do(Ledger.doubt, [(books.claim().attempt_id, "reset", books.now, None)])
        first = books.execution

        second = books.start(cap=2 * PRICE - 1)
        books.enroll([1, 2, 3])
        assert books.money == (0, PRICE, 0, 0)
        with pytest.raises(CapReached), books.ledger.transaction():
            books.ledger.claim(second, PRICE, books.now)
        books.settle(attempt)

        assert books.money == (COST, 0, 0, 0)
        assert books.one("SELECT execution_id, settled_in FROM attempts WHERE id = ?", attempt) == (first, second)
        assert books.claim().params == params(3)

    def test_an_execution_is_ended_with_its_receipt(self, books: Books) -> None:
        """The newest come first, and each job sees its own."""
        books.start()
        books.do(Ledger.start_execution, "other", 3, books.now)
        books.do(Ledger.end_execution, books.execution, 10, {"rows": 2}, 77)

        assert [row["job"] for row in books.ledger.executions()] == ["other", "job"]
        (row,) = books.ledger.executions("job", 5)
        assert (row["ended_ms"], row["exit_code"], row["receipt"]) == (77, 10, '{"rows": 2}')

    def test_a_ledger_knows_whether_it_was_used(self, books: Books) -> None:
        """Used means that the API accepted something."""
        books.begin(1)
        books.do(Ledger.refused, [(books.claim().attempt_id, "HTTP 429", books.now)])
        assert not books.ledger.was_used()

        books.submit()

        assert books.ledger.was_used()

    def test_tasks_come_nearest_expiry_first(self, books: Books) -> None:
        """The task that was submitted first expires first, whatever its row."""
        books.begin(1, 2, 3)
        claims = [books.claim() for _ in range(3)]
        for at, claim in zip((30, 10, 20), claims, strict=True):
            books.do(Ledger.accepted, [(claim.attempt_id, f"t{at}", at)], BOUND)
        books.do(Ledger.alive, [claims[2].attempt_id])

        assert books.ledger.tasks() == [
            Task((claims[1].attempt_id,), "t10", 10),
            Task((claims[2].attempt_id,), "t20", 20, seen_alive=True),
            Task((claims[0].attempt_id,), "t30", 30),
        ]

    def test_a_ledger_is_bound_once(self, books: Books) -> None:
        """The first accepted POST binds it; what is unknown binds nothing."""
        books.begin(1, 2)
        books.do(Ledger.accepted, [(books.claim().attempt_id, "t", 1)], {"api_host": "first", "workspace": None})
        books.do(Ledger.accepted, [(books.claim().attempt_id, "u", 1)], {"api_host": "second", "workspace": "ours"})

        assert books.ledger.fact("api_host") == "first"
        assert books.ledger.fact("workspace") == "ours"
        assert books.ledger.fact("other") is None

    def test_a_waterfall_is_remembered(self, books: Books) -> None:
        """The newest description replaces the old one."""
        assert books.ledger.waterfall("w") is None
        books.do(Ledger.remember_waterfall, "w", {"name": "é"}, [1])
        books.do(Ledger.remember_waterfall, "w", {"name": "new"}, [2, 1])

        assert books.ledger.waterfall("w") == ({"name": "new"}, [2, 1])


class TestTransactions:
    """What stays and what does not, and what others see."""

    def test_what_was_not_committed_is_gone(self, books: Books) -> None:
        """A transaction that raises leaves nothing."""
        books.begin(1)
        with pytest.raises(ZeroDivisionError), books.ledger.transaction():
            fail_after(books.ledger.claim(books.execution, PRICE, 1))

        assert books.state(1) is State.PENDING
        assert books.money == (0, 0, 0, 0)

    def test_a_savepoint_takes_back_one_move(self, books: Books) -> None:
        """When one move of a transaction raises, the others stay."""
        books.begin(1, 2)
        with books.ledger.transaction():
            books.ledger.claim(books.execution, PRICE, 1)
            with pytest.raises(ZeroDivisionError), books.ledger.savepoint():
                fail_after(books.ledger.claim(books.execution, PRICE, 1))

        assert (books.state(1), books.state(2)) == (State.SUBMITTING, State.PENDING)

    def test_reading_goes_on_while_a_writer_is_at_work(self, books: Books) -> None:
        """A reader sees what is committed, waits for nobody and can change nothing."""
        books.begin(1, 2)
        books.submit()
        with books.ledger.transaction():
            books.ledger.claim(books.execution, PRICE, books.now)
            reader = Ledger(books.place, read_only=True)
            assert reader.counts() == {State.SUBMITTED: 1, State.PENDING: 1}
            with pytest.raises(FAILURES, match=r"read-?only"):
                reader.recover(1)
        assert reader.counts() == {State.SUBMITTED: 1, State.SUBMITTING: 1}
        reader.close()

    def test_a_fingerprint_of_another_length_is_not_swallowed(self, books: Books) -> None:
        """A question that cannot be named must not get lost."""
        with pytest.raises(FAILURES), books.ledger.transaction():
            books.ledger.enroll(CALL, [Wanted(0, b"short", "{}")])


class TestFile:
    """Who may open a file, who may read it, what survives."""

    @pytest.fixture
    def where(self) -> str:
        """Ask of a file alone."""
        return "file"

    def test_every_file_is_0600(self, tmp_path: Path) -> None:
        """The ledger holds personal data: also its -wal and -shm are for its owner alone."""
        before = os.umask(0)
        try:
            books = Books.open(tmp_path / "new" / "ledger.db").begin(1)
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in books.path.parent.iterdir()}
            books.ledger.close()
        finally:
            os.umask(before)

        assert modes == dict.fromkeys(("ledger.db", "ledger.db-wal", "ledger.db-shm"), 0o600)

    def test_a_commit_survives_a_power_cut(self, books: Books) -> None:
        """WAL with synchronous=FULL: every commit is synced before it counts."""
        (synchronous,) = books.ledger._db.execute("PRAGMA synchronous").fetchone()

        assert synchronous == 2
        assert books.one("PRAGMA journal_mode") == ("wal",)

    def test_a_newer_ledger_is_refused(self, books: Books) -> None:
        """A ledger of a later version is neither written nor read."""
        books.ledger._db.execute("PRAGMA user_version = 99")

        for read_only in (True, False):
            with pytest.raises(Refused, match=r"ledger\.db: .*newer") as refusal:
                Ledger(books.path, read_only=read_only)
            assert "99" in str(refusal.value.hint)

    def test_an_older_ledger_is_only_brought_up_to_date_by_who_writes(
        self, books: Books, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Reading never changes the file; the next run migrates it, once and as a whole."""
        first = schema.MIGRATIONS
        column, index = "CREATE TABLE more (x INTEGER) STRICT", "CREATE INDEX mores ON more (x)"
        monkeypatch.setattr(schema, "MIGRATIONS", [*first, f"{column};\n\nCREATE INDEX mores ON more (y)"])
        with pytest.raises(Refused, match=r"ledger\.db: .*older"):
            Ledger(books.path, read_only=True)
        with pytest.raises(Refused, match=r"ledger\.db"):
            Ledger(books.path)
        assert books.one("PRAGMA user_version") == (len(first),)

        monkeypatch.setattr(schema, "MIGRATIONS", [*first, f"{column};\n\n{index};\n"])
        Ledger(books.path).close()

        assert books.one("PRAGMA user_version") == (len(first) + 1,)
        assert books.all("SELECT * FROM more") == []

    def test_a_ledger_from_before_the_first_release_is_refused(self, books: Books) -> None:
        """Its columns may be others: it is neither read nor changed, and the error says what to do."""
        books.ledger._db.execute(f"PRAGMA application_id = {schema.UNRELEASED_MARK}")

        for read_only in (True, False):
            with pytest.raises(Refused, match=r"ledger\.db: .*before its first release") as refusal:
                Ledger(books.path, read_only=read_only)
            assert "another file" in str(refusal.value.hint)

    @in_turn("read_only", [True, False])
    @in_turn("content", [b"First Name,Last Name\n" * 99, b"SQLite format 3\x00" + b"\xff" * 4080])
    def test_a_file_that_is_no_database_is_refused(self, tmp_path: Path, content: bytes, *, read_only: bool) -> None:
        """It is named and stays as it was."""
        path = tmp_path / "leads.csv"
        path.write_bytes(content)

        with pytest.raises(Refused, match=r"leads\.csv"):
            Ledger(path, read_only=read_only)

        assert path.read_bytes() == content

    @pytest.mark.parametrize("version", [0, 1])
    def test_the_database_of_another_program_is_refused(self, tmp_path: Path, version: int) -> None:
        """Nothing is added to it, whatever version it says that it has."""
        path = tmp_path / "other.db"
        db = sqlite3.connect(path)
        db.executescript(f"CREATE TABLE theirs (x); PRAGMA user_version = {version}")
        db.close()
        content = path.read_bytes()

        for read_only in (True, False):
            with pytest.raises(Refused, match=r"other\.db"):
                Ledger(path, read_only=read_only)

        assert path.read_bytes() == content

    def test_a_truncated_ledger_is_refused(self, tmp_path: Path) -> None:
        """Half a ledger is no ledger: what it forgot would be paid for again."""
        path = tmp_path / "ledger.db"
        Ledger(path).close()
        os.truncate(path, path.stat().st_size // 2)

        with pytest.raises(Refused, match=r"ledger\.db"):
            Ledger(path)

    def test_a_path_that_cannot_be_a_file_is_refused(self, tmp_path: Path) -> None:
        """A folder, a folder below a file, and a place where nobody can write."""
        (tmp_path / "file").touch()
        for path in (tmp_path, tmp_path / "file" / "ledger.db", Path("/proc/enrich/ledger.db")):
            with pytest.raises(Refused, match=re.escape(str(path))):
                Ledger(path)
        for path in (tmp_path, tmp_path / "nothing.db"):
            with pytest.raises(Refused, match=re.escape(str(path))):
                Ledger(path, read_only=True)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_ledger_that_cannot_be_written_is_refused(self, books: Books) -> None:
        """The message names the file."""
        books.path.chmod(0o400)
        with pytest.raises(Refused, match=re.escape(str(books.path))):
            Ledger(books.path)

    def test_a_person_can_read_it_with_sqlite3(self, books: Books) -> None:
        """The views show credits as credits and times as times."""
        books.now = 1_750_000_000_000
        books.begin(1, cap=2_500_000)
        books.do(Ledger.accepted, [(books.claim(2_000_000).attempt_id, "t", books.now)], BOUND)
        books.settle(1, Answer(State.FOUND, provider="Mailhound", credits=1_500_000))

        assert books.one("SELECT state, provider, credits, task_id, settled_at FROM readable_requests") == (
            "found",
            "Mailhound",
            1.5,
            "t",
            "2025-06-15T15:06:40Z",
        )
        assert books.one("SELECT state, reserved, credits, claimed_at FROM readable_attempts") == (
            "found",
            2.0,
            1.5,
            "2025-06-15T15:06:40Z",
        )
        assert books.one("SELECT job, credits_spent, credits_reserved, max_credits FROM readable_executions") == (
            "job",
            1.5,
            0.0,
            2.5,
        )

    def test_no_move_reads_a_whole_table(self, books: Books) -> None:
        """With millions of requests, every move finds its rows by an index."""
        statements: dict[str, None] = {}
        file_of(books.ledger).set_trace_callback(statements.setdefault)
        books.do(Ledger.recover, 1)
        books.start()
        books.enroll([1, 2, 3], retry={State.FAILED}, stale={State.FOUND: 1})
        books.settle(books.submit())
        books.do(Ledger.refused, [(books.claim().attempt_id, "", 1)])
        books.do(Ledger.doubt, [(books.claim().attempt_id, "", 1, None)])
        books.enroll([2], retry={State.IN_DOUBT})
        books.do(Ledger.refused, [(books.claim().attempt_id, "", 1)])
        books.ledger.tasks()
        list(books.ledger.standing(wanted([1])))
        file_of(books.ledger).set_trace_callback(None)

        plans: dict[str, list[str]] = {}
        for sql in statements:
            if sql.split()[0] in ("SELECT", "UPDATE", "INSERT"):
                plans[sql] = [str(row[3]) for row in books.ledger._db.execute(f"EXPLAIN QUERY PLAN {sql}")]
        used = {match for plan in plans.values() for step in plan for match in re.findall(r"INDEX (\w+)", step)}

        assert {"queue", "open_attempts"} <= used
        # Clearing the queue reads the queue, which holds no more than the last input.
        scans = {step for plan in plans.values() for step in plan if re.match(r"SCAN (requests|attempts|r|a)\b", step)}
        assert scans <= {"SCAN requests USING INDEX queue"}

    def test_what_moved_is_told_without_reading_the_past(self, books: Books) -> None:
        """What an execution made, what it settled and what is left there; not the millions before it."""
        books.begin(1, 2, 3)
        books.settle(books.submit("old"))
        carried = books.submit("carried")
        books.submit("left")
        books.begin(4, 5)
        books.settle(carried)
        books.settle(books.submit("new"))
        statements: dict[str, None] = {}
        file_of(books.ledger).set_trace_callback(statements.setdefault)
        moved = books.ledger.movements(books.execution)
        file_of(books.ledger).set_trace_callback(None)

        assert sorted(moved) == [
            ("known", 0, 1, COST, PRICE),
            ("known", 1, 1, COST, PRICE),
            ("submitted", 0, 1, 0, PRICE),
        ]
        assert len(books.ledger.movements(1)) == 2
        (sql,) = statements
        steps = [str(row[3]) for row in books.ledger._db.execute(f"EXPLAIN QUERY PLAN {sql}")]
        assert "MULTI-INDEX OR" in steps
        assert "SCAN a" not in steps

"""The ledger against a small model: whatever happens in whatever order, money and fates agree."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from enrich.model import MOVES, RETRYABLE, Acceptance, Answer, State
from enrich.place import LedgerPlace, locate_ledger
from enrich.store.ledger import Ledger
from enrich.store.moves import CapReached
from tests.books import BINDING, CommittingLedger, params, row_requests
from tests.cases import examples
from tests.postgres import PostgresServer

LEADS = range(6)
PRICES = st.integers(1, 9)
MAX_ATTEMPTS = 2


@dataclass
class AttemptModel:
    """An attempt as the model sees it."""

    lead: int
    execution: int
    state: str
    reserved: int
    at: int
    came_from: State = State.PENDING
    previous: int | None = None
    credits: int | None = None
    counted_in: int | None = None  # the execution whose reservation it holds
    bundle: int | None = None  # what it was sent with
    task_id: str | None = None
    settled_in: int | None = None  # the execution that settled it at an unknown price
    gone: bool = False


@dataclass
class RequestModel:
    """A request as the model sees it."""

    state: State = State.PENDING
    wanted_at: int | None = None
    attempts: int = 0
    newest: int | None = None
    standing: int | None = None

    @property
    def queued(self) -> bool:
        """May it be claimed."""
        return self.wanted_at is not None and self.state not in (State.SUBMITTING, State.SUBMITTED)


@dataclass
class LedgerModel:
    """All that the ledger should know."""

    leads: dict[int, RequestModel] = field(default_factory=dict)
    posts: dict[int, AttemptModel] = field(default_factory=dict)
    caps: dict[int, int | None] = field(default_factory=dict)
    adopted: dict[int, int] = field(default_factory=dict)
    spent: Counter[int] = field(default_factory=Counter)
    unknown: Counter[int] = field(default_factory=Counter)
    #: What free questions brought into executions, beside their cap.
    late: Counter[int] = field(default_factory=Counter)
    #: What bundles have cost; None: not known.
    bundles: dict[int, int | None] = field(default_factory=dict)

    def reserved(self, execution: int) -> int:
        """Sum what an execution has set aside."""
        return sum(post.reserved for post in self.posts.values() if post.counted_in == execution)

    def among(self, *states: str) -> list[int]:
        """List the attempts in these states."""
        return [number for number, post in self.posts.items() if post.state in states]

    def together(self, number: int) -> list[int]:
        """List the attempts that were sent with one as one task, itself too."""
        bulk_task = self.posts[number].bundle
        return (
            [number] if bulk_task is None else [other for other, post in self.posts.items() if post.bundle == bulk_task]
        )

    def asked(self, number: int) -> tuple[bool, list[int]]:
        """Tell what was asked with one attempt: in bulk or alone, and for which leads, in the order sent."""
        return self.posts[number].bundle is not None, [self.posts[other].lead for other in self.together(number)]

    def takes(self, numbers: list[int], task_id: str) -> bool:
        """Tell whether a task id that the API gave to a POST is another question's."""
        holders = [number for number, post in self.posts.items() if post.task_id == task_id and number not in numbers]
        return any(self.asked(holder) != self.asked(numbers[0]) for holder in holders)

    def paid_before(self, numbers: list[int]) -> bool:
        """Tell whether another attempt has the same task, and its price."""
        post = self.posts[numbers[0]]
        alike = [other for other, each in self.posts.items() if each.task_id == post.task_id and other not in numbers]
        if post.bundle is None:
            return any(self.posts[other].credits is not None for other in alike)
        return any(self.bundles.get(self.posts[other].bundle or 0) is not None for other in alike)

    def may_be_asked_for(self) -> list[list[int]]:
        """List the POSTs that were written off, and whose fate a free question may tell."""
        posts = {tuple(self.together(number)) for number in self.among("in_doubt", "expired")}
        return sorted(list(post) for post in posts if self._may_be(post))

    def left_by_others(self, execution: int) -> list[list[int]]:
        """List those of them that earlier executions have written off."""
        return [post for post in self.may_be_asked_for() if self.posts[post[0]].counted_in != execution]

    def _may_be(self, numbers: tuple[int, ...]) -> bool:
        posts = [self.posts[number] for number in numbers]
        alone = not any(each.task_id == posts[0].task_id for other, each in self.posts.items() if other not in numbers)
        priced = posts[0].credits is not None or self.bundles.get(posts[0].bundle or 0) is not None
        if posts[0].task_id is None or priced or not alone or any(post.gone for post in posts):
            return False
        newest = [self.leads[post.lead].newest == number for number, post in zip(numbers, posts, strict=True)]
        if posts[0].bundle is None:
            return True
        return all(newest) and all(post.state in ("in_doubt", "expired") for post in posts)


class LedgerStateMachine(RuleBasedStateMachine):
    """Nights of one job: files come and go, the program is killed, the API does what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.books = CommittingLedger.open(self.place(Path(self.folder.name)))
        self.model = LedgerModel()
        self.before: dict[int, State] = {}
        self.begin(None)

    @classmethod
    def place(cls, folder: Path) -> LedgerPlace:
        """Say where the ledger is to be."""
        return folder / "ledger.db"

    def teardown(self) -> None:
        """Close the ledger."""
        self.books.ledger.close()
        self.folder.cleanup()

    def begin(self, cap: int | None) -> None:
        """Start an execution, as the program does: recover first."""
        self.recover()
        number = self.books.start(cap)
        for post in self.model.posts.values():
            if post.state == "submitted":
                post.counted_in = number
        self.model.caps[number] = cap
        self.model.adopted[number] = self.model.reserved(number)

    def recover(self) -> None:
        """Put in doubt what was on the wire."""
        lost = self.model.among("submitting")
        assert self.books.do(Ledger.recover, self.books.now) == len(lost)
        for number in lost:
            self.close(number, State.IN_DOUBT)

    def close(self, number: int, after: State, outcome: str | None = None) -> None:
        """Move an attempt and its request in the model."""
        post = self.model.posts[number]
        lead = self.model.leads[post.lead]
        if post.state == "submitting" and after in (State.IN_DOUBT, State.SUBMITTED) and outcome != "refused":
            lead.attempts += 1
        post.state = outcome or after.value
        post.at = self.books.now
        lead.state = after
        if post.state == "refused":
            if after is not State.PENDING:
                lead.newest = post.previous
        elif after not in (State.PENDING, State.SUBMITTED):
            lead.wanted_at = None

    # What happens

    @rule(seconds=st.integers(1, 50))
    def time_passes(self, seconds: int) -> None:
        """Let the clock go on."""
        self.books.now += seconds

    @rule(cap=st.none() | st.integers(0, 60))
    def a_new_execution(self, cap: int | None) -> None:
        """End this execution in order and begin the next."""
        self.recover()
        self.books.do(Ledger.end_execution, self.books.execution, 0, {}, self.books.now)
        self.begin(cap)

    @rule(cap=st.none() | st.integers(0, 60))
    def a_crash(self, cap: int | None) -> None:
        """Kill the program in the middle of a commit, and start it again."""
        db = self.books.ledger._db
        db.begin()
        db.execute("UPDATE requests SET state = 'found'")
        db.execute("UPDATE attempts SET state = 'failed' WHERE state = 'submitted'")
        self.books.reopen()
        self.begin(cap)

    @rule(
        batches=st.lists(st.lists(st.sampled_from(LEADS), max_size=6), max_size=3),
        retry=st.sets(st.sampled_from(sorted(RETRYABLE)), max_size=2),
        stale=st.dictionaries(st.sampled_from([State.FOUND, State.NOT_FOUND]), st.integers(0, 60)),
    )
    def a_file_is_read(self, batches: list[list[int]], retry: set[State], stale: dict[State, int]) -> None:
        """Enroll any leads in any order, with the person's wishes."""
        before = {state: self.books.now - age for state, age in stale.items()}
        self.books.enroll(*batches, retry=retry, stale=before)
        for lead in self.model.leads.values():
            lead.wanted_at = None
        flat = [number for batch in batches for number in batch]
        for position, number in enumerate(flat):
            if number in flat[:position]:
                continue
            lead = self.model.leads.setdefault(number, RequestModel())
            old = lead.newest is not None and self.model.posts[lead.newest].at < before.get(lead.state, -1)
            if old or lead.state in {*retry, State.PENDING, State.SUBMITTING, State.SUBMITTED}:
                lead.wanted_at = position
        leads = [self.model.leads[number] for number in set(flat)]
        assert self.books.ledger.enrolled() == Counter(State.PENDING if lead.queued else lead.state for lead in leads)

    @rule(price=PRICES, room=st.integers(1, 4), bulk=st.booleans())
    def a_claim(self, price: int, room: int, *, bulk: bool) -> None:
        """Claim the first of the queue, as many as there are and the cap has room for, alone or as one task."""
        if not any(lead.queued for lead in self.model.leads.values()):
            self.a_file_is_read([list(LEADS)], {State.IN_DOUBT}, {})
            self.every_request_has_one_fate()
        queue = sorted((lead.wanted_at, number) for number, lead in self.model.leads.items() if lead.queued)
        execution = self.books.execution
        cap = self.model.caps[execution]
        if cap is not None:
            left = cap - self.model.spent[execution] - self.model.reserved(execution)
            if queue and price > left:
                with pytest.raises(CapReached):
                    self.books.do(Ledger.claim, execution, price, self.books.now, room, bulk=bulk)
                return
            room = min(room, left // price)
        claims = self.books.do(Ledger.claim, execution, price, self.books.now, room, bulk=bulk)
        for claim, (_, number) in zip(claims, queue[:room], strict=True):
            assert claim.params == params(number)
            assert claim.attempt_id not in self.model.posts
            assert (claim.bundle is not None) is bulk
            lead = self.model.leads[number]
            post = AttemptModel(number, execution, "submitting", price, self.books.now, lead.state, lead.newest)
            post.counted_in, post.bundle = execution, claim.bundle
            self.model.posts[claim.attempt_id] = post
            if lead.state is not State.PENDING:
                lead.attempts = 0
            lead.state, lead.newest = State.SUBMITTING, claim.attempt_id

    @rule(data=st.data(), answer=st.sampled_from(["accepted", "accepted", "refused", "rejected", "doubt"]))
    def the_api_answers_a_post(self, data: Any, answer: str) -> None:
        """Bring one of the four fates of a POST; of one with several rows some may be wrong."""
        if not self.model.among("submitting"):
            self.a_claim(1, 3, bulk=data.draw(st.booleans()))
            self.every_request_has_one_fate()
        if not self.model.among("submitting"):
            return
        numbers = self.model.together(data.draw(st.sampled_from(self.model.among("submitting"))))
        ledger = self.books
        task_id = self.a_task_id(data, numbers[0])
        if answer == "accepted":
            taken = self.model.takes(numbers, task_id)
            means = ledger.do(Ledger.accepted, [(number, task_id, ledger.now) for number in numbers], BINDING)
            assert {each is Acceptance.TAKEN for each in means} == {taken}
            for number in numbers:
                self.close(number, State.IN_DOUBT if taken else State.SUBMITTED)
                self.model.posts[number].task_id = None if taken else task_id
        elif answer == "doubt":
            message = data.draw(st.sampled_from([None, task_id]))
            kept = None if message is None or self.model.takes(numbers, message) else message
            ledger.do(Ledger.doubt, [(number, "reset", ledger.now, message) for number in numbers])
            for number in numbers:
                self.close(number, State.IN_DOUBT)
                self.model.posts[number].task_id = kept
        else:
            wrong = data.draw(st.sets(st.sampled_from(numbers), min_size=1)) if answer == "rejected" else set()
            for number in numbers:
                post = self.model.posts[number]
                post.credits, post.counted_in = 0, None
                if number in wrong:
                    ledger.do(Ledger.rejected, [(number, "400", ledger.now)])
                    self.close(number, State.FAILED)
                else:
                    ledger.do(Ledger.refused, [(number, "429", ledger.now)])
                    self.close(number, post.came_from, "refused")

    def a_task_id(self, data: Any, number: int) -> str:
        """Draw the id that the API gives: mostly a new one, now and then one that it gave before."""
        known = sorted({post.task_id for post in self.model.posts.values() if post.task_id is not None})
        return str(data.draw(st.sampled_from([f"task-{number}", f"task-{number}", *known])))

    @rule(data=st.data(), paid=st.integers(0, 9), answer=st.sampled_from(["known", "known", "gone"]))
    def a_free_question_is_asked(self, data: Any, paid: int, answer: str) -> None:
        """Ask for what was written off: the API knows it after all, or has deleted it."""
        ledger, model = self.books, self.model
        if not model.left_by_others(ledger.execution):
            self.a_task_is_lost(data)
            self.every_request_has_one_fate()
            self.a_new_execution(None)
        assert sorted(list(task.attempts) for task in ledger.ledger.written_off(0)) == model.may_be_asked_for()
        left = model.left_by_others(ledger.execution)
        if not left:
            return
        numbers = data.draw(st.sampled_from(left))
        lead = model.leads[model.posts[numbers[0]].lead]
        if answer == "gone":
            ledger.do(Ledger.mark_gone, numbers)
            for number in numbers:
                model.posts[number].gone = True
            return
        for number in numbers:
            post = model.posts[number]
            if post.settled_in is not None:
                model.unknown[post.settled_in] -= 1
                post.settled_in = None
        if lead.newest != numbers[0]:
            (number,) = numbers
            late = Answer(State.FOUND, credits=paid, raw="{}")
            ledger.do(Ledger.settle_superseded, number, late, ledger.now, ledger.execution)
            post = model.posts[number]
            model.spent[ledger.execution] += paid
            post.credits, post.counted_in, post.at = paid, None, ledger.now
            model.late[ledger.execution] += paid
            return
        ledger.do(Ledger.revive, numbers, ledger.execution)
        for number in numbers:
            post = model.posts[number]
            if post.execution != ledger.execution:
                model.late[ledger.execution] += post.reserved
            post.state, post.counted_in = "submitted", ledger.execution
            model.leads[post.lead].state = State.SUBMITTED

    @rule(
        data=st.data(),
        state=st.sampled_from([State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED]),
        share=st.none() | st.integers(0, 3),
        free=st.booleans(),
    )
    def a_task_is_done(self, data: Any, state: State, share: int | None, *, free: bool) -> None:
        """Bring an answer of any kind, whose price is known or not."""
        if not self.model.among("submitted"):
            self.the_api_answers_a_post(data, "accepted")
            self.every_request_has_one_fate()
        if not self.model.among("submitted"):
            return
        number = data.draw(st.sampled_from(self.model.among("submitted")))
        ledger, post = self.books, self.model.posts[number]
        if post.bundle is not None:
            self.a_bundle_is_done(data, self.model.together(number), share)
            return
        lead = self.model.leads[post.lead]
        free = free and state is State.FAILED
        paid = 0 if free else None if share is None else post.reserved * share // 3
        result = paid
        if paid and self.model.paid_before([number]):
            paid = 0
        after = State.PENDING if free and lead.attempts < MAX_ATTEMPTS else state
        answer = Answer(state, credits=result, raw=f"{number}", free_failure=free)
        assert ledger.settle(number, answer, MAX_ATTEMPTS) is after
        self.close(number, after, state.value)
        post.credits = paid
        self.model.spent[ledger.execution] += paid or 0
        if paid is None:
            self.model.unknown[ledger.execution] += 1
            post.settled_in = ledger.execution
        else:
            post.counted_in = None
        if state is State.FOUND:
            lead.standing = number

    def a_bundle_is_done(self, data: Any, numbers: list[int], share: int | None) -> None:
        """Bring the answers of a task of several, each of any kind, at one price."""
        ledger, model = self.books, self.model
        fates = [State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED]
        answers = [
            Answer(state, raw=f"{number}", free_failure=state is State.FAILED and share == 0)
            for number, state in zip(
                numbers, data.draw(st.tuples(*[st.sampled_from(fates)] * len(numbers))), strict=True
            )
        ]
        paid = None if share is None else sum(model.posts[number].reserved for number in numbers) * share // 3
        after = [
            State.PENDING
            if answer.free_failure and model.leads[model.posts[number].lead].attempts < MAX_ATTEMPTS
            else answer.state
            for number, answer in zip(numbers, answers, strict=True)
        ]
        result = [(number, answer, ledger.now) for number, answer in zip(numbers, answers, strict=True)]
        assert ledger.do(Ledger.settle_bundle, result, ledger.execution, MAX_ATTEMPTS, paid) == after
        if paid and model.paid_before(numbers):
            paid = 0
        bulk_task = model.posts[numbers[0]].bundle
        assert bulk_task is not None
        model.bundles[bulk_task] = paid
        model.spent[ledger.execution] += paid or 0
        for number, answer, state in zip(numbers, answers, after, strict=True):
            post = model.posts[number]
            self.close(number, state, answer.state.value)
            if paid is None:
                model.unknown[ledger.execution] += 1
                post.settled_in = ledger.execution
            else:
                post.counted_in = None
            if state is State.FOUND:
                model.leads[post.lead].standing = number

    @rule(data=st.data())
    def a_task_is_lost(self, data: Any) -> None:
        """Let the API never have known a task."""
        if not self.model.among("submitted"):
            self.the_api_answers_a_post(data, "accepted")
            self.every_request_has_one_fate()
        if not self.model.among("submitted"):
            return
        numbers = self.model.together(data.draw(st.sampled_from(self.model.among("submitted"))))
        self.books.do(Ledger.doubt, [(number, "404", self.books.now, None) for number in numbers])
        for number in numbers:
            self.close(number, State.IN_DOUBT)

    @precondition(lambda self: self.model.posts)
    @rule(data=st.data(), move=st.sampled_from(["accepted", "refused", "rejected", "doubt", "settle"]))
    def a_move_comes_too_late(self, data: Any, move: str) -> None:
        """Try any move on any attempt that is settled: it raises and changes nothing."""
        settled = [number for number in self.model.posts if number not in self.model.among("submitting", "submitted")]
        if not settled:
            return
        number, ledger = data.draw(st.sampled_from(settled)), self.books
        moves: dict[str, Callable[[], object]] = {
            "accepted": lambda: ledger.do(Ledger.accepted, [(number, "x", ledger.now)], BINDING),
            "refused": lambda: ledger.do(Ledger.refused, [(number, "x", ledger.now)]),
            "rejected": lambda: ledger.do(Ledger.rejected, [(number, "x", ledger.now)]),
            "doubt": lambda: ledger.do(Ledger.doubt, [(number, "x", ledger.now, None)]),
            "settle": lambda: ledger.settle(number, Answer(State.FOUND, credits=1)),
        }
        with pytest.raises(AssertionError):
            moves[move]()

    # What always holds

    @invariant()
    def every_request_has_one_fate(self) -> None:
        """States, counts and places in the queue are the model's, and each move is one of the drawing's."""
        rows = self.books.all("SELECT fingerprint, state, attempts, attempt_id, answer_id, position FROM requests")
        known = {int.from_bytes(key): (State(state), *rest) for key, state, *rest in rows}
        states = {number: state for number, (state, *_) in known.items()}
        moves = {(self.before[number], states[number]) for number in self.before}
        assert all(before is after or (before, after) in MOVES for before, after in moves)
        self.before = states
        assert known == {
            number: (lead.state, lead.attempts, lead.newest, lead.standing, lead.wanted_at)
            for number, lead in self.model.leads.items()
        }

    @invariant()
    def every_attempt_keeps_its_row(self) -> None:
        """An attempt is never overwritten by the next: spending can be reconciled for ever."""
        rows = self.books.all("SELECT id, state, execution_id, reserved, credits FROM attempts")
        assert {row[0]: row[1:] for row in rows} == {
            number: (post.state, post.execution, post.reserved, post.credits)
            for number, post in self.model.posts.items()
        }

    @invariant()
    def every_credit_is_accounted_for(self) -> None:
        """Spent, unknown and reserved are what the attempts say, and the cap holds."""
        model = self.model
        for row in self.books.ledger.executions():
            number = row["id"]
            assert row["spent"] == model.spent[number]
            assert row["unknown"] == model.unknown[number]
            if number == self.books.execution:
                assert row["reserved"] == model.reserved(number) >= 0
            assert (
                row["cap"] is None
                or row["spent"] + row["reserved"] <= max(row["cap"], model.adopted[number]) + model.late[number]
            )
        spent, unknown = self.books.ledger.totals()
        alone = sum(post.credits or 0 for post in model.posts.values())
        assert spent == alone + sum(paid or 0 for paid in model.bundles.values()) == sum(model.spent.values())
        assert unknown == sum(model.unknown.values())

    @invariant()
    def every_row_is_told_the_truth(self) -> None:
        """The last found answer stands; without one, the newest fate is told."""
        self.books.do(Ledger.begin_pass)
        for known in self.books.ledger.standing(row_requests(LEADS)):
            lead = self.model.leads[known.position]
            stands = lead.standing if lead.standing is not None else lead.newest
            assert known.state == (State.FOUND if lead.standing is not None else lead.state)
            if stands is not None:
                assert known.credits == self.model.posts[stands].credits
            assert known.first
        assert self.books.ledger.counts() == Counter(lead.state for lead in self.model.leads.values())
        tasks = self.books.ledger.tasks()
        assert sorted(number for task in tasks for number in task.attempts) == self.model.among("submitted")
        assert all(list(task.attempts) == self.model.together(task.attempts[0]) for task in tasks)


TestLedger = LedgerStateMachine.TestCase
TestLedger.settings = settings(
    max_examples=examples(40),
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class PostgresStateMachine(LedgerStateMachine):
    """The same nights, with the ledger on a server."""

    server: ClassVar[PostgresServer]

    @classmethod
    def place(cls, folder: Path) -> LedgerPlace:
        """Say where the ledger is to be."""
        return locate_ledger(folder, cls.server.url(), folder)

    def teardown(self) -> None:
        """Close the ledger and drop it."""
        super().teardown()
        self.server.drop_schemas()


@pytest.mark.long
def test_stateful_postgres(postgres: PostgresServer) -> None:
    """Fewer nights than in a file: each move takes longer."""
    PostgresStateMachine.server = postgres
    few = settings(TestLedger.settings, max_examples=examples(8), stateful_step_count=25)
    run_state_machine_as_test(PostgresStateMachine, settings=few)

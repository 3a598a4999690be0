"""The ledger compared with a small model: after any sequence of events, credits and states agree."""

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

from enrich.job.locations import LedgerLocation, parse_ledger_location
from enrich.ledger import enroll, queries, queue, records, resume, transitions
from enrich.ledger.queue import CapReached, StepCapReached
from enrich.ledger.verify import check_ledger
from enrich.models import OPEN_STATES, RETRYABLE_STATES, Acceptance, Answer, ClaimedRequest, State
from tests.support.cases import examples
from tests.support.ledger import BINDING, DEFAULT_SELECTION, CommittingLedger, params, results_of, row_requests
from tests.support.postgres import PostgresServer

LEADS = range(6)
PRICES = st.integers(1, 9)
MAX_ATTEMPTS = 2
#: All allowed state transitions. The letters are the edges of the diagram in ARCHITECTURE.md. Edges f and h lead back
#: to pending and continue to submitting in the same transaction. Until then the request keeps its old state. If the
#: API refuses the POST, the request returns to it.
ALLOWED_TRANSITIONS: dict[tuple[State, State], str] = {
    (State.PENDING, State.SUBMITTING): "a: the intent is on disk before the POST is sent",
    (State.SUBMITTING, State.SUBMITTED): "b: the API answered with a task id",
    (State.SUBMITTING, State.PENDING): "c: provably not accepted",
    (State.SUBMITTING, State.FAILED): "c: the API named a param that is wrong, or refused a retry",
    (State.SUBMITTING, State.EXPIRED): "c: the API refused a retry",
    (State.SUBMITTING, State.FOUND): "c: the API refused a refresh",
    (State.SUBMITTING, State.NOT_FOUND): "c: the API refused a refresh",
    (State.SUBMITTING, State.IN_DOUBT): "d: bytes may have been sent, the process was killed, or a retry was refused",
    (State.SUBMITTED, State.FOUND): "e: the poller fetched the result",
    (State.SUBMITTED, State.NOT_FOUND): "e: the poller fetched the result",
    (State.SUBMITTED, State.FAILED): "e: the poller fetched the result",
    (State.SUBMITTED, State.EXPIRED): "e: the result expired",
    (State.SUBMITTED, State.IN_DOUBT): "e: a task that was never seen running polls 404",
    (State.IN_DOUBT, State.SUBMITTING): "f, a: only by --retry",
    (State.IN_DOUBT, State.FAILED): "f: marked as failed by --accept",
    (State.FAILED, State.SUBMITTING): "f, a: only by --retry",
    (State.EXPIRED, State.SUBMITTING): "f, a: only by --retry",
    (State.IN_DOUBT, State.SUBMITTED): "i: a later poll finds its task",
    (State.EXPIRED, State.SUBMITTED): "i: a later poll finds its task",
    (State.SUBMITTED, State.PENDING): "g: failed at no charge, and attempts remain",
    (State.FOUND, State.SUBMITTING): "h, a: older than policy.refresh allows",
    (State.NOT_FOUND, State.SUBMITTING): "h, a: older than policy.refresh allows",
}


@dataclass
class AttemptModel:
    """An attempt in the model."""

    lead: int
    execution: int
    state: str
    reserved: int
    at: int
    previous_state: State = State.PENDING
    previous_attempt: int | None = None
    credits: int | None = None
    execution_charged: int | None = None  # the execution whose reservation it holds
    bulk_id: int | None = None  # the bulk task it was sent with
    task_id: str | None = None
    settled_execution: int | None = None  # the execution that settled it
    deleted_at_api: bool = False
    step: str | None = None  # the step that sent it


@dataclass
class RequestModel:
    """A request in the model."""

    state: State = State.PENDING
    queue_position: int | None = None
    attempts: int = 0
    newest_attempt: int | None = None
    current_attempt: int | None = None

    @property
    def queued(self) -> bool:
        """Return whether it may be claimed."""
        return self.queue_position is not None and self.state not in (State.SUBMITTING, State.SUBMITTED)


@dataclass
class LedgerModel:
    """All that the ledger should contain."""

    requests: dict[int, RequestModel] = field(default_factory=dict)
    attempts: dict[int, AttemptModel] = field(default_factory=dict)
    caps: dict[int, int | None] = field(default_factory=dict)
    adopted: dict[int, int] = field(default_factory=dict)
    spent: Counter[int] = field(default_factory=Counter)
    unknown: Counter[int] = field(default_factory=Counter)
    #: Credits of executions beyond their cap: late polls of written-off tasks, and prices above the reserved one.
    beyond_cap: Counter[int] = field(default_factory=Counter)
    #: Price of each bulk task; None: unknown.
    bulk_tasks: dict[int, int | None] = field(default_factory=dict)

    def reserved(self, execution: int) -> int:
        """Sum the credits that an execution has reserved."""
        return sum(post.reserved for post in self.attempts.values() if post.execution_charged == execution)

    def step_cost(self, execution: int, step: str) -> int:
        """Return what the attempts of a step that an execution has made, settled or may settle cost, at most."""
        cost, counted = 0, set()
        for post in self.attempts.values():
            is_open = post.state in OPEN_STATES
            if post.step != step or not (is_open or execution in (post.execution, post.settled_execution)):
                continue
            price = None if post.bulk_id is None else self.bulk_tasks.get(post.bulk_id)
            if price is None:
                cost += post.reserved if post.credits is None else post.credits
            elif post.bulk_id not in counted:
                counted.add(post.bulk_id)
                cost += price
        return cost

    def attempts_in(self, *states: str) -> list[int]:
        """List the attempts in these states."""
        return [number for number, post in self.attempts.items() if post.state in states]

    def attempts_in_task(self, number: int) -> list[int]:
        """List the attempts in the same task as this one, including itself."""
        bulk_task = self.attempts[number].bulk_id
        return (
            [number]
            if bulk_task is None
            else [other for other, post in self.attempts.items() if post.bulk_id == bulk_task]
        )

    def request_key(self, number: int) -> tuple[bool, list[int]]:
        """Return what an attempt requested: whether in bulk, and its leads in the order sent."""
        return self.attempts[number].bulk_id is not None, [
            self.attempts[other].lead for other in self.attempts_in_task(number)
        ]

    def task_id_conflicts(self, numbers: list[int], task_id: str) -> bool:
        """Return whether a task id returned for a POST belongs to a different request."""
        holders = [
            number for number, post in self.attempts.items() if post.task_id == task_id and number not in numbers
        ]
        return any(self.request_key(holder) != self.request_key(numbers[0]) for holder in holders)

    def price_already_charged(self, numbers: list[int]) -> bool:
        """Return whether another attempt has the same task with a price."""
        post = self.attempts[numbers[0]]
        alike = [
            other for other, each in self.attempts.items() if each.task_id == post.task_id and other not in numbers
        ]
        if post.bulk_id is None:
            return any(self.attempts[other].credits for other in alike)
        return any(self.bulk_tasks.get(self.attempts[other].bulk_id or 0) for other in alike)

    def written_off(self) -> list[list[int]]:
        """List the POSTs that were written off and whose task a free poll may still find."""
        posts = {tuple(self.attempts_in_task(number)) for number in self.attempts_in("in_doubt", "expired")}
        return sorted(list(post) for post in posts if self._is_written_off(post))

    def written_off_before(self, execution: int) -> list[list[int]]:
        """List the POSTs that earlier executions have written off."""
        return [post for post in self.written_off() if self.attempts[post[0]].execution_charged != execution]

    def _is_written_off(self, numbers: tuple[int, ...]) -> bool:
        posts = [self.attempts[number] for number in numbers]
        alone = not any(
            each.task_id == posts[0].task_id for other, each in self.attempts.items() if other not in numbers
        )
        priced = posts[0].credits is not None or self.bulk_tasks.get(posts[0].bulk_id or 0) is not None
        if posts[0].task_id is None or priced or not alone or any(post.deleted_at_api for post in posts):
            return False
        newest = [
            self.requests[post.lead].newest_attempt == number for number, post in zip(numbers, posts, strict=True)
        ]
        if posts[0].bulk_id is None:
            return True
        return all(newest) and all(post.state in ("in_doubt", "expired") for post in posts)


class LedgerStateMachine(RuleBasedStateMachine):
    """Runs of one job: inputs change, the program is killed, and the API returns anything."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = CommittingLedger.open(self.ledger_location(Path(self.folder.name)))
        self.model = LedgerModel()
        self.before: dict[int, State] = {}
        self.begin(None)

    @classmethod
    def ledger_location(cls, folder: Path) -> LedgerLocation:
        """Return where the ledger is."""
        return folder / "ledger.db"

    def teardown(self) -> None:
        """Check the ledger and close it."""
        assert check_ledger(self.ledger.location).problems == []
        self.ledger.wrapped.close()
        self.folder.cleanup()

    def begin(self, cap: int | None) -> None:
        """Start an execution as the program does: recover first."""
        self.recover()
        number = self.ledger.start_execution(cap)
        for post in self.model.attempts.values():
            if post.state == "submitted":
                post.execution_charged = number
        self.model.caps[number] = cap
        self.model.adopted[number] = self.model.reserved(number)

    def recover(self) -> None:
        """Mark the attempts in flight as in doubt."""
        lost = self.model.attempts_in("submitting")
        assert self.ledger.commit(resume.recover, self.ledger.now) == len(lost)
        for number in lost:
            self.settle_attempt(number, State.IN_DOUBT)

    def settle_attempt(self, number: int, after: State, outcome: str | None = None) -> None:
        """Move an attempt and its request in the model."""
        post = self.model.attempts[number]
        lead = self.model.requests[post.lead]
        if post.state == "submitting" and after in (State.IN_DOUBT, State.SUBMITTED) and outcome != "refused":
            lead.attempts += 1
        post.state = outcome or after.value
        post.at = self.ledger.now
        lead.state = after
        if post.state == "refused":
            if after is not State.PENDING:
                lead.newest_attempt = post.previous_attempt
        elif after not in (State.PENDING, State.SUBMITTED):
            lead.queue_position = None

    # Events

    @rule(seconds=st.integers(1, 50))
    def advance_clock(self, seconds: int) -> None:
        """Advance the clock."""
        self.ledger.now += seconds

    @rule(cap=st.none() | st.integers(0, 60))
    def start_new_execution(self, cap: int | None) -> None:
        """End this execution normally and begin the next."""
        self.recover()
        self.ledger.commit(records.end_execution, self.ledger.execution, 0, {}, self.ledger.now)
        self.begin(cap)

    @rule(cap=st.none() | st.integers(0, 60))
    def crash_and_restart(self, cap: int | None) -> None:
        """Kill the program in the middle of a commit, and start it again."""
        db = self.ledger.wrapped.session
        db.begin()
        db.execute("UPDATE requests SET state = 'found'")
        db.execute("UPDATE attempts SET state = 'failed' WHERE state = 'submitted'")
        self.ledger.reopen()
        self.begin(cap)

    @rule(
        batches=st.lists(st.lists(st.sampled_from(LEADS), max_size=6), max_size=3),
        retry=st.sets(st.sampled_from(sorted(RETRYABLE_STATES)), max_size=2),
        stale=st.dictionaries(st.sampled_from([State.FOUND, State.NOT_FOUND]), st.integers(0, 60)),
    )
    def enroll_rows(self, batches: list[list[int]], retry: set[State], stale: dict[State, int]) -> None:
        """Enroll any leads in any order, with any retry and refresh options."""
        before = {state: self.ledger.now - age for state, age in stale.items()}
        self.ledger.enroll(*batches, retry=retry, stale=before)
        for lead in self.model.requests.values():
            lead.queue_position = None
        flat = [number for batch in batches for number in batch]
        for position, number in enumerate(flat):
            if number in flat[:position]:
                continue
            lead = self.model.requests.setdefault(number, RequestModel())
            old = lead.newest_attempt is not None and self.model.attempts[lead.newest_attempt].at < before.get(
                lead.state, -1
            )
            if old or lead.state in {*retry, State.PENDING, State.SUBMITTING, State.SUBMITTED}:
                lead.queue_position = position
        leads = [self.model.requests[number] for number in set(flat)]
        assert enroll.enrolled_counts(self.ledger.wrapped) == Counter(
            State.PENDING if lead.queued else lead.state for lead in leads
        )

    @rule(
        price=PRICES,
        room=st.integers(1, 4),
        bulk=st.booleans(),
        step=st.sampled_from([None, "email", "phone"]),
        step_cap=st.none() | st.integers(0, 30),
    )
    def claim_requests(self, price: int, room: int, step: str | None, step_cap: int | None, *, bulk: bool) -> None:
        """Claim the first requests of the queue, up to the room and both caps, one by one or as one bulk task."""
        if not any(lead.queued for lead in self.model.requests.values()):
            self.enroll_rows([list(LEADS)], {State.IN_DOUBT}, {})
            self.requests_match_model()
        queued = sorted((lead.queue_position, number) for number, lead in self.model.requests.items() if lead.queued)
        execution = self.ledger.execution
        cap = self.model.caps[execution]
        step_cap = None if step is None else step_cap

        def make_claims(count: int) -> list[ClaimedRequest]:
            return self.ledger.commit(
                queue.claim,
                execution,
                price,
                self.ledger.now,
                count,
                bulk=bulk,
                step=step,
                step_cap=step_cap,
            )

        lefts: list[tuple[int, type[CapReached]]] = []
        if cap is not None:
            lefts.append((cap - self.model.spent[execution] - self.model.reserved(execution), CapReached))
        if step is not None and step_cap is not None:
            lefts.append((step_cap - self.model.step_cost(execution, step), StepCapReached))
        for left, reached in lefts:
            if queued and price > left:
                with pytest.raises(CapReached) as caught:
                    make_claims(room)
                assert caught.type is reached
                return
            if queued:  # else all of the cap may be spent
                room = min(room, left // price)
        claims = make_claims(room)
        for claim, (_, number) in zip(claims, queued[:room], strict=True):
            assert claim.params == params(number)
            assert claim.attempt_id not in self.model.attempts
            assert (claim.bulk_task_id is not None) is bulk
            lead = self.model.requests[number]
            post = AttemptModel(
                number, execution, "submitting", price, self.ledger.now, lead.state, lead.newest_attempt
            )
            post.execution_charged, post.bulk_id, post.step = execution, claim.bulk_task_id, step
            self.model.attempts[claim.attempt_id] = post
            if lead.state is not State.PENDING:
                lead.attempts = 0
            lead.state, lead.newest_attempt = State.SUBMITTING, claim.attempt_id

    @rule(data=st.data(), answer=st.sampled_from(["accepted", "accepted", "refused", "rejected", "doubt"]))
    def answer_post(self, data: Any, answer: str) -> None:
        """Apply one of the four outcomes of a POST; of a bulk POST some rows may be invalid."""
        if not self.model.attempts_in("submitting"):
            self.claim_requests(1, 3, None, None, bulk=data.draw(st.booleans()))
            self.requests_match_model()
        if not self.model.attempts_in("submitting"):
            return
        numbers = self.model.attempts_in_task(data.draw(st.sampled_from(self.model.attempts_in("submitting"))))
        ledger = self.ledger
        task_id = self.draw_task_id(data, numbers[0])
        if answer == "accepted":
            taken = self.model.task_id_conflicts(numbers, task_id)
            means = ledger.commit(
                transitions.record_accepted, [(number, task_id, ledger.now) for number in numbers], BINDING
            )
            assert {each is Acceptance.CONFLICT for each in means} == {taken}
            for number in numbers:
                self.settle_attempt(number, State.IN_DOUBT if taken else State.SUBMITTED)
                self.model.attempts[number].task_id = None if taken else task_id
        elif answer == "doubt":
            message = data.draw(st.sampled_from([None, task_id]))
            kept = None if message is None or self.model.task_id_conflicts(numbers, message) else message
            ledger.commit(transitions.mark_in_doubt, [(number, "reset", ledger.now, message) for number in numbers])
            for number in numbers:
                self.settle_attempt(number, State.IN_DOUBT)
                self.model.attempts[number].task_id = kept
        else:
            wrong = data.draw(st.sets(st.sampled_from(numbers), min_size=1)) if answer == "rejected" else set()
            for number in numbers:
                post = self.model.attempts[number]
                post.credits, post.execution_charged = 0, None
                if number in wrong:
                    ledger.commit(transitions.record_rejected, [(number, "400", ledger.now)])
                    self.settle_attempt(number, State.FAILED)
                else:
                    ledger.commit(transitions.record_refused, [(number, "429", ledger.now)])
                    self.settle_attempt(number, post.previous_state, "refused")

    def draw_task_id(self, data: Any, number: int) -> str:
        """Draw the task id that the API returns: usually a new one, sometimes an old one."""
        known = sorted({post.task_id for post in self.model.attempts.values() if post.task_id is not None})
        return str(data.draw(st.sampled_from([f"task-{number}", f"task-{number}", *known])))

    @rule(data=st.data(), paid=st.integers(0, 9), answer=st.sampled_from(["known", "known", "gone"]))
    def poll_written_off(self, data: Any, paid: int, answer: str) -> None:
        """Poll a task that was written off: the API still has it, or has deleted it."""
        ledger, model = self.ledger, self.model
        if not model.written_off_before(ledger.execution):
            self.lose_task(data)
            self.requests_match_model()
            self.start_new_execution(None)
        assert (
            sorted(list(task.attempts) for task in resume.written_off_tasks(ledger.wrapped, 0)) == model.written_off()
        )
        left = model.written_off_before(ledger.execution)
        if not left:
            return
        numbers = data.draw(st.sampled_from(left))
        lead = model.requests[model.attempts[numbers[0]].lead]
        if answer == "gone":
            ledger.commit(resume.mark_result_deleted, numbers)
            for number in numbers:
                model.attempts[number].deleted_at_api = True
            return
        for number in numbers:
            post = model.attempts[number]
            if post.settled_execution is not None:
                model.unknown[post.settled_execution] -= 1
                post.settled_execution = None
        if lead.newest_attempt != numbers[0]:
            (number,) = numbers
            late = Answer(State.FOUND, credits=paid, raw="{}")
            ledger.commit(resume.settle_superseded, number, late, ledger.now, ledger.execution)
            post = model.attempts[number]
            model.spent[ledger.execution] += paid
            post.credits, post.execution_charged, post.at = paid, None, ledger.now
            post.settled_execution = ledger.execution
            model.beyond_cap[ledger.execution] += paid
            return
        ledger.commit(resume.revive, numbers, ledger.execution)
        for number in numbers:
            post = model.attempts[number]
            if post.execution != ledger.execution:
                model.beyond_cap[ledger.execution] += post.reserved
            post.state, post.execution_charged = "submitted", ledger.execution
            model.requests[post.lead].state = State.SUBMITTED

    @rule(
        data=st.data(),
        state=st.sampled_from([State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED]),
        share=st.none() | st.integers(0, 3) | st.just(12),
        free=st.booleans(),
    )
    def settle_task(self, data: Any, state: State, share: int | None, *, free: bool) -> None:
        """Settle a task with any answer, at a known or unknown price."""
        if not self.model.attempts_in("submitted"):
            self.answer_post(data, "accepted")
            self.requests_match_model()
        if not self.model.attempts_in("submitted"):
            return
        number = data.draw(st.sampled_from(self.model.attempts_in("submitted")))
        ledger, post = self.ledger, self.model.attempts[number]
        if post.bulk_id is not None:
            self.settle_bulk_task(data, self.model.attempts_in_task(number), share)
            return
        lead = self.model.requests[post.lead]
        free = free and state is State.FAILED
        paid = 0 if free else None if share is None else post.reserved * share // 3
        result = paid
        if paid and self.model.price_already_charged([number]):
            paid = 0
        after = State.PENDING if free and lead.attempts < MAX_ATTEMPTS else state
        answer = Answer(state, credits=result, raw=f'{{"data": {number}}}', free_failure=free)
        assert ledger.settle(number, answer, MAX_ATTEMPTS) is after
        self.settle_attempt(number, after, state.value)
        post.credits, post.settled_execution = paid, ledger.execution
        self.model.spent[ledger.execution] += paid or 0
        self.model.beyond_cap[ledger.execution] += max(0, (paid or 0) - post.reserved)
        if paid is None:
            self.model.unknown[ledger.execution] += 1
        else:
            post.execution_charged = None
        if state is State.FOUND:
            lead.current_attempt = number

    def settle_bulk_task(self, data: Any, numbers: list[int], share: int | None) -> None:
        """Settle a bulk task with any answers for its rows, at one price."""
        ledger, model = self.ledger, self.model
        fates = [State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED]
        answers = [
            Answer(state, raw=f'{{"data": {number}}}', free_failure=state is State.FAILED and share == 0)
            for number, state in zip(
                numbers, data.draw(st.tuples(*[st.sampled_from(fates)] * len(numbers))), strict=True
            )
        ]
        reserved = sum(model.attempts[number].reserved for number in numbers)
        paid = None if share is None else reserved * share // 3
        after = [
            State.PENDING
            if answer.free_failure and model.requests[model.attempts[number].lead].attempts < MAX_ATTEMPTS
            else answer.state
            for number, answer in zip(numbers, answers, strict=True)
        ]
        result = [(number, answer, ledger.now) for number, answer in zip(numbers, answers, strict=True)]
        assert ledger.commit(transitions.settle_bulk_task, result, ledger.execution, MAX_ATTEMPTS, paid) == after
        if paid and model.price_already_charged(numbers):
            paid = 0
        bulk_task = model.attempts[numbers[0]].bulk_id
        assert bulk_task is not None
        model.bulk_tasks[bulk_task] = paid
        model.spent[ledger.execution] += paid or 0
        model.beyond_cap[ledger.execution] += max(0, (paid or 0) - reserved)
        for number, answer, state in zip(numbers, answers, after, strict=True):
            post = model.attempts[number]
            self.settle_attempt(number, state, answer.state.value)
            post.settled_execution = ledger.execution
            if paid is None:
                model.unknown[ledger.execution] += 1
            else:
                post.execution_charged = None
            if state is State.FOUND:
                model.requests[post.lead].current_attempt = number

    @rule(data=st.data())
    def lose_task(self, data: Any) -> None:
        """Lose a task: the API never knew it."""
        if not self.model.attempts_in("submitted"):
            self.answer_post(data, "accepted")
            self.requests_match_model()
        if not self.model.attempts_in("submitted"):
            return
        numbers = self.model.attempts_in_task(data.draw(st.sampled_from(self.model.attempts_in("submitted"))))
        self.ledger.commit(transitions.mark_in_doubt, [(number, "404", self.ledger.now, None) for number in numbers])
        for number in numbers:
            self.settle_attempt(number, State.IN_DOUBT)

    @precondition(lambda self: self.model.attempts)
    @rule(data=st.data(), move=st.sampled_from(["accepted", "refused", "rejected", "doubt", "settle"]))
    def late_transition(self, data: Any, move: str) -> None:
        """Any transition of a settled attempt raises and changes nothing."""
        settled = [
            number for number in self.model.attempts if number not in self.model.attempts_in("submitting", "submitted")
        ]
        if not settled:
            return
        number, ledger = data.draw(st.sampled_from(settled)), self.ledger
        moves: dict[str, Callable[[], object]] = {
            "accepted": lambda: ledger.commit(transitions.record_accepted, [(number, "x", ledger.now)], BINDING),
            "refused": lambda: ledger.commit(transitions.record_refused, [(number, "x", ledger.now)]),
            "rejected": lambda: ledger.commit(transitions.record_rejected, [(number, "x", ledger.now)]),
            "doubt": lambda: ledger.commit(transitions.mark_in_doubt, [(number, "x", ledger.now, None)]),
            "settle": lambda: ledger.settle(number, Answer(State.FOUND, credits=1)),
        }
        with pytest.raises(AssertionError):
            moves[move]()

    # Invariants

    @invariant()
    def requests_match_model(self) -> None:
        """States, counts and queue positions equal the model's, and each transition is in the state diagram."""
        rows = self.ledger.query_all(
            "SELECT fingerprint, state, attempt_count, attempt_id, answer_id, queue_position FROM requests"
        )
        known = {int.from_bytes(key): (State(state), *rest) for key, state, *rest in rows}
        states = {number: state for number, (state, *_) in known.items()}
        moves = {(self.before[number], states[number]) for number in self.before}
        assert all(before is after or (before, after) in ALLOWED_TRANSITIONS for before, after in moves)
        self.before = states
        assert known == {
            number: (lead.state, lead.attempts, lead.newest_attempt, lead.current_attempt, lead.queue_position)
            for number, lead in self.model.requests.items()
        }

    @invariant()
    def attempts_match_model(self) -> None:
        """A later attempt never overwrites an earlier one, so all spending can be reconciled."""
        rows = self.ledger.query_all("SELECT id, state, execution_id, reserved, credits, step FROM attempts")
        assert {row[0]: row[1:] for row in rows} == {
            number: (post.state, post.execution, post.reserved, post.credits, post.step)
            for number, post in self.model.attempts.items()
        }

    @invariant()
    def credits_match_model(self) -> None:
        """Spent, unknown and reserved credits equal the sums over the attempts, and the cap holds."""
        model = self.model
        for row in records.list_executions(self.ledger.wrapped):
            number = row.id
            assert row.spent == model.spent[number]
            assert row.unknown == model.unknown[number]
            if number == self.ledger.execution:
                assert row.reserved == model.reserved(number) >= 0
            assert (
                row.cap is None
                or row.spent + row.reserved <= max(row.cap, model.adopted[number]) + model.beyond_cap[number]
            )
        spent, unknown = queries.spent_totals(self.ledger.wrapped)
        alone = sum(post.credits or 0 for post in model.attempts.values())
        assert spent == alone + sum(paid or 0 for paid in model.bulk_tasks.values()) == sum(model.spent.values())
        assert unknown == sum(model.unknown.values())

    @invariant()
    def results_match_model(self) -> None:
        """The result is the last found answer or, without one, the newest state."""
        self.ledger.commit(enroll.begin_pass)
        for known in results_of(self.ledger.wrapped, row_requests(LEADS), DEFAULT_SELECTION):
            lead = self.model.requests[known.position]
            stands = lead.current_attempt if lead.current_attempt is not None else lead.newest_attempt
            assert known.state == (State.FOUND if lead.current_attempt is not None else lead.state)
            if stands is not None:
                assert known.credits == self.model.attempts[stands].credits
            assert known.first
        assert queries.state_counts(self.ledger.wrapped) == Counter(lead.state for lead in self.model.requests.values())
        tasks = transitions.submitted_tasks(self.ledger.wrapped)
        assert sorted(number for task in tasks for number in task.attempts) == self.model.attempts_in("submitted")
        assert all(list(task.attempts) == self.model.attempts_in_task(task.attempts[0]) for task in tasks)


TestLedger = LedgerStateMachine.TestCase
TestLedger.settings = settings(
    max_examples=examples(40),
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class PostgresStateMachine(LedgerStateMachine):
    """The same state machine with the ledger on a PostgreSQL server."""

    server: ClassVar[PostgresServer]

    @classmethod
    def ledger_location(cls, folder: Path) -> LedgerLocation:
        """Return where the ledger is."""
        return parse_ledger_location(folder, cls.server.ledger_url(), folder)

    def teardown(self) -> None:
        """Check the ledger, close it and drop it."""
        super().teardown()
        self.server.drop_schemas()


@pytest.mark.long
def test_stateful_postgres(postgres: PostgresServer) -> None:
    """Fewer examples than for a file, because each step takes longer."""
    PostgresStateMachine.server = postgres
    few = settings(TestLedger.settings, max_examples=examples(8), stateful_step_count=25)
    run_state_machine_as_test(PostgresStateMachine, settings=few)

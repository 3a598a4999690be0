"""Brings the answer of each submitted request: asks when it pays, nearest expiry first."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from enrich.api.answer import Phase, TaskReply, paid_without_data, phase_of, read_answer
from enrich.api.bundle import read_bundle
from enrich.api.client import POLLS_ON_THE_WIRE, Client
from enrich.errors import EnrichError, Exit, NotAccepted, NotBelieved, RateLimited, TaskUnknown, Unauthorized
from enrich.execution import FETCHED_IN, MOST_UNKNOWN_TASKS, Execution
from enrich.model import Answer, State, Task
from enrich.polls import Price
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger

IDLE_S = 1.0
NO_DATA_POLL_S = 1.0
YOUNG_POLL_S = 5.0
FAILED_POLL_S = 2.0
#: A 404 is believed after so many in a row, over `Timing.young_s` at least; so is an answer that can't be read.
ENOUGH_ANSWERS = 5
#: An answer with a task that the ledger does not have is believed after so many that are the same.
SAME_ANSWERS = 3


@dataclass(slots=True)
class Repeated:
    """An answer that is not believed at once: what it is, how often it came in a row, and since when (monotonic)."""

    what: str
    since: float
    times: int = 0

    def enough(self, now: float, young_s: float) -> bool:
        """Tell whether it came often enough, over long enough."""
        return self.times >= ENOUGH_ANSWERS and now - self.since >= young_s


@dataclass(slots=True)
class Waiting:
    """A task whose answer is not there yet. `fresh`: submitted by this execution, so its age teaches something."""

    task: Task
    fresh: bool
    alive: bool
    #: When it was submitted, by the monotonic clock.
    born: float
    #: It was taken for lost: a free question, which the API need not be able to answer.
    written_off: bool = False
    #: How old it was in seconds when it was last seen at work.
    ran_s: float = 0.0
    no_data_since: float | None = None
    #: The next poll goes over a connection of its own.
    distrusted: bool = False
    repeated: Repeated | None = None
    #: The last answer with a task that the ledger does not have, and how often it came in a row.
    strange: str = ""
    strange_times: int = 0
    #: It is about to be bought again, so its 404 is believed no sooner than any other.
    to_be_bought: bool = False

    def repeats(self, what: str, now: float) -> Repeated:
        """Count an answer that is not believed at once."""
        if self.repeated is None or self.repeated.what != what:
            self.repeated = Repeated(what, now)
        self.repeated.times += 1
        return self.repeated


@dataclass(slots=True)
class Poller:
    """submitted → settled. `paths` are the job's columns: they decide between found and not found.

    A task that another job left behind is judged by that job's.
    """

    execution: Execution
    journal: Journal
    client: Client
    paths: tuple[str, ...]
    max_attempts: int
    patience_s: float
    #: Ask each task once more and go.
    last_round: bool = False
    #: Nobody will bring new tasks.
    no_more: bool = False
    #: The key may be another workspace's: only answers count, and no task is lost because of what it can't see.
    answers_only: bool = False
    #: Tasks that were written off, and that could not be asked for now.
    unasked: list[Task] = field(default_factory=list)
    #: How many of them the API knows after all.
    revived: int = 0
    _due: list[tuple[float, int, Waiting]] = field(default_factory=list)
    _ready: list[tuple[int, int, Waiting]] = field(default_factory=list)
    _asking: int = 0
    _relaxed: bool = False
    _number: count[int] = field(default_factory=count)

    def add(self, task: Task) -> None:
        """Take on a task that was submitted just now."""
        now = self.execution.clock.monotonic()
        self._later(Waiting(task, fresh=True, alive=task.seen_alive, born=now), self._worth(0.0))

    def adopt(self, tasks: Iterable[Task], *, asked_before: bool) -> None:
        """Take on what earlier executions left at the API; ask at once unless that was done just now."""
        for waiting in self._adopted(tasks):
            self._later(waiting, self._worth(self._age(waiting)) if asked_before else 0.0)

    def ask_again(self, tasks: Iterable[Task], *, to_be_bought: bool = False) -> None:
        """Ask once more for tasks that were written off; those that the API knows after all are waited for again."""
        for waiting in self._adopted(tasks):
            waiting.written_off, waiting.to_be_bought = True, to_be_bought
            self._later(waiting, 0.0)

    def _adopted(self, tasks: Iterable[Task]) -> Iterable[Waiting]:
        clock = self.execution.clock
        for task in tasks:
            age_s = max(0.0, (clock.now_ms() - task.submitted_ms) / 1000)
            self.execution.in_flight += 1
            yield Waiting(task, fresh=False, alive=task.seen_alive, born=clock.monotonic() - age_s)

    def end_asking_again(self) -> None:
        """Leave alone what was written off and not asked for yet."""
        left = [waiting for *_, waiting in (*self._due, *self._ready) if waiting.written_off]
        self._due = [each for each in self._due if not each[2].written_off]
        self._ready = [each for each in self._ready if not each[2].written_off]
        heapq.heapify(self._due)
        heapq.heapify(self._ready)
        for waiting in left:
            self._not_asked(waiting)
        self.execution.notify()

    def hurry(self) -> None:
        """Ask every task once more, now, and go."""
        self.last_round = True
        self._due = sorted((0.0, number, waiting) for _, number, waiting in self._due)
        self.execution.notify()

    async def run(self) -> None:
        """Poll until no task waits and none can come, or the execution gives up."""
        stop = self.execution.giving_up
        async with asyncio.TaskGroup() as polls:
            while not stop.is_set():
                if self.no_more and not self._relaxed:
                    self._relax()
                wait = self._sort_due()
                if self._ready and self._asking < POLLS_ON_THE_WIRE:
                    room = min(POLLS_ON_THE_WIRE - self._asking, len(self._ready))
                    granted = await self.execution.rate_slots(room, stop)
                    for _ in range(min(granted, len(self._ready))):
                        self._asking += 1
                        polls.create_task(self._poll(heapq.heappop(self._ready)[2]))
                elif not (self._ready or self._due or self._asking) and (self.no_more or self.last_round):
                    return
                else:
                    await self.execution.wait_change(min(wait, IDLE_S))

    def _relax(self) -> None:
        """Ask sooner than was meant while each poll took the slot of a submit: none waits any more."""
        self._relaxed = True
        now = self.execution.clock.monotonic()
        self._due = [
            (min(due, now + self._worth(self._age(waiting))), number, waiting) for due, number, waiting in self._due
        ]
        heapq.heapify(self._due)

    def _worth(self, age: float) -> float:
        """Tell in how many seconds a task of this age is worth a poll, before its result or our patience is gone."""
        execution = self.execution
        alone = self.no_more or self.last_round or execution.closing.is_set()
        price = Price.FAIR if alone else execution.poll_price
        wait = execution.poll_times.wait(age, price) if age else execution.poll_times.first(price)
        return min(wait, execution.result_ttl_s * FETCHED_IN, max(0.0, self.patience_s - age))

    def _later(self, waiting: Waiting, seconds: float) -> None:
        due = self.execution.clock.monotonic() + seconds
        heapq.heappush(self._due, (due, next(self._number), waiting))
        self.execution.notify()

    def _sort_due(self) -> float:
        """Put what is due in the order of its expiry; tell in how many seconds the next will be due."""
        now = self.execution.clock.monotonic()
        while self._due and self._due[0][0] <= now:
            _, number, waiting = heapq.heappop(self._due)
            heapq.heappush(self._ready, (waiting.task.submitted_ms, number, waiting))
        return self._due[0][0] - now if self._due else IDLE_S

    async def _poll(self, waiting: Waiting) -> None:
        """Ask how one task is, and write down what came of it."""
        execution = self.execution
        try:
            execution.tally.polls += 1
            reply = await self.client.task(waiting.task.task_id, fresh=waiting.distrusted)
        except NotBelieved as error:
            await self._not_believed(waiting, error)
        except RateLimited as error:
            execution.throttle(error)
            if self.last_round:
                self._later(waiting, 0.0)  # this was not the one answer that it is owed
            else:
                self._again(waiting, 0.0)
        except Unauthorized as error:
            if self.answers_only:
                self._again(waiting, FAILED_POLL_S)
            else:
                execution.give_up(error.exit_code, error)
        except TaskUnknown:
            execution.good_answer()
            await self._unknown(waiting)
        except NotAccepted as error:
            execution.bad_answer(error)
            self._again(waiting, FAILED_POLL_S)
        else:
            execution.good_answer()
            waiting.distrusted, waiting.repeated = False, None
            await self._answered(waiting, reply)
        finally:
            self._asking -= 1
            execution.notify()

    async def _answered(self, waiting: Waiting, reply: TaskReply) -> None:
        execution = self.execution
        age = self._age(waiting)
        phase = phase_of(reply.body)
        if phase is Phase.GONE and (self.answers_only or waiting.written_off):
            await self._gone(waiting)
            return
        if waiting.task.superseded:
            await self._settle_superseded(waiting, reply, phase)
            return
        if waiting.written_off:
            await self.journal.do(Ledger.revive, waiting.task.attempts, execution.id)
            waiting.written_off, waiting.alive = False, True
            self.revived += 1
        if phase in (Phase.RUNNING, Phase.NO_DATA) and not waiting.alive:
            waiting.alive = True
            await self.journal.together(Ledger.alive, waiting.task.attempts)
        if phase is Phase.RUNNING:
            waiting.ran_s = age
            self._still_running(waiting, age)
            return
        if phase is Phase.NO_DATA or (phase is Phase.COMPLETED and paid_without_data(reply.body)):
            now = execution.clock.monotonic()
            waiting.no_data_since = now if waiting.no_data_since is None else waiting.no_data_since
            if now - waiting.no_data_since < execution.timing.no_data_s:
                grace = execution.timing.no_data_s
                self._again(waiting, NO_DATA_POLL_S if phase is Phase.NO_DATA else grace)
                return
        elif waiting.fresh:
            execution.poll_times.finished(waiting.ran_s, age)
        paths = waiting.task.paths or self.paths
        if waiting.task.bundle is None:
            await self._settle(waiting, read_answer(reply, phase, paths))
        else:
            size = len(waiting.task.attempts)
            await self._settle_bundle(waiting, *read_bundle(reply, phase, size, paths))

    def _still_running(self, waiting: Waiting, age_s: float) -> None:
        if waiting.to_be_bought:  # it is not bought then, and what is must not wait for it
            self.execution.in_flight -= 1
        else:
            self._again(waiting, self._worth(age_s))

    async def _gone(self, waiting: Waiting) -> None:
        """Leave a task as it is, though the API has deleted its result."""
        if waiting.written_off and not self.answers_only:
            await self.journal.together(Ledger.mark_gone, waiting.task.attempts)
        self.execution.in_flight -= 1

    async def _settle_superseded(self, waiting: Waiting, reply: TaskReply, phase: Phase) -> None:
        """Write down what a task cost whose request was asked again meanwhile."""
        execution = self.execution
        answer = read_answer(reply, phase, waiting.task.paths or self.paths)
        execution.in_flight -= 1
        if phase is not Phase.RUNNING and answer.credits is not None:
            (attempt,) = waiting.task.attempts
            await self.journal.do(Ledger.settle_superseded, attempt, answer, execution.clock.now_ms(), execution.id)
            execution.tally.spent += answer.credits

    async def _not_believed(self, waiting: Waiting, error: NotBelieved) -> None:
        """Ask again over a connection of its own; after enough such answers let go of the task until the next run."""
        execution = self.execution
        waiting.distrusted = True
        if not error.fresh:
            execution.good_answer()
            self._later(waiting, 0.0)  # what came may be the answer to an earlier request
            return
        execution.bad_answer(error)
        now = execution.clock.monotonic()
        strange = error.task_id is not None and not await self.journal.do(Ledger.has_task, error.task_id)
        if strange:
            waiting.strange_times = waiting.strange_times + 1 if error.raw == waiting.strange else 1
            waiting.strange = error.raw
        same = strange and waiting.strange_times >= SAME_ANSWERS
        if same or waiting.repeats(error.message, now).enough(now, execution.timing.young_s):
            await self._let_go(waiting, error, strange=strange)
        elif waiting.written_off and not strange:
            self._not_asked(waiting)
        else:
            self._again(waiting, FAILED_POLL_S)

    async def _let_go(self, waiting: Waiting, error: NotBelieved, *, strange: bool) -> None:
        """Keep what the API said, and let the next run ask for the task again."""
        execution = self.execution
        if waiting.written_off:
            self._not_asked(waiting)
        else:
            # What belongs to another request is not kept here.
            raw = error.raw if strange or error.task_id is None else None
            reason = f"{error.message}, which the ledger does not have" if strange else error.message
            await self.journal.do(Ledger.keep_unread, waiting.task.attempts, reason, raw)
            execution.in_flight -= 1
            said = "the API's answers to some tasks do not count: see enrich_error"
            execution.reasons.setdefault(Exit.TIME, EnrichError(said, "the next run asks for them again"))
        if strange:
            execution.tally.unknown_tasks += 1
            if execution.tally.unknown_tasks >= MOST_UNKNOWN_TASKS:
                said = (
                    f"the API answered {execution.tally.unknown_tasks} polls with tasks that the ledger does not have"
                )
                execution.stop(
                    Exit.API, EnrichError(said, "is there a proxy between, or another client with this key?")
                )

    def _not_asked(self, waiting: Waiting) -> None:
        """Leave a task that was written off as it is."""
        self.unasked.append(waiting.task)
        self.execution.in_flight -= 1

    async def _unknown(self, waiting: Waiting) -> None:
        """Judge a 404: too young to be known, never accepted after all, or gone."""
        execution = self.execution
        now, young_s = execution.clock.monotonic(), execution.timing.young_s
        if waiting.written_off and not waiting.to_be_bought:
            execution.in_flight -= 1
        elif self.answers_only or self.last_round:
            self._again(waiting, FAILED_POLL_S)
        elif not waiting.repeats("404", now).enough(now, young_s):
            wait = YOUNG_POLL_S if self._age(waiting) < young_s else young_s / (ENOUGH_ANSWERS - 1)
            self._later(waiting, min(wait, young_s / (ENOUGH_ANSWERS - 1)))
        elif waiting.written_off:
            execution.in_flight -= 1
        elif waiting.alive:
            reason = "the API has forgotten the task (404) before its result was fetched"
            expired = Answer(State.EXPIRED, reason)
            if waiting.task.bundle is None:
                await self._settle(waiting, expired)
            else:
                await self._settle_bundle(waiting, [expired] * len(waiting.task.attempts), None)
        else:
            reason = "the API gave a task id and has never known it since (404)"
            now_ms = execution.clock.now_ms()
            told = [(attempt, reason, now_ms, None) for attempt in waiting.task.attempts]
            await self.journal.together(Ledger.doubt, told)
            execution.in_flight -= 1

    async def _settle(self, waiting: Waiting, answer: Answer) -> None:
        execution = self.execution
        told = [(waiting.task.attempts[0], answer, execution.clock.now_ms())]
        states = await self.journal.together(Ledger.settle, told, execution.id, self.max_attempts)
        self._count(states, answer.credits)

    async def _settle_bundle(self, waiting: Waiting, answers: list[Answer], credits_: int | None) -> None:
        execution, now_ms = self.execution, self.execution.clock.now_ms()
        told = [(attempt, answer, now_ms) for attempt, answer in zip(waiting.task.attempts, answers, strict=True)]
        states = await self.journal.do(Ledger.settle_bundle, told, execution.id, self.max_attempts, credits_)
        self._count(states, credits_)

    def _count(self, states: list[State], credits_: int | None) -> None:
        """Count a task that is settled."""
        self.execution.in_flight -= 1
        self.execution.tally.spent += credits_ or 0
        for state in states:
            if state is not State.PENDING:
                self.execution.tally.count(state)

    def _again(self, waiting: Waiting, seconds: float) -> None:
        """Ask again later, unless the person's patience is at its end."""
        if waiting.written_off:
            self._not_asked(waiting)
        elif self.last_round or self._age(waiting) > self.patience_s:
            reason = EnrichError("tasks are still running at the API", "the next run asks them first")
            if not self.last_round:
                self.execution.reasons.setdefault(Exit.TIME, reason)
            self.execution.in_flight -= 1
        else:
            self._later(waiting, seconds)

    def _age(self, waiting: Waiting) -> float:
        """How old a task is in seconds."""
        return self.execution.clock.monotonic() - waiting.born

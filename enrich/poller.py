"""Brings the answer of each submitted request: asks when it pays, nearest expiry first."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from enrich.api.answer import Phase, phase_of, read_answer
from enrich.api.bundle import read_bundle
from enrich.api.client import POLLS_ON_THE_WIRE, Client
from enrich.errors import EnrichError, Exit, NotAccepted, RateLimited, TaskUnknown, Unauthorized
from enrich.execution import FETCHED_IN, Execution
from enrich.model import Answer, State, Task
from enrich.polls import Price
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger

IDLE_S = 1.0
NO_DATA_POLL_S = 1.0
YOUNG_POLL_S = 5.0
FAILED_POLL_S = 2.0


@dataclass(slots=True)
class Waiting:
    """A task whose answer is not there yet. `fresh`: submitted by this execution, so its age teaches something."""

    task: Task
    fresh: bool
    alive: bool
    #: How old it was in seconds when it was last seen at work.
    ran_s: float = 0.0
    no_data_since: float | None = None


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
    _due: list[tuple[float, int, Waiting]] = field(default_factory=list)
    _ready: list[tuple[int, int, Waiting]] = field(default_factory=list)
    _asking: int = 0
    _relaxed: bool = False
    _number: count[int] = field(default_factory=count)

    def add(self, task: Task) -> None:
        """Take on a task that was submitted just now."""
        self._later(Waiting(task, fresh=True, alive=task.seen_alive), self._worth(0.0))

    def adopt(self, tasks: Iterable[Task], *, asked_before: bool) -> None:
        """Take on what earlier executions left at the API; ask at once unless that was done just now."""
        for task in tasks:
            waiting = Waiting(task, fresh=False, alive=task.seen_alive)
            self.execution.in_flight += 1
            if asked_before:
                self._again(waiting, self._worth(self._age(waiting)))
            else:
                self._later(waiting, 0.0)

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
            body, raw = await self.client.task(waiting.task.task_id)
        except RateLimited as error:
            execution.throttle(error)
            if self.last_round:
                self._later(waiting, 0.0)  # this was not the one answer that it is owed
            else:
                self._again(waiting, 0.0)
        except Unauthorized as error:
            execution.give_up(error.exit_code, error)
        except TaskUnknown:
            execution.good_answer()
            await self._unknown(waiting)
        except NotAccepted as error:
            execution.bad_answer(error)
            self._again(waiting, FAILED_POLL_S)
        else:
            execution.good_answer()
            await self._answered(waiting, body, raw)
        finally:
            self._asking -= 1
            execution.notify()

    async def _answered(self, waiting: Waiting, body: dict[str, Any], raw: str) -> None:
        execution = self.execution
        age = self._age(waiting)
        phase = phase_of(body)
        if phase in (Phase.RUNNING, Phase.NO_DATA) and not waiting.alive:
            waiting.alive = True
            await self.journal.together(Ledger.alive, waiting.task.attempts)
        if phase is Phase.RUNNING:
            waiting.ran_s = age
            self._again(waiting, self._worth(age))
            return
        if phase is Phase.NO_DATA:
            now = execution.clock.monotonic()
            waiting.no_data_since = now if waiting.no_data_since is None else waiting.no_data_since
            if now - waiting.no_data_since < execution.timing.no_data_s:
                self._again(waiting, NO_DATA_POLL_S)
                return
        elif waiting.fresh:
            execution.poll_times.finished(waiting.ran_s, age)
        paths = waiting.task.paths or self.paths
        if waiting.task.bundle is None:
            await self._settle(waiting, read_answer(body, raw, phase, paths))
        else:
            await self._settle_bundle(waiting, *read_bundle(body, raw, phase, len(waiting.task.attempts), paths))

    async def _unknown(self, waiting: Waiting) -> None:
        """Judge a 404: too young to be known, never accepted after all, or gone."""
        youth = self.execution.timing.young_s - self._age(waiting)
        if youth > 0:
            self._again(waiting, min(YOUNG_POLL_S, youth))
        elif waiting.alive:
            reason = "the API has forgotten the task (404) before its result was fetched"
            expired = Answer(State.EXPIRED, reason)
            if waiting.task.bundle is None:
                await self._settle(waiting, expired)
            else:
                await self._settle_bundle(waiting, [expired] * len(waiting.task.attempts), None)
        else:
            reason = "the API gave a task id and has never known it since (404)"
            now_ms = self.execution.clock.now_ms()
            await self.journal.together(Ledger.doubt, [(attempt, reason, now_ms) for attempt in waiting.task.attempts])
            self.execution.in_flight -= 1

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
        if self.last_round or self._age(waiting) > self.patience_s:
            reason = EnrichError("tasks are still running at the API", "the next run asks them first")
            if not self.last_round:
                self.execution.reasons.setdefault(Exit.TIME, reason)
            self.execution.in_flight -= 1
        else:
            self._later(waiting, seconds)

    def _age(self, waiting: Waiting) -> float:
        """How old a task is in seconds; a clock that was set back makes none younger than new."""
        return max(0.0, (self.execution.clock.now_ms() - waiting.task.submitted_ms) / 1000)

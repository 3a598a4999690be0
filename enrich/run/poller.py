"""Polls each submitted task until it settles: when a poll is worth its cost, nearest expiry first."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from math import inf

from enrich.databar.client import MAX_POLLS_IN_FLIGHT, Client
from enrich.databar.task_results import TaskPhase, TaskReply, is_incomplete, read_answer, task_phase
from enrich.errors import EnrichError, InvalidPollResponse, RateLimited, RequestNotAccepted, TaskUnknown, Unauthorized
from enrich.exit_codes import ExitCode
from enrich.ledger import resume, transitions
from enrich.ledger.writer import LedgerWriter
from enrich.models import Answer, State, Task
from enrich.run.poll_schedule import CONFIRMING_FOREIGN_REPLIES, CONFIRMING_REPLIES, OpenTask, PollCost, Repeated
from enrich.run.run_state import MAX_UNKNOWN_TASKS, RunState, WorkConfig

IDLE_S = 1.0
NO_DATA_POLL_S = 1.0
YOUNG_TASK_POLL_S = 5.0
FAILED_POLL_S = 2.0


@dataclass(slots=True)
class Poller:
    """Moves tasks from submitted to settled.

    A task that another job left open is judged by that job's column paths.
    """

    run_state: RunState
    ledger_writer: LedgerWriter
    client: Client
    config: WorkConfig
    #: Poll each task once more, then finish.
    poll_once_more: bool = False
    #: No new tasks will be added.
    no_new_tasks: bool = False
    #: Written-off tasks that could not be polled now.
    unpolled_tasks: list[Task] = field(default_factory=list)
    #: Number of requests whose written-off tasks still exist at the API.
    revived_requests: int = 0
    _scheduled: list[tuple[float, int, OpenTask]] = field(default_factory=list)
    _ready: list[tuple[int, int, OpenTask]] = field(default_factory=list)
    _open_polls: int = 0
    #: The number of open tasks when polls were last brought forward.
    _brought_forward_at: float = inf
    _had_plan: bool = False
    _sequence: count[int] = field(default_factory=count)

    def add_task(self, task: Task) -> None:
        """Add a task that was submitted just now."""
        now = self.run_state.clock.monotonic()
        open_task = OpenTask(task, submitted_in_this_run=True, acknowledged=False, submitted_at_s=now)
        self._schedule(open_task, self._poll_delay_s(0.0))

    def add_earlier_tasks(
        self,
        tasks: Iterable[Task],
        *,
        polled_before: bool = False,
        written_off: bool = False,
        to_be_resubmitted: bool = False,
    ) -> None:
        """Add tasks that earlier runs left open, or have written off.

        They are polled at once unless `polled_before` (just now). Of those written off, the ones that still exist at
        the API are waited for again.
        """
        clock = self.run_state.clock
        for task in tasks:
            age_s = max(0.0, (clock.now_ms() - task.submitted_ms) / 1000)
            self.run_state.open_tasks += 1
            open_task = OpenTask(
                task,
                submitted_in_this_run=False,
                acknowledged=task.acknowledged,
                submitted_at_s=clock.monotonic() - age_s,
                written_off=written_off,
                to_be_resubmitted=to_be_resubmitted,
            )
            self._schedule(open_task, self._poll_delay_s(self._age_s(open_task)) if polled_before else 0.0)

    def stop_repolling(self) -> None:
        """Drop the written-off tasks that were not polled yet."""
        skipped = [waiting for *_, waiting in (*self._scheduled, *self._ready) if waiting.written_off]
        self._scheduled = [each for each in self._scheduled if not each[2].written_off]
        self._ready = [each for each in self._ready if not each[2].written_off]
        heapq.heapify(self._scheduled)
        heapq.heapify(self._ready)
        for open_task in skipped:
            self._skip_written_off(open_task)
        self.run_state.notify_change()

    def finish_early(self) -> None:
        """Poll every task once more, now, then finish."""
        self.poll_once_more = True
        self._scheduled = sorted((0.0, number, open_task) for _, number, open_task in self._scheduled)
        self.run_state.notify_change()

    async def run(self) -> None:
        """Poll until no task is open and none can come, or polling stops."""
        stop = self.run_state.stop_polling
        async with asyncio.TaskGroup() as polls:
            while not stop.is_set():
                self._bring_polls_forward()
                wait = self._move_due_to_ready()
                if self._ready and self._open_polls < MAX_POLLS_IN_FLIGHT:
                    slots = min(MAX_POLLS_IN_FLIGHT - self._open_polls, len(self._ready))
                    granted = await self.run_state.acquire_slots(slots, stop)
                    for _ in range(min(granted, len(self._ready))):
                        self._open_polls += 1
                        polls.create_task(self._poll(heapq.heappop(self._ready)[2]))
                elif not (self._ready or self._scheduled or self._open_polls) and (
                    self.no_new_tasks or self.poll_once_more
                ):
                    return
                else:
                    await self.run_state.wait_for_change(min(wait, IDLE_S))

    @property
    def _nothing_to_send(self) -> bool:
        return self.no_new_tasks or self.run_state.queue_is_empty

    def _bring_polls_forward(self) -> None:
        """Bring polls forward when enough tasks are settled to plan by, and then when half of the tasks are settled.

        The fewer tasks are left while nothing is sent any more, the sooner each can be polled.
        """
        has_plan = self.run_state.poll_schedule.has_plan
        has_fewer = self._nothing_to_send and self.run_state.open_tasks <= self._brought_forward_at / 2
        if has_plan == self._had_plan and not has_fewer:
            return
        self._had_plan = has_plan
        if has_fewer:
            self._brought_forward_at = self.run_state.open_tasks
        now = self.run_state.clock.monotonic()
        self._scheduled = [
            (min(due, now + self._poll_delay_s(self._age_s(open_task))), number, open_task)
            for due, number, open_task in self._scheduled
        ]
        heapq.heapify(self._scheduled)

    def _poll_delay_s(self, age_s: float) -> float:
        """Return in how many seconds a task of this age is worth a poll, before its result or `patience_s` expires."""
        run_state = self.run_state
        no_submits_left = self._nothing_to_send or self.poll_once_more or run_state.stop_submitting.is_set()
        cost = PollCost.NORMAL if no_submits_left else run_state.poll_cost
        wait = (
            run_state.poll_schedule.next_delay_s(age_s, cost) if age_s else run_state.poll_schedule.first_delay_s(cost)
        )
        if self._nothing_to_send:
            wait = min(
                wait, run_state.poll_schedule.last_delay_s(age_s, run_state.open_tasks, run_state.rate_limiter.rate)
            )
        return min(wait, run_state.in_flight_limit.fetch_window_s, max(0.0, self.config.patience_s - age_s))

    def _schedule(self, open_task: OpenTask, seconds: float) -> None:
        due = self.run_state.clock.monotonic() + seconds
        heapq.heappush(self._scheduled, (due, next(self._sequence), open_task))
        self.run_state.notify_change()

    def _move_due_to_ready(self) -> float:
        """Move due tasks to the ready queue, in order of expiry. Returns the seconds until the next one is due."""
        now = self.run_state.clock.monotonic()
        while self._scheduled and self._scheduled[0][0] <= now:
            _, number, open_task = heapq.heappop(self._scheduled)
            heapq.heappush(self._ready, (open_task.task.submitted_ms, number, open_task))
        return self._scheduled[0][0] - now if self._scheduled else IDLE_S

    async def _poll(self, open_task: OpenTask) -> None:
        """Poll one task and record the result."""
        run_state = self.run_state
        open_task.is_last_poll = self.poll_once_more
        try:
            run_state.counters.polls += 1
            reply = await self.client.poll_task(open_task.task.task_id, new_connection=open_task.needs_new_connection)
        except InvalidPollResponse as error:
            await self._handle_invalid_response(open_task, error)
        except RateLimited as error:
            run_state.record_throttled(error)
            if open_task.written_off and not self.poll_once_more:
                self._skip_written_off(open_task)
            else:
                self._schedule(open_task, 0.0)  # a 429 does not count as a poll
        except Unauthorized as error:
            if run_state.answers_only:
                self._poll_again(open_task, FAILED_POLL_S)
            else:
                run_state.give_up(error.exit_code, error)
        except TaskUnknown:
            run_state.record_success()
            await self._handle_task_unknown(open_task)
        except RequestNotAccepted as error:
            run_state.record_failure(error)
            now = run_state.clock.monotonic()
            is_lasting = open_task.failed_poll.add("failed", now).is_conclusive(now, run_state.timeouts.outage_s)
            self._poll_again(open_task, FAILED_POLL_S, has_grace=not is_lasting)
        else:
            run_state.record_success()
            open_task.needs_new_connection = False
            open_task.unconfirmed_reply, open_task.failed_poll = Repeated(), Repeated()
            await self._handle_reply(open_task, reply)
        finally:
            self._open_polls -= 1
            run_state.notify_change()

    async def _handle_reply(self, open_task: OpenTask, reply: TaskReply) -> None:
        run_state = self.run_state
        age_s = self._age_s(open_task)
        phase = task_phase(reply.body)
        now = run_state.clock.monotonic()
        phase_age_s = now - open_task.phase.add(phase, now).since
        if phase is TaskPhase.GONE and (run_state.answers_only or open_task.written_off):
            await self._handle_deleted(open_task)
            return
        if open_task.task.superseded:
            await self._settle_superseded(open_task, reply, phase)
            return
        if open_task.written_off:
            await self.ledger_writer.submit(resume.revive, open_task.task.attempts, run_state.execution_id)
            open_task.written_off, open_task.acknowledged = False, True
            self.revived_requests += len(open_task.task.attempts)
        if phase in (TaskPhase.RUNNING, TaskPhase.NO_DATA) and not open_task.acknowledged:
            open_task.acknowledged = True
            await self.ledger_writer.submit_batch(transitions.mark_acknowledged, open_task.task.attempts)
        if phase is TaskPhase.RUNNING:
            open_task.last_running_age_s = age_s
            self._handle_running(open_task, age_s)
            return
        size = len(open_task.task.attempts)
        if phase is TaskPhase.NO_DATA or (phase is TaskPhase.COMPLETED and is_incomplete(reply.body, size)):
            grace = run_state.timeouts.no_data_s
            if phase_age_s < grace:
                is_single = open_task.task.bulk_task_id is None
                wait = grace if is_single and phase is TaskPhase.COMPLETED else NO_DATA_POLL_S
                self._poll_again(open_task, wait, has_grace=True)
                return
        elif open_task.submitted_in_this_run:
            run_state.poll_schedule.record_duration(open_task.last_running_age_s, age_s)
        column_paths = open_task.task.column_paths or self.config.column_paths
        if open_task.task.bulk_task_id is None:
            answer = read_answer(reply, phase, column_paths)
            await self._settle(open_task, [answer], answer.credits)
        else:
            await self._settle(open_task, *run_state.bulk_reader.read(reply, phase, size, column_paths))

    def _handle_running(self, open_task: OpenTask, age_s: float) -> None:
        if open_task.to_be_resubmitted:  # it is not resent then, and the requests that are must not wait for it
            self.run_state.open_tasks -= 1
        else:
            self._poll_again(open_task, self._poll_delay_s(age_s))

    async def _handle_deleted(self, open_task: OpenTask) -> None:
        """Leave a task as it is, though the API has deleted its result."""
        if open_task.written_off and not self.run_state.answers_only:
            await self.ledger_writer.submit_batch(resume.mark_result_deleted, open_task.task.attempts)
        self.run_state.open_tasks -= 1

    async def _settle_superseded(self, open_task: OpenTask, reply: TaskReply, phase: TaskPhase) -> None:
        """Record the cost of a task whose request was sent again in the meantime."""
        run_state = self.run_state
        answer = read_answer(reply, phase, open_task.task.column_paths or self.config.column_paths)
        run_state.open_tasks -= 1
        if phase is not TaskPhase.RUNNING and answer.credits is not None:
            (attempt,) = open_task.task.attempts
            await self.ledger_writer.submit(
                resume.settle_superseded, attempt, answer, run_state.clock.now_ms(), run_state.execution_id
            )
            run_state.counters.spent += answer.credits

    async def _handle_invalid_response(self, open_task: OpenTask, error: InvalidPollResponse) -> None:
        """Poll again over a new connection. After enough such replies, leave the task to the next run."""
        run_state = self.run_state
        open_task.needs_new_connection = True
        if not error.new_connection:
            run_state.record_success()
            self._schedule(open_task, 0.0)  # the reply may belong to an earlier request on this connection
            return
        run_state.record_failure(error)
        now = run_state.clock.monotonic()
        is_foreign = error.task_id is not None and not await self.ledger_writer.submit(
            transitions.has_task, error.task_id
        )
        is_confirmed = is_foreign and open_task.foreign_reply.add(error.raw, now).count >= CONFIRMING_FOREIGN_REPLIES
        if is_confirmed or open_task.unconfirmed_reply.add(error.message, now).is_conclusive(
            now, run_state.timeouts.young_task_s
        ):
            await self._defer_to_next_run(open_task, error, is_foreign=is_foreign)
        elif open_task.written_off and not is_foreign:
            self._skip_written_off(open_task)
        else:
            self._poll_again(open_task, FAILED_POLL_S, has_grace=True)

    async def _defer_to_next_run(self, open_task: OpenTask, error: InvalidPollResponse, *, is_foreign: bool) -> None:
        """Store the API's reply, and leave the task to the next run."""
        run_state = self.run_state
        if open_task.written_off:
            self._skip_written_off(open_task)
        else:
            # The data of another request is not stored here.
            raw = error.raw if is_foreign or error.task_id is None else None
            reason = f"{error.message}, which the ledger does not have" if is_foreign else error.message
            await self.ledger_writer.submit(resume.save_unusable_answer, open_task.task.attempts, reason, raw)
            run_state.open_tasks -= 1
            message = "some responses of the API do not match their tasks: see enrich_error"
            run_state.exit_reasons.setdefault(ExitCode.TIME, EnrichError(message, "the next run polls them again"))
        if is_foreign:
            run_state.counters.unknown_tasks += 1
            if run_state.counters.unknown_tasks >= MAX_UNKNOWN_TASKS:
                message = f"the API answered {run_state.counters.unknown_tasks} polls with unknown tasks"
                run_state.stop(ExitCode.API, EnrichError(message, "check for a proxy, or another client with this key"))

    def _skip_written_off(self, open_task: OpenTask) -> None:
        """Leave a written-off task as it is."""
        self.unpolled_tasks.append(open_task.task)
        self.run_state.open_tasks -= 1

    async def _handle_task_unknown(self, open_task: OpenTask) -> None:
        """Handle a 404: the task is too young to be visible, was never accepted, or has expired."""
        run_state = self.run_state
        now, young_task_s = run_state.clock.monotonic(), run_state.timeouts.young_task_s
        if open_task.written_off and not open_task.to_be_resubmitted:
            run_state.open_tasks -= 1
        elif run_state.answers_only or self.poll_once_more:
            self._poll_again(open_task, FAILED_POLL_S)
        elif not open_task.unconfirmed_reply.add("404", now).is_conclusive(now, young_task_s):
            wait = (
                YOUNG_TASK_POLL_S if self._age_s(open_task) < young_task_s else young_task_s / (CONFIRMING_REPLIES - 1)
            )
            self._schedule(open_task, min(wait, young_task_s / (CONFIRMING_REPLIES - 1)))
        elif open_task.written_off:
            run_state.open_tasks -= 1
        elif open_task.acknowledged:
            reason = "the task disappeared (404) before its result was fetched"
            await self._settle(open_task, [Answer(State.EXPIRED, reason)] * len(open_task.task.attempts), None)
        else:
            reason = "the API returned a task id, and has not found it since (404)"
            now_ms = run_state.clock.now_ms()
            updates = [(attempt, reason, now_ms, None) for attempt in open_task.task.attempts]
            await self.ledger_writer.submit_batch(transitions.mark_in_doubt, updates)
            run_state.open_tasks -= 1

    async def _settle(self, open_task: OpenTask, answers: list[Answer], credits_: int | None) -> None:
        """Store the answers of a task's requests, and count them. `credits_` is the price of the whole task."""
        run_state, task, now_ms = self.run_state, open_task.task, self.run_state.clock.now_ms()
        updates = [(attempt, answer, now_ms) for attempt, answer in zip(task.attempts, answers, strict=True)]
        # A request is sent as often as the step allows that sent it.
        max_attempts = self.config.max_attempts_by_step.get(task.step, self.config.max_attempts)
        execution_id = run_state.execution_id
        if task.bulk_task_id is None:
            states = await self.ledger_writer.submit_batch(transitions.settle, updates, execution_id, max_attempts)
        else:
            states = await self.ledger_writer.submit(
                transitions.settle_bulk_task, updates, execution_id, max_attempts, credits_
            )
        run_state.open_tasks -= 1
        run_state.counters.spent += credits_ or 0
        for state, requests in Counter(states).items():
            if state is not State.PENDING:
                run_state.counters.count_settled(state, requests)

    def _poll_again(self, open_task: OpenTask, seconds: float, *, has_grace: bool = False) -> None:
        """Poll again later, unless the task is older than `patience_s`.

        With `has_grace`, a limited number of polls settles it at any age: the next run would begin with them anew.
        """
        if open_task.written_off:
            self._skip_written_off(open_task)
        elif open_task.is_last_poll or (not has_grace and self._age_s(open_task) > self.config.patience_s):
            reason = EnrichError("tasks are still running at Databar", "the next run collects them first")
            if not self.poll_once_more:
                self.run_state.exit_reasons.setdefault(ExitCode.TIME, reason)
            self.run_state.open_tasks -= 1
        else:
            self._schedule(open_task, 0.0 if self.poll_once_more else seconds)

    def _age_s(self, open_task: OpenTask) -> float:
        """Return a task's age in seconds."""
        return self.run_state.clock.monotonic() - open_task.submitted_at_s

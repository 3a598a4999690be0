"""The state of a run, and the settings of its loops: time-outs, counters, stop events, what the phases found out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import add
from typing import Any

from msgspec import Struct

from enrich.databar.clock import Clock
from enrich.databar.task_results import BulkReader
from enrich.errors import EnrichError, RateLimited
from enrich.exit_codes import ExitCode, first_exit_code
from enrich.job.target import Target
from enrich.models import RequestSelection, State
from enrich.rows.batches import RowCounts
from enrich.run.budget import NO_COST, Budget, Cost
from enrich.run.poll_schedule import PollCost, PollSchedule
from enrich.run.progress import Phase, TrafficRecorder
from enrich.run.rate_limit import AdaptiveRateLimiter, CircuitBreaker, InFlightLimit

#: A 429 to a POST pauses polls, too, for at most this share of `Timeouts.outage_s`.
POLL_PAUSE_SHARE = 0.1
#: Submitting stops after this many polls that were answered with a task that the ledger does not have.
MAX_UNKNOWN_TASKS = 20


class Timeouts(Struct, frozen=True):
    """How long a run waits, in seconds."""

    startup_s: float = 20.0  # for an API that is unreachable at the start
    outage_s: float = 300.0  # for an API that gives no valid answer during the run
    drain_posts_s: float = 8.0  # for POSTs in flight after a signal
    ready_results_s: float = 1.5  # for results that are ready after a signal
    no_data_s: float = 5.0  # until `no_data` counts as no match
    young_task_s: float = 60.0  # until a 404 cannot mean any more that the task is too young to be visible
    post_s: float = 60.0  # for the answer to a POST
    get_s: float = 30.0  # for the answer to a GET


class WorkConfig(Struct, frozen=True):
    """What dispatcher and poller are given, in one process or in each worker of a cluster."""

    target: Target
    #: Names of the params that the job sends. A row may lack one.
    params: frozenset[str]
    #: Has the price to reserve for each request.
    budget: Budget
    #: What the first accepted request binds the ledger to.
    bound_to: Mapping[str, str | None]
    #: Send at most this many requests as one task; None: each request as its own task.
    bulk: int | None
    #: Paths of the job's columns, which decide between found and not found.
    column_paths: tuple[str, ...]
    max_attempts: int
    #: Seconds after which a task is left to the next run.
    patience_s: float
    #: The step of the job; None: it has none.
    step: str | None = None
    #: `max_attempts` of each step of the job, for the tasks that another step has sent.
    max_attempts_by_step: Mapping[str, int] = {}


@dataclass(slots=True)
class RunCounters:
    """Counts of this run; credits in millionths."""

    submitted: int = 0
    unconfirmed: int = 0
    rejected: int = 0
    settled: dict[State, int] = field(default_factory=dict)
    spent: int = 0
    polls: int = 0
    rate_limited: int = 0
    #: Requests that got a task id which the API had returned before for the same request.
    cached: int = 0
    #: Polls that were answered with a task that the ledger does not have.
    unknown_tasks: int = 0

    @property
    def attempted_requests(self) -> int:
        """Number of requests with an outcome: a task, unconfirmed, or that very request rejected."""
        return self.submitted + self.unconfirmed + self.rejected

    @property
    def completed(self) -> int:
        """Number of requests that are complete. An unconfirmed request is complete for this run."""
        return sum(self.settled.values()) + self.unconfirmed

    def __add__(self, other: RunCounters) -> RunCounters:
        """Add the counts of two workers."""
        settled = Counter(self.settled) + Counter(other.settled)
        numbers = (f.name for f in fields(self) if f.name != "settled")
        return RunCounters(settled=settled, **{name: getattr(self, name) + getattr(other, name) for name in numbers})

    def count_settled(self, state: State, requests: int) -> None:
        """Count requests that settled."""
        self.settled[state] = self.settled.get(state, 0) + requests


class Enrolled(Struct, frozen=True):
    """What was enrolled: requests by state, those that were answered before, the expected cost of the others."""

    requests: Counter[State]
    reused: int
    cost: Cost

    def __add__(self, other: Enrolled) -> Enrolled:
        """Add what two steps have enrolled."""
        return Enrolled(self.requests + other.requests, self.reused + other.reused, self.cost + other.cost)


@dataclass(slots=True)
class RunState:
    """All that a run counts, finds out, or is signalled. A worker of a cluster has one of its own.

    Use it in one event loop.
    """

    # Given, for the loops of a run or of a worker.
    execution_id: int
    clock: Clock
    rate_limiter: AdaptiveRateLimiter
    timeouts: Timeouts = field(default_factory=Timeouts)
    in_flight_limit: InFlightLimit = field(default_factory=InFlightLimit)
    #: Whether this process certainly still holds its claims, where several processes share a ledger.
    lease_valid: Callable[[], bool] = lambda: True
    #: Shows a note to the user.
    on_message: Callable[[str], None] = lambda _: None
    #: The key may belong to another workspace: only answers count, and a task that the key cannot see is not lost.
    answers_only: bool = False

    # Counted and learned by dispatcher and poller.
    counters: RunCounters = field(default_factory=RunCounters)
    circuit_breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    poll_schedule: PollSchedule = field(default_factory=PollSchedule)
    bulk_reader: BulkReader = field(default_factory=BulkReader)
    #: The target whose durations the schedule has learned, and the size of its tasks.
    scheduled_target: tuple[Target, int | None] | None = None
    open_tasks: int = 0
    posts_in_flight: int = 0
    #: Nothing is left to submit, unless an open task fails at no charge or frees some of the budget.
    queue_is_empty: bool = False
    #: Monotonic time in seconds since when the API fails; None: it does not.
    failing_since: float | None = None
    #: The last failure of the API.
    _last_failure: EnrichError | None = None
    #: Monotonic times in seconds: POSTs have been refused by 429 since the first, and are not sent before the second.
    _posts_throttled_since: float | None = None
    _posts_paused_until: float = 0.0
    _slot_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _change: asyncio.Event = field(default_factory=asyncio.Event)

    # Signalled: why and how the run ends early.
    #: Exit codes that apply, each with the message for the user.
    exit_reasons: dict[ExitCode, EnrichError] = field(default_factory=dict)
    #: Set: no new POST is sent.
    stop_submitting: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set: nothing more is polled. POSTs in flight are waited for, because they would be unconfirmed if cut off.
    stop_polling: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set: nothing is waited for any more.
    abort: asyncio.Event = field(default_factory=asyncio.Event)
    #: The time for submitting is over (`--max-time`).
    out_of_time: bool = False
    #: Makes the active or last poller poll each open task once and finish.
    finish_polling: Callable[[], None] = lambda: None
    #: Tasks that end the run early.
    early_ends: set[asyncio.Task[None]] = field(default_factory=set)

    # Found out by the phases of the run, not by a worker.
    notes: list[str] = field(default_factory=list)
    phase: Phase = Phase.RESCUE
    traffic: TrafficRecorder = field(default_factory=TrafficRecorder)
    #: How many requests the run completes; None: not known yet.
    total_requests: int | None = None
    #: Which requests of the last enrolled step are sent.
    selection: RequestSelection = field(default_factory=RequestSelection)
    #: The versions of the input's files when the run began to read them.
    file_versions: object = None
    #: The rows that were read last. `left_out` is that of all steps so far.
    read: RowCounts = field(default_factory=RowCounts)
    #: By the name of the step; '' for a job without steps.
    enrolled: dict[str, Enrolled] = field(default_factory=dict)
    requests_to_submit: int = 0
    new_requests: int = 0
    accepted_in_doubt: int = 0
    #: Requests of a new ledger that another ledger in its folder has paid for, which this run pays again.
    paid_in_other_ledgers: int = 0
    #: The user agreed to pay for `paid_in_other_ledgers`.
    pays_again: bool = False
    #: Expected cost of the tasks that were already open.
    open_tasks_cost: Cost = NO_COST
    #: Summary fields of the output, rejects and changes files.
    files_written: dict[str, Any] = field(default_factory=dict)

    def add_note(self, text: str) -> None:
        """Show a note to the user now, and add it to the run summary."""
        self.notes.append(text)
        self.on_message(text)

    @property
    def enrolled_in_all(self) -> Enrolled | None:
        """What all steps have enrolled. None: nothing was enrolled yet."""
        return reduce(add, self.enrolled.values()) if self.enrolled else None

    @property
    def free_capacity(self) -> int:
        """How many more tasks may be open: within the limit, and no more than can be fetched in time."""
        return self.max_open_tasks - self.open_tasks - self.posts_in_flight

    @property
    def max_open_tasks(self) -> int:
        """How many tasks may be open at once."""
        learned = self.poll_schedule
        return self.in_flight_limit.max_open_tasks(
            self.rate_limiter.rate, answers=learned.answers_recorded, age_s=learned.mean_s
        )

    @property
    def poll_cost(self) -> PollCost:
        """The current cost of a poll, given that submits need the same slots."""
        return PollCost.choose(
            rate_is_limiting=self.rate_limiter.is_limiting, free_share=self.free_capacity / self.max_open_tasks
        )

    def stop(self, code: ExitCode, reason: EnrichError) -> None:
        """Send no new POST. Answers to POSTs in flight are still recorded."""
        self.exit_reasons.setdefault(code, reason)
        self.stop_submitting.set()
        self.notify_change()

    def give_up(self, code: ExitCode, reason: EnrichError) -> None:
        """Stop submitting and polling. The loops end when the requests in flight are answered."""
        self.stop_polling.set()
        self.stop(code, reason)

    def abort_now(self) -> None:
        """Stop waiting for anything."""
        self.stop_submitting.set()
        self.stop_polling.set()
        self.abort.set()
        self.notify_change()

    def notify_change(self) -> None:
        """Wake every caller of `wait_for_change`."""
        self._change.set()
        self._change.clear()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until something changes, at most `timeout_s` seconds."""
        await self.pause(timeout_s, self._change)

    async def wait_for_posts(self, timeout_s: float) -> None:
        """Wait until no POST is in flight, at most `timeout_s` seconds."""
        deadline = self.clock.monotonic() + timeout_s
        while self.posts_in_flight and (wait := deadline - self.clock.monotonic()) > 0:
            await self.wait_for_change(wait)

    @staticmethod
    async def pause(seconds: float, event: asyncio.Event) -> None:
        """Sleep for `seconds`, or until the event is set."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()

    async def run_until_abort(self, *loops: Coroutine[Any, Any, None]) -> None:
        """Run the loops side by side until they end or `abort` is set. Raises the first error of a loop."""

        async def run_all() -> None:
            async with asyncio.TaskGroup() as group:
                for loop in loops:
                    group.create_task(loop)

        work = asyncio.create_task(run_all())
        aborted = asyncio.create_task(self.abort.wait())
        try:
            await asyncio.wait([work, aborted], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except BaseExceptionGroup as group:
            raise _first_error(group) from group
        finally:
            aborted.cancel()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def acquire_slots(self, requested: int, stop: asyncio.Event) -> int:
        """Wait until a request may be sent. Returns how many of `requested` may; 0 when `stop` was set first."""
        waiting_since = self.clock.monotonic()
        async with self._slot_lock:
            while not stop.is_set():
                now = self.clock.monotonic()
                granted = 0
                while granted < requested and not self.rate_limiter.delay(now):
                    self.rate_limiter.consume(now, waiting_since)
                    granted += 1
                if granted:
                    return granted
                await self.pause(min(self.rate_limiter.delay(now), self._seconds_until_outage(now)), stop)
            return 0

    def _seconds_until_outage(self, now: float) -> float:
        """Return in how many seconds a pause requested by the API counts as an outage. Gives up when it is one."""
        if self.failing_since is None or self._last_failure is None:
            return self.timeouts.outage_s
        left = self.failing_since + self.timeouts.outage_s - now
        if left <= 0:
            self.give_up(ExitCode.API, self._last_failure)
        return max(left, 0.0)

    def record_success(self) -> None:
        """Record a valid answer of the API."""
        self.failing_since = None
        self.rate_limiter.record_answer(self.clock.monotonic())

    def record_failure(self, error: EnrichError) -> None:
        """Record a failure. After `Timeouts.outage_s` of failures the run gives up with exit code 4."""
        now = self.clock.monotonic()
        self.rate_limiter.record_lost(now)
        self._track_outage(now, error)

    def record_throttled(self, error: RateLimited) -> None:
        """Record a 429. An API that answers nothing but 429 for `Timeouts.outage_s` is an outage, too."""
        now = self.clock.monotonic()
        self.counters.rate_limited += 1
        self.rate_limiter.record_throttled(now, error.retry_after)
        self._track_outage(now, error)

    def record_post_throttled(self, error: RateLimited) -> None:
        """Record a 429 to a POST. POSTs pause for its Retry-After; polls pause for a limited time only.

        `post_pause_s` stops submitting when POSTs are refused for too long.
        """
        now, wait = self.clock.monotonic(), error.retry_after
        poll_pause_s = None if wait is None else min(wait, POLL_PAUSE_SHARE * self.timeouts.outage_s)
        self.record_throttled(RateLimited(error.message, poll_pause_s))
        if wait is not None:
            self._posts_paused_until = max(self._posts_paused_until, now + wait)
        if self._posts_throttled_since is None:
            self._posts_throttled_since = now

    def record_post_accepted(self) -> None:
        """Record that the API accepted a POST."""
        self._posts_throttled_since = None
        self.circuit_breaker.record_success()
        self.record_success()

    def record_post_failed(self, error: EnrichError) -> None:
        """Record a POST without a clear answer, or without any."""
        self.circuit_breaker.record_failure(self.clock.monotonic())
        self.record_failure(error)

    def post_pause_s(self, now: float) -> float | None:
        """Return for how many seconds a 429 pauses POSTs; None: it does not. Stops submitting after an outage."""
        if now >= self._posts_paused_until:
            return None
        since = self._posts_throttled_since
        if since is not None and now - since >= self.timeouts.outage_s and self._last_failure is not None:
            self.stop(ExitCode.API, self._last_failure)
        return self._posts_paused_until - now

    def _track_outage(self, now: float, error: EnrichError) -> None:
        self._last_failure = error
        if self.failing_since is None:
            self.failing_since = now
        if now - self.failing_since >= self.timeouts.outage_s:
            self.give_up(ExitCode.API, error)

    def exit_code(self, conditions: Mapping[ExitCode, bool]) -> ExitCode:
        """Return the exit code of the run. `conditions`: whether each of some further codes applies."""
        return first_exit_code({*self.exit_reasons, *(code for code, holds in conditions.items() if holds)})


def _first_error(error: BaseException) -> BaseException:
    """Return the first error of nested exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

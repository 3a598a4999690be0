"""One execution as its loops see it: may we go on, is there room, how far are we."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from enrich.errors import EXIT_PRECEDENCE, EnrichError, ExitCode, RateLimited
from enrich.models import Clock, State
from enrich.run.circuit_breaker import CircuitBreaker
from enrich.run.poll_schedule import PollCost, PollSchedule
from enrich.run.rate_limit import AdaptiveRateLimiter

#: A 429 to a POST silences the polls, too, for at most this share of the patience with an outage.
POLL_PAUSE_SHARE = 0.1
#: Submitting stops after this number of polls that were answered with a task that the ledger does not have.
MAX_UNKNOWN_TASKS = 20
#: All that is in flight must be fetchable in this share of the time for which the API keeps results.
FETCH_WINDOW_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How patient an execution is, in seconds."""

    startup_s: float = 20.0  # an API that is unreachable at the start
    outage_s: float = 300.0  # … or gives no good answer in the middle
    drain_posts_s: float = 8.0  # POSTs on the wire after a signal
    ready_results_s: float = 1.5  # results that are ready after a signal
    no_data_s: float = 5.0  # until `no_data` counts as a miss
    young_task_s: float = 60.0  # a task that polls 404 may be too young
    post_s: float = 60.0  # an answer to a POST
    get_s: float = 30.0  # an answer to a GET


@dataclass(slots=True)
class RunCounters:
    """What happened in this execution; credits in millionths."""

    submitted: int = 0
    unconfirmed: int = 0
    rejected: int = 0
    settled: dict[State, int] = field(default_factory=dict)
    spent: int = 0
    polls: int = 0
    rate_limited: int = 0
    #: Requests whose task id the API had given before for the same question.
    cached: int = 0
    #: Polls that were answered with a task that the ledger does not have.
    unknown_tasks: int = 0

    @property
    def attempted_requests(self) -> int:
        """How many POSTs came to something: a task, a doubt, or a refusal of that very request."""
        return self.submitted + self.unconfirmed + self.rejected

    def __add__(self, other: RunCounters) -> RunCounters:
        """Add up what happened in two workers."""
        settled = Counter(self.settled) + Counter(other.settled)
        numbers = (f.name for f in fields(self) if f.name != "settled")
        return RunCounters(settled=settled, **{name: getattr(self, name) + getattr(other, name) for name in numbers})

    def count_settled(self, state: State, requests: int = 1) -> None:
        """Count requests that came to their end."""
        self.settled[state] = self.settled.get(state, 0) + requests


@dataclass(slots=True)
class RunState:
    """The state that dispatcher and poller share; lives in one event loop."""

    execution_id: int
    clock: Clock
    rate_limiter: AdaptiveRateLimiter
    timeouts: Timeouts = field(default_factory=Timeouts)
    max_open_tasks: int = 200
    result_ttl_s: float = 86_400.0
    counters: RunCounters = field(default_factory=RunCounters)
    circuit_breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    poll_schedule: PollSchedule = field(default_factory=PollSchedule)
    open_tasks: int = 0
    posts_in_flight: int = 0
    #: Whether what is claimed is surely still ours, where several processes share a ledger.
    lease_valid: Callable[[], bool] = lambda: True
    #: Exit codes that hold, with what to tell the person.
    exit_reasons: dict[ExitCode, EnrichError] = field(default_factory=dict)
    #: No new POST leaves.
    stop_submitting: asyncio.Event = field(default_factory=asyncio.Event)
    #: Nothing more is asked; POSTs on the wire are waited for, as cut off they would be in doubt.
    stop_polling: asyncio.Event = field(default_factory=asyncio.Event)
    #: Nothing is waited for any more.
    abort: asyncio.Event = field(default_factory=asyncio.Event)
    failing_since: float | None = None
    #: What the API said when it last failed.
    _last_failure: EnrichError | None = None
    #: POSTs are refused by 429 since the first time, and are not sent before the second.
    _posts_throttled_since: float | None = None
    _posts_paused_until: float = 0.0
    _slot_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def free_capacity(self) -> int:
        """How many more requests may be at the API: within the limit, and no more than can be fetched in time."""
        fetchable = max(1, int(self.rate_limiter.rate * self.result_ttl_s * FETCH_WINDOW_SHARE))
        return min(self.max_open_tasks, fetchable) - self.open_tasks - self.posts_in_flight

    @property
    def poll_cost(self) -> PollCost:
        """What a poll costs now, while submits want the same slots."""
        return PollCost.choose(
            rate_is_limiting=self.rate_limiter.is_limiting, free_share=self.free_capacity / self.max_open_tasks
        )

    def stop(self, code: ExitCode, reason: EnrichError) -> None:
        """Send no new POST; what is on its way is still written down."""
        self.exit_reasons.setdefault(code, reason)
        self.stop_submitting.set()
        self.notify_change()

    def give_up(self, code: ExitCode, reason: EnrichError) -> None:
        """Ask nothing more; the loops end when the requests on the wire are answered."""
        self.stop_polling.set()
        self.stop(code, reason)

    def abort_now(self) -> None:
        """Wait for nothing any more."""
        self.stop_submitting.set()
        self.stop_polling.set()
        self.abort.set()
        self.notify_change()

    def notify_change(self) -> None:
        """Wake those who wait for a change."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Pause until something changes, at most so many seconds."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await waiter

    async def wait_for_posts(self, timeout_s: float) -> None:
        """Wait until no POST is on the wire, at most so many seconds."""
        deadline = self.clock.monotonic() + timeout_s
        while self.posts_in_flight and (wait := deadline - self.clock.monotonic()) > 0:
            await self.wait_for_change(wait)

    @staticmethod
    async def pause(seconds: float, event: asyncio.Event) -> None:
        """Pause, at most until the event."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()

    async def run_until_abort(self, *loops: Coroutine[Any, Any, None]) -> None:
        """Run the loops side by side to their end, or until the execution leaves; raise what one of them raised."""

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
        """Wait for the moment when a request may leave; tell how many of `wanted` may, 0 when `stop` came first."""
        async with self._slot_lock:
            while not stop.is_set():
                self.rate_limiter.announce_demand(requested)
                now = self.clock.monotonic()
                granted = 0
                while granted < requested and not self.rate_limiter.delay(now):
                    self.rate_limiter.consume(now)
                    granted += 1
                if granted:
                    return granted
                await self.pause(min(self.rate_limiter.delay(now), self._seconds_until_outage(now)), stop)
            return 0

    def _seconds_until_outage(self, now: float) -> float:
        """Tell in how many seconds a silence that the API has asked for is an outage; give up when it is."""
        if self.failing_since is None or self._last_failure is None:
            return self.timeouts.outage_s
        left = self.failing_since + self.timeouts.outage_s - now
        if left <= 0:
            self.give_up(ExitCode.API, self._last_failure)
        return max(left, 0.0)

    def record_success(self) -> None:
        """Hear that the API answered sensibly."""
        self.failing_since = None
        self.rate_limiter.record_answer(self.clock.monotonic())

    def record_failure(self, error: EnrichError) -> None:
        """Hear that it did not; after a long outage the execution gives up with exit 4."""
        now = self.clock.monotonic()
        self.rate_limiter.record_lost(now)
        self._track_outage(now, error)

    def record_throttled(self, error: RateLimited) -> None:
        """Hear a 429; an API that says nothing else for long is an outage, too."""
        now = self.clock.monotonic()
        self.counters.rate_limited += 1
        self.rate_limiter.record_throttled(now, error.retry_after)
        self._track_outage(now, error)

    def record_post_throttled(self, error: RateLimited) -> None:
        """Take in a 429 to a POST: POSTs wait as long as it says, polls at most a while; then stop submitting."""
        now, wait = self.clock.monotonic(), error.retry_after
        poll_pause_s = None if wait is None else min(wait, POLL_PAUSE_SHARE * self.timeouts.outage_s)
        self.record_throttled(RateLimited(error.message, poll_pause_s))
        if wait is not None:
            self._posts_paused_until = max(self._posts_paused_until, now + wait)
        if self._posts_throttled_since is None:
            self._posts_throttled_since = now

    def record_post_accepted(self) -> None:
        """Take in that a POST was accepted."""
        self._posts_throttled_since = None

    def post_pause_s(self, now: float) -> float | None:
        """Tell for how many seconds POSTs wait because of a 429; None: they don't. Stops submitting after an outage."""
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
        """Choose the exit code: of those that hold, the first in the order of the contract."""
        applicable = set(self.exit_reasons) | {code for code, holds in conditions.items() if holds}
        return next((code for code in EXIT_PRECEDENCE if code in applicable), ExitCode.OK)


def _first_error(error: BaseException) -> BaseException:
    """Take the first error out of its groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

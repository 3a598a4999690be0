"""One execution as its loops see it: may we go on, is there room, how far are we."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from enrich.breaker import Breaker
from enrich.errors import PRECEDENCE, EnrichError, Exit, RateLimited
from enrich.model import Clock, State
from enrich.pace import Pace
from enrich.polls import PollTimes, Price

#: A 429 to a POST silences the polls, too, for at most this share of the patience with an outage.
POLLS_SILENT = 0.1
#: Submitting stops after this number of polls that were answered with a task that the ledger does not have.
MOST_UNKNOWN_TASKS = 20
#: All that is in flight must be fetchable in this share of the time for which the API keeps results.
FETCHED_IN = 0.25


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient an execution is, in seconds."""

    start_s: float = 20.0  # an API that is unreachable at the start
    outage_s: float = 300.0  # … or gives no good answer in the middle
    wire_s: float = 8.0  # POSTs on the wire after a signal
    ready_s: float = 1.5  # results that are ready after a signal
    no_data_s: float = 5.0  # until `no_data` counts as a miss
    young_s: float = 60.0  # a task that polls 404 may be too young
    post_s: float = 60.0  # an answer to a POST
    get_s: float = 30.0  # an answer to a GET


@dataclass(slots=True)
class Tally:
    """What happened in this execution; credits in millionths."""

    submitted: int = 0
    doubtful: int = 0
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
    def asked(self) -> int:
        """How many POSTs came to something: a task, a doubt, or a refusal of that very request."""
        return self.submitted + self.doubtful + self.rejected

    def __add__(self, other: Tally) -> Tally:
        """Add up what happened in two workers."""
        settled = Counter(self.settled) + Counter(other.settled)
        numbers = (f.name for f in fields(self) if f.name != "settled")
        return Tally(settled=settled, **{name: getattr(self, name) + getattr(other, name) for name in numbers})

    def count(self, state: State, requests: int = 1) -> None:
        """Count requests that came to their end."""
        self.settled[state] = self.settled.get(state, 0) + requests


@dataclass(slots=True)
class Execution:
    """The state that dispatcher and poller share; lives in one event loop."""

    id: int
    clock: Clock
    pace: Pace
    timing: Timing = field(default_factory=Timing)
    in_flight_limit: int = 200
    result_ttl_s: float = 86_400.0
    tally: Tally = field(default_factory=Tally)
    breaker: Breaker = field(default_factory=Breaker)
    poll_times: PollTimes = field(default_factory=PollTimes)
    in_flight: int = 0
    on_the_wire: int = 0
    #: Whether what is claimed is surely still ours, where several processes share a ledger.
    holds: Callable[[], bool] = lambda: True
    #: Exit codes that hold, with what to tell the person.
    reasons: dict[Exit, EnrichError] = field(default_factory=dict)
    #: No new POST leaves.
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    #: Nothing more is asked; POSTs on the wire are waited for, as cut off they would be in doubt.
    giving_up: asyncio.Event = field(default_factory=asyncio.Event)
    #: Nothing is waited for any more.
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    failing_since: float | None = None
    #: What the API said when it last failed.
    _failure: EnrichError | None = None
    #: POSTs are refused by 429 since the first time, and are not sent before the second.
    _posts_refused_since: float | None = None
    _posts_paused_until: float = 0.0
    _gate: asyncio.Lock = field(default_factory=asyncio.Lock)
    _waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def room(self) -> int:
        """How many more requests may be at the API: within the limit, and no more than can be fetched in time."""
        fetchable = max(1, int(self.pace.rate * self.result_ttl_s * FETCHED_IN))
        return min(self.in_flight_limit, fetchable) - self.in_flight - self.on_the_wire

    @property
    def poll_price(self) -> Price:
        """What a poll costs now, while submits want the same slots."""
        return Price.of(scarce=self.pace.scarce, room=self.room / self.in_flight_limit)

    def stop(self, code: Exit, reason: EnrichError) -> None:
        """Send no new POST; what is on its way is still written down."""
        self.reasons.setdefault(code, reason)
        self.closing.set()
        self.notify()

    def give_up(self, code: Exit, reason: EnrichError) -> None:
        """Ask nothing more; the loops end when the requests on the wire are answered."""
        self.giving_up.set()
        self.stop(code, reason)

    def leave(self) -> None:
        """Wait for nothing any more."""
        self.closing.set()
        self.giving_up.set()
        self.leaving.set()
        self.notify()

    def notify(self) -> None:
        """Wake those who wait for a change."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_change(self, at_most: float) -> None:
        """Pause until something changes, at most so many seconds."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most):
                await waiter

    async def wire_empty(self, at_most: float) -> None:
        """Wait until no POST is on the wire, at most so many seconds."""
        latest = self.clock.monotonic() + at_most
        while self.on_the_wire and (wait := latest - self.clock.monotonic()) > 0:
            await self.wait_change(wait)

    @staticmethod
    async def pause(seconds: float, event: asyncio.Event) -> None:
        """Pause, at most until the event."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()

    async def until_leaving(self, *loops: Coroutine[Any, Any, None]) -> None:
        """Run the loops side by side to their end, or until the execution leaves; raise what one of them raised."""

        async def together() -> None:
            async with asyncio.TaskGroup() as group:
                for loop in loops:
                    group.create_task(loop)

        work = asyncio.create_task(together())
        left = asyncio.create_task(self.leaving.wait())
        try:
            await asyncio.wait([work, left], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            left.cancel()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def rate_slots(self, wanted: int, stop: asyncio.Event) -> int:
        """Wait for the moment when a request may leave; tell how many of `wanted` may, 0 when `stop` came first."""
        async with self._gate:
            while not stop.is_set():
                self.pace.expect(wanted)
                now = self.clock.monotonic()
                granted = 0
                while granted < wanted and not self.pace.delay(now):
                    self.pace.take(now)
                    granted += 1
                if granted:
                    return granted
                await self.pause(min(self.pace.delay(now), self._until_outage(now)), stop)
            return 0

    def _until_outage(self, now: float) -> float:
        """Tell in how many seconds a silence that the API has asked for is an outage; give up when it is."""
        if self.failing_since is None or self._failure is None:
            return self.timing.outage_s
        left = self.failing_since + self.timing.outage_s - now
        if left <= 0:
            self.give_up(Exit.API, self._failure)
        return max(left, 0.0)

    def good_answer(self) -> None:
        """Hear that the API answered sensibly."""
        self.failing_since = None
        self.pace.answered(self.clock.monotonic())

    def bad_answer(self, error: EnrichError) -> None:
        """Hear that it did not; after a long outage the execution gives up with exit 4."""
        now = self.clock.monotonic()
        self.pace.lost(now)
        self._failing(now, error)

    def throttle(self, error: RateLimited) -> None:
        """Hear a 429; an API that says nothing else for long is an outage, too."""
        now = self.clock.monotonic()
        self.tally.rate_limited += 1
        self.pace.throttled(now, error.retry_after)
        self._failing(now, error)

    def throttle_posts(self, error: RateLimited) -> None:
        """Take in a 429 to a POST: POSTs wait as long as it says, polls at most a while; then stop submitting."""
        now, wait = self.clock.monotonic(), error.retry_after
        silent = None if wait is None else min(wait, POLLS_SILENT * self.timing.outage_s)
        self.throttle(RateLimited(error.message, silent))
        if wait is not None:
            self._posts_paused_until = max(self._posts_paused_until, now + wait)
        if self._posts_refused_since is None:
            self._posts_refused_since = now

    def post_accepted(self) -> None:
        """Take in that a POST was accepted."""
        self._posts_refused_since = None

    def posts_paused(self, now: float) -> float | None:
        """Tell for how many seconds POSTs wait because of a 429; None: they don't. Stops submitting after an outage."""
        if now >= self._posts_paused_until:
            return None
        since = self._posts_refused_since
        if since is not None and now - since >= self.timing.outage_s and self._failure is not None:
            self.stop(Exit.API, self._failure)
        return self._posts_paused_until - now

    def _failing(self, now: float, error: EnrichError) -> None:
        self._failure = error
        if self.failing_since is None:
            self.failing_since = now
        if now - self.failing_since >= self.timing.outage_s:
            self.give_up(Exit.API, error)

    def exit_code(self, also: Mapping[Exit, bool]) -> Exit:
        """Choose the exit code: of those that hold, the first in the order of the contract."""
        held = set(self.reasons) | {code for code, holds in also.items() if holds}
        return next((code for code in PRECEDENCE if code in held), Exit.OK)


def _first(error: BaseException) -> BaseException:
    """Take the first error out of its groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

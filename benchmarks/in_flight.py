"""How fast a run posts and polls where each answer takes seconds, and `in_flight` is left out.

`python -m benchmarks.in_flight` runs the program's dispatcher and poller on a virtual clock, against an API with a
token bucket of 10, so the numbers are the same on every machine. `posting` is the time from the first POST to the last,
as a multiple of the time that the allowance takes for all requests made. `used` is the share of the allowance that was
accepted in that time, `tail` the time from the end of the last task to the end of the loops. On a busy machine, the
process does not run for 40 ms on average about once a second, and a commit takes 10 ms on average. `--real` also runs
the program over loopback, where tasks take lognormal(4 s, 0.6), about a minute for each rate.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import selectors
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any, cast

import click

from benchmarks.allowance import TokenBucket, measure_real_run, steady_rate
from benchmarks.polls import LATENCIES, Latency
from enrich.databar.client import Client
from enrich.databar.clock import SystemClock
from enrich.databar.task_results import TaskReply
from enrich.errors import RateLimited
from enrich.job.target import Target, TargetKind
from enrich.ledger import transitions
from enrich.ledger.writer import LedgerWriter
from enrich.models import Acceptance, ClaimedRequest, State
from enrich.run.budget import NO_BUDGET
from enrich.run.dispatcher import submit_and_poll
from enrich.run.poller import Poller
from enrich.run.rate_limit import AdaptiveRateLimiter, InFlightLimit
from enrich.run.run_state import RunState, WorkConfig

TABLE = ("constant 4 s", "lognormal(4 s, 0.6)", "2 s or 12 s", "Pareto(1.5) from 1.5 s")
RATES = (50.0, 100.0, 500.0)
#: Seconds of a request on its way to the API, and of the answer on its way back.
ONE_WAY_S = 0.01
#: The most by which a timer is late, in seconds.
MAX_TIMER_DELAY_S = 0.002
#: On a busy machine: how often the process does not run for a while, how long on average, and the same of a commit.
STALL_EVERY_S, STALL_S, COMMIT_S = 1.0, 0.04, 0.01
BURST = 10
CONFIG = WorkConfig(
    Target(TargetKind.WATERFALL, "email_getter", (833,)),
    frozenset(),
    NO_BUDGET,
    {},
    None,
    ("email",),
    max_attempts=1,
    patience_s=3600.0,
)
RUNNING = TaskReply({"status": "processing"}, "{}")
DONE = TaskReply({"status": "completed", "data": [{"email": "ada@engine.example"}], "credits_spent": 1}, "{}")


class _IdleSelector(selectors.BaseSelector):
    """Skips the waits of an event loop: each lasts as long as it should, but only on the loop's own clock.

    With `stalls`, now and then a wait lasts longer, as on a busy machine.
    """

    def __init__(self, *, stalls: bool) -> None:
        self.now = 0.0
        self._next_stall = STALL_EVERY_S if stalls else inf
        self._real = selectors.DefaultSelector()
        self._rng = random.Random(1)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Advance the clock instead of waiting."""
        if timeout:
            self.now += timeout + self._rng.random() * MAX_TIMER_DELAY_S
        if self.now > self._next_stall:
            self.now += self._rng.expovariate(1 / STALL_S)
            self._next_stall = self.now + self._rng.expovariate(1 / STALL_EVERY_S)
        return []

    def register(self, *args: Any) -> selectors.SelectorKey:
        """Register a file, for the event loop's own pipe."""
        return self._real.register(*args)

    def unregister(self, *args: Any) -> selectors.SelectorKey:
        """Forget a file."""
        return self._real.unregister(*args)

    def get_map(self) -> Any:
        """Return the registered files."""
        return self._real.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a virtual clock. It runs coroutines that wait for timers and for each other, and do no I/O."""

    def __init__(self, *, stalls: bool = False) -> None:
        self._idle_selector = _IdleSelector(stalls=stalls)
        super().__init__(self._idle_selector)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._idle_selector.now


@dataclass(slots=True)
class VirtualClock(SystemClock):
    """The program's clock on a virtual loop."""

    def monotonic(self) -> float:
        """Return the virtual time in seconds."""
        return asyncio.get_running_loop().time()

    def _local_ms(self) -> int:
        return int(self.monotonic() * 1000)


@dataclass(slots=True)
class FakeApi:
    """Stands in for the client: an API with a rate limit, whose tasks take as long as `latency` says."""

    bucket: TokenBucket
    latency: Latency
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    #: When each task is done, by its id.
    done_at: list[float] = field(default_factory=list)
    post_times: list[float] = field(default_factory=list)
    accepted_times: list[float] = field(default_factory=list)
    polls: int = 0
    refused: int = 0

    @property
    def requests(self) -> int:
        """All requests, with those that were refused."""
        return len(self.accepted_times) + self.refused

    async def submit(self, *_: object) -> str:
        """Accept a request as a new task. Raises RateLimited."""
        self.post_times.append(asyncio.get_running_loop().time())
        now = await self._arrive()
        task_id = str(len(self.done_at))
        self.done_at.append(now + self.latency(self.rng))
        await asyncio.sleep(ONE_WAY_S)
        return task_id

    async def poll_task(self, task_id: str, **_: object) -> TaskReply:
        """Answer a poll. Raises RateLimited."""
        self.polls += 1
        now = await self._arrive()
        await asyncio.sleep(ONE_WAY_S)
        return DONE if now >= self.done_at[int(task_id)] else RUNNING

    async def _arrive(self) -> float:
        await asyncio.sleep(ONE_WAY_S)
        now = asyncio.get_running_loop().time()
        if not self.bucket.accepts(now):
            self.refused += 1
            await asyncio.sleep(ONE_WAY_S)
            raise RateLimited("too many requests", None)
        self.accepted_times.append(now)
        return now


@dataclass(slots=True)
class QueueInMemory:
    """Stands in for the ledger writer: a queue of `rows` requests, and no disk."""

    rows: int
    #: Mean seconds of a commit.
    commit_s: float = 0.0
    _rng: random.Random = field(default_factory=lambda: random.Random(1))
    _claimed: int = 0
    _refused: list[int] = field(default_factory=list)

    async def submit(self, function: Callable[..., Any], *args: Any, **_: object) -> Any:
        """Run an operation: a claim."""
        await self._commit()
        if function.__name__ != "_claim_posts":
            return None
        taken = [heapq.heappop(self._refused) for _ in range(min(args[0], len(self._refused)))]
        new = range(self._claimed, min(self._claimed + args[0] - len(taken), self.rows))
        self._claimed += len(new)
        return [[ClaimedRequest(attempt, "{}")] for attempt in [*taken, *new]], False, False

    async def submit_batch(self, function: Callable[..., Any], items: Sequence[Any], *_: object) -> Any:
        """Run an operation on several requests."""
        await self._commit()
        if function is transitions.record_refused:
            for attempt, *_ in items:
                heapq.heappush(self._refused, attempt)
        return {
            transitions.record_accepted: [Acceptance.NEW] * len(items),
            transitions.settle: [State.FOUND] * len(items),
        }.get(function)

    async def _commit(self) -> None:
        if self.commit_s:
            await asyncio.sleep(self._rng.expovariate(1 / self.commit_s))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did."""

    posting_s: float
    requests: int
    polls_per_row: float
    used_share: float
    refused_share: float
    tail_s: float
    max_open: int

    def posting_ratio(self, rate: float) -> float:
        """Return the posting time as a multiple of the time that `rate` takes for all requests."""
        return self.posting_s / (self.requests / rate)


def simulate(
    rate: float,
    rows: int,
    latency: Latency,
    *,
    in_flight: int | None = None,
    workers: int = 1,
    stalls: bool = False,
) -> Outcome:
    """Run dispatcher and poller until all rows are answered, as `workers` workers that share the queue.

    `stalls`: on a busy machine, where the process now and then does not run for a while, and commits take longer.
    """
    with asyncio.Runner(loop_factory=partial(VirtualLoop, stalls=stalls)) as runner:
        return runner.run(_simulate(rate, QueueInMemory(rows, COMMIT_S * stalls), latency, in_flight, workers))


async def _simulate(
    rate: float, queue: QueueInMemory, latency: Latency, in_flight: int | None, workers: int
) -> Outcome:
    api, rows = FakeApi(TokenBucket(steady_rate(rate), BURST), latency), queue.rows
    states = [
        RunState(1, VirtualClock(), AdaptiveRateLimiter(None), in_flight_limit=InFlightLimit(in_flight, workers))
        for _ in range(workers)
    ]
    max_open = 0

    async def watch() -> None:
        nonlocal max_open
        while True:
            max_open = max(max_open, sum(state.open_tasks + state.posts_in_flight for state in states))
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    pollers = [Poller(state, cast("LedgerWriter", queue), cast("Client", api), CONFIG) for state in states]
    await asyncio.gather(*map(submit_and_poll, pollers))
    watching.cancel()
    first, last = api.post_times[0], api.post_times[-1]
    posting_s = last - first
    return Outcome(
        posting_s=posting_s,
        requests=api.requests,
        polls_per_row=api.polls / rows,
        used_share=sum(first <= at <= last for at in api.accepted_times) / max(1.0, posting_s * rate),
        refused_share=api.refused / api.requests,
        tail_s=asyncio.get_running_loop().time() - max(api.done_at),
        max_open=max_open,
    )


@click.command()
@click.option("--rows", default=20, show_default=True, help="Rows of each run, per request a second that is allowed.")
@click.option("--in-flight", type=int, help="Tasks that may be open at once; else it is found.")
@click.option("--real", "for_real", is_flag=True, help="Run the program against a server, too.")
def main(rows: int, in_flight: int | None, *, for_real: bool) -> None:
    """Print posting time, polls, use of the allowance, 429s and the tail, by latency and rate."""
    print(f"{'':23} {'rate':>6} {'rows':>7} {'posting':>8} {'polls':>6} {'used':>7} {'429':>6} {'tail':>7} {'open':>7}")
    for name, stalls in [*((name, False) for name in TABLE), (TABLE[1], True)]:
        for rate in RATES:
            count = int(rows * rate)
            seen = simulate(rate, count, LATENCIES[name], in_flight=in_flight, stalls=stalls)
            label = "lognormal, busy machine" if stalls else name
            print(
                f"{label:23} {rate:>4.0f}/s {count:>7,} {seen.posting_ratio(rate):>8.2f} {seen.polls_per_row:>6.2f} "
                f"{seen.used_share:>7.1%} {seen.refused_share:>6.2%} {seen.tail_s:>5.1f} s {seen.max_open:>7,}",
                flush=True,
            )
    if for_real:
        for rate in RATES:
            measure_real_run(rate, int(rows * rate), latency="lognormal(4,0.6)")


if __name__ == "__main__":
    main()

"""How much of an unpublished rate limit `enrich` uses, and how many requests get a 429.

`python -m benchmarks.allowance` simulates the rate limiter against several kinds of servers on a virtual clock, so the
numbers are the same on every machine. `--real` also runs the program over loopback, almost a minute for each rate.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import click

from benchmarks.leads import write_job
from benchmarks.server import start_server
from enrich.run.rate_limit import AdaptiveRateLimiter

#: Returns the allowed (or sent) requests per second at a time.
RateAt = Callable[[float], float]


class Server(Protocol):
    """A server with a rate limit."""

    def accepts(self, now: float) -> bool:
        """Return True when it accepts one more request now, False for a 429."""


class TokenBucket:
    """A token bucket: `allowed` requests per second, `burst` (at least 1) at once."""

    def __init__(self, allowed: RateAt, burst: float) -> None:
        self._allowed, self._burst = allowed, burst
        self._tokens, self._at = burst, 0.0

    def accepts(self, now: float) -> bool:
        """Return True when it accepts one more request now, False for a 429."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._allowed(now))
        self._at = now
        if self._tokens < 1 - 1e-9:
            return False
        self._tokens -= 1
        return True


class FixedWindow:
    """Allows `allowed` requests in each second of the server's clock, and none after that until the next second."""

    def __init__(self, allowed: RateAt) -> None:
        self._allowed = allowed
        self._second, self._used = -1, 0

    def accepts(self, now: float) -> bool:
        """Return True when it accepts one more request now, False for a 429."""
        if int(now) != self._second:
            self._second, self._used = int(now), 0
        if self._used >= self._allowed(now):
            return False
        self._used += 1
        return True


class SlidingWindow:
    """Allows `allowed` requests in any one second."""

    def __init__(self, allowed: RateAt) -> None:
        self._allowed = allowed
        self._taken: deque[float] = deque()

    def accepts(self, now: float) -> bool:
        """Return True when it accepts one more request now, False for a 429."""
        while self._taken and self._taken[0] <= now - 1:
            self._taken.popleft()
        if len(self._taken) >= self._allowed(now):
            return False
        self._taken.append(now)
        return True


SERVERS: dict[str, Callable[[RateAt], Server]] = {
    "bucket of 10": lambda allowed: TokenBucket(allowed, 10),
    "bucket of 1": lambda allowed: TokenBucket(allowed, 1),
    "fixed window": FixedWindow,
    "sliding window": SlidingWindow,
}


RATES = (20.0, 100.0, 500.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a scenario: requests accepted and refused, and how many could have been accepted.

    `sent_too_early`: requests sent before a Retry-After was over.
    """

    accepted: int
    refused: int
    possible: float
    sent_too_early: int

    @property
    def used_share(self) -> float:
        """Accepted requests as a share of the limit."""
        return self.accepted / self.possible

    @property
    def refused_share(self) -> float:
        """Share of the requests that got a 429."""
        return self.refused / (self.accepted + self.refused)


@dataclass(frozen=True, slots=True)
class Scenario:
    """The conditions of one simulation; times in seconds.

    `other_rate`: requests per second of another client. `max_timer_delay_s`: how late a timer fires at most.
    `max_in_flight`: how many requests can be open at once. `ceiling`: the limiter's own limit, requests per second.
    """

    allowed: RateAt
    server: Callable[[RateAt], Server]
    latency_s: float = 0.1
    retry_after: float | None = None
    duration_s: float = 60.0
    other_rate: RateAt = lambda _: 0.0
    max_timer_delay_s: float = 0.002
    max_in_flight: int = 64
    ceiling: float | None = None


def simulate(scenario: Scenario) -> Outcome:
    """Send as many requests as the rate limiter allows until the scenario ends."""
    rng = random.Random(1)
    limiter, server, others = (
        AdaptiveRateLimiter(scenario.ceiling),
        scenario.server(scenario.allowed),
        OtherClient(scenario.other_rate),
    )
    answers: list[tuple[float, int, bool]] = []
    accepted = refused = silent = 0
    now = wake = quiet_until = 0.0
    while now < scenario.duration_s:
        if answers and (len(answers) >= scenario.max_in_flight or answers[0][0] <= wake):
            now, _, was_accepted = heapq.heappop(answers)
            if was_accepted:
                limiter.record_answer(now)
            else:
                limiter.record_throttled(now, scenario.retry_after)
                quiet_until = max(quiet_until, now + (scenario.retry_after or 0.0))
            wake = max(wake, now)
            continue
        now = max(now, wake)
        if wait := limiter.delay(now):
            wake = now + wait + rng.random() * scenario.max_timer_delay_s
            continue
        arrives = now + scenario.latency_s / 2
        others.send(server, arrives)
        limiter.consume(now)
        silent += now < quiet_until
        was_accepted = server.accepts(arrives)
        accepted += was_accepted
        refused += not was_accepted
        heapq.heappush(
            answers, (now + scenario.latency_s * (0.9 + 0.2 * rng.random()), accepted + refused, was_accepted)
        )
    moments = [second / 10 for second in range(int(scenario.duration_s * 10))]
    free = (
        sum(
            min(scenario.allowed(at) - scenario.other_rate(at), scenario.max_in_flight / scenario.latency_s)
            for at in moments
        )
        / 10
    )
    return Outcome(accepted, refused, free + others.refused, silent)


@dataclass(slots=True)
class OtherClient:
    """Another client of the same account: sends at its rate, whatever the responses."""

    rate: RateAt
    refused: int = 0
    next_at: float = 0.0

    def send(self, server: Server, until: float) -> None:
        """Send the requests that are due."""
        while self.next_at <= until:
            rate = self.rate(self.next_at)
            self.refused += bool(rate) and not server.accepts(self.next_at)
            self.next_at += 1 / rate if rate else 0.1


def steady_rate(rate: float) -> RateAt:
    """Return a constant rate."""
    return lambda _: rate


def changing_rate(first: float, then: float, at: float) -> RateAt:
    """Return a rate that changes from `first` to `then` at a time."""
    return lambda now: first if now < at else then


def rate_between(rate: float, start: float, end: float) -> RateAt:
    """Return a rate that applies from `start` to `end`, and is 0 otherwise."""
    return lambda now: rate if start <= now < end else 0.0


def scenarios(rate: float) -> dict[str, Callable[[Callable[[RateAt], Server]], Scenario]]:
    """Return the scenarios of the table for one rate, by name."""
    return {
        "steady, 60 s": lambda server: Scenario(steady_rate(rate), server),
        "steady, Retry-After 1 s": lambda server: Scenario(steady_rate(rate), server, retry_after=1.0),
        "halved after 60 of 120 s": lambda server: Scenario(changing_rate(rate, rate / 2, 60), server, duration_s=120),
        "doubled after 60 of 120 s": lambda server: Scenario(changing_rate(rate, rate * 2, 60), server, duration_s=120),
        "half taken from 60 to 120 of 180 s": lambda server: Scenario(
            steady_rate(rate), server, duration_s=180, other_rate=rate_between(rate / 2, 60, 120)
        ),
    }


def measure_real_run(rate: float, rows: int, *, retry_after: int | None = None, latency: str = "0") -> None:
    """Run the program against a server that allows `rate` requests per second, and print the result.

    The measured time is from the first POST to the last one, because the start and the wait for the last answers
    don't use the limit.
    """
    options = ["--rate", str(rate), "--latency", latency, *(["--retry-after", str(retry_after)] if retry_after else [])]
    with tempfile.TemporaryDirectory(prefix="allowance-") as name, start_server(*options) as server:
        job = write_job(Path(name), rows)
        text = job.read_text(encoding="utf-8")
        job.write_text(text.replace("100000 # no limit of ours", "null"), encoding="utf-8")
        command = [sys.executable, "-m", "enrich", "run", str(job), "--yes", "--json"]
        samples = [(0.0, 0, 0)]
        with subprocess.Popen(command, env=os.environ | server.environ, stdout=subprocess.PIPE) as running:
            while running.poll() is None:
                counts = server.counts()
                posts = sum(counts.get("run", {}).values())
                if posts > samples[-1][1] or (posts and not samples[-1][1]):
                    accepted = sum(by_status.get("200", 0) for by_status in counts.values())
                    samples.append((time.monotonic(), posts, accepted))
                time.sleep(0.2)
            assert running.stdout is not None
            summary = json.load(running.stdout)
        tail_s = server.idle_s()
        counts = server.counts()
    (begun, _, before), (ended, _, after) = samples[1], samples[-1]
    requests = sum(sum(by_status.values()) for by_status in counts.values())
    refused = sum(by_status.get("429", 0) for by_status in counts.values()) / requests
    print(
        f"{rate:>4.0f}/s for real, Retry-After {retry_after or '-'}: {rows:,} rows in {summary['elapsed_s']:.1f} s, "
        f"{summary['polls'] / rows:.2f} polls a row, {(after - before) / (ended - begun) / rate:.1%} used, "
        f"posting {(ended - begun) / (requests / rate):.2f}, {refused:.2%} answered 429, tail {tail_s:.1f} s",
        flush=True,
    )


@click.command()
@click.option("--latency", default=0.1, show_default=True, help="Seconds until a request is answered.")
@click.option("--late", default=0.002, show_default=True, help="Seconds that a timer is late at most.")
@click.option("--real", "for_real", is_flag=True, help="Run the program against a server, too.")
def main(latency: float, late: float, *, for_real: bool) -> None:
    """Print the share of the allowance that is used, and of the requests that are answered 429."""
    print(f"{'':38}" + "".join(f"{name:^16}" for name in SERVERS))
    for rate in RATES:
        for name, make_scenario in scenarios(rate).items():
            cells = []
            for server in SERVERS.values():
                outcome = simulate(replace(make_scenario(server), latency_s=latency, max_timer_delay_s=late))
                cells.append(f"{outcome.used_share:>7.1%} {outcome.refused_share:>6.2%}  ")
            print(f"{rate:>4.0f}/s {name:32}" + "".join(cells))
    if for_real:
        for rate in RATES:
            for retry_after in (None, 1):
                measure_real_run(rate, int(rate * 20), retry_after=retry_after)


if __name__ == "__main__":
    main()

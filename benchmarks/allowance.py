"""How much of an allowance that nobody told is used, and how many requests are answered 429.

`python -m benchmarks.allowance` plays the program's pace against servers of several kinds on a virtual clock: the
same numbers on every machine.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import click

from enrich.pace import Pace

#: Requests a second at some moment.
Allowed = Callable[[float], float]


class Server(Protocol):
    """Says yes or 429."""

    def take(self, now: float) -> bool:
        """Say whether one more request is allowed now."""


class Bucket:
    """A token bucket: `allowed` a second, `burst` at once; at least one."""

    def __init__(self, allowed: Allowed, burst: float) -> None:
        self._allowed, self._burst = allowed, burst
        self._tokens, self._at = burst, 0.0

    def take(self, now: float) -> bool:
        """Say whether one more request is allowed now."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._allowed(now))
        self._at = now
        if self._tokens < 1 - 1e-9:
            return False
        self._tokens -= 1
        return True


class FixedWindow:
    """So many in each second of the server's clock, and when they are used up none until the next second."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._second, self._used = -1, 0

    def take(self, now: float) -> bool:
        """Say whether one more request is allowed now."""
        if int(now) != self._second:
            self._second, self._used = int(now), 0
        if self._used >= self._allowed(now):
            return False
        self._used += 1
        return True


class SlidingWindow:
    """So many in any second."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._taken: deque[float] = deque()

    def take(self, now: float) -> bool:
        """Say whether one more request is allowed now."""
        while self._taken and self._taken[0] <= now - 1:
            self._taken.popleft()
        if len(self._taken) >= self._allowed(now):
            return False
        self._taken.append(now)
        return True


SERVERS: dict[str, Callable[[Allowed], Server]] = {
    "bucket of 10": lambda allowed: Bucket(allowed, 10),
    "bucket of 1": lambda allowed: Bucket(allowed, 1),
    "fixed window": FixedWindow,
    "sliding window": SlidingWindow,
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a night: requests accepted and refused, and how many could have been accepted."""

    accepted: int
    refused: int
    possible: float

    @property
    def used(self) -> float:
        """The share of the allowance that was used."""
        return self.accepted / self.possible

    @property
    def refused_share(self) -> float:
        """The share of the requests that was answered 429."""
        return self.refused / (self.accepted + self.refused)


@dataclass(frozen=True, slots=True)
class Night:
    """What a pace is played against; times in seconds.

    `others`: requests a second that somebody else sends. `late`: how late a timer is at most. `wire`: how many
    requests can be on the wire.
    """

    allowed: Allowed
    server: Callable[[Allowed], Server]
    latency_s: float = 0.1
    retry_after: float | None = None
    seconds: float = 60.0
    others: Allowed = lambda _: 0.0
    late: float = 0.002
    wire: int = 64
    ceiling: float | None = None


def play(night: Night) -> Seen:
    """Send as much as the pace allows, all night."""
    chance = random.Random(1)
    pace, server, now = Pace(night.ceiling), night.server(night.allowed), 0.0
    answers: list[tuple[float, int, bool]] = []
    count, theirs = [0, 0], 0
    next_of_others = 0.0
    wake = 0.0
    while now < night.seconds:
        full = len(answers) >= night.wire
        if answers and (full or answers[0][0] <= wake):
            now, _, good = heapq.heappop(answers)
            if good:
                pace.answered(now)
            else:
                pace.throttled(now, night.retry_after)
            wake = max(wake, now) if not full else max(wake, now)
            continue
        now = max(now, wake)
        if wait := pace.delay(now):
            wake = now + wait + chance.random() * night.late
            continue
        next_of_others, theirs = _others(night, server, next_of_others, now, theirs)
        pace.take(now)
        good = server.take(now + night.latency_s / 2)
        count[good] += 1
        heapq.heappush(answers, (now + night.latency_s * (0.9 + 0.2 * chance.random()), sum(count), good))
    step = 0.01
    possible = (
        sum(
            min(night.allowed(i * step) - night.others(i * step), night.wire / night.latency_s)
            for i in range(int(night.seconds / step))
        )
        * step
    )
    return Seen(count[True], count[False], possible)


def _others(night: Night, server: Server, at: float, now: float, theirs: int) -> tuple[float, int]:
    """Let somebody else send what is due."""
    while at <= now:
        rate = night.others(at)
        if rate:
            theirs += server.take(at + night.latency_s / 2)
        at += 1 / rate if rate else 0.1
    return at, theirs


def steady(rate: float) -> Allowed:
    """Allow the same all night."""
    return lambda _: rate


def changing(first: float, then: float, at: float) -> Allowed:
    """Allow something else from some moment on."""
    return lambda now: first if now < at else then


def between(rate: float, start: float, end: float) -> Allowed:
    """Send so much for a while."""
    return lambda now: rate if start <= now < end else 0.0


def nights(rate: float) -> dict[str, Callable[[Callable[[Allowed], Server]], Night]]:
    """List the stories that the table tells about an allowance."""
    return {
        "steady, 60 s": lambda server: Night(steady(rate), server),
        "steady, Retry-After 1 s": lambda server: Night(steady(rate), server, retry_after=1.0),
        "halved after 60 of 120 s": lambda server: Night(changing(rate, rate / 2, 60), server, seconds=120),
        "doubled after 60 of 120 s": lambda server: Night(changing(rate, rate * 2, 60), server, seconds=120),
        "half taken from 60 to 120 of 180 s": lambda server: Night(
            steady(rate), server, seconds=180, others=between(rate / 2, 60, 120)
        ),
    }


@click.command()
@click.option("--latency", default=0.1, show_default=True, help="Seconds until a request is answered.")
def main(latency: float) -> None:
    """Print the share of the allowance that is used, and of the requests that are answered 429."""
    from dataclasses import replace

    print(f"{'':36}" + "".join(f"{name:>20}" for name in SERVERS))
    for rate in (20.0, 100.0, 500.0):
        for name, night in nights(rate).items():
            cells = []
            for server in SERVERS.values():
                seen = play(replace(night(server), latency_s=latency))
                cells.append(f"{seen.used:>12.1%} {seen.refused_share:>6.2%}")
            print(f"{rate:>4.0f}/s {name:30}" + " ".join(cells))


if __name__ == "__main__":
    main()

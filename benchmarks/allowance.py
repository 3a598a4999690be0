"""How much of an allowance that nobody told is used, and how many requests are answered 429.

`python -m benchmarks.allowance` plays the program's pace against servers of several kinds on a virtual clock: the
same numbers on every machine. `--real` then runs the program itself over loopback, most of a minute for each allowance.
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
from benchmarks.server import serving
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


RATES = (20.0, 100.0, 500.0)


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a night: requests accepted and refused, and how many could have been accepted.

    `silent`: requests that left before a Retry-After was over.
    """

    accepted: int
    refused: int
    possible: float
    silent: int

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
    pace, server, others = Pace(night.ceiling), night.server(night.allowed), Others(night.others)
    answers: list[tuple[float, int, bool]] = []
    accepted = refused = silent = 0
    now = wake = quiet_until = 0.0
    while now < night.seconds:
        if answers and (len(answers) >= night.wire or answers[0][0] <= wake):
            now, _, good = heapq.heappop(answers)
            if good:
                pace.answered(now)
            else:
                pace.throttled(now, night.retry_after)
                quiet_until = max(quiet_until, now + (night.retry_after or 0.0))
            wake = max(wake, now)
            continue
        now = max(now, wake)
        if wait := pace.delay(now):
            wake = now + wait + chance.random() * night.late
            continue
        arrives = now + night.latency_s / 2
        others.send(server, arrives)
        pace.take(now)
        silent += now < quiet_until
        good = server.take(arrives)
        accepted += good
        refused += not good
        heapq.heappush(answers, (now + night.latency_s * (0.9 + 0.2 * chance.random()), accepted + refused, good))
    moments = [second / 10 for second in range(int(night.seconds * 10))]
    free = sum(min(night.allowed(at) - night.others(at), night.wire / night.latency_s) for at in moments) / 10
    return Seen(accepted, refused, free + others.refused, silent)


@dataclass(slots=True)
class Others:
    """Somebody else who sends at a steady rate, whatever is answered."""

    rate: Allowed
    refused: int = 0
    at: float = 0.0

    def send(self, server: Server, until: float) -> None:
        """Send what is due."""
        while self.at <= until:
            rate = self.rate(self.at)
            self.refused += bool(rate) and not server.take(self.at)
            self.at += 1 / rate if rate else 0.1


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


def real(rate: float, rows: int, retry_after: int | None) -> None:
    """Run the program against a server that allows so many requests a second, and print what came of it.

    The time is that from the first POST to the last: starting, and waiting for the last answers, use no allowance.
    """
    options = ["--rate", str(rate), *(["--retry-after", str(retry_after)] if retry_after else [])]
    with tempfile.TemporaryDirectory(prefix="allowance-") as name, serving(*options) as server:
        job = write_job(Path(name), rows)
        text = job.read_text(encoding="utf-8")
        job.write_text(text.replace("  requests_per_second: 100000 # no limit of ours\n", ""), encoding="utf-8")
        command = [sys.executable, "-m", "enrich", "run", str(job), "--yes", "--json"]
        seen = [(0.0, 0, 0)]
        with subprocess.Popen(command, env=os.environ | server.environ, stdout=subprocess.PIPE) as running:
            while running.poll() is None:
                counts = server.counts()
                posts = sum(counts.get("run", {}).values())
                if posts > seen[-1][1] or (posts and not seen[-1][1]):
                    accepted = sum(told.get("200", 0) for told in counts.values())
                    seen.append((time.monotonic(), posts, accepted))
                time.sleep(0.2)
            assert running.stdout is not None
            receipt = json.load(running.stdout)
        counts = server.counts()
    (begun, _, before), (ended, _, after) = seen[1], seen[-1]
    refused = sum(told.get("429", 0) for told in counts.values()) / sum(sum(told.values()) for told in counts.values())
    print(
        f"{rate:>4.0f}/s for real, Retry-After {retry_after or '-'}: {rows:,} rows in {receipt['elapsed_s']:.1f} s, "
        f"{receipt['polls'] / rows:.2f} polls a row, {(after - before) / (ended - begun) / rate:.1%} used, "
        f"{refused:.2%} answered 429",
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
        for name, night in nights(rate).items():
            cells = []
            for server in SERVERS.values():
                seen = play(replace(night(server), latency_s=latency, late=late))
                cells.append(f"{seen.used:>7.1%} {seen.refused_share:>6.2%}  ")
            print(f"{rate:>4.0f}/s {name:32}" + "".join(cells))
    if for_real:
        for rate in RATES:
            for retry_after in (None, 1):
                real(rate, int(rate * 20), retry_after)


if __name__ == "__main__":
    main()

"""Polls per row, and the delay between an answer being ready and being seen, compared with fixed intervals.

`python -m benchmarks.polls` simulates the program's poll schedule on a virtual clock, so the numbers are the same on
every machine.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

import click

from enrich.run.poll_schedule import PollCost, PollSchedule

IN_FLIGHT, PER_SECOND = 200, 20.0

#: Draws the duration of a task, in seconds.
Latency = Callable[[random.Random], float]


def lognormal(middle: float, sigma: float) -> Latency:
    """Return a lognormal distribution with this median (seconds)."""
    return lambda rng: rng.lognormvariate(math.log(middle), sigma)


LATENCIES: dict[str, Latency] = {
    "constant 4 s": lambda _: 4.0,
    "lognormal(4 s, 0.2)": lognormal(4, 0.2),
    "lognormal(4 s, 0.6)": lognormal(4, 0.6),
    "lognormal(4 s, 1.0)": lognormal(4, 1.0),
    "2 s or 12 s": lambda chance: chance.gauss(2, 0.2) if chance.random() < 0.6 else chance.gauss(12, 1),
    "exponential, mean 4 s": lambda chance: chance.expovariate(1 / 4),
    "Pareto(1.5) from 1.5 s": lambda chance: 1.5 * chance.paretovariate(1.5),
    "lognormal(60 s, 0.6)": lognormal(60, 0.6),
    "lognormal(0.3 s, 0.6)": lognormal(0.3, 0.6),
}


@dataclass(slots=True)
class RunningTask:
    """A task: when it was submitted, when it will be ready, and its age when it was last seen running; in seconds."""

    submitted: float
    ready: float
    last_running_age_s: float = 0.0


class PollStrategy(Protocol):
    """Decides when to poll a task."""

    def next_delay_s(self, age_s: float) -> float:
        """Return the seconds until the next poll of a task of this age."""

    def first_delay_s(self) -> float:
        """Return the seconds until the first poll of a new task."""

    def record_duration(self, running_at_s: float, done_at_s: float) -> None:
        """Record the ages at which a task was last seen running, and first seen done."""


@dataclass(frozen=True, slots=True)
class LearnedHighCost:
    """The program's schedule while each poll takes the slot of a submit."""

    times: PollSchedule

    def next_delay_s(self, age_s: float) -> float:
        """Return the seconds until the next poll of a task of this age."""
        return self.times.next_delay_s(age_s, PollCost.HIGH)

    def first_delay_s(self) -> float:
        """Return the seconds until the first poll of a new task."""
        return self.times.first_delay_s(PollCost.HIGH)

    def record_duration(self, running_at_s: float, done_at_s: float) -> None:
        """Record the ages at which a task was last seen running, and first seen done."""
        self.times.record_duration(running_at_s, done_at_s)


@dataclass(frozen=True, slots=True)
class FixedInterval:
    """Polls at fixed intervals."""

    seconds: float

    def next_delay_s(self, age_s: float) -> float:
        """Return the interval."""
        del age_s
        return self.seconds

    def first_delay_s(self) -> float:
        """Return the interval."""
        return self.seconds

    def record_duration(self, running_at_s: float, done_at_s: float) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result: polls per row, and the delays until ready answers were seen, in seconds."""

    polls: float
    delays: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median delay."""
        return median(self.delays)

    @property
    def p95(self) -> float:
        """The 95th percentile of the delays."""
        return quantiles(self.delays, n=20)[-1]


def simulate(strategy: PollStrategy, latency: Latency, rows: int = 3000, seed: int = 1) -> Outcome:
    """Submit PER_SECOND rows per second, at most IN_FLIGHT at once, and poll each until it is done."""
    rng = random.Random(seed)
    polls, now, delays = 0, 0.0, list[float]()
    due: list[tuple[float, int, RunningTask]] = []
    submitted = 0
    while len(delays) < rows:
        if submitted < rows and len(due) < IN_FLIGHT and (not due or now <= due[0][0]):
            heapq.heappush(due, (now + strategy.first_delay_s(), submitted, RunningTask(now, now + latency(rng))))
            submitted += 1
            now += 1 / PER_SECOND
            continue
        at, number, task = heapq.heappop(due)
        now = max(now, at)
        polls += 1
        if at >= task.ready:
            strategy.record_duration(task.last_running_age_s, at - task.submitted)
            delays.append(at - task.ready)
        else:
            task.last_running_age_s = at - task.submitted
            heapq.heappush(due, (at + strategy.next_delay_s(task.last_running_age_s), number, task))
    return Outcome(polls / rows, tuple(delays))


@click.command()
@click.option("--rows", default=3000, show_default=True, help="Rows of each run.")
def main(rows: int) -> None:
    """Print polls per row, and the median and 95 % delay in seconds, of the learned times and of fixed ones."""
    columns = ("learned", "learned, dear", "every 1 s", "every 2 s", "every 5 s")
    print(f"{'polls, median, 95 %':24}" + "".join(f"{name:^22}" for name in columns))
    for name, latency in LATENCIES.items():
        cells = []
        for strategy in (
            PollSchedule(),
            LearnedHighCost(PollSchedule()),
            FixedInterval(1),
            FixedInterval(2),
            FixedInterval(5),
        ):
            outcome = simulate(strategy, latency, rows)
            cells.append(f"{outcome.polls:7.2f} {outcome.median:6.2f} {outcome.p95:6.2f}")
        print(f"{name:22}" + " ".join(cells))


if __name__ == "__main__":
    main()

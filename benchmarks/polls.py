"""How many polls a row takes and how long after it was ready an answer is seen, against fixed intervals.

`python -m benchmarks.polls` plays the program's poll times on a virtual clock: the same numbers on every machine.
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

#: Draws how long a task takes, in seconds.
Latency = Callable[[random.Random], float]


def lognormal(middle: float, sigma: float) -> Latency:
    """Draw from a lognormal distribution, given its median."""
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
    """A task: when it was submitted, when it will be done, and how old it was when it was last seen at work."""

    submitted: float
    ready: float
    last_running_age_s: float = 0.0


class PollStrategy(Protocol):
    """Says when to ask."""

    def next_delay_s(self, age_s: float) -> float:
        """Tell in how many seconds a task of this age is worth a poll."""

    def first_delay_s(self) -> float:
        """Tell the same of a new task."""

    def record_duration(self, running_at_s: float, done_at_s: float) -> None:
        """Hear when a task ran and when it was done."""


@dataclass(frozen=True, slots=True)
class LearnedHighCost:
    """Asks as the program does while a poll takes the slot of a submit."""

    times: PollSchedule

    def next_delay_s(self, age_s: float) -> float:
        """Tell in how many seconds a task of this age is worth a poll."""
        return self.times.next_delay_s(age_s, PollCost.HIGH)

    def first_delay_s(self) -> float:
        """Tell the same of a new task."""
        return self.times.first_delay_s(PollCost.HIGH)

    def record_duration(self, running_at_s: float, done_at_s: float) -> None:
        """Hear when a task ran and when it was done."""
        self.times.record_duration(running_at_s, done_at_s)


@dataclass(frozen=True, slots=True)
class FixedInterval:
    """Asks at fixed intervals."""

    seconds: float

    def next_delay_s(self, age_s: float) -> float:
        """Tell in how many seconds a task of this age is worth a poll."""
        del age_s
        return self.seconds

    def first_delay_s(self) -> float:
        """Tell the same of a new task."""
        return self.seconds

    def record_duration(self, running_at_s: float, done_at_s: float) -> None:
        """Learn nothing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: polls per row, and the delays until the answers were seen, in seconds."""

    polls: float
    delays: tuple[float, ...]

    @property
    def median(self) -> float:
        """The delay of the median answer."""
        return median(self.delays)

    @property
    def p95(self) -> float:
        """The delay that one answer in twenty exceeds."""
        return quantiles(self.delays, n=20)[-1]


def simulate(strategy: PollStrategy, latency: Latency, rows: int = 3000, seed: int = 1) -> Outcome:
    """Submit rows at a steady rate, at most IN_FLIGHT at once, and ask for each until it is done."""
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

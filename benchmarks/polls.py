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

from enrich.polls import PollTimes, Price

IN_FLIGHT, PER_SECOND = 200, 20.0

#: Draws how long a task takes, in seconds.
Latency = Callable[[random.Random], float]


def lognormal(middle: float, sigma: float) -> Latency:
    """Draw from a lognormal distribution, given its median."""
    return lambda chance: chance.lognormvariate(math.log(middle), sigma)


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
class Running:
    """A task: when it was submitted, when it will be done, and how old it was when it was last seen at work."""

    submitted: float
    ready: float
    ran_s: float = 0.0


class Asker(Protocol):
    """Says when to ask."""

    def wait(self, age: float) -> float:
        """Tell in how many seconds a task of this age is worth a poll."""

    def first(self) -> float:
        """Tell the same of a new task."""

    def finished(self, after: float, by: float) -> None:
        """Hear when a task ran and when it was done."""


@dataclass(frozen=True, slots=True)
class Dear:
    """Asks as the program does while a poll takes the slot of a submit."""

    times: PollTimes

    def wait(self, age: float) -> float:
        """Tell in how many seconds a task of this age is worth a poll."""
        return self.times.wait(age, Price.HIGH)

    def first(self) -> float:
        """Tell the same of a new task."""
        return self.times.first(Price.HIGH)

    def finished(self, after: float, by: float) -> None:
        """Hear when a task ran and when it was done."""
        self.times.finished(after, by)


@dataclass(frozen=True, slots=True)
class Every:
    """Asks at fixed intervals."""

    seconds: float

    def wait(self, age: float) -> float:
        """Tell in how many seconds a task of this age is worth a poll."""
        del age
        return self.seconds

    def first(self) -> float:
        """Tell the same of a new task."""
        return self.seconds

    def finished(self, after: float, by: float) -> None:
        """Learn nothing."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of it: polls per row, and the delays until the answers were seen, in seconds."""

    polls: float
    delays: tuple[float, ...]

    @property
    def median(self) -> float:
        """The delay of the median answer."""
        return median(self.delays)

    @property
    def late(self) -> float:
        """The delay that one answer in twenty exceeds."""
        return quantiles(self.delays, n=20)[-1]


def play(asker: Asker, latency: Latency, rows: int = 3000, seed: int = 1) -> Seen:
    """Submit rows at a steady rate, at most IN_FLIGHT at once, and ask for each until it is done."""
    chance = random.Random(seed)
    polls, now, delays = 0, 0.0, list[float]()
    due: list[tuple[float, int, Running]] = []
    submitted = 0
    while len(delays) < rows:
        if submitted < rows and len(due) < IN_FLIGHT and (not due or now <= due[0][0]):
            heapq.heappush(due, (now + asker.first(), submitted, Running(now, now + latency(chance))))
            submitted += 1
            now += 1 / PER_SECOND
            continue
        at, number, task = heapq.heappop(due)
        now = max(now, at)
        polls += 1
        if at >= task.ready:
            asker.finished(task.ran_s, at - task.submitted)
            delays.append(at - task.ready)
        else:
            task.ran_s = at - task.submitted
            heapq.heappush(due, (at + asker.wait(task.ran_s), number, task))
    return Seen(polls / rows, tuple(delays))


@click.command()
@click.option("--rows", default=3000, show_default=True, help="Rows of each run.")
def main(rows: int) -> None:
    """Print polls per row, and the median and 95 % delay in seconds, of the learned times and of fixed ones."""
    columns = ("learned", "learned, dear", "every 1 s", "every 2 s", "every 5 s")
    print(f"{'polls, median, 95 %':24}" + "".join(f"{name:^22}" for name in columns))
    for name, latency in LATENCIES.items():
        cells = []
        for asker in (PollTimes(), Dear(PollTimes()), Every(1), Every(2), Every(5)):
            seen = play(asker, latency, rows)
            cells.append(f"{seen.polls:7.2f} {seen.median:6.2f} {seen.late:6.2f}")
        print(f"{name:22}" + " ".join(cells))


if __name__ == "__main__":
    main()

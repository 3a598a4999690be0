"""Rows per second when the rate limit is the bottleneck: each request slot is a submit or a poll.

`python -m benchmarks.tight` simulates it on a virtual clock, so the numbers are the same on every machine. With one
poll per row, the minimum, half of the slots are submits.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from statistics import median

import click

from benchmarks.polls import LATENCIES, FixedInterval, Latency, RunningTask
from enrich.run.poll_schedule import PollCost, PollSchedule


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result: rates up to the last submit, the median delay of the answers in seconds, and the most open tasks."""

    rows_per_s: float
    polls_per_row: float
    median_delay_s: float
    most_in_flight: int


def simulate(
    strategy: PollSchedule | FixedInterval, latency: Latency, *, use_poll_cost: bool, rate: float, rows: int
) -> Outcome:
    """Submit and poll under one rate limit, alternating when both are due, with at most 200 open tasks."""
    rng, limit = random.Random(1), 200
    due: list[tuple[float, int, RunningTask]] = []
    ready: list[tuple[float, int, RunningTask]] = []
    delays = list[float]()
    submitted = polls = max_in_flight = 0
    polled = False
    now = idle = 0.0

    def wait(age: float) -> float:
        if isinstance(strategy, FixedInterval):
            return strategy.next_delay_s(age)
        room = 1 - (len(due) + len(ready)) / limit
        price = PollCost.choose(rate_is_limiting=idle < 0.1, free_share=room) if use_poll_cost else PollCost.NORMAL
        return strategy.next_delay_s(age, price) if age else strategy.first_delay_s(price)

    while submitted < rows:
        now += 1 / rate
        idle *= 1 - 1 / rate
        while due and due[0][0] <= now:
            _, number, task = heapq.heappop(due)
            heapq.heappush(ready, (task.submitted, number, task))
        in_flight = len(due) + len(ready)
        max_in_flight = max(max_in_flight, in_flight)
        if ready and (not polled or in_flight >= limit):
            polled = True
            polls += 1
            _, number, task = heapq.heappop(ready)
            age = now - task.submitted
            if now >= task.ready:
                strategy.record_duration(task.last_running_age_s, age)
                delays.append(now - task.ready)
            else:
                task.last_running_age_s = age
                heapq.heappush(due, (now + wait(age), number, task))
        elif in_flight < limit:
            polled = False
            heapq.heappush(due, (now + wait(0.0), submitted, RunningTask(now, now + latency(rng))))
            submitted += 1
        else:
            idle += 1 / rate
    return Outcome(len(delays) / now, polls / len(delays), median(delays), max_in_flight)


@click.command()
@click.option("--rate", default=20.0, show_default=True, help="Requests a second that are allowed.")
@click.option("--rows", default=3000, show_default=True, help="Rows of each run.")
def main(rate: float, rows: int) -> None:
    """Print rows a second (as a share of half the rate), polls per row and the median delay in seconds."""
    columns = ("gives way", "does not", "every 1 s", "every 2 s", "every 5 s")
    print(f"{'rows/s, polls, delay':22}" + "".join(f"{name:^24}" for name in columns))
    for name, latency in LATENCIES.items():
        cells = []
        for strategy, use_poll_cost in (
            (PollSchedule(), True),
            (PollSchedule(), False),
            (FixedInterval(1), False),
            (FixedInterval(2), False),
            (FixedInterval(5), False),
        ):
            outcome = simulate(strategy, latency, use_poll_cost=use_poll_cost, rate=rate, rows=rows)
            share = outcome.rows_per_s / (rate / 2)
            cells.append(
                f"{outcome.rows_per_s:6.1f} {share:>4.0%} {outcome.polls_per_row:5.2f} {outcome.median_delay_s:5.1f}"
            )
        print(f"{name:22}" + " ".join(cells))


if __name__ == "__main__":
    main()

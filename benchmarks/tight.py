"""Rows a second when the rate is the limit: each slot goes to a submit or to a poll.

`python -m benchmarks.tight` plays it on a virtual clock: the same numbers on every machine. With one poll a row,
which is the least, half of the slots are submits.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from statistics import median

import click

from benchmarks.polls import LATENCIES, Every, Latency, Running
from enrich.polls import PollTimes, Price


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of it: rows and polls until the last submit, and the median delay of the answers in seconds."""

    rows_per_s: float
    polls_per_row: float
    delay: float
    most_in_flight: int


def play(times: PollTimes | Every, latency: Latency, *, arbitrated: bool, rate: float, rows: int) -> Seen:
    """Submit and poll through one door, in turn when both want it, at most 200 tasks in flight."""
    chance, limit = random.Random(1), 200
    due: list[tuple[float, int, Running]] = []
    ready: list[tuple[float, int, Running]] = []
    delays = list[float]()
    submitted = polls = most = 0
    polled = False
    now = idle = 0.0

    def wait(age: float) -> float:
        if isinstance(times, Every):
            return times.wait(age)
        room = 1 - (len(due) + len(ready)) / limit
        price = Price.of(scarce=idle < 0.1, room=room) if arbitrated else Price.FAIR
        return times.wait(age, price) if age else times.first(price)

    while submitted < rows:
        now += 1 / rate
        idle *= 1 - 1 / rate
        while due and due[0][0] <= now:
            _, number, task = heapq.heappop(due)
            heapq.heappush(ready, (task.submitted, number, task))
        in_flight = len(due) + len(ready)
        most = max(most, in_flight)
        if ready and (not polled or in_flight >= limit):
            polled = True
            polls += 1
            _, number, task = heapq.heappop(ready)
            age = now - task.submitted
            if now >= task.ready:
                times.finished(task.ran_s, age)
                delays.append(now - task.ready)
            else:
                task.ran_s = age
                heapq.heappush(due, (now + wait(age), number, task))
        elif in_flight < limit:
            polled = False
            heapq.heappush(due, (now + wait(0.0), submitted, Running(now, now + latency(chance))))
            submitted += 1
        else:
            idle += 1 / rate
    return Seen(len(delays) / now, polls / len(delays), median(delays), most)


@click.command()
@click.option("--rate", default=20.0, show_default=True, help="Requests a second that are allowed.")
@click.option("--rows", default=3000, show_default=True, help="Rows of each run.")
def main(rate: float, rows: int) -> None:
    """Print rows a second (as a share of half the rate), polls per row and the median delay in seconds."""
    columns = ("gives way", "does not", "every 1 s", "every 2 s", "every 5 s")
    print(f"{'rows/s, polls, delay':22}" + "".join(f"{name:^24}" for name in columns))
    for name, latency in LATENCIES.items():
        cells = []
        for times, arbitrated in (
            (PollTimes(), True),
            (PollTimes(), False),
            (Every(1), False),
            (Every(2), False),
            (Every(5), False),
        ):
            seen = play(times, latency, arbitrated=arbitrated, rate=rate, rows=rows)
            share = seen.rows_per_s / (rate / 2)
            cells.append(f"{seen.rows_per_s:6.1f} {share:>4.0%} {seen.polls_per_row:5.2f} {seen.delay:5.1f}")
        print(f"{name:22}" + " ".join(cells))


if __name__ == "__main__":
    main()

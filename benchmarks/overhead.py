"""What `enrich run` costs on top of its requests: against plain loops that keep nothing, in one run.

`python -m benchmarks.overhead --rows 5000 --seconds 120`

A row is one POST and one GET. `httpx` is the plain loop over httpx as it is installed, `transport` the same loop over
our own transport, `aiohttp` that loop without httpx, for scale. `enrich run` is the whole command: leads read, ledger
durable, output written. `at work` are the rows/s without the interpreter's start; `of httpx` and `of ours` compare them
with the best loop of that kind. A run begins slowly, for it does not know what the API allows: its steady state is what
each row of the long run beyond the short run's takes.
"""

from __future__ import annotations

import argparse
from math import nan

from benchmarks.meter import Contender, Result, compete, enrich_run, has_bulk, loop, table
from benchmarks.server import serving

BULK = 100
SHORT, LONG = "enrich run", "enrich run, long"
LONGER = 3
HEADER = (
    "one process, loopback",
    "rows",
    "rows/s",
    "median",
    "spread",
    "at work",
    "of httpx",
    "of ours",
    "CPU s/1,000",
    "peak MiB",
    "requests/row",
)


def contenders(rows: int) -> list[Contender]:
    """Choose who runs: the loops with so many rows that all take about as long."""
    bulk = [enrich_run(f"enrich run, bulk {BULK}", 10 * rows, BULK)] if has_bulk() else []
    return [
        loop("httpx", 10, max(1, rows // 4)),
        loop("httpx", 50, max(1, rows // 8)),
        loop("transport", 10, rows),
        loop("transport", 50, rows),
        loop("transport", 50, rows, uvloop=True),
        loop("aiohttp", 50, rows, uvloop=True),
        enrich_run(SHORT, rows),
        enrich_run(LONG, LONGER * rows),
        *bulk,
    ]


def best(results: list[Result], kind: str) -> float:
    """Rows per second of the best loop of a kind, without the interpreter's start."""
    return max(result.rows / result.working_s for result in results if result.name.startswith(f"{kind}, "))


def steady(results: list[Result]) -> tuple[float, float]:
    """Rows per second, and CPU seconds for 1,000, of what the long run has beyond the short one.

    Not known (nan) from one round: a short run that was disturbed would make it look fast.
    """
    by_name = {result.name: result for result in results}
    short, long = by_name[SHORT], by_name[LONG]
    rows, seconds = long.rows - short.rows, long.working_s - short.working_s
    known = seconds > 0 and len(long.trials) > 1
    return (rows / seconds if known else nan), 1000 * (long.cpu_s - short.cpu_s) / rows


def report(results: list[Result]) -> str:
    """Write down what came of it: a line for each contender, and the steady state."""
    plain, ours = best(results, "httpx"), best(results, "transport")
    lines = [
        [
            *result.speeds,
            f"{result.rows / result.working_s:,.0f}",
            f"{result.rows / result.working_s / plain:.2f}",
            f"{result.rows / result.working_s / ours:.2f}",
            f"{result.cpu_per_1000:.2f}",
            f"{result.peak_mib:.0f}",
            f"{result.requests:.2f}",
        ]
        for result in results
    ]
    rate, cpu = steady(results)
    ratios = f"{rate / plain:.2f} of httpx, {rate / ours:.2f} of ours"
    steadily = f"{SHORT}, steady state: {rate:,.0f} rows/s, {ratios}, {cpu:.2f} CPU s/1,000"
    return f"{table(HEADER, lines)}\n\n{steadily}\nrounds: {len(results[0].trials)}"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.add_argument("--rows", type=int, default=5000, help="of `enrich run`; the slow loops get fewer")
    parser.add_argument("--seconds", type=float, default=120, help="as many rounds as fit, at least one")
    options = parser.parse_args()
    with serving() as server:
        results = compete(contenders(options.rows), server, options.seconds)
    print(report(results))


if __name__ == "__main__":
    main()

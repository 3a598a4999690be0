"""What `enrich run` costs on top of its requests, compared with plain loops that store nothing.

`python -m benchmarks.overhead --rows 5000 --seconds 120`

A row is one POST and one GET. `httpx` is a loop over plain httpx, `transport` the same loop over the transport of
`enrich`, and `aiohttp` the loop without httpx, as a reference. `enrich run` is the whole command: it reads the leads,
keeps a durable ledger and writes the output. `at work` is rows/s without the interpreter's start; `of httpx` and
`of ours` compare it with the best `httpx` and `transport` loop. A run starts slowly because it has to find the API's
rate limit. Its steady state is the speed of the extra rows of the long run.
"""

from __future__ import annotations

import argparse
from math import nan

from benchmarks.meter import (
    BenchmarkCase,
    Result,
    enrich_case,
    format_table,
    loop_case,
    measure_in_rounds,
    supports_bulk,
)
from benchmarks.server import start_server

BULK = 100
SHORT_RUN, LONG_RUN = "enrich run", "enrich run, long"
LONG_FACTOR = 3
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


def make_cases(rows: int) -> list[BenchmarkCase]:
    """Return the cases; slow loops get fewer rows, so that all take about the same time."""
    bulk = [enrich_case(f"enrich run, bulk {BULK}", 10 * rows, BULK)] if supports_bulk() else []
    return [
        loop_case("httpx", 10, max(1, rows // 4)),
        loop_case("httpx", 50, max(1, rows // 8)),
        loop_case("transport", 10, rows),
        loop_case("transport", 50, rows),
        loop_case("transport", 50, rows, uvloop=True),
        loop_case("aiohttp", 50, rows, uvloop=True),
        enrich_case(SHORT_RUN, rows),
        enrich_case(LONG_RUN, LONG_FACTOR * rows),
        *bulk,
    ]


def best_loop_rate(results: list[Result], kind: str) -> float:
    """Return the rows per second of the best loop of a kind, without the interpreter's start."""
    return max(result.rows / result.reported_s for result in results if result.name.startswith(f"{kind}, "))


def steady_state(results: list[Result]) -> tuple[float, float]:
    """Return rows/s, and CPU seconds per 1,000 rows, for the rows by which the long run exceeds the short one.

    The rate is nan after a single round, because a disturbed short run would make it look too fast.
    """
    by_name = {result.name: result for result in results}
    short, long = by_name[SHORT_RUN], by_name[LONG_RUN]
    rows, seconds = long.rows - short.rows, long.reported_s - short.reported_s
    known = seconds > 0 and len(long.trials) > 1
    return (rows / seconds if known else nan), 1000 * (long.cpu_s - short.cpu_s) / rows


def format_report(results: list[Result]) -> str:
    """Return the report: a table with a line for each case, and the steady state."""
    plain, ours = best_loop_rate(results, "httpx"), best_loop_rate(results, "transport")
    lines = [
        [
            *result.speed_cells,
            f"{result.rows / result.reported_s:,.0f}",
            f"{result.rows / result.reported_s / plain:.2f}",
            f"{result.rows / result.reported_s / ours:.2f}",
            f"{result.cpu_per_1000:.2f}",
            f"{result.peak_mib:.0f}",
            f"{result.requests:.2f}",
        ]
        for result in results
    ]
    rate, cpu = steady_state(results)
    ratios = f"{rate:,.0f} rows/s, {rate / plain:.2f} of httpx, {rate / ours:.2f} of ours"
    rates = ratios if rate > 0 else "rows/s not known after one round"
    steady_line = f"{SHORT_RUN}, steady state: {rates}, {cpu:.2f} CPU s/1,000"
    return f"{format_table(HEADER, lines)}\n\n{steady_line}\nrounds: {len(results[0].trials)}"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.add_argument("--rows", type=int, default=5000, help="of `enrich run`; the slow loops get fewer")
    parser.add_argument("--seconds", type=float, default=120, help="as many rounds as fit, at least one")
    options = parser.parse_args()
    with start_server() as server:
        results = measure_in_rounds(make_cases(options.rows), server, options.seconds)
    print(format_report(results))


if __name__ == "__main__":
    main()

"""What more processes bring: `enrich run --processes`, with 1, 2 and 4 of them, single and in bulk.

`python -m benchmarks.processes --rows 5000 --seconds 60`

`at work` leaves out the interpreter's start; the ratio is of `at work`, to the first of its kind. `cores` is how many
cores were busy for the run. The server takes a core of its own, as the API would not: with two cores in all one is
left for the run, whatever it is told, so the table shows what sharing costs rather than what it brings. Rows/s grow
with processes while cores are idle; the commits of the ledger stay one after another.
"""

from __future__ import annotations

import argparse

from benchmarks.meter import Contender, Result, compete, enrich_run, has_bulk, table
from benchmarks.server import serving

BULK = 100
HEADER = ("processes", "rows", "rows/s", "median", "spread", "at work", "of first", "CPU s/1,000", "cores", "peak MiB")


def contenders(counts: list[str], kind: str, rows: int, bulk: int | None = None) -> list[Contender]:
    """Choose who runs, each with so many processes."""
    return [enrich_run(f"{kind}, {count}", rows, bulk, ["--processes", count]) for count in counts]


def lines(results: list[Result]) -> list[list[str]]:
    """Write down what came of it; held to the first."""
    return [
        [
            *result.speeds,
            f"{result.rows / result.working_s:,.0f}",
            f"{results[0].working_s / result.working_s:.2f}",
            f"{result.cpu_per_1000:.2f}",
            f"{max(trial.cpu_s / trial.wall_s for trial in result.trials):.2f}",
            f"{result.peak_mib:.0f}",
        ]
        for result in results
    ]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.processes", description=__doc__)
    parser.add_argument("--rows", type=int, default=5000, help="of single runs; in bulk ten times as many")
    parser.add_argument("--processes", default="1,2,4", help="so many, in turn; the others are held to the first")
    parser.add_argument("--seconds", type=float, default=60, help="as many rounds as fit, for each kind")
    options = parser.parse_args()
    counts = options.processes.split(",")
    kinds = [contenders(counts, "single", options.rows)]
    if has_bulk():
        kinds.append(contenders(counts, f"bulk {BULK}", 10 * options.rows, BULK))
    with serving() as server:
        results = [compete(kind, server, options.seconds) for kind in kinds]
    print(table(HEADER, [line for result in results for line in lines(result)]))


if __name__ == "__main__":
    main()

"""`enrich run` compared with the alternatives: a plain httpx loop, and the vendor's SDK.

`python -m benchmarks.compare --rows 5000 --seconds 60`

All use the same server. Each runs as a separate process and is measured from its start to its end. Only `enrich` keeps
a ledger and writes an output; the others keep their answers in memory and discard them. The SDK sends one row at a time
in 50 threads and polls without a pause (`poll_interval_s=0`). Its bulk command sends all rows in one POST, repeats that
POST when the response is lost, and stores nothing.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec

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

BULK = 1000
ENRICH_BULK = f"enrich run, bulk {BULK}"
#: The SDK's bulk call: with the pause of 2 s between polls that it has unless one sets another, and without a pause.
SDK_BULK, SDK_BULK_PAUSED = "databar SDK, one bulk call", "databar SDK, one bulk call, 2 s pause"
HEADER = ("program", "rows", "rows/s", "median", "spread", "CPU s/1,000", "peak MiB", "requests/row", "rows/request")


def sdk_case(name: str, rows: int, *options: str) -> BenchmarkCase:
    """Make a case of the vendor's SDK, see `benchmarks.vendor`."""
    command = [sys.executable, "-m", "benchmarks.vendor", "--rows", str(rows), *options]
    return BenchmarkCase(name, rows, lambda _, url: [*command, "--base-url", url])


def make_cases(rows: int) -> list[BenchmarkCase]:
    """Return the cases; slow ones get fewer rows, so that all take about the same time."""
    bulk = [enrich_case(ENRICH_BULK, 10 * rows, BULK)] if supports_bulk() else []
    sdk = [
        sdk_case("databar SDK, 50 threads", max(1, rows // 5), "--threads", "50"),
        sdk_case(SDK_BULK, 10 * rows, "--bulk"),
        sdk_case(SDK_BULK_PAUSED, 10 * rows, "--bulk", "--poll-interval", "2"),
    ]
    if find_spec("databar") is None:
        print("the vendor's SDK is not installed: pip install -e '.[bench]'", file=sys.stderr)
        sdk = []
    return [enrich_case("enrich run", rows), *bulk, loop_case("httpx", 10, max(1, rows // 4)), *sdk]


def result_cells(result: Result) -> list[str]:
    """Return the table cells of one case."""
    return [
        *result.speed_cells,
        f"{result.cpu_per_1000:.2f}",
        f"{result.peak_mib:.0f}",
        f"{result.requests:.2f}",
        f"{1 / result.requests:.1f}",
    ]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=__doc__)
    parser.add_argument("--rows", type=int, default=5000, help="of `enrich run`; the others get more or fewer")
    parser.add_argument("--seconds", type=float, default=60, help="as many rounds as fit, at least one")
    options = parser.parse_args()
    with start_server() as server:
        results = measure_in_rounds(make_cases(options.rows), server, options.seconds)
    print(f"{format_table(HEADER, map(result_cells, results))}\n\nrounds: {len(results[0].trials)}")
    rates = {result.name: result.best_rate for result in results}
    if SDK_BULK in rates and ENRICH_BULK in rates:
        ratios = [rates[ENRICH_BULK] / rates[name] for name in (SDK_BULK_PAUSED, SDK_BULK)]
        print("rows/s in bulk, of the SDK's with its pause and without: {:.2f}, {:.2f}".format(*ratios))


if __name__ == "__main__":
    main()

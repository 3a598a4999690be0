"""How long tasks took, and the traffic of a run over time."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import ceil

from enrich.ledger.execution_records import ExecutionRow
from enrich.report.data import HistogramBar, LatencyHistogram, Traffic
from enrich.run.progress import read_snapshot

#: Possible widths of a bar in seconds. At most MAX_HISTOGRAM_BARS cover all but the slowest 1% of the tasks.
BAR_WIDTHS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800)

MAX_HISTOGRAM_BARS = 24

HISTOGRAM_SHARE = 0.99


def latency_histogram(latencies_ms: Iterable[int]) -> LatencyHistogram | None:
    """Group latencies (ms, ascending) into bars of equal width, the slowest into one extra bar; None: no latencies."""
    durations = array("q", latencies_ms)
    if not durations:
        return None
    reach, longest = quantile_s(durations, HISTOGRAM_SHARE), durations[-1] / 1000
    width = next((width for width in BAR_WIDTHS_S if reach < width * MAX_HISTOGRAM_BARS), reach / MAX_HISTOGRAM_BARS)
    # In whole milliseconds, like the latencies.
    step = ceil(1000 * width)
    shorter = [bisect_left(durations, number * step) for number in range(MAX_HISTOGRAM_BARS + 1)]
    counts = [until - before for before, until in pairwise(shorter)]
    drawn = [number for number, count in enumerate(counts) if count]
    bars = [
        HistogramBar(number * step / 1000, (number + 1) * step / 1000, counts[number])
        for number in range(min(drawn, default=0), max(drawn, default=-1) + 1)
    ]
    if slowest := len(durations) - shorter[-1]:
        bars.append(HistogramBar(MAX_HISTOGRAM_BARS * step / 1000, longest, slowest))
    return LatencyHistogram(
        bars, count=len(durations), median=quantile_s(durations, 0.5), p90=quantile_s(durations, 0.9), longest=longest
    )


def quantile_s(durations: Sequence[int], share: float) -> float:
    """Return the latency in seconds that this share of all (ms, ascending) does not exceed."""
    return durations[max(0, ceil(share * len(durations)) - 1)] / 1000


def run_traffic(executions: Sequence[ExecutionRow]) -> Traffic | None:
    """Return the traffic of the newest execution with submits, as it was stored during the run. None: it was not."""
    execution = next((row for row in reversed(executions) if row.submitted), None)
    snapshot = None if execution is None else read_snapshot(execution.progress)
    if execution is None or snapshot is None or not any(snapshot.traffic.totals()):
        return None
    return Traffic(execution.id, **snapshot.traffic.model_dump())

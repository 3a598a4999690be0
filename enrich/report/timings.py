"""How long tasks took, and the traffic of a run over time."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import ceil

from enrich.ledger import queries
from enrich.ledger.database import Database
from enrich.ledger.execution_records import ExecutionRow
from enrich.report.data import HistogramBar, LatencyHistogram, Traffic
from enrich.run.progress import read_snapshot

#: Possible widths of a bar in seconds. At most MAX_HISTOGRAM_BARS cover all but the slowest 1% of the tasks.
BAR_WIDTHS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800)

MAX_HISTOGRAM_BARS = 24

HISTOGRAM_SHARE = 0.99

#: A run's traffic has at most this many bins, each with one of these widths in seconds.
MAX_TRAFFIC_BINS = 120

TRAFFIC_BIN_WIDTHS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)


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


def run_traffic(ledger: Database, executions: Sequence[ExecutionRow], now_ms: int) -> Traffic | None:
    """Return the traffic of the newest execution with submits: from its progress snapshot, else from attempt times."""
    execution = next((row for row in reversed(executions) if row.submitted), None)
    if execution is None:
        return None
    return _traffic_from_snapshot(execution.id, execution.progress) or _traffic_from_attempts(ledger, execution, now_ms)


def _traffic_from_snapshot(execution: int, text: str | None) -> Traffic | None:
    """Read the traffic from the snapshot that an execution stored while it ran; None when there is none."""
    snapshot = read_snapshot(text)
    if snapshot is None or not any(snapshot.traffic.totals()):
        return None
    return Traffic(execution, **snapshot.traffic.model_dump())


def _traffic_from_attempts(ledger: Database, row: ExecutionRow, now_ms: int) -> Traffic:
    """Derive the traffic from the attempts' times; they hold no polls and no 429s."""
    end_ms = row.ended_ms or queries.last_answer_ms(ledger, row.id) or now_ms
    lasted_s = max(0, end_ms - row.started_ms) / 1000
    width_s = next(
        (width for width in TRAFFIC_BIN_WIDTHS_S if lasted_s <= width * MAX_TRAFFIC_BINS),
        ceil(lasted_s / MAX_TRAFFIC_BINS),
    )
    submitted, answered = queries.throughput(ledger, row.id, row.started_ms, width_s * 1000)
    # Limits the number of bins when the clock jumped.
    length = min(max((*submitted, *answered), default=-1) + 1, 2 * MAX_TRAFFIC_BINS)
    return Traffic(
        row.id,
        float(width_s),
        [submitted.get(stretch, 0) for stretch in range(length)],
        [answered.get(stretch, 0) for stretch in range(length)],
        polls=(),
        rate_limited=(),
    )

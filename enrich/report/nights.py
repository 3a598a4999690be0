"""The nights of a job, how long its tasks took, and what one night sent and heard."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any

from enrich.ledger.ledger import Ledger
from enrich.ledger.queries import ReportedExecutionRow
from enrich.model import iso_time, to_credits
from enrich.report.facts import HistogramBar, LatencyHistogram, ReportedRun, Traffic
from enrich.run.progress import read_snapshot
from enrich.watch.outcome import outcome_label

#: A bar may stand for so many seconds; so many bars at most show all but the slowest.
BAR_WIDTHS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800)
MAX_HISTOGRAM_BARS = 24
HISTOGRAM_SHARE = 0.99
#: Stretches of a night's traffic, at most so many, in seconds.
MAX_TRAFFIC_BINS = 120
TRAFFIC_BIN_WIDTHS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)


def reported_runs(
    executions: Sequence[ReportedExecutionRow],
    outcome_counts: Iterable[tuple[int, str, int]],
    newest: int,
    *,
    is_running: bool | None,
) -> list[ReportedRun]:
    """Tell what each execution came to; `at_work`: is anybody now (None: not known), who is then the `newest`."""
    counts_by_run: dict[int, dict[str, int]] = {}
    for execution, state, number in outcome_counts:
        counts_by_run.setdefault(execution, {})[state] = number
    return [
        _reported_run(row, counts_by_run.get(row.id, {}), is_running=is_running if row.id == newest else False)
        for row in executions
    ]


def _reported_run(row: ReportedExecutionRow, settled: Mapping[str, int], *, is_running: bool | None) -> ReportedRun:
    summary = json.loads(row.receipt) if row.receipt else {}
    ended_ms, started_ms = row.ended_ms, row.started_ms
    return ReportedRun(
        execution=row.id,
        started_at=iso_time(started_ms),
        ended_at=None if ended_ms is None else iso_time(ended_ms),
        exit_code=row.exit_code,
        outcome=outcome_label(row.exit_code, is_running=is_running),
        rows=summary.get("rows"),
        submitted=row.submitted,
        found=settled.get("found", 0),
        not_found=settled.get("not_found", 0),
        failed=settled.get("failed", 0),
        expired=settled.get("expired", 0),
        credits_spent=to_credits(row.spent),
        credits_unknown=row.unknown,
        balance_before=to_credits(row.balance_before),
        balance_after=to_credits(row.balance_after),
        unexplained=_unexplained_credits(summary),
        polls=summary.get("polls"),
        rate_limited=summary.get("rate_limited"),
        elapsed_s=None if ended_ms is None else round((ended_ms - started_ms) / 1000, 3),
    )


def _unexplained_credits(summary: Mapping[str, Any]) -> float | None:
    if "difference" not in summary or None in (summary["balance_before"], summary["balance_after"]):
        return None
    return 0.0 if summary["difference"] is None else summary["difference"]["unexplained"]


def latency_histogram(latencies_ms: Iterable[int]) -> LatencyHistogram | None:
    """Sort waits (ms, ascending) into bars of equal width, the slowest into one more; None: there are none."""
    durations = array("q", latencies_ms)
    if not durations:
        return None
    reach, longest = quantile_s(durations, HISTOGRAM_SHARE), durations[-1] / 1000
    width = next((width for width in BAR_WIDTHS_S if reach < width * MAX_HISTOGRAM_BARS), reach / MAX_HISTOGRAM_BARS)
    # In whole milliseconds, as the waits are.
    step = ceil(1000 * width)
    counts = Counter(min(wait // step, MAX_HISTOGRAM_BARS) for wait in durations)
    drawn = [number for number in counts if number < MAX_HISTOGRAM_BARS]
    bars = [
        HistogramBar(number * step / 1000, (number + 1) * step / 1000, counts[number])
        for number in range(min(drawn, default=MAX_HISTOGRAM_BARS), max(drawn, default=-1) + 1)
    ]
    if counts[MAX_HISTOGRAM_BARS]:
        bars.append(HistogramBar(MAX_HISTOGRAM_BARS * step / 1000, longest, counts[MAX_HISTOGRAM_BARS]))
    return LatencyHistogram(
        bars, count=len(durations), median=quantile_s(durations, 0.5), p90=quantile_s(durations, 0.9), longest=longest
    )


def quantile_s(durations: Sequence[int], share: float) -> float:
    """Take the wait (ms, ascending) that this share of all does not exceed; in seconds."""
    return durations[max(0, ceil(share * len(durations)) - 1)] / 1000


def run_traffic(ledger: Ledger, executions: Sequence[ReportedExecutionRow], now_ms: int) -> Traffic | None:
    """Tell the traffic of the newest execution that submitted something: by its pulse, else by its attempts' times."""
    execution = next((row for row in reversed(executions) if row.submitted), None)
    if execution is None:
        return None
    return _traffic_from_snapshot(execution.id, execution.pulse) or _traffic_from_attempts(ledger, execution, now_ms)


def _traffic_from_snapshot(execution: int, text: str | None) -> Traffic | None:
    """Read what an execution wrote down while it was at work; None when that is nothing of use."""
    snapshot = read_snapshot(text)
    if snapshot is None or not any(snapshot.traffic.totals()):
        return None
    return Traffic(execution, **snapshot.traffic.model_dump())


def _traffic_from_attempts(ledger: Ledger, row: ReportedExecutionRow, now_ms: int) -> Traffic:
    """Tell what the attempts know: of polls and 429s they know nothing."""
    end_ms = row.ended_ms or ledger.last_answer_ms(row.id) or now_ms
    lasted_s = max(0, end_ms - row.started_ms) / 1000
    width_s = next(
        (width for width in TRAFFIC_BIN_WIDTHS_S if lasted_s <= width * MAX_TRAFFIC_BINS),
        ceil(lasted_s / MAX_TRAFFIC_BINS),
    )
    submitted, answered = ledger.throughput(row.id, row.started_ms, width_s * 1000)
    # A clock that jumped shows no more than this.
    length = min(max((*submitted, *answered), default=-1) + 1, 2 * MAX_TRAFFIC_BINS)
    return Traffic(
        row.id,
        float(width_s),
        [submitted.get(stretch, 0) for stretch in range(length)],
        [answered.get(stretch, 0) for stretch in range(length)],
        polls=(),
        rate_limited=(),
    )

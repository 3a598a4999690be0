"""The nights of a job, how long its tasks took, and what one night sent and heard."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any

from enrich.model import iso, to_credits
from enrich.pulse import read_pulse
from enrich.report.facts import Bar, Latencies, Night, Traffic
from enrich.store.ledger import Ledger
from enrich.store.review import Lived
from enrich.watch.outcome import ending

#: A bar may stand for so many seconds; so many bars at most show all but the slowest.
BARS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800)
MOST_BARS = 24
SHOWN = 0.99
#: Stretches of a night's traffic, at most so many, in seconds.
STRETCHES = 120
WIDTHS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)


def nights(
    executions: Sequence[Lived], fates: Iterable[tuple[int, str, int]], newest: int, *, at_work: bool | None
) -> list[Night]:
    """Tell what each execution came to; `at_work`: is anybody now (None: not known), who is then the `newest`."""
    counted: dict[int, dict[str, int]] = {}
    for execution, state, number in fates:
        counted.setdefault(execution, {})[state] = number
    return [_night(row, counted.get(row.id, {}), at_work=at_work if row.id == newest else False) for row in executions]


def _night(row: Lived, settled: Mapping[str, int], *, at_work: bool | None) -> Night:
    receipt = json.loads(row.receipt) if row.receipt else {}
    ended_ms, started_ms = row.ended_ms, row.started_ms
    return Night(
        execution=row.id,
        started_at=iso(started_ms),
        ended_at=None if ended_ms is None else iso(ended_ms),
        exit_code=row.exit_code,
        outcome=ending(row.exit_code, at_work=at_work),
        rows=receipt.get("rows"),
        submitted=row.submitted,
        found=settled.get("found", 0),
        not_found=settled.get("not_found", 0),
        failed=settled.get("failed", 0),
        expired=settled.get("expired", 0),
        credits_spent=to_credits(row.spent),
        credits_unknown=row.unknown,
        balance_before=to_credits(row.balance_before),
        balance_after=to_credits(row.balance_after),
        unexplained=_unexplained(receipt),
        polls=receipt.get("polls"),
        rate_limited=receipt.get("rate_limited"),
        elapsed_s=None if ended_ms is None else round((ended_ms - started_ms) / 1000, 3),
    )


def _unexplained(receipt: Mapping[str, Any]) -> float | None:
    if "difference" not in receipt or None in (receipt["balance_before"], receipt["balance_after"]):
        return None
    return 0.0 if receipt["difference"] is None else receipt["difference"]["unexplained"]


def latencies(waits_ms: Iterable[int]) -> Latencies | None:
    """Sort waits (ms, ascending) into bars of equal width, the slowest into one more; None: there are none."""
    waits = array("q", waits_ms)
    if not waits:
        return None
    reach, longest = quantile(waits, SHOWN), waits[-1] / 1000
    width = next((width for width in BARS_S if reach < width * MOST_BARS), reach / MOST_BARS)
    # In whole milliseconds, as the waits are.
    step = ceil(1000 * width)
    counts = Counter(min(wait // step, MOST_BARS) for wait in waits)
    drawn = [number for number in counts if number < MOST_BARS]
    bars = [
        Bar(number * step / 1000, (number + 1) * step / 1000, counts[number])
        for number in range(min(drawn, default=MOST_BARS), max(drawn, default=-1) + 1)
    ]
    if counts[MOST_BARS]:
        bars.append(Bar(MOST_BARS * step / 1000, longest, counts[MOST_BARS]))
    return Latencies(bars, count=len(waits), median=quantile(waits, 0.5), p90=quantile(waits, 0.9), longest=longest)


def quantile(waits: Sequence[int], share: float) -> float:
    """Take the wait (ms, ascending) that this share of all does not exceed; in seconds."""
    return waits[max(0, ceil(share * len(waits)) - 1)] / 1000


def traffic(ledger: Ledger, executions: Sequence[Lived], now_ms: int) -> Traffic | None:
    """Tell the traffic of the newest execution that submitted something: by its pulse, else by its attempts' times."""
    row = next((row for row in reversed(executions) if row.submitted), None)
    if row is None:
        return None
    return _of_pulse(row.id, row.pulse) or _of_attempts(ledger, row, now_ms)


def _of_pulse(execution: int, text: str | None) -> Traffic | None:
    """Read what an execution wrote down while it was at work; None when that is nothing of use."""
    pulse = read_pulse(text)
    if pulse is None or not any(pulse.traffic.totals()):
        return None
    return Traffic(execution, **pulse.traffic.model_dump())


def _of_attempts(ledger: Ledger, row: Lived, now_ms: int) -> Traffic:
    """Tell what the attempts know: of polls and 429s they know nothing."""
    end_ms = row.ended_ms or ledger.last_sign(row.id) or now_ms
    lasted_s = max(0, end_ms - row.started_ms) / 1000
    width_s = next((width for width in WIDTHS if lasted_s <= width * STRETCHES), ceil(lasted_s / STRETCHES))
    submitted, answered = ledger.beats(row.id, row.started_ms, width_s * 1000)
    # A clock that jumped shows no more than this.
    length = min(max((*submitted, *answered), default=-1) + 1, 2 * STRETCHES)
    return Traffic(
        row.id,
        float(width_s),
        [submitted.get(stretch, 0) for stretch in range(length)],
        [answered.get(stretch, 0) for stretch in range(length)],
        polls=(),
        rate_limited=(),
    )

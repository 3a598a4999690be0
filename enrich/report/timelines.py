"""The charts over time: nights, the wait for an answer, the minutes of a run. None where there is nothing to draw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import altair as alt

from enrich.report import drawing, words
from enrich.report.drawing import HALF, NARROW, Frame, Ink, Picture, Size
from enrich.report.facts import Latencies, Night, Traffic

#: Fewer nights than these leave room for those to come.
WEEK = 7
#: More points than these on a line are a smear.
MOST_POINTS = 40
#: A bar that is so many times as wide as the others holds all that took longer.
WIDER = 1.01
#: More steps than these are added up in pairs and more.
MOST_STEPS = 90
PANEL = 216.0


def night_credits(nights: Sequence[Night], label: str) -> Picture | None:
    """Draw the credits of each night."""
    rows = [
        {"x": place - 0.38, "x2": place + 0.38, "v": 0, "v2": night.credits_spent} for place, night in enumerate(nights)
    ]
    return _columns(rows, nights, "credits per night", label) if any(row["v2"] for row in rows) else None


def all_credits(nights: Sequence[Night], label: str) -> Picture | None:
    """Draw the credits of all nights up to each."""
    total, rows = 0.0, []
    for place, night in enumerate(nights):
        total += night.credits_spent
        rows.append({"x": place - 0.5, "x2": place + 0.5, "v": 0, "v2": round(total, 6)})
    return _columns(rows, nights, "credits in all", label, Ink.PASSED) if total else None


def cost_per_hit(nights: Sequence[Night], label: str) -> Picture | None:
    """Draw what a hit cost in each night; nights without hits have none."""
    return _line([night.cost_per_hit for night in nights], nights, "credits per hit", label)


def night_rates(nights: Sequence[Night], label: str) -> Picture | None:
    """Draw the hit rate of each night; nights without answers have none."""
    return _line([night.hit_rate for night in nights], nights, "hit rate", label, format=".0%")


def latencies(times: Latencies, label: str) -> Picture | None:
    """Draw how long answers took; the median and the ninth decile are marked."""
    if not times.count or not times.bars:
        return None
    width_s = times.bars[0].end - times.bars[0].start
    slowest = [bar for bar in times.bars[1:] if bar.end - bar.start > width_s * WIDER]
    end_s = slowest[0].start + width_s if slowest else times.bars[-1].end
    unit, name = _unit(end_s)
    domain = (times.bars[0].start / unit, max(end_s, times.p90, times.median) / unit)
    marks = [(times.median, f"median {words.seconds(times.median)}"), (times.p90, f"90% {words.seconds(times.p90)}")]
    rows = [
        {"x": bar.start / unit, "x2": min(bar.end, end_s) / unit, "v": 0, "v2": bar.count}
        for bar in times.bars
        if bar.count
    ]
    beyond = [row for row in rows if slowest and row["x"] == slowest[0].start / unit]

    def sized(size: Size) -> tuple[drawing.Chart, Frame]:
        frame = _frame(size, top=44)
        span = (domain[1] - domain[0]) or 1.0
        marked: list[dict[str, float]] = []
        told: dict[str, list[dict[str, float | str]]] = {"left": [], "right": []}
        for place, (at, text) in enumerate(marks):
            px = frame.inner * (at / unit - domain[0]) / span
            top = -28.0 + 16 * place
            marked.append({"x": at / unit, "y": top - 6, "y2": frame.height - frame.top - frame.bottom})
            align, away = ("right", -6) if px > frame.inner / 2 else ("left", 6)
            told[align].append({"px": px + away, "py": top, "text": text})
        axis = drawing.axis(f"{name} until the answer", 5, orient="bottom", grid=False)
        counts = drawing.upright("tasks", 4, _most(rows), tickMinStep=1)
        chart = alt.layer(
            _standing(rows, drawing.across(domain, axis), counts, Ink.PASSED),
            *([_standing(beyond, drawing.across(domain, axis), counts, Ink.NOBODY)] if beyond else []),
            drawing.rules(marked, domain, axis, Ink.TEXT),
            *(drawing.texts(rows, Ink.TEXT, align=align) for align, rows in told.items()),
        )
        return chart, frame

    return drawing.picture((NARROW, HALF), sized, label)


def throughput(traffic: Traffic, label: str) -> Picture | None:
    """Draw what was sent and what was answered over the run."""
    sent, answered, width_s = _thinned(traffic.submitted, traffic), _thinned(traffic.answered, traffic), _width(traffic)
    if not any(sent) and not any(answered):
        return None
    per, per_name = (1.0, "second") if max(*sent, *answered) >= width_s else (words.MINUTE_S, "minute")
    unit, name = _unit(width_s * len(sent))
    domain = (0.0, width_s * len(sent) / unit)

    def rows(counts: Sequence[int]) -> list[dict[str, float]]:
        heights = [count * per / width_s for count in counts]
        return [{"x": at * width_s / unit, "v": height} for at, height in enumerate([*heights, heights[-1]])]

    def sized(size: Size) -> tuple[drawing.Chart, Frame]:
        frame = _frame(size)
        x = drawing.across(domain, drawing.axis(f"{name} from the start", 5, orient="bottom", grid=False))
        y = alt.Y("v:Q", scale=alt.Scale(zero=True), axis=drawing.upright(f"per {per_name}", 4, max(*sent, *answered)))
        layers = [
            alt.Chart(alt.InlineData(values=rows(counts)))
            .mark_line(color=ink.value, strokeWidth=2, strokeDash=dash, interpolate="step-after")
            .encode(x=x, y=y)
            for counts, ink, dash in ((sent, Ink.TEXT, [4, 3]), (answered, Ink.FOUND, [1, 0]))
        ]
        told = [{"px": 50, "py": -19, "text": "sent (dashed)"}]
        both = [{"px": 150, "py": -19, "text": "answered (solid)"}]
        return alt.layer(*layers, drawing.texts(told, Ink.TEXT), drawing.texts(both, Ink.FOUND)), frame

    return drawing.picture((NARROW, HALF), sized, label)


def limited(traffic: Traffic, label: str) -> Picture | None:
    """Draw when the API asked to slow down."""
    counts, width_s = _thinned(traffic.rate_limited, traffic), _width(traffic)
    if not any(counts):
        return None
    unit, name = _unit(width_s * len(counts))
    domain = (0.0, width_s * len(counts) / unit)
    rows = [
        {"x": at * width_s / unit, "x2": (at + 0.9) * width_s / unit, "v": 0, "v2": count}
        for at, count in enumerate(counts)
        if count
    ]

    def sized(size: Size) -> tuple[drawing.Chart, Frame]:
        along = drawing.axis(f"{name} from the start", 5, orient="bottom", grid=False)
        upright = drawing.upright("answers 429", 2, _most(rows), tickMinStep=1)
        bars = _standing(rows, drawing.across(domain, along), upright, Ink.TROUBLE)
        return alt.layer(bars), _frame(size, height=PANEL - 70)

    return drawing.picture((NARROW, HALF), sized, label)


def _line(
    values: Sequence[float | None], nights: Sequence[Night], title: str, label: str, **axis: str
) -> Picture | None:
    rows = [{"x": place, "v": None if value is None else round(value, 6)} for place, value in enumerate(values)]
    known = [row for row in rows if row["v"] is not None]
    if not known:
        return None

    def sized(size: Size) -> tuple[drawing.Chart, Frame]:
        frame = _frame(size)
        data = alt.InlineData(values=known)
        dots = alt.InlineData(values=known if len(rows) <= MOST_POINTS else known[-1:])
        x = _night_axis(nights, size)
        y = alt.Y(
            "v:Q",
            scale=alt.Scale(zero=True),
            axis=drawing.upright(title, 4, max(row["v"] or 0.0 for row in known), **axis),
        )
        line = alt.Chart(data).mark_line(color=Ink.FOUND.value, strokeWidth=2)
        points = alt.Chart(dots).mark_point(color=Ink.FOUND.value, filled=True, size=36, opacity=1)
        return alt.layer(line.encode(x=x, y=y), points.encode(x=x, y=y)), frame

    return drawing.picture((NARROW, HALF), sized, label)


def _columns(
    rows: Sequence[drawing.Row], nights: Sequence[Night], title: str, label: str, ink: Ink = Ink.FOUND
) -> Picture:
    """Draw a column for each night; those that touch, and very many, are drawn as one shape."""
    touching = len(rows) > MOST_POINTS or all(one["x2"] == other["x"] for one, other in pairwise(rows))

    def sized(size: Size) -> tuple[drawing.Chart, Frame]:
        x, axis = _night_axis(nights, size), drawing.upright(title, 4, _most(rows))
        if not touching:
            return alt.layer(_standing(rows, x, axis, ink)), _frame(size)
        outline = [*({"x": row["x"], "v2": row["v2"]} for row in rows), {"x": rows[-1]["x2"], "v2": rows[-1]["v2"]}]
        shape = alt.Chart(alt.InlineData(values=outline)).mark_area(color=ink.value, interpolate="step-after")
        return alt.layer(shape.encode(x=x, y=alt.Y("v2:Q", axis=axis))), _frame(size)

    return drawing.picture((NARROW, HALF), sized, label)


def _standing(rows: Sequence[drawing.Row], x: alt.X, axis: alt.Axis, ink: Ink) -> alt.Chart:
    """Draw bars that stand, from `x` to `x2`."""
    chart = alt.Chart(alt.InlineData(values=[dict(row) for row in rows])).mark_rect(color=ink.value)
    encoded: alt.Chart = chart.encode(x=x, x2=alt.X2("x2:Q"), y=alt.Y("v:Q", axis=axis), y2=alt.Y2("v2:Q"))
    return encoded


def _night_axis(nights: Sequence[Night], size: Size) -> alt.X:
    """Name a few nights by their days; equal days in a row by their executions."""
    slots = max(len(nights), WEEK)
    room = max(1, (4 if size is NARROW else 6) - 1)
    step = max(1, -(-(len(nights) - 1) // room))
    places = list(range(len(nights) - 1, -1, -step))[::-1]
    days = [words.day(nights[place].started_at) for place in places]
    named = days if len(set(days)) == len(days) else [f"#{nights[place].execution}" for place in places]
    title = "night" if named is days else "execution"
    names = f"({json.dumps(dict(zip(map(str, places), named, strict=True)))})[datum.value]"
    axis = drawing.axis(title, 6, orient="bottom", values=places, labelExpr=names, grid=False)
    return alt.X("x:Q", scale=alt.Scale(domain=[-0.5, slots - 0.5], nice=False), axis=axis)


def _frame(size: Size, height: float = PANEL, top: float = 26) -> Frame:
    return Frame(size, height + top - 26, left=drawing.LEFT, right=18, top=top, bottom=44)


def _unit(longest_s: float) -> tuple[float, str]:
    """Choose what a time axis counts in."""
    if longest_s <= 5 * words.MINUTE_S:
        return 1.0, "seconds"
    if longest_s <= 5 * words.HOUR_S:
        return words.MINUTE_S, "minutes"
    return words.HOUR_S, "hours"


def _most(rows: Sequence[drawing.Row]) -> float:
    return float(max(row["v2"] for row in rows))


def _bins(traffic: Traffic) -> int:
    return -(-max(len(traffic.submitted), len(traffic.answered), len(traffic.rate_limited), 1) // MOST_STEPS)


def _width(traffic: Traffic) -> float:
    return traffic.width_s * _bins(traffic)


def _thinned(counts: Sequence[int], traffic: Traffic) -> list[int]:
    """Add neighbours up, so that a long run has no more points than a chart can show."""
    step = _bins(traffic)
    return [sum(counts[at : at + step]) for at in range(0, len(counts), step)] or [0]

"""Charts over time: by run, by latency, over one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import altair as alt

from enrich.report import drawing
from enrich.report.data import LatencyHistogram, ReportedRun, Traffic
from enrich.report.drawing import HALF, NARROW, ChartColor, ChartFrame, RenderedChart, ScreenSize
from enrich.report.formatting import HOUR_S, MINUTE_S, format_day, format_seconds

#: The axis of runs has at least this many slots; those of future runs are empty.
MIN_SLOTS = 7
#: Above this many, a line marks only its last point, and columns are drawn as one shape.
MAX_POINTS = 40
#: A bar wider than the first by this factor holds all slower tasks.
WIDER_FACTOR = 1.01
#: With more steps than this, neighboring steps are added up.
MAX_STEPS = 90
PANEL_HEIGHT = 216.0


def credits_charts(runs: Sequence[ReportedRun], label: str) -> list[RenderedChart]:
    """Draw the credits of each run, and the cumulative credits up to each run."""
    spent = [run.credits_spent for run in runs]
    own = [{"x": index - 0.38, "x2": index + 0.38, "v": 0, "v2": amount} for index, amount in enumerate(spent)]
    total = [
        {"x": index - 0.5, "x2": index + 0.5, "v": 0, "v2": round(amount, 6)}
        for index, amount in enumerate(accumulate(spent))
    ]
    return [
        _column_chart(own, runs, "credits per run", label),
        _column_chart(total, runs, "credits, all runs so far", f"Cumulative. {label}", ChartColor.PASSED),
    ]


def latency_chart(times: LatencyHistogram, label: str) -> RenderedChart:
    """Draw the histogram of latencies; the median and the 90th percentile are marked."""
    width_s = times.bars[0].end - times.bars[0].start
    slowest = [bar for bar in times.bars[1:] if bar.end - bar.start > width_s * WIDER_FACTOR]
    end_s = slowest[0].start + width_s if slowest else times.bars[-1].end
    unit, name = _time_unit(end_s)
    domain = (times.bars[0].start / unit, max(end_s, times.p90, times.median) / unit)
    marks = [(times.median, f"median {format_seconds(times.median)}"), (times.p90, f"90% {format_seconds(times.p90)}")]
    rows = [
        {"x": bar.start / unit, "x2": min(bar.end, end_s) / unit, "v": 0, "v2": bar.count}
        for bar in times.bars
        if bar.count
    ]
    beyond = [row for row in rows if slowest and row["x"] == slowest[0].start / unit]

    def draw_at_size(size: ScreenSize) -> tuple[drawing.AltairChart, ChartFrame]:
        frame = _make_frame(size, top=44)
        span = (domain[1] - domain[0]) or 1.0
        marked: list[dict[str, float]] = []
        labels: dict[str, list[dict[str, float | str]]] = {"left": [], "right": []}
        for index, (at, text) in enumerate(marks):
            px = frame.inner_width * (at / unit - domain[0]) / span
            top = -28.0 + 16 * index
            marked.append({"x": at / unit, "y": top - 6, "y2": frame.height - frame.top - frame.bottom})
            align, away = ("right", -6) if px > frame.inner_width / 2 else ("left", 6)
            labels[align].append({"px": px + away, "py": top, "text": text})
        axis = drawing.make_axis(f"{name} to result", 5, orient="bottom", grid=False)
        counts = drawing.make_left_axis("tasks", 4, _largest(rows), tickMinStep=1)
        chart = alt.layer(
            _column_marks(rows, drawing.x_scale(domain, axis), counts, ChartColor.PASSED),
            *([_column_marks(beyond, drawing.x_scale(domain, axis), counts, ChartColor.NO_MATCH)] if beyond else []),
            drawing.rule_marks(marked, domain, axis, ChartColor.TEXT),
            *(drawing.text_marks(rows, ChartColor.TEXT, align=align) for align, rows in labels.items()),
        )
        return chart, frame

    return drawing.render_chart((NARROW, HALF), draw_at_size, label)


def traffic_charts(traffic: Traffic, label: str) -> Iterator[RenderedChart]:
    """Draw requests sent and answered over the run, and the 429 responses, where there are any."""
    merged = traffic.merged(MAX_STEPS)
    sent, answered, limited, width_s = merged.submitted, merged.answered, merged.rate_limited, merged.width_s
    per, per_name = (1.0, "second") if max(*sent, *answered) >= width_s else (MINUTE_S, "minute")
    unit, name = _time_unit(width_s * len(sent))

    def time_axis() -> alt.X:
        axis = drawing.make_axis(f"{name} from the start", 5, orient="bottom", grid=False)
        return drawing.x_scale((0.0, width_s * len(sent) / unit), axis)

    def rows(counts: Sequence[int]) -> list[dict[str, float]]:
        heights = [count * per / width_s for count in counts]
        return [{"x": at * width_s / unit, "v": height} for at, height in enumerate([*heights, heights[-1]])]

    def draw_throughput(size: ScreenSize) -> tuple[drawing.AltairChart, ChartFrame]:
        frame, x = _make_frame(size), time_axis()
        y = alt.Y(
            "v:Q", scale=alt.Scale(zero=True), axis=drawing.make_left_axis(f"per {per_name}", 4, max(*sent, *answered))
        )
        layers = [
            alt.Chart(alt.InlineData(values=rows(counts)))
            .mark_line(color=color.value, strokeWidth=2, strokeDash=dash, interpolate="step-after")
            .encode(x=x, y=y)
            for counts, color, dash in ((sent, ChartColor.TEXT, [4, 3]), (answered, ChartColor.FOUND, [1, 0]))
        ]
        sent_label = [{"px": 50, "py": -19, "text": "sent (dashed)"}]
        answered_label = [{"px": 150, "py": -19, "text": "results (solid)"}]
        return alt.layer(
            *layers,
            drawing.text_marks(sent_label, ChartColor.TEXT),
            drawing.text_marks(answered_label, ChartColor.FOUND),
        ), frame

    def draw_limited(size: ScreenSize) -> tuple[drawing.AltairChart, ChartFrame]:
        bars = [
            {"x": at * width_s / unit, "x2": (at + 0.9) * width_s / unit, "v": 0, "v2": count}
            for at, count in enumerate(limited)
            if count
        ]
        upright = drawing.make_left_axis("rate-limited (429)", 2, _largest(bars), tickMinStep=1)
        marks = _column_marks(bars, time_axis(), upright, ChartColor.FAILED)
        return alt.layer(marks), _make_frame(size, height=PANEL_HEIGHT - 70)

    if any(sent) or any(answered):
        yield drawing.render_chart((NARROW, HALF), draw_throughput, label)
    if any(limited):
        yield drawing.render_chart((NARROW, HALF), draw_limited, label)


def line_chart(
    values: Sequence[float | None], runs: Sequence[ReportedRun], title: str, label: str, **axis: str
) -> RenderedChart:
    """Draw a value of each run; runs without it (None) are left out. `axis` has Altair's arguments."""
    known = [{"x": index, "v": round(value, 6)} for index, value in enumerate(values) if value is not None]

    def draw_at_size(size: ScreenSize) -> tuple[drawing.AltairChart, ChartFrame]:
        frame = _make_frame(size)
        data = alt.InlineData(values=known)
        dots = alt.InlineData(values=known if len(runs) <= MAX_POINTS else known[-1:])
        x = _run_axis(runs, size)
        y = alt.Y(
            "v:Q",
            scale=alt.Scale(zero=True),
            axis=drawing.make_left_axis(title, 4, max(row["v"] for row in known), **axis),
        )
        line = alt.Chart(data).mark_line(color=ChartColor.FOUND.value, strokeWidth=2)
        points = alt.Chart(dots).mark_point(color=ChartColor.FOUND.value, filled=True, size=36, opacity=1)
        return alt.layer(line.encode(x=x, y=y), points.encode(x=x, y=y)), frame

    return drawing.render_chart((NARROW, HALF), draw_at_size, label)


def _column_chart(
    rows: Sequence[drawing.ChartRow],
    runs: Sequence[ReportedRun],
    title: str,
    label: str,
    color: ChartColor = ChartColor.FOUND,
) -> RenderedChart:
    """Draw a column for each run; touching columns, and more than MAX_POINTS, are drawn as one shape."""
    touching = len(rows) > MAX_POINTS or all(one["x2"] == other["x"] for one, other in pairwise(rows))

    def draw_at_size(size: ScreenSize) -> tuple[drawing.AltairChart, ChartFrame]:
        x, axis = _run_axis(runs, size), drawing.make_left_axis(title, 4, _largest(rows))
        if not touching:
            return alt.layer(_column_marks(rows, x, axis, color)), _make_frame(size)
        outline = [*({"x": row["x"], "v2": row["v2"]} for row in rows), {"x": rows[-1]["x2"], "v2": rows[-1]["v2"]}]
        shape = alt.Chart(alt.InlineData(values=outline)).mark_area(color=color.value, interpolate="step-after")
        return alt.layer(shape.encode(x=x, y=alt.Y("v2:Q", axis=axis))), _make_frame(size)

    return drawing.render_chart((NARROW, HALF), draw_at_size, label)


def _column_marks(rows: Sequence[drawing.ChartRow], x: alt.X, axis: alt.Axis, color: ChartColor) -> alt.Chart:
    """Draw vertical bars from `x` to `x2`."""
    chart = alt.Chart(alt.InlineData(values=[dict(row) for row in rows])).mark_rect(color=color.value)
    encoded: alt.Chart = chart.encode(x=x, x2=alt.X2("x2:Q"), y=alt.Y("v:Q", axis=axis), y2=alt.Y2("v2:Q"))
    return encoded


def _run_axis(runs: Sequence[ReportedRun], size: ScreenSize) -> alt.X:
    """Label a few runs with their day, or with their number when a day repeats."""
    slots = max(len(runs), MIN_SLOTS)
    room = max(1, (4 if size is NARROW else 6) - 1)
    step = max(1, -(-(len(runs) - 1) // room))
    indexes = list(range(len(runs) - 1, -1, -step))[::-1]
    days = [format_day(runs[index].started_at) for index in indexes]
    labels = days if len(set(days)) == len(days) else [f"#{runs[index].execution}" for index in indexes]
    names = f"({json.dumps(dict(zip(map(str, indexes), labels, strict=True)))})[datum.value]"
    axis = drawing.make_axis("run", 6, orient="bottom", values=indexes, labelExpr=names, grid=False)
    return alt.X("x:Q", scale=alt.Scale(domain=[-0.5, slots - 0.5], nice=False), axis=axis)


def _make_frame(size: ScreenSize, height: float = PANEL_HEIGHT, top: float = 26) -> ChartFrame:
    return ChartFrame(size, height + top - 26, left=drawing.LEFT_MARGIN, right=18, top=top, bottom=44)


def _time_unit(longest_s: float) -> tuple[float, str]:
    """Choose the unit of a time axis: its length in seconds, and its name."""
    if longest_s <= 5 * MINUTE_S:
        return 1.0, "seconds"
    if longest_s <= 5 * HOUR_S:
        return MINUTE_S, "minutes"
    return HOUR_S, "hours"


def _largest(rows: Sequence[drawing.ChartRow]) -> float:
    return float(max(row["v2"] for row in rows))

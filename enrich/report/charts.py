"""Charts as inline SVG with the page's colors: what all of them share, and those over time and of latencies.

A chart is drawn once for each screen size, because scaled text would become unreadable; the CSS shows one of them. All
lengths are set explicitly, so the result does not depend on the fonts of the machine that draws.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import accumulate, pairwise
from typing import Any

import vl_convert
from markupsafe import Markup
from msgspec import Struct

from enrich.report.data import LatencyHistogram, ReportedRun, Traffic
from enrich.report.formatting import HOUR_S, LARGE_CREDITS, MINUTE_S, format_day, format_seconds

NAME_PX = 13
TEXT_PX = 12
#: Pixels for the numbers of an axis on the left.
LEFT_MARGIN = 46.0


class ChartColor(StrEnum):
    """Placeholder colors, replaced by the page's CSS variables `--ink-…` (light, dark and print)."""

    TEXT = "#fe0001"
    MUTED = "#fe0002"
    RULE = "#fe0003"
    FOUND = "#fe0004"
    PASSED = "#fe0005"
    NO_MATCH = "#fe0006"
    TRACK = "#fe0007"
    FAILED = "#fe0008"


class ScreenSize(Struct, frozen=True):
    """A chart's width in pixels, and the CSS class of the screens it is for."""

    name: str
    width: int


NARROW = ScreenSize("narrow", 350)
#: Half of the page: all charts but the waterfall.
HALF = ScreenSize("wide", 470)
MEDIUM = ScreenSize("medium", 740)
FULL = ScreenSize("wide", 980)


class RenderedChart(Struct, frozen=True):
    """A chart in all its sizes; `height` in pixels is that of the first size, the narrow one."""

    svg: Markup
    height: float


#: A part of a specification of Vega-Lite: a layer, an axis, a channel.
Spec = dict[str, Any]
#: The values that one mark is drawn from.
ChartRow = Mapping[str, Any]

_COLOR = re.compile(r'"(#fe000[1-8])"')
_LONG_NUMBER = re.compile(r"(?<![#\w])-?\d+\.\d{3,}")
_TAG = re.compile(r"<[^>]*>")
_NOISE = re.compile(
    r'<path class="(?:background|foreground)"[^>]*/>| (?:pointer-events|aria-hidden|role|class|aria-roledescription|'
    r'xmlns|xmlns:xlink|version|font-family)="[^"]*"| opacity="1"'
)
_SVG = re.compile(r'<svg width="(\d+)" height="(\d+)" viewBox="[^"]*">')
_CONFIG: Spec = {
    "view": {"stroke": None},
    "axis": {
        **dict.fromkeys(("labelFontSize", "titleFontSize"), TEXT_PX),
        **dict.fromkeys(("labelColor", "titleColor"), ChartColor.MUTED),
        **dict.fromkeys(("gridColor", "domainColor", "tickColor"), ChartColor.RULE),
        **dict.fromkeys(("domain", "ticks"), False),
        "titleFontWeight": "normal",
        "labelPadding": 6,
        "titlePadding": 8,
    },
    "axisLeft": {
        "titleAngle": 0,
        "titleAlign": "left",
        "titleBaseline": "bottom",
        "titleX": -LEFT_MARGIN,
        "titleY": -13,
    },
}


class ChartFrame(Struct, frozen=True):
    """Margins around the marks of a chart, and its total height, in pixels."""

    size: ScreenSize
    height: float
    left: float = 0
    right: float = 0
    top: float = 0
    bottom: float = 0

    @property
    def inner_width(self) -> float:
        """Width for the marks, without margins."""
        return self.size.width - self.left - self.right

    @property
    def inner_height(self) -> float:
        """Height for the marks, without margins."""
        return self.height - self.top - self.bottom


#: The layers of a chart in one size, and their frame.
Drawing = tuple[list[Spec], ChartFrame]


def render_chart(
    sizes: Sequence[ScreenSize], draw_at_size: Callable[[ScreenSize], Drawing], label: str
) -> RenderedChart:
    """Draw a chart in each size; `label` is its text for screen readers."""
    drawn = [draw_at_size(size) for size in sizes]
    return RenderedChart(Markup("\n").join(_to_svg(*each, label) for each in drawn), drawn[0][1].height)


def _to_svg(layers: list[Spec], frame: ChartFrame, label: str) -> Markup:
    spec = {
        "layer": layers,
        "width": frame.inner_width,
        "height": frame.inner_height,
        "padding": {"left": frame.left, "right": frame.right, "top": frame.top, "bottom": frame.bottom},
        "autosize": "none",
        "background": "transparent",
        "config": _CONFIG,
    }
    drawn = _TAG.sub(lambda tag: _clean_tag(tag[0]), vl_convert.vegalite_to_svg(spec))
    start_tag = Markup(
        '<svg class="chart {0}" role="img" aria-label="{1}" viewBox="0 0 {2} {3}" width="{2}" height="{3}">'
    ).format(frame.size.name, label, frame.size.width, round(frame.height))
    return start_tag + Markup(_SVG.sub("", drawn, count=1))  # noqa: S704 - Vega escapes text


def _clean_tag(tag: str) -> str:
    """Remove attributes that only SVG editors need, shorten numbers, and insert the CSS colors."""
    tag = _COLOR.sub(lambda color: f'"var(--ink-{ChartColor(color[1]).name.lower()})"', _NOISE.sub("", tag))
    return _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), tag)


def make_marks(kind: str, rows: Sequence[ChartRow], color: ChartColor, encoding: Spec, **style: object) -> Spec:
    """Make a layer with a mark of this kind for the rows; a line or an area is one mark for all of them."""
    mark = {"type": kind, "color": color, **style}
    return {"mark": mark, "data": {"values": rows}, "encoding": encoding}


def rect_marks(rows: Sequence[ChartRow], x: Spec, color: ChartColor, **style: object) -> Spec:
    """Draw horizontal bars: from `x` to `x2` in the domain, from `y` to `y2` in pixels; layers share one axis."""
    encoding = {"x": x, "x2": {"field": "x2"}, "y": _in_pixels("y"), "y2": {"field": "y2"}}
    return make_marks("rect", rows, color, encoding, **style)


def text_marks(rows: Sequence[ChartRow], color: ChartColor, **style: object) -> Spec:
    """Draw texts at `px`, `py` in pixels from the upper left corner of the marks."""
    encoding = {"x": _in_pixels("px"), "y": _in_pixels("py"), "text": {"field": "text", "type": "nominal"}}
    style = {"align": "left", "baseline": "middle", "fontSize": TEXT_PX, **style}
    return make_marks("text", rows, color, encoding, **style)


def rule_marks(rows: Sequence[ChartRow], x: Spec, color: ChartColor, **style: object) -> Spec:
    """Draw vertical lines: at `x` in the domain, from `y` to `y2` in pixels."""
    encoding = {"x": x, "y": _in_pixels("y"), "y2": {"field": "y2"}}
    return make_marks("rule", rows, color, encoding, strokeWidth=1, **style)


def _in_pixels(field: str) -> Spec:
    return {"field": field, "type": "quantitative", "scale": None, "axis": None}


def x_scale(domain: tuple[float, float], axis: Spec | None) -> Spec:
    """Scale `x` to exactly this domain."""
    return {
        "field": "x",
        "type": "quantitative",
        "scale": {"domain": domain, "nice": False, "zero": False},
        "axis": axis,
    }


def make_axis(title: str, ticks: int, **more: object) -> Spec:
    """Make an axis; `more` are further properties of Vega-Lite."""
    return {"title": title, "tickCount": ticks, "format": ",~f", **more}


# Over time and of latencies

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
        _column_chart(own, runs, "credits per run", label, ChartColor.FOUND),
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
    x = x_scale(domain, make_axis(f"{name} to result", 5, grid=False))
    y = _left_scale("v", "tasks", 4, _largest(rows), tickMinStep=1)

    def draw_at_size(size: ScreenSize) -> Drawing:
        frame = _make_frame(size, top=44)
        marked: list[ChartRow] = []
        labels: dict[str, list[ChartRow]] = {"left": [], "right": []}
        for index, (at, text) in enumerate(marks):
            px = frame.inner_width * (at / unit - domain[0]) / ((domain[1] - domain[0]) or 1.0)
            top = -28.0 + 16 * index
            marked.append({"x": at / unit, "y": top - 6, "y2": frame.inner_height})
            align, away = ("right", -6) if px > frame.inner_width / 2 else ("left", 6)
            labels[align].append({"px": px + away, "py": top, "text": text})
        layers = [
            _column_marks(rows, x, y, ChartColor.PASSED),
            *([_column_marks(beyond, x, y, ChartColor.NO_MATCH)] if beyond else []),
            rule_marks(marked, x, ChartColor.TEXT),
            *(text_marks(texts, ChartColor.TEXT, align=align) for align, texts in labels.items()),
        ]
        return layers, frame

    return render_chart((NARROW, HALF), draw_at_size, label)


def traffic_charts(traffic: Traffic, label: str) -> Iterator[RenderedChart]:
    """Draw requests sent and answered over the run, and the 429 responses, where there are any."""
    merged = traffic.merged(MAX_STEPS)
    sent, answered, limited, width_s = merged.submitted, merged.answered, merged.rate_limited, merged.width_s
    per, per_name = (1.0, "second") if max(*sent, *answered) >= width_s else (MINUTE_S, "minute")
    unit, name = _time_unit(width_s * len(sent))
    x = x_scale((0.0, width_s * len(sent) / unit), make_axis(f"{name} from the start", 5, grid=False))

    def rows(counts: Sequence[int]) -> list[ChartRow]:
        heights = [count * per / width_s for count in counts]
        return [{"x": at * width_s / unit, "v": height} for at, height in enumerate([*heights, heights[-1]])]

    def draw_throughput(size: ScreenSize) -> Drawing:
        encoding = {"x": x, "y": _left_scale("v", f"per {per_name}", 4, max(*sent, *answered))}
        layers = [
            make_marks("line", rows(counts), color, encoding, strokeWidth=2, strokeDash=dash, interpolate="step-after")
            for counts, color, dash in ((sent, ChartColor.TEXT, [4, 3]), (answered, ChartColor.FOUND, [1, 0]))
        ]
        sent_label = [{"px": 50, "py": -19, "text": "sent (dashed)"}]
        answered_label = [{"px": 150, "py": -19, "text": "results (solid)"}]
        layers += [text_marks(sent_label, ChartColor.TEXT), text_marks(answered_label, ChartColor.FOUND)]
        return layers, _make_frame(size)

    def draw_limited(size: ScreenSize) -> Drawing:
        bars = [
            {"x": at * width_s / unit, "x2": (at + 0.9) * width_s / unit, "v": 0, "v2": count}
            for at, count in enumerate(limited)
            if count
        ]
        y = _left_scale("v", "rate-limited (429)", 2, _largest(bars), tickMinStep=1)
        return [_column_marks(bars, x, y, ChartColor.FAILED)], _make_frame(size, height=PANEL_HEIGHT - 70)

    if any(sent) or any(answered):
        yield render_chart((NARROW, HALF), draw_throughput, label)
    if any(limited):
        yield render_chart((NARROW, HALF), draw_limited, label)


def line_chart(
    values: Sequence[float | None], runs: Sequence[ReportedRun], title: str, label: str, **axis: str
) -> RenderedChart:
    """Draw a value of each run; runs without it (None) are left out. `axis` has properties of Vega-Lite."""
    known = [{"x": index, "v": round(value, 6)} for index, value in enumerate(values) if value is not None]
    y = _left_scale("v", title, 4, max(row["v"] for row in known), **axis)

    def draw_at_size(size: ScreenSize) -> Drawing:
        encoding = {"x": _run_scale(runs, size), "y": y}
        dots = known if len(runs) <= MAX_POINTS else known[-1:]
        line = make_marks("line", known, ChartColor.FOUND, encoding, strokeWidth=2)
        points = make_marks("point", dots, ChartColor.FOUND, encoding, filled=True, size=36, opacity=1)
        return [line, points], _make_frame(size)

    return render_chart((NARROW, HALF), draw_at_size, label)


def _column_chart(
    rows: Sequence[ChartRow], runs: Sequence[ReportedRun], title: str, label: str, color: ChartColor
) -> RenderedChart:
    """Draw a column for each run; touching columns, and more than MAX_POINTS, are drawn as one shape."""
    touching = len(rows) > MAX_POINTS or all(one["x2"] == other["x"] for one, other in pairwise(rows))
    outline = [*({"x": row["x"], "v2": row["v2"]} for row in rows), {"x": rows[-1]["x2"], "v2": rows[-1]["v2"]}]
    y = _left_scale("v2" if touching else "v", title, 4, _largest(rows))

    def draw_at_size(size: ScreenSize) -> Drawing:
        x = _run_scale(runs, size)
        if not touching:
            return [_column_marks(rows, x, y, color)], _make_frame(size)
        return [make_marks("area", outline, color, {"x": x, "y": y}, interpolate="step-after")], _make_frame(size)

    return render_chart((NARROW, HALF), draw_at_size, label)


def _column_marks(rows: Sequence[ChartRow], x: Spec, y: Spec, color: ChartColor) -> Spec:
    """Draw vertical bars from `x` to `x2`."""
    return make_marks("rect", rows, color, {"x": x, "x2": {"field": "x2"}, "y": y, "y2": {"field": "v2"}})


def _left_scale(field: str, title: str, ticks: int, largest: float, **axis: object) -> Spec:
    """Scale a field from 0 to about `largest`."""
    large = {"format": "~s"} if largest >= LARGE_CREDITS else {}
    left_axis = make_axis(title, ticks, **large, **axis)
    return {"field": field, "type": "quantitative", "scale": {"zero": True}, "axis": left_axis}


def _run_scale(runs: Sequence[ReportedRun], size: ScreenSize) -> Spec:
    """Label a few runs with their day, or with their number when a day repeats."""
    slots = max(len(runs), MIN_SLOTS)
    room = 3 if size is NARROW else 5
    step = max(1, -(-(len(runs) - 1) // room))
    indexes = list(range(len(runs) - 1, -1, -step))[::-1]
    days = [format_day(runs[index].started_at) for index in indexes]
    labels = days if len(set(days)) == len(days) else [f"#{runs[index].execution}" for index in indexes]
    names = f"({json.dumps(dict(zip(map(str, indexes), labels, strict=True)))})[datum.value]"
    axis = make_axis("run", 6, values=indexes, labelExpr=names, grid=False)
    return x_scale((-0.5, slots - 0.5), axis)


def _make_frame(size: ScreenSize, height: float = PANEL_HEIGHT, top: float = 26) -> ChartFrame:
    return ChartFrame(size, height + top - 26, left=LEFT_MARGIN, right=18, top=top, bottom=44)


def _time_unit(longest_s: float) -> tuple[float, str]:
    """Choose the unit of a time axis: its length in seconds, and its name."""
    if longest_s <= 5 * MINUTE_S:
        return 1.0, "seconds"
    if longest_s <= 5 * HOUR_S:
        return MINUTE_S, "minutes"
    return HOUR_S, "hours"


def _largest(rows: Sequence[ChartRow]) -> float:
    return float(max(row["v2"] for row in rows))

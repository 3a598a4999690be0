"""Renders Altair charts as inline SVG with the page's colors.

A chart is drawn once for each screen size, because scaled text would become unreadable; the CSS shows one of them. All
lengths are set explicitly, so the result does not depend on the fonts of the machine that draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import altair as alt
import vl_convert
from altair.utils.schemapi import debug_mode
from markupsafe import Markup
from msgspec import Struct

from enrich.report import formatting

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


ChartRow = Mapping[str, Any]
AltairChart = alt.LayerChart | alt.FacetChart

_COLOR = re.compile(r'"(#fe000[1-8])"')
_LONG_NUMBER = re.compile(r"(?<![#\w])-?\d+\.\d{3,}")
_TAG = re.compile(r"<[^>]*>")
_NOISE = re.compile(
    r'<path class="(?:background|foreground)"[^>]*/>| (?:pointer-events|aria-hidden|role|class|aria-roledescription|'
    r'xmlns|xmlns:xlink|version|font-family)="[^"]*"| opacity="1"'
)
_SVG = re.compile(r'<svg width="(\d+)" height="(\d+)" viewBox="[^"]*">')


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


def render_chart(
    sizes: Sequence[ScreenSize], draw_at_size: Callable[[ScreenSize], tuple[AltairChart, ChartFrame]], label: str
) -> RenderedChart:
    """Draw a chart in each size; `label` is its text for screen readers."""
    with debug_mode(arg=False):  # these charts are no user input, and validating takes longer than drawing
        drawn = [draw_at_size(size) for size in sizes]
        return RenderedChart(Markup("\n").join(_to_svg(*each, label) for each in drawn), drawn[0][1].height)


def _to_svg(chart: AltairChart, frame: ChartFrame, label: str) -> Markup:
    spec = chart.to_dict(validate=False) | {
        "width": frame.inner_width,
        "height": frame.height - frame.top - frame.bottom,
        "padding": {"left": frame.left, "right": frame.right, "top": frame.top, "bottom": frame.bottom},
        "autosize": "none",
        "background": "transparent",
        "config": {"view": {"stroke": None}},
    }
    drawn = vl_convert.vegalite_to_svg(spec)
    drawn = _TAG.sub(lambda tag: _clean_tag(tag[0]), drawn)
    start_tag = (
        Markup('<svg class="chart {}" role="img" aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">')
    ).format(frame.size.name, label, frame.size.width, round(frame.height), frame.size.width, round(frame.height))
    return start_tag + Markup(_SVG.sub("", drawn, count=1))  # noqa: S704 - Vega escapes text


def _clean_tag(tag: str) -> str:
    """Remove attributes that only SVG editors need, shorten numbers, and insert the CSS colors."""
    tag = _COLOR.sub(lambda color: f'"var(--ink-{ChartColor(color[1]).name.lower()})"', _NOISE.sub("", tag))
    return _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), tag)


def rect_marks(
    rows: Sequence[ChartRow],
    domain: tuple[float, float],
    axis: alt.Axis | None,
    color: ChartColor,
    **style: Any,  # noqa: ANN401 - Altair's arguments
) -> alt.Chart:
    """Draw horizontal bars: from `x` to `x2` in the domain, from `y` to `y2` in pixels; layers share one axis."""
    return _make_marks(rows, alt.Chart.mark_rect, color, style).encode(
        x=x_scale(domain, axis), x2=alt.X2("x2:Q"), y=_pixel_channel("y", alt.Y), y2=alt.Y2("y2:Q")
    )


def text_marks(rows: Sequence[ChartRow], color: ChartColor, **style: Any) -> alt.Chart:  # noqa: ANN401 - Altair's arguments
    """Draw texts at `px`, `py` in pixels from the upper left corner of the marks."""
    style = {"align": "left", "baseline": "middle", "fontSize": TEXT_PX, **style}
    encoded = _make_marks(rows, alt.Chart.mark_text, color, style)
    return encoded.encode(x=_pixel_channel("px", alt.X), y=_pixel_channel("py", alt.Y), text=alt.Text("text:N"))


def rule_marks(
    rows: Sequence[ChartRow],
    domain: tuple[float, float],
    axis: alt.Axis | None,
    color: ChartColor,
    **style: Any,  # noqa: ANN401 - Altair's arguments
) -> alt.Chart:
    """Draw vertical lines: at `x` in the domain, from `y` to `y2` in pixels."""
    return _make_marks(rows, alt.Chart.mark_rule, color, {"strokeWidth": 1, **style}).encode(
        x=x_scale(domain, axis), y=_pixel_channel("y", alt.Y), y2=alt.Y2("y2:Q")
    )


def x_scale(domain: tuple[float, float], axis: alt.Axis | None) -> alt.X:
    """Scale `x` to exactly this domain."""
    return alt.X("x:Q", scale=alt.Scale(domain=domain, nice=False, zero=False), axis=axis)


def make_axis(title: str, ticks: int, **more: Any) -> alt.Axis:  # noqa: ANN401 - Altair's arguments
    """Make an axis without a line and without ticks; `more` are Altair's arguments."""
    return alt.Axis(
        **{
            "title": title,
            "tickCount": ticks,
            "format": ",~f",
            "labelFontSize": TEXT_PX,
            "titleFontSize": TEXT_PX,
            "titleFontWeight": "normal",
            "labelColor": ChartColor.MUTED.value,
            "titleColor": ChartColor.MUTED.value,
            "gridColor": ChartColor.RULE.value,
            "domainColor": ChartColor.RULE.value,
            "tickColor": ChartColor.RULE.value,
            "domain": False,
            "ticks": False,
            "labelPadding": 6,
            "titlePadding": 8,
            **more,
        }
    )


def make_left_axis(title: str, ticks: int, largest: float, **more: Any) -> alt.Axis:  # noqa: ANN401 - Altair's arguments
    """Make an axis on the left for values up to `largest`, its title horizontal and above it."""
    large = {"format": "~s"} if largest >= formatting.LARGE_CREDITS else {}
    placed = {"titleAngle": 0, "titleAlign": "left", "titleBaseline": "bottom", "titleX": -LEFT_MARGIN, "titleY": -13}
    return make_axis(title, ticks, orient="left", **{**placed, **large, **more})


def _make_marks(
    rows: Sequence[ChartRow], mark: Callable[..., alt.Chart], color: ChartColor, style: Mapping[str, Any]
) -> alt.Chart:
    return mark(alt.Chart(alt.InlineData(values=[dict(row) for row in rows])), color=color.value, **style)


def _pixel_channel(name: str, channel: type[Any]) -> Any:  # noqa: ANN401 - X or Y
    return channel(f"{name}:Q", scale=None, axis=None)

"""How a picture comes to the page: an Altair chart becomes inline SVG whose colours are the page's.

A chart is drawn once for each size of screen, so that its text is never scaled to where nobody can read it; the style
shows one of them. All lengths are given, so that nothing depends on the fonts of the machine that draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import altair as alt
import vl_convert
from altair.utils.schemapi import debug_mode
from markupsafe import Markup

from enrich.report import words

NAME_PX = 13
TEXT_PX = 12
#: The room for the numbers of an axis on the left.
LEFT = 46.0


class Ink(StrEnum):
    """Colours that stand for the page's own: `--ink-…` in its style, in light, dark and print."""

    TEXT = "#fe0001"
    MUTED = "#fe0002"
    RULE = "#fe0003"
    FOUND = "#fe0004"
    PASSED = "#fe0005"
    NOBODY = "#fe0006"
    TRACK = "#fe0007"
    TROUBLE = "#fe0008"


@dataclass(frozen=True, slots=True)
class Size:
    """A width in pixels and the screens it is for, as a class of the style."""

    name: str
    width: int


NARROW = Size("narrow", 350)
#: Half the page, for all charts but the waterfall.
HALF = Size("wide", 470)
MEDIUM = Size("medium", 688)
FULL = Size("wide", 980)


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart in all its sizes; `height` is that on a narrow screen."""

    svg: Markup
    height: float


Row = Mapping[str, Any]
Chart = alt.LayerChart | alt.FacetChart

_INK = re.compile(r'"(#fe000[1-8])"')
_LONG_NUMBER = re.compile(r"(?<![#\w])-?\d+\.\d{3,}")
_TAG = re.compile(r"<[^>]*>")
_NOISE = re.compile(
    r'<path class="(?:background|foreground)"[^>]*/>| (?:pointer-events|aria-hidden|role|class|aria-roledescription|'
    r'xmlns|xmlns:xlink|version|font-family)="[^"]*"| opacity="1"'
)
_SVG = re.compile(r'<svg width="(\d+)" height="(\d+)" viewBox="[^"]*">')


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the marks of a chart are inside of it: pixels around them, and the height of the whole."""

    size: Size
    height: float
    left: float = 0
    right: float = 0
    top: float = 0
    bottom: float = 0

    @property
    def inner(self) -> float:
        """How wide the marks may become."""
        return self.size.width - self.left - self.right


def picture(sizes: Sequence[Size], draw: Callable[[Size], tuple[Chart, Frame]], label: str) -> Picture:
    """Draw a chart in each of the sizes; `label` is what is said of it to those who can't see it."""
    with debug_mode(arg=False):  # what is drawn here is no user's chart: to validate it takes longer than to draw it
        drawn = [draw(size) for size in sizes]
        return Picture(Markup("\n").join(_svg(*each, label) for each in drawn), drawn[0][1].height)


def _svg(chart: Chart, frame: Frame, label: str) -> Markup:
    inside = {"left": frame.left, "right": frame.right, "top": frame.top, "bottom": frame.bottom}
    whole = chart.properties(
        width=frame.inner,
        height=frame.height - frame.top - frame.bottom,
        padding=inside,
        autosize="none",
        background="transparent",
    ).configure_view(stroke=None)
    drawn = vl_convert.vegalite_to_svg(whole.to_dict(validate=False))
    drawn = _TAG.sub(lambda tag: _tidy(tag[0]), drawn)
    opened = (
        Markup('<svg class="chart {}" role="img" aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">')
    ).format(frame.size.name, label, frame.size.width, round(frame.height), frame.size.width, round(frame.height))
    return opened + Markup(_SVG.sub("", drawn, count=1))  # noqa: S704 - written by Vega, which escapes


def _tidy(tag: str) -> str:
    """Take away what only an editor of SVG needs, and name the colours."""
    tag = _INK.sub(lambda ink: f'"var(--ink-{Ink(ink[1]).name.lower()})"', _NOISE.sub("", tag))
    return _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), tag)


def rects(rows: Sequence[Row], domain: tuple[float, float], axis: alt.Axis | None, ink: Ink, **style: Any) -> alt.Chart:  # noqa: ANN401 - what Altair takes
    """Bars that lie: from `x` to `x2` in the domain, from `y` to `y2` in pixels; layers share one axis."""
    return _chart(rows, alt.Chart.mark_rect, ink, style).encode(
        x=across(domain, axis),
        x2=alt.X2("x2:Q"),
        y=_pixels("y", alt.Y),
        y2=alt.Y2("y2:Q"),
    )


def texts(rows: Sequence[Row], ink: Ink, **style: Any) -> alt.Chart:  # noqa: ANN401 - what Altair takes
    """Texts at `px`, `py` in pixels from the marks' left upper corner."""
    style = {"align": "left", "baseline": "middle", "fontSize": TEXT_PX, **style}
    encoded = _chart(rows, alt.Chart.mark_text, ink, style)
    return encoded.encode(x=_pixels("px", alt.X), y=_pixels("py", alt.Y), text=alt.Text("text:N"))


def rules(rows: Sequence[Row], domain: tuple[float, float], axis: alt.Axis | None, ink: Ink, **style: Any) -> alt.Chart:  # noqa: ANN401 - what Altair takes
    """Rules that stand: at `x` in the domain, from `y` to `y2` in pixels."""
    return _chart(rows, alt.Chart.mark_rule, ink, {"strokeWidth": 1, **style}).encode(
        x=across(domain, axis),
        y=_pixels("y", alt.Y),
        y2=alt.Y2("y2:Q"),
    )


def across(domain: tuple[float, float], axis: alt.Axis | None) -> alt.X:
    """Lay `x` out over just this domain."""
    return alt.X("x:Q", scale=alt.Scale(domain=domain, nice=False, zero=False), axis=axis)


def axis(title: str, ticks: int, **more: Any) -> alt.Axis:  # noqa: ANN401 - what Altair takes
    """Make a quiet axis; `more` as Altair has it."""
    return alt.Axis(
        **{
            "title": title,
            "tickCount": ticks,
            "format": ",~f",
            "labelFontSize": TEXT_PX,
            "titleFontSize": TEXT_PX,
            "titleFontWeight": "normal",
            "labelColor": Ink.MUTED.value,
            "titleColor": Ink.MUTED.value,
            "gridColor": Ink.RULE.value,
            "domainColor": Ink.RULE.value,
            "tickColor": Ink.RULE.value,
            "domain": False,
            "ticks": False,
            "labelPadding": 6,
            "titlePadding": 8,
            **more,
        }
    )


def upright(title: str, ticks: int, most: float, **more: Any) -> alt.Axis:  # noqa: ANN401 - what Altair takes
    """Make a quiet axis on the left for values up to `most`, its title lying above it."""
    large = {"format": "~s"} if most >= words.LARGE else {}
    placed = {"titleAngle": 0, "titleAlign": "left", "titleBaseline": "bottom", "titleX": -LEFT, "titleY": -13}
    return axis(title, ticks, orient="left", **{**placed, **large, **more})


def _chart(rows: Sequence[Row], mark: Callable[..., alt.Chart], ink: Ink, style: Mapping[str, Any]) -> alt.Chart:
    return mark(alt.Chart(alt.InlineData(values=[dict(row) for row in rows])), color=ink.value, **style)


def _pixels(name: str, channel: type[Any]) -> Any:  # noqa: ANN401 - X or Y
    return channel(f"{name}:Q", scale=None, axis=None)

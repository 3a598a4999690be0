"""The picture of a waterfall: finds make a staircase, and what nobody found is left over at its foot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from enrich.model import many
from enrich.report import drawing, words
from enrich.report.drawing import FULL, MEDIUM, NAME_PX, NARROW, Frame, Ink, Picture, Size
from enrich.report.facts import Provider, Waterfall

NOBODY = "Nobody found"
#: The columns of numbers right of the bars, with their right edges.
COLUMNS = {"asked": 82.0, "found": 164.0, "of asked": 226.0, "credits": 310.0, "per hit": 372.0}
#: Names have so much room at most, and so much at least.
NAMES = (110.0, 230.0)


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the picture: `found` from `start` on, then what was passed on, the last part of it `presumed`."""

    name: str
    start: int
    found: int
    end: int
    presumed: int = 0
    provider: Provider | None = None


def steps(waterfall: Waterfall) -> list[Step]:
    """Put the finds of each provider behind those of the ones before it."""
    made: list[Step] = []
    start = 0
    for each in waterfall.providers:
        if each.verifies:
            continue
        end = start + max(each.asked + each.presumed, each.found)
        presumed = min(each.presumed, end - start - each.found)
        made.append(Step(words.clean(each.name), start, each.found, end, presumed, each))
        start += each.found
    left = max(0, waterfall.answers - waterfall.found)
    return [*made, Step(NOBODY, max(0, waterfall.answers - left), 0, max(waterfall.answers, left))]


def draw(waterfall: Waterfall, label: str, sizes: Sequence[Size] = (NARROW, MEDIUM, FULL)) -> Picture:
    """Draw the staircase for narrow, middling and wide screens, or for less room."""
    made = steps(waterfall)

    def sized(size: Size) -> tuple[drawing.Chart, Frame]:
        return _beside(made, size) if size is FULL else _stacked(made, size)

    return drawing.picture(sizes, sized, label)


def _beside(made: Sequence[Step], size: Size) -> tuple[drawing.Chart, Frame]:
    """Draw names left of the bars and columns of numbers right of them."""
    pitch, bar = 36.0, 22.0
    least, most = NAMES
    room = min(most, max(least, *(words.width(step.name, NAME_PX) + 18 for step in made)))
    frame = Frame(size, 34 + pitch * len(made) + 40, left=room, right=COLUMNS["per hit"] + 4, top=34, bottom=40)
    middles = [pitch * (place + 0.5) for place in range(len(made))]
    names = [
        {"px": -room, "py": middle, "text": words.fit(step.name, room - 14, NAME_PX)}
        for step, middle in zip(made, middles, strict=True)
    ]
    heads = [{"px": frame.inner + edge, "py": -12, "text": name} for name, edge in COLUMNS.items()]
    numbers = [
        {"px": frame.inner + edge, "py": middle, "text": text}
        for step, middle in zip(made, middles, strict=True)
        for edge, text in zip(COLUMNS.values(), _numbers(step), strict=True)
    ]
    tall = {"baseline": "middle", "fontSize": NAME_PX}
    chart = alt.layer(
        *_bars(made, [middle - bar / 2 for middle in middles], bar, 6, joined=True),
        drawing.texts(names, Ink.TEXT, fontWeight=600, **tall),
        drawing.texts(heads, Ink.MUTED, align="right"),
        drawing.texts(numbers, Ink.TEXT, align="right", **tall),
    )
    return chart, frame


def _stacked(made: Sequence[Step], size: Size) -> tuple[drawing.Chart, Frame]:
    """Draw each bar below its words, as there is no room beside it."""
    narrow = size is not MEDIUM
    bar, gap = 16.0, 14.0
    found, facts = [_found(step) for step in made], [_facts(step) for step in made]
    right = found if narrow else [f"{a} · {b}" if b else a for a, b in zip(found, facts, strict=True)]
    below = facts if narrow else [""] * len(made)
    heads = [42.0 if text else 24.0 for text in below]
    tops = [sum(heads[:place]) + (bar + gap) * place for place in range(len(made))]
    frame = Frame(size, sum(heads) + (bar + gap) * len(made) + 36, left=1, right=1, bottom=44)
    rooms = [size.width - words.width(text, drawing.TEXT_PX) - 12 for text in right]
    names = [words.fit(step.name, room, NAME_PX) for step, room in zip(made, rooms, strict=True)]
    chart = alt.layer(
        *_bars(made, [top + head for top, head in zip(tops, heads, strict=True)], bar, 3 if narrow else 5),
        drawing.texts(_lines(names, tops, 0, 12), Ink.TEXT, fontWeight=600, fontSize=NAME_PX),
        drawing.texts(_lines(right, tops, frame.inner, 12), Ink.TEXT, align="right"),
        drawing.texts(_lines(below, tops, 0, 30), Ink.MUTED),
    )
    return chart, frame


def _lines(written: Sequence[str], tops: Sequence[float], px: float, below: float) -> list[dict[str, float | str]]:
    return [{"px": px, "py": top + below, "text": text} for text, top in zip(written, tops, strict=True) if text]


def _bars(
    made: Sequence[Step], tops: Sequence[float], bar: float, ticks: int, *, joined: bool = False
) -> list[alt.Chart]:
    """Draw the bars at these heights, `joined` where no words are between them."""
    domain = (0.0, float(max(1, *(step.end for step in made))))
    axis = drawing.axis("leads", ticks, orient="bottom", labelFlush=30, grid=joined)
    spans = list(zip(made, tops, strict=True))
    passed = [_span(step.start + step.found, step.end - step.presumed, top, bar) for step, top in spans[:-1]]
    presumed = [_span(step.end - step.presumed, step.end, top + 0.5, bar - 1) for step, top in spans if step.presumed]
    found = [_span(step.start, step.start + step.found, top, bar) for step, top in spans if step.found]
    nobody = [_span(step.start, step.end, top, bar) for step, top in spans[-1:]]
    joints = [
        {"x": step.start + step.found, "y": top + bar, "y2": below}
        for (step, top), below in zip(spans[:-1], tops[1:], strict=True)
        if joined
    ]
    return [
        drawing.rects(passed, domain, axis, Ink.PASSED),
        drawing.rects(presumed, domain, axis, Ink.TRACK, stroke=Ink.MUTED.value, strokeDash=[3, 3], strokeWidth=1),
        drawing.rects(nobody, domain, axis, Ink.NOBODY),
        drawing.rules(joints, domain, axis, Ink.MUTED, strokeDash=[2, 2]),
        drawing.rects(found, domain, axis, Ink.FOUND),
    ]


def _span(x: float, x2: float, top: float, bar: float) -> dict[str, float]:
    return {"x": x, "x2": x2, "y": top, "y2": top + bar}


def _numbers(step: Step) -> tuple[str, ...]:
    each = step.provider
    if each is None:
        return "", words.count(step.end - step.start), "", "", ""
    asked = each.asked + each.presumed
    rate = words.percent(words.share(each.found, asked))
    spent, a_hit = words.briefly(each.credits), words.credits(each.cost_per_hit)
    return words.count(asked), words.count(each.found), rate, spent, a_hit


def _found(step: Step) -> str:
    if step.provider is None:
        return many(step.end - step.start, "lead")
    asked = step.provider.asked + step.provider.presumed
    return f"found {words.count(step.found)} ({words.percent(words.share(step.found, asked))})"


def _facts(step: Step) -> str:
    if step.provider is None:
        return ""
    asked, _, _, spent, cost_per_hit = _numbers(step)
    return f"asked {asked} · {spent} credits · {cost_per_hit} per hit"

"""The charts that compare: bars with names before and words behind them. None where there is nothing to draw."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from enrich.report import drawing, words
from enrich.report.drawing import HALF, NAME_PX, NARROW, Frame, Ink, Picture, Size
from enrich.report.facts import Age, Hits

#: More bars than these are nobody's reading; the table has them all.
MOST_BARS = 20


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a bar chart: its parts lie end to end, `text` says what they come to, `track` is what they may reach."""

    name: str
    parts: Sequence[tuple[float, Ink]]
    text: str
    track: float = 0.0


def bars(rows: Sequence[Bar], label: str) -> Picture | None:
    """Draw bars with names before and words behind them."""
    shown = [row for row in rows[:MOST_BARS] if row.parts or row.track]
    longest = max((max(row.track, sum(value for value, _ in row.parts)) for row in shown), default=0.0)
    if not longest:
        return None

    def sized(size: Size) -> tuple[drawing.Chart, Frame]:
        pitch, bar = 26.0, 14.0
        text = max(words.width(row.text, drawing.TEXT_PX) for row in shown) + 10
        names = min(max(words.width(words.clean(row.name), NAME_PX) for row in shown) + 12, size.width * 0.36)
        frame = Frame(size, pitch * len(shown) + 4, left=names, right=min(text, size.width * 0.48), top=2, bottom=2)
        domain = (0.0, longest)
        middles = [pitch * (place + 0.5) for place in range(len(shown))]
        tops = [middle - bar / 2 for middle in middles]
        spans: dict[Ink, list[dict[str, float]]] = {}
        for row, top in zip(shown, tops, strict=True):
            ends = list(itertools.accumulate((value for value, _ in row.parts), initial=0.0))
            laid = [(0.0, row.track, Ink.TRACK)] if row.track else []
            laid += [(start, end, ink) for start, end, (_, ink) in zip(ends, ends[1:], row.parts, strict=False)]
            for start, end, ink in laid:
                spans.setdefault(ink, []).append({"x": start, "x2": end, "y": top, "y2": top + bar})
        named = [
            {"px": -names, "py": middle, "text": words.fit(words.clean(row.name), names - 8, NAME_PX)}
            for row, middle in zip(shown, middles, strict=True)
        ]
        told = [
            {"px": frame.inner + 8, "py": middle, "text": row.text} for row, middle in zip(shown, middles, strict=True)
        ]
        chart = alt.layer(
            *(drawing.rects(lying, domain, None, ink) for ink, lying in spans.items()),
            drawing.texts(named, Ink.TEXT, fontSize=NAME_PX),
            drawing.texts(told, Ink.MUTED),
        )
        return chart, frame

    return drawing.picture((NARROW, HALF), sized, label)


def statuses(counts: Sequence[tuple[str, int]], label: str) -> Picture | None:
    """Draw how many rows came to what."""
    whole = sum(count for _, count in counts)
    inks = {"found": Ink.FOUND, "not_found": Ink.NOBODY, "failed": Ink.TROUBLE}
    inks |= {"expired": Ink.TROUBLE, "in_doubt": Ink.TROUBLE}
    made = [
        Bar(
            status.replace("_", " "),
            [(count, inks.get(status, Ink.PASSED))],
            f"{words.count(count)} · {words.percent(words.share(count, whole))}",
        )
        for status, count in counts
    ]
    return bars(made, label)


def rates(hits: Sequence[Hits], label: str) -> Picture | None:
    """Draw hit rates, each on a track that is all of what was answered."""
    made = [
        Bar(
            words.clean(each.name, "(blank)"),
            [(each.found / each.answered, Ink.FOUND)] if each.answered else [],
            f"{words.percent(words.share(each.found, each.answered))} of {words.count(each.answered)}",
            track=1.0,
        )
        for each in hits
    ]
    return bars(made, label)


def ages(answers: Sequence[Age], label: str) -> Picture | None:
    """Draw how old the answers are, hits first."""
    made = [
        Bar(
            words.clean(each.label),
            [(each.found, Ink.FOUND), (each.not_found, Ink.NOBODY)],
            f"{words.count(each.found)} + {words.count(each.not_found)}",
        )
        for each in answers
        if each.found + each.not_found
    ]
    return bars(made, label)

"""The charts that compare: bars with names before and words behind them. None where there is nothing to draw."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from enrich.report import drawing, words
from enrich.report.drawing import HALF, NAME_PX, NARROW, ChartColor, ChartFrame, RenderedChart, ScreenSize
from enrich.report.facts import AnswerAge, HitCounts

#: More bars than these are nobody's reading; the table has them all.
MAX_BARS = 20


@dataclass(frozen=True, slots=True)
class BarRow:
    """A row of a bar chart: its parts lie end to end, `text` says what they come to, `track` is what they may reach."""

    name: str
    parts: Sequence[tuple[float, ChartColor]]
    text: str
    track: float = 0.0


def draw_bars(rows: Sequence[BarRow], label: str) -> RenderedChart | None:
    """Draw bars with names before and words behind them."""
    shown = [row for row in rows[:MAX_BARS] if row.parts or row.track]
    longest = max((max(row.track, sum(value for value, _ in row.parts)) for row in shown), default=0.0)
    if not longest:
        return None

    def draw_at_size(size: ScreenSize) -> tuple[drawing.AltairChart, ChartFrame]:
        row_height, bar = 26.0, 14.0
        text = max(words.text_width(row.text, drawing.TEXT_PX) for row in shown) + 10
        names = min(max(words.text_width(words.clean_text(row.name), NAME_PX) for row in shown) + 12, size.width * 0.36)
        frame = ChartFrame(
            size, row_height * len(shown) + 4, left=names, right=min(text, size.width * 0.48), top=2, bottom=2
        )
        domain = (0.0, longest)
        middles = [row_height * (index + 0.5) for index in range(len(shown))]
        tops = [middle - bar / 2 for middle in middles]
        spans: dict[ChartColor, list[dict[str, float]]] = {}
        for row, top in zip(shown, tops, strict=True):
            ends = list(itertools.accumulate((value for value, _ in row.parts), initial=0.0))
            spans_of_row = [(0.0, row.track, ChartColor.TRACK)] if row.track else []
            spans_of_row += [(start, end, ink) for start, end, (_, ink) in zip(ends, ends[1:], row.parts, strict=False)]
            for start, end, ink in spans_of_row:
                spans.setdefault(ink, []).append({"x": start, "x2": end, "y": top, "y2": top + bar})
        names_before = [
            {"px": -names, "py": middle, "text": words.fit_text(words.clean_text(row.name), names - 8, NAME_PX)}
            for row, middle in zip(shown, middles, strict=True)
        ]
        texts_after = [
            {"px": frame.inner_width + 8, "py": middle, "text": row.text}
            for row, middle in zip(shown, middles, strict=True)
        ]
        chart = alt.layer(
            *(drawing.rect_marks(lying, domain, None, ink) for ink, lying in spans.items()),
            drawing.text_marks(names_before, ChartColor.TEXT, fontSize=NAME_PX),
            drawing.text_marks(texts_after, ChartColor.MUTED),
        )
        return chart, frame

    return drawing.render_chart((NARROW, HALF), draw_at_size, label)


def status_chart(counts: Sequence[tuple[str, int]], label: str) -> RenderedChart | None:
    """Draw how many rows came to what."""
    whole = sum(count for _, count in counts)
    inks = {"found": ChartColor.FOUND, "not_found": ChartColor.NOBODY, "failed": ChartColor.TROUBLE}
    inks |= {"expired": ChartColor.TROUBLE, "in_doubt": ChartColor.TROUBLE}
    rows = [
        BarRow(
            status.replace("_", " "),
            [(count, inks.get(status, ChartColor.PASSED))],
            f"{words.format_count(count)} · {words.format_percent(words.share_of(count, whole))}",
        )
        for status, count in counts
    ]
    return draw_bars(rows, label)


def hit_rate_chart(hits: Sequence[HitCounts], label: str) -> RenderedChart | None:
    """Draw hit rates, each on a track that is all of what was answered."""
    rows = [
        BarRow(
            words.clean_text(each.name, "(blank)"),
            [(each.found / each.answered, ChartColor.FOUND)] if each.answered else [],
            f"{words.format_percent(words.share_of(each.found, each.answered))} of {words.format_count(each.answered)}",
            track=1.0,
        )
        for each in hits
    ]
    return draw_bars(rows, label)


def age_chart(answers: Sequence[AnswerAge], label: str) -> RenderedChart | None:
    """Draw how old the answers are, hits first."""
    rows = [
        BarRow(
            words.clean_text(each.label),
            [(each.found, ChartColor.FOUND), (each.not_found, ChartColor.NOBODY)],
            f"{words.format_count(each.found)} + {words.format_count(each.not_found)}",
        )
        for each in answers
        if each.found + each.not_found
    ]
    return draw_bars(rows, label)

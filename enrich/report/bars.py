"""Charts of horizontal bars: rows by status, match rates, ages, and the waterfall."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from msgspec import Struct

from enrich.models import pluralize
from enrich.report.charts import (
    FULL,
    HALF,
    MEDIUM,
    NAME_PX,
    NARROW,
    TEXT_PX,
    ChartColor,
    ChartFrame,
    ChartRow,
    Drawing,
    RenderedChart,
    ScreenSize,
    Spec,
    make_axis,
    rect_marks,
    render_chart,
    rule_marks,
    text_marks,
    x_scale,
)
from enrich.report.data import AnswerAge, HitCounts, ReportedProvider, ReportedWaterfall
from enrich.report.formatting import (
    BLANK_LABEL,
    LARGE_CREDITS,
    clean_text,
    fit_text,
    format_amount,
    format_count,
    format_share,
    format_status,
    text_width,
)

#: More bars than this are unreadable; the table lists all rows.
MAX_BARS = 20


class BarRow(Struct, frozen=True):
    """A row of a bar chart: `parts` are drawn end to end, `text` summarizes them, `track` is their possible maximum."""

    name: str
    parts: Sequence[tuple[float, ChartColor]]
    text: str
    track: float = 0.0


def draw_bars(rows: Sequence[BarRow], label: str) -> RenderedChart:
    """Draw bars with the name on the left and the text on the right; at most MAX_BARS."""
    shown = rows[:MAX_BARS]
    longest = max(max(row.track, sum(value for value, _ in row.parts)) for row in shown)
    x = x_scale((0.0, longest), None)

    def draw_at_size(size: ScreenSize) -> Drawing:
        row_height, bar = 26.0, 14.0
        text = max(text_width(row.text, TEXT_PX) for row in shown) + 10
        names = min(max(text_width(row.name, NAME_PX) for row in shown) + 12, size.width * 0.36)
        frame = ChartFrame(
            size, row_height * len(shown) + 4, left=names, right=min(text, size.width * 0.48), top=2, bottom=2
        )
        spans: dict[ChartColor, list[ChartRow]] = {}
        names_before: list[ChartRow] = []
        texts_after: list[ChartRow] = []
        for index, row in enumerate(shown):
            middle = row_height * (index + 0.5)
            ends = accumulate((value for value, _ in row.parts), initial=0.0)
            spans_of_row = [(0.0, row.track, ChartColor.TRACK)] if row.track else []
            spans_of_row += [
                (start, end, color) for (start, end), (_, color) in zip(pairwise(ends), row.parts, strict=True)
            ]
            for start, end, color in spans_of_row:
                spans.setdefault(color, []).append(_bar_rect(start, end, middle - bar / 2, bar))
            names_before.append({"px": -names, "py": middle, "text": fit_text(row.name, names - 8, NAME_PX)})
            texts_after.append({"px": frame.inner_width + 8, "py": middle, "text": row.text})
        layers = [
            *(rect_marks(bars, x, color) for color, bars in spans.items()),
            text_marks(names_before, ChartColor.TEXT, fontSize=NAME_PX),
            text_marks(texts_after, ChartColor.MUTED),
        ]
        return layers, frame

    return render_chart((NARROW, HALF), draw_at_size, label)


def status_chart(counts: Sequence[tuple[str, int]], label: str) -> RenderedChart:
    """Draw the number of rows by status."""
    whole = sum(count for _, count in counts)
    colors = {"found": ChartColor.FOUND, "not_found": ChartColor.NO_MATCH}
    colors |= dict.fromkeys(("failed", "expired", "in_doubt"), ChartColor.FAILED)
    rows = [
        BarRow(
            format_status(status),
            [(count, colors.get(status, ChartColor.PASSED))],
            f"{format_count(count)} · {format_share(count, whole)}",
        )
        for status, count in counts
    ]
    return draw_bars(rows, label)


def hit_rate_chart(hits: Sequence[HitCounts], label: str) -> RenderedChart:
    """Draw match rates, each on a track that stands for all answered rows."""
    rows = [
        BarRow(
            clean_text(each.name, BLANK_LABEL),
            [(each.found / each.answered, ChartColor.FOUND)] if each.answered else [],
            f"{format_share(each.found, each.answered)} of {format_count(each.answered)}",
            track=1.0,
        )
        for each in hits
    ]
    return draw_bars(rows, label)


def age_chart(answers: Sequence[AnswerAge], label: str) -> RenderedChart:
    """Draw the answers by age, matches first."""
    rows = [
        BarRow(
            clean_text(each.label),
            [(each.found, ChartColor.FOUND), (each.not_found, ChartColor.NO_MATCH)],
            f"{format_count(each.found)} + {format_count(each.not_found)}",
        )
        for each in answers
        if each.found + each.not_found
    ]
    return draw_bars(rows, label)


NO_MATCH_LABEL, FAILED_LABEL = "No match", "Failed"
#: Number columns to the right of the bars, with their right edges in pixels.
NUMBER_COLUMNS = {"requests": 72.0, "matches": 142.0, "match rate": 216.0, "credits": 296.0, "per match": 372.0}
#: Smallest and largest width of the names in pixels.
NAME_WIDTHS = (110.0, 230.0)


class WaterfallStep(Struct, frozen=True):
    """A row of the waterfall chart: `found` requests from `start`, then those passed on, `inferred` of them.

    Rows without a provider are the requests with no match, and those that failed.
    """

    name: str
    start: int
    found: int
    end: int
    inferred: int = 0
    provider: ReportedProvider | None = None
    color: ChartColor = ChartColor.PASSED


def waterfall_steps(waterfall: ReportedWaterfall) -> list[WaterfallStep]:
    """Start the bar of each provider where the matches of the previous ones end."""
    result: list[WaterfallStep] = []
    start = 0
    for each in waterfall.providers:
        if each.verifies:
            continue
        end = start + max(each.reported + each.inferred, each.found)
        inferred = min(each.inferred, end - start - each.found)
        result.append(WaterfallStep(clean_text(each.name), start, each.found, end, inferred, each))
        start += each.found
    answered = waterfall.answered
    result.append(WaterfallStep(NO_MATCH_LABEL, waterfall.found, 0, answered, color=ChartColor.NO_MATCH))
    if waterfall.failed:
        result.append(WaterfallStep(FAILED_LABEL, answered, 0, waterfall.answers, color=ChartColor.FAILED))
    return result


def waterfall_chart(
    waterfall: ReportedWaterfall, label: str, sizes: Sequence[ScreenSize] = (NARROW, MEDIUM, FULL)
) -> RenderedChart:
    """Draw the waterfall for narrow, medium and wide screens, or for other sizes."""
    steps = waterfall_steps(waterfall)

    def draw_at_size(size: ScreenSize) -> Drawing:
        return _wide_layout(steps, size) if size is FULL else _stacked_layout(steps, size)

    return render_chart(sizes, draw_at_size, label)


def _wide_layout(steps: Sequence[WaterfallStep], size: ScreenSize) -> Drawing:
    """Draw names to the left of the bars and number columns to the right."""
    pitch, bar = 36.0, 22.0
    least, most = NAME_WIDTHS
    room = min(most, max(least, *(text_width(step.name, NAME_PX) + 18 for step in steps)))
    frame = ChartFrame(
        size, 34 + pitch * len(steps) + 40, left=room, right=NUMBER_COLUMNS["per match"] + 4, top=34, bottom=40
    )
    middles = [pitch * (index + 0.5) for index in range(len(steps))]
    names = [fit_text(step.name, room - 14, NAME_PX) for step in steps]
    heads = [{"px": frame.inner_width + edge, "py": -12, "text": name} for name, edge in NUMBER_COLUMNS.items()]
    numbers = [
        {"px": frame.inner_width + edge, "py": middle, "text": text}
        for step, middle in zip(steps, middles, strict=True)
        for edge, text in zip(NUMBER_COLUMNS.values(), step_numbers(step), strict=True)
    ]
    layers = [
        *_step_marks(steps, [middle - bar / 2 for middle in middles], bar, 6, joined=True),
        text_marks(_text_rows(names, middles, -room, 0), ChartColor.TEXT, fontWeight=600, fontSize=NAME_PX),
        text_marks(heads, ChartColor.MUTED, align="right"),
        text_marks(numbers, ChartColor.TEXT, align="right", fontSize=NAME_PX),
    ]
    return layers, frame


def _stacked_layout(steps: Sequence[WaterfallStep], size: ScreenSize) -> Drawing:
    """Draw each bar below its text, because there is no room beside it."""
    narrow = size is not MEDIUM
    bar, gap = 16.0, 14.0
    found, facts = [_found_text(step) for step in steps], [_facts_text(step) for step in steps]
    right = found if narrow else [f"{a} · {b}" if b else a for a, b in zip(found, facts, strict=True)]
    below = facts if narrow else [""] * len(steps)
    heads = [42.0 if text else 24.0 for text in below]
    tops = [sum(heads[:index]) + (bar + gap) * index for index in range(len(steps))]
    frame = ChartFrame(size, sum(heads) + (bar + gap) * len(steps) + 36, left=1, right=1, bottom=44)
    rooms = [size.width - text_width(text, TEXT_PX) - 12 for text in right]
    names = [fit_text(step.name, room, NAME_PX) for step, room in zip(steps, rooms, strict=True)]
    layers = [
        *_step_marks(steps, [top + head for top, head in zip(tops, heads, strict=True)], bar, 3 if narrow else 5),
        text_marks(_text_rows(names, tops, 0, 12), ChartColor.TEXT, fontWeight=600, fontSize=NAME_PX),
        text_marks(_text_rows(right, tops, frame.inner_width, 12), ChartColor.TEXT, align="right"),
        text_marks(_text_rows(below, tops, 0, 30), ChartColor.MUTED),
    ]
    return layers, frame


def _text_rows(written: Sequence[str], tops: Sequence[float], px: float, below: float) -> list[ChartRow]:
    return [{"px": px, "py": top + below, "text": text} for text, top in zip(written, tops, strict=True) if text]


def _step_marks(
    steps: Sequence[WaterfallStep], tops: Sequence[float], bar: float, ticks: int, *, joined: bool = False
) -> list[Spec]:
    """Draw the bars at these heights; `joined` connects them when no text is between them."""
    domain = (0.0, float(max(1, *(step.end for step in steps))))
    x = x_scale(domain, make_axis("requests", ticks, labelFlush=30, grid=joined))
    spans = list(zip(steps, tops, strict=True))
    rests: dict[ChartColor, list[ChartRow]] = {}
    for step, top in spans:
        rest = _bar_rect(step.start + step.found, step.end - step.inferred, top, bar)
        rests.setdefault(step.color, []).append(rest)
    inferred = [
        _bar_rect(step.end - step.inferred, step.end, top + 0.5, bar - 1) for step, top in spans if step.inferred
    ]
    found = [_bar_rect(step.start, step.start + step.found, top, bar) for step, top in spans if step.found]
    joints: list[ChartRow] = [
        {"x": below.start, "y": top + bar, "y2": end} for (_, top), (below, end) in pairwise(spans) if joined
    ]
    outline = {"stroke": ChartColor.MUTED, "strokeDash": [3, 3], "strokeWidth": 1}
    return [
        *(rect_marks(bars, x, color) for color, bars in rests.items()),
        rect_marks(inferred, x, ChartColor.TRACK, **outline),
        rule_marks(joints, x, ChartColor.MUTED, strokeDash=[2, 2]),
        rect_marks(found, x, ChartColor.FOUND),
    ]


def _bar_rect(x: float, x2: float, top: float, bar: float) -> ChartRow:
    return {"x": x, "x2": x2, "y": top, "y2": top + bar}


def step_numbers(step: WaterfallStep) -> tuple[str, ...]:
    """Return the texts of NUMBER_COLUMNS."""
    each = step.provider
    if each is None:
        return format_count(step.end - step.start), "", "", "", ""
    calls = each.reported + each.inferred
    rate = format_share(each.found, calls)
    format_spent = format_amount if each.credits < LARGE_CREDITS else format_count
    spent, per_hit = format_spent(each.credits), format_amount(each.cost_per_hit)
    return format_count(calls), format_count(each.found), rate, spent, per_hit


def _found_text(step: WaterfallStep) -> str:
    if step.provider is None:
        return pluralize(step.end - step.start, "request")
    calls = step.provider.reported + step.provider.inferred
    return f"{pluralize(step.found, 'match')} ({format_share(step.found, calls)})"


def _facts_text(step: WaterfallStep) -> str:
    if step.provider is None:
        return ""
    _, _, _, spent, cost_per_hit = step_numbers(step)
    calls = pluralize(step.provider.reported + step.provider.inferred, "request")
    return f"{calls} · {spent} credits · {cost_per_hit} per match"

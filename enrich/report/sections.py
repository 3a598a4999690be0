"""The sections of the page: each chart with a sentence that states its result, and its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from enrich.models import pluralize
from enrich.report import charts, tables, timelines
from enrich.report.data import (
    Comparison,
    GroupedHits,
    HitCounts,
    Report,
    ReportedRun,
    ReportedWaterfall,
)
from enrich.report.drawing import HALF, NARROW, RenderedChart
from enrich.report.formatting import (
    BLANK_LABEL,
    clean_text,
    format_amount,
    format_percent,
    format_seconds,
    format_share,
    format_status,
)
from enrich.report.tables import Table

#: Charts over time need at least this many runs, and that of a run's requests this many bins.
MIN_TREND_RUNS = 5
MIN_TRAFFIC_BINS = 5
#: Longest name of a group in a sentence, in characters.
MAX_NAME = 40


class Figure(Struct, frozen=True):
    """A title, the result in a sentence (`finding`), its charts, and a table; `wide` for that of a waterfall."""

    title: str
    finding: str
    pictures: Sequence[RenderedChart]
    table: Table | None = None
    wide: bool = False


class Section(Struct, frozen=True):
    """A heading with its figures."""

    key: str
    title: str
    figures: Sequence[Figure]

    @property
    def stacks(self) -> list[list[Figure]]:
        """Distribute the figures over two columns of about the same height."""
        stacks: list[list[Figure]] = [[], []]
        for figure in self.figures:
            min(stacks, key=lambda stack: sum(map(_height, stack))).append(figure)
        return [stack for stack in stacks if stack]


def _height(figure: Figure) -> float:
    """Estimate the height of the charts, or else of the table, in pixels."""
    table = 60 + 33 * len(figure.table.lines) if figure.table else 0
    return 100 + (sum(picture.height for picture in figure.pictures) or table)


def make_sections(report: Report) -> Iterator[Section]:
    """Yield the sections after the waterfall that have figures, in the order of the page."""
    sections = (
        Section("rows", "Rows of the input", list(_row_figures(report))),
        Section("trends", "Run by run", list(_run_figures(report.runs))),
        Section("timing", "Timing", list(_timing_figures(report))),
    )
    yield from (section for section in sections if section.figures)


def waterfall_figure(facts: ReportedWaterfall) -> Figure | None:
    """Draw the waterfall; None before the first answer."""
    if not facts.answers or all(each.verifies for each in facts.providers):
        return None
    finding = _waterfall_text(facts)
    table = tables.provider_table(facts.providers, "Providers in their order, verifiers last")
    return Figure("The waterfall", finding, [charts.waterfall_chart(facts, finding)], table, wide=True)


def side_figures(comparison: Comparison) -> Iterator[Figure]:
    """Draw the waterfall of each side."""
    pairs = (
        (comparison.left, comparison.left_providers, "left"),
        (comparison.right, comparison.right_providers, "right"),
    )
    for side, providers, about in pairs:
        answers = side.found + side.not_found
        if not answers or all(each.verifies for each in providers):
            continue
        label = clean_text(side.label)
        facts = ReportedWaterfall(label, providers, answers, side.found, 0, side.credits, 0.0)
        rate, spent = format_share(side.found, answers), format_amount(side.credits)
        finding = f"{pluralize(side.found, 'match')} in {pluralize(answers, 'result')} ({rate}), {spent} credits."
        table = tables.provider_table(providers, f"Providers of {label}", f"{about} provider")
        yield Figure(label, finding, [charts.waterfall_chart(facts, finding, (NARROW, HALF))], table)


def _waterfall_text(facts: ReportedWaterfall) -> str:
    searching = [each for each in facts.providers if not each.verifies]
    rate = format_share(facts.found, facts.answered)
    text = f"{pluralize(facts.found, 'match')} in {pluralize(facts.answered, 'result')} ({rate})."
    if facts.failed:
        again = f", {facts.retried:,} of them free and sent again" if facts.retried else ""
        text += f" {facts.failed:,} of {pluralize(facts.answers, 'request')} failed{again}."
    best = max(searching, key=lambda each: each.found)
    if best.found:
        part = format_share(best.found, facts.found)
        text += f" Most matches: {clean_text(best.name)}, {best.found:,} ({part})."
    priced = [each for each in searching if each.cost_per_hit is not None]
    if len(priced) > 1:
        most_expensive = max(priced, key=lambda each: each.cost_per_hit or 0.0)
        text += (
            f" Highest cost per match: {clean_text(most_expensive.name)},"
            f" {format_amount(most_expensive.cost_per_hit)} credits."
        )
    return text + "".join(
        f" {clean_text(each.name)} verified {pluralize(each.reported, 'match')}: {format_amount(each.credits)} credits."
        for each in facts.providers
        if each.verifies
    )


def _row_figures(report: Report) -> Iterator[Figure]:
    counts = [(status, count) for status, count in report.statuses.items() if count]
    if counts:
        most, number = max(counts, key=lambda pair: pair[1])
        whole = sum(count for _, count in counts)
        rate = format_share(number, whole)
        finding = f"{pluralize(whole, 'row')}. Most frequent: {format_status(most)}, {number:,} ({rate})."
        table = tables.status_table(counts, "Rows of the input by status", "Status")
        yield Figure("Rows by status", finding, [charts.status_chart(counts, finding)], table)
    if report.columns:
        finding = _hit_rates_text(report.columns, "All columns have the same match rate")
        table = tables.hit_rate_table(report.columns, "Match rate by output column", "Column", "column")
        yield Figure("Match rate by column", finding, [charts.hit_rate_chart(report.columns, finding)], table)
    if report.skipped:
        yield Figure("Why rows were not sent", _skipped_text(report), [], tables.skipped_table(report.skipped))
    used = [each for each in report.ages if each.found + each.not_found]
    if len(used) > 1:
        whole = sum(each.found + each.not_found for each in used)
        finding = f"{pluralize(whole, 'result')} in use, as matches + no match."
        yield Figure(
            "Age of the results", finding, [charts.age_chart(report.ages, finding)], tables.age_table(report.ages)
        )
    for each in report.groups:
        if each.groups:
            finding, column = _groups_text(each), clean_text(each.column)
            caption = f"Match rate by {column}"
            table = tables.hit_rate_table(each.groups, caption, column, f"group {each.column}")
            yield Figure(caption, finding, [charts.hit_rate_chart(each.groups, finding)], table)


def _skipped_text(report: Report) -> str:
    most, skipped = report.skipped[0], sum(each.rows for each in report.skipped)
    reason = f"Most frequent reason: {clean_text(most.reason)}."
    if report.step_waterfalls:
        return f"Counted for each step. {reason}"
    return f"No request for {pluralize(skipped, 'row')} of {report.rows or 0:,}. {reason}"


def _hit_rates_text(hits: Sequence[HitCounts], equal: str) -> str:
    known = [each for each in hits if each.answered]
    if not known:
        return "No results for these rows yet."
    best = max(known, key=lambda each: each.found / each.answered)
    least = min(known, key=lambda each: each.found / each.answered)
    high, low = (format_percent(each.found / each.answered) for each in (best, least))
    if len(known) == 1:
        return f"{_short_name(best)} has a value in {high} of the rows with a result."
    if high == low:
        return f"{equal}: {high}."
    lowest, highest = (name if name == BLANK_LABEL else f"({name})" for name in map(_short_name, (least, best)))
    return f"From {low} {lowest} to {high} {highest}."


def _short_name(hits: HitCounts) -> str:
    name = clean_text(hits.name, BLANK_LABEL)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1].rstrip()}…"


def _groups_text(groups: GroupedHits) -> str:
    text = _hit_rates_text(groups.groups, "All groups have the same match rate")
    if len(groups.groups) > charts.MAX_BARS:
        text += f" The chart shows {charts.MAX_BARS} of {len(groups.groups)} groups, the table all."
    if groups.rest:
        text += f" The last group combines {pluralize(groups.rest, 'further value')}."
    return text


def _run_figures(runs: Sequence[ReportedRun]) -> Iterator[Figure]:
    if len(runs) < MIN_TREND_RUNS:
        return
    spent = sum(run.credits_spent for run in runs)
    if spent:
        most_expensive = max(runs, key=lambda run: run.credits_spent)
        finding = f"{format_amount(spent)} credits in {pluralize(len(runs), 'run')}. Most: run "
        finding += f"{most_expensive.execution}, {format_amount(most_expensive.credits_spent)}."
        yield Figure("Credits per run", finding, timelines.credits_charts(runs, finding))
    costs, rates = [run.cost_per_hit for run in runs], [run.hit_rate for run in runs]
    if costs.count(None) < len(costs):
        finding = _spread_text(costs, format_amount, " credits", "a match")
        chart = timelines.line_chart(costs, runs, "credits per match", finding)
        yield Figure("Cost per match", finding, [chart])
    if rates.count(None) < len(rates):
        finding = _spread_text(rates, format_percent, "", "results")
        chart = timelines.line_chart(rates, runs, "match rate", finding, format=".0%")
        yield Figure("Match rate", finding, [chart])


def _spread_text(values: Sequence[float | None], show: Callable[[float], str], unit: str, what: str) -> str:
    """Return the last value, and the least and the largest of all. A run has a value if it has `what`."""
    known = [value for value in values if value is not None]
    if len(known) == 1:
        return f"{show(known[0])}{unit} in the only run with {what}."
    spread = f"between {show(min(known))} and {show(max(known))}"
    return f"{show(known[-1])}{unit} in the last run with {what}, {spread} in all runs."


def _timing_figures(report: Report) -> Iterator[Figure]:
    times, traffic = report.latencies, report.traffic
    if times is not None:
        half, most, longest = (format_seconds(each) for each in (times.median, times.p90, times.longest))
        finding = (
            f"{pluralize(times.count, 'task')}: half within {half}, 90% within {most}, the slowest after {longest}."
        )
        yield Figure(
            "Time to result, all runs", finding, [timelines.latency_chart(times, finding)], tables.latency_table(times)
        )
    if traffic is not None and len(traffic.submitted) >= MIN_TRAFFIC_BINS:
        finding = (
            f"{pluralize(sum(traffic.submitted), 'request')} sent, "
            f"{pluralize(sum(traffic.answered), 'result')} received, "
            f"rate-limited (429) {pluralize(sum(traffic.rate_limited), 'time')}."
        )
        pictures = list(timelines.traffic_charts(traffic, finding))
        yield Figure(f"Requests over time, run {traffic.execution}", finding, pictures, tables.traffic_table(traffic))

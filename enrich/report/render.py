"""Renders the report as one HTML file that needs no network. Equal data gives equal bytes.

Each chart has a sentence that states its result, and its table.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from operator import itemgetter

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from msgspec import Struct
from msgspec.structs import replace

from enrich.models import pluralize
from enrich.report import bars, charts, tables
from enrich.report.charts import HALF, NARROW, RenderedChart
from enrich.report.data import Comparison, GroupedHits, HitCounts, Report, ReportedRun, ReportedWaterfall
from enrich.report.formatting import (
    BLANK_LABEL,
    DASH,
    clean_text,
    format_amount,
    format_date,
    format_percent,
    format_seconds,
    format_share,
    format_status,
    format_time,
)
from enrich.report.tables import Cell, Table

#: The newest runs are shown; older ones are collapsed.
RUNS_SHOWN = 14
#: Rates of two runs are compared if each has at least this many results.
MIN_COMPARED = 100
#: Charts over time need at least this many runs, and that of a run's requests this many bins.
MIN_TREND_RUNS = 5
MIN_TRAFFIC_BINS = 5
#: Longest name of a group in a sentence, in characters.
MAX_NAME = 40


class Tile(Struct, frozen=True):
    """A key number with a note and, for a rate, its change since an earlier run; `good` is None for no change."""

    label: str
    cell: Cell
    note: str
    change: str | None = None
    good: bool | None = None


class TileGroup(Struct, frozen=True):
    """Key numbers of the last run or of all runs: `scope` says which runs, `about` marks them for programs."""

    key: str
    title: str
    scope: str
    about: str
    tiles: Sequence[Tile]


def render_report(report: Report) -> str:
    """Return the page as HTML."""
    folder = files("enrich.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clean": clean_text, "moment": format_time, "count": pluralize, "command": _format_command}
    environment.globals["Cell"] = Cell
    page, style, script = (folder.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    comparison, waterfalls = report.comparison, report.step_waterfalls or [report.waterfall]
    template = environment.from_string(page)
    return template.render(
        report=report,
        style=Markup(style),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - a file of this package
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        last=report.runs[-1] if report.runs else None,
        tile_groups=list(tile_groups(report)),
        steps=tables.step_table(report) if report.step_waterfalls else None,
        waterfalls=[(each, waterfall_figure(each), f"waterfall {each.step}".rstrip()) for each in waterfalls],
        sections=list(make_sections(report)),
        compared=comparison and (tables.common_leads_table(comparison), tables.sides_table(comparison)),
        sides=list(side_figures(comparison)) if comparison else [],
        runs=tables.run_table(report.runs[-RUNS_SHOWN:], "Newest first"),
        older=tables.run_table(report.runs[:-RUNS_SHOWN], "Older runs, newest first"),
        traffic=tables.run_traffic_table(report.runs),
        requests=tables.status_table(report.requests.items(), "Requests in the ledger by state", "State"),
        leads=report.leads and tables.leads_table(report.leads),
        infers=any(provider.inferred for each in waterfalls for provider in each.providers),
        dash=DASH,
    )


def _format_command(command: str) -> Markup:
    """Format a shell command as HTML whose options are not broken after a hyphen."""
    words = clean_text(command).split(" ")
    return Markup(" ").join(Markup("<span>{}</span>").format(word) if word.startswith("-") else word for word in words)


def tile_groups(report: Report) -> Iterator[TileGroup]:
    """Yield the key numbers of the last run, and of all runs where they differ."""
    if not report.runs:
        return
    first, last = report.runs[0], report.runs[-1]
    scope = f"Run {last.execution}, {format_date(last.started_at)}"
    yield TileGroup("last-run", "Last run", scope, f"run {last.execution}", list(_last_run_tiles(report)))
    if len(report.runs) > 1 or report.step_waterfalls:
        scope = f"{pluralize(len(report.runs), 'run')} since {format_date(first.started_at)}"
        yield TileGroup("all-runs", "All runs", scope, "all runs", list(_all_runs_tiles(report)))


_Change = tuple[str | None, bool | None]
_NO_CHANGE: _Change = (None, None)


def _last_run_tiles(report: Report) -> Iterator[Tile]:
    run, earlier = report.runs[-1], _comparable_run(report.runs)
    rate_change = _format_change(earlier, run, "hit_rate", lambda points: f"{points * 100:.1f} points", 1)
    cost_change = _format_change(earlier, run, "cost_per_hit", format_amount, -1)
    yield from _result_tiles(run, _planned_text(report.planned, run), rate_change, cost_change)
    yield Tile("Balance", Cell("balance_after", run.balance_after), _balance_text(run))


def _all_runs_tiles(report: Report) -> Iterator[Tile]:
    if len(report.runs) > 1:
        sums = {name: sum(getattr(run, name) for run in report.runs) for name in ("found", "not_found", "submitted")}
        total = replace(report.runs[-1], credits_spent=report.credits_spent, **sums)
        unknown = f"{report.credits_unknown:,} of unknown price" if report.credits_unknown else "credits spent"
        yield from _result_tiles(total, unknown)
    if report.step_waterfalls:
        complete = Cell("found", report.statuses.get("found"))
        yield Tile("Completed leads", complete, f"of {pluralize(report.rows or 0, 'row')}")
        yield Tile("Per completed lead", Cell("cost_per_lead", report.cost_per_lead), "credits")


def _result_tiles(
    run: ReportedRun, spent_note: str, rate_change: _Change = _NO_CHANGE, cost_change: _Change = _NO_CHANGE
) -> Iterator[Tile]:
    results, requests = pluralize(run.answered, "result"), pluralize(run.submitted, "request")
    yield Tile("Match rate", Cell("hit_rate", run.hit_rate), f"of {results}", *rate_change)
    yield Tile("Matches", Cell("found", run.found), f"{requests} sent")
    yield Tile("Credits", Cell("credits_spent", run.credits_spent), spent_note)
    per_match = Cell("cost_per_hit", run.cost_per_hit)
    yield Tile("Cost per match", per_match, "credits" if run.found else "no match", *cost_change)


def _comparable_run(runs: Sequence[ReportedRun]) -> ReportedRun | None:
    """Return the newest earlier run with enough results; None when there is none, or the last run has too few."""
    enough = [run for run in runs if run.answered >= MIN_COMPARED]
    return enough[-2] if len(enough) > 1 and enough[-1] is runs[-1] else None


def _format_change(
    earlier: ReportedRun | None, run: ReportedRun, name: str, write: Callable[[float], str], better: int
) -> _Change:
    """Format the change of a rate since an earlier run. `better`: 1 if more is good, -1 if less is good."""
    old, new = None if earlier is None else getattr(earlier, name), getattr(run, name)
    if earlier is None or old is None or new is None:
        return _NO_CHANGE
    size = write(abs(new - old))
    if size == write(0.0):
        return f"same as run {earlier.execution}", None
    return f"{'▲' if new > old else '▼'} {size} vs. run {earlier.execution}", (new - old) * better > 0


def _planned_text(planned: Mapping[str, float | None] | None, run: ReportedRun) -> str:
    unknown = f"; {run.credits_unknown:,} of unknown price" if run.credits_unknown else ""
    known = {name: amount for name, amount in (planned or {}).items() if amount is not None}
    if "likely" in known:
        return f"planned {format_amount(known['likely'])}{unknown}"
    if "max" in known:
        return f"planned at most {format_amount(known['max'])}{unknown}"
    return f"no plan{unknown}"


def _balance_text(run: ReportedRun) -> str:
    if run.balance_after is None:
        return "unknown"
    if run.balance_before is None:
        return "credits left"
    unexplained = f"; {run.unexplained:+,.2f} unexplained" if run.unexplained else ""
    return f"{format_amount(run.balance_before)} before{unexplained}"


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
    if not _has_chart(facts):
        return None
    finding = _waterfall_text(facts)
    table = tables.provider_table(facts.providers, "Providers in their order, verifiers last")
    return Figure("The waterfall", finding, [bars.waterfall_chart(facts, finding)], table, wide=True)


def side_figures(comparison: Comparison) -> Iterator[Figure]:
    """Draw the waterfall of each side."""
    left, right = comparison.left, comparison.right
    pairs = ((left, comparison.left_providers, "left"), (right, comparison.right_providers, "right"))
    for side, providers, about in pairs:
        label, answers = clean_text(side.label), side.found + side.not_found
        facts = ReportedWaterfall(label, providers, answers, side.found, 0, side.credits, 0.0)
        if not _has_chart(facts):
            continue
        finding = f"{_matches_text(facts)}, {format_amount(side.credits)} credits."
        table = tables.provider_table(providers, f"Providers of {label}", f"{about} provider")
        yield Figure(label, finding, [bars.waterfall_chart(facts, finding, (NARROW, HALF))], table)


def _has_chart(facts: ReportedWaterfall) -> bool:
    return facts.answers > 0 and not all(each.verifies for each in facts.providers)


def _matches_text(facts: ReportedWaterfall) -> str:
    rate = format_share(facts.found, facts.answered)
    return f"{pluralize(facts.found, 'match')} in {pluralize(facts.answered, 'result')} ({rate})"


def _waterfall_text(facts: ReportedWaterfall) -> str:
    searching = [each for each in facts.providers if not each.verifies]
    text = f"{_matches_text(facts)}."
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
        yield Figure("Rows by status", finding, [bars.status_chart(counts, finding)], table)
    if report.columns:
        finding = _hit_rates_text(report.columns, "All columns have the same match rate")
        table = tables.hit_rate_table(report.columns, "Match rate by output column", "Column", "column")
        yield Figure("Match rate by column", finding, [bars.hit_rate_chart(report.columns, finding)], table)
    if report.skipped:
        yield Figure("Why rows were not sent", _skipped_text(report), [], tables.skipped_table(report.skipped))
    used = [each for each in report.ages if each.found + each.not_found]
    if len(used) > 1:
        whole = sum(each.found + each.not_found for each in used)
        finding = f"{pluralize(whole, 'result')} in use, as matches + no match."
        yield Figure(
            "Age of the results", finding, [bars.age_chart(report.ages, finding)], tables.age_table(report.ages)
        )
    for each in report.groups:
        if each.groups:
            finding, column = _groups_text(each), clean_text(each.column)
            caption = f"Match rate by {column}"
            table = tables.hit_rate_table(each.groups, caption, column, f"group {each.column}")
            yield Figure(caption, finding, [bars.hit_rate_chart(each.groups, finding)], table)


def _skipped_text(report: Report) -> str:
    most, skipped = report.skipped[0], sum(each.rows for each in report.skipped)
    reason = f"Most frequent reason: {clean_text(most.reason)}."
    if report.step_waterfalls:
        return f"Counted for each step. {reason}"
    return f"No request for {pluralize(skipped, 'row')} of {report.rows or 0:,}. {reason}"


def _hit_rates_text(hits: Sequence[HitCounts], equal: str) -> str:
    rates = [(each.found / each.answered, _short_name(each)) for each in hits if each.answered]
    if not rates:
        return "No results for these rows yet."
    (highest, best), (lowest, least) = max(rates, key=itemgetter(0)), min(rates, key=itemgetter(0))
    high, low = format_percent(highest), format_percent(lowest)
    if len(rates) == 1:
        return f"{best} has a value in {high} of the rows with a result."
    if high == low:
        return f"{equal}: {high}."
    least, best = (name if name == BLANK_LABEL else f"({name})" for name in (least, best))
    return f"From {low} {least} to {high} {best}."


def _short_name(hits: HitCounts) -> str:
    name = clean_text(hits.name, BLANK_LABEL)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1].rstrip()}…"


def _groups_text(groups: GroupedHits) -> str:
    text = _hit_rates_text(groups.groups, "All groups have the same match rate")
    if len(groups.groups) > bars.MAX_BARS:
        text += f" The chart shows {bars.MAX_BARS} of {len(groups.groups)} groups, the table all."
    if groups.rest:
        text += f" The last group combines {pluralize(groups.rest, 'further value')}."
    return text


def _run_figures(runs: Sequence[ReportedRun]) -> Iterator[Figure]:
    if len(runs) < MIN_TREND_RUNS:
        return
    spent = sum(run.credits_spent for run in runs)
    if spent:
        most_expensive = max(runs, key=lambda run: run.credits_spent)
        most = f"run {most_expensive.execution}, {format_amount(most_expensive.credits_spent)}"
        finding = f"{format_amount(spent)} credits in {pluralize(len(runs), 'run')}. Most: {most}."
        yield Figure("Credits per run", finding, charts.credits_charts(runs, finding))
    costs, rates = [run.cost_per_hit for run in runs], [run.hit_rate for run in runs]
    if any(cost is not None for cost in costs):
        finding = _spread_text(costs, format_amount, " credits", "a match")
        yield Figure("Cost per match", finding, [charts.line_chart(costs, runs, "credits per match", finding)])
    if any(rate is not None for rate in rates):
        finding = _spread_text(rates, format_percent, "", "results")
        yield Figure("Match rate", finding, [charts.line_chart(rates, runs, "match rate", finding, format=".0%")])


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
            "Time to result, all runs", finding, [charts.latency_chart(times, finding)], tables.latency_table(times)
        )
    if traffic is not None and len(traffic.submitted) >= MIN_TRAFFIC_BINS:
        finding = (
            f"{pluralize(sum(traffic.submitted), 'request')} sent, "
            f"{pluralize(sum(traffic.answered), 'result')} received, "
            f"rate-limited (429) {pluralize(sum(traffic.rate_limited), 'time')}."
        )
        pictures = list(charts.traffic_charts(traffic, finding))
        yield Figure(f"Requests over time, run {traffic.execution}", finding, pictures, tables.traffic_table(traffic))

"""The tables of the report: all numbers of the charts, marked up so that a program can read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec import Struct

from enrich.models import pluralize
from enrich.report.data import (
    TRAFFIC_KINDS,
    AnswerAge,
    ComparedSide,
    Comparison,
    HitCounts,
    LatencyHistogram,
    OutputRows,
    Report,
    ReportedProvider,
    ReportedRun,
    ReportedWaterfall,
    SkippedRows,
    Traffic,
    ratio,
)
from enrich.report.formatting import (
    BLANK_LABEL,
    DASH,
    NO_BREAK_SPACE,
    clean_text,
    format_amount,
    format_count,
    format_date,
    format_percent,
    format_seconds,
    format_status,
)

#: Limit of runs in the table of balance, polls and time.
RECENT_RUNS = 60
MAX_TRAFFIC_LINES = 60


#: How the numbers of these names are written. The others are counts.
_FORMATS: Mapping[str, Callable[[float | None], str]] = {
    **dict.fromkeys(("hit_rate", "found_share", "share"), format_percent),
    **dict.fromkeys(("credits", "credits_spent", "spent", "unattributed", "balance_after"), format_amount),
    **dict.fromkeys(("cost_per_hit", "cost_per_lead", "common_credits", "common_per_hit"), format_amount),
    "elapsed_s": format_seconds,
}


class Cell(Struct, frozen=True):
    """A number of the report: its name and value in `--json`. The name decides how it is written."""

    name: str
    value: float | None

    @property
    def text(self) -> str:
        """The number as it is shown."""
        return _FORMATS.get(self.name, format_count)(self.value)


def make_cells(facts: object, *names: str) -> list[Cell]:
    """Make a cell of each of these values."""
    return [Cell(name, getattr(facts, name)) for name in names]


class Line(Struct, frozen=True):
    """A row of a table: `about` is its subject for programs, `head` its first cell."""

    about: str
    head: str
    cells: Sequence[Cell | str]


class Table(Struct, frozen=True):
    """A table. Text cells are aligned left, numbers right."""

    caption: str
    heads: Sequence[str]
    lines: Sequence[Line]

    @property
    def sides(self) -> list[str]:
        """For each column, `words` (text) or an empty string (numbers)."""
        cells = self.lines[0].cells if self.lines else self.heads[1:]
        return ["words", *("words" if isinstance(cell, str) else "" for cell in cells)]


def provider_table(providers: Sequence[ReportedProvider], caption: str, about: str = "provider") -> Table:
    """List requests, matches and cost of each provider and verifier."""
    heads = ["Provider", "Requests", "Inferred", "Matches", "Match rate", "Rejected", "Passed on"]
    heads += ["Credits", "Per match"]
    lines = []
    for each in providers:
        calls = each.reported + each.inferred
        lines.append(
            Line(
                f"{about} {each.name}",
                clean_text(each.name) + (" (verifier)" if each.verifies else ""),
                (
                    Cell("calls", calls),
                    Cell("inferred", each.inferred),
                    Cell("found", None if each.verifies else each.found),
                    Cell("found_share", ratio(each.found, 0 if each.verifies else calls)),
                    Cell("rejected", None if each.verifies else each.rejected),
                    Cell("passed_on", None if each.verifies else each.passed_on),
                    *make_cells(each, "credits", "cost_per_hit"),
                ),
            )
        )
    return Table(caption, heads, lines)


def status_table(counts: Iterable[tuple[str, int]], caption: str, head: str) -> Table:
    """List counts by status."""
    pairs = list(counts)
    total = sum(count for _, count in pairs)
    lines = [
        Line("statuses", format_status(name), (Cell(name, count), Cell("share", ratio(count, total))))
        for name, count in pairs
    ]
    return Table(caption, (head, "Count", "Share"), lines)


def skipped_table(skipped: Sequence[SkippedRows]) -> Table:
    """List why rows were not sent."""
    has_steps = any(each.step for each in skipped)
    lines = []
    for each in skipped:
        reason, number = clean_text(each.reason), Cell("rows", each.rows)
        status = format_status(each.status) if each.status else DASH
        step = (clean_text(each.step, DASH),) if has_steps else ()
        lines.append(Line(f"skipped {each.step}".rstrip(), reason, (*step, status, number)))
    heads = ("Reason", *(("Step",) if has_steps else ()), "Status", "Rows")
    return Table("Rows without a request, by reason", heads, lines)


def step_table(report: Report) -> Table:
    """List requests, match rate and cost of each step, and of all."""
    leads = report.statuses.get("found", 0)

    def line(about: str, name: str, target: str, steps: Sequence[ReportedWaterfall]) -> Line:
        answers, answered, found = (
            sum(getattr(each, key) for each in steps) for key in ("answers", "answered", "found")
        )
        spent = sum(each.spent for each in steps)
        cells = (
            target,
            Cell("answers", answers),
            Cell("found", found),
            Cell("hit_rate", ratio(found, answered)),
            Cell("spent", spent),
            Cell("cost_per_hit", ratio(spent, found)),
            Cell("cost_per_lead", None if report.credits_unknown else ratio(spent, leads)),
        )
        return Line(about, name, cells)

    steps = report.step_waterfalls
    lines = [
        line(f"step {each.step}", clean_text(each.step), f"{each.kind} {clean_text(each.name)}", [each])
        for each in steps
    ]
    lines.append(line("all steps", "All steps", pluralize(len(steps), "step"), steps))
    heads = ("Step", "Target", "Requests", "Matches", "Match rate", "Credits", "Per match", "Per completed lead")
    return Table("All runs", heads, lines)


def hit_rate_table(rows: Sequence[HitCounts], caption: str, head: str, about: str) -> Table:
    """List match rates."""
    lines = [
        Line(
            f"{about} {each.name}",
            clean_text(each.name, BLANK_LABEL),
            [*make_cells(each, "rows", "answered", "found"), Cell("hit_rate", ratio(each.found, each.answered))],
        )
        for each in rows
    ]
    return Table(caption, (head, "Rows", "Results", "Matches", "Match rate"), lines)


def run_table(facts: Sequence[ReportedRun], caption: str) -> Table:
    """List outcome and results of each run, newest first."""
    heads = ("Run", "Outcome", "Sent", "Matches", "No match", "Failed", "Expired", "Match rate", "Credits", "Per match")
    lines = [
        Line(
            f"run {run.execution}",
            _run_label(run),
            (
                clean_text(run.outcome, DASH),
                *make_cells(run, "submitted", "found", "not_found", "failed", "expired"),
                *make_cells(run, "hit_rate", "credits_spent", "cost_per_hit"),
            ),
        )
        for run in reversed(facts)
    ]
    return Table(caption, heads, lines)


def run_traffic_table(runs: Sequence[ReportedRun]) -> Table:
    """List balance, polls and time of the newest runs."""
    lines = [
        Line(
            f"run {run.execution}",
            _run_label(run),
            make_cells(run, "balance_after", "polls", "rate_limited", "elapsed_s"),
        )
        for run in runs[: -RECENT_RUNS - 1 : -1]
    ]
    cut = f"The last {RECENT_RUNS} of {len(runs):,} runs, newest" if len(runs) > RECENT_RUNS else "Newest"
    return Table(f"{cut} first", ("Run", "Balance", "Polls", "429s", "Time"), lines)


def latency_table(times: LatencyHistogram) -> Table:
    """List the bars of the histogram."""
    lines = [
        Line("latencies", f"{format_seconds(bar.start)} to {format_seconds(bar.end)}", make_cells(bar, "count"))
        for bar in times.bars
    ]
    return Table("Tasks by time to result", ("Time", "Tasks"), lines)


def traffic_table(facts: Traffic) -> Table:
    """List requests and responses in steps of equal length."""
    merged = facts.merged(MAX_TRAFFIC_LINES)
    lines = [
        Line("traffic", format_seconds(number * merged.width_s), list(map(Cell, TRAFFIC_KINDS, counts)))
        for number, counts in enumerate(zip(*merged.series(), strict=True))
    ]
    caption = f"Run {facts.execution} in steps of {format_seconds(merged.width_s)}"
    return Table(caption, ("From", "Sent", "Results", "Polls", "429s"), lines)


def age_table(answers: Sequence[AnswerAge]) -> Table:
    """List the results in use by age."""
    lines = [Line("age", clean_text(each.label), make_cells(each, "found", "not_found")) for each in answers]
    return Table("Results in use, by age", ("Age", "Matches", "No match"), lines)


def sides_table(comparison: Comparison) -> Table:
    """List the totals of both sides of a comparison."""

    def line(about: str, side: ComparedSide) -> Line:
        names = " → ".join(map(clean_text, side.providers)) or DASH
        return Line(
            about,
            clean_text(side.label),
            (
                names,
                Cell("requests", side.compared),
                *make_cells(side, "found", "not_found"),
                Cell("hit_rate", ratio(side.found, side.found + side.not_found)),
                *make_cells(side, "credits", "cost_per_hit"),
            ),
        )

    heads = ("Side", "Providers", "Requests", "Matches", "No match", "Match rate", "Credits", "Per match")
    return Table("Each side as a whole", heads, [line("left", comparison.left), line("right", comparison.right)])


def common_leads_table(comparison: Comparison) -> Table:
    """List the results of both sides for the leads that both have answered."""

    def line(about: str, side: ComparedSide, only: int, spent: float) -> Line:
        found = comparison.both + only
        cells = [Cell("common_found", found), Cell("hit_rate", ratio(found, comparison.common)), Cell("only", only)]
        cells += [Cell("common_credits", spent), Cell("common_per_hit", ratio(spent, found))]
        return Line(f"common {about}", clean_text(side.label), cells)

    lines = [
        line("left", comparison.left, comparison.only_left, comparison.common_left_credits),
        line("right", comparison.right, comparison.only_right, comparison.common_right_credits),
    ]
    caption = f"{pluralize(comparison.common, 'lead')} with results on both sides"
    return Table(caption, ("Side", "Matches", "Match rate", "Only here", "Credits", "Per match"), lines)


def leads_table(rows: OutputRows) -> Table:
    """List the rows of the output (`--with-rows`)."""
    lines = [
        Line("lead", clean_text(cells[0], DASH) if cells else DASH, [clean_text(cell, "") for cell in cells[1:]])
        for cells in rows.cells
    ]
    return Table("Rows of the output", [clean_text(name) for name in rows.columns], lines)


def _run_label(run: ReportedRun) -> str:
    return f"#{run.execution}{NO_BREAK_SPACE}·{NO_BREAK_SPACE}{format_date(run.started_at)}"

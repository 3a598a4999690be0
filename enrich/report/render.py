"""Renders the report as one HTML file that needs no network. Equal data gives equal bytes."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from msgspec import Struct

from enrich.models import pluralize
from enrich.report import sections, tables
from enrich.report.data import Report, ReportedRun, ReportedWaterfall
from enrich.report.formatting import DASH, clean_text, format_amount, format_date, format_time
from enrich.report.tables import Cell

#: The newest runs are shown; older ones are collapsed.
RUNS_SHOWN = 14
#: Rates of two runs are compared if each has at least this many results.
MIN_COMPARED = 100


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
    page, style, script = (
        folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    comparison, waterfalls = report.comparison, report.step_waterfalls or [report.waterfall]
    return environment.from_string(
        page
    ).render(
        report=report,
        style=Markup(style),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - a file of this package
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        last=report.runs[-1] if report.runs else None,
        tile_groups=list(tile_groups(report)),
        steps=tables.step_table(report) if report.step_waterfalls else None,
        waterfalls=[
            (each, sections.waterfall_figure(each), _waterfall_cells(each), f"waterfall {each.step}".rstrip())
            for each in waterfalls
        ],
        sections=list(sections.make_sections(report)),
        compared=comparison and (tables.common_leads_table(comparison), tables.sides_table(comparison)),
        sides=list(sections.side_figures(comparison)) if comparison else [],
        runs=tables.run_table(report.runs[-RUNS_SHOWN:], "Newest first"),
        older=tables.run_table(report.runs[:-RUNS_SHOWN], "Older runs, newest first"),
        traffic=tables.run_traffic_table(report.runs),
        requests=tables.status_table(report.requests.items(), "Requests in the ledger by state", "State"),
        leads=report.leads and tables.leads_table(report.leads),
        total_cell=tables.credits_cell("credits_spent", report.credits_spent),
        rows_cell=tables.count_cell("rows", report.rows),
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


def _last_run_tiles(report: Report) -> Iterator[Tile]:
    run, earlier = report.runs[-1], _comparable_run(report.runs)

    def change(of: Callable[[ReportedRun], float | None], write: Callable[[float], str], better: int) -> _Change:
        return (None, None) if earlier is None else _format_change(earlier, of(earlier), of(run), write, better)

    yield Tile(
        "Match rate",
        tables.share_cell("hit_rate", run.hit_rate),
        f"of {pluralize(run.answered, 'result')}",
        *change(lambda each: each.hit_rate, lambda points: f"{points * 100:.1f} points", 1),
    )
    yield Tile("Matches", tables.count_cell("found", run.found), f"{pluralize(run.submitted, 'request')} sent")
    yield Tile("Credits", tables.credits_cell("credits_spent", run.credits_spent), _planned_text(report.planned, run))
    yield Tile(
        "Cost per match",
        tables.credits_cell("cost_per_hit", run.cost_per_hit),
        "credits" if run.cost_per_hit is not None else "no match",
        *change(lambda each: each.cost_per_hit, format_amount, -1),
    )
    yield Tile("Balance", tables.credits_cell("balance_after", run.balance_after), _balance_text(run))


def _all_runs_tiles(report: Report) -> Iterator[Tile]:
    if len(report.runs) > 1:
        found, answered, sent = (
            sum(getattr(run, name) for run in report.runs) for name in ("found", "answered", "submitted")
        )
        unknown = f"{report.credits_unknown:,} of unknown price" if report.credits_unknown else "credits spent"
        per_match = report.credits_spent / found if found else None
        yield Tile("Match rate", tables.rate_cell(found, answered), f"of {pluralize(answered, 'result')}")
        yield Tile("Matches", tables.count_cell("found", found), f"{pluralize(sent, 'request')} sent")
        yield Tile("Credits", tables.credits_cell("credits_spent", report.credits_spent), unknown)
        yield Tile("Cost per match", tables.credits_cell("cost_per_hit", per_match), "credits" if found else "no match")
    if report.step_waterfalls:
        complete = tables.count_cell("found", report.statuses.get("found"))
        yield Tile("Completed leads", complete, f"of {pluralize(report.rows or 0, 'row')}")
        yield Tile("Per completed lead", tables.credits_cell("cost_per_lead", report.cost_per_lead), "credits")


def _comparable_run(runs: Sequence[ReportedRun]) -> ReportedRun | None:
    """Return the newest earlier run with enough results; None when there is none, or the last run has too few."""
    enough = [run for run in runs if run.answered >= MIN_COMPARED]
    return enough[-2] if len(enough) > 1 and enough[-1] is runs[-1] else None


_Change = tuple[str | None, bool | None]


def _format_change(
    earlier: ReportedRun, old: float | None, new: float | None, write: Callable[[float], str], better: int
) -> _Change:
    """Format a change since an earlier run. `better`: 1 if more is good, -1 if less is good."""
    if old is None or new is None:
        return None, None
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


def _waterfall_cells(facts: ReportedWaterfall) -> dict[str, Cell]:
    counts = tables.count_cells(facts, "answers", "found", "not_reported")
    amounts = [tables.credits_cell(name, getattr(facts, name)) for name in ("spent", "unattributed")]
    return {cell.name: cell for cell in (*counts, *amounts)}

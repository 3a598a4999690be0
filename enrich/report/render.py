"""Renders the report as one HTML file that needs no network and no script. Equal data gives equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from enrich.report import formatting, sections, tables
from enrich.report.data import Report, ReportedRun
from enrich.report.tables import Cell

#: The newest runs are shown; older ones are collapsed.
RUNS_SHOWN = 14


@dataclass(frozen=True, slots=True)
class Tile:
    """A key number with a note and its change since the run before; `good` is None where a change is neutral."""

    label: str
    cell: Cell
    about: str
    note: str
    change: str | None = None
    good: bool | None = None


def render_report(report: Report) -> str:
    """Return the page as HTML."""
    folder = files("enrich.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "clean": formatting.clean_text,
        "moment": formatting.format_time,
        "count": formatting.format_count,
    }
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    comparison = report.comparison
    return template.render(
        report=report,
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),  # noqa: S704 - a file of this package
        night=report.nights[-1] if report.nights else None,
        tiles=list(make_tiles(report)),
        waterfall=sections.waterfall_figure(report.waterfall),
        sections=list(sections.make_sections(report)),
        compared=comparison and (tables.common_leads_table(comparison), tables.sides_table(comparison)),
        sides=list(sections.side_figures(comparison)) if comparison else [],
        nights=tables.run_table(report.nights[-RUNS_SHOWN:], "The last nights, newest first"),
        older=tables.run_table(report.nights[:-RUNS_SHOWN], "Older nights, newest first"),
        requests=tables.status_table(report.requests.items(), "Requests in the ledger by state", "State"),
        leads=report.leads and tables.leads_table(report.leads),
        totals=_waterfall_cells(report),
        total_cell=tables.credits_cell("credits_spent", report.credits_spent),
        rows_cell=tables.count_cell("rows", report.rows),
        dash=formatting.DASH,
    )


def make_tiles(report: Report) -> Iterator[Tile]:
    """Yield the key numbers of the last run."""
    if not report.nights:
        return
    run, about = report.nights[-1], f"night {report.nights[-1].execution}"

    def difference(of: Callable[[ReportedRun], float | None]) -> float | None:
        old, new = of(report.nights[-2]) if len(report.nights) > 1 else None, of(run)
        return None if old is None or new is None else new - old

    yield Tile(
        "Hit rate",
        Cell(formatting.format_percent(run.hit_rate), "hit_rate", run.hit_rate),
        about,
        f"{run.found:,} of {run.answered:,} answered",
        *_format_change(difference(lambda each: each.hit_rate), lambda points: f"{points * 100:.1f} points", better=1),
    )
    yield Tile(
        "Leads found",
        tables.count_cell("found", run.found),
        about,
        f"{run.submitted:,} sent",
        *_format_change(difference(lambda each: each.found), formatting.format_count),
    )
    yield Tile(
        "Credits",
        tables.credits_cell("credits_spent", run.credits_spent),
        about,
        _planned_text(report.planned, run),
        *_format_change(difference(lambda each: each.credits_spent), formatting.format_amount),
    )
    yield Tile(
        "Cost per hit",
        tables.credits_cell("cost_per_hit", run.cost_per_hit),
        about,
        "credits" if run.cost_per_hit is not None else "no hit tonight",
        *_format_change(difference(lambda each: each.cost_per_hit), formatting.format_amount, better=-1),
    )
    yield Tile("Balance", tables.credits_cell("balance_after", run.balance_after), about, _balance_text(run))


def _format_change(
    change: float | None, write: Callable[[float], str], *, better: int = 0
) -> tuple[str | None, bool | None]:
    """Format a change. `better`: 1 if more is good, -1 if less is good, 0 for no judgment."""
    if change is None:
        return None, None
    size = write(abs(change))
    if size == write(0.0):
        return "as the night before", None
    return f"▲ {size} more" if change > 0 else f"▼ {size} less", change * better > 0 if better else None


def _planned_text(planned: Mapping[str, float | None] | None, run: ReportedRun) -> str:
    unknown = f"; {run.credits_unknown:,} of unknown price" if run.credits_unknown else ""
    known = {name: amount for name, amount in (planned or {}).items() if amount is not None}
    if "likely" in known:
        return f"planned {formatting.format_amount(known['likely'])}{unknown}"
    if "max" in known:
        return f"planned at most {formatting.format_amount(known['max'])}{unknown}"
    return f"no plan is known{unknown}"


def _balance_text(run: ReportedRun) -> str:
    if run.balance_after is None:
        return "not known"
    if run.balance_before is None:
        return "credits left"
    was = f"was {formatting.format_amount(run.balance_before)}"
    if run.unexplained is None:
        return was
    return f"{was}; {f'{run.unexplained:+,.2f} unexplained' if run.unexplained else 'all explained'}"


def _waterfall_cells(report: Report) -> dict[str, Cell]:
    facts = report.waterfall
    counts = {name: tables.count_cell(name, getattr(facts, name)) for name in ("answers", "found", "untold")}
    return counts | {name: tables.credits_cell(name, getattr(facts, name)) for name in ("spent", "elsewhere")}

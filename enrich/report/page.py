"""Writes the report as one HTML file that needs no network and no script. Equal facts make equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from enrich.report import grids, sections, words
from enrich.report.facts import Night, Report
from enrich.report.grids import Cell

#: So many nights stand open; older ones are folded away.
NIGHTS_SHOWN = 14


@dataclass(frozen=True, slots=True)
class Tile:
    """A key number with a note, and its change against the night before; `good` where that can be judged."""

    label: str
    cell: Cell
    about: str
    note: str
    change: str | None = None
    good: bool | None = None


def render(report: Report) -> str:
    """Write the page."""
    folder = files("enrich.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clean": words.clean, "moment": words.moment, "count": words.count}
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    compared = report.comparison
    return template.render(
        report=report,
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        night=report.nights[-1] if report.nights else None,
        tiles=list(tiles(report)),
        waterfall=sections.waterfall(report.waterfall),
        sections=list(sections.sections(report)),
        compared=compared and (grids.common(compared), grids.sides(compared)),
        sides=list(sections.sides(compared)) if compared else [],
        nights=grids.nights(report.nights[-NIGHTS_SHOWN:], "The last nights, newest first"),
        older=grids.nights(report.nights[:-NIGHTS_SHOWN], "Older nights, newest first"),
        requests=grids.statuses(report.requests.items(), "Requests in the ledger by state", "State"),
        leads=report.leads and grids.leads(report.leads),
        totals=_totals(report),
        total_cell=grids.credits("credits_spent", report.credits_spent),
        rows_cell=grids.whole("rows", report.rows),
        dash=words.DASH,
    )


def tiles(report: Report) -> Iterator[Tile]:
    """Yield the key numbers of the last night."""
    if not report.nights:
        return
    night, about = report.nights[-1], f"night {report.nights[-1].execution}"

    def change(of: Callable[[Night], float | None]) -> float | None:
        old, new = of(report.nights[-2]) if len(report.nights) > 1 else None, of(night)
        return None if old is None or new is None else new - old

    yield Tile(
        "Hit rate",
        Cell(words.percent(night.hit_rate), "hit_rate", night.hit_rate),
        about,
        f"{night.found:,} of {night.answered:,} answered",
        *_change(change(lambda each: each.hit_rate), lambda points: f"{points * 100:.1f} points", better=1),
    )
    yield Tile(
        "Leads found",
        grids.whole("found", night.found),
        about,
        f"{night.submitted:,} sent",
        *_change(change(lambda each: each.found), words.count),
    )
    yield Tile(
        "Credits",
        grids.credits("credits_spent", night.credits_spent),
        about,
        _planned(report.planned, night),
        *_change(change(lambda each: each.credits_spent), words.credits),
    )
    yield Tile(
        "Cost per hit",
        grids.credits("cost_per_hit", night.cost_per_hit),
        about,
        "credits" if night.cost_per_hit is not None else "no hit tonight",
        *_change(change(lambda each: each.cost_per_hit), words.credits, better=-1),
    )
    yield Tile("Balance", grids.credits("balance_after", night.balance_after), about, _balance(night))


def _change(change: float | None, write: Callable[[float], str], *, better: int = 0) -> tuple[str | None, bool | None]:
    """Write a change, and judge it where `better` says which way is good."""
    if change is None:
        return None, None
    size = write(abs(change))
    if size == write(0.0):
        return "as the night before", None
    return f"▲ {size} more" if change > 0 else f"▼ {size} less", change * better > 0 if better else None


def _planned(planned: Mapping[str, float | None] | None, night: Night) -> str:
    unknown = f"; {night.credits_unknown:,} of unknown price" if night.credits_unknown else ""
    known = {name: amount for name, amount in (planned or {}).items() if amount is not None}
    if "likely" in known:
        return f"planned {words.credits(known['likely'])}{unknown}"
    if "max" in known:
        return f"planned at most {words.credits(known['max'])}{unknown}"
    return f"no plan is known{unknown}"


def _balance(night: Night) -> str:
    if night.balance_after is None:
        return "not known"
    if night.balance_before is None:
        return "credits left"
    was = f"was {words.credits(night.balance_before)}"
    if night.unexplained is None:
        return was
    return f"{was}; {f'{night.unexplained:+,.2f} unexplained' if night.unexplained else 'all explained'}"


def _totals(report: Report) -> dict[str, Cell]:
    facts = report.waterfall
    counts = {name: grids.whole(name, getattr(facts, name)) for name in ("answers", "found", "untold")}
    return counts | {name: grids.credits(name, getattr(facts, name)) for name in ("spent", "elsewhere")}

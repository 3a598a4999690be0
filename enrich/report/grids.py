"""The tables of the report: what the charts show, to the last number, and marked so that a program can read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from enrich.model import many
from enrich.report import words
from enrich.report.facts import (
    Age,
    Comparison,
    Groups,
    Hits,
    Latencies,
    Night,
    Provider,
    Rows,
    Side,
    Traffic,
    Waterfall,
)

#: So many nights have a row in the tables below their charts; all are in the list of nights.
RECENT = 60


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of the facts: how it is written, its name in `--json`, and its value there."""

    text: str
    name: str
    value: float | None


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table: what it is about as a program calls it, its head, and the cells after it."""

    about: str
    head: str
    cells: Sequence[Cell | str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table, of whose cells texts are set to the left and numbers to the right."""

    caption: str
    heads: Sequence[str]
    lines: Sequence[Line]

    @property
    def sides(self) -> list[str]:
        """Tell for each column whether it holds `words` or numbers (an empty text)."""
        cells = self.lines[0].cells if self.lines else ()
        return ["words", *("words" if isinstance(cell, str) else "" for cell in cells)]


def whole(name: str, number: int | None) -> Cell:
    """Make a cell of a count."""
    return Cell(words.count(number), name, number)


def credits(name: str, amount: float | None) -> Cell:  # noqa: A001 - the word of the trade
    """Make a cell of an amount."""
    return Cell(words.credits(amount), name, amount)


def rate(part: int, of: int, name: str = "hit_rate") -> Cell:
    """Make a cell of a share."""
    found = words.share(part, of)
    return Cell(words.percent(found), name, found)


def providers(asked: Sequence[Provider], caption: str, about: str = "provider") -> Table:
    """Tell what each provider and verifier was asked, found and cost."""
    heads = ("Provider", "Asked", "of it presumed", "Found", "of asked", "Rejected", "Passed on", "Credits", "Per hit")
    lines = []
    for each in asked:
        reached = each.asked + each.presumed
        lines.append(
            Line(
                f"{about} {each.name}",
                f"{words.clean(each.name)} (verifier)" if each.verifies else words.clean(each.name),
                (
                    Cell(words.count(reached), "asked_in_all", reached),
                    whole("presumed", each.presumed),
                    whole("found", None if each.verifies else each.found),
                    rate(each.found, 0 if each.verifies else reached, "found_of_asked"),
                    whole("rejected", None if each.verifies else each.rejected),
                    whole("passed_on", None if each.verifies else each.passed_on),
                    credits("credits", each.credits),
                    credits("cost_per_hit", each.cost_per_hit),
                ),
            )
        )
    return Table(caption, heads, lines)


def waterfall(facts: Waterfall) -> Table:
    """Tell the providers in the order in which they are asked, verifiers last."""
    return providers(facts.providers, "Providers in the order they are asked; verifiers last")


def statuses(counts: Iterable[tuple[str, int]], caption: str, head: str) -> Table:
    """Tell counts by status."""
    pairs = list(counts)
    all_of_them = sum(count for _, count in pairs)
    lines = [
        Line("statuses", name.replace("_", " "), (whole(name, count), rate(count, all_of_them, "share")))
        for name, count in pairs
    ]
    return Table(caption, (head, "Count", "Share"), lines)


def hits(rows: Sequence[Hits], caption: str, head: str, about: str) -> Table:
    """Tell hit rates."""
    lines = [
        Line(
            f"{about} {each.name}",
            words.clean(each.name, "(blank)"),
            (
                whole("rows", each.rows),
                whole("answered", each.answered),
                whole("found", each.found),
                rate(each.found, each.answered),
            ),
        )
        for each in rows
    ]
    return Table(caption, (head, "Rows", "Answered", "Found", "Hit rate"), lines)


def groups(facts: Groups) -> Table:
    """Tell hit rates by the values of an input column."""
    column = words.clean(facts.column)
    return hits(facts.groups, f"Hit rate by {column}", column, f"group {facts.column}")


def spending(nights: Sequence[Night]) -> Table:
    """Tell what each night cost, newest first."""
    total, lines = 0.0, []
    for night in nights:
        total += night.credits_spent
        cells = credits("credits_spent", night.credits_spent), credits("so_far", round(total, 6))
        lines.append(Line(f"spending {night.execution}", _named(night), cells))
    return Table(_caption("Credits", nights), ("Night", "Credits", "In all"), lines[: -RECENT - 1 : -1])


def cost_per_hit(nights: Sequence[Night]) -> Table:
    """Tell what a hit cost in each night, newest first."""
    lines = [
        Line(
            f"cost_per_hit {night.execution}",
            _named(night),
            (whole("found", night.found), credits("cost_per_hit", night.cost_per_hit)),
        )
        for night in nights[: -RECENT - 1 : -1]
    ]
    return Table(_caption("Cost per hit", nights), ("Night", "Found", "Per hit"), lines)


def night_rates(nights: Sequence[Night]) -> Table:
    """Tell the hit rate of each night, newest first."""
    lines = [
        Line(
            f"hit_rate {night.execution}",
            _named(night),
            (whole("answered", night.answered), whole("found", night.found), rate(night.found, night.answered)),
        )
        for night in nights[: -RECENT - 1 : -1]
    ]
    return Table(_caption("Hit rate", nights), ("Night", "Answered", "Found", "Hit rate"), lines)


def nights(facts: Sequence[Night], caption: str) -> Table:
    """Tell all that is kept of each night, newest first."""
    heads: tuple[str, ...] = ("Night", "Outcome", "Sent", "Found", "Not found", "Failed", "Expired", "Hit rate")
    heads += ("Credits", "Per hit", "Balance", "Polls", "429s", "Time")
    lines = [
        Line(
            f"night {night.execution}",
            _named(night),
            (
                words.clean(night.outcome, words.DASH),
                whole("submitted", night.submitted),
                whole("found", night.found),
                whole("not_found", night.not_found),
                whole("failed", night.failed),
                whole("expired", night.expired),
                Cell(words.percent(night.hit_rate), "hit_rate", night.hit_rate),
                credits("credits_spent", night.credits_spent),
                credits("cost_per_hit", night.cost_per_hit),
                credits("balance_after", night.balance_after),
                whole("polls", night.polls),
                whole("rate_limited", night.rate_limited),
                Cell(words.seconds(night.elapsed_s), "elapsed_s", night.elapsed_s),
            ),
        )
        for night in reversed(facts)
    ]
    return Table(caption, heads, lines)


def latencies(times: Latencies) -> Table:
    """Tell the bars of the histogram."""
    lines = [
        Line("latencies", f"{words.seconds(bar.start)} to {words.seconds(bar.end)}", (whole("count", bar.count),))
        for bar in times.bars
    ]
    return Table("Tasks by the time until their answer", ("From the POST", "Tasks"), lines)


def traffic(facts: Traffic, *, most: int = 60) -> Table:
    """Tell what was sent and heard, in at most so many steps of equal length."""
    series = {
        "submitted": facts.submitted,
        "answered": facts.answered,
        "polls": facts.polls,
        "rate_limited": facts.rate_limited,
    }
    length = max(map(len, series.values()), default=0)
    step = max(1, -(-length // most))
    lines = [
        Line(
            "traffic",
            words.seconds(at * facts.width_s),
            tuple(whole(name, sum(counts[at : at + step])) for name, counts in series.items()),
        )
        for at in range(0, length, step)
    ]
    caption = f"Execution {facts.execution} in steps of {words.seconds(step * facts.width_s)}"
    return Table(caption, ("From", "Sent", "Answered", "Polls", "429s"), lines)


def ages(answers: Sequence[Age]) -> Table:
    """Tell how old the answers in use are."""
    lines = [
        Line("age", words.clean(each.label), (whole("found", each.found), whole("not_found", each.not_found)))
        for each in answers
    ]
    return Table("Answers in use, by age", ("Age", "Found", "Not found"), lines)


def sides(compared: Comparison) -> Table:
    """Tell both sides of a comparison."""

    def line(about: str, side: Side) -> Line:
        names = " → ".join(map(words.clean, side.providers)) or words.DASH
        return Line(
            about,
            words.clean(side.label),
            (
                names,
                whole("asked", side.asked),
                whole("found", side.found),
                whole("not_found", side.not_found),
                rate(side.found, side.found + side.not_found),
                credits("credits", side.credits),
                credits("cost_per_hit", side.cost_per_hit),
            ),
        )

    heads = ("Side", "Providers", "Asked", "Found", "Not found", "Hit rate", "Credits", "Per hit")
    return Table("Each side as a whole", heads, [line("left", compared.left), line("right", compared.right)])


def common(compared: Comparison) -> Table:
    """Tell what both sides came to on the leads that both have answered."""

    def line(about: str, side: Side, found: int, only: int, spent: float) -> Line:
        cells = (whole("common_found", found), rate(found, compared.common), whole("only", only))
        money = (credits("common_credits", spent), credits("common_per_hit", spent / found if found else None))
        return Line(f"common {about}", words.clean(side.label), (*cells, *money))

    both = compared.both
    lines = [
        line("left", compared.left, both + compared.only_left, compared.only_left, compared.common_left_credits),
        line("right", compared.right, both + compared.only_right, compared.only_right, compared.common_right_credits),
    ]
    caption = f"Like with like: the {many(compared.common, 'lead')} that both sides have answered"
    return Table(caption, ("Side", "Found", "Hit rate", "Only here", "Credits", "Per hit"), lines)


def leads(rows: Rows) -> Table:
    """Give the rows of the output, as they were asked for."""
    lines = [
        Line(
            "lead",
            words.clean(cells[0], words.DASH) if cells else words.DASH,
            [words.clean(cell, "") for cell in cells[1:]],
        )
        for cells in rows.cells
    ]
    return Table("Rows of the output", [words.clean(name) for name in rows.columns], lines)


def _named(night: Night) -> str:
    return f"#{night.execution}{words.SPACE}·{words.SPACE}{words.date(night.started_at)}"


def _caption(what: str, nights: Sequence[Night]) -> str:
    cut = f"the last {RECENT} of {len(nights):,} nights" if len(nights) > RECENT else "nights"
    return f"{what}: {cut}, newest first"

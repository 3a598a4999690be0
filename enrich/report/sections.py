"""What the page is made of: each chart with the sentence that says what it shows, and its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from enrich.model import many
from enrich.report import charts, grids, staircase, timelines, words
from enrich.report.drawing import HALF, NARROW, Picture
from enrich.report.facts import Comparison, Groups, Hits, Latencies, Night, Report, Traffic, Waterfall
from enrich.report.grids import Table

#: So many nights make a trend.
TREND = 2


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart: its title, what it shows in a sentence, its pictures for each size of screen, its table."""

    title: str
    finding: str
    pictures: Sequence[Picture]
    table: Table | None = None
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with its figures; `empty` is said where there are none."""

    key: str
    title: str
    figures: Sequence[Figure]
    empty: str

    @property
    def stacks(self) -> list[list[Figure]]:
        """Put the figures into two columns of about the same height."""
        stacks: list[list[Figure]] = [[], []]
        for figure in self.figures:
            min(stacks, key=_height).append(figure)
        return [stack for stack in stacks if stack]


def _height(stack: Sequence[Figure]) -> float:
    around = 100.0
    return sum(around + sum(picture.height for picture in figure.pictures) for figure in stack)


def sections(report: Report) -> Iterator[Section]:
    """Yield what comes after the waterfall, in the order of the page."""
    yield Section("rows", "What the rows came to", list(_rows(report)), "No row was looked at yet.")
    yield Section(
        "money", "Night by night", list(_money(report.nights)), "There are too few nights with answers to show a trend."
    )
    yield Section("speed", "How the run went", list(_speed(report)), "The last run sent nothing.")


def waterfall(facts: Waterfall) -> Figure | None:
    """Draw the waterfall; None before the first answer."""
    if not facts.answers or not any(not each.verifies for each in facts.providers):
        return None
    finding = _staircase(facts)
    finding += _verified(facts)
    return Figure("The waterfall", finding, [staircase.draw(facts, finding)], grids.waterfall(facts), wide=True)


def sides(compared: Comparison) -> Iterator[Figure]:
    """Draw the waterfall of each side."""
    pairs = ((compared.left, compared.left_providers, "left"), (compared.right, compared.right_providers, "right"))
    for side, providers, about in pairs:
        answers = side.found + side.not_found
        if not answers or all(each.verifies for each in providers):
            continue
        label = words.clean(side.label)
        facts = Waterfall(label, providers, answers, side.found, 0, side.credits, 0.0)
        rate = words.percent(words.share(side.found, answers))
        finding = f"{side.found:,} of {answers:,} found ({rate}) for {words.credits(side.credits)} credits."
        table = grids.providers(providers, f"Providers of {label}", f"{about} provider")
        yield Figure(label, finding, [staircase.draw(facts, finding, (NARROW, HALF))], table)


def _staircase(facts: Waterfall) -> str:
    told = f"Of {many(facts.answers, 'answer')}, {facts.found:,} found something"
    told += f" ({words.percent(words.share(facts.found, facts.answers))})."
    best = max((each for each in facts.providers if not each.verifies), key=lambda each: each.found)
    if best.found:
        part = words.percent(words.share(best.found, facts.found))
        told += f" {words.clean(best.name)} found most of them: {best.found:,} ({part} of all finds)."
    priced = [each for each in facts.providers if each.cost_per_hit is not None and not each.verifies]
    if len(priced) > 1:
        dear = max(priced, key=lambda each: each.cost_per_hit or 0.0)
        told += f" A hit costs most at {words.clean(dear.name)}: {words.credits(dear.cost_per_hit)} credits."
    return told


def _verified(facts: Waterfall) -> str:
    told = (
        f" {words.clean(each.name)} verified {many(each.asked, 'find')}: {words.credits(each.credits)} credits."
        for each in facts.providers
        if each.verifies
    )
    return "".join(told)


def _rows(report: Report) -> Iterator[Figure]:
    counts = [(status, count) for status, count in report.statuses.items() if count]
    if counts:
        finding = _outcome(counts)
        table = grids.statuses(counts, "Rows of the input by status", "Status")
        yield _figure("Rows by status", finding, table, charts.statuses(counts, finding))
    if report.columns:
        finding = _rates(report.columns, "Every column was filled equally often")
        table = grids.hits(report.columns, "Hit rate by output column", "Column", "column")
        yield _figure("Hit rate by column", finding, table, charts.rates(report.columns, finding))
    whole = sum(each.found + each.not_found for each in report.ages)
    if whole:
        finding = f"{many(whole, 'answer')} in use, as found + not found."
        yield _figure("Age of the answers", finding, grids.ages(report.ages), charts.ages(report.ages, finding))
    for each in report.groups:
        if each.groups:
            finding, table = _grouped(each), grids.groups(each)
            yield _figure(table.caption, finding, table, charts.rates(each.groups, finding))


def _outcome(counts: Sequence[tuple[str, int]]) -> str:
    whole = sum(count for _, count in counts)
    most = max(counts, key=lambda pair: pair[1], default=("", 0))
    if not whole:
        return "The input has no rows."
    rate = words.percent(words.share(most[1], whole))
    return f"Of {many(whole, 'row')} of the input, {most[1]:,} ({rate}) are {most[0].replace('_', ' ')}."


def _rates(hits: Sequence[Hits], equal: str) -> str:
    known = [each for each in hits if each.answered]
    if not known:
        return "None of these rows was answered yet."
    best = max(known, key=lambda each: each.found / each.answered)
    least = min(known, key=lambda each: each.found / each.answered)
    high, low = (words.percent(each.found / each.answered) for each in (best, least))
    if len(known) == 1:
        return f"{words.clean(best.name, '(blank)')} has a value in {high} of the answered rows."
    if high == low:
        return f"{equal}: {high}."
    return f"From {low} ({words.clean(least.name, '(blank)')}) to {high} ({words.clean(best.name, '(blank)')})."


def _grouped(groups: Groups) -> str:
    told = _rates(groups.groups, "All groups have the same hit rate")
    if len(groups.groups) > charts.MOST_BARS:
        told += f" The first {charts.MOST_BARS} of {len(groups.groups)} are drawn; the table has all."
    if groups.rest:
        told += f" The last group stands for {many(groups.rest, 'further value')}."
    return told


def _money(nights: Sequence[Night]) -> Iterator[Figure]:
    if len(nights) < TREND:
        return
    spent = sum(night.credits_spent for night in nights)
    if spent:
        dearest = max(nights, key=lambda night: night.credits_spent)
        finding = f"{words.credits(spent)} credits in {many(len(nights), 'night')}; most in execution "
        finding += f"{dearest.execution}, {words.credits(dearest.credits_spent)}."
        pictures = timelines.night_credits(nights, finding), timelines.all_credits(nights, f"Added up. {finding}")
        yield _figure("Credits per night and in all", finding, grids.spending(nights), *pictures)
    if any(night.cost_per_hit is not None for night in nights):
        finding = _per_hit(nights)
        yield _figure("Cost per hit", finding, grids.cost_per_hit(nights), timelines.cost_per_hit(nights, finding))
    if any(night.answered for night in nights):
        finding = _night_rates(nights)
        yield _figure(
            "Hit rate of each night", finding, grids.night_rates(nights), timelines.night_rates(nights, finding)
        )


def _night_rates(nights: Sequence[Night]) -> str:
    known = [night.hit_rate for night in nights if night.hit_rate is not None]
    if len(known) == 1:
        return f"{words.percent(known[0])} of what was answered was found."
    spread = f"between {words.percent(min(known))} and {words.percent(max(known))}"
    return f"{words.percent(known[-1])} in the last night with an answer, {spread} over all."


def _per_hit(nights: Sequence[Night]) -> str:
    known = [night.cost_per_hit for night in nights if night.cost_per_hit is not None]
    if len(known) == 1:
        return f"A hit cost {words.credits(known[0])} credits."
    spread = f"between {words.credits(min(known))} and {words.credits(max(known))}"
    return f"A hit cost {words.credits(known[-1])} credits in the last night with one, {spread} over all."


def _speed(report: Report) -> Iterator[Figure]:
    times, traffic = report.latencies, report.traffic
    if times is not None and times.count:
        finding = _waited(times)
        yield _figure("Time until an answer", finding, grids.latencies(times), timelines.latencies(times, finding))
    if traffic is not None and any((*traffic.submitted, *traffic.answered, *traffic.rate_limited)):
        finding = _sent(traffic)
        pictures = timelines.throughput(traffic, finding), timelines.limited(traffic, finding)
        yield _figure("Sent, answered and held back", finding, grids.traffic(traffic), *pictures)


def _waited(times: Latencies) -> str:
    half, most, longest = (words.seconds(each) for each in (times.median, times.p90, times.longest))
    told = f"Half of {many(times.count, 'task')} were answered within {half}, 90% within {most}"
    return f"{told}; the slowest took {longest}."


def _sent(traffic: Traffic) -> str:
    sent, answered, limited = (sum(each) for each in (traffic.submitted, traffic.answered, traffic.rate_limited))
    told = f"Execution {traffic.execution} sent {many(sent, 'request')} and heard {many(answered, 'answer')}"
    return (
        f"{told}; the API said 429 (too fast) {many(limited, 'time')}."
        if limited
        else f"{told}; it was never held back (no 429)."
    )


def _figure(title: str, finding: str, table: Table, *pictures: Picture | None) -> Figure:
    return Figure(title, finding, [picture for picture in pictures if picture], table)

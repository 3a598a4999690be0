"""What was not so before: the last night against the nights before it; pure.

Each rule asks two things: is the difference large enough to matter, and may it be chance. Chance is ruled out beyond
three standard deviations, as on a control chart (Shewhart, Economic Control of Quality, 1931): shares by the
two-proportion z-test (Fleiss, Levin, Paik: Statistical Methods for Rates and Proportions, ch. 3), the cost per hit as
a ratio estimate (Cochran: Sampling Techniques, ch. 6), what is there or not by Fisher's exact test.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import exp, inf, lgamma, sqrt
from typing import Any

from enrich.api.answer import PHASES, is_blank, parse_data, pick
from enrich.cascade import read_task
from enrich.model import MICROS, Settled, State
from enrich.report.facts import Anomaly

#: So many standard deviations are no chance.
SIGMAS = 3.0
#: So many answers (or hits) must be on both sides.
ENOUGH = 20
#: A share must have changed by so much, a cost per hit by this part of it.
POINTS, DEARER = 0.05, 0.25
#: What is there or not there by chance at most this often is no chance; there are many fields to look at.
RARE = 0.0001
#: A value of a column is repeated when more hits than these have it.
OFTEN, OFTEN_SHARE = 5, 0.02
#: So many different values of a column and names of fields are kept; beyond that counts are a little too low.
KEPT = 10_000
FIELDS = 500
DEPTH = 6
#: A longer or stranger name may be data.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")


class Often:
    """Counts what is frequent in little memory (Misra, Gries: Finding repeated elements, 1982).

    Up to KEPT different values the counts are exact; with more, too low by one in KEPT of all at most.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.total = 0

    def add(self, value: object) -> None:
        """Count a value; only a hash of it is kept."""
        key = hash(value)
        self.total += 1
        if key in self._counts or len(self._counts) < KEPT:
            self._counts[key] = self._counts.get(key, 0) + 1
        else:
            self._counts = {key: count - 1 for key, count in self._counts.items() if count > 1}

    def most(self) -> list[int]:
        """How often the two most frequent values were seen."""
        return [*sorted(self._counts.values(), reverse=True), 0, 0][:2]


@dataclass(slots=True)
class Nights:
    """What some nights answered. `paths` are the job's columns."""

    paths: Mapping[str, str]
    found: int = 0
    not_found: int = 0
    failed: int = 0
    #: Hits whose answer is still there.
    read: int = 0
    values: dict[str, Often] = field(default_factory=dict)
    fields: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    #: Of the answers of known price: their hits, and the sums of c, c² and c·h (c: millionths, h: 1 for a hit).
    hits: int = 0
    cost: int = 0
    cost_squared: int = 0
    cost_of_hits: int = 0

    @property
    def answered(self) -> int:
        """How many came to a hit or a clean miss."""
        return self.found + self.not_found

    def add(self, settled: Settled) -> None:
        """Count an answer."""
        found = settled.state == State.FOUND
        self.found += found
        self.not_found += settled.state == State.NOT_FOUND
        self.failed += settled.state == State.FAILED
        if settled.paid is not None:
            self.hits += found
            self.cost += settled.paid
            self.cost_squared += settled.paid * settled.paid
            self.cost_of_hits += settled.paid * found
        if settled.answer is not None:
            self._read(read_task(settled.answer), found=found)

    def _read(self, task: Mapping[str, Any], *, found: bool) -> None:
        if isinstance(word := task.get("status"), str) and _NAME.fullmatch(word) and len(self.words) < FIELDS:
            self.words[word.lower()] += 1
        if not found:
            return
        self.read += 1
        fields = parse_data(task.get("data")).fields
        for name in set(_names(fields)):
            if name in self.fields or len(self.fields) < FIELDS:
                self.fields[name] += 1
        for column, path in self.paths.items():
            value = fields[path] if path in fields else pick(fields, path)
            if not is_blank(value):
                self.values.setdefault(column, Often()).add(value if isinstance(value, str) else repr(value))

    def have(self, column: str) -> int:
        """How many hits have a value in a column."""
        return self.values[column].total if column in self.values else 0


def _names(value: object, before: str = "", depth: int = 0) -> Iterator[str]:
    """Name what a result is made of, as dotted paths; a place in a list is `*`. Names that may be data have none."""
    if depth > DEPTH:
        return
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if _NAME.fullmatch(name):
                path = f"{before}.{name}" if before else name
                yield path
                yield from _names(inner, path, depth + 1)
    elif isinstance(value, list):
        for inner in value[:DEPTH]:
            yield from _names(inner, f"{before}.*", depth + 1)


def anomalies(last: Nights, before: Nights) -> list[Anomaly]:
    """Hold the last night against those before it."""
    rules = (_hit_rate, _failed, _cost_per_hit, _empty, _repeated, _fields, _statuses)
    return [anomaly for rule in rules for anomaly in rule(last, before)]


def z_of_shares(count: int, of: int, count_before: int, of_before: int) -> float:
    """How many standard deviations a share is above another, were both the same."""
    pooled = (count + count_before) / (of + of_before)
    deviation = sqrt(pooled * (1 - pooled) * (1 / of + 1 / of_before))
    difference = count / of - count_before / of_before
    return difference / deviation if deviation else 0.0


def z_of_cost(last: Nights, before: Nights) -> float:
    """How many standard deviations the cost per hit is above what it was; each side needs a hit."""
    variance = _variance(last) + _variance(before)
    difference = last.cost / last.hits - before.cost / before.hits
    return difference / sqrt(variance) if variance > 0 else inf * difference if difference else 0.0


def _variance(side: Nights) -> float:
    """The variance of a cost per hit R, by the spread of c - R·h over all answers."""
    hits, cost = side.hits, side.cost
    # In whole numbers, times hits²: prices that never vary have no spread at all.
    spread = side.cost_squared * hits * hits - 2 * cost * hits * side.cost_of_hits + cost * cost * hits
    return spread / hits**4


def chance_of_none(there: int, of: int, other: int) -> float:
    """How likely `there` of `of` have something and none of `other`, were it spread by chance (Fisher's exact test)."""
    if not there:
        return 1.0
    # Of all ways to choose who has it, those that choose among `of` alone.
    return exp(_ways(of, there) - _ways(of + other, there))


def _ways(of: int, chosen: int) -> float:
    return lgamma(of + 1) - lgamma(chosen + 1) - lgamma(of - chosen + 1)


def _hit_rate(last: Nights, before: Nights) -> Iterator[Anomaly]:
    if min(last.answered, before.answered) < ENOUGH:
        return
    now, then = last.found / last.answered, before.found / before.answered
    if then - now >= POINTS and -z_of_shares(last.found, last.answered, before.found, before.answered) > SIGMAS:
        text = f"the hit rate fell from {then:.1%} (of {before.answered:,} answers) to {now:.1%} (of {last.answered:,})"
        yield Anomaly("hit_rate", text)


def _failed(last: Nights, before: Nights) -> Iterator[Anomaly]:
    of, of_before = last.answered + last.failed, before.answered + before.failed
    if min(of, of_before) < ENOUGH:
        return
    now, then = last.failed / of, before.failed / of_before
    if now - then >= POINTS and z_of_shares(last.failed, of, before.failed, of_before) > SIGMAS:
        yield Anomaly("failed", f"{now:.1%} of {of:,} tasks failed; before it were {then:.1%} of {of_before:,}")


def _cost_per_hit(last: Nights, before: Nights) -> Iterator[Anomaly]:
    if min(last.hits, before.hits) < ENOUGH or not before.cost:
        return
    now, then = last.cost / last.hits, before.cost / before.hits
    if now >= (1 + DEARER) * then and z_of_cost(last, before) > SIGMAS:
        prices = f"{now / MICROS:,.2f} credits; before it was {then / MICROS:,.2f}"
        text = f"a hit cost {prices} ({now / then - 1:+.0%})"
        yield Anomaly("cost_per_hit", text)


def _empty(last: Nights, before: Nights) -> Iterator[Anomaly]:
    for column in last.paths:
        had = before.have(column)
        if not last.have(column) and chance_of_none(had, before.read, last.read) < RARE:
            text = (
                f"the column `{column}` has no value in {last.read:,} hits; before, {had:,} of {before.read:,} had one"
            )
            yield Anomaly("column_empty", text)


def _repeated(last: Nights, before: Nights) -> Iterator[Anomaly]:
    """A value that many share; which columns repeat theirs by nature, such as a country, is told by what was before."""
    for column in last.paths:
        have, had = last.have(column), before.have(column)
        if not have:
            continue
        first, second = last.values[column].most()
        if first <= max(OFTEN, OFTEN_SHARE * have):
            continue
        if had >= ENOUGH:
            usual, _ = before.values[column].most()
            strange = first / have - usual / had >= OFTEN_SHARE and z_of_shares(first, have, usual, had) > SIGMAS
        else:  # among values that all differ one is strange
            strange = second <= 1 and have >= ENOUGH
        if strange:
            text = f"the same value is in `{column}` of {first:,} different requests, {first / have:.1%} of the hits"
            yield Anomaly("value_repeated", text)


def _fields(last: Nights, before: Nights) -> Iterator[Anomaly]:
    if min(last.read, before.read) < ENOUGH:
        return
    gone = [
        name
        for name, count in before.fields.items()
        if not last.fields[name] and 2 * count >= before.read and chance_of_none(count, before.read, last.read) < RARE
    ]
    new = [
        name
        for name, count in last.fields.items()
        if not before.fields[name] and chance_of_none(count, last.read, before.read) < RARE
    ]
    if _outermost(gone):
        yield Anomaly("schema", f"no answer has {_listed(_outermost(gone))} any more")
    if _outermost(new) and len(before.fields) < FIELDS:
        yield Anomaly("schema", f"answers have {_listed(_outermost(new))}, which was never there before")


def _outermost(names: Iterable[str]) -> list[str]:
    """Leave out what lies within another one."""
    all_names = set(names)
    return sorted(name for name in all_names if not any(name.startswith(f"{other}.") for other in all_names))


def _listed(names: list[str]) -> str:
    shown = 5
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(f"`{name}`" for name in names[:shown]) + more


def _statuses(last: Nights, before: Nights) -> Iterator[Anomaly]:
    """A word for how a task stands that was never said before, where another was said for the same."""
    if sum(before.words.values()) < ENOUGH:
        return
    known = {PHASES.get(word) for word in before.words}
    new = [word for word in last.words if word not in before.words and PHASES.get(word) in {None, *known}]
    if new:
        yield Anomaly("status", f"tasks have a status that was never there before: {_listed(sorted(new))}")

"""Finds anomalies: compares the last run with the runs before it; pure.

Each rule checks two things: the difference is large enough to matter, and it is unlikely to be chance. A difference
above three standard deviations is not chance, as on a control chart (Shewhart, Economic Control of Quality, 1931).
Shares use the two-proportion z-test (Fleiss, Levin, Paik: Statistical Methods for Rates and Proportions, ch. 3), the
cost per match a ratio estimate (Cochran: Sampling Techniques, ch. 6), and present or absent values Fisher's exact test.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import exp, inf, lgamma, sqrt
from typing import Any

from enrich.databar.task_results import PHASE_BY_STATUS, ParsedData, column_value, is_blank
from enrich.models import MICROS_PER_CREDIT, State, pluralize
from enrich.report.data import Anomaly
from enrich.run.provider_stats import AnswerKind

#: A difference above this many standard deviations is not chance.
SIGMAS = 3.0
#: Both sides need at least this many answers (or matches).
MIN_ANSWERS = 20
#: Smallest change that is reported: of a share, absolute; of a cost per match, relative to the earlier cost.
MIN_RATE_CHANGE, MIN_COST_INCREASE = 0.05, 0.25
#: Absence is reported below this probability of chance. It is low because many fields are tested.
MAX_CHANCE = 0.0001
#: A value of a column counts as repeated when more matches than this (a count and a share) have it.
REPEATED_COUNT, REPEATED_SHARE = 5, 0.02
#: Different values of a column, and field names, that are kept; beyond these limits counts are slightly too low.
MAX_VALUES = 10_000
MAX_FIELDS = 500
MAX_SHAPES = 10_000
MAX_DEPTH = 6
_NESTED = frozenset((dict, list))
#: Names that don't match may be data: too long, or with other characters.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")


class FrequencyCounter:
    """Counts frequent values in little memory (Misra, Gries: Finding repeated elements, 1982).

    Counts are exact up to MAX_VALUES different values. Above that, they are too low by at most total / MAX_VALUES.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.total = 0

    def add(self, value: object) -> None:
        """Count a value; only its hash is kept."""
        key, counts = hash(value), self._counts
        self.total += 1
        if key in counts or len(counts) < MAX_VALUES:
            counts[key] = counts.get(key, 0) + 1
        else:
            self._counts = {key: count - 1 for key, count in counts.items() if count > 1}

    def top_two(self) -> list[int]:
        """Return the counts of the two most frequent values; 0 where there is none."""
        return [*sorted(self._counts.values(), reverse=True), 0, 0][:2]


@dataclass(slots=True)
class AnswerStats:
    """Statistics of the answers of one or more runs. `column_paths`: output column to the path of its value."""

    column_paths: Mapping[str, str]
    found: int = 0
    not_found: int = 0
    failed: int = 0
    #: Matches whose answer is still stored (not purged).
    stored_hits: int = 0
    values: defaultdict[str, FrequencyCounter] = field(default_factory=lambda: defaultdict(FrequencyCounter))
    #: Stored matches by their fields, as dotted paths.
    fields: Counter[str] = field(default_factory=Counter)
    status_words: Counter[str] = field(default_factory=Counter)
    #: Over answers of known price: matches, and the sums of c, c² and c·h (c: price in millionths, h: 1 for a match).
    priced_hits: int = 0
    cost: int = 0
    cost_squared: int = 0
    cost_of_hits: int = 0

    @property
    def answered(self) -> int:
        """Number of answers with a match or with no match; failures are not counted."""
        return self.found + self.not_found

    def read_match(self, parsed: ParsedData) -> tuple[str, ...]:
        """Count the values of a match whose answer is stored. Return the paths of its fields."""
        for column, path in self.column_paths.items():
            value = column_value(parsed, path)
            if not is_blank(value):
                self.values[column].add(value if isinstance(value, str) else repr(value))
        return _field_shape(parsed.fields)

    def add(self, kind: AnswerKind, answers: int) -> None:
        """Count settled attempts of one kind."""
        found = answers if kind.state == State.FOUND else 0
        self.found += found
        self.not_found += answers if kind.state == State.NOT_FOUND else 0
        self.failed += answers if kind.state == State.FAILED else 0
        if kind.paid is not None:
            self.priced_hits += found
            self.cost += kind.paid * answers
            self.cost_squared += kind.paid * kind.paid * answers
            self.cost_of_hits += kind.paid * found
        self.stored_hits += answers if kind.stored_match else 0
        if kind.status is not None and _NAME.fullmatch(kind.status):
            _count_name(self.status_words, kind.status.lower(), answers)
        for name in kind.fields:
            _count_name(self.fields, name, answers)


def _count_name(counts: Counter[str], name: str, number: int) -> None:
    if name in counts or len(counts) < MAX_FIELDS:
        counts[name] += number


def _field_shape(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the paths of an answer's fields."""
    if _NESTED.isdisjoint(map(type, fields.values())):
        return _flat_shape(tuple(fields))
    return tuple(sorted(set(_field_paths(fields))))


@lru_cache(MAX_SHAPES)
def _flat_shape(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if _NAME.fullmatch(name)))


def _field_paths(value: object, before: str = "", depth: int = 0) -> Iterator[str]:
    """Yield a result's fields as dotted paths; a list index is `*`. Names that may be data are left out."""
    if depth > MAX_DEPTH:
        return
    if isinstance(value, dict):
        for name, inner in value.items():
            if _NAME.fullmatch(name):
                path = f"{before}.{name}" if before else name
                yield path
                yield from _field_paths(inner, path, depth + 1)
    elif isinstance(value, list):
        for inner in value[:MAX_DEPTH]:
            yield from _field_paths(inner, f"{before}.*", depth + 1)


def find_anomalies(last: AnswerStats, before: AnswerStats) -> list[Anomaly]:
    """Compare the last run with the runs before it."""
    rules = (
        _hit_rate_anomalies,
        _failure_anomalies,
        _cost_anomalies,
        _empty_column_anomalies,
        _repeated_value_anomalies,
        _schema_anomalies,
        _status_anomalies,
    )
    return [anomaly for rule in rules for anomaly in rule(last, before)]


def shares_z_score(count: int, of: int, count_before: int, of_before: int) -> float:
    """Return by how many standard deviations a share exceeds an earlier one, assuming that both are equal."""
    pooled = (count + count_before) / (of + of_before)
    deviation = sqrt(pooled * (1 - pooled) * (1 / of + 1 / of_before))
    difference = count / of - count_before / of_before
    return difference / deviation if deviation else 0.0


def cost_z_score(last: AnswerStats, before: AnswerStats) -> float:
    """Return by how many standard deviations the cost per match exceeds the earlier one; each side needs a match."""
    variance = _cost_variance(last) + _cost_variance(before)
    difference = last.cost / last.priced_hits - before.cost / before.priced_hits
    return difference / sqrt(variance) if variance > 0 else inf * difference if difference else 0.0


def _cost_variance(side: AnswerStats) -> float:
    """Return the variance of a cost per match R, from the spread of c - R·h over all answers."""
    hits, cost = side.priced_hits, side.cost
    # Integers, multiplied by hits²: constant prices give a spread of exactly 0.
    spread = side.cost_squared * hits * hits - 2 * cost * hits * side.cost_of_hits + cost * cost * hits
    return spread / hits**4


def absence_probability(present: int, of: int, other: int) -> float:
    """Return the chance that `present` of `of` have something and none of `other` (Fisher's exact test)."""
    if not present:
        return 1.0
    # Of all ways to choose the ones that have it, the share that chooses from `of` only.
    return exp(_log_combinations(of, present) - _log_combinations(of + other, present))


def _log_combinations(of: int, chosen: int) -> float:
    return lgamma(of + 1) - lgamma(chosen + 1) - lgamma(of - chosen + 1)


def _hit_rate_anomalies(last: AnswerStats, before: AnswerStats) -> Iterator[Anomaly]:
    if min(last.answered, before.answered) < MIN_ANSWERS:
        return
    now, then = last.found / last.answered, before.found / before.answered
    if (
        then - now >= MIN_RATE_CHANGE
        and -shares_z_score(last.found, last.answered, before.found, before.answered) > SIGMAS
    ):
        text = f"The match rate fell from {then:.1%} of {before.answered:,} to {now:.1%} of {last.answered:,} results."
        yield Anomaly("hit_rate", text)


def _failure_anomalies(last: AnswerStats, before: AnswerStats) -> Iterator[Anomaly]:
    of, of_before = last.answered + last.failed, before.answered + before.failed
    if min(of, of_before) < MIN_ANSWERS:
        return
    now, then = last.failed / of, before.failed / of_before
    if now - then >= MIN_RATE_CHANGE and shares_z_score(last.failed, of, before.failed, of_before) > SIGMAS:
        yield Anomaly("failed", f"{now:.1%} of {of:,} tasks failed, {then:.1%} of {of_before:,} before.")


def _cost_anomalies(last: AnswerStats, before: AnswerStats) -> Iterator[Anomaly]:
    if min(last.priced_hits, before.priced_hits) < MIN_ANSWERS or not before.cost:
        return
    now, then = last.cost / last.priced_hits, before.cost / before.priced_hits
    if now >= (1 + MIN_COST_INCREASE) * then and cost_z_score(last, before) > SIGMAS:
        prices = f"{now / MICROS_PER_CREDIT:,.2f} credits, {then / MICROS_PER_CREDIT:,.2f} before"
        text = f"A match cost {prices} ({now / then - 1:+.0%})."
        yield Anomaly("cost_per_hit", text)


def _empty_column_anomalies(last: AnswerStats, before: AnswerStats) -> Iterator[Anomaly]:
    for column in last.column_paths:
        had = before.values[column].total
        if (
            not last.values[column].total
            and absence_probability(had, before.stored_hits, last.stored_hits) < MAX_CHANCE
        ):
            text = (
                f"The column `{column}` is empty in {pluralize(last.stored_hits, 'match')}. "
                f"Before, {had:,} of {before.stored_hits:,} had a value."
            )
            yield Anomaly("column_empty", text)


def _repeated_value_anomalies(last: AnswerStats, before: AnswerStats) -> Iterator[Anomaly]:
    """Report a value that many matches share, unless the column repeated as much before, as a country column does."""
    for column in last.column_paths:
        have, had = last.values[column].total, before.values[column].total
        if not have:
            continue
        first, second = last.values[column].top_two()
        if first <= max(REPEATED_COUNT, REPEATED_SHARE * have):
            continue
        if had >= MIN_ANSWERS:
            usual, _ = before.values[column].top_two()
            is_unusual = (
                first / have - usual / had >= REPEATED_SHARE and shares_z_score(first, have, usual, had) > SIGMAS
            )
        else:  # one repeated value among values that otherwise all differ
            is_unusual = second <= 1 and have >= MIN_ANSWERS
        if is_unusual:
            text = f"{first:,} different requests have the same `{column}`: {first / have:.1%} of the matches."
            yield Anomaly("value_repeated", text)


def _schema_anomalies(last: AnswerStats, before: AnswerStats) -> Iterator[Anomaly]:
    if min(last.stored_hits, before.stored_hits) < MIN_ANSWERS:
        return
    fields, fields_before = last.fields, before.fields
    missing = [
        name
        for name, count in fields_before.items()
        if not fields[name]
        and 2 * count >= before.stored_hits
        and absence_probability(count, before.stored_hits, last.stored_hits) < MAX_CHANCE
    ]
    new = [
        name
        for name, count in fields.items()
        if not fields_before[name] and absence_probability(count, last.stored_hits, before.stored_hits) < MAX_CHANCE
    ]
    if missing:
        yield Anomaly("schema", f"Results no longer have {_join_names(_outermost_paths(missing))}.")
    if new and len(fields_before) < MAX_FIELDS:
        yield Anomaly("schema", f"Results have new fields: {_join_names(_outermost_paths(new))}.")


def _outermost_paths(names: list[str]) -> list[str]:
    """Leave out paths inside another path of the list."""
    return sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names))


def _join_names(names: list[str]) -> str:
    shown = 5
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(f"`{name}`" for name in names[:shown]) + more


def _status_anomalies(last: AnswerStats, before: AnswerStats) -> Iterator[Anomaly]:
    """Report a new task status, unless it stands for a phase that earlier runs never showed."""
    if sum(before.status_words.values()) < MIN_ANSWERS:
        return
    known_phases = {PHASE_BY_STATUS.get(word) for word in before.status_words}
    new = [
        word
        for word in last.status_words
        if word not in before.status_words and PHASE_BY_STATUS.get(word) in {None, *known_phases}
    ]
    if new:
        yield Anomaly("status", f"Tasks have a new status: {_join_names(sorted(new))}.")

"""Anomalies of the last run: each rule reports its own kind, and random variation reports nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from math import comb
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.models import SettledAttempt, State
from enrich.report import anomalies as rules
from enrich.report.anomalies import (
    AnswerStats,
    FrequencyCounter,
    absence_probability,
    cost_z_score,
    find_anomalies,
    shares_z_score,
)
from enrich.run.provider_stats import count_kinds

PATHS = {"work_email": "email", "city": "office.city"}


def match(number: int, paid: int | None = 500_000, status: str = "completed", **fields: Any) -> SettledAttempt:
    """Return a match; its address is unique unless it is given."""
    result = {"email": f"person{number}@firm.example", "office": {"city": f"city {number}"}} | fields
    return answer(State.FOUND, paid, {"status": status, "data": result})


def no_match(paid: int | None = 0) -> SettledAttempt:
    """Return a clean no-match."""
    return answer(State.NOT_FOUND, paid, {"status": "completed", "data": None})


def failure(paid: int | None = 0) -> SettledAttempt:
    """Return a failure."""
    return answer(State.FAILED, paid, {"status": "failed", "data": None})


def answer(state: State, paid: int | None, task: object) -> SettledAttempt:
    """Return an answer."""
    return SettledAttempt(1, state, "{}", "{}", paid, json.dumps(task), 0)


def run_statistics(answers: Iterable[SettledAttempt]) -> AnswerStats:
    """Return the statistics of the answers of some runs."""
    made = AnswerStats(PATHS)
    for kind, number in count_kinds(answers, lambda _, parsed: made.read_match(parsed)):
        made.add(kind, number)
    return made


def typical_run(hits: int, misses: int = 0, **fields: Any) -> list[SettledAttempt]:
    """Return the answers of a typical run."""
    return [match(number, **fields) for number in range(hits)] + [no_match() for _ in range(misses)]


def anomaly_kinds(last: Iterable[SettledAttempt], before: Iterable[SettledAttempt]) -> list[str]:
    """Return the kinds of the anomalies found."""
    return [each.kind for each in find_anomalies(run_statistics(last), run_statistics(before))]


def anomaly_text(last: Iterable[SettledAttempt], before: Iterable[SettledAttempt]) -> str:
    """Return the text of the only anomaly found."""
    (message,) = find_anomalies(run_statistics(last), run_statistics(before))
    return message.text


def test_no_anomaly_in_similar_runs() -> None:
    """A similar run, the first run and a run without answers have no anomaly."""
    assert anomaly_kinds(typical_run(60, 40), typical_run(600, 400)) == []
    assert anomaly_kinds(typical_run(60, 40), []) == []
    assert anomaly_kinds([], typical_run(600, 400)) == []
    assert anomaly_kinds([], []) == []


def test_hit_rate_drop() -> None:
    """A drop in the hit rate is reported if it is significant, at least five points, and from enough answers."""
    message = anomaly_text(typical_run(30, 70), typical_run(300, 200))
    assert message == "The match rate fell from 60.0% of 500 to 30.0% of 100 results."
    assert anomaly_kinds(typical_run(70, 30), typical_run(300, 200)) == []  # an increase is fine
    assert anomaly_kinds(typical_run(0, 19), typical_run(300, 200)) == []  # too few answers
    assert anomaly_kinds(typical_run(52, 48), typical_run(300, 200)) == []  # not significant
    large = AnswerStats(PATHS, found=57_000, not_found=43_000), AnswerStats(PATHS, found=60_000, not_found=40_000)
    assert find_anomalies(*large) == []  # significant, but below five points


def test_failure_rate_rise() -> None:
    """A rise of the failure rate is reported; failures don't count in the hit rate."""
    failures = [failure() for _ in range(20)]
    assert anomaly_text([*typical_run(50, 30), *failures], typical_run(500, 300)) == (
        "20.0% of 100 tasks failed, 0.0% of 800 before."
    )
    assert anomaly_kinds([*typical_run(50, 30), *failures[:4]], typical_run(500, 300)) == []


def test_cost_per_match_rise() -> None:
    """A rise of the cost per match is reported if it is significant and at least 25%; a cheaper run is fine."""
    assert anomaly_text(typical_run(50, 20, paid=1_000_000), typical_run(500, 200)) == (
        "A match cost 1.00 credits, 0.50 before (+100%)."
    )
    assert anomaly_kinds(typical_run(50, 20, paid=600_000), typical_run(500, 200)) == []
    assert anomaly_kinds(typical_run(50, 20, paid=100_000), typical_run(500, 200)) == []
    assert anomaly_kinds(typical_run(19, 5, paid=1_000_000), typical_run(500, 200)) == []
    # A single expensive answer among many is not significant.
    assert anomaly_kinds([*typical_run(49, 20), match(1, paid=20_000_000)], typical_run(500, 200)) == []


def test_unknown_prices_are_ignored_in_cost() -> None:
    """An unknown price does not count as free."""
    assert anomaly_kinds([*typical_run(50, paid=None), *typical_run(50)], typical_run(500)) == []
    assert anomaly_kinds(typical_run(50), typical_run(500, paid=None)) == []


def test_column_becomes_empty() -> None:
    """A column that had values and is now empty is reported; one that rarely has values may be empty by chance."""
    nowhere: Any = {"office": {"city": ""}}
    message = anomaly_text(typical_run(40, **nowhere), typical_run(400))
    assert message == "The column `city` is empty in 40 matches. Before, 400 of 400 had a value."
    assert anomaly_kinds(typical_run(40, **nowhere), [*typical_run(4), *typical_run(396, **nowhere)]) == []
    assert anomaly_kinds([no_match() for _ in range(10)], typical_run(400)) == []


def test_value_repeats_unusually() -> None:
    """A value that repeats unusually is reported without showing it, because it is personal data."""
    same = [match(number, email="info@catch-all.example") for number in range(200, 212)]
    message = anomaly_text([*typical_run(100), *same], typical_run(400))
    assert message == "12 different requests have the same `work_email`: 10.7% of the matches."
    assert "catch-all" not in message
    # Without earlier runs, a repeated value is unusual where the other values all differ.
    assert anomaly_kinds([*typical_run(100), *same], []) == ["value_repeated"]
    assert anomaly_kinds([*typical_run(100), *same[:5]], typical_run(400)) == []


def test_naturally_repeated_values() -> None:
    """A value that repeats in every run, such as a city shared by half of the leads, is not reported."""
    last_run = [*typical_run(50), *typical_run(50, office={"city": "Berlin"})]
    earlier_runs = [*typical_run(250), *typical_run(250, office={"city": "Berlin"})]
    assert [
        each.text
        for each in find_anomalies(run_statistics(last_run), run_statistics(earlier_runs))
        if "city" in each.text
    ] == []


def test_result_fields_change() -> None:
    """Missing and new result fields are reported, nested ones by path and lists by `*`."""
    old = typical_run(60, phones=[{"type": "work"}])
    new = typical_run(60, phones=[{"kind": "work"}])
    assert [each.text for each in find_anomalies(run_statistics(new), run_statistics(old))] == [
        "Results no longer have `phones.*.type`.",
        "Results have new fields: `phones.*.kind`.",
    ]
    assert anomaly_kinds(typical_run(60), old) == ["schema"]
    # A rare field may be missing by chance, and a new field may be rare.
    assert anomaly_kinds(typical_run(60), [*typical_run(55), *typical_run(5, title="Dr")]) == []
    assert anomaly_kinds([*typical_run(59), match(1, title="Dr")], typical_run(60)) == []


def test_field_names_with_data_are_hidden() -> None:
    """A field name that contains data, such as an address as a key, is not shown."""
    secret: Any = {"by": {"ada@engine.example": 1, "Ada Lovelace": 2, "x" * 80: 3}}
    message = anomaly_text(typical_run(60, **secret), typical_run(60))
    assert message == "Results have new fields: `by`."


def test_status_changes() -> None:
    """A new status for the same outcome is reported; the first failure of a job is not."""
    assert anomaly_text(typical_run(30, status="success"), typical_run(60)) == ("Tasks have a new status: `success`.")
    assert anomaly_kinds([*typical_run(30), failure()], typical_run(60)) == []


def test_purged_answers_are_ignored() -> None:
    """Purged answers are ignored, because their content is unknown."""
    purged = [each._replace(answer=None, erased=1) for each in typical_run(60)]
    assert anomaly_kinds(typical_run(40), purged) == []
    assert anomaly_kinds(purged, typical_run(40)) == []


@pytest.mark.long
def test_few_false_alarms_in_simulation() -> None:
    """In a thousand simulated weeks with equal rates, prices and fields, only a few have a false alarm."""
    chance = random.Random(6)

    def simulated_run(size: int) -> list[SettledAttempt]:
        rate = 0.6
        made = []
        for _ in range(size):
            if chance.random() < 0.02:
                made.append(failure())
            elif chance.random() < rate:
                number = chance.randrange(10_000)
                more: dict[str, Any] = {"title": "Dr"} if chance.random() < 0.1 else {}
                more |= {"office": {"city": f"city {chance.randrange(9)}"}}
                made.append(match(number, chance.choice([10_000, 500_000, 1_500_000]), **more))
            else:
                made.append(no_match(chance.choice([0, 0, 100_000])))
        return made

    alarms = sum(
        bool(anomaly_kinds(simulated_run(chance.choice([25, 60, 120])), simulated_run(200))) for _ in range(300)
    )

    assert alarms <= 4


@pytest.mark.long
def test_bad_run_is_detected_in_simulation() -> None:
    """In the same simulation with a provider down, nearly all of a hundred weeks are reported."""
    chance = random.Random(7)

    def simulated_run(size: int, rate: float) -> list[SettledAttempt]:
        return [match(number) if chance.random() < rate else no_match() for number in range(size)]

    assert sum("hit_rate" in anomaly_kinds(simulated_run(120, 0.3), simulated_run(400, 0.6)) for _ in range(100)) >= 95


@pytest.mark.long
@given(st.lists(st.integers(0, 50), max_size=300))
def test_frequency_sketch_is_exact_for_few_values(values: list[int]) -> None:
    """The sketch counts exactly while there are few different values."""
    often = FrequencyCounter()
    for value in values:
        often.add(value)
    counts = sorted((values.count(value) for value in set(values)), reverse=True)

    assert often.total == len(values)
    assert often.top_two() == [*counts, 0, 0][:2]


@pytest.mark.long
@given(st.lists(st.integers(0, 400), max_size=600), st.integers(2, 40))
def test_frequency_sketch_error_bound(values: list[int], kept: int) -> None:
    """A count is too low by at most one in `kept` of all values, and never too high."""
    often = FrequencyCounter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "MAX_VALUES", kept)
        for value in values:
            often.add(value)
    most = max((values.count(value) for value in set(values)), default=0)

    assert most - len(values) / kept <= often.top_two()[0] <= most


@pytest.mark.long
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_hypergeometric_probability_of_zero(matching: int, rest: int, drawn: int) -> None:
    """The probability equals the one by exact counting."""
    of = matching + rest
    assert absence_probability(matching, of, drawn) == pytest.approx(comb(of, matching) / comb(of + drawn, matching))


@given(st.integers(1, 500), st.integers(1, 500), st.data())
def test_equal_shares_do_not_differ(of: int, times: int, data: st.DataObject) -> None:
    """Equal shares have a difference of 0; otherwise the sign shows which one is larger."""
    count = data.draw(st.integers(0, of))
    assert shares_z_score(count, of, count * times, of * times) == pytest.approx(0, abs=1e-6)
    assert shares_z_score(of, of, 0, of) > 0 > shares_z_score(0, of, of, of)


def test_constant_price_increase_is_certain() -> None:
    """A constant price that rises is certain, without any statistics."""
    dearer = cost_z_score(run_statistics(typical_run(30, paid=700_000)), run_statistics(typical_run(30)))
    assert dearer == float("inf")
    assert cost_z_score(run_statistics(typical_run(30)), run_statistics(typical_run(60))) == 0

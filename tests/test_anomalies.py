"""What was not so before: each rule says its own, and chance says nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from math import comb
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.model import Settled, State
from enrich.report import anomalies as rules
from enrich.report.anomalies import Nights, Often, anomalies, chance_of_none, z_of_cost, z_of_shares

PATHS = {"work_email": "email", "city": "office.city"}


def hit(number: int, paid: int | None = 500_000, status: str = "completed", **fields: Any) -> Settled:
    """Make a hit; its address is its own unless it is said."""
    result = {"email": f"person{number}@firm.example", "office": {"city": f"city {number}"}} | fields
    return answer(State.FOUND, paid, {"status": status, "data": result})


def miss(paid: int | None = 0) -> Settled:
    """Make a clean miss."""
    return answer(State.NOT_FOUND, paid, {"status": "completed", "data": None})


def failure(paid: int | None = 0) -> Settled:
    """Make a failure."""
    return answer(State.FAILED, paid, {"status": "failed", "data": None})


def answer(state: State, paid: int | None, task: object) -> Settled:
    """Make an answer."""
    return Settled(1, state, "{}", "{}", paid, json.dumps(task), 0)


def nights(answers: Iterable[Settled]) -> Nights:
    """Count the answers of some nights."""
    made = Nights(PATHS)
    for each in answers:
        made.add(each)
    return made


def usual(hits: int, misses: int = 0, **fields: Any) -> list[Settled]:
    """Make a usual night."""
    return [hit(number, **fields) for number in range(hits)] + [miss() for _ in range(misses)]


def kinds(last: Iterable[Settled], before: Iterable[Settled]) -> list[str]:
    """Which rules have something to say."""
    return [each.kind for each in anomalies(nights(last), nights(before))]


def text(last: Iterable[Settled], before: Iterable[Settled]) -> str:
    """What the one rule says that says something."""
    (said,) = anomalies(nights(last), nights(before))
    return said.text


def test_a_night_like_the_others_is_none() -> None:
    """Nor is a first one, nor one that was answered nothing."""
    assert kinds(usual(60, 40), usual(600, 400)) == []
    assert kinds(usual(60, 40), []) == []
    assert kinds([], usual(600, 400)) == []
    assert kinds([], []) == []


def test_the_hit_rate_fell() -> None:
    """By more than chance and by five points at least, with enough answers on both sides."""
    said = text(usual(30, 70), usual(300, 200))
    assert said == "the hit rate fell from 60.0% (of 500 answers) to 30.0% (of 100)"
    assert kinds(usual(70, 30), usual(300, 200)) == []  # better is fine
    assert kinds(usual(0, 19), usual(300, 200)) == []  # too few
    assert kinds(usual(52, 48), usual(300, 200)) == []  # chance
    large = Nights(PATHS, found=57_000, not_found=43_000), Nights(PATHS, found=60_000, not_found=40_000)
    assert anomalies(*large) == []  # sure, but small


def test_more_failed_than_before() -> None:
    """The share of failures is no part of the hit rate."""
    failures = [failure() for _ in range(20)]
    assert text([*usual(50, 30), *failures], usual(500, 300)) == (
        "20.0% of 100 tasks failed; before it were 0.0% of 800"
    )
    assert kinds([*usual(50, 30), *failures[:4]], usual(500, 300)) == []


def test_a_hit_costs_more() -> None:
    """By a quarter at least and no chance; a night that is cheaper is fine."""
    assert text(usual(50, 20, paid=1_000_000), usual(500, 200)) == (
        "a hit cost 1.00 credits; before it was 0.50 (+100%)"
    )
    assert kinds(usual(50, 20, paid=600_000), usual(500, 200)) == []
    assert kinds(usual(50, 20, paid=100_000), usual(500, 200)) == []
    assert kinds(usual(19, 5, paid=1_000_000), usual(500, 200)) == []
    # One dear answer among many is chance.
    assert kinds([*usual(49, 20), hit(1, paid=20_000_000)], usual(500, 200)) == []


def test_what_has_no_price_is_left_out_of_the_cost() -> None:
    """Not known is not free."""
    assert kinds([*usual(50, paid=None), *usual(50)], usual(500)) == []
    assert kinds(usual(50), usual(500, paid=None)) == []


def test_a_column_is_empty() -> None:
    """It had values before; one that seldom has any may be empty by chance."""
    nowhere: Any = {"office": {"city": ""}}
    said = text(usual(40, **nowhere), usual(400))
    assert said == "the column `city` has no value in 40 hits; before, 400 of 400 had one"
    assert kinds(usual(40, **nowhere), [*usual(4), *usual(396, **nowhere)]) == []
    assert kinds([miss() for _ in range(10)], usual(400)) == []


def test_a_value_is_repeated() -> None:
    """Told without the value, for it is somebody's."""
    same = [hit(number, email="info@catch-all.example") for number in range(200, 212)]
    said = text([*usual(100), *same], usual(400))
    assert said == "the same value is in `work_email` of 12 different requests, 10.7% of the hits"
    assert "catch-all" not in said
    # With nothing to hold it against, one is strange among values that all differ.
    assert kinds([*usual(100), *same], []) == ["value_repeated"]
    assert kinds([*usual(100), *same[:5]], usual(400)) == []


def test_values_that_repeat_by_nature_are_no_anomaly() -> None:
    """A city that half of the leads share every night."""
    night = [*usual(50), *usual(50, office={"city": "Berlin"})]
    before = [*usual(250), *usual(250, office={"city": "Berlin"})]
    assert [each.text for each in anomalies(nights(night), nights(before)) if "city" in each.text] == []


def test_the_schema_changed() -> None:
    """Fields that are gone and fields that are new, nested ones by their paths and lists by `*`."""
    old = usual(60, phones=[{"type": "work"}])
    new = usual(60, phones=[{"kind": "work"}])
    assert [each.text for each in anomalies(nights(new), nights(old))] == [
        "no answer has `phones.*.type` any more",
        "answers have `phones.*.kind`, which was never there before",
    ]
    assert kinds(usual(60), old) == ["schema"]
    # What few had may be missing by chance, and few may have what is new.
    assert kinds(usual(60), [*usual(55), *usual(5, title="Dr")]) == []
    assert kinds([*usual(59), hit(1, title="Dr")], usual(60)) == []


def test_names_of_fields_that_may_be_data_are_not_told() -> None:
    """An address as a key."""
    secret: Any = {"by": {"ada@engine.example": 1, "Ada Lovelace": 2, "x" * 80: 3}}
    said = text(usual(60, **secret), usual(60))
    assert said == "answers have `by`, which was never there before"


def test_a_status_has_another_word() -> None:
    """Where another word was said for the same; the first failure of a job is none."""
    assert text(usual(30, status="success"), usual(60)) == (
        "tasks have a status that was never there before: `success`"
    )
    assert kinds([*usual(30), failure()], usual(60)) == []


def test_purged_answers_are_no_anomaly() -> None:
    """Nobody knows what was in them."""
    purged = [each._replace(answer=None, erased=1) for each in usual(60)]
    assert kinds(usual(40), purged) == []
    assert kinds(purged, usual(40)) == []


@pytest.mark.long
def test_equal_nights_are_hardly_ever_told() -> None:
    """A thousand weeks of equal rates, prices and fields: a false alarm in a few of them at most."""
    chance = random.Random(6)

    def night(size: int) -> list[Settled]:
        rate = 0.6
        made = []
        for _ in range(size):
            if chance.random() < 0.02:
                made.append(failure())
            elif chance.random() < rate:
                number = chance.randrange(10_000)
                more: dict[str, Any] = {"title": "Dr"} if chance.random() < 0.1 else {}
                more |= {"office": {"city": f"city {chance.randrange(9)}"}}
                made.append(hit(number, chance.choice([10_000, 500_000, 1_500_000]), **more))
            else:
                made.append(miss(chance.choice([0, 0, 100_000])))
        return made

    alarms = sum(bool(kinds(night(chance.choice([25, 60, 120])), night(200))) for _ in range(300))

    assert alarms <= 4


def test_a_bad_night_is_told() -> None:
    """The same simulation with a provider that is down: told in nearly all of a hundred weeks."""
    chance = random.Random(7)

    def night(size: int, rate: float) -> list[Settled]:
        return [hit(number) if chance.random() < rate else miss() for number in range(size)]

    assert sum("hit_rate" in kinds(night(120, 0.3), night(400, 0.6)) for _ in range(100)) >= 95


@pytest.mark.long
@given(st.lists(st.integers(0, 50), max_size=300))
def test_often_counts_exactly_what_it_can_keep(values: list[int]) -> None:
    """Few different values are counted one by one."""
    often = Often()
    for value in values:
        often.add(value)
    counts = sorted((values.count(value) for value in set(values)), reverse=True)

    assert often.total == len(values)
    assert often.most() == [*counts, 0, 0][:2]


@given(st.lists(st.integers(0, 400), max_size=600), st.integers(2, 40))
def test_often_is_too_low_by_little_with_little_memory(values: list[int], kept: int) -> None:
    """By one in `kept` of all at most, and never too high."""
    often = Often()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "KEPT", kept)
        for value in values:
            often.add(value)
    most = max((values.count(value) for value in set(values)), default=0)

    assert most - len(values) / kept <= often.most()[0] <= most


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_the_chance_of_none_is_the_hypergeometric_one(there: int, others: int, other: int) -> None:
    """Counted out."""
    of = there + others
    assert chance_of_none(there, of, other) == pytest.approx(comb(of, there) / comb(of + other, there))


@given(st.integers(1, 500), st.integers(1, 500), st.data())
def test_shares_that_are_equal_differ_by_nothing(of: int, times: int, data: st.DataObject) -> None:
    """And which is larger has the sign."""
    count = data.draw(st.integers(0, of))
    assert z_of_shares(count, of, count * times, of * times) == pytest.approx(0, abs=1e-6)
    assert z_of_shares(of, of, 0, of) > 0 > z_of_shares(0, of, of, of)


def test_a_price_that_never_varied_is_dearer_for_sure() -> None:
    """There is no chance in it at all."""
    dearer = z_of_cost(nights(usual(30, paid=700_000)), nights(usual(30)))
    assert dearer == float("inf")
    assert z_of_cost(nights(usual(30)), nights(usual(60))) == 0

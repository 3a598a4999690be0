"""When a poll pays: learned from intervals, planned by price, relearned when the API changes."""

from __future__ import annotations

import random
from itertools import count, pairwise
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import tight
from benchmarks.polls import LATENCIES, FixedInterval, Outcome, simulate
from enrich.run.poll_schedule import AGES_S, MAX_STORED_WEIGHT, PollCost, PollSchedule
from tests.support.cases import first_quick, in_turn


def trained_schedule(*durations_s: float, times: int = 40) -> PollSchedule:
    """Make poll times that have seen tasks take so long, closely watched."""
    learned = PollSchedule()
    for _ in range(times):
        for age in durations_s:
            learned.record_duration(age * 0.97, age)
    return learned


def poll_ages(times: PollSchedule, cost: PollCost = PollCost.NORMAL, until: float = 60.0) -> list[float]:
    """List the ages at which a task is asked that runs so long."""
    ages = [times.next_delay_s(0.0, cost)]
    while ages[-1] < until:
        ages.append(ages[-1] + times.next_delay_s(ages[-1], cost))
    return ages


def test_initial_polls_back_off() -> None:
    """The first guess is a second; nothing waits longer than half a minute for the next poll."""
    ages = poll_ages(PollSchedule(), until=200.0)
    assert ages[0] == pytest.approx(0.9)
    gaps = [after - before for before, after in pairwise(ages)]
    assert gaps == sorted(gaps)
    assert gaps[0] == pytest.approx(PollSchedule.MIN_DELAY_S)
    assert gaps[-1] == PollSchedule.MAX_DELAY_S
    assert PollSchedule().median_s == PollSchedule.FIRST_GUESS_S


def test_constant_duration_polled_once() -> None:
    """Just after it is done."""
    first = trained_schedule(4.0).next_delay_s(0.0)
    assert 4.0 <= first < 4.7


def test_bimodal_durations() -> None:
    """Nobody asks in between, when none can be done."""
    ages = poll_ages(trained_schedule(2.0, 20.0), until=18.0)
    assert 2.0 <= ages[0] < 2.5
    assert ages[1] >= 18.0


def test_poll_cost_shifts_time() -> None:
    """The price of a poll decides how sure it must be."""
    times = trained_schedule(2.0, 3.0, 4.0, 5.0, 7.0)
    low, fair, high = (len(poll_ages(times, price, until=7.0)) for price in PollCost)
    assert low > fair > high >= 1
    assert times.next_delay_s(0.0, PollCost.LOW) < times.next_delay_s(0.0, PollCost.HIGH)


@in_turn(
    ("scarce", "room", "price"),
    [
        (True, 0.9, PollCost.HIGH),
        (True, 0.2, PollCost.NORMAL),
        (False, 0.9, PollCost.NORMAL),
        (False, 0.0, PollCost.LOW),
    ],
)
def test_poll_cost_from_run_limits(scarce: bool, room: float, price: PollCost) -> None:  # noqa: FBT001 - a table
    """Slots that submits want make a poll dear; a full house and slots left over make it cheap."""
    assert PollCost.choose(rate_is_limiting=scarce, free_share=room) is price


def test_durations_are_relearned() -> None:
    """After thousands of quick tasks a hundred slow ones decide."""
    times = trained_schedule(1.0, times=1000)
    assert times.median_s == pytest.approx(1.0, rel=0.1)
    for _ in range(60):
        times.record_duration(29.0, 30.0)
    assert times.median_s == pytest.approx(30.0, rel=0.1)
    assert times.next_delay_s(0.0) > 0


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(30.0, 2.0), (4.0, 1.0), (2.0, 30.0)])
def test_duration_changes_are_noticed(before: float, after: float) -> None:
    """Also when every answer is there at the time at which it was expected: one in twenty is looked for earlier."""
    tasks = count()

    def latency(chance: random.Random) -> float:
        return (before if next(tasks) < 600 else after) * chance.uniform(0.9, 1.1)

    times = PollSchedule()
    seen = simulate(times, latency, rows=1600)
    assert times.median_s == pytest.approx(after, rel=0.2)
    assert median(seen.delays[1400:]) < 0.6 * after


def test_wide_intervals_are_weak_evidence() -> None:
    """A laptop that slept, a poll that was late: done at some time in these hours agrees with what is known."""
    times = trained_schedule(4.0)
    for _ in range(30):
        times.record_duration(0.0, 30_000.0)
    assert times.median_s == pytest.approx(4.0, rel=0.1)


def test_poll_times_do_not_bias_durations() -> None:
    """Asked every ten seconds, tasks of 4 or 13 seconds teach that they took at most 10 and 20, not 10 and 20."""
    times, chance = PollSchedule(), random.Random(1)
    for _ in range(200):
        latency = chance.choice([4.0, 4.0, 13.0])
        after = chance.uniform(0.0, latency)
        times.record_duration(after, latency + chance.uniform(0.0, 6.0))
    assert 3.0 < times.median_s < 6.0


def test_negative_intervals_are_ignored() -> None:
    """A task cannot be done before it was seen at work."""
    times = PollSchedule()
    times.record_duration(10.0, 3.0)
    assert times.weights_by_age == []


def test_invalid_stored_durations_are_ignored() -> None:
    """What cannot be is passed over."""
    scripted_api = [
        (4.0, -5.0),
        (float("inf"), 3.0),
        (-1.0, 3.0),
        (2.0, 1e300),
        (float("nan"), 1.0),
        (1.0, float("nan")),
    ]
    assert PollSchedule(scripted_api).weights_by_age == []
    assert PollSchedule([*scripted_api, (3.0, 6.0)]).median_s == pytest.approx(3.0, rel=0.1)


def test_stored_durations_have_low_weight() -> None:
    """What was inherited weighs as much as a few answers."""
    times = PollSchedule(trained_schedule(8.0).weights_by_age)
    assert sum(answers for _, answers in times.weights_by_age) == pytest.approx(MAX_STORED_WEIGHT)
    assert 8.0 <= times.next_delay_s(0.0) < 9.5
    for _ in range(40):
        times.record_duration(1.9, 2.0)
    assert 2.0 <= times.next_delay_s(0.0) < 2.5


@pytest.mark.long
@given(
    intervals=st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=40),
    age=st.floats(0, 1e6),
    price=st.sampled_from(PollCost),
)
def test_next_poll_is_bounded(intervals: list[tuple[float, float]], age: float, price: PollCost) -> None:
    """The wait is above nothing, and at most until the oldest age that is known."""
    times = PollSchedule()
    for after, longer in intervals:
        times.record_duration(after, after + longer)
    wait = times.next_delay_s(age, price)
    assert 0 < wait <= max(PollSchedule.MAX_DELAY_S, AGES_S[-1])
    assert sum(answers for _, answers in times.weights_by_age) <= 61


@pytest.mark.long
def test_polls_and_delay_on_typical_latencies() -> None:
    """For the latencies that such an API has: beginner's polls included.

    Who knew the distribution beforehand and planned for just this would need 1.74 polls for a median delay of 1.5 s,
    and with 1.7 polls would see the median answer after 1.57 s.
    """
    seen = [simulate(PollSchedule(), LATENCIES["lognormal(4 s, 0.6)"], seed=seed) for seed in range(4)]
    assert sum(run.polls for run in seen) / 4 <= 1.7
    assert sum(run.median for run in seen) / 4 <= 2.0


@pytest.mark.parametrize("name", first_quick(1, LATENCIES, single=True))
def test_schedule_beats_fixed_intervals(name: str) -> None:
    """In polls and typical latencies of delay together, at the price that is fair."""
    latency = LATENCIES[name]
    chance = random.Random(1)
    typical = sorted(latency(chance) for _ in range(999))[499]

    def cost(request: Outcome) -> float:
        return request.polls * PollCost.NORMAL.value * typical + sum(request.delays) / len(request.delays)

    best = min(cost(simulate(FixedInterval(seconds), latency)) for seconds in (1.0, 2.0, 5.0))
    assert cost(simulate(PollSchedule(), latency)) < 1.15 * best


@pytest.mark.long
def test_submits_share_of_tight_rate() -> None:
    """With one poll a row half would be the most."""
    for name in ("constant 4 s", "lognormal(4 s, 0.2)", "lognormal(4 s, 0.6)", "2 s or 12 s"):
        seen = tight.simulate(PollSchedule(), LATENCIES[name], use_poll_cost=True, rate=20.0, rows=2000)
        assert seen.rows_per_s >= 0.9 * 20 / 2
        assert seen.polls_per_row <= 1.1


@pytest.mark.long
def test_cheap_polls_free_open_task_limit() -> None:
    """Answers that are fetched sooner make room for the next submits."""
    latency = LATENCIES["lognormal(60 s, 0.6)"]
    given_way, fair = (
        tight.simulate(PollSchedule(), latency, use_poll_cost=arbitrated, rate=20.0, rows=1500)
        for arbitrated in (True, False)
    )
    assert given_way.rows_per_s > 1.15 * fair.rows_per_s

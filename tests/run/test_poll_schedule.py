"""Poll times are learned from task durations, planned by the cost of a poll, and relearned when durations change."""

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
    """Return a schedule that has seen tasks of these durations, closely polled."""
    learned = PollSchedule()
    for _ in range(times):
        for age in durations_s:
            learned.record_duration(age * 0.97, age)
    return learned


def poll_ages(times: PollSchedule, cost: PollCost = PollCost.NORMAL, until: float = 60.0) -> list[float]:
    """List the ages at which a task that runs until `until` is polled."""
    ages = [times.next_delay_s(0.0, cost)]
    while ages[-1] < until:
        ages.append(ages[-1] + times.next_delay_s(ages[-1], cost))
    return ages


def test_initial_polls_back_off() -> None:
    """Without data the first poll comes after about a second, and the intervals grow up to half a minute."""
    ages = poll_ages(PollSchedule(), until=200.0)
    assert ages[0] == pytest.approx(0.9)
    gaps = [after - before for before, after in pairwise(ages)]
    assert gaps == sorted(gaps)
    assert gaps[0] == pytest.approx(PollSchedule.MIN_DELAY_S)
    assert gaps[-1] == PollSchedule.MAX_DELAY_S
    assert PollSchedule().median_s == PollSchedule.FIRST_GUESS_S


def test_constant_duration_polled_once() -> None:
    """Tasks of constant duration are polled once, just after they finish."""
    first = trained_schedule(4.0).next_delay_s(0.0)
    assert 4.0 <= first < 4.7


def test_bimodal_durations() -> None:
    """With two typical durations, nothing is polled between them."""
    ages = poll_ages(trained_schedule(2.0, 20.0), until=18.0)
    assert 2.0 <= ages[0] < 2.5
    assert ages[1] >= 18.0


def test_poll_cost_shifts_time() -> None:
    """The more a poll costs, the later and rarer it is."""
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
    """A limiting rate makes polls expensive; full open tasks and a rate to spare make them cheap."""
    assert PollCost.choose(rate_is_limiting=scarce, free_share=room) is price


def test_durations_are_relearned() -> None:
    """After thousands of quick tasks, 60 slow ones are enough to change the schedule."""
    times = trained_schedule(1.0, times=1000)
    assert times.median_s == pytest.approx(1.0, rel=0.1)
    for _ in range(60):
        times.record_duration(29.0, 30.0)
    assert times.median_s == pytest.approx(30.0, rel=0.1)
    assert times.next_delay_s(0.0) > 0


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(30.0, 2.0), (4.0, 1.0), (2.0, 30.0)])
def test_duration_changes_are_noticed(before: float, after: float) -> None:
    """Shorter durations are noticed although tasks are ready when polled: one in twenty is polled earlier."""
    tasks = count()

    def latency(chance: random.Random) -> float:
        return (before if next(tasks) < 600 else after) * chance.uniform(0.9, 1.1)

    times = PollSchedule()
    seen = simulate(times, latency, rows=1600)
    assert times.median_s == pytest.approx(after, rel=0.2)
    assert median(seen.delays[1400:]) < 0.6 * after


def test_wide_intervals_are_weak_evidence() -> None:
    """A wide interval, after a laptop's sleep or a late poll, fits what is known and changes little."""
    times = trained_schedule(4.0)
    for _ in range(30):
        times.record_duration(0.0, 30_000.0)
    assert times.median_s == pytest.approx(4.0, rel=0.1)


def test_poll_times_do_not_bias_durations() -> None:
    """Late polls do not lengthen the learned durations: they are taken as upper bounds."""
    times, chance = PollSchedule(), random.Random(1)
    for _ in range(200):
        latency = chance.choice([4.0, 4.0, 13.0])
        after = chance.uniform(0.0, latency)
        times.record_duration(after, latency + chance.uniform(0.0, 6.0))
    assert 3.0 < times.median_s < 6.0


def test_negative_intervals_are_ignored() -> None:
    """An interval that ends before it starts is ignored."""
    times = PollSchedule()
    times.record_duration(10.0, 3.0)
    assert times.weights_by_age == []


def test_invalid_stored_durations_are_ignored() -> None:
    """Invalid stored durations are ignored."""
    invalid_durations = [
        (4.0, -5.0),
        (float("inf"), 3.0),
        (-1.0, 3.0),
        (2.0, 1e300),
        (float("nan"), 1.0),
        (1.0, float("nan")),
    ]
    assert PollSchedule(invalid_durations).weights_by_age == []
    assert PollSchedule([*invalid_durations, (3.0, 6.0)]).median_s == pytest.approx(3.0, rel=0.1)


def test_stored_durations_have_low_weight() -> None:
    """Stored durations weigh as much as a few new answers."""
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
    """The delay is above 0 and at most the largest known age."""
    times = PollSchedule()
    for after, longer in intervals:
        times.record_duration(after, after + longer)
    wait = times.next_delay_s(age, price)
    assert 0 < wait <= max(PollSchedule.MAX_DELAY_S, AGES_S[-1])
    assert sum(answers for _, answers in times.weights_by_age) <= 61


@pytest.mark.long
def test_polls_and_delay_on_typical_latencies() -> None:
    """On typical latencies, including the first polls without data: at most 1.7 polls and a median delay of 2 s.

    A plan for the known distribution would need 1.74 polls for a median delay of 1.5 s; with 1.7 polls its median delay
    would be 1.57 s.
    """
    seen = [simulate(PollSchedule(), LATENCIES["lognormal(4 s, 0.6)"], seed=seed) for seed in range(4)]
    assert sum(run.polls for run in seen) / 4 <= 1.7
    assert sum(run.median for run in seen) / 4 <= 2.0


@pytest.mark.parametrize("name", first_quick(1, LATENCIES, single=True))
def test_schedule_beats_fixed_intervals(name: str) -> None:
    """The schedule costs at most 1.15 times the best fixed interval, in polls and delay at a poll's normal price."""
    latency = LATENCIES[name]
    chance = random.Random(1)
    typical = sorted(latency(chance) for _ in range(999))[499]

    def cost(request: Outcome) -> float:
        return request.polls * PollCost.NORMAL.value * typical + sum(request.delays) / len(request.delays)

    best = min(cost(simulate(FixedInterval(seconds), latency)) for seconds in (1.0, 2.0, 5.0))
    assert cost(simulate(PollSchedule(), latency)) < 1.15 * best


@pytest.mark.long
def test_submits_share_of_tight_rate() -> None:
    """With a tight rate submits get at least 90% of what one poll a row would leave them (half of the rate)."""
    for name in ("constant 4 s", "lognormal(4 s, 0.2)", "lognormal(4 s, 0.6)", "2 s or 12 s"):
        seen = tight.simulate(PollSchedule(), LATENCIES[name], use_poll_cost=True, rate=20.0, rows=2000)
        assert seen.rows_per_s >= 0.9 * 20 / 2
        assert seen.polls_per_row <= 1.1


@pytest.mark.long
def test_cheap_polls_free_open_task_limit() -> None:
    """With open tasks at their limit, cheap polls fetch answers sooner and make room for submits."""
    latency = LATENCIES["lognormal(60 s, 0.6)"]
    given_way, fair = (
        tight.simulate(PollSchedule(), latency, use_poll_cost=arbitrated, rate=20.0, rows=1500)
        for arbitrated in (True, False)
    )
    assert given_way.rows_per_s > 1.15 * fair.rows_per_s


def test_first_tasks_are_polled_early() -> None:
    """While nothing is known, a few tasks are polled early, because the API may be fast; later ones are not."""
    schedule = PollSchedule()
    first = [schedule.first_delay_s() for _ in range(10)]
    assert first == [pytest.approx(0.1)] * 5 + [pytest.approx(0.9)] * 5
    assert trained_schedule(4.0).first_delay_s() >= 4.0


@in_turn(
    ("age_s", "open_tasks", "rate", "expected"),
    [
        (5.0, 1, 500.0, 1.0),  # the last task
        (5.0, 1000, 500.0, 10.0),  # a fifth of the rate for all
        (5.0, 10, 1.0, 50.0),
        (40.0, 1, 500.0, 1.0),  # ten times the median
        (140.0, 1, 500.0, 4.0),  # overdue: 3% of what is beyond
    ],
)
def test_last_delay(age_s: float, open_tasks: int, rate: float, expected: float) -> None:
    """The fewer tasks are open, the sooner each is polled, at most once a second; an overdue task more rarely."""
    schedule = PollSchedule([(4.0, 15.0)])
    assert schedule.last_delay_s(age_s, open_tasks, rate) == pytest.approx(expected, rel=0.05)


@given(durations=st.lists(st.floats(0.1, 1000), min_size=1, max_size=50))
def test_mean_duration_is_learned(durations: list[float]) -> None:
    """The mean duration lies between the shortest and the longest of closely polled tasks."""
    schedule = PollSchedule()
    assert schedule.mean_s == PollSchedule.FIRST_GUESS_S
    for duration in durations * 20:
        schedule.record_duration(0.97 * duration, duration)
    assert 0.85 * min(durations) <= schedule.mean_s <= 1.1 * max(durations)

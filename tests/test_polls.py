"""When a poll pays: learned from intervals, planned by price, relearned when the API changes."""

from __future__ import annotations

import random
from itertools import count, pairwise
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import tight
from benchmarks.polls import LATENCIES, Every, Seen, play
from enrich.polls import AGES, INHERITED, PollTimes, Price
from tests.cases import first_quick, in_turn


def trained_schedule(*durations_s: float, times: int = 40) -> PollTimes:
    """Make poll times that have seen tasks take so long, closely watched."""
    learned = PollTimes()
    for _ in range(times):
        for age in durations_s:
            learned.finished(age * 0.97, age)
    return learned


def poll_ages(times: PollTimes, cost: Price = Price.FAIR, until: float = 60.0) -> list[float]:
    """List the ages at which a task is asked that runs so long."""
    ages = [times.wait(0.0, cost)]
    while ages[-1] < until:
        ages.append(ages[-1] + times.wait(ages[-1], cost))
    return ages


def test_initial_polls_back_off() -> None:
    """The first guess is a second; nothing waits longer than half a minute for the next poll."""
    ages = poll_ages(PollTimes(), until=200.0)
    assert ages[0] == pytest.approx(0.9)
    gaps = [after - before for before, after in pairwise(ages)]
    assert gaps == sorted(gaps)
    assert gaps[0] == pytest.approx(PollTimes.SHORTEST_S)
    assert gaps[-1] == PollTimes.LONGEST_S
    assert PollTimes().typical == PollTimes.FIRST_GUESS_S


def test_constant_duration_polled_once() -> None:
    """Just after it is done."""
    first = trained_schedule(4.0).wait(0.0)
    assert 4.0 <= first < 4.7


def test_bimodal_durations() -> None:
    """Nobody asks in between, when none can be done."""
    ages = poll_ages(trained_schedule(2.0, 20.0), until=18.0)
    assert 2.0 <= ages[0] < 2.5
    assert ages[1] >= 18.0


def test_poll_cost_shifts_time() -> None:
    """The price of a poll decides how sure it must be."""
    times = trained_schedule(2.0, 3.0, 4.0, 5.0, 7.0)
    low, fair, high = (len(poll_ages(times, price, until=7.0)) for price in Price)
    assert low > fair > high >= 1
    assert times.wait(0.0, Price.LOW) < times.wait(0.0, Price.HIGH)


@in_turn(
    ("scarce", "room", "price"),
    [(True, 0.9, Price.HIGH), (True, 0.2, Price.FAIR), (False, 0.9, Price.FAIR), (False, 0.0, Price.LOW)],
)
def test_poll_cost_from_run_limits(scarce: bool, room: float, price: Price) -> None:  # noqa: FBT001 - a table
    """Slots that submits want make a poll dear; a full house and slots left over make it cheap."""
    assert Price.of(scarce=scarce, room=room) is price


def test_durations_are_relearned() -> None:
    """After thousands of quick tasks a hundred slow ones decide."""
    times = trained_schedule(1.0, times=1000)
    assert times.typical == pytest.approx(1.0, rel=0.1)
    for _ in range(60):
        times.finished(29.0, 30.0)
    assert times.typical == pytest.approx(30.0, rel=0.1)
    assert times.wait(0.0) > 0


@pytest.mark.parametrize(("before", "after"), [(30.0, 2.0), (4.0, 1.0), (2.0, 30.0)])
def test_duration_changes_are_noticed(before: float, after: float) -> None:
    """Also when every answer is there at the time at which it was expected: one in twenty is looked for earlier."""
    tasks = count()

    def latency(chance: random.Random) -> float:
        return (before if next(tasks) < 600 else after) * chance.uniform(0.9, 1.1)

    times = PollTimes()
    seen = play(times, latency, rows=1600)
    assert times.typical == pytest.approx(after, rel=0.2)
    assert median(seen.delays[1400:]) < 0.6 * after


def test_wide_intervals_are_weak_evidence() -> None:
    """A laptop that slept, a poll that was late: done at some time in these hours agrees with what is known."""
    times = trained_schedule(4.0)
    for _ in range(30):
        times.finished(0.0, 30_000.0)
    assert times.typical == pytest.approx(4.0, rel=0.1)


def test_poll_times_do_not_bias_durations() -> None:
    """Asked every ten seconds, tasks of 4 or 13 seconds teach that they took at most 10 and 20, not 10 and 20."""
    times, chance = PollTimes(), random.Random(1)
    for _ in range(200):
        latency = chance.choice([4.0, 4.0, 13.0])
        after = chance.uniform(0.0, latency)
        times.finished(after, latency + chance.uniform(0.0, 6.0))
    assert 3.0 < times.typical < 6.0


def test_negative_intervals_are_ignored() -> None:
    """A task cannot be done before it was seen at work."""
    times = PollTimes()
    times.finished(10.0, 3.0)
    assert times.learned == []


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
    assert PollTimes(scripted_api).learned == []
    assert PollTimes([*scripted_api, (3.0, 6.0)]).typical == pytest.approx(3.0, rel=0.1)


def test_stored_durations_have_low_weight() -> None:
    """What was inherited weighs as much as a few answers."""
    times = PollTimes(trained_schedule(8.0).learned)
    assert sum(answers for _, answers in times.learned) == pytest.approx(INHERITED)
    assert 8.0 <= times.wait(0.0) < 9.5
    for _ in range(40):
        times.finished(1.9, 2.0)
    assert 2.0 <= times.wait(0.0) < 2.5


@given(
    intervals=st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=40),
    age=st.floats(0, 1e6),
    price=st.sampled_from(Price),
)
def test_next_poll_is_bounded(intervals: list[tuple[float, float]], age: float, price: Price) -> None:
    """The wait is above nothing, and at most until the oldest age that is known."""
    times = PollTimes()
    for after, longer in intervals:
        times.finished(after, after + longer)
    wait = times.wait(age, price)
    assert 0 < wait <= max(PollTimes.LONGEST_S, AGES[-1])
    assert sum(answers for _, answers in times.learned) <= 61


@pytest.mark.long
def test_polls_and_delay_on_typical_latencies() -> None:
    """For the latencies that such an API has: beginner's polls included.

    Who knew the distribution beforehand and planned for just this would need 1.74 polls for a median delay of 1.5 s,
    and with 1.7 polls would see the median answer after 1.57 s.
    """
    seen = [play(PollTimes(), LATENCIES["lognormal(4 s, 0.6)"], seed=seed) for seed in range(4)]
    assert sum(run.polls for run in seen) / 4 <= 1.7
    assert sum(run.median for run in seen) / 4 <= 2.0


@pytest.mark.parametrize("name", first_quick(1, LATENCIES, single=True))
def test_schedule_beats_fixed_intervals(name: str) -> None:
    """In polls and typical latencies of delay together, at the price that is fair."""
    latency = LATENCIES[name]
    chance = random.Random(1)
    typical = sorted(latency(chance) for _ in range(999))[499]

    def cost(request: Seen) -> float:
        return request.polls * Price.FAIR.value * typical + sum(request.delays) / len(request.delays)

    best = min(cost(play(Every(seconds), latency)) for seconds in (1.0, 2.0, 5.0))
    assert cost(play(PollTimes(), latency)) < 1.15 * best


@pytest.mark.long
def test_submits_share_of_tight_rate() -> None:
    """With one poll a row half would be the most."""
    for name in ("constant 4 s", "lognormal(4 s, 0.2)", "lognormal(4 s, 0.6)", "2 s or 12 s"):
        seen = tight.play(PollTimes(), LATENCIES[name], arbitrated=True, rate=20.0, rows=2000)
        assert seen.rows_per_s >= 0.9 * 20 / 2
        assert seen.polls_per_row <= 1.1


def test_cheap_polls_free_open_task_limit() -> None:
    """Answers that are fetched sooner make room for the next submits."""
    latency = LATENCIES["lognormal(60 s, 0.6)"]
    given_way, fair = (
        tight.play(PollTimes(), latency, arbitrated=arbitrated, rate=20.0, rows=1500) for arbitrated in (True, False)
    )
    assert given_way.rows_per_s > 1.15 * fair.rows_per_s

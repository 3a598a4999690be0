"""How many tasks are open at once is found: the allowance is used, polls are few, and the run ends with its last task.

The simulations run dispatcher and poller on a virtual clock, so the numbers are the same on every machine.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from benchmarks.in_flight import simulate
from benchmarks.polls import LATENCIES
from enrich.run.poll_schedule import PollSchedule
from enrich.run.rate_limit import MAX_OPEN_TASKS, MIN_ANSWERS, START_OPEN_TASKS, InFlightLimit
from tests.support.cases import first_quick, in_turn

RATES = st.floats(0.2, 20_000)
AGES_S = st.floats(0.05, 5_000)
ANSWERS = st.integers(0, 100_000)
LIMITS = st.builds(InFlightLimit, st.none() | st.integers(1, 50_000), st.integers(1, 32))


@given(limit=LIMITS, rate=RATES, answers=ANSWERS, age_s=AGES_S, ttl_s=st.floats(1, 100_000))
def test_limit_bounds(limit: InFlightLimit, rate: float, answers: int, age_s: float, ttl_s: float) -> None:
    """All workers together stay within the limit, and within what can be fetched in a quarter of the results' time."""
    share = replace(limit, result_ttl_s=ttl_s).max_open_tasks(rate, answers=answers, age_s=age_s)
    assert share >= 1
    if share > 1:
        assert share * limit.workers <= (limit.configured or MAX_OPEN_TASKS)
        assert share <= rate * ttl_s / 4


@given(rate=RATES, age_s=AGES_S, answers=ANSWERS, longer=st.floats(1, 10))
def test_limit_grows_with_rate_and_age(rate: float, age_s: float, answers: int, longer: float) -> None:
    """The limit starts at 200, never falls below it for short tasks, and grows with rate and age after 20 answers."""

    def limit(rate: float, age_s: float) -> int:
        return InFlightLimit(result_ttl_s=1e9).max_open_tasks(rate, answers=answers, age_s=age_s)

    assert limit(rate, age_s) >= START_OPEN_TASKS
    assert limit(rate * longer, age_s) >= limit(rate, age_s)
    assert limit(rate, age_s * longer) >= limit(rate, age_s)
    if answers < MIN_ANSWERS:
        assert limit(rate, age_s) == START_OPEN_TASKS
    else:
        assert limit(rate, age_s) >= min(MAX_OPEN_TASKS, int(rate * age_s))


@given(configured=st.integers(1, 50_000), rate=RATES, age_s=AGES_S, answers=ANSWERS)
def test_configured_limit_is_kept(configured: int, rate: float, age_s: float, answers: int) -> None:
    """A limit of the user stays as it is, whatever is learned."""
    limit = InFlightLimit(configured, result_ttl_s=1e9).max_open_tasks(rate, answers=answers, age_s=age_s)
    assert limit == configured


@given(workers=st.integers(1, 32), rate=st.floats(10, 10_000), age_s=st.floats(0.1, 100))
def test_workers_share_the_limit(workers: int, rate: float, age_s: float) -> None:
    """Workers that share a rate share the limit of the whole run, and the 20 answers, too."""

    def limit(workers: int, answers: int) -> int:
        return workers * InFlightLimit(None, workers).max_open_tasks(rate / workers, answers=answers, age_s=age_s)

    for together in (0, MIN_ANSWERS):
        assert limit(1, together) - workers < limit(workers, -(-together // workers)) <= limit(1, together)


@pytest.mark.parametrize("rate", first_quick(1, [50.0, 500.0], single=True))
def test_allowance_is_used_where_answers_take_seconds(rate: float) -> None:
    """Nearly all of the allowance is used, with few polls and 429s, and the run ends soon after its last task."""
    seen = simulate(rate, int(20 * rate), LATENCIES["lognormal(4 s, 0.6)"])
    assert seen.posting_ratio(rate) <= 1.0
    assert seen.used_share >= (0.95 if rate < 500 else 0.9)
    assert seen.polls_per_row <= 1.4
    assert seen.refused_share <= 0.01
    assert seen.tail_s <= 1.2


@pytest.mark.long
@pytest.mark.parametrize("rate", [50.0, 500.0])
def test_allowance_is_used_on_busy_machine(rate: float) -> None:
    """Where the process does not run for a while and commits are slow, bursts are small and the rate stays high."""
    seen = simulate(rate, int(10 * rate), LATENCIES["lognormal(4 s, 0.6)"], stalls=True)
    assert seen.posting_ratio(rate) <= 1.3
    assert seen.used_share >= (0.92 if rate < 500 else 0.7)
    assert seen.refused_share <= 0.01
    assert seen.tail_s <= 2


@pytest.mark.long
def test_fixed_limit_of_200_would_be_the_bottleneck() -> None:
    """With the start limit for the whole run, most of a large allowance is unused."""
    latency = LATENCIES["lognormal(4 s, 0.6)"]
    fixed, found = (simulate(500, 3_000, latency, in_flight=limit) for limit in (START_OPEN_TASKS, None))
    assert fixed.max_open <= START_OPEN_TASKS < found.max_open <= MAX_OPEN_TASKS
    assert found.posting_s < fixed.posting_s / 3


@pytest.mark.long
def test_workers_together_do_as_one() -> None:
    """Four workers that share an allowance use it as one does."""
    seen = simulate(500, 5_000, LATENCIES["lognormal(4 s, 0.6)"], workers=4)
    assert seen.max_open <= MAX_OPEN_TASKS
    assert seen.posting_ratio(500) <= 1.3
    assert seen.polls_per_row <= 1.7
    assert seen.refused_share <= 0.02
    assert seen.tail_s <= 2


@pytest.mark.long
@pytest.mark.parametrize("name", LATENCIES)
def test_run_ends_with_its_last_task(name: str) -> None:
    """Whatever the durations, the answer of the last task is seen soon, at a price of few polls.

    Of durations without a bound, the last can be many times the median: such a task is polled more rarely.
    """
    seen = simulate(100, 2_000, LATENCIES[name])
    assert seen.tail_s <= (4 if name == "Pareto(1.5) from 1.5 s" else 1.5)
    assert seen.polls_per_row <= (6 if name == "lognormal(60 s, 0.6)" else 1.9)


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


def test_fast_answers_are_noticed_early() -> None:
    """Where answers come at once, a run does not wait a second for its first poll."""
    seen = simulate(500, 100, lambda _: 0.0)
    assert seen.polls_per_row == 1
    assert seen.tail_s + seen.posting_s < 3

"""When the next request may leave: never faster than told, soon as fast as allowed, slower when asked to."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.pace import (
    BURST_S,
    CUT,
    CUT_AGAIN,
    CUT_FIRST,
    PAUSE_S,
    PROVEN,
    REST,
    RETURN_S,
    SLOW_START,
    SLOWEST,
    STEP,
    TOLD_START,
    Pace,
)

#: What may happen between two requests: nothing, an answer, a 429 with or without a wish, a slot that was not used.
EVENTS = st.sampled_from(["nothing", "answered", "429", "429 bare", "given back"])


def most_in_a_second(times: Sequence[float]) -> int:
    """Count the requests of the busiest second."""
    first, most = 0, 0
    for last, time in enumerate(times):
        while times[first] <= time - 1:
            first += 1
        most = max(most, last - first + 1)
    return most


@given(
    ceiling=st.floats(0.1, 200),
    steps=st.lists(st.tuples(st.floats(0, 0.3) | st.sampled_from([0.0, 3.0]), EVENTS), min_size=1, max_size=300),
)
def test_no_second_sees_more_requests_than_the_ceiling(ceiling: float, steps: list[tuple[float, str]]) -> None:
    """Whatever comes in between, at most the ceiling and the small burst that makes up for late timers leave."""
    pace, now, left = Pace(ceiling), 100.0, []
    for pause, event in steps:
        now += pause
        now += pace.delay(now)
        pace.take(now)
        left.append(now)
        match event:
            case "answered":
                pace.answered(now)
            case "429":
                pace.throttled(now, 0.2)
            case "429 bare":
                pace.throttled(now, None)
            case "given back":
                left.pop()
                pace.give_back(1)
        assert pace.rate <= ceiling
    assert most_in_a_second(left) <= ceil(ceiling * (1 + BURST_S)) + 1


@given(ceiling=st.floats(0.1, TOLD_START))
def test_who_always_asks_gets_the_ceiling(ceiling: float) -> None:
    """The pace costs nothing beyond what it promises: the mean rate is the ceiling."""
    pace, now = Pace(ceiling), 0.0
    for _ in range(100):
        now += pace.delay(now)
        pace.take(now)
    assert now == pytest.approx(99 / ceiling)


def served(pace: Pace, now: float, seconds: float) -> float:
    """Send all that the pace allows for a while, each answered at once; return when it ended."""
    end = now + seconds
    while now < end:
        now += pace.delay(now)
        pace.take(now)
        pace.answered(now)
    return now


def test_an_unknown_limit_is_approached_from_below() -> None:
    """The start is slow; each answer to a rate that held us back makes it larger."""
    pace = Pace(None)
    assert pace.rate == SLOW_START
    pace.take(50.0)
    pace.answered(50.0)
    assert pace.rate == min(SLOW_START + STEP, SLOW_START * PROVEN)
    served(pace, 50.0, 1.0)
    assert pace.rate > 10 * SLOW_START


def test_a_rate_that_is_not_used_does_not_grow() -> None:
    """Nothing is known about a rate that nobody needed: it would be far too high when somebody does."""
    pace, now = Pace(None), 50.0
    for _ in range(100):
        now += 5 / pace.rate
        pace.take(now)
        pace.answered(now)
    assert not pace.scarce
    assert pace.rate <= SLOW_START * PROVEN**2


def test_no_rate_is_far_above_what_was_just_proven() -> None:
    """When answers take long, the rate waits for them: what is on the wire is at most a quarter too much."""
    pace, now = Pace(None), 0.0
    for _ in range(40):
        now += pace.delay(now)
        pace.take(now)
    for _ in range(40):
        pace.answered(now)
    assert pace.rate == pytest.approx(SLOW_START * PROVEN)


def test_a_429_stops_everybody_for_as_long_as_the_api_says() -> None:
    """Nothing leaves before; afterwards it goes on slower, and what was missed is not caught up."""
    pace = Pace(50.0)
    pace.take(9.9)
    pace.throttled(10.0, 7.0)
    assert pace.delay(10.0) == pytest.approx(7.0)
    assert pace.delay(16.5) == pytest.approx(0.5)
    assert pace.delay(17.0) == 0
    assert pace.rate == pytest.approx(50 * REST * (1 - CUT_FIRST))
    pace.take(17.0)
    assert pace.delay(17.0) > 0


def test_each_429_may_ask_for_a_longer_silence() -> None:
    """The rate is cut once for what was on the wire, but everybody's wish is heard."""
    pace = Pace(50.0)
    for _ in range(3):
        pace.take(9.9)
    pace.throttled(10.0, 1.0)
    rate = pace.rate
    pace.throttled(10.1, 5.0)
    assert pace.delay(10.1) == pytest.approx(5.0)
    assert pace.rate == rate


def test_a_429_that_says_nothing_costs_a_moment() -> None:
    """Without Retry-After the silence is short, and twice as long each time that the door is still shut after it."""
    pace, now, pauses = Pace(100.0), 10.0, []
    for _ in range(4):
        pace.take(now)
        pace.throttled(now, None)
        pauses.append(round(pace.delay(now), 6))
        now += 3.0
    assert pauses == [PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S, 8 * PAUSE_S]
    pace.take(now)
    pace.answered(now)
    pace.throttled(now, None)
    assert pace.delay(now) == pytest.approx(max(PAUSE_S, 1 / pace.rate), rel=0.5)


def test_an_absurd_wish_is_capped() -> None:
    """A Retry-After of a day would end the night."""
    pace = Pace(4.0)
    pace.throttled(0.0, 86_400.0)
    assert pace.delay(0.0) == 600


def test_the_429s_of_one_burst_slow_us_once() -> None:
    """What was on the wire when the first came says nothing new; the next burst does."""
    pace = Pace(40.0)
    for _ in range(20):
        pace.take(0.0)
    for number in range(20):
        pace.throttled(number / 100, 0.5)
    once = 40 * REST * (1 - CUT_FIRST)
    assert pace.rate == pytest.approx(once)
    for _ in range(2):
        pace.take(60.0)
        pace.answered(60.0)
    rate = pace.rate
    pace.take(60.0)
    pace.throttled(60.0, 0.5)
    assert pace.rate == pytest.approx(rate * REST * (1 - CUT_AGAIN), rel=0.1)


def test_what_never_came_back_does_not_hold_the_rate_up() -> None:
    """Requests that were lost are forgotten after a while: then a 429 counts again."""
    pace = Pace(40.0)
    for _ in range(20):
        pace.take(0.0)
    pace.throttled(0.1, None)
    rate = pace.rate
    pace.take(30.0)
    pace.throttled(30.1, None)
    assert pace.rate < rate


def test_the_rate_comes_back_to_just_below_what_was_refused_and_then_feels_for_more() -> None:
    """Quickly at first, hardly at all near the old limit, ever faster beyond it; the ceiling holds."""
    pace = Pace(200.0)
    now = served(pace, 0.0, 3.0)
    for cut in (CUT_FIRST, CUT):
        now = served(pace, now, 3 * RETURN_S)
        before = pace.rate
        pace.take(now)
        pace.throttled(now, None)
        assert pace.rate == pytest.approx(before * REST * (1 - cut))
    refused = before
    now = served(pace, now + PAUSE_S, RETURN_S / 2)
    assert pace.rate > 0.95 * refused
    now = served(pace, now, RETURN_S / 2)
    assert pace.rate == pytest.approx(REST * refused, rel=0.01)
    served(pace, now, 5 * RETURN_S)
    assert pace.rate == 200.0


def test_a_costly_429_is_not_provoked_again_soon() -> None:
    """When each costs seconds of silence, the rate rests for longer before it feels for more."""
    refused = []
    for retry_after in (None, 4.0):
        pace = Pace(None)
        now = served(pace, 0.0, 1.0)
        pace.take(now)
        limit = pace.rate
        pace.throttled(now, retry_after)
        served(pace, now + 4.0, 3 * RETURN_S)
        refused.append(pace.rate > limit)
    assert refused == [True, False]


def test_a_high_ceiling_is_approached_from_below() -> None:
    """What the person allows may be far more than the API does."""
    pace = Pace(400.0)
    assert pace.rate == TOLD_START
    served(pace, 0.0, 5.0)
    assert pace.rate == 400


def test_no_number_of_429s_stops_us_for_ever() -> None:
    """There is a slowest rate; a ceiling below it is kept all the same."""
    slow, fast = Pace(0.05), Pace(None)
    for number in range(100):
        slow.throttled(number * 100.0, None)
        fast.throttled(number * 100.0, None)
    assert slow.rate == 0.05
    assert fast.rate == SLOWEST


def test_the_next_slot_is_at_most_one_interval_away() -> None:
    """A slot that was given back is there at once."""
    pace = Pace(2.0)
    pace.take(5.0)
    assert pace.delay(5.0) == pytest.approx(0.5 - BURST_S)
    pace.give_back(1)
    assert pace.delay(5.0) == 0
    assert ceil(pace.rate) == 2

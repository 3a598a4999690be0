"""When the next request may leave: never faster than told, soon as fast as allowed, slower when asked to."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.pace import BURST_S, DECREASE, SLOW_START, SLOWEST, TOLD_START, Breaker, Pace, PollTimes

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
                pace.answered()
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


@dataclass
class Seen:
    """What a simulated night came to: the share of 429s and of the allowed rate that was used, over its second half."""

    refused: float
    used: float


def night(allowed: float, ceiling: float | None, retry_after: float | None, seconds: float = 60) -> Seen:
    """Ask a server with a token bucket as fast as the pace allows; answers take 0.1 s."""
    pace, now, tokens, filled = Pace(ceiling), 0.0, 10.0, 0.0
    answers: list[tuple[float, int, bool]] = []
    count = [0, 0]
    late = 0
    while now < seconds:
        leave = now + pace.delay(now)
        if answers and answers[0][0] <= leave:
            now, _, good = heapq.heappop(answers)
            if good:
                pace.answered()
            else:
                pace.throttled(now, retry_after)
            continue
        now = leave
        pace.take(now)
        tokens, filled = min(10.0, tokens + (now - filled) * allowed), now
        good = tokens >= 1
        tokens -= good
        count[good] += 1
        late += good and now > seconds / 2
        heapq.heappush(answers, (now + 0.1, sum(count), good))
    return Seen(count[False] / sum(count), late / (seconds / 2) / allowed)


@pytest.mark.parametrize("retry_after", [1.0, None])
@pytest.mark.parametrize(("allowed", "ceiling"), [(20.0, None), (100.0, None), (20.0, 50.0), (100.0, 150.0)])
def test_a_limit_that_nobody_told_is_found(allowed: float, ceiling: float | None, retry_after: float | None) -> None:
    """Most of what is allowed is used, and hardly a request is refused."""
    seen = night(allowed, ceiling, retry_after)
    assert seen.refused < 0.1
    assert seen.used > 0.7


def test_an_unknown_limit_is_approached_from_below() -> None:
    """The start is slow, and every answer to a rate that held us back doubles it within a round trip."""
    pace = Pace(None)
    assert pace.rate == SLOW_START
    pace.take(0.0)
    pace.answered()
    assert pace.rate == SLOW_START  # nobody had to wait: nothing is known about more
    assert pace.delay(0.0) > 0
    pace.answered()
    assert pace.rate == SLOW_START + 1


def test_a_429_stops_everybody_for_as_long_as_the_api_says() -> None:
    """Nothing leaves before; afterwards it goes on slower."""
    pace = Pace(50.0)
    pace.throttled(10.0, 7.0)
    assert pace.delay(10.0) == pytest.approx(7.0)
    assert pace.delay(16.5) == pytest.approx(0.5)
    assert pace.delay(17.0) == 0
    assert pace.rate == pytest.approx(50 * DECREASE)


def test_a_429_that_says_nothing_costs_one_slot() -> None:
    """Without Retry-After the next request waits as long as one takes at this rate."""
    pace = Pace(4.0)
    pace.throttled(10.0, None)
    assert pace.delay(10.0) == pytest.approx(0.25)


def test_an_absurd_wish_is_capped() -> None:
    """A Retry-After of a day would end the night."""
    pace = Pace(4.0)
    pace.throttled(0.0, 86_400.0)
    assert pace.delay(0.0) == 600


def test_the_429s_of_one_burst_slow_us_once() -> None:
    """What was on the wire when the first came says nothing new; the next burst does."""
    pace = Pace(40.0)
    for number in range(20):
        pace.throttled(number / 100, 0.5)
    assert pace.rate == pytest.approx(40 * DECREASE)
    pace.throttled(60.0, 0.5)
    assert pace.rate == pytest.approx(40 * DECREASE**2)


def test_a_high_ceiling_is_approached_from_below() -> None:
    """What the person allows may be far more than the API does: the rate doubles in a second until told otherwise."""
    pace, now = Pace(400.0), 0.0
    assert pace.rate == TOLD_START
    while now < 1.0:
        now += pace.delay(now)
        pace.take(now)
        if pace.delay(now):
            pace.answered()
    assert 1.8 * TOLD_START < pace.rate < 3 * TOLD_START


def test_the_rate_recovers_up_to_the_ceiling_and_no_further() -> None:
    """By about a twentieth a second, as long as it is what holds us back."""
    pace, now = Pace(10.0), 0.0
    pace.throttled(now, None)
    rates = [pace.rate]
    while now < 60:
        now += pace.delay(now)
        pace.take(now)
        if pace.delay(now):
            pace.answered()
        rates.append(pace.rate)
    assert rates == sorted(rates)
    assert rates[10] < 10
    assert rates[-1] == 10


def test_no_number_of_429s_stops_us_for_ever() -> None:
    """There is a slowest rate; a ceiling below it is kept all the same."""
    slow, fast = Pace(0.05), Pace(None)
    for number in range(100):
        slow.throttled(number * 100.0, None)
        fast.throttled(number * 100.0, None)
    assert slow.rate == 0.05
    assert fast.rate == SLOWEST


def test_the_breaker_lets_one_at_a_time_through_when_the_api_is_ill() -> None:
    """Three bad answers in a row trip it; the pauses double up to a minute; a good answer ends it."""
    breaker = Breaker()
    for now in (1.0, 2.0):
        breaker.bad(now)
        assert breaker.healthy
        assert breaker.delay(now, on_the_wire=5) == 0
    breaker.bad(3.0)
    assert not breaker.healthy
    assert breaker.ill_since == 1.0
    assert breaker.delay(3.0, on_the_wire=1) is None
    pauses, now = [], 3.0
    for _ in range(8):
        pause = breaker.delay(now, on_the_wire=0)
        assert pause is not None
        pauses.append(pause)
        now += pause
        breaker.bad(now)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    breaker.good()
    assert breaker.healthy
    assert breaker.ill_since is None
    assert breaker.delay(3.0, on_the_wire=31) == 0


def test_a_full_wire_that_fails_at_once_is_one_hiccup() -> None:
    """What had left before the pause began says nothing new: the pause is a second and not a minute."""
    breaker = Breaker()
    for _ in range(32):
        breaker.bad(5.0)
    assert breaker.delay(5.0, on_the_wire=0) == 1


def test_good_answers_between_bad_ones_keep_the_breaker_closed() -> None:
    """Only bad answers in a row are an illness."""
    breaker = Breaker()
    for now in range(30):
        breaker.bad(float(now))
        breaker.bad(float(now))
        breaker.good()
    assert breaker.healthy


def test_polls_come_when_half_of_the_tasks_are_done() -> None:
    """The first poll waits for about the median of the last tasks, the next ones less often as the task gets old."""
    times = PollTimes()
    assert times.typical == PollTimes.FIRST_GUESS_S
    for age in (3.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 100.0):
        times.finished(age)
    assert times.typical == 13
    assert times.wait(0.0) == pytest.approx(13 * 0.9)
    assert times.wait(5.0) == pytest.approx(13 * 0.9 - 5)
    assert times.wait(20.0) == pytest.approx(7.0)
    assert times.wait(1000.0) == PollTimes.LONGEST_S
    assert PollTimes().wait(1.0) == PollTimes.SHORTEST_S


def test_what_is_typical_follows_the_api_all_night() -> None:
    """An API that becomes slow after thousands of tasks is not polled as if it were fast."""
    times = PollTimes()
    for _ in range(1000):
        times.finished(1.0)
    assert times.typical == 1
    for _ in range(300):
        times.finished(60.0)
    assert times.typical == 60


@given(age=st.floats(0, 1e6), typical=st.floats(0, 1e4))
def test_a_poll_is_never_sent_in_the_past_nor_too_soon(age: float, typical: float) -> None:
    """Whatever the tasks take, the wait is long enough to be worth a request, or ends when the task is likely done."""
    times = PollTimes()
    times.finished(typical)
    wait = times.wait(age)
    assert wait > 0 or typical == 0
    assert wait <= max(PollTimes.LONGEST_S, typical * 0.9)


def test_the_next_slot_is_at_most_one_interval_away() -> None:
    """A slot that was given back is there at once."""
    pace = Pace(2.0)
    pace.take(5.0)
    assert pace.delay(5.0) == pytest.approx(0.5 - BURST_S)
    pace.give_back(1)
    assert pace.delay(5.0) == 0
    assert ceil(pace.rate) == 2

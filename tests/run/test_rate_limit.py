"""The rate limiter: below the ceiling, quickly up to the limit, slower on request. Circuit breaker and open tasks."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.run.rate_limit import (
    CUT,
    FIRST_CUT,
    MAX_BURST_S,
    MAX_OPEN_TASKS,
    MAX_OVER_PROVEN_RATE,
    MIN_ANSWERS,
    MIN_RATE,
    PAUSE_S,
    REPEATED_CUT,
    RESTING_SHARE,
    RETURN_S,
    SLOW_START_STEP,
    START_OPEN_TASKS,
    START_RATE,
    START_RATE_WITH_CEILING,
    AdaptiveRateLimiter,
    CircuitBreaker,
    InFlightLimit,
)

#: Events between two requests: nothing, an answer, a 429 with or without Retry-After, an unused slot.
EVENTS = st.sampled_from(["nothing", "answered", "429", "429 bare", "given back"])


def busiest_second(times: Sequence[float]) -> int:
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
def test_rate_never_exceeds_limit(ceiling: float, steps: list[tuple[float, str]]) -> None:
    """Whatever happens, a second has at most the ceiling and the small burst that makes up for late timers."""
    limiter, now, left = AdaptiveRateLimiter(ceiling), 100.0, []
    for pause, event in steps:
        now += pause
        now += limiter.delay(now)
        limiter.consume(now)
        left.append(now)
        match event:
            case "answered":
                limiter.record_answer(now)
            case "429":
                limiter.record_throttled(now, 0.2)
            case "429 bare":
                limiter.record_throttled(now, None)
            case "given back":
                left.pop()
                limiter.refund(1)
        assert limiter.rate <= ceiling
    assert busiest_second(left) <= ceil(ceiling * (1 + MAX_BURST_S)) + 1


@given(ceiling=st.floats(0.1, START_RATE_WITH_CEILING))
def test_constant_load_reaches_limit(ceiling: float) -> None:
    """Under constant load the mean rate equals the ceiling."""
    limiter, now = AdaptiveRateLimiter(ceiling), 0.0
    for _ in range(100):
        now += limiter.delay(now)
        limiter.consume(now)
    assert now == pytest.approx(99 / ceiling)


def send_at_limit(limiter: AdaptiveRateLimiter, now: float, seconds: float) -> float:
    """Send all that the limiter allows for some seconds, with instant answers; return the end time."""
    end = now + seconds
    while now < end:
        now += limiter.delay(now)
        limiter.consume(now)
        limiter.record_answer(now)
    return now


def test_rate_grows_from_start() -> None:
    """The rate starts low and grows with each answer while it limits requests."""
    limiter = AdaptiveRateLimiter(None)
    assert limiter.rate == START_RATE
    limiter.consume(50.0)
    limiter.record_answer(50.0)
    assert limiter.rate == min(START_RATE + SLOW_START_STEP, START_RATE * MAX_OVER_PROVEN_RATE)
    send_at_limit(limiter, 50.0, 1.0)
    assert limiter.rate > 10 * START_RATE


def test_unused_rate_does_not_grow() -> None:
    """A rate that is not used does not grow, because it would be far too high when it is needed."""
    limiter, now = AdaptiveRateLimiter(None), 50.0
    for _ in range(100):
        now += 5 / limiter.rate
        limiter.consume(now)
        limiter.record_answer(now)
    assert not limiter.is_limiting
    assert limiter.rate <= START_RATE * MAX_OVER_PROVEN_RATE**2


def test_rate_bounded_by_recent_throughput() -> None:
    """With slow answers the rate grows only with them: at most a quarter above the proven throughput."""
    limiter, now = AdaptiveRateLimiter(None), 0.0
    for _ in range(40):
        now += limiter.delay(now)
        limiter.consume(now)
    for _ in range(40):
        limiter.record_answer(now)
    assert limiter.rate == pytest.approx(START_RATE * MAX_OVER_PROVEN_RATE)


def test_retry_after_pauses_all() -> None:
    """After a Retry-After, no request is sent until it ends; then the rate is lower, and nothing is caught up."""
    limiter = AdaptiveRateLimiter(50.0)
    limiter.consume(9.9)
    limiter.record_throttled(10.0, 7.0)
    assert limiter.delay(10.0) == pytest.approx(7.0)
    assert limiter.delay(16.5) == pytest.approx(0.5)
    assert limiter.delay(17.0) == 0
    assert limiter.rate == pytest.approx(50 * RESTING_SHARE * (1 - FIRST_CUT))
    limiter.consume(17.0)
    assert limiter.delay(17.0) > 0


def test_longest_retry_after_wins() -> None:
    """Of several 429s to requests in flight, the longest Retry-After counts, and the rate is cut once."""
    limiter = AdaptiveRateLimiter(50.0)
    for _ in range(3):
        limiter.consume(9.9)
    limiter.record_throttled(10.0, 1.0)
    rate = limiter.rate
    limiter.record_throttled(10.1, 5.0)
    assert limiter.delay(10.1) == pytest.approx(5.0)
    assert limiter.rate == rate


def test_429_without_retry_after_backs_off() -> None:
    """Without Retry-After the pause is short and doubles each time the next request gets a 429 again."""
    limiter, now, pauses = AdaptiveRateLimiter(100.0), 10.0, []
    for _ in range(4):
        limiter.consume(now)
        limiter.record_throttled(now, None)
        pauses.append(round(limiter.delay(now), 6))
        now += 3.0
    assert pauses == [PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S, 8 * PAUSE_S]
    limiter.consume(now)
    limiter.record_answer(now)
    limiter.record_throttled(now, None)
    assert limiter.delay(now) == pytest.approx(max(PAUSE_S, 1 / limiter.rate), rel=0.5)


def test_retry_after_is_capped() -> None:
    """A Retry-After is capped at 600 s, so that one of a day does not end the run."""
    limiter = AdaptiveRateLimiter(4.0)
    limiter.record_throttled(0.0, 86_400.0)
    assert limiter.delay(0.0) == 600


@pytest.mark.parametrize("was_refused", [False, True])
@pytest.mark.parametrize(("rate", "burst"), [(20.0, 1), (100.0, 4), (500.0, 4), (5_000.0, 40)])
def test_late_timer_causes_small_burst(rate: float, burst: int, *, was_refused: bool) -> None:
    """Few requests make up for a late timer, since a token bucket would refuse more; a fast API allows more."""
    limiter = AdaptiveRateLimiter(None)
    limiter.consume(0.0)
    if was_refused:
        limiter.record_throttled(0.1, None)
    limiter.rate = rate
    sent = 0
    while not limiter.delay(5.0):
        limiter.consume(5.0)
        sent += 1
    assert burst <= sent <= burst + 1


def send_late(limiter: AdaptiveRateLimiter, *, waiting: bool) -> None:
    """Send with timers that fire 50 ms late, for requests that wait for their slots or come only then."""
    now = 0.0
    for _ in range(400):
        waiting_since = now
        now += (wait := limiter.delay(now)) and wait + 0.05
        limiter.consume(now, waiting_since if waiting else None)
        limiter.record_answer(now)


def test_rate_grows_on_busy_machine() -> None:
    """Where requests wait for slots, the rate grows, although the process runs too rarely to use each slot."""
    waiting, coming = AdaptiveRateLimiter(None), AdaptiveRateLimiter(None)
    send_late(waiting, waiting=True)
    send_late(coming, waiting=False)
    assert waiting.is_limiting
    assert not coming.is_limiting
    assert waiting.rate > 2 * coming.rate


def test_burst_of_429s_reduces_rate_once() -> None:
    """A burst of 429s cuts the rate once, because its requests were all in flight; the next burst cuts it again."""
    limiter = AdaptiveRateLimiter(40.0)
    for _ in range(20):
        limiter.consume(0.0)
    for number in range(20):
        limiter.record_throttled(number / 100, 0.5)
    once = 40 * RESTING_SHARE * (1 - FIRST_CUT)
    assert limiter.rate == pytest.approx(once)
    for _ in range(2):
        limiter.consume(60.0)
        limiter.record_answer(60.0)
    rate = limiter.rate
    limiter.consume(60.0)
    limiter.record_throttled(60.0, 0.5)
    assert limiter.rate == pytest.approx(rate * RESTING_SHARE * (1 - REPEATED_CUT), rel=0.1)


def test_lost_requests_are_forgotten() -> None:
    """Requests without an answer are forgotten after a while, and then a 429 cuts the rate again."""
    limiter = AdaptiveRateLimiter(40.0)
    for _ in range(20):
        limiter.consume(0.0)
    limiter.record_throttled(0.1, None)
    rate = limiter.rate
    limiter.consume(30.0)
    limiter.record_throttled(30.1, None)
    assert limiter.rate < rate


def test_cubic_recovery() -> None:
    """The rate recovers quickly, slowly near the old limit, then ever faster beyond it, up to the ceiling."""
    limiter = AdaptiveRateLimiter(200.0)
    now = send_at_limit(limiter, 0.0, 3.0)
    for cut in (FIRST_CUT, CUT):
        now = send_at_limit(limiter, now, 3 * RETURN_S)
        before = limiter.rate
        limiter.consume(now)
        limiter.record_throttled(now, None)
        assert limiter.rate == pytest.approx(before * RESTING_SHARE * (1 - cut))
    refused = before
    now = send_at_limit(limiter, now + PAUSE_S, RETURN_S / 2)
    assert limiter.rate > 0.95 * refused
    now = send_at_limit(limiter, now, RETURN_S / 2)
    assert limiter.rate == pytest.approx(RESTING_SHARE * refused, rel=0.01)
    send_at_limit(limiter, now, 5 * RETURN_S)
    assert limiter.rate == 200.0


def test_costly_429_slows_probing() -> None:
    """When each 429 costs seconds of pause, the rate waits longer before it probes for more."""
    refused = []
    for retry_after in (None, 4.0):
        limiter = AdaptiveRateLimiter(None)
        now = send_at_limit(limiter, 0.0, 1.0)
        limiter.consume(now)
        limit = limiter.rate
        limiter.record_throttled(now, retry_after)
        send_at_limit(limiter, now + 4.0, 3 * RETURN_S)
        refused.append(limiter.rate > limit)
    assert refused == [True, False]


def test_high_limit_is_approached_from_below() -> None:
    """A high ceiling is approached from below, because it may be far above the API's limit."""
    limiter = AdaptiveRateLimiter(400.0)
    assert limiter.rate == START_RATE_WITH_CEILING
    send_at_limit(limiter, 0.0, 5.0)
    assert limiter.rate == 400


def test_minimum_rate() -> None:
    """The rate has a minimum, but a lower ceiling holds."""
    slow, fast = AdaptiveRateLimiter(0.05), AdaptiveRateLimiter(None)
    for number in range(100):
        slow.record_throttled(number * 100.0, None)
        fast.record_throttled(number * 100.0, None)
    assert slow.rate == 0.05
    assert fast.rate == MIN_RATE


def test_next_slot_delay() -> None:
    """The next slot's delay is known, and a refunded slot is available at once."""
    limiter = AdaptiveRateLimiter(2.0)
    limiter.consume(5.0)
    assert limiter.delay(5.0) == pytest.approx(0.5 - MAX_BURST_S)
    limiter.refund(1)
    assert limiter.delay(5.0) == 0
    assert ceil(limiter.rate) == 2


# The circuit breaker


def test_breaker_opens_and_probes() -> None:
    """Three failures in a row open the breaker; its pauses double up to a minute, and a success closes it."""
    breaker = CircuitBreaker()
    for now in (1.0, 2.0):
        breaker.record_failure(now)
        assert breaker.is_healthy
        assert breaker.delay(now, posts_in_flight=5) == 0
    breaker.record_failure(3.0)
    assert not breaker.is_healthy
    assert breaker.failing_since == 1.0
    assert breaker.delay(3.0, posts_in_flight=1) is None
    pauses, now = [], 3.0
    for _ in range(8):
        pause = breaker.delay(now, posts_in_flight=0)
        assert pause is not None
        pauses.append(pause)
        now += pause
        breaker.record_failure(now)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    breaker.record_success()
    assert breaker.is_healthy
    assert breaker.failing_since is None
    assert breaker.delay(3.0, posts_in_flight=31) == 0


def test_simultaneous_failures_count_once() -> None:
    """Failures of requests sent before the pause do not count again: the pause is a second, not a minute."""
    breaker = CircuitBreaker()
    for _ in range(32):
        breaker.record_failure(5.0)
    assert breaker.delay(5.0, posts_in_flight=0) == 1


def test_success_resets_failure_count() -> None:
    """A success resets the count, so only failures in a row open the breaker."""
    breaker = CircuitBreaker()
    for now in range(30):
        breaker.record_failure(float(now))
        breaker.record_failure(float(now))
        breaker.record_success()
    assert breaker.is_healthy


# The limit of open tasks

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

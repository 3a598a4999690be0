"""An allowance that nobody told: most of it is used and hardly a request is refused, on servers of every kind.

All on a virtual clock: the numbers are the same on every machine.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.allowance import RATES, SERVERS, Scenario, changing_rate, scenarios, simulate, steady_rate
from tests.support.cases import first_quick, in_turn

LIMITER_KINDS = ("bucket of 10", "fixed window", "sliding window")
RATE_SCENARIOS = tuple(scenarios(1.0))
#: Somebody else takes 10 of 20 a second at the moments when a window that slides has just let one go.
SHARED_LIMIT = ("half taken from 60 to 120 of 180 s", 20.0, "sliding window")


@pytest.mark.parametrize("kind", first_quick(1, LIMITER_KINDS, single=True))
@pytest.mark.parametrize("rate", first_quick(1, RATES, single=True))
@pytest.mark.parametrize("story", first_quick(1, RATE_SCENARIOS, single=True))
def test_rate_limit_is_used_with_few_429s(story: str, rate: float, kind: str) -> None:
    """From the start, whether the allowance stays, changes or is shared; four fifths where a 429 costs a second."""
    seen = simulate(scenarios(rate)[story](SERVERS[kind]))
    least = 0.8 if "Retry-After" in story else 0.87 if (story, rate, kind) == SHARED_LIMIT else 0.9
    assert seen.used_share >= least
    assert seen.refused_share <= 0.02


@in_turn("latency", [0.005, 0.02])
@in_turn("rate", RATES)
def test_rate_growth_is_independent_of_latency(rate: float, latency: float) -> None:
    """The growth does not depend on how long an answer takes."""
    seen = simulate(replace(scenarios(rate)["steady, 60 s"](SERVERS["bucket of 10"]), latency_s=latency))
    assert seen.used_share >= 0.9
    assert seen.refused_share <= 0.02


def test_slow_responses_still_get_few_429s() -> None:
    """By the time a 429 is heard twenty more requests have left; still few are refused."""
    seen = simulate(replace(scenarios(20.0)["steady, 60 s"](SERVERS["bucket of 10"]), latency_s=1.0))
    assert seen.used_share >= 0.9
    assert seen.refused_share <= 0.03


@in_turn("rate", RATES)
def test_limit_without_burst_is_used(rate: float) -> None:
    """Requests leave evenly: a server that never lets two through at once takes most of them."""
    seen = simulate(Scenario(steady_rate(rate), SERVERS["bucket of 1"], max_timer_delay_s=0.0))
    assert seen.used_share >= 0.88
    assert seen.refused_share <= 0.02


@in_turn("kind", LIMITER_KINDS)
def test_retry_after_is_respected(kind: str) -> None:
    """Not one request leaves while the API wants silence."""
    assert simulate(Scenario(steady_rate(100.0), SERVERS[kind], retry_after=1.0)).sent_too_early == 0


def test_configured_limit_below_api_limit() -> None:
    """It is used whole, and nothing is ever refused."""
    seen = simulate(Scenario(steady_rate(100.0), SERVERS["bucket of 10"], ceiling=40.0))
    assert seen.refused == 0
    assert 0.97 * 40 * 60 <= seen.accepted <= 40 * 60 + 3


def test_rate_recovers_after_limit_drops() -> None:
    """A cut that was not enough is followed by another."""
    seen = simulate(Scenario(changing_rate(200.0, 20.0, 30.0), SERVERS["bucket of 10"], duration_s=90.0))
    assert seen.used_share >= 0.9
    assert seen.refused_share <= 0.02

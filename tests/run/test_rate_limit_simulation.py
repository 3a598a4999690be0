"""An undocumented limit of any kind is found: most of it is used, and hardly any request gets a 429.

All on a virtual clock, so the numbers are the same on every machine.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.allowance import RATES, SERVERS, Scenario, changing_rate, scenarios, simulate, steady_rate
from tests.support.cases import first_quick, in_turn

LIMITER_KINDS = ("bucket of 10", "fixed window", "sliding window")
RATE_SCENARIOS = tuple(scenarios(1.0))
#: Another client takes 10 of 20 a second just when a slot of the sliding window becomes free.
SHARED_LIMIT = ("half taken from 60 to 120 of 180 s", 20.0, "sliding window")


@pytest.mark.parametrize("kind", first_quick(1, LIMITER_KINDS, single=True))
@pytest.mark.parametrize("rate", first_quick(1, RATES, single=True))
@pytest.mark.parametrize("scenario", first_quick(1, RATE_SCENARIOS, single=True))
def test_rate_limit_is_used_with_few_429s(scenario: str, rate: float, kind: str) -> None:
    """From the start at least 90% is used, for constant, changing or shared limits; 80% where a 429 costs a second."""
    seen = simulate(scenarios(rate)[scenario](SERVERS[kind]))
    least = 0.8 if "Retry-After" in scenario else 0.87 if (scenario, rate, kind) == SHARED_LIMIT else 0.9
    assert seen.used_share >= least
    assert seen.refused_share <= 0.02


@pytest.mark.long
@in_turn("latency", [0.005, 0.02])
@in_turn("rate", RATES)
def test_rate_growth_is_independent_of_latency(rate: float, latency: float) -> None:
    """The growth of the rate does not depend on the latency."""
    seen = simulate(replace(scenarios(rate)["steady, 60 s"](SERVERS["bucket of 10"]), latency_s=latency))
    assert seen.used_share >= 0.9
    assert seen.refused_share <= 0.02


def test_slow_responses_still_get_few_429s() -> None:
    """With slow responses, twenty more requests are sent before a 429 arrives, and still few get one."""
    seen = simulate(replace(scenarios(20.0)["steady, 60 s"](SERVERS["bucket of 10"]), latency_s=1.0))
    assert seen.used_share >= 0.9
    assert seen.refused_share <= 0.03


@in_turn("rate", RATES)
def test_limit_without_burst_is_used(rate: float) -> None:
    """A server without any burst accepts most of its limit, because requests are sent evenly."""
    seen = simulate(Scenario(steady_rate(rate), SERVERS["bucket of 1"], max_timer_delay_s=0.0))
    assert seen.used_share >= 0.88
    assert seen.refused_share <= 0.02


@in_turn("kind", LIMITER_KINDS)
def test_retry_after_is_respected(kind: str) -> None:
    """No request is sent during a Retry-After."""
    assert simulate(Scenario(steady_rate(100.0), SERVERS[kind], retry_after=1.0)).sent_too_early == 0


def test_configured_limit_below_api_limit() -> None:
    """A configured limit below the API's is used in full without any 429."""
    seen = simulate(Scenario(steady_rate(100.0), SERVERS["bucket of 10"], ceiling=40.0))
    assert seen.refused == 0
    assert 0.97 * 40 * 60 <= seen.accepted <= 40 * 60 + 3


def test_rate_recovers_after_limit_drops() -> None:
    """After the limit drops, repeated cuts bring the rate down to the new one."""
    seen = simulate(Scenario(changing_rate(200.0, 20.0, 30.0), SERVERS["bucket of 10"], duration_s=90.0))
    assert seen.used_share >= 0.9
    assert seen.refused_share <= 0.02

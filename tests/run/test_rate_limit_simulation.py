"""An undocumented limit of any kind is found: most of it is used, and hardly any request gets a 429.

So is how many tasks are open at once: polls are few, and the run ends with its last task.

All on a virtual clock, so the numbers are the same on every machine.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import in_flight
from benchmarks.allowance import RATES, SERVERS, Scenario, changing_rate, scenarios, simulate, steady_rate
from benchmarks.polls import LATENCIES
from enrich.run.rate_limit import MAX_OPEN_TASKS, START_OPEN_TASKS
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


# Open tasks are found, too: dispatcher and poller run side by side


@pytest.mark.parametrize("rate", first_quick(1, [50.0, 500.0], single=True))
def test_allowance_is_used_where_answers_take_seconds(rate: float) -> None:
    """Nearly all of the allowance is used, with few polls and 429s, and the run ends soon after its last task."""
    seen = in_flight.simulate(rate, int(20 * rate), LATENCIES["lognormal(4 s, 0.6)"])
    assert seen.posting_ratio(rate) <= 1.0
    assert seen.used_share >= (0.95 if rate < 500 else 0.9)
    assert seen.polls_per_row <= 1.4
    assert seen.refused_share <= 0.01
    assert seen.tail_s <= 1.2


@pytest.mark.long
@pytest.mark.parametrize("rate", [50.0, 500.0])
def test_allowance_is_used_on_busy_machine(rate: float) -> None:
    """Where the process does not run for a while and commits are slow, bursts are small and the rate stays high."""
    seen = in_flight.simulate(rate, int(10 * rate), LATENCIES["lognormal(4 s, 0.6)"], stalls=True)
    assert seen.posting_ratio(rate) <= 1.3
    assert seen.used_share >= (0.92 if rate < 500 else 0.7)
    assert seen.refused_share <= 0.01
    assert seen.tail_s <= 2


@pytest.mark.long
def test_fixed_limit_of_200_would_be_the_bottleneck() -> None:
    """With the start limit for the whole run, most of a large allowance is unused."""
    latency = LATENCIES["lognormal(4 s, 0.6)"]
    fixed, found = (in_flight.simulate(500, 3_000, latency, in_flight=limit) for limit in (START_OPEN_TASKS, None))
    assert fixed.max_open <= START_OPEN_TASKS < found.max_open <= MAX_OPEN_TASKS
    assert found.posting_s < fixed.posting_s / 3


@pytest.mark.long
def test_workers_together_do_as_one() -> None:
    """Four workers that share an allowance use it as one does."""
    seen = in_flight.simulate(500, 5_000, LATENCIES["lognormal(4 s, 0.6)"], workers=4)
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
    seen = in_flight.simulate(100, 2_000, LATENCIES[name])
    assert seen.tail_s <= (4 if name == "Pareto(1.5) from 1.5 s" else 1.5)
    assert seen.polls_per_row <= (7 if name == "lognormal(60 s, 0.6)" else 1.9)


def test_fast_answers_are_noticed_early() -> None:
    """Where answers come at once, a run does not wait a second for its first poll."""
    seen = in_flight.simulate(500, 100, lambda _: 0.0)
    assert seen.polls_per_row == 1
    assert seen.tail_s + seen.posting_s < 3

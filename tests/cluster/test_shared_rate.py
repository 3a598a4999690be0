"""The rate that several machines share, on a virtual clock: delays never let them exceed it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.cluster.shared_rate import (
    SLOT_LIFETIME_S,
    SYNC_EVERY_S,
    RateEvent,
    SlotQueue,
    dump_limiter,
    load_limiter,
    take_slots,
)
from enrich.run.rate_limit import BURST_S, AdaptiveRateLimiter
from tests.support.cases import examples, in_turn

REQUESTED_SLOTS = 32


def shared_state(rate: float) -> str:
    """Return the stored state of a rate limiter that has found its rate."""
    limiter = AdaptiveRateLimiter(rate)
    limiter.rate = rate
    return dump_limiter(limiter, 0.0)


@dataclass
class SharedRow:
    """The database row with the shared state."""

    state: str


@dataclass
class SimulatedProcess:
    """One process: reads the row, then sends what it was given as soon as it gets processor time."""

    row: SharedRow
    rng: random.Random
    #: The longest delay in seconds until the row is read (`answer_s`) and until a timer fires (`late_s`).
    answer_s: float
    late_s: float
    slots: SlotQueue = field(default_factory=SlotQueue)
    sent: list[float] = field(default_factory=list)

    def step(self, now: float) -> float:
        """Read the row and send once; return the time of the next step."""
        if wanted := REQUESTED_SLOTS - len(self.slots):
            self.row.state, taken = take_slots(self.row.state, now, [], wanted)
            asked = now + self.rng.uniform(0, self.answer_s / 2)
            now = asked + self.rng.uniform(0, self.answer_s / 2)
            self.slots.add(asked, taken.slots)
        while self.slots.delay(now) == 0:
            self.slots.consume()
            self.sent.append(now)
        wait = self.slots.delay(now)
        return now + max(SYNC_EVERY_S / 2, wait or 0.0) + self.rng.uniform(0, self.late_s)


def simulate(rate: float, seed: int, delays: list[tuple[float, float]], seconds: float = 8.0) -> list[float]:
    """Let processes with these delays share a rate; return the times of their requests."""
    rng, row = random.Random(seed), SharedRow(shared_state(rate))
    pool = [SimulatedProcess(row, rng, answer_s, late_s) for answer_s, late_s in delays]
    turns = [(rng.random(), process) for process in pool]
    while (turn := min(turns, key=lambda turn: turn[0]))[0] < seconds:
        turns.remove(turn)
        turns.append((turn[1].step(turn[0]), turn[1]))
    return sorted(at for process in pool for at in process.sent)


def busiest_second(sent: list[float]) -> int:
    """Count the requests of the busiest second, wherever it begins."""
    begin, most = 0, 0
    for end in count(1):
        if end > len(sent):
            return most
        while sent[begin] <= sent[end - 1] - 1:
            begin += 1
        most = max(most, end - begin)
    raise AssertionError


DELAYS = st.floats(0, 1.5) | st.just(0.0)


@pytest.mark.long
@settings(max_examples=examples(25))
@given(
    rate=st.sampled_from([2.0, 20.0, 100.0, 400.0]),
    seed=st.integers(0, 1000),
    lags=st.lists(st.tuples(DELAYS, DELAYS), min_size=1, max_size=5),
)
def test_shared_rate_never_exceeded(rate: float, seed: int, lags: list[tuple[float, float]]) -> None:
    """The shared rate is never exceeded, even with late answers from the server and late processes."""
    assert busiest_second(simulate(rate, seed, lags)) <= rate * (1 + SLOT_LIFETIME_S + BURST_S) + 1


@pytest.mark.long
@in_turn("processes", [1, 2, 5])
@in_turn("rate", [20.0, 100.0, 400.0])
def test_shared_rate_is_used(rate: float, processes: int) -> None:
    """With usual delays, one process or several use at least 95% of the rate."""
    sent = simulate(rate, 1, [(0.01, 0.01)] * processes)
    assert len(sent) >= 0.95 * rate * (8 - 1)


def test_unused_slots_expire() -> None:
    """Unused slots expire after `SLOT_LIFETIME_S`; a refunded slot can be used at once."""
    slots = SlotQueue()
    slots.add(10.0, [0.0, 0.1, 0.2])
    assert slots.delay(9.9) == pytest.approx(0.1)
    assert slots.delay(10.15 + SLOT_LIFETIME_S) == 0
    assert len(slots) == 1
    slots.consume()
    assert slots.delay(10.2) is None
    slots.refund(10.2, 1)
    assert slots.delay(10.2) == 0


def test_retry_after_applies_to_all() -> None:
    """A 429 pauses every process for as long as the API asks, and lowers the rate afterwards."""
    state, first = take_slots(shared_state(50.0), 100.0, [], 8)
    state, result = take_slots(state, 100.1, [RateEvent("record_throttled", 3.0)], 8)
    state, other = take_slots(state, 101.0, [], 8)
    assert first.slots
    assert not result.slots
    assert not other.slots
    assert result.blocked_s == pytest.approx(3.0)
    assert other.blocked_s == pytest.approx(2.1)
    _, later = take_slots(state, 103.2, [], 8)
    assert later.slots
    assert not later.blocked_s
    assert later.rate < 50


def test_rate_state_is_clock_independent() -> None:
    """State that one machine wrote means the same on a machine whose clock differs."""
    limiter = AdaptiveRateLimiter(None)
    for at in (5.0, 5.1, 5.2):
        limiter.consume(at)
    limiter.record_throttled(5.3, 2.0)
    other = load_limiter(dump_limiter(limiter, 100.0), 40.0)
    assert other.blocked_for_s(65.3) == pytest.approx(2.0)
    assert other.rate == limiter.rate
    assert dump_limiter(other, 40.0) == dump_limiter(limiter, 100.0)

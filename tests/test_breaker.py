"""When an API that is ill is left alone."""

from __future__ import annotations

from enrich.breaker import Breaker


def test_breaker_opens_and_probes() -> None:
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


def test_simultaneous_failures_count_once() -> None:
    """What had left before the pause began says nothing new: the pause is a second and not a minute."""
    breaker = Breaker()
    for _ in range(32):
        breaker.bad(5.0)
    assert breaker.delay(5.0, on_the_wire=0) == 1


def test_success_resets_failure_count() -> None:
    """Only bad answers in a row are an illness."""
    breaker = Breaker()
    for now in range(30):
        breaker.bad(float(now))
        breaker.bad(float(now))
        breaker.good()
    assert breaker.healthy

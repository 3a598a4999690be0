"""When the circuit breaker pauses POSTs to a failing API."""

from __future__ import annotations

from enrich.run.rate_limit import CircuitBreaker


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

"""What will become of a request, and what a person can do about it; pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from enrich.job.spec import Policy
from enrich.ledger.history import AttemptRow
from enrich.model import State, iso_time


def describe_next_step(
    state: State, attempts: Sequence[AttemptRow], policy: Policy, now_ms: int, *, is_running: bool | None
) -> str:
    """Tell what comes next. `at_work`: an execution holds the ledger now; None: not known."""
    last = next((attempt for attempt in reversed(attempts) if attempt.state != "refused"), None)
    match state:
        case State.PENDING:
            again = "asked again" if attempts else "asked"
            return f"will be {again} by the next run that wants it"
        case State.SUBMITTING:
            if is_running:
                return "is being sent right now"
            was = "was being sent" if is_running is False else "is being sent, or was"
            return f"{was} when the program ended: then the next run puts it in doubt"
        case State.SUBMITTED:
            expires = (last.submitted_ms or 0) + _to_ms(policy.result_ttl) if last else 0
            may_be_gone = " (so it may be gone)" if expires < now_ms else ""
            return f"waits at the API, which keeps the result until about {iso_time(expires)}{may_be_gone}; the next run collects it"
        case State.FOUND | State.NOT_FOUND:
            age = policy.refresh.found if state is State.FOUND else policy.refresh.not_found
            if age is None or last is None:
                return f"stays as it is: the job has no policy.refresh for {state}"
            due = (last.settled_ms or 0) + _to_ms(age)
            when = f"on {iso_time(due)}" if due > now_ms else "by the next run"
            return f"would be asked again {when}, by policy.refresh ({state}: {_format_duration(age)})"
        case State.FAILED | State.EXPIRED:
            lost = "taken for lost by --accept in_doubt; " if last and last.state == State.IN_DOUBT else ""
            return f"{lost}asked again, at a price, only by --retry {state}"
        case State.IN_DOUBT:
            return "yours to decide: --retry in_doubt asks again (may pay twice), --accept in_doubt takes it for lost"


def _to_ms(age: timedelta) -> int:
    return int(age.total_seconds() * 1000)


def _format_duration(age: timedelta) -> str:
    """Write a duration as the job file does."""
    hours, rest = divmod(age.seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    parts = ((age.days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"

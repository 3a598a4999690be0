"""The canary: the first answers are judged before the rest is bought."""

from __future__ import annotations

from collections.abc import Mapping

from enrich.errors import CanaryStopped
from enrich.model import State
from enrich.spec import Canary

#: Outcomes that say something; who is in doubt or still at the API says nothing.
_JUDGED = (State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED)


def judge(canary: Canary, outcomes: Mapping[State, int]) -> CanaryStopped | None:
    """Tell why the rest must not be sent; None when the first answers look right."""
    judged = sum(outcomes.get(state, 0) for state in _JUDGED)
    found = outcomes.get(State.FOUND, 0)
    # Not `found >= rate * judged`: 0.55 * 100 is more than 55.
    if judged and found / judged >= canary.min_hit_rate:
        return None
    others = ", ".join(f"{count:,} {state.value}" for state, count in outcomes.items() if state is not State.FOUND)
    seen = f"{found:,} of {judged:,} answers found something ({found / judged:.0%})" if judged else "no answer came"
    return CanaryStopped(
        f"the canary stopped the run: {seen}, at least {canary.min_hit_rate:.0%} were wished for"
        + (f"; {others}" if others else ""),
        "look at `params` and at some answers (enrich explain); the rest is pending, the output was left as it was",
    )

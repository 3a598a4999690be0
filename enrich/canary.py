"""The canary: the first answers are judged before the rest is bought."""

from __future__ import annotations

from collections.abc import Mapping

from enrich.errors import CanaryStopped
from enrich.job.spec import Canary
from enrich.model import State

#: Outcomes that say something; who is in doubt or still at the API says nothing.
_CONCLUSIVE = (State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED)


def check_canary(canary: Canary, outcomes: Mapping[State, int]) -> CanaryStopped | None:
    """Tell why the rest must not be sent; None when the first answers look right."""
    conclusive = sum(outcomes.get(state, 0) for state in _CONCLUSIVE)
    found = outcomes.get(State.FOUND, 0)
    # Not `found >= rate * judged`: 0.55 * 100 is more than 55.
    if conclusive and found / conclusive >= canary.min_hit_rate:
        return None
    others = ", ".join(f"{count:,} {state.value}" for state, count in outcomes.items() if state is not State.FOUND)
    observed = (
        f"{found:,} of {conclusive:,} answers found something ({found / conclusive:.0%})"
        if conclusive
        else "no answer came"
    )
    return CanaryStopped(
        f"the canary stopped the run: {observed}, at least {canary.min_hit_rate:.0%} were wished for"
        + (f"; {others}" if others else ""),
        "look at `params` and at some answers (enrich explain); the rest is pending, the output was left as it was",
    )

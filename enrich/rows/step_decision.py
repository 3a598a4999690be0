"""Decides what a run does with a row in a step: send it, keep what it has, wait, or leave it out."""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from enrich.models import OPEN_STATES, RowStatus, State

#: States in which an earlier step still may bring another value. A step that depends on it sends nothing new.
NOT_FINAL = frozenset({State.PENDING, State.IN_DOUBT, *OPEN_STATES})


class StepDecision(Enum):
    """What a run does with a row in a step."""

    SEND = "send"  # the request is needed: sent, unless the ledger has its answer
    KEEP = "keep"  # the request was sent before: its answer stays, and nothing new is sent
    WAIT = "wait"  # nothing is sent until earlier steps are final
    FILTER = "filter"  # left out by a condition
    LACK = "lack"  # left out: an earlier step found nothing to send
    REJECT = "reject"  # a param of the input is missing or unusable


class RowFacts(NamedTuple):
    """What the decision about a row in a step depends on.

    `left_out` and `invalid` say why the row has no request, `blank_from_step` that it is invalid for want of what an
    earlier step did not find. `selected`: the step's own condition holds. `was_sent`: a request was sent for this row.
    `ready`: all steps that it depends on are final.
    """

    left_out: bool
    invalid: bool
    blank_from_step: bool
    selected: bool
    was_sent: bool
    ready: bool


def decide(facts: RowFacts) -> StepDecision:
    """Decide about a row. A request that was sent is kept while earlier steps are sent again or conditions change."""
    if facts.left_out:
        return StepDecision.FILTER
    if not facts.ready:
        return StepDecision.KEEP if facts.was_sent else StepDecision.WAIT
    if not facts.selected:
        return StepDecision.KEEP if facts.was_sent else StepDecision.FILTER
    if facts.invalid:
        return StepDecision.LACK if facts.blank_from_step else StepDecision.REJECT
    return StepDecision.SEND


@lru_cache(maxsize=4096)
def row_status(statuses: tuple[str, ...], *, is_complete: bool) -> RowStatus:
    """Return the status of a row by those of its steps. `is_complete`: each of the `complete` columns has a value."""
    present = set(map(RowStatus, statuses))
    for status in (RowStatus.IN_DOUBT, RowStatus.PENDING):
        if status in present:
            return status
    if is_complete:
        return RowStatus.FOUND
    for status in (RowStatus.FAILED, RowStatus.EXPIRED):
        if status in present:
            return status
    if present & {RowStatus.FOUND, RowStatus.NOT_FOUND}:
        return RowStatus.NOT_FOUND
    return RowStatus.INVALID if RowStatus.INVALID in present else RowStatus.FILTERED

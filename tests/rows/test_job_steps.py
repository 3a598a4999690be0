"""What a run does with a row in a step, and the status of the row: pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.models import RowStatus
from enrich.rows.job_steps import RowFacts, StepDecision, decide, row_status

#: A row that can be sent.
SENDABLE = RowFacts(left_out=False, invalid=False, blank_from_step=False, selected=True, was_sent=False, ready=True)
FACTS = st.builds(
    RowFacts,
    left_out=st.booleans(),
    invalid=st.booleans(),
    blank_from_step=st.booleans(),
    selected=st.booleans(),
    was_sent=st.booleans(),
    ready=st.booleans(),
)


@pytest.mark.parametrize(
    ("changes", "decision"),
    [
        ({}, StepDecision.SEND),
        ({"was_sent": True}, StepDecision.SEND),
        ({"left_out": True}, StepDecision.FILTER),
        ({"left_out": True, "was_sent": True}, StepDecision.FILTER),
        ({"ready": False}, StepDecision.WAIT),
        ({"ready": False, "selected": False}, StepDecision.WAIT),
        ({"ready": False, "invalid": True}, StepDecision.WAIT),
        ({"ready": False, "was_sent": True}, StepDecision.KEEP),
        ({"selected": False}, StepDecision.FILTER),
        ({"selected": False, "was_sent": True}, StepDecision.KEEP),
        ({"selected": False, "invalid": True}, StepDecision.FILTER),
        ({"invalid": True}, StepDecision.REJECT),
        ({"invalid": True, "blank_from_step": True}, StepDecision.LACK),
    ],
)
def test_decisions(changes: dict[str, bool], decision: StepDecision) -> None:
    """Each fact about a row has its effect."""
    assert decide(SENDABLE._replace(**changes)) is decision


@given(FACTS)
def test_nothing_is_sent_too_early(facts: RowFacts) -> None:
    """A row is sent only when all that it depends on is final, its condition holds, and it has its params."""
    if decide(facts) is StepDecision.SEND:
        assert facts.ready
        assert facts.selected
        assert not facts.invalid
        assert not facts.left_out


@given(FACTS)
def test_no_answer_is_lost(facts: RowFacts) -> None:
    """What was sent is kept, unless the job or the suppression list leaves the lead out."""
    kept = decide(facts) in (StepDecision.SEND, StepDecision.KEEP)
    if facts.was_sent and not facts.left_out and not facts.invalid:
        assert kept
    if decide(facts) is StepDecision.KEEP:
        assert facts.was_sent


@pytest.mark.parametrize(
    ("statuses", "is_complete", "expected"),
    [
        (("found", "in_doubt", "pending"), True, "in_doubt"),
        (("found", "pending", "failed"), True, "pending"),
        (("failed", "found"), True, "found"),
        (("filtered", "invalid"), True, "found"),
        (("found", "failed", "expired"), False, "failed"),
        (("found", "expired"), False, "expired"),
        (("found", "filtered"), False, "not_found"),
        (("not_found", "invalid"), False, "not_found"),
        (("filtered", "invalid"), False, "invalid"),
        (("filtered", "filtered"), False, "filtered"),
    ],
)
def test_row_status(statuses: tuple[str, ...], expected: str, *, is_complete: bool) -> None:
    """The status of a row is the first that holds."""
    assert row_status(statuses, is_complete=is_complete) == expected


@given(st.lists(st.sampled_from([status.value for status in RowStatus]), min_size=1).map(tuple), st.booleans())
def test_row_is_found_when_complete(statuses: tuple[str, ...], is_complete: bool) -> None:  # noqa: FBT001 - drawn
    """A row is found when it is complete and nothing of it is open, and never otherwise."""
    open_steps = {RowStatus.IN_DOUBT, RowStatus.PENDING} & set(statuses)
    found = row_status(statuses, is_complete=is_complete) is RowStatus.FOUND
    assert found == (is_complete and not open_steps)

"""What a step has cost is added up a few times in a run, not at every claim, and its cap holds."""

from __future__ import annotations

from typing import Any

import pytest

from enrich.ledger import queue, transitions
from enrich.ledger.queue import StepCapReached
from tests.support.ledger import COST, FOUND, MAX_PRICE, CommittingLedger
from tests.support.workspace import both_backends

backend = both_backends

CLAIMS = 400


@pytest.mark.long
def test_cost_is_added_up_a_few_times(ledger: CommittingLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a cap that holds twice what is claimed, each claim reads only what was claimed since the last one."""
    sums = list[int]()
    exact_cost = queue._exact_cost

    def count_sums(*given: Any) -> int:
        sums.append(cost := exact_cost(*given))
        return cost

    monkeypatch.setattr(queue, "_exact_cost", count_sums)
    ledger.start_and_enroll(*range(CLAIMS + 1))
    cap = COST * CLAIMS + MAX_PRICE - 1
    for number in range(CLAIMS):
        (claim,) = ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, step="email", step_cap=cap)
        ledger.commit(transitions.record_accepted, [(claim.attempt_id, f"task{number}", ledger.now)], {})
        ledger.settle(claim.attempt_id, FOUND)
    assert 0 < len(sums) < CLAIMS / 10
    with pytest.raises(StepCapReached):
        ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, step="email", step_cap=cap)

"""The budget is a budget: whatever is in flight and whatever goes wrong, the sandbox's audit never exceeds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from enrich.errors import Exit
from enrich.sandbox import Fault
from tests.harness import HASTY, Office, people, serving

FAULTS = (
    "error-after=0.05,status=502",
    "reset-after=0.05",
    "no-task-id=0.03",
    "error-before=0.05",
    "rate-limit-bare=0.05",
)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_cap_holds_with_hundreds_in_flight_and_doubts(tmp_path: Path, office: Office, seed: int) -> None:
    """All providers and their verifications charged, misses too, a tenth of the POSTs ambiguous."""
    cap = 60
    office.write_job(email_verifier="10", limits=f"{{requests_per_second: 1000, in_flight: 400, max_credits: {cap}}}")
    office.write_leads(people(400))
    faults = tuple(Fault.parse(text) for text in FAULTS)
    with serving(
        tmp_path / "api.db", seed=seed, fault_seed=seed, charge_misses=True, latency="uniform(0,0.5)", faults=faults
    ) as api:
        receipt = office.run(api, timing=replace(HASTY, outage_s=60))
        audit = api.audit()

    assert receipt.exit_code == Exit.CREDITS
    assert audit["credits_charged"] + audit["credits_reserved"] <= cap
    assert receipt.credits_spent <= audit["credits_charged"]
    # Doubts keep their worst price reserved; the rest of the cap is used.
    assert audit["credits_charged"] > cap / 4


def test_what_a_night_left_in_flight_counts_against_the_next_cap(tmp_path: Path, office: Office) -> None:
    """What settles in an execution is paid by it: its cap has room for the rest only."""
    office.write_job(limits="{requests_per_second: 1000, max_credits: 1000}")
    office.write_leads(people(8))
    state = tmp_path / "api.db"
    with serving(state, latency="fixed(60)", hit_rate=1.0) as slow:
        office.leave_at_the_api(slow)
        slow.advance(100)
    office.write_job(limits="{requests_per_second: 1000, max_credits: 12}")
    office.write_leads(people(40))
    with serving(state, hit_rate=1.0) as api:
        receipt = office.run(api)

    assert receipt.exit_code == Exit.CREDITS
    assert receipt.credits_spent <= 12 or receipt.submitted == 0

"""The cap: whatever is in flight and whatever goes wrong, the sandbox's audit never exceeds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from enrich.exit_codes import ExitCode
from enrich.sandbox import Fault
from tests.support.workspace import SHORT_TIMEOUTS, Workspace, make_leads, serve_api

FAULTS = (
    "error-after=0.05,status=502",
    "reset-after=0.05",
    "no-task-id=0.03",
    "error-before=0.05",
    "rate-limit-bare=0.05",
)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cap_holds_with_unconfirmed_requests(tmp_path: Path, workspace: Workspace, seed: int) -> None:
    """The cap holds with all providers, verifications and misses charged, and a tenth of the POSTs unconfirmed."""
    cap = 60
    workspace.write_job(
        email_verifier="10", limits=f"{{requests_per_second: 1000, in_flight: 400, max_credits: {cap}}}"
    )
    workspace.write_leads(make_leads(400))
    faults = tuple(Fault.parse(text) for text in FAULTS)
    with serve_api(
        tmp_path / "api.db", seed=seed, fault_seed=seed, charge_misses=True, latency="uniform(0,0.5)", faults=faults
    ) as api:
        summary = workspace.run_job(api, timing=replace(SHORT_TIMEOUTS, outage_s=60))
        audit = api.audit()

    assert summary.exit_code == ExitCode.CREDITS
    assert audit["credits_charged"] + audit["credits_reserved"] <= cap
    assert summary.credits_spent <= audit["credits_charged"]
    # Unconfirmed requests keep their maximum price reserved; the rest of the cap is used.
    assert audit["credits_charged"] > cap / 4


@pytest.mark.long
def test_open_tasks_count_against_next_cap(tmp_path: Path, workspace: Workspace) -> None:
    """Open tasks of an earlier run settle in the next one and count against its cap."""
    workspace.write_job(limits="{requests_per_second: 1000, max_credits: 1000}")
    workspace.write_leads(make_leads(8))
    state = tmp_path / "api.db"
    with serve_api(state, latency="fixed(60)", hit_rate=1.0) as slow:
        workspace.submit_without_collecting(slow)
        slow.advance(100)
    workspace.write_job(limits="{requests_per_second: 1000, max_credits: 12}")
    workspace.write_leads(make_leads(40))
    with serve_api(state, hit_rate=1.0) as api:
        summary = workspace.run_job(api)

    assert summary.exit_code == ExitCode.CREDITS
    assert summary.credits_spent <= 12 or summary.submitted == 0

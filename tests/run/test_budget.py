"""The cap holds, by the audit of the sandbox. The canary: the first answers are checked before the rest is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from enrich.errors import CommandRefused
from enrich.exit_codes import ExitCode
from enrich.job.job import Job, load_job
from enrich.job.spec import Canary
from enrich.models import State
from enrich.rows.template import RequestTemplate
from enrich.run.budget import check_balance, check_canary, make_budget
from enrich.run.context import RunOptions
from enrich.sandbox import Fault
from enrich.sandbox.databar import Databar
from enrich.sandbox.lookups import Refused
from tests.support.cases import first_quick, in_turn
from tests.support.ledger import CALL
from tests.support.workspace import (
    BOTH_BACKENDS,
    SHORT_TIMEOUTS,
    Workspace,
    kill_process,
    make_leads,
    serve_api,
    wait_until,
)

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


# The canary

LEADS = 30
CANARY_YAML = "{rows: 6, min_hit_rate: 0.5}"


@pytest.fixture
def canary_workspace(workspace: Workspace) -> Workspace:
    """Return a workspace whose job has a canary of six rows."""
    workspace.write_job(canary=CANARY_YAML)
    workspace.write_leads(make_leads(LEADS))
    return workspace


def test_good_canary_continues(tmp_path: Path, canary_workspace: Workspace) -> None:
    """After a good canary the run continues with all leads."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        summary = canary_workspace.run_job(api)
    assert (summary.exit_code, summary.submitted, summary.found) == (0, LEADS, LEADS)


def test_bad_canary_stops_run(tmp_path: Path, canary_workspace: Workspace) -> None:
    """A bad canary is exit 15 with its counts; only its rows are paid, the rest is pending, the old output stays."""
    (canary_workspace.folder / "out.csv").write_text("of yesterday\n")
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        result = canary_workspace.run_in_process("run", "job.yaml", "--json", api=api)
        assert api.audit()["accepted"] == 6

    assert (result.exit_code, result.json_output["submitted"], result.json_output["pending"]) == (15, 6, LEADS - 6)
    assert "0 of 6 results matched (0%), at least 50% are required; 6 not_found" in result.stderr
    assert (canary_workspace.folder / "out.csv").read_text() == "of yesterday\n"


@pytest.mark.long
def test_restart_checks_next_rows(tmp_path: Path, canary_workspace: Workspace) -> None:
    """Each start buys only as many new rows as the canary has; earlier answers are reused."""
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        runs = [canary_workspace.run_job(api) for _ in range(3)]
        assert (api.audit()["accepted"], api.audit()["paid_twice"]) == (18, 0)
    assert [(run.exit_code, run.submitted, run.reused) for run in runs] == [
        (15, 6, 0),
        (15, 6, 6),
        (15, 6, 12),
    ]


@pytest.mark.parametrize(("leads", "limit"), first_quick(1, [(5, None), (6, None), (LEADS, 4), (LEADS, 6)]))
def test_canary_skipped_for_small_runs(
    tmp_path: Path, canary_workspace: Workspace, leads: int, limit: int | None
) -> None:
    """The canary is skipped when the run's new requests fit inside it."""
    canary_workspace.write_leads(make_leads(leads))
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        summary = canary_workspace.run_job(api, RunOptions(limit=limit))
    assert (summary.exit_code, summary.submitted) == (0, limit or leads)


@pytest.mark.long
def test_limit_includes_canary_rows(tmp_path: Path, canary_workspace: Workspace) -> None:
    """The canary's rows are among those that `--limit` allows."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        summary = canary_workspace.run_job(api, RunOptions(limit=10))
        assert api.audit()["accepted"] == 10
    assert (summary.exit_code, summary.submitted, summary.pending) == (0, 10, LEADS - 10)


@pytest.mark.long
def test_canary_counts_free_failures(tmp_path: Path, canary_workspace: Workspace) -> None:
    """Requests that fail at no charge count as results without a match once they are not sent again."""
    canary_workspace.write_job(canary=CANARY_YAML, policy="{max_attempts: 1}")
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0) as api:
        summary = canary_workspace.run_job(api)
        assert api.audit()["accepted"] == 6
    assert (summary.exit_code, summary.failed, summary.pending) == (15, 6, LEADS - 6)


@pytest.mark.parametrize(("hit_rate", "code", "finished"), first_quick(1, [(1.0, 0, LEADS), (0.0, 15, 6)]))
def test_canary_counts_requests_not_attempts(
    tmp_path: Path, canary_workspace: Workspace, hit_rate: float, code: int, finished: int
) -> None:
    """Six requests are sent and judged by their last attempt, although each fails at no charge first."""
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0, hit_rate=hit_rate) as api:
        summary = canary_workspace.run_job(api)
    assert (summary.exit_code, summary.pending) == (code, LEADS - finished)
    assert summary.submitted >= 2 * finished
    assert code == 0 or "0 of 6 results matched" in (summary.error or "")


@pytest.mark.long
def test_canary_stops_on_unconfirmed(tmp_path: Path, canary_workspace: Workspace) -> None:
    """Without any answer from the canary's requests, the run stops."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        api.inject_fault("error-after", 100)
        summary = canary_workspace.run_job(api)
        assert api.audit()["accepted"] == 6
    assert (summary.exit_code, summary.in_doubt) == (15, 6)
    assert "no result arrived" in str(summary.error)


@pytest.mark.long
def test_canary_counts_rejected_rows(
    tmp_path: Path, canary_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected rows count: a mapping that the API rejects for every row is noticed after six of them."""

    def refuse(*_: object, **__: object) -> str:
        raise Refused({"error": "INVALID_PARAMS", "rows": [{"position": 1, "fields": {"company": ["Bad."]}}]})

    monkeypatch.setattr(Databar, "submit", refuse)
    with serve_api(tmp_path / "api.db") as api:
        summary = canary_workspace.run_job(api)
        assert api.audit()["requests"]["run"] == 6
    assert (summary.exit_code, summary.failed, summary.pending) == (15, 6, LEADS - 6)


@pytest.mark.long
def test_canary_stops_on_timeout(tmp_path: Path, canary_workspace: Workspace) -> None:
    """When the canary's tasks time out, the run is exit 15, and the next run collects them."""
    canary_workspace.write_job(canary=CANARY_YAML, policy="{patience: 1s}")
    with serve_api(tmp_path / "api.db", latency="fixed(60)", hit_rate=1.0) as api:
        summary = canary_workspace.run_job(api)
        assert (summary.exit_code, summary.submitted) == (15, 6)
        api.advance(120)
        canary_workspace.write_leads(make_leads(6))
        assert canary_workspace.run_job(api).found == 6
        assert api.audit()["accepted"] == 6


@pytest.mark.long
def test_canary_ignores_rate_limits(tmp_path: Path, canary_workspace: Workspace) -> None:
    """A 429 is no answer about a lead and does not count."""
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        api.inject_fault("rate-limit", 5, "post", retry_after=0)
        summary = canary_workspace.run_job(api)
        assert api.audit()["accepted"] == 6
    assert (summary.exit_code, summary.submitted) == (15, 6)


@BOTH_BACKENDS
@pytest.mark.long
def test_cap_takes_precedence_over_canary(tmp_path: Path, canary_workspace: Workspace) -> None:
    """When the cap is reached among the canary's rows, the exit code is the cap's."""
    canary_workspace.write_job(canary=CANARY_YAML, limits="{requests_per_second: 1000, max_credits: 4, in_flight: 1}")
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        summary = canary_workspace.run_job(api)
        assert api.audit()["credits_charged"] <= 4
    assert summary.exit_code == ExitCode.CREDITS
    assert summary.submitted < 6


@BOTH_BACKENDS
@pytest.mark.long
def test_kill_during_canary(tmp_path: Path, canary_workspace: Workspace) -> None:
    """After a kill -9 during the canary, the next start collects its answers and checks six rows of its own."""
    with serve_api(tmp_path / "api.db", hit_rate=0.0, latency="fixed(60)") as api:
        process = canary_workspace.start_subprocess("run", "job.yaml", api=api)
        try:
            wait_until(lambda: api.audit()["accepted"] == 6)
        finally:
            kill_process(process)
        api.advance(120)
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        summary = canary_workspace.run_job(api)
        assert (summary.exit_code, summary.submitted) == (15, 6)
        assert (api.audit()["accepted"], api.audit()["paid_twice"]) == (12, 0)


def test_limits_allow_a_request_that_costs_all_that_is_left(workspace: Workspace) -> None:
    """The highest price may use up the cap, or the balance down to `min_balance`, but no millionth of a credit more."""
    template = RequestTemplate(CALL, (), (), {}, 3_510_000)

    def job(limits: str) -> Job:
        workspace.write_job(limits=limits)
        return load_job(workspace.folder / "job.yaml")

    check_balance(job("{}"), template, 3_510_000)
    check_balance(job("{min_balance: 60}"), template, 63_510_000)
    for limits, balance, message in (("{}", 3_509_999, "may cost 3.51"), ("{min_balance: 60}", 63_509_999, "is 60")):
        with pytest.raises(CommandRefused, match=message):
            check_balance(job(limits), template, balance)
    assert make_budget(job("{min_balance: 60}"), template, 63_000_000).cap == 3_000_000
    assert make_budget(job("{min_balance: 60}"), template, 50_000_000).cap == 0
    assert make_budget(job("{max_credits: 3.51}"), template, None).stop_reason == "the credits cap is reached"
    assert make_budget(job("{max_credits: 3.5}"), template, None).stop_reason.startswith("`max_credits` is 3.5")


@in_turn("of", [7, 20, 100])
def test_hit_rate_threshold_is_inclusive(of: int) -> None:
    """A hit rate equal to the minimum passes, whatever the rounding of floats: 11 of 20 are 55%."""
    for found in range(1, of + 1):
        canary = Canary(rows=of, min_hit_rate=found / of)
        assert check_canary(canary, {State.FOUND: found, State.NOT_FOUND: of - found}) is None
        assert check_canary(canary, {State.FOUND: found - 1, State.NOT_FOUND: of - found + 1}) is not None


@pytest.mark.long
def test_canary_excludes_refreshes(tmp_path: Path, canary_workspace: Workspace) -> None:
    """Refreshed misses would be misses again, so only leads that were never answered count for the canary."""
    with serve_api(tmp_path / "api.db", hit_rate=0.5) as api:
        canary_workspace.write_job(ledger="scout.db", output="scout.csv")
        canary_workspace.run_job(api)
        found = {
            row["Last Name"] for row in canary_workspace.read_output("scout.csv") if row["enrich_status"] == "found"
        }
        misses = [row for row in make_leads(LEADS) if row[1] not in found]
        hits = [row for row in make_leads(LEADS) if row[1] in found]
        assert min(len(misses), len(hits)) > 6
        canary_workspace.write_leads(misses)
        canary_workspace.write_job()
        assert canary_workspace.run_job(api).not_found == len(misses)

        canary_workspace.write_leads([*misses, *hits])
        canary_workspace.write_job(canary=CANARY_YAML, policy="{refresh: {not_found: 0s}}")
        summary = canary_workspace.run_job(api)

    assert (summary.exit_code, summary.submitted, summary.found) == (0, LEADS, len(hits))


@pytest.mark.long
def test_canary_uses_new_leads_only(tmp_path: Path, canary_workspace: Workspace) -> None:
    """Refreshed answers that are found again do not hide that the new leads find nothing."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        canary_workspace.write_job()
        canary_workspace.run_job(api)
    canary_workspace.write_leads([*make_leads(LEADS), *make_leads(10, start=LEADS)])
    canary_workspace.write_job(canary=CANARY_YAML, policy="{refresh: {found: 0s}}")

    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        stopped = canary_workspace.run_job(api)

    assert (stopped.exit_code, stopped.submitted) == (15, 6)
    assert "0 of 6 results matched" in (stopped.error or "")

"""`dispatch: bulk`: many requests as one task, with the guarantees of single runs, checked against the API's audit."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.databar.client import MAX_BULK_POSTS_IN_FLIGHT
from enrich.errors import EnrichError
from enrich.exit_codes import ExitCode
from enrich.ledger import queries
from enrich.ledger.verify import check_ledger
from enrich.models import State
from enrich.run.context import RunOptions
from enrich.run.dispatcher import Dispatcher
from enrich.run.progress import Progress
from enrich.run.run_state import Timeouts
from enrich.run.summary import RunSummary
from enrich.sandbox import Fault, lookups
from tests.commands.test_forget_and_purge import forget_matching, ledger_bytes
from tests.support.cases import examples, first_quick
from tests.support.raw_server import Reply, serve_replies
from tests.support.run_loops import open_loops
from tests.support.scripted_api import ScriptedApi, completed_reply, run_once
from tests.support.workspace import (
    BOTH_BACKENDS,
    SHORT_POST_TIMEOUT,
    SHORT_TIMEOUTS,
    SandboxApi,
    Workspace,
    clock_ahead,
    kill_process,
    make_leads,
    serve_api,
    wait_until,
)

LEADS, BULK_SIZE = 25, 10
#: This many single runs are submitted within a second on any machine.
FEW_LEADS = 6
#: The maximum price of one request of the standard job, in credits.
MAX_PRICE = 3.51


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """Make a job that sends ten requests as one task, with 25 leads."""
    workspace.write_job(dispatch=f"{{bulk: {BULK_SIZE}}}")
    workspace.write_leads(make_leads(LEADS))
    return workspace


def status_counts(workspace: Workspace) -> Counter[str]:
    """Count the rows by status."""
    return Counter(row["enrich_status"] for row in workspace.read_output())


def request_count(api: SandboxApi, name: str) -> int:
    """Count the requests of a kind that the API received."""
    return int(api.audit()["requests"].get(name, 0))


def accepted_counts(api: SandboxApi) -> dict[str, int]:
    """Return the number of accepted runs of each lead."""
    return {run["params"]["first_name"]: run["accepted"] for run in api.audit()["runs"]}


def bulk_tasks(workspace: Workspace) -> list[tuple[Any, ...]]:
    """Return size, credits and states of each bulk task with plain SQL."""
    return workspace.sql("SELECT size, credits, states FROM readable_bulk_tasks ORDER BY id")


def assert_consistent_with_audit(api: SandboxApi, workspace: Workspace, summary: RunSummary) -> None:
    """Assert that nothing is paid twice or lost, the summary equals the API's bill, and the ledger is sound."""
    audit = api.audit()
    assert audit["paid_twice"] == 0
    assert summary.credits_spent == pytest.approx(audit["credits_charged"])
    assert check_ledger(workspace.ledger_location).problems == []


# One task for many requests


@BOTH_BACKENDS
def test_bulk_sends_many_requests_per_task(api: SandboxApi, workspace: Workspace) -> None:
    """Three POSTs for 25 leads; each row has its answer and its task id, but no price of its own."""
    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.submitted, summary.credits_unknown) == (0, LEADS, 0)
    assert (request_count(api, "bulk_run"), request_count(api, "run"), request_count(api, "task")) == (
        3,
        0,
        summary.polls,
    )
    output = workspace.read_output()
    assert len({row["enrich_task_id"] for row in output}) == 3
    assert {row["enrich_credits"] for row in output} == {""}
    assert {row["enrich_status"] for row in output} == {"found", "not_found"}
    assert_consistent_with_audit(api, workspace, summary)


def test_task_price_is_stored_once(api: SandboxApi, workspace: Workspace) -> None:
    """Stores a task's price once; status, runs, plan and plain SQL show the same sum."""
    summary = workspace.run_job(api)

    sizes = [size for size, _, _ in bulk_tasks(workspace)]
    assert sizes == [10, 10, 5]
    assert sum(float(credits_) for _, credits_, _ in bulk_tasks(workspace)) == pytest.approx(summary.credits_spent)
    status = workspace.run_in_process("status", "job.yaml", "--json").json_output
    assert (status["credits_spent"], status["credits_unknown"]) == (summary.credits_spent, 0)
    runs = workspace.run_in_process("runs", "job.yaml", "--json").json_output
    assert runs["totals"]["credits_spent"] == summary.credits_spent
    workspace.write_leads(make_leads(2 * LEADS))
    plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    assert plan["cost"]["likely"] == pytest.approx(summary.credits_spent, abs=1e-4)


def test_plan_duration_counts_tasks(api: SandboxApi, workspace: Workspace) -> None:
    """Plans a tenth of the time for ten requests in a POST."""
    workspace.write_job(limits="{requests_per_second: 1}", dispatch="{bulk: 25}")
    assert workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output["seconds"] == 2.5
    assert "polls per task of 25" in workspace.run_in_process("plan", "job.yaml", "-v", api=api).stdout


def test_second_run_sends_nothing(api: SandboxApi, workspace: Workspace) -> None:
    """Reuses answers; more leads are a new task."""
    workspace.run_job(api)
    workspace.write_leads(make_leads(LEADS + 3))

    summary = workspace.run_job(api)

    assert (summary.submitted, summary.reused, request_count(api, "bulk_run")) == (3, LEADS, 4)
    assert set(accepted_counts(api).values()) == {1}


@pytest.mark.long
@settings(max_examples=examples(4), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(1, 1000),
    size=st.integers(2, 20),
    shape=st.sampled_from(["wrapped", "wrapper_object", "flat", "flat_list"]),
    hit_rate=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_output_equals_single_mode(seed: int, size: int, shape: Any, hit_rate: float) -> None:
    """The output equals single mode's except for credits, task ids and times."""
    outputs = []
    for bulk in (None, size):
        with tempfile.TemporaryDirectory() as folder:
            workspace = Workspace(Path(folder))
            workspace.write_job(**({"dispatch": f"{{bulk: {bulk}}}"} if bulk else {}))
            workspace.write_leads(make_leads(12))
            with serve_api(workspace.folder / "api.db", seed=seed, shape=shape, hit_rate=hit_rate) as api:
                assert workspace.run_job(api).exit_code == ExitCode.OK
            differ = {"enrich_credits", "enrich_task_id", "enrich_at"}
            outputs.append([{k: v for k, v in row.items() if k not in differ} for row in workspace.read_output()])
    assert outputs[0] == outputs[1]


# Failed POSTs


@pytest.mark.parametrize(
    "fault",
    first_quick(
        1, ["reset-after", "reset-before", "silence-after", "error-after", "error-before", "no-task-id", "html-200"]
    ),
)
def test_lost_post_leaves_rows_unconfirmed(api: SandboxApi, workspace: Workspace, fault: str) -> None:
    """The rows are never resent automatically; `--retry` sends them as a task again."""
    api.inject_fault(fault, 1, "post")
    summary = workspace.run_job(api, timing=SHORT_POST_TIMEOUT if fault == "silence-after" else SHORT_TIMEOUTS)
    assert (summary.exit_code, summary.in_doubt, summary.submitted) == (ExitCode.IN_DOUBT, BULK_SIZE, LEADS - BULK_SIZE)
    assert summary.unconfirmed == BULK_SIZE
    before = accepted_counts(api)

    second = workspace.run_job(api, timing=SHORT_TIMEOUTS)
    assert second.unconfirmed == 0
    assert (second.exit_code, second.submitted, accepted_counts(api)) == (ExitCode.IN_DOUBT, 0, before)
    assert check_ledger(workspace.ledger_location).problems == []

    retried = workspace.run_in_process("run", "job.yaml", "--json", "--retry", "in_doubt", api=api)
    assert (retried.exit_code, retried.json_output["submitted"]) == (0, BULK_SIZE)


@pytest.mark.parametrize("fault", first_quick(1, ["rate-limit-bare", "redirect"]))
def test_rejected_task_is_resent(api: SandboxApi, workspace: Workspace, fault: str) -> None:
    """Resends all rows of the task, once."""
    api.inject_fault(fault, 2, "post")
    summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)
    assert (summary.exit_code, summary.submitted, api.audit()["accepted"]) == (0, LEADS, LEADS)
    assert_consistent_with_audit(api, workspace, summary)


@pytest.mark.parametrize(
    ("fault", "code"), first_quick(1, [("unauthorized", ExitCode.KEY), ("no-credits", ExitCode.CREDITS)])
)
def test_fatal_status_leaves_rest_pending(api: SandboxApi, workspace: Workspace, fault: str, code: ExitCode) -> None:
    """401 and 406 have the same effect as for single runs."""
    api.inject_fault(fault, 99, "post")
    summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)
    assert (summary.exit_code, summary.pending, summary.in_doubt) == (code, LEADS, 0)
    api.clear_faults()
    assert workspace.run_job(api).exit_code == ExitCode.OK
    assert api.audit()["accepted"] == LEADS


def test_task_shrinks_when_balance_is_low(tmp_path: Path, workspace: Workspace) -> None:
    """Sends smaller tasks when a whole one exceeds the balance (406); no run sends nothing or pays twice."""
    with serve_api(tmp_path / "api.db", balance=8 * MAX_PRICE, hit_rate=1.0) as api:
        runs = [workspace.run_job(api)]
        while runs[-1].exit_code == ExitCode.CREDITS:
            assert runs[-1].submitted > 0
            runs.append(workspace.run_job(api))
        assert request_count(api, "406") > 0
        assert accepted_counts(api) == dict.fromkeys(lead_names(range(LEADS)), 1)
    assert runs[-1].exit_code == ExitCode.OK


@pytest.mark.long
def test_smaller_tasks_after_406(tmp_path: Path, workspace: Workspace) -> None:
    """Keeps the smaller task size for the whole run: rejected POSTs use the rate limit, too."""
    workspace.write_job(dispatch="{bulk: 64}")
    workspace.write_leads(make_leads(400))
    with serve_api(tmp_path / "api.db", balance=30 * MAX_PRICE, hit_rate=1.0) as api:
        summary = workspace.run_job(api)
        assert summary.exit_code == ExitCode.CREDITS
        # Halved six times, with some in flight each time; without remembering the size it would be hundreds.
        assert request_count(api, "406") <= 6 * 8


@pytest.mark.long
def test_bulk_size_limit_error(tmp_path: Path, workspace: Workspace) -> None:
    """A task size above the API's limit is an error of the job file: nothing is sent, the API's message is shown."""
    workspace.write_leads(make_leads(2 * BULK_SIZE))
    with serve_api(tmp_path / "api.db", bulk_limit=5) as api:
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
        assert (result.exit_code, result.json_output["submitted"], api.audit()["accepted"]) == (ExitCode.USAGE, 0, 0)
        assert "At most 5 rows" in result.stderr
        workspace.write_job(dispatch="{bulk: 5}")
        assert workspace.run_job(api).exit_code == ExitCode.OK


@pytest.fixture
def rejected_leads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Let the API reject the leads of this set, which the program's own check accepts."""
    refused: set[str] = set()
    original = lookups._mistakes

    def mistakes(waterfall: Any, params: Mapping[str, Any]) -> dict[str, list[str]]:
        return {"company": ["Bad."]} if params["first_name"] in refused else original(waterfall, params)

    monkeypatch.setattr(lookups, "_mistakes", mistakes)
    return refused


def lead_names(numbers: Iterable[int]) -> set[str]:
    """Return the names of leads."""
    return {f"First{number}" for number in numbers}


@pytest.mark.parametrize("shape", first_quick(1, ["new", "fields", "old", "old_short"]))
@pytest.mark.parametrize("numbers", first_quick(1, [(0, 9, 10, 24), (3,), tuple(range(8, 15))], single=True))
def test_invalid_rows_fail_and_rest_is_resent(
    tmp_path: Path, workspace: Workspace, rejected_leads: set[str], shape: Any, numbers: tuple[int, ...]
) -> None:
    """Fails the invalid rows and resends the rest, in each format of the API's error, also when it names no rows."""
    rejected_leads |= lead_names(numbers)
    with serve_api(tmp_path / "api.db", error_shape=shape) as api:
        summary = workspace.run_job(api)
        assert_consistent_with_audit(api, workspace, summary)
        assert accepted_counts(api) == dict.fromkeys(lead_names(range(LEADS)) - rejected_leads, 1)

    assert (summary.exit_code, summary.failed) == (ExitCode.SOME_FAILED, len(rejected_leads))
    failed = {
        row["First Name"]: row["enrich_error"] for row in workspace.read_output() if row["enrich_status"] == "failed"
    }
    assert failed == dict.fromkeys(rejected_leads, "company: Bad.")


@pytest.mark.long
@pytest.mark.parametrize("shape", ["new", "old_short"])
def test_all_rows_invalid(tmp_path: Path, workspace: Workspace, rejected_leads: set[str], shape: Any) -> None:
    """Fails every row; nothing is charged."""
    rejected_leads |= lead_names(range(LEADS))
    with serve_api(tmp_path / "api.db", error_shape=shape) as api:
        summary = workspace.run_job(api)
        assert (summary.exit_code, summary.failed, api.audit()["accepted"]) == (ExitCode.SOME_FAILED, LEADS, 0)
    assert check_ledger(workspace.ledger_location).problems == []


# Answers


@pytest.mark.long
def test_unaligned_result_fails_rows(tmp_path: Path, workspace: Workspace) -> None:
    """Fails the rows when the result has matches only: none gets another's address, and the price is recorded."""
    with serve_api(tmp_path / "api.db", bulk_data="hits", hit_rate=0.5) as api:
        summary = workspace.run_job(api)
        assert_consistent_with_audit(api, workspace, summary)

    assert (summary.exit_code, summary.failed, summary.credits_unknown) == (ExitCode.SOME_FAILED, LEADS, 0)
    assert summary.credits_spent > 0
    assert all("the rows cannot be matched" in row["enrich_error"] for row in workspace.read_output())
    assert not any(row["work_email"] for row in workspace.read_output())


def test_lists_of_matches_are_known_to_the_whole_run(workspace: Workspace) -> None:
    """After a list of matches only among the canary, no full list of the run is read by position."""
    workspace.write_job(dispatch="{bulk: 2}", canary="{rows: 3, min_hit_rate: 0.1}")
    workspace.write_leads(make_leads(7))

    def task(name: str) -> Reply:
        first = int(name.removeprefix("First"))
        matches = [{"email": f"first{number}@found.example"} for number in (first, first + 1)]
        return completed_reply(name, data=matches[:1] if first in {0, 2} else matches[::-1])

    with serve_replies(ScriptedApi(task=task)) as server:
        run_once(workspace, server.base_url)
    found = {row["First Name"].lower(): row["work_email"] for row in workspace.read_output() if row["work_email"]}
    assert found == {"first2": "first2@found.example"}


@pytest.mark.long
def test_explain_hides_unaligned_data(tmp_path: Path, workspace: Workspace) -> None:
    """`explain` does not show the task's first address for the first row."""
    with serve_api(tmp_path / "api.db", bulk_data="hits", hit_rate=0.5) as api:
        workspace.run_job(api)
    output = workspace.run_in_process("explain", "job.yaml", "--row", "1", "--json").json_output
    (attempt,) = output["rows"][0]["request"]["attempts"]
    assert (attempt["answer"], attempt["credits"], attempt["together"]) == (None, None, BULK_SIZE)
    assert attempt["task_credits"] > 0
    line = workspace.run_in_process("explain", "job.yaml", "--row", "1").stdout
    assert "with 9 others" in line
    assert "credits for all 10 of the task" in line


@pytest.mark.long
def test_empty_unaligned_result_is_no_match(tmp_path: Path, workspace: Workspace) -> None:
    """Treats an empty list as no match for every row."""
    with serve_api(tmp_path / "api.db", bulk_data="hits", hit_rate=0.0) as api:
        summary = workspace.run_job(api)
    assert (summary.exit_code, summary.not_found) == (0, LEADS)


@pytest.mark.long
def test_partially_failed_task(tmp_path: Path, workspace: Workspace) -> None:
    """Keeps the matches; rows without an answer are failed where some failed, with that reason."""
    with serve_api(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0, hit_rate=0.6) as api:
        summary = workspace.run_job(api)
        assert_consistent_with_audit(api, workspace, summary)

    assert summary.exit_code == ExitCode.SOME_FAILED
    assert summary.found
    assert any("failed or no match" in row["enrich_error"] for row in workspace.read_output())


@BOTH_BACKENDS
@pytest.mark.long
@pytest.mark.parametrize("attempts", [1, 5])
def test_free_failed_task_is_retried(tmp_path: Path, workspace: Workspace, attempts: int) -> None:
    """Resends all rows of a free failed task up to `max_attempts`, and none of a task that was charged."""
    workspace.write_job(dispatch=f"{{bulk: {BULK_SIZE}}}", policy=f"{{max_attempts: {attempts}}}")
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0, hit_rate=1.0) as api:
        summary = workspace.run_job(api)
        assert_consistent_with_audit(api, workspace, summary)
    assert set(task_counts(workspace)) == {min(attempts, 2)}
    assert bool(summary.found) is (attempts > 1)
    assert summary.failed == LEADS - (summary.found or 0) > 0


def task_counts(workspace: Workspace) -> list[int]:
    """Return the number of tasks of each request."""
    return [count for (count,) in workspace.sql("SELECT count(task_id) FROM attempts GROUP BY request_id")]


@BOTH_BACKENDS
@pytest.mark.long
def test_unknown_task_price(tmp_path: Path, workspace: Workspace) -> None:
    """Counts every row of the task as of unknown price and keeps its reservation."""
    with serve_api(tmp_path / "api.db", hide_credits=True) as api:
        summary = workspace.run_job(api)
        output = workspace.run_in_process("reconcile", "job.yaml", "--json", api=api).json_output

    assert (summary.credits_spent, summary.credits_unknown) == (0, LEADS)
    assert (output["unknown_price"]["number"], output["unexplained"]) == (LEADS, 0)
    assert check_ledger(workspace.ledger_location).problems == []


@pytest.mark.long
def test_reconcile_counts_task_credits_once(api: SandboxApi, workspace: Workspace) -> None:
    """`reconcile` counts each task's credits once."""
    api.inject_fault("error-after", 1, "post")
    summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)
    output = workspace.run_in_process("reconcile", "job.yaml", "--json", api=api).json_output

    assert output["spent"]["number"] == LEADS - BULK_SIZE
    assert output["spent"]["most"] == pytest.approx(summary.credits_spent)
    assert (output["in_doubt"]["number"], output["unexplained"]) == (BULK_SIZE, 0)


@BOTH_BACKENDS
@pytest.mark.long
@pytest.mark.parametrize("expired_as", ["410", "gone"])
def test_expired_task(tmp_path: Path, workspace: Workspace, expired_as: Any) -> None:
    """Expires every row of the task at an unknown price, whatever the body contains."""
    with serve_api(tmp_path / "api.db", latency="fixed(600)", expired_as=expired_as) as api:
        workspace.submit_without_collecting(api)
        status = workspace.run_in_process("status", "job.yaml")
        assert "25  at Databar" in status.stdout
        crontab = [f"--env={name}={value}" for name, value in workspace.environ.items()]
        assert "25 paid requests running" in workspace.run_in_process("doctor", "job.yaml", *crontab, api=api).stdout
        api.advance(200_000)
        summary = workspace.run_job(api)
        assert api.audit()["accepted"] == LEADS

    assert (summary.exit_code, summary.expired, summary.credits_unknown) == (ExitCode.SOME_FAILED, LEADS, LEADS)
    assert check_ledger(workspace.ledger_location).problems == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "code", "in_doubt"),
    [("lost-task=1", 14, BULK_SIZE), ("late-task=1,seconds=0.2", 0, 0), ("odd-status=1", 0, 0)],
)
def test_task_with_unknown_status(tmp_path: Path, workspace: Workspace, fault: str, code: int, in_doubt: int) -> None:
    """A task never known is in doubt; one known late, or with an unknown status, is polled further."""
    with serve_api(tmp_path / "api.db") as api:
        parsed = Fault.parse(fault)
        api.inject_fault(parsed.name, 1, "post", **parsed.params)
        summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)
    assert (summary.exit_code, summary.in_doubt) == (code, in_doubt)
    assert check_ledger(workspace.ledger_location).problems == []


def test_recovered_rows_are_counted(tmp_path: Path, workspace: Workspace) -> None:
    """Of an unconfirmed bulk task that exists after all, the note counts the requests."""
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        workspace.submit_without_collecting(api)
        for table in ("attempts", "requests"):
            workspace.sql(f"UPDATE {table} SET state = 'in_doubt'")
        api.advance(60)
        summary = workspace.run_job(api)
    assert (summary.in_doubt, summary.submitted) == (0, 0)
    assert f"{LEADS} requests recovered: the API has the task after all" in summary.notes


@pytest.mark.long
def test_forgotten_task_expires_rows(tmp_path: Path, workspace: Workspace) -> None:
    """A known task that is now 404 expires its rows at an unknown price; they are not resent automatically."""
    with serve_api(tmp_path / "api.db", latency="fixed(600)") as api:
        workspace.submit_without_collecting(api)
    # Old enough to be known by now.
    assert workspace.sql("SELECT count(*) FROM attempts WHERE acknowledged = 1") == [(LEADS,)]
    workspace.sql("UPDATE attempts SET submitted_ms = submitted_ms - 60000")
    with serve_api(tmp_path / "other.db", port=int(api.base_url.rpartition(":")[2].partition("/")[0])) as other:
        summary = workspace.run_job(other, timing=replace(Timeouts(), young_task_s=0.5))
        assert other.audit()["accepted"] == 0
    assert (summary.exit_code, summary.expired, summary.credits_unknown) == (ExitCode.SOME_FAILED, LEADS, LEADS)
    assert check_ledger(workspace.ledger_location).problems == []


@pytest.mark.long
def test_cancelled_task_is_retried(tmp_path: Path, workspace: Workspace) -> None:
    """Retries a cancelled task, which failed at no charge; pays once."""
    with serve_api(tmp_path / "api.db", latency="fixed(600)") as api:
        workspace.submit_without_collecting(api)
        ((task_id,),) = workspace.sql("SELECT task_id FROM attempts WHERE bulk_index = 0 LIMIT 1")
        url = f"{api.base_url}/tasks/{task_id}/cancel"
        httpx.post(url, headers={"x-apikey": api.api_key}, trust_env=False).raise_for_status()
        api.advance(1_000)
        summary = workspace.run_job(api, RunOptions(max_time_s=2.0))
        assert (summary.exit_code, summary.submitted, status_counts(workspace)["pending"]) == (
            ExitCode.TIME,
            BULK_SIZE,
            BULK_SIZE,
        )
        api.advance(1_000)
        assert workspace.run_job(api).exit_code == ExitCode.OK
        assert api.audit()["paid_twice"] == 0


# Limits


@pytest.mark.long
def test_cap_limits_task_size(tmp_path: Path, workspace: Workspace) -> None:
    """Reserves no more than the cap allows; cheaper answers make room again."""
    workspace.write_job(limits=f"{{max_credits: {7 * MAX_PRICE + 1}}}", dispatch=f"{{bulk: {BULK_SIZE}}}")
    workspace.write_leads(make_leads(200))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        summary = workspace.run_job(api)
        assert_consistent_with_audit(api, workspace, summary)

    assert bulk_tasks(workspace)[0][0] == 7
    assert max(size for size, _, _ in bulk_tasks(workspace)) == 7
    assert summary.exit_code == ExitCode.CREDITS
    assert 6 * MAX_PRICE < summary.credits_spent <= 7 * MAX_PRICE + 1


@pytest.mark.long
def test_limit_is_exact(api: SandboxApi, workspace: Workspace) -> None:
    """`--limit` counts requests, not tasks."""
    summary = workspace.run_job(api, RunOptions(limit=13))
    assert (summary.submitted, summary.pending, request_count(api, "bulk_run")) == (13, LEADS - 13, 2)


@pytest.mark.long
@pytest.mark.parametrize(("hit_rate", "code", "bought"), [(1.0, 0, LEADS), (0.0, 15, 4)])
def test_canary_is_a_separate_task(
    tmp_path: Path, workspace: Workspace, hit_rate: float, code: int, bought: int
) -> None:
    """Judges the canary's rows before the others are sent."""
    workspace.write_job(canary="{rows: 4, min_hit_rate: 0.5}", dispatch=f"{{bulk: {BULK_SIZE}}}")
    with serve_api(tmp_path / "api.db", hit_rate=hit_rate) as api:
        summary = workspace.run_job(api)
        assert (summary.exit_code, api.audit()["accepted"], bulk_tasks(workspace)[0][0]) == (code, bought, 4)


@pytest.mark.long
def test_bulk_posts_in_flight_limit(tmp_path: Path, workspace: Workspace) -> None:
    """Sends at most four POSTs at once, because a lost POST leaves all of its requests in doubt."""
    workspace.write_job(dispatch="{bulk: 2}")
    workspace.write_leads(make_leads(60))
    with serve_api(tmp_path / "api.db", faults=(Fault("slow", 1.0, "post", {"seconds": 0.4}),)) as api:
        process = workspace.start_subprocess("run", "job.yaml", api=api)
        try:
            wait_until(lambda: request_count(api, "bulk_run") >= 1)
            max_in_flight = max(posts_in_flight(workspace) for _ in range(100))
        finally:
            kill_process(process)
    assert 2 <= max_in_flight <= 2 * MAX_BULK_POSTS_IN_FLIGHT


def posts_in_flight(workspace: Workspace) -> int:
    """Count the requests whose POST has no answer yet."""
    ((count,),) = workspace.sql("SELECT count(*) FROM attempts WHERE state = 'submitting'")
    return int(count)


def test_unsent_claims_are_released(api: SandboxApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the run stops between claim and POST, the claims are released: nothing in doubt, nothing reserved."""
    claim = Dispatcher._next_posts

    async def claim_and_close(dispatcher: Dispatcher, room: int) -> Any:
        claims = await claim(dispatcher, room)
        dispatcher.run_state.stop(ExitCode.API, EnrichError("enough"))
        return claims

    monkeypatch.setattr(Dispatcher, "_next_posts", claim_and_close)

    async def scenario() -> None:
        async with open_loops(api, tmp_path / "ledger.db", range(LEADS)) as harness:
            await harness.run_loops(bulk=BULK_SIZE)
            assert queries.state_counts(harness.ledger.wrapped) == {State.PENDING: LEADS}
            assert harness.ledger.execution_counters == (0, 0, 0, 0)
            assert [size for (size,) in harness.ledger.query_all("SELECT size FROM bulk_tasks")] == [10, 10, 5]
        assert check_ledger(tmp_path / "ledger.db").problems == []

    asyncio.run(scenario())
    assert api.audit()["accepted"] == 0


@pytest.mark.long
def test_refresh_and_retry_in_bulk(api: SandboxApi, workspace: Workspace) -> None:
    """`policy.refresh` and `--retry` work in bulk; a refused refresh keeps the old answer."""
    workspace.run_job(api)
    misses = status_counts(workspace)["not_found"]
    workspace.write_job(dispatch=f"{{bulk: {BULK_SIZE}}}", policy="{refresh: {not_found: 1d}}")
    api.advance(3 * 86_400)
    api.inject_fault("rate-limit-bare", 1, "post")

    summary = workspace.run_job(api, clock=clock_ahead(3 * 86_400))

    assert (summary.exit_code, summary.submitted) == (0, misses)
    assert check_ledger(workspace.ledger_location).problems == []


# Killed, then resumed in the same or another mode


@BOTH_BACKENDS
@pytest.mark.long
@pytest.mark.parametrize("fault", ["silence-after", "silence-before"])
def test_kill_with_posts_in_flight(api: SandboxApi, workspace: Workspace, fault: str) -> None:
    """A kill leaves at most four POSTs in doubt; everything else is bought once."""
    workspace.write_leads(make_leads(100))
    api.inject_fault(fault, MAX_BULK_POSTS_IN_FLIGHT)
    process = workspace.start_subprocess("run", "job.yaml", api=api)
    try:
        wait_until(lambda: api.audit()["faults"].get(fault, 0) == MAX_BULK_POSTS_IN_FLIGHT)
    finally:
        kill_process(process)
    api.clear_faults()

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.in_doubt) == (ExitCode.IN_DOUBT, MAX_BULK_POSTS_IN_FLIGHT * BULK_SIZE)
    assert summary.submitted == 100 - MAX_BULK_POSTS_IN_FLIGHT * BULK_SIZE
    assert (api.audit()["accepted_more_than_once"], api.audit()["paid_twice"]) == (0, 0)
    assert check_ledger(workspace.ledger_location).problems == []


@BOTH_BACKENDS
@pytest.mark.long
def test_kill_with_open_tasks(tmp_path: Path, workspace: Workspace) -> None:
    """The next run collects the open tasks first and pays for nothing again."""
    with serve_api(tmp_path / "api.db", latency="fixed(2)") as api:
        process = workspace.start_subprocess("run", "job.yaml", api=api)
        try:
            wait_until(lambda: request_count(api, "bulk_run") == 3 and posts_in_flight(workspace) == 0)
        finally:
            kill_process(process)
        summary = workspace.run_job(api)
        assert (summary.exit_code, summary.submitted, api.audit()["accepted"]) == (0, 0, LEADS)
        assert_consistent_with_audit(api, workspace, summary)


@pytest.mark.long
@pytest.mark.parametrize("first", ["bulk", "single"])
def test_switching_between_bulk_and_single(tmp_path: Path, workspace: Workspace, first: str) -> None:
    """Collects open tasks in the mode they were sent in, whatever the job's mode is now."""
    jobs: dict[str, dict[str, str]] = {"bulk": {"dispatch": f"{{bulk: {BULK_SIZE}}}"}, "single": {}}
    second = "single" if first == "bulk" else "bulk"
    with serve_api(tmp_path / "api.db", latency="fixed(30)") as api:
        workspace.write_job(**jobs[first])
        workspace.write_leads(make_leads(FEW_LEADS))
        workspace.submit_without_collecting(api)
        workspace.write_job(**jobs[second])
        workspace.write_leads(make_leads(FEW_LEADS + 7))
        workspace.submit_without_collecting(api, 7)
        api.advance(60)
        workspace.write_job(**jobs[first])
        summary = workspace.run_job(api)
        assert_consistent_with_audit(api, workspace, summary)
        assert (summary.exit_code, summary.submitted, api.audit()["accepted"]) == (0, 0, FEW_LEADS + 7)


@pytest.mark.long
def test_bulk_answer_uses_columns_of_its_job(tmp_path: Path, workspace: Workspace) -> None:
    """Evaluates an answer by the columns of the job that sent it, whichever job of the ledger collects it."""
    workspace.write_job(ledger="shared.db", dispatch=f"{{bulk: {BULK_SIZE}}}")
    with serve_api(tmp_path / "api.db", latency="fixed(30)", hit_rate=1.0) as api:
        workspace.submit_without_collecting(api)
        api.advance(60)
        workspace.write_job(ledger="shared.db", columns="{other: $enrichment_data.absent.title}", name="other")
        assert workspace.run_job(api).not_found == LEADS
        workspace.write_job(ledger="shared.db", dispatch=f"{{bulk: {BULK_SIZE}}}")
        summary = workspace.run_job(api)
    assert (summary.exit_code, summary.found, summary.submitted) == (0, LEADS, 0)


@BOTH_BACKENDS
@pytest.mark.long
def test_summaries_match_bill_under_faults(tmp_path: Path, workspace: Workspace) -> None:
    """The summaries plus the unconfirmed costs equal the API's bill; every run is sold once."""
    faults = tuple(
        map(Fault.parse, ["reset-after=0.15", "post:error-before=0.1", "post:rate-limit-bare=0.2", "broken-json=0.1"])
    )
    spent = 0.0
    with serve_api(tmp_path / "api.db", faults=faults, failure_rate=0.1, fault_seed=4) as api:
        for run_number in range(1, 4):
            workspace.write_leads(make_leads(40 * run_number))
            spent += workspace.run_job(api, timing=SHORT_TIMEOUTS).credits_spent
            assert check_ledger(workspace.ledger_location).problems == []
        audit = api.audit()
    known = {task_id for (task_id,) in workspace.sql("SELECT task_id FROM attempts")}
    in_doubt_rows = sum(run["credits"] for run in audit["runs"] if not known.issuperset(run["task_ids"]))
    assert audit["faults"]["reset-after"] > 0
    assert audit["paid_twice"] == 0
    assert spent + in_doubt_rows == pytest.approx(audit["credits_charged"])


# Personal data


@pytest.mark.long
def test_forget_erases_unaligned_task(tmp_path: Path, workspace: Workspace) -> None:
    """Erases the whole answer of a task whose rows can't be told apart, because it has all names."""
    workspace.write_leads(make_leads(BULK_SIZE))
    with serve_api(tmp_path / "api.db", bulk_data="hits", hit_rate=0.8, shape="flat") as api:
        workspace.run_job(api)
    raw, *_ = (raw for (raw,) in workspace.sql("SELECT answer FROM attempts WHERE answer IS NOT NULL"))
    emails = [row["email"] for row in json.loads(raw)["bundle"]["data"]]
    assert emails
    assert all(email.encode() in ledger_bytes(workspace) for email in emails)

    assert forget_matching(workspace, "First Name=First7") == 1

    assert not any(email.encode() in ledger_bytes(workspace) for email in emails)
    assert check_ledger(workspace.ledger_location).problems == []


@BOTH_BACKENDS
@pytest.mark.long
def test_forget_keeps_other_rows_of_task(api: SandboxApi, workspace: Workspace) -> None:
    """Erases only the forgotten lead's answer when each row has its own."""
    workspace.run_job(api)
    before = {row["First Name"]: row["work_email"] for row in workspace.read_output()}
    name = next(name for name, email in before.items() if email)

    assert forget_matching(workspace, f"First Name={name}") == 1

    workspace.run_in_process("collect", "job.yaml")
    after = {row["First Name"]: row["work_email"] for row in workspace.read_output()}
    assert after == before | {name: ""}
    assert check_ledger(workspace.ledger_location).problems == []


@pytest.mark.long
def test_purge_of_bulk_tasks(tmp_path: Path, workspace: Workspace) -> None:
    """Purges a bulk task, also when its first request was resent since."""
    with serve_api(tmp_path / "api.db", bulk_data="hits", hit_rate=0.8, shape="flat") as api:
        workspace.run_job(api)
        workspace.sql("UPDATE attempts SET settled_ms = settled_ms - 864000000")
        workspace.sql("UPDATE bulk_tasks SET settled_ms = settled_ms - 864000000")
        workspace.run_job(api, RunOptions(retry=frozenset({State.FAILED}), limit=1))
    result = workspace.run_in_process("purge", "job.yaml", "--older-than", "5d", "--yes", "--json")

    assert result.exit_code == 0, result.stderr
    left = workspace.sql(
        "SELECT b.size FROM attempts a JOIN bulk_tasks b ON b.id = a.bulk_task_id WHERE a.answer IS NOT NULL"
    )
    assert left == [(1,)]


def test_disk_space_is_reserved_for_all_rows(api: SandboxApi, workspace: Workspace) -> None:
    """On a disk that gets full, the rescue file has room for the task id of each row of the tasks in flight."""
    sizes = set[int]()
    workspace.write_job(dispatch="{bulk: 200}")
    workspace.write_leads(make_leads(5))

    def note_size(_: Progress) -> None:
        sizes.update(path.stat().st_size for path in workspace.ledger_path.parent.glob(".job.db.room-*"))

    workspace.run_job(api, on_progress=note_size)
    assert min(sizes) >= 4 * 200 * 1_200

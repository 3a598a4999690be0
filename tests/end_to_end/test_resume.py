"""Resumes after a kill at any point without charging twice or losing a paid result."""

from __future__ import annotations

import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enrich.ledger import queries, records
from enrich.ledger.verify import check_ledger
from enrich.run.context import RunOptions
from enrich.run.summary import RunSummary
from tests.support.cases import first_quick
from tests.support.workspace import (
    BOTH_BACKENDS,
    SandboxApi,
    Workspace,
    kill_process,
    make_leads,
    serve_api,
    wait_until,
)

OLD_OUTPUT = "the output of an older night\n"
MAX_POSTS_IN_FLIGHT = 32  # the most requests that a kill may leave in doubt


def start_and_kill(workspace: Workspace, api: SandboxApi, condition: Callable[[], bool], *arguments: str) -> None:
    """Start the program and kill it as soon as a condition holds."""
    process = workspace.start_subprocess("run", "job.yaml", *arguments, api=api)
    try:
        wait_until(condition)
    finally:
        kill_process(process)


def request_count(api: SandboxApi, name: str) -> int:
    """Count the requests of a kind."""
    return int(api.audit()["requests"].get(name, 0))


def assert_consistent_with_audit(
    workspace: Workspace, api: SandboxApi, summary: RunSummary, leads: int, kills: int = 1
) -> dict[str, Any]:
    """Assert against the API's audit: nothing paid twice, nothing lost, nothing unreported."""
    audit = api.audit()
    assert audit["paid_twice"] == audit["accepted_more_than_once"] == 0
    assert (summary.in_doubt or 0) <= MAX_POSTS_IN_FLIGHT * kills
    output = workspace.read_output()
    assert [row["First Name"] for row in output] == [f"First{number}" for number in range(leads)]
    in_doubt = {row["First Name"] for row in output if row["enrich_status"] == "in_doubt"}
    result = {row["enrich_task_id"] for row in output if row["enrich_task_id"]}
    for run in audit["runs"]:
        assert set(run["task_ids"].split() if isinstance(run["task_ids"], str) else run["task_ids"]) <= result or (
            run["params"]["first_name"] in in_doubt
        )
    assert Counter(row["enrich_status"] for row in output)["pending"] == summary.pending == 0
    return audit


@pytest.mark.long
def test_kill_before_first_post(api: SandboxApi, workspace: Workspace) -> None:
    """Nothing was sent, so nothing is in doubt and the next run is like the first."""
    workspace.write_leads(make_leads(20))
    api.inject_fault("slow", 1, "waterfalls", seconds=30)
    start_and_kill(workspace, api, lambda: request_count(api, "waterfalls") == 1)

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.submitted, summary.in_doubt) == (0, 20, 0)
    assert_consistent_with_audit(workspace, api, summary, 20)


@BOTH_BACKENDS
@pytest.mark.parametrize("fault", first_quick(1, ["silence-after", "silence-before"]))
def test_kill_with_posts_in_flight(api: SandboxApi, workspace: Workspace, fault: str) -> None:
    """At most 64 requests are in doubt, whether accepted or not; the others are bought once."""
    workspace.write_leads(make_leads(60))
    api.inject_fault(fault, 40)
    start_and_kill(workspace, api, lambda: api.audit()["faults"].get(fault, 0) >= 20)
    in_flight = api.audit()["faults"][fault]
    api.clear_faults()

    summary = workspace.run_job(api)

    assert summary.exit_code == 14
    assert in_flight <= (summary.in_doubt or 0) <= MAX_POSTS_IN_FLIGHT
    assert summary.submitted == 60 - (summary.in_doubt or 0)
    assert any("killed" in note for note in summary.notes)
    audit = assert_consistent_with_audit(workspace, api, summary, 60)
    assert audit["accepted"] == summary.submitted + (in_flight if fault == "silence-after" else 0)


@pytest.mark.long
def test_kill_while_submitting_and_polling(tmp_path: Path, workspace: Workspace) -> None:
    """Resumes without charging twice after three kills while POSTs and polls are in flight."""
    workspace.write_job(limits="{requests_per_second: 400}")
    workspace.write_leads(make_leads(160))
    with serve_api(tmp_path / "api.db", latency="uniform(0.05,0.6)", failure_rate=0.05, free_failures=0.0) as api:
        for bought in (40, 80, 120):
            start_and_kill(workspace, api, lambda bought=bought: request_count(api, "run") >= bought)  # type: ignore[misc]
        summary = workspace.run_job(api)
        audit = assert_consistent_with_audit(workspace, api, summary, 160, kills=3)

    assert (summary.in_doubt or 0) + len({run["params"]["first_name"] for run in audit["runs"]}) >= 160


@BOTH_BACKENDS
def test_kill_while_polling(tmp_path: Path, workspace: Workspace) -> None:
    """The next run collects every answer and sends nothing."""
    workspace.write_leads(make_leads(12))
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        start_and_kill(workspace, api, lambda: request_count(api, "task") >= 12)
        api.advance(120)

        summary = workspace.run_job(api)

        assert_consistent_with_audit(workspace, api, summary, 12)
    assert (summary.exit_code, summary.submitted, summary.in_doubt) == (0, 0, 0)
    assert (summary.found or 0) + (summary.not_found or 0) == 12


@pytest.mark.long
def test_kill_while_writing_output(api: SandboxApi, workspace: Workspace) -> None:
    """The old output stays complete until it is replaced; the next run removes a partial one."""
    leads = [lead for _ in range(3_000) for lead in make_leads(10)]
    workspace.write_leads(leads)
    old = workspace.folder / "out.csv"
    old.write_text(OLD_OUTPUT)
    part = workspace.part_path
    start_and_kill(workspace, api, part.exists)
    assert part.exists()
    assert old.read_text() == OLD_OUTPUT

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.rows, summary.submitted) == (0, 30_000, 0)
    assert len(workspace.read_output()) == 30_000
    assert not part.exists()
    assert api.audit()["accepted"] == 10


def test_stale_part_removed_by_failed_run(api: SandboxApi, workspace: Workspace) -> None:
    """The next start removes a partial output even if that run fails."""
    workspace.write_leads(make_leads(1))
    part = workspace.part_path
    part.write_text("half a fi")
    api.inject_fault("unauthorized", 1, "post")

    summary = workspace.run_job(api)

    assert summary.exit_code == 3
    assert not part.exists()


@BOTH_BACKENDS
@pytest.mark.long
def test_repeated_random_kills(tmp_path: Path, workspace: Workspace) -> None:
    """Resumes after repeated kills at random times, and one run finishes the job."""
    workspace.write_job(limits="{requests_per_second: 300}")
    workspace.write_leads(make_leads(120))
    with serve_api(tmp_path / "api.db", latency="uniform(0.01,0.3)") as api:
        for number in range(4):
            process = workspace.start_subprocess("run", "job.yaml", api=api)
            time.sleep(0.55 + 0.13 * number)
            kill_process(process)
        summary = workspace.run_job(api)
        assert_consistent_with_audit(workspace, api, summary, 120, kills=4)

    assert summary.exit_code in (0, 14)


@BOTH_BACKENDS
@pytest.mark.long
def test_credits_match_audit_after_kill(api: SandboxApi, workspace: Workspace) -> None:
    """The ledger's credits equal the API's over all executions, except for unconfirmed and unknown ones."""
    workspace.write_leads(make_leads(60))
    start_and_kill(workspace, api, lambda: request_count(api, "task") >= 5)

    workspace.run_job(api)

    ledger = workspace.open_ledger()
    try:
        spent, unknown = queries.spent_totals(ledger)
        executions = records.list_executions(ledger)
    finally:
        ledger.close()
    assert [row.exit_code is None for row in executions] == [False, True]
    in_doubt = [row["First Name"] for row in workspace.read_output() if row["enrich_status"] == "in_doubt"]
    known = [run["credits"] for run in api.audit()["runs"] if run["params"]["first_name"] not in in_doubt]
    assert unknown == 0
    assert spent / 1e6 == pytest.approx(sum(known))
    assert sum(row.spent for row in executions) == spent


@pytest.mark.long
def test_cap_includes_open_tasks_of_killed_run(tmp_path: Path, workspace: Workspace) -> None:
    """Tasks of an earlier execution count against the cap of the execution that collects them."""
    workspace.write_leads(make_leads(30))
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        start_and_kill(workspace, api, lambda: request_count(api, "task") >= 10, "--limit", "10")
        before = api.audit()["accepted"]
        assert before == 10
        workspace.write_job(limits="{max_credits: 36}")

        summary = workspace.run_job(api, RunOptions(max_time_s=1.0))

        assert api.audit()["accepted"] - before <= 0
    assert summary.submitted == 0
    assert summary.pending == 30


@pytest.mark.long
def test_api_restart_during_run(tmp_path: Path, workspace: Workspace) -> None:
    """Waits through refused connections; the API keeps accepted tasks, and nothing is bought twice."""
    workspace.write_job(limits="{requests_per_second: 400}")
    workspace.write_leads(make_leads(150))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    state = tmp_path / "api.db"
    with serve_api(state, port=port, latency="fixed(0.5)") as api:
        process = workspace.start_subprocess("run", "job.yaml", "--json", api=api)
        wait_until(lambda: request_count(api, "run") >= 40)
    time.sleep(0.5)
    with serve_api(state, port=port, latency="fixed(0.5)") as api:
        try:
            _, err = process.communicate(timeout=90)
        finally:
            kill_process(process)
        summary = workspace.run_job(api)
        assert_consistent_with_audit(workspace, api, summary, 150)

    assert process.returncode in (0, 14), err
    assert summary.submitted == 0


@pytest.mark.long
def test_ledger_is_sound_after_kill(api: SandboxApi, workspace: Workspace) -> None:
    """SQLite finds no damage after a kill, and status works immediately."""
    workspace.write_leads(make_leads(100))
    start_and_kill(workspace, api, lambda: request_count(api, "run") >= 30)

    result = workspace.run_in_process("status", "job.yaml", "--json")

    assert result.exit_code == 0
    assert result.json_output["executions"][0]["ended_at"] is None
    assert check_ledger(workspace.ledger_location).problems == []


@BOTH_BACKENDS
@pytest.mark.long
def test_concurrent_starts(tmp_path: Path, workspace: Workspace) -> None:
    """Of two simultaneous starts one runs and the other exits with 11, with a server after a moment."""
    workspace.write_leads(make_leads(10))
    with serve_api(tmp_path / "api.db", latency="fixed(5)" if workspace.server_url else "fixed(1)") as api:
        both = [workspace.start_subprocess("run", "job.yaml", api=api) for _ in range(2)]
        codes = sorted(_wait_for_end(process) for process in both)
        audit = api.audit()

    assert codes == [0, 11]
    assert (audit["accepted"], audit["paid_twice"]) == (10, 0)


def _wait_for_end(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=90)
    return process.returncode

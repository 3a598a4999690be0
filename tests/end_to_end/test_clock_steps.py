"""Steps of the local clock by hours, and wrong `Date` headers: the test clock itself, and runs that stay correct."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

import pytest

from tests.support.answer_check import ANSWER_STATUSES
from tests.support.stepping_clock import SteppingClock
from tests.support.workspace import SandboxApi, Workspace, make_leads, serve_api, wait_until

LEADS = 8
each_clock_step = pytest.mark.parametrize("hours", [30, 2, -2, -30])


def test_clock_steps_both_ways(tmp_path: Path) -> None:
    """Shifts the time by the file's current offset; without a file there is no shift."""
    path = tmp_path / "clock"
    clock = SteppingClock(path)
    assert abs(clock.time() - time.time()) < 60
    for hours in (5, -30, 0):
        path.write_text(str(hours * 3600))
        clock._read_at = float("-inf")
        assert abs(clock.time() - time.time() - hours * 3600) < 60
        assert abs(clock.time_ns() - time.time_ns() - hours * 3600 * 10**9) < 60 * 10**9
    path.write_text("")
    clock._read_at = float("-inf")
    assert abs(clock.time() - time.time()) < 60


@pytest.mark.long
def test_program_runs_with_stepping_clock(api: SandboxApi, workspace: Workspace) -> None:
    """Runs the program with shifted times in the ledger; arguments and exit code pass through."""
    workspace.write_leads(make_leads(3))
    (workspace.folder / "clock").write_text("-240")
    process = workspace.start_subprocess("run", "job.yaml", "--json", api=api, clock=workspace.folder / "clock")
    process.communicate(timeout=60)
    assert process.returncode == 0
    (started_at,) = workspace.sql("SELECT min(claimed_ms) FROM attempts")[0]
    assert time.time() - 300 < started_at / 1000 < time.time() - 200
    process = workspace.start_subprocess("run", "job.yaml", "--nonsense", api=api, clock=workspace.folder / "clock")
    process.communicate(timeout=60)
    assert process.returncode == 2


def submitted_count(workspace: Workspace) -> int:
    """Count the tasks that ever had an id."""
    if not workspace.ledger_path.exists():
        return 0
    try:
        (count,) = workspace.sql("SELECT count(*) FROM attempts WHERE task_id IS NOT NULL")[0]
    except sqlite3.OperationalError:  # its tables are being made
        return 0
    return int(count)


def assert_run_completes(
    workspace: Workspace, api: SandboxApi, hours: float | None, *options: str
) -> dict[str, object]:
    """Run the job; step the clock after all submits if `hours` is not 0; assert that every lead has its answer."""
    clock = workspace.folder / "clock"
    process = workspace.start_subprocess("run", "job.yaml", "--json", *options, api=api, clock=clock)
    if hours is not None:
        wait_until(lambda: submitted_count(workspace) == LEADS, 60)
        clock.write_text(str(hours * 3600))
    out, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert {row["enrich_status"] for row in workspace.read_output()} <= ANSWER_STATUSES
    summary: dict[str, object] = json.loads(out)
    return summary


@pytest.mark.long
@each_clock_step
def test_clock_step_with_flickering_task(tmp_path: Path, workspace: Workspace, hours: float) -> None:
    """A clock step makes no flickering task older and shortens no timeout."""
    workspace.write_leads(make_leads(LEADS))
    with serve_api(tmp_path / "api.db", latency="fixed(3)") as api:
        api.inject_fault("flickering-task", LEADS, "post", seconds=4)
        assert_run_completes(workspace, api, hours)
        assert api.audit()["accepted"] == LEADS


@pytest.mark.long
@each_clock_step
def test_clock_step_between_runs(tmp_path: Path, workspace: Workspace, hours: float) -> None:
    """Collects a task of an earlier run that flickers and seems to be of tomorrow or of long ago."""
    workspace.write_leads(make_leads(LEADS))
    with serve_api(tmp_path / "api.db", latency="fixed(6)") as api:
        api.inject_fault("flickering-task", LEADS, "post", seconds=3)
        workspace.submit_without_collecting(api)
        (workspace.folder / "clock").write_text(str(hours * 3600))
        for _ in range(5):
            process = workspace.start_subprocess("run", "job.yaml", "--json", api=api, clock=workspace.folder / "clock")
            out, stderr = process.communicate(timeout=100)
            assert json.loads(out)["submitted"] == 0, stderr
            # 13: before the API's clock is known, a task may seem too old to be waited for.
            if process.returncode != 13:
                break
        assert process.returncode == 0, stderr
        assert {row["enrich_status"] for row in workspace.read_output()} <= ANSWER_STATUSES


@pytest.mark.long
@pytest.mark.parametrize("age", [0, 93_600])
@pytest.mark.parametrize("hours", [26, -26])
def test_wrong_date_headers(tmp_path: Path, workspace: Workspace, hours: int, age: int) -> None:
    """A wrong `Date`, alone or from a cache with its `Age`, expires no flickering task."""
    workspace.write_leads(make_leads(LEADS))
    with serve_api(tmp_path / "api.db", latency="fixed(2)") as api:
        api.inject_fault("flickering-task", LEADS, "post", seconds=3)
        api.inject_fault("wrong-date", LEADS // 2, "get", seconds=hours * 3600, age=age)
        assert_run_completes(workspace, api, None)
        assert api.audit()["accepted"] == LEADS


@pytest.mark.long
def test_clock_step_during_retry_after(tmp_path: Path, workspace: Workspace) -> None:
    """Measures a `Retry-After` date by the clock of its own response, not by the local clock."""
    workspace.write_leads(make_leads(LEADS))
    (workspace.folder / "clock").write_text(str(-7 * 3600))
    with serve_api(tmp_path / "api.db", latency="fixed(1)") as api:
        api.inject_fault("rate-limit-date", 2, "post", retry_after=1)
        elapsed = assert_run_completes(workspace, api, None)["elapsed_s"]
        assert isinstance(elapsed, float)
        assert elapsed < 60


@pytest.mark.long
@pytest.mark.parametrize(("first", "second"), [(-48, 0), (0, 48), (-9000, 9000)])
def test_wrong_clock_refreshes_nothing(api: SandboxApi, workspace: Workspace, first: int, second: int) -> None:
    """Results do not get older than they are by a clock that is behind when they arrive, or ahead in the next run."""
    workspace.write_leads(make_leads(LEADS))
    workspace.write_job(policy="{refresh: {found: 1d, not_found: 1d}}")
    for hours, expected in ((first, LEADS), (second, 0), (0, 0)):
        (workspace.folder / "clock").write_text(str(hours * 3600))
        assert assert_run_completes(workspace, api, None)["submitted"] == expected


@pytest.mark.long
def test_plan_by_a_clock_that_is_ahead(api: SandboxApi, workspace: Workspace) -> None:
    """A plan that is made, or was saved, by a clock that is two days ahead finds no result too old."""
    workspace.write_leads(make_leads(LEADS))
    workspace.write_job(policy="{refresh: {found: 1d, not_found: 1d}}")
    assert_run_completes(workspace, api, None)
    clock = workspace.folder / "clock"
    clock.write_text(str(48 * 3600))
    arguments = ("plan", "job.yaml", "--json", "-o", "plan.json")
    out, stderr = workspace.start_subprocess(*arguments, api=api, clock=clock).communicate(timeout=60)
    assert json.loads(out)["to_submit"] == 0, stderr
    saved = workspace.folder / "plan.json"
    plan = json.loads(saved.read_text())
    saved.write_text(json.dumps(plan | {"made_ms": plan["made_ms"] + 48 * 3_600_000}))
    clock.write_text("0")
    assert assert_run_completes(workspace, api, None, "--plan", "plan.json")["submitted"] == 0

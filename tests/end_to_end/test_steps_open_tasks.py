"""Open tasks of a job with steps are collected before anything refuses a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from enrich.exit_codes import ExitCode
from enrich.run.context import RunOptions
from enrich.run.progress import Progress
from tests.end_to_end.test_steps import HEADER, SHORT_JOB, make_people
from tests.support.workspace import JumpingClock, SandboxApi, Workspace, serve_api

REFUSALS: dict[str, tuple[Callable[[Workspace], object], ExitCode]] = {
    "a step has an unknown waterfall": (
        lambda workspace: workspace.write_job(SHORT_JOB.replace("waterfall: person_getter", "waterfall: none_such")),
        ExitCode.USAGE,
    ),
    "a step has an unknown param": (
        lambda workspace: workspace.write_job(SHORT_JOB.replace("{email: work_email}", "{mail: work_email}")),
        ExitCode.USAGE,
    ),
    "the input is missing": (lambda workspace: (workspace.folder / "leads.csv").unlink(), ExitCode.REFUSED),
    "a step reads a column that is missing": (
        lambda workspace: workspace.write_job(SHORT_JOB.replace("first_name: First Name", "first_name: Name")),
        ExitCode.USAGE,
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_open_tasks_of_steps_are_collected_before_a_refusal(workspace: Workspace, tmp_path: Path, refusal: str) -> None:
    """The run keeps the results of the open tasks, sends nothing, and ends with the reason."""
    spoil, code = REFUSALS[refusal]
    workspace.write_job(SHORT_JOB)
    workspace.write_leads(make_people(3), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0, latency="fixed(60)") as api:
        workspace.submit_without_collecting(api)
        api.advance(61)
        spoil(workspace)
        summary = workspace.run_job(api)
        assert api.audit()["accepted"] == 3
    assert (summary.exit_code, bool(summary.error)) == (code, True)
    assert [state for (state,) in workspace.sql("SELECT state FROM requests")] == ["found"] * 3


def test_results_without_columns_are_found_later(workspace: Workspace, tmp_path: Path) -> None:
    """A refused run keeps a result also where the job names no columns, and the next run finds its fields."""
    job = SHORT_JOB.replace("    columns: {link: linkedin_url}\n", "")
    workspace.write_job(job)
    workspace.write_leads(make_people(3), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0, latency="fixed(60)") as api:
        run_until_step(workspace, api, "person")
        api.advance(61)
        workspace.write_job(job.replace("person_getter", "none_such"))
        assert workspace.run_job(api).exit_code == ExitCode.USAGE
        assert workspace.open_task_count() == 0
        workspace.write_job(job)
        assert workspace.run_job(api).submitted == 0
    rows = workspace.read_output()
    assert {row["enrich_person_status"] for row in rows} == {"found"}
    assert all(row["linkedin_url"] for row in rows)


def run_until_step(workspace: Workspace, api: SandboxApi, step: str) -> None:
    """Run a job until a step has sent its requests, and leave their tasks open."""
    workspace.submit_without_collecting(api)
    api.advance(61)
    clock = JumpingClock()

    def end_when_submitted(_: Progress) -> None:
        sent = workspace.sql("SELECT count(*) FROM attempts WHERE step = ? AND submitted_ms IS NOT NULL", step)
        clock.jumped_s = 3600.0 if sent == [(3,)] else 0.0

    workspace.run_job(api, RunOptions(max_time_s=600.0), clock=clock, on_progress=end_when_submitted)
    assert workspace.open_task_count() == 3

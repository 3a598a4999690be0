"""Several jobs with one ledger: they share answers; executions and summaries stay separate."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from enrich.errors import LedgerLocked, RunDeclined
from enrich.job.job import load_job
from enrich.ledger import queries
from enrich.ledger.lock import lock_ledger
from enrich.models import State
from enrich.run.context import RunOptions
from tests.support.workspace import SandboxApi, Workspace, make_leads, serve_api

LOOKUP = {"waterfall": "company_lookup", "params": "{company_website: Website}", "ledger": "shared.db"}


def workspace_for(workspace: Workspace, name: str) -> Workspace:
    """Make another job in the same folder; its outputs have its name."""

    class Other(Workspace):
        """A workspace with another job file."""

        @property
        def job_file(self) -> Path:
            return self.folder / f"{name}.yaml"

        @property
        def ledger_path(self) -> Path:
            return self.folder / "shared.db"

    other = Other(workspace.folder)
    other.write_job(ledger="shared.db", output=f"{name}.csv")
    return other


@pytest.fixture
def alpha(workspace: Workspace) -> Workspace:
    """Make a job."""
    return workspace_for(workspace, "alpha")


@pytest.fixture
def beta(workspace: Workspace) -> Workspace:
    """Make another job with the same ledger."""
    return workspace_for(workspace, "beta")


def test_answer_is_shared_between_jobs(api: SandboxApi, alpha: Workspace, beta: Workspace) -> None:
    """Reuses the answer to the same request of another job, also under other columns."""
    beta.write_job(ledger="shared.db", output="beta.csv", columns="{mail: email}")
    alpha.write_leads(make_leads(5))
    first = alpha.run_job(api)
    alpha.write_leads(make_leads(7))

    second = beta.run_job(api)

    assert (first.submitted, second.submitted, second.reused) == (5, 2, 5)
    answers = {row["First Name"]: row["work_email"] for row in alpha.read_output("alpha.csv")}
    assert {row["First Name"]: row["mail"] for row in beta.read_output("beta.csv")[:5]} == answers
    assert any(answers.values())


def test_output_of_another_job_is_named(api: SandboxApi, alpha: Workspace, beta: Workspace) -> None:
    """A run that replaces the output of another job says so, also without a terminal. A renamed job says so once."""
    beta.write_job(ledger="shared.db", output="alpha.csv")
    alpha.write_leads(make_leads(1))
    runs = [
        alpha.run_in_process("run", f"{name}.yaml", "--json", api=api) for name in ("alpha", "alpha", "beta", "beta")
    ]

    note = f"{alpha.folder}/alpha.csv is the output of the job `alpha`, too: this run replaces it"
    assert [(run.exit_code, run.json_output["notes"]) for run in runs] == [(0, []), (0, []), (0, [note]), (0, [])]
    assert [note in run.stderr for run in runs] == [False, False, True, False]


@pytest.mark.long
def test_executions_are_separate_per_job(api: SandboxApi, alpha: Workspace, beta: Workspace) -> None:
    """`status` shows a job its own executions."""
    alpha.write_leads(make_leads(2))
    alpha.run_job(api)
    beta.run_job(api)
    alpha.run_job(api)

    shown = {
        name: job_workspace.run_in_process("status", f"{name}.yaml", "--json").json_output["executions"]
        for name, job_workspace in (("alpha", alpha), ("beta", beta))
    }

    assert [each["execution"] for each in shown["alpha"]] == [3, 1]
    assert [each["execution"] for each in shown["beta"]] == [2]
    assert {each["receipt"]["job"] for each in shown["alpha"]} == {"alpha"}


@pytest.mark.long
def test_task_is_evaluated_by_its_own_job(tmp_path: Path, alpha: Workspace, beta: Workspace) -> None:
    """A job that collects another job's task evaluates it by the columns of the job that sent it."""
    alpha.write_job(columns="{about: description}", output="alpha.csv", **LOOKUP)
    beta.write_job(columns="{phone: funding.phone}", output="beta.csv", **LOOKUP)
    alpha.write_leads(make_leads(4))
    with serve_api(tmp_path / "api.db", latency="fixed(60)", hit_rate=1.0) as api:
        alpha.submit_without_collecting(api)
        api.advance(90)
        collected = beta.run_job(api)
        second = alpha.run_job(api)
        assert api.audit()["accepted"] == 4

    with closing(alpha.open_ledger()) as ledger:
        assert queries.state_counts(ledger) == {State.FOUND: 4}
    assert (collected.submitted, collected.found, collected.not_found) == (0, 0, 4)
    assert (second.submitted, second.found) == (0, 4)


@pytest.mark.long
def test_open_request_of_other_job_is_awaited(tmp_path: Path, alpha: Workspace, beta: Workspace) -> None:
    """Does not resend another job's open request; the plan counts it as waiting."""
    alpha.write_leads(make_leads(3))
    with serve_api(tmp_path / "api.db", latency="fixed(60)", hit_rate=1.0) as api:
        alpha.submit_without_collecting(api)
        output = beta.run_in_process("plan", "beta.yaml", "--json", api=api).json_output
        api.advance(90)
        summary = beta.run_job(api)
    assert (output["to_submit"], output["decisions"]["waiting"]) == (0, 3)
    assert (summary.submitted, summary.found) == (0, 3)


@pytest.mark.long
def test_pending_rows_of_other_job_are_not_sent(api: SandboxApi, alpha: Workspace, beta: Workspace) -> None:
    """Does not send another job's pending rows, even when that job was killed before it could send."""
    alpha.write_leads(make_leads(6))
    alpha.run_job(api, RunOptions(limit=2))
    alpha.write_leads(make_leads(1, start=50))

    summary = beta.run_job(api)

    assert (summary.submitted, api.audit()["accepted"]) == (1, 3)


def test_jobs_exclude_each_other(api: SandboxApi, alpha: Workspace, beta: Workspace) -> None:
    """The ledger is locked for all of its jobs."""
    alpha.write_leads(make_leads(1))
    with lock_ledger(load_job(alpha.job_file).ledger, 0):
        assert beta.run_in_process("run", "beta.yaml", api=api).exit_code == LedgerLocked.exit_code


@pytest.mark.long
def test_plan_after_other_job(api: SandboxApi, alpha: Workspace, beta: Workspace) -> None:
    """When another job answers a part between plan and run, only the rest is sent."""
    alpha.write_leads(make_leads(6))
    assert alpha.run_in_process("plan", "alpha.yaml", "-o", "alpha.plan", "--limit", "4", api=api).exit_code == 0
    beta.run_job(api, RunOptions(limit=3))

    summary = alpha.run_in_process("run", "alpha.yaml", "--plan", "alpha.plan", "--json", api=api).json_output

    assert (summary["exit_code"], summary["submitted"], summary["pending"]) == (0, 1, 2)


@pytest.mark.long
def test_confirmation_per_job(api: SandboxApi, alpha: Workspace, beta: Workspace) -> None:
    """Another job's spending does not replace this job's confirmation."""
    prompts: list[str] = []

    def refuse(text: str) -> bool:
        prompts.append(text)
        return False

    alpha.write_leads(make_leads(2))
    alpha.run_job(api)
    alpha.write_leads(make_leads(4))
    with pytest.raises(RunDeclined):
        beta.run_job(api, RunOptions(confirm=refuse))
    assert alpha.run_job(api, RunOptions(confirm=refuse)).submitted == 2
    assert len(prompts) == 1

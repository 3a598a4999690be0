"""No command writes a file of the job over another one, whatever names the two."""

from __future__ import annotations

import pytest

from tests.support.cases import in_turn
from tests.support.workspace import SandboxApi, Workspace, make_leads

JOB_FILES = {"suppress": "never.csv", "notify": "addresses.csv", "rejects": "rejects.csv", "report": "page.html"}


def _files(workspace: Workspace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in workspace.folder.iterdir() if path.is_file()}


@pytest.fixture
def job(workspace: Workspace) -> Workspace:
    """A job with a suppression list and a file of addresses."""
    workspace.write_leads(make_leads(2))
    (workspace.folder / "never.csv").write_text("never.example\n")
    (workspace.folder / "addresses.csv").write_text("json://127.0.0.1:1/hook\n")
    (workspace.folder / "hard.csv").hardlink_to(workspace.folder / "never.csv")
    workspace.write_job(**JOB_FILES)
    return workspace


@pytest.fixture
def finished_job(job: Workspace, api: SandboxApi) -> Workspace:
    """The same job after a run, which `collect` needs."""
    job.write_job(suppress="never.csv")
    assert job.run_in_process("run", "job.yaml", api=api).exit_code == 0
    job.write_job(**JOB_FILES)
    return job


@in_turn(
    ("command", "output"),
    [
        *(("run", output) for output in ("never.csv", "./never.csv", "hard.csv", "addresses.csv", "rejects.csv")),
        *((command, output) for command in ("check", "plan", "collect") for output in ("hard.csv", "rejects.csv")),
    ],
)
def test_output_is_a_file_of_the_job(finished_job: Workspace, api: SandboxApi, command: str, output: str) -> None:
    """Refused before anything is sent, and the file stays."""
    before = _files(finished_job), api.audit()["accepted"]
    result = finished_job.run_in_process(command, "job.yaml", "--output", output, api=api)
    assert (result.exit_code, "are the same file" in result.stderr) == (2, True), result.stderr
    assert (_files(finished_job), api.audit()["accepted"]) == before


@in_turn(
    "changed",
    [
        {"suppress": "never.prom", "metrics": "never.prom"},
        {"metrics": "job.prom", "ledger": "job.prom"},
        {"ledger": "out.csv"},
        {"suppress": "x.html", "report": "x.html"},
    ],
)
def test_keys_that_name_one_file(workspace: Workspace, api: SandboxApi, changed: dict[str, str]) -> None:
    """The same for the keys of the job file."""
    workspace.write_leads(make_leads(2))
    for name in ("never.prom", "x.html"):
        (workspace.folder / name).write_text("never.example\n")
    workspace.write_job(**changed)
    for command in ("check", "plan", "run"):
        result = workspace.run_in_process(command, "job.yaml", api=api)
        assert (result.exit_code, "are the same file" in result.stderr) == (2, True), result.stderr
    assert (workspace.folder / "never.prom").read_text() == "never.example\n"
    assert api.audit()["accepted"] == 0


@in_turn("name", ["out.csv", "new.csv"])
def test_ledger_is_a_file_of_the_job(workspace: Workspace, api: SandboxApi, name: str) -> None:
    """A new ledger is not created in place of the output or the input, which would stay."""
    workspace.write_leads(make_leads(1))
    command = ("run", "job.yaml", "--ledger", name, *(("--input", name) if name == "new.csv" else ()))
    result = workspace.run_in_process(*command, api=api)
    assert (result.exit_code, "are the same file" in result.stderr) == (2, True), result.stderr
    assert [path.name for path in workspace.folder.glob(f"{name}*")] == []


@in_turn("name", ["a.csv", "leads.csv", "never.csv", "rejects.csv", "page.html", ".enrich/job.db"])
def test_log_file_is_a_file_of_the_job(job: Workspace, api: SandboxApi, name: str) -> None:
    """No line is written, and no file is left behind."""
    before = _files(job)
    result = job.run_in_process("run", "job.yaml", "--output", "a.csv", "--log-file", name, api=api)
    assert result.exit_code == (5 if name in before else 2), result.stderr
    assert _files(job) == before
    assert not (job.folder / ".enrich" / "job.db").exists()


@in_turn("option", ["-o", "--rows"])
@in_turn("name", ["out.csv", "rejects.csv", "never.csv"])
def test_plan_is_a_file_of_the_job(job: Workspace, api: SandboxApi, option: str, name: str) -> None:
    """A plan is not saved in a file that the run writes or reads."""
    before = _files(job)
    result = job.run_in_process("plan", "job.yaml", option, name, api=api)
    assert (result.exit_code, "would replace" in result.stderr) == (2, True), result.stderr
    assert _files(job) == before

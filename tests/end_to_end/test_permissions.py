"""Folders that this user may not enter: every command names the file, and none has a traceback."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.workspace import SandboxApi, Workspace, make_leads

JOB_FILES = {"input": "in/leads.csv", "ledger": "state/job.db"}
COMMANDS = ("run", "plan", "check", "collect", "status", "report", "doctor", "explain --row 1")


@pytest.fixture
def closed(
    workspace: Workspace, request: pytest.FixtureRequest, api: SandboxApi, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Close a folder after a run of a job that has its files in folders. Root may enter every folder."""
    (workspace.folder / "in").mkdir()
    workspace.write_leads(make_leads(2), name=JOB_FILES["input"])
    workspace.write_job(**JOB_FILES)
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    folder = workspace.folder / str(request.param)

    def close(function: Callable[..., Any]) -> Callable[..., Any]:
        def closed_function(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, str | Path) and folder in Path(path).parents:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *args, **options)

        return closed_function

    monkeypatch.setattr(os, "stat", close(os.stat))
    monkeypatch.setattr(io, "open", close(io.open))
    return folder


@pytest.mark.parametrize(
    ("closed", "name", "commands"),
    [("in", "in/leads.csv", COMMANDS[:4]), ("state", "state/job.db", COMMANDS)],
    indirect=["closed"],
)
def test_closed_folders(
    workspace: Workspace, api: SandboxApi, closed: Path, name: str, commands: tuple[str, ...]
) -> None:
    """Refuses before anything is sent."""
    before = api.audit()["accepted"]
    for command in commands:
        first, *options = command.split()
        result = workspace.run_in_process(first, "job.yaml", *options, api=api)
        assert f"{workspace.folder / name}" in result.stdout + result.stderr, (command, closed)
        assert "Traceback" not in result.stderr, command
        assert result.exit_code in {3, 5}, (command, result.stderr)
    assert api.audit()["accepted"] == before


@pytest.mark.parametrize("closed", ["state"], indirect=True)
def test_plan_into_a_closed_folder(workspace: Workspace, api: SandboxApi, closed: Path) -> None:
    """Names the file of the plan."""
    workspace.write_job(input=JOB_FILES["input"])
    result = workspace.run_in_process("plan", "job.yaml", "-o", f"{closed}/plan.json", api=api)
    assert (result.exit_code, "plan.json: the plan cannot be written: Permission denied" in result.stderr) == (5, True)

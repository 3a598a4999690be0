"""Ugly files, each in a folder with a job and what is right for it, through the whole program."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from enrich.files.reader import InputTable
from enrich.files.values import text_frame
from enrich.job.spec import Input
from tests.support.workspace import SandboxApi, Workspace, serve_api

CASES = Path(__file__).parents[1] / "data" / "file_cases"


def prepare_case(name: str, folder: Path) -> tuple[Workspace, dict[str, Any]]:
    """Copy a case. Returns its workspace and what is expected of it."""
    target = shutil.copytree(CASES / name, folder / name)
    expected: dict[str, Any] = json.loads((target / "expected.json").read_text())
    for link, place in expected.get("links", {}).items():
        (target / link).symlink_to(place)
    return Workspace(target), expected


def read_statuses(path: Path) -> list[str]:
    """Read the status of each row of an output."""
    table = InputTable(path, Input(path=str(path)))
    return [status for frame in table.batches() for status in text_frame(frame).get_column("enrich_status")]


def check_case(name: str, folder: Path, api: SandboxApi) -> None:
    """Run a case and compare exit code, requests, rows and messages."""
    workspace, expected = prepare_case(name, folder)
    before = api.audit()["accepted"]

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    said = result.stdout + result.stderr

    assert result.exit_code == expected["exit_code"], said
    assert api.audit()["accepted"] - before == expected["requests"], said
    assert "Traceback" not in said
    for text in expected.get("says", []):
        assert text in said
    for text in expected.get("never_says", []):
        assert text not in said
    output = workspace.folder / expected.get("output", "out.csv")
    if "statuses" in expected:
        assert read_statuses(output) == expected["statuses"], said
    else:
        assert not output.exists()
    for link, place in expected.get("links", {}).items():
        assert str((workspace.folder / link).readlink()) == place


def test_every_case(tmp_path: Path) -> None:
    """Exit code, number of requests and the status of each row are right, and a refusal names the remedy."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        failures = []
        for folder in sorted(CASES.iterdir()):
            try:
                check_case(folder.name, tmp_path, api)
            except AssertionError as failure:
                failures.append(f"{folder.name}: {failure}")
    if failures:
        pytest.fail("\n\n".join(failures))

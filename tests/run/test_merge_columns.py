"""Merging into a CRM export: new values go to existing columns, and a miss blanks nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import polars as pl
import pytest

from tests.support.workspace import HEADER, JOB, SandboxApi, Workspace, both_backends, make_leads, serve_api

backend = both_backends

MERGE_JOB = JOB.replace("work_email: email", "Email: email")


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """Eight leads, half of them with an address, one with only spaces."""
    rows = make_leads(8)
    for number, row in enumerate(rows):
        row[3] = f"old{number}@crm.example" if number % 2 else ""
    rows[2][3] = "  "
    workspace.write_leads(rows)
    return workspace


def run_and_compare_emails(workspace: Workspace, api: SandboxApi, merge: str) -> tuple[list[str], list[str], list[str]]:
    """Run the job; return the column before and after, and the rows' statuses."""
    workspace.write_job(MERGE_JOB, merge=merge)
    with (workspace.folder / "leads.csv").open(newline="", encoding="utf-8") as file:
        before = [row["Email"] for row in csv.DictReader(file)]
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    rows = workspace.read_output()
    assert list(rows[0])[: len(HEADER)] == HEADER
    return before, [row["Email"] for row in rows], [row["enrich_status"] for row in rows]


def test_fill_blank_cells(workspace: Workspace, api: SandboxApi) -> None:
    """Existing values stay, blanks are filled with matches, and a miss keeps the exact text."""
    before, after, status = run_and_compare_emails(workspace, api, "fill_empty")
    assert {"found", "not_found"} <= set(status)
    for old, new, result in zip(before, after, status, strict=True):
        if result == "found" and not old.strip():
            assert "@" in new
            assert not new.startswith("old")
        else:
            assert new == old


def test_overwrite_with_matches(workspace: Workspace, api: SandboxApi) -> None:
    """Matches replace existing values, and a miss blanks nothing."""
    before, after, status = run_and_compare_emails(workspace, api, "overwrite")
    for old, new, result in zip(before, after, status, strict=True):
        assert (new == old) is (result != "found")
        assert new or not old


def test_name_clash_without_merge(workspace: Workspace, api: SandboxApi) -> None:
    """Without merge, a clash of names is an error whose hint names the option, and nothing is spent."""
    workspace.write_job(MERGE_JOB)
    result = workspace.run_in_process("run", "job.yaml", api=api)
    assert (result.exit_code, "merge: fill_empty" in result.stderr) == (2, True)
    assert api.audit()["accepted"] == 0


def test_only_if_empty_with_merge(workspace: Workspace, api: SandboxApi) -> None:
    """Rows that have an address are neither sent nor changed."""
    workspace.write_job(MERGE_JOB, merge="fill_empty", only_if_empty="[Email]")
    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    assert (result.exit_code, result.json_output["submitted"], result.json_output["filtered"]) == (0, 4, 4)
    assert [row["Email"] for row in workspace.read_output()][1::2] == [
        f"old{number}@crm.example" for number in (1, 3, 5, 7)
    ]


def test_new_columns_with_merge(workspace: Workspace, api: SandboxApi) -> None:
    """A column that is not in the input is added behind it."""
    both = "{Email: email, found_email: email}"
    workspace.write_job(JOB.replace("columns:\n  work_email: email", f"columns: {both}"), merge="overwrite")
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    for row in workspace.read_output():
        assert not row["found_email"] or row["found_email"] == row["Email"]


def test_input_formulas_are_unchanged(tmp_path: Path) -> None:
    """Only new values are escaped for spreadsheets; input formulas keep their exact text."""
    workspace = Workspace(tmp_path)
    rows = make_leads(6)
    for row in rows[:3]:
        row[4] = "=1+1"
    workspace.write_leads(rows)
    job = JOB.replace("work_email: email", "Note: email")
    with serve_api(tmp_path / "api.db") as api:
        workspace.write_job(job, merge="fill_empty")
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
        assert [row["Note"] for row in workspace.read_output()][:3] == ["=1+1"] * 3
        workspace.write_job(job, merge="fill_empty", output="out.parquet")
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    assert pl.read_parquet(tmp_path / "out.parquet")["Note"].to_list()[:3] == ["=1+1"] * 3


@pytest.mark.long
def test_merged_output_as_next_input(workspace: Workspace, api: SandboxApi) -> None:
    """A merged output used as input sends nothing and stays as it is."""
    workspace.write_job(MERGE_JOB, merge="fill_empty")
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    first = (workspace.folder / "out.csv").read_text(encoding="utf-8")
    paid = api.audit()["accepted"]
    assert (
        workspace.run_in_process("run", "job.yaml", "--input", "out.csv", "--output", "again.csv", api=api).exit_code
        == 0
    )
    assert (workspace.folder / "again.csv").read_text(encoding="utf-8") == first
    assert api.audit()["accepted"] == paid

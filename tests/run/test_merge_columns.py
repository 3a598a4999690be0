"""Merging into a CRM export: new values go to existing columns, and a miss blanks nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import polars as pl
import pytest

from tests.support.cases import first_quick
from tests.support.workspace import BOTH_BACKENDS, HEADER, JOB, SandboxApi, Workspace, make_leads, serve_api

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


@BOTH_BACKENDS
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


#: Leads of JSON Lines with cells of all types in the merged column, and how the output begins.
TYPED_CELLS = ["5", "1.50", "null", "[1]", "{}", "true", '"old@crm.example"', '" "', '""']


@pytest.mark.parametrize("merge", first_quick(1, ["fill_empty", "overwrite"]))
@pytest.mark.parametrize("cells", first_quick(1, [TYPED_CELLS, ['"a"', "null"]]))
def test_cells_without_a_match_keep_their_json(
    tmp_path: Path, workspace: Workspace, merge: str, cells: list[str]
) -> None:
    """Cells of JSON Lines that get no value keep their type. In other formats a null is null, or blank."""
    lines = [
        f'{{"First Name": "Ada", "Last Name": "L{number}", "Website": "lovelace.example", "Email": {cell}'
        for number, cell in enumerate(cells)
    ]
    (workspace.folder / "leads.jsonl").write_text("".join(f"{line}}}\n" for line in lines))
    workspace.write_job(MERGE_JOB, merge=merge, input="leads.jsonl", output="out.jsonl")
    texts = [json.loads(cell) if cell[0] in '"n' else cell for cell in cells]
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
        written = (workspace.folder / "out.jsonl").read_text().splitlines()
        assert [line[: line.index(', "enrich_status"')] for line in written] == lines
        for ending in ("csv", "parquet"):
            collected = workspace.run_in_process("collect", "job.yaml", "--output", f"out.{ending}", api=api)
            assert collected.exit_code == 0
    assert pl.read_parquet(workspace.folder / "out.parquet")["Email"].to_list() == texts
    assert [row["Email"] for row in workspace.read_output()] == [text or "" for text in texts]


@pytest.mark.parametrize("merge", first_quick(1, ["overwrite", "fill_empty"]))
def test_matches_replace_json_cells(tmp_path: Path, workspace: Workspace, merge: str) -> None:
    """A match is a string among cells of other types."""
    cells = [None, 5, "old@crm.example", [], [1]]
    leads = [
        {"First Name": "Ada", "Last Name": f"L{n}", "Website": "a.example", "Email": c} for n, c in enumerate(cells)
    ]
    (workspace.folder / "leads.jsonl").write_text("".join(json.dumps(lead) + "\n" for lead in leads))
    workspace.write_job(MERGE_JOB, merge=merge, input="leads.jsonl", output="out.jsonl")
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    found = [json.loads(line)["Email"] for line in (workspace.folder / "out.jsonl").read_text().splitlines()]
    kept = [cell for cell in found if cell in cells]
    assert kept == ([5, "old@crm.example", [1]] if merge == "fill_empty" else [])
    assert all("@" in cell for cell in found if cell not in cells)


@pytest.mark.parametrize("merge", first_quick(1, ["fill_empty", "overwrite"]))
def test_parquet_columns_without_a_match(tmp_path: Path, workspace: Workspace, merge: str) -> None:
    """A column of text keeps its nulls and blanks. One of another type becomes text, and a null stays null."""
    frame = pl.DataFrame(
        {
            "First Name": ["Ada", "Ada"],
            "Last Name": ["L1", "L2"],
            "Website": ["a.example", "a.example"],
            "Email": ["", None],
            "Note": pl.Series([1.5, None]),
        }
    )
    frame.write_parquet(workspace.folder / "leads.parquet")
    job = MERGE_JOB.replace("Email: email", "Email: email\n  Note: email")
    workspace.write_job(job, merge=merge, input="leads.parquet", output="out.parquet")
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    found = pl.read_parquet(workspace.folder / "out.parquet").select(frame.columns)
    assert found.equals(frame.with_columns(Note=pl.Series(["1.5", None])))


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

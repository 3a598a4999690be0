"""Misspelled names of a job are found by what the API says, or has said, before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cases import first_quick
from tests.support.ledger import run_sql
from tests.support.table_files import write_table
from tests.support.workspace import SandboxApi, Workspace, make_leads, serve_api

PARAMS = "{{{}: First Name, last_name: Last Name, company: {{column: [Website, Email], transform: [domain]}}}}"
TYPOS = [
    ({"columns": "{work_email: emial}"}, "columns.work_email", "`email`"),
    ({"columns": "{work_email: emial.0}"}, "columns.work_email", "`email`"),
    ({"columns": "{work_email: email, ok: $is_verifed}"}, "columns.ok", "`$is_verified`"),
    ({"columns": "{work_email: email, by: $step.0.provider}"}, "columns.by", "`$steps`"),
    ({"params": PARAMS.format("frist_name")}, "params.frist_name", "`first_name`"),
    ({"params": PARAMS.format("vorname")}, "params.vorname", "`first_name`"),
    ({"enrichments": "[834]"}, "enrichments.0", "833"),
    ({"email_verifier": "11"}, "email_verifier", "10"),
    ({"waterfall": "email_geter"}, "waterfall", "`email_getter`"),
]


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """Make a job with leads to be paid for."""
    workspace.write_leads(make_leads(30))
    return workspace


@pytest.mark.parametrize(("changed", "place", "nearest"), first_quick(2, TYPOS))
def test_typo_is_refused(
    api: SandboxApi, workspace: Workspace, changed: dict[str, str], place: str, nearest: str
) -> None:
    """Exit 2 with file, line and nearest name, in one message; nothing is sent, and no execution is kept."""
    workspace.write_job(**changed)
    key = place.partition(".")[0]
    text = workspace.job_file.read_text().splitlines()
    line = next(number for number, words in enumerate(text, 1) if words.startswith(f"{key}:"))

    for command in (["check", "--online"], ["plan"], ["run", "--yes"]):
        result = workspace.run_in_process(command[0], "job.yaml", *command[1:], api=api)
        assert result.exit_code == 2, result.stderr
        assert f"job.yaml:{line}: {place}: " in result.stderr
        assert nearest in result.stderr.partition("hint: ")[2]
        assert result.stderr.count("error: ") == 1
    assert api.audit()["accepted"] == 0
    assert workspace.run_in_process("status", "job.yaml", "--json").json_output["executions"] == []
    assert not (workspace.folder / "out.csv").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("changed", "place", "nearest"), [typo for typo in TYPOS if typo[1][:6] in ("column", "params")]
)
def test_snapshot_warns(workspace: Workspace, changed: dict[str, str], place: str, nearest: str) -> None:
    """By the built-in documentation alone a typo is a warning with the nearest name, exit 0."""
    workspace.write_job(**changed)
    result = workspace.run_in_process("check", "job.yaml")
    assert (result.exit_code, result.stderr.count("note: ")) == (0, 1), result.stderr
    assert place in result.stderr
    assert f"did you mean {nearest}?" in result.stderr


@pytest.mark.long
def test_remembered_list_refuses(api: SandboxApi, workspace: Workspace) -> None:
    """What the API said at the last run decides without network; the answers of a ledger are right, too."""
    workspace.write_job(waterfall="company_lookup", params="{company_website: Website}", columns="{it: revenue}")
    assert workspace.run_in_process("run", "job.yaml", "--limit", "9", api=api).exit_code == 0
    workspace.write_job(waterfall="company_lookup", params="{company_website: Website}", columns="{it: revenu}")
    assert workspace.run_in_process("check", "job.yaml").exit_code == 2

    run_sql(workspace.ledger_path, "UPDATE attempts SET answer = replace(answer, 'revenue', 'revenu')")
    for command in (["check"], ["check", "--online"], ["run", "--limit", "0"]):
        assert workspace.run_in_process(command[0], "job.yaml", *command[1:], api=api).exit_code == 0


@pytest.mark.long
def test_earlier_names_stay_right(api: SandboxApi, workspace: Workspace) -> None:
    """A field that the API no longer lists, but listed at the last run, is right: its answers are in the ledger."""
    assert workspace.run_in_process("run", "job.yaml", "--limit", "1", api=api).exit_code == 0
    added = "json_insert(description, '$.output_fields[#]', json('{\"name\": \"mobile\"}'))"
    run_sql(workspace.ledger_path, f"UPDATE targets SET description = {added}")
    workspace.write_job(columns="{work_email: email, phone: mobile}")
    assert workspace.run_in_process("run", "job.yaml", "--limit", "0", api=api).exit_code == 0


@pytest.mark.long
def test_paths_beside_the_result(tmp_path: Path, workspace: Workspace) -> None:
    """`$`-paths fill columns and make no match: the same rows are found with them and without."""
    workspace.write_job(
        columns="{work_email: email, ok: $is_verified, first: $steps.0.provider, all: $enrichment_data}",
        email_verifier="10",
    )
    with serve_api(tmp_path / "misses.db", miss_kinds=("null_result",)) as api:
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
        assert result.exit_code == 0, result.stderr
        rows = workspace.read_output()
        found = [row for row in rows if row["enrich_status"] == "found"]
        assert any(row["ok"] == "true" for row in found)
        assert all(row["first"] and row["all"] for row in found)

        workspace.write_job(columns="{ok: $is_verified, first: $steps.0.provider}", email_verifier="10")
        again = workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output
        assert (again["submitted"], again["found"], again["not_found"]) == (0, 0, 30)


def test_path_hint(api: SandboxApi, workspace: Workspace) -> None:
    """A wrong input names the job file, and the path that is right from there."""
    jobs = workspace.folder / "jobs"
    jobs.mkdir()
    workspace.job_file.rename(jobs / "job.yaml")
    for command in (["check", "jobs/job.yaml"], ["run", "jobs/job.yaml"]):
        result = workspace.run_in_process(*command, api=api)
        assert result.exit_code == 5
        assert "jobs/job.yaml:2: input: " in result.stderr
        assert "hint: a path in the job file is relative to that file: write ../leads.csv" in result.stderr
        assert result.stderr.count("error: ") == 1
    (workspace.folder / "leads.csv").unlink()
    for name in ("none.csv", "leads.csv"):  # the second is the text of the job file
        given = workspace.run_in_process("run", "jobs/job.yaml", "--input", name, api=api)
        assert (given.exit_code, "relative to" in given.stderr) == (5, False)


def test_one_cause_is_one_message(workspace: Workspace) -> None:
    """An input that has no column of the job, because of its separator or as a whole, is one error."""
    for text, hint in (("First Name;Last Name;Website;Email\n", 'separated by ";"'), ("a,b\n1,2\n", "the right file")):
        (workspace.folder / "leads.csv").write_text(text)
        result = workspace.run_in_process("check", "job.yaml")
        assert (result.exit_code, result.stderr.count("error: ")) == (2, 1), result.stderr
        assert hint in result.stderr
    write_table(workspace.folder / "leads.xlsx", ["a", "b"], [["1", "2"]])
    workspace.write_job(input="leads.xlsx")
    assert "the right file and `sheet`" in workspace.run_in_process("check", "job.yaml").stderr


def test_columns_that_are_all_misspelled(workspace: Workspace) -> None:
    """Where the input has similar columns, each is suggested: it is not another file."""
    (workspace.folder / "leads.csv").write_text("first name,lastname,website,e-mail\n")
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code == 2
    assert all(f"did you mean `{name}`?" in result.stderr for name in ("first name", "lastname", "website"))

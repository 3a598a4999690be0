"""The files beside the output: what to mend and feed back, and what is new since the last time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.workspace import BOTH_BACKENDS_SERVER_LONG, SandboxApi, Workspace, make_leads, serve_api


@pytest.fixture(params=BOTH_BACKENDS_SERVER_LONG)
def backend(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[SandboxApi]:
    """An API that finds everybody."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as served:
        yield served


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """Six leads, of which one cannot be asked."""
    rows = make_leads(6)
    rows[3][0] = ""
    workspace.write_leads(rows)
    return workspace


def run_and_read_changes(workspace: Workspace, api: SandboxApi, *words: str) -> list[dict[str, str]]:
    """Run, and read the change feed."""
    result = workspace.run_in_process("run", "job.yaml", "--json", *words, api=api)
    assert result.exit_code == 0, result.stderr
    changes = workspace.read_output("changes.csv")
    assert result.json_output["changed"] == len(changes)
    return changes


@pytest.mark.long
def test_rejects_can_be_corrected_and_rerun(workspace: Workspace, api: SandboxApi) -> None:
    """They have the input's columns and the reason; mended, they are asked and nobody else is."""
    workspace.write_job(rejects="rejects.csv")
    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    assert (result.exit_code, result.json_output["rejected"]) == (0, 1)
    (reject,) = workspace.read_output("rejects.csv")
    assert reject["Last Name"] == "Last3"
    assert (reject["enrich_status"], "first_name is empty" in reject["enrich_error"]) == ("invalid", True)
    assert (workspace.folder / "rejects.csv").stat().st_mode & 0o777 == 0o600

    mended = workspace.folder / "mended.csv"
    text = (workspace.folder / "rejects.csv").read_text(encoding="utf-8")
    mended.write_text(text.replace("\n,Last3", "\nFirst3,Last3"), encoding="utf-8")
    result = workspace.run_in_process(
        "run", "job.yaml", "--input", "mended.csv", "--output", "m.csv", "--json", api=api
    )

    assert (result.exit_code, result.json_output["submitted"], result.json_output["rejected"]) == (0, 1, 0)
    assert workspace.read_output("rejects.csv") == []


def test_failed_rows_are_rejects(tmp_path: Path) -> None:
    """Those that the API failed are there with what it said."""
    workspace = Workspace(tmp_path)
    workspace.write_job(rejects="rejects.csv")
    workspace.write_leads(make_leads(4))
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    assert result.exit_code == 10
    rejects = workspace.read_output("rejects.csv")
    assert len(rejects) == result.json_output["rejected"] == 4
    assert all(row["enrich_status"] == "failed" and row["enrich_error"] for row in rejects)


def test_change_feed_reports_each_value_once(workspace: Workspace, api: SandboxApi) -> None:
    """One line a field with its key, and no line twice."""
    workspace.write_job(changes="{path: changes.csv, key: [Last Name, Note]}")
    changes = run_and_read_changes(workspace, api)
    found = [row for row in workspace.read_output() if row["enrich_status"] == "found"]
    assert [(line["Last Name"], line["Note"], line["field"], line["old"], line["new"]) for line in changes] == [
        (row["Last Name"], row["Note"], "work_email", "", row["work_email"]) for row in found
    ]
    assert found
    assert all(line["provider"] and line["at"].endswith("Z") for line in changes)

    assert run_and_read_changes(workspace, api) == []


def test_already_enriched_lead_appears_in_change_feed(workspace: Workspace, api: SandboxApi) -> None:
    """The CRM has not heard of it under this key, though nothing is paid for."""
    workspace.write_job(changes="{path: changes.csv, key: Note}")
    run_and_read_changes(workspace, api)
    rows = make_leads(3)
    rows.append([*rows[0][:4], "the same lead in another record"])
    workspace.write_leads(rows)

    changes = run_and_read_changes(workspace, api)

    result = {line["Note"] for line in changes}
    first = next(row for row in workspace.read_output() if row["Note"] == "note 0")
    assert result == ({"the same lead in another record"} if first["work_email"] else set())
    assert api.audit()["accepted"] == 5


@pytest.mark.long
def test_change_feed_after_refresh(workspace: Workspace, api: SandboxApi) -> None:
    """Only what is another value now is a change."""
    workspace.write_job(changes="changes.csv")
    run_and_read_changes(workspace, api)
    workspace.write_job(changes="changes.csv", policy="{refresh: {found: 0s, not_found: 0s}}")
    # The sandbox knows the same people: the answers are newer, the values are not.
    assert run_and_read_changes(workspace, api) == []


@pytest.mark.long
def test_change_feed_with_merge(workspace: Workspace, api: SandboxApi) -> None:
    """With merge the feed compares with the cell that the CRM has."""
    rows = make_leads(6)
    for row in rows:
        row[3] = "stale@crm.example"
    workspace.write_leads(rows)
    text = workspace.write_job(merge="overwrite", changes="{path: changes.csv, key: Note}").read_text(encoding="utf-8")
    workspace.job_file.write_text(text.replace("work_email: email", "Email: email"), encoding="utf-8")

    changes = run_and_read_changes(workspace, api)

    found = {row["Note"]: row["Email"] for row in workspace.read_output() if row["enrich_status"] == "found"}
    assert {line["Note"]: (line["field"], line["old"], line["new"]) for line in changes} == {
        note: ("Email", "stale@crm.example", email) for note, email in found.items()
    }


@pytest.mark.long
def test_unwritten_change_feed_is_repeated(workspace: Workspace, api: SandboxApi) -> None:
    """What nobody could read was not told."""
    workspace.write_job(changes="feeds/changes.csv")
    (workspace.folder / "feeds" / "changes.csv").mkdir(parents=True)
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 5
    (workspace.folder / "feeds" / "changes.csv").rmdir()
    assert workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output["changed"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"changes": "{path: changes.csv, key: [Nota]}"}, "no column `Nota`"),
        ({"rejects": "out.csv"}, "written twice"),
        ({"rejects": "x.csv", "changes": "x.csv"}, "written twice"),
        ({"rejects": "leads.csv"}, "replace the input"),
        ({"rejects": "alias/out.csv"}, "it is `output`"),
        ({"suppress": "never.csv", "rejects": "never.csv"}, "it is `suppress`"),
        ({"rejects": "feed.csv", "changes": "feed.csv"}, "it is `rejects`"),
    ],
)
def test_invalid_change_feed_config(
    workspace: Workspace, api: SandboxApi, replaced: dict[str, str], words: str
) -> None:
    """Exit 2, with the key of the job file."""
    (workspace.folder / "alias").symlink_to(workspace.folder)
    (workspace.folder / "never.csv").write_text("nobody.example\n")
    workspace.write_job(**replaced)
    result = workspace.run_in_process("run", "job.yaml", api=api)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
    assert api.audit()["accepted"] == 0


@pytest.mark.long
def test_collect_does_not_overwrite_rejects(workspace: Workspace, api: SandboxApi) -> None:
    """An output from the command line must not replace the rejects."""
    workspace.write_job(rejects="rejects.csv")
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    result = workspace.run_in_process("collect", "job.yaml", "--output", "rejects.csv")
    assert (result.exit_code, "written twice" in result.stderr) == (2, True)
    assert len(workspace.read_output("rejects.csv")) == 1

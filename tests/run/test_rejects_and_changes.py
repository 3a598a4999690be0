"""Files beside the output: rejects to correct and send again, and the feed of new values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from enrich.run.output import write_changes
from tests.end_to_end.test_steps import SHORT_JOB
from tests.files.test_formats import TYPED
from tests.support.workspace import BOTH_BACKENDS, JOB, SandboxApi, Workspace, make_leads, serve_api


@pytest.fixture
def api(tmp_path: Path) -> Iterator[SandboxApi]:
    """An API that finds everyone."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as served:
        yield served


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """Six leads, one of them invalid."""
    rows = make_leads(6)
    rows[3][0] = ""
    workspace.write_leads(rows)
    return workspace


def run_and_read_changes(workspace: Workspace, api: SandboxApi, *words: str) -> list[dict[str, str]]:
    """Run the job and return the change feed."""
    result = workspace.run_in_process("run", "job.yaml", "--json", *words, api=api)
    assert result.exit_code == 0, result.stderr
    changes = workspace.read_output("changes.csv")
    assert result.json_output["changed"] == len(changes)
    return changes


@pytest.mark.long
def test_rejects_can_be_corrected_and_rerun(workspace: Workspace, api: SandboxApi) -> None:
    """Rejects have the input's columns and the reason; once corrected, only they are sent."""
    workspace.write_job(rejects="rejects.csv")
    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    assert (result.exit_code, result.json_output["rejected"]) == (0, 1)
    (reject,) = workspace.read_output("rejects.csv")
    assert reject["Last Name"] == "Last3"
    assert (reject["enrich_status"], "first_name blank (First Name)" in reject["enrich_error"]) == ("invalid", True)
    assert (workspace.folder / "rejects.csv").stat().st_mode & 0o777 == 0o600

    mended = workspace.folder / "mended.csv"
    text = (workspace.folder / "rejects.csv").read_text(encoding="utf-8")
    mended.write_text(text.replace("\n,Last3", "\nFirst3,Last3"), encoding="utf-8")
    result = workspace.run_in_process(
        "run", "job.yaml", "--input", "mended.csv", "--output", "m.csv", "--json", api=api
    )

    assert (result.exit_code, result.json_output["submitted"], result.json_output["rejected"]) == (0, 1, 0)
    assert workspace.read_output("rejects.csv") == []


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "xlsx", "parquet"])
@pytest.mark.parametrize("blank", ["", "Ada"])
def test_rejects_and_changes_of_typed_columns(workspace: Workspace, api: SandboxApi, kind: str, blank: str) -> None:
    """Both files can be written of columns of any type, without rows, too. Those of a Parquet file keep their type."""
    typed = pl.DataFrame({name: cells for name, cells in TYPED.items() if name != "bytes"})
    names = {
        "First Name": [blank, "Ada"],
        "Last Name": ["Byron", "Lovelace"],
        "Website": ["engine.example"] * 2,
        "Email": "",
    }
    typed.with_columns(pl.DataFrame(names)).write_parquet(workspace.folder / "leads.parquet")
    files = {"rejects": f"rejects.{kind}", "changes": f"{{path: changes.{kind}, key: [float, short, money]}}"}
    workspace.write_job(input="leads.parquet", **files)
    for changed in (1 if blank == "" else 2, 0):
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
        assert result.exit_code == 0, result.stderr
        assert (result.json_output["rejected"], result.json_output["changed"]) == (int(blank == ""), changed)
    if kind == "parquet":
        schema = pl.read_parquet_schema(workspace.folder / "rejects.parquet")
        assert {name: schema[name] for name in typed.columns} == typed.schema


def test_failed_rows_are_rejects(tmp_path: Path) -> None:
    """Rows that the API failed are rejects with its message."""
    workspace = Workspace(tmp_path)
    workspace.write_job(rejects="rejects.csv")
    workspace.write_leads(make_leads(4))
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    assert result.exit_code == 10
    rejects = workspace.read_output("rejects.csv")
    assert len(rejects) == result.json_output["rejected"] == 4
    assert all(row["enrich_status"] == "failed" and row["enrich_error"] for row in rejects)


@BOTH_BACKENDS
@pytest.mark.long
def test_change_feed_reports_each_value_once(workspace: Workspace, api: SandboxApi) -> None:
    """The change feed has one line a field with its key, and never repeats it."""
    workspace.write_job(changes="{path: changes.csv, key: [Last Name, Note]}")
    changes = run_and_read_changes(workspace, api)
    found = [row for row in workspace.read_output() if row["enrich_status"] == "found"]
    assert [(line["Last Name"], line["Note"], line["field"], line["old"], line["new"]) for line in changes] == [
        (row["Last Name"], row["Note"], "work_email", "", row["work_email"]) for row in found
    ]
    assert found
    assert all(line["provider"] and line["at"].endswith("Z") for line in changes)

    assert run_and_read_changes(workspace, api) == []


@pytest.mark.long
def test_already_enriched_lead_appears_in_change_feed(workspace: Workspace, api: SandboxApi) -> None:
    """An enriched lead under a new key is in the feed at no cost, because the CRM has no value under that key."""
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
    """After a refresh only values that differ are changes."""
    workspace.write_job(changes="changes.csv")
    run_and_read_changes(workspace, api)
    workspace.write_job(changes="changes.csv", policy="{refresh: {found: 0s, not_found: 0s}}")
    # The sandbox's answers are newer but have the same values.
    assert run_and_read_changes(workspace, api) == []


@BOTH_BACKENDS
@pytest.mark.long
def test_change_feed_with_merge(workspace: Workspace, api: SandboxApi) -> None:
    """With merge, the feed compares new values with the input's cells."""
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


def test_other_key_columns_begin_anew(workspace: Workspace, api: SandboxApi) -> None:
    """With another key, each record is in the feed: equal cells in another column, or another order, name others."""
    rows = [[*row[:3], str(5 - number), str(number)] for number, row in enumerate(make_leads(6))]
    workspace.write_leads(rows)
    for key in (["Note"], ["Email"], ["Email", "Note"], ["Note", "Email"]):
        workspace.write_job(changes=f"{{path: changes.csv, key: [{', '.join(key)}]}}")

        changes = run_and_read_changes(workspace, api)

        expected = [[row[name] for name in (*key, "work_email")] for row in workspace.read_output()]
        assert [[line[name] for name in (*key, "new")] for line in changes] == expected
        assert {line["old"] for line in changes} == {""}
        assert run_and_read_changes(workspace, api) == []


def test_renamed_columns_without_a_key(workspace: Workspace, api: SandboxApi) -> None:
    """Without `key` a lead is recognized by what is sent, whatever the names of the columns are."""
    job = workspace.write_job(changes="changes.csv")
    assert run_and_read_changes(workspace, api)
    path = workspace.folder / "leads.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("First Name", "Vorname"), encoding="utf-8")
    job.write_text(job.read_text(encoding="utf-8").replace("First Name", "Vorname"), encoding="utf-8")

    assert run_and_read_changes(workspace, api) == []


#: The change feed of the tests below.
FEED = "{path: changes.csv, key: Note}"


def lines_of(changes: list[dict[str, str]]) -> list[tuple[str, str, str, str]]:
    """Return key, field, old and new of each line."""
    return [(line["Note"], line["field"], line["old"], line["new"]) for line in changes]


def write_website(workspace: Workspace, website: str) -> None:
    """Write the input: one lead, at a company."""
    workspace.write_leads([["Ada", "Byron", website, "", "1"]])


@pytest.mark.parametrize("text", [JOB, pytest.param(SHORT_JOB, marks=pytest.mark.long)], ids=["job", "steps"])
def test_params_that_change_and_change_back(workspace: Workspace, api: SandboxApi, text: str) -> None:
    """Each value that differs from the last one in the feed is in it, with that one as `old`, also an earlier one."""
    workspace.write_job(text, changes=FEED)
    fields = ["work_email", "link"] if text == SHORT_JOB else ["work_email"]
    before = dict.fromkeys(fields, "")
    seen = []
    for website in ("a.example", "b.example", "a.example"):
        write_website(workspace, website)
        changes = run_and_read_changes(workspace, api)
        (row,) = workspace.read_output()
        assert lines_of(changes) == [("1", name, before[name], row[name]) for name in fields]
        before = {name: row[name] for name in fields}
        seen.append(before)
        assert run_and_read_changes(workspace, api) == []
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.long
def test_same_value_for_other_params(workspace: Workspace, api: SandboxApi) -> None:
    """A value that other params have found, too, is not new."""
    workspace.write_job(changes=FEED)
    write_website(workspace, "a.example")
    run_and_read_changes(workspace, api)
    write_website(workspace, "b.example")
    workspace.write_job()
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    workspace.sql("UPDATE attempts SET answer = (SELECT answer FROM attempts WHERE id = 1)")
    workspace.write_job(changes=FEED)
    assert run_and_read_changes(workspace, api) == []
    assert workspace.sql("SELECT attempt_id FROM delivered") == [(2,)]


@pytest.mark.long
def test_column_that_is_added_or_reads_another_field(workspace: Workspace, api: SandboxApi) -> None:
    """The values of a new column are delivered for old results, and those of a column with another path."""
    job = {"waterfall": "company_lookup", "params": "{company_website: Website}", "changes": FEED}
    write_website(workspace, "a.example")
    workspace.write_job(**job, columns="{size: employees}")
    run_and_read_changes(workspace, api)
    size = workspace.read_output()[0]["size"]
    workspace.write_job(**job, columns="{size: employees, link: linkedin}")
    changes = run_and_read_changes(workspace, api)
    link = workspace.read_output()[0]["link"]
    assert lines_of(changes) == [("1", "link", "", link)]
    workspace.write_job(**job, columns="{size: linkedin}")
    assert lines_of(run_and_read_changes(workspace, api)) == [("1", "size", size, link)]
    assert run_and_read_changes(workspace, api) == []
    assert api.audit()["accepted"] == 1


@pytest.mark.long
def test_other_merge(workspace: Workspace, api: SandboxApi) -> None:
    """A cell of the input that stayed is in the feed once `merge` replaces it."""
    text = workspace.write_job(merge="fill_empty", changes=FEED).read_text(encoding="utf-8")
    text = text.replace("work_email: email", "Email: email")
    workspace.job_file.write_text(text, encoding="utf-8")
    workspace.write_leads([["Ada", "Byron", "a.example", "old@crm.example", "1"]])
    assert run_and_read_changes(workspace, api) == []
    workspace.job_file.write_text(text.replace("fill_empty", "overwrite"), encoding="utf-8")
    changes = run_and_read_changes(workspace, api)
    assert lines_of(changes) == [("1", "Email", "old@crm.example", workspace.read_output()[0]["Email"])]
    assert run_and_read_changes(workspace, api) == []


@pytest.mark.long
def test_leads_with_the_same_key(workspace: Workspace, api: SandboxApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leads that the key does not tell apart are each in the feed, once, in one batch or in several."""
    monkeypatch.setattr("enrich.ledger.queries.MAX_ANSWER_CHARACTERS", 2000)
    workspace.write_job(changes=FEED)
    rows = [[*row[:4], ""] for row in make_leads(8)]
    workspace.write_leads(rows)
    changes = run_and_read_changes(workspace, api)
    assert [line["new"] for line in changes] == [row["work_email"] for row in workspace.read_output()]
    assert {line["old"] for line in changes} == {""}
    assert run_and_read_changes(workspace, api) == []
    workspace.write_leads([*rows[:3], *rows[4:]])
    assert run_and_read_changes(workspace, api) == []


@BOTH_BACKENDS
@pytest.mark.long
def test_change_feed_after_erasure(workspace: Workspace, api: SandboxApi) -> None:
    """`forget` erases what the feed has of a person. `purge` leaves no value: the next one has no `old`."""
    workspace.write_job(changes=FEED)
    workspace.write_leads(make_leads(2))
    assert len(run_and_read_changes(workspace, api)) == 2
    forget = ("forget", "job.yaml", "--match", "First Name=First0", "--yes")
    assert workspace.run_in_process(*forget, api=api).exit_code == 0
    assert len(workspace.sql("SELECT * FROM delivered")) == 1
    assert run_and_read_changes(workspace, api) == []
    assert workspace.run_in_process("purge", "job.yaml", "--older-than", "0s", "--yes").exit_code == 0
    assert run_and_read_changes(workspace, api) == []
    (_, lead) = make_leads(2)
    lead[2] = "other.example"
    workspace.write_leads([lead])
    changes = run_and_read_changes(workspace, api)
    assert lines_of(changes) == [("note 1", "work_email", "", workspace.read_output()[0]["work_email"])]


@BOTH_BACKENDS
@pytest.mark.long
def test_end_between_change_feed_and_its_record(
    workspace: Workspace, api: SandboxApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the program ends after the feed was written and before it is recorded, the next feed has the same lines."""
    workspace.write_job(changes=FEED)

    def write_and_end(*arguments: Any) -> int:
        write_changes(*arguments)
        raise SystemExit

    with monkeypatch.context() as patched, suppress(SystemExit):
        patched.setattr("enrich.run.output.write_changes", write_and_end)
        workspace.run_in_process("run", "job.yaml", api=api)
    lost = workspace.read_output("changes.csv")
    assert len(lost) == 5
    assert run_and_read_changes(workspace, api) == lost
    assert run_and_read_changes(workspace, api) == []


@pytest.mark.long
def test_unwritten_change_feed_is_repeated(workspace: Workspace, api: SandboxApi) -> None:
    """A feed that was not written is repeated by the next run."""
    workspace.write_job(changes="feeds/changes.csv")
    (workspace.folder / "feeds" / "changes.csv").mkdir(parents=True)
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 5
    (workspace.folder / "feeds" / "changes.csv").rmdir()
    assert workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output["changed"]


def test_output_is_written_and_the_feed_is_not(
    workspace: Workspace, api: SandboxApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The summary names the output that was written, and the error how to get the other file."""
    workspace.write_job(changes="feeds/changes.csv")
    feeds = workspace.folder / "feeds"

    def block_and_write(*arguments: Any) -> int:
        feeds.rmdir()
        feeds.write_text("")
        return write_changes(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("enrich.run.output.write_changes", block_and_write)
        result = workspace.run_in_process("run", "job.yaml", "--json", "--summary", api=api)
    assert (result.exit_code, result.json_output["output"]) == (1, str(workspace.folder / "out.csv"))
    assert (result.json_output["changes"], len(workspace.read_output())) == (None, 6)
    assert "No output written" not in result.stderr
    assert "check its folder; the ledger has the results: the next run writes the file" in result.stderr
    feeds.unlink()
    assert workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output["changed"] == 5


@pytest.mark.long
@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"changes": "{path: changes.csv, key: [Nota]}"}, "no column `Nota`"),
        ({"rejects": "out.csv"}, "are the same file"),
        ({"rejects": "x.csv", "changes": "x.csv"}, "are the same file"),
        ({"rejects": "leads.csv"}, "are the same file"),
        ({"rejects": "alias/out.csv"}, "and `output` are the same file"),
        ({"suppress": "never.csv", "rejects": "never.csv"}, "and `suppress` are the same file"),
        ({"rejects": "feed.csv", "changes": "feed.csv"}, "and `rejects` are the same file"),
    ],
)
def test_invalid_change_feed_config(
    workspace: Workspace, api: SandboxApi, replaced: dict[str, str], words: str
) -> None:
    """An invalid change feed is exit 2 with the job file's key."""
    (workspace.folder / "alias").symlink_to(workspace.folder)
    (workspace.folder / "never.csv").write_text("nobody.example\n")
    workspace.write_job(**replaced)
    result = workspace.run_in_process("run", "job.yaml", api=api)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
    assert api.audit()["accepted"] == 0


@pytest.mark.long
def test_collect_does_not_overwrite_rejects(workspace: Workspace, api: SandboxApi) -> None:
    """`collect` with an output that is the rejects file is refused."""
    workspace.write_job(rejects="rejects.csv")
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    result = workspace.run_in_process("collect", "job.yaml", "--output", "rejects.csv")
    assert (result.exit_code, "are the same file" in result.stderr) == (2, True)
    assert len(workspace.read_output("rejects.csv")) == 1

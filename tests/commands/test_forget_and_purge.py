"""Forgetting a person and purging old answers: erased from the ledger, still recorded as paid, never sent again."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from enrich.job.job import Overrides, load_job
from enrich.ledger import queries
from enrich.ledger.verify import check_ledger
from tests.support.cases import in_turn
from tests.support.ledger import run_sql
from tests.support.workspace import BOTH_BACKENDS, SandboxApi, Workspace, make_leads, serve_api


@pytest.fixture
def workspace(workspace: Workspace, api: SandboxApi) -> Workspace:
    """Make a job with six leads, three of them answered."""
    workspace.write_leads(make_leads(6))
    assert workspace.run_in_process("run", "job.yaml", "--limit", "3", api=api).exit_code == 0
    return workspace


def ledger_bytes(workspace: Workspace) -> bytes:
    """Return all bytes of the ledger's files, or of all tables on a server."""
    if workspace.server_url:
        tables = workspace.sql("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
        return repr([workspace.sql(f"SELECT * FROM {table}") for (table,) in tables]).encode()
    return b"".join(path.read_bytes() for path in workspace.ledger_path.parent.glob("job.db*"))


def forget_matching(workspace: Workspace, *matches: str) -> int:
    """Forget the matching leads; return the number of forgotten requests."""
    options = [word for match in matches for word in ("--match", match)]
    result = workspace.run_in_process("forget", "job.yaml", *options, "--yes", "--json")
    assert result.exit_code == 0, result.stderr
    return int(result.json_output["requests"])


def test_unusable_input_is_named(workspace: Workspace) -> None:
    """A column that only the input may have is not called unknown when the input cannot be read."""
    (workspace.folder / "leads.csv").unlink()
    result = workspace.run_in_process("forget", "job.yaml", "--match", "Note=x", "--yes")
    assert (result.exit_code, "leads.csv does not exist" in result.stderr) == (5, True), result.stderr
    assert forget_matching(workspace, "First Name=First1", "Last Name=Last1") == 1


@BOTH_BACKENDS
@pytest.mark.long
def test_forgotten_lead_is_not_in_ledger_files(workspace: Workspace) -> None:
    """Overwrites params, answer, task and error on disk, not only unlinked; the ledger's sums still agree."""
    email = workspace.read_output()[1]["work_email"]
    assert email.encode() in ledger_bytes(workspace)
    assert b"First1" in ledger_bytes(workspace)

    assert forget_matching(workspace, "First Name= first1 ", "Last Name=LAST1") == 1

    for trace in (
        b"First1",
        b"company1.example",
        email.encode(),
        workspace.read_output()[1]["enrich_task_id"].encode(),
    ):
        assert trace not in ledger_bytes(workspace)
    assert b"First0" in ledger_bytes(workspace)
    assert check_ledger(workspace.ledger_location).problems == []


@pytest.mark.long
def test_group_of_forgotten_lead_is_erased(workspace: Workspace, api: SandboxApi) -> None:
    """Erases the per-group limit's record of the lead's group."""
    workspace.write_job(caps="{by: Note, max: 1}")
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    forget_matching(workspace, "First Name=First1")
    assert b"note 1" not in ledger_bytes(workspace)


@BOTH_BACKENDS
@pytest.mark.long
def test_open_reader_delays_erasure(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open reader (a long report, say) delays erasure: that is reported, and the next call completes it."""
    command = ("forget", "job.yaml", "--match", "First Name=First1", "--yes")
    with closing(workspace.open_ledger()) as report, report.snapshot(), monkeypatch.context() as patch:
        patch.setattr("enrich.ledger.sqlite.BUSY_TIMEOUT_S", 0.1)
        patch.setattr("enrich.ledger.postgres.VACUUM_TIMEOUT_S", 0.1)
        assert queries.state_counts(report)
        refused = workspace.run_in_process(*command)
    kept = workspace.server_url is not None or b"First1" in ledger_bytes(workspace)  # not seen in a server's tables
    second = workspace.run_in_process(*command)

    assert (refused.exit_code, kept, second.exit_code) == (5, True, 0)
    assert "is in use by another command" in refused.stderr
    assert b"First1" not in ledger_bytes(workspace)


@BOTH_BACKENDS
def test_forgotten_lead_is_not_sent_again(workspace: Workspace, api: SandboxApi) -> None:
    """Neither the next run nor `--retry` sends the request; the row has the reason, and its cost stays recorded."""
    spent = workspace.run_in_process("status", "job.yaml", "--json").json_output["credits_spent"]
    assert forget_matching(workspace, "First Name=First1") == 1
    assert forget_matching(workspace, "First Name=First4") == 1

    result = workspace.run_in_process("run", "job.yaml", "--json", "--retry", "failed,expired,in_doubt", api=api)

    assert (result.exit_code, result.json_output["submitted"], result.json_output["filtered"]) == (0, 2, 2)
    rows = workspace.read_output()
    assert [row["enrich_error"] for row in (rows[1], rows[4])] == ["erased by `enrich forget`"] * 2
    assert rows[1]["work_email"] == rows[4]["work_email"] == ""
    audit = api.audit()
    assert audit["accepted"] == 5
    now = workspace.run_in_process("status", "job.yaml", "--json").json_output["credits_spent"]
    assert now == pytest.approx(audit["credits_charged"]) != spent


@pytest.mark.long
def test_lead_found_by_params_or_result(workspace: Workspace) -> None:
    """Finds a lead by a param, by its source column, and by the e-mail that was found."""
    by_answer = workspace.read_output()[2]["work_email"]
    workspace.write_leads(make_leads(1, start=50))

    assert forget_matching(workspace, "first_name=First0") == 1
    assert forget_matching(workspace, "Last Name=Last1", "First Name=First1") == 1
    assert forget_matching(workspace, f"work_email={by_answer}") == 1
    assert forget_matching(workspace, f"Email={by_answer}") == 0


@in_turn(
    "data",
    [
        [{"name": "Bob"}, {"name": "Ada", "email": "Ada@Engine.example"}],
        {"people": [{"contact": {"emails": ["x@y.example", "ada@engine.example"]}}]},
        {"result": {"email": None}, "steps": [], "enrichment_data": {"Mailhound": {"email": "ada@engine.example"}}},
    ],
)
@in_turn("name", ["Email", "work_email"])
def test_address_anywhere_in_a_result(tmp_path: Path, name: str, data: object) -> None:
    """An address is found in every row of a list, at any depth, and beside the result, by the name of any column."""
    workspace = Workspace(tmp_path)
    with serve_api(tmp_path / "api.db") as api:
        workspace.write_job()
        workspace.write_leads(make_leads(2))
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    workspace.sql("UPDATE attempts SET answer = ? WHERE id = 2", json.dumps({"data": data}))

    assert forget_matching(workspace, f"{name}=ada@engine.example") == 1
    assert b"ngine.example" not in ledger_bytes(workspace)


@pytest.mark.long
def test_multiple_matches_are_combined_with_and(workspace: Workspace) -> None:
    """Multiple `--match` are combined with AND."""
    assert forget_matching(workspace, "First Name=First1", "Last Name=Last2") == 0


@pytest.mark.long
def test_no_match_is_an_error(workspace: Workspace) -> None:
    """Reports an error when no lead matches, so that a typo is noticed."""
    result = workspace.run_in_process("forget", "job.yaml", "--match", "Frist Name=First1", "--yes")
    assert (result.exit_code, "did you mean `First Name`?" in result.stderr) == (2, True)
    assert workspace.run_in_process("forget", "job.yaml", "--match", "First1", "--yes").exit_code == 2
    two_people = ("--match", "First Name=First1", "--match", "First Name=First2", "--yes")
    result = workspace.run_in_process("forget", "job.yaml", *two_people)
    assert (result.exit_code, "one person after the other" in result.stderr) == (2, True), result.stderr


@pytest.mark.long
@pytest.mark.parametrize("options", [("forget", "--match", "First Name=First1"), ("purge", "--older-than", "1d")])
def test_forget_requires_yes_without_terminal(workspace: Workspace, options: tuple[str, ...]) -> None:
    """Requires `--yes` when there is no terminal for a prompt."""
    result = workspace.run_subprocess(options[0], "job.yaml", *options[1:])
    assert (result.exit_code, "--yes" in result.stderr) == (2, True)
    assert b"First1" in ledger_bytes(workspace)


@pytest.mark.long
def test_open_request_is_not_forgotten(tmp_path: Path) -> None:
    """Refuses while a request is open: its answer would be stored later. Collect it first."""
    workspace = Workspace(tmp_path)
    workspace.write_job()
    workspace.write_leads(make_leads(2))
    with serve_api(tmp_path / "api.db", latency="fixed(600)") as api:
        workspace.submit_without_collecting(api)
        result = workspace.run_in_process("forget", "job.yaml", "--match", "First Name=First1", "--yes")
        named = ("--ledger", ".enrich/job.db", "--match", "First Name=First1", "--yes")
        of_ledger = workspace.run_in_process("forget", "job.yaml", *named)
    assert (result.exit_code, "still running at Databar" in result.stderr) == (5, True)
    assert result.stderr.endswith("hint: collect it with `enrich run job.yaml --limit 0`, then run this again\n")
    assert "with `enrich run job.yaml --ledger .enrich/job.db --limit 0`" in of_ledger.stderr


def test_open_sandbox_request_is_not_forgotten(workspace: Workspace) -> None:
    """Names the sandbox in the command that collects a request of its ledger."""
    workspace.write_leads(make_leads(2))
    assert workspace.run_in_process("run", "job.yaml", "--sandbox").exit_code == 0
    job = load_job(workspace.job_file, Overrides(sandbox=True))
    run_sql(job.ledger, "UPDATE requests SET state = 'submitted'")

    result = workspace.run_in_process("forget", "job.yaml", "--match", "First Name=First1", "--yes")

    assert result.exit_code == 5
    assert f"{job.ledger}: 1 request of this person still running" in result.stderr
    assert "with `enrich run job.yaml --sandbox --limit 0`" in result.stderr


@pytest.mark.long
def test_missing_hash_key_blocks_run(workspace: Workspace, api: SandboxApi) -> None:
    """Refuses to run without the hash key, which is needed to recognize forgotten leads."""
    forget_matching(workspace, "First Name=First1")
    workspace.ledger_path.with_name("job.db.key").unlink()

    result = workspace.run_in_process("run", "job.yaml", api=api)

    assert (result.exit_code, "job.db.key" in result.stderr) == (5, True)
    assert api.audit()["accepted"] == 3


@pytest.mark.long
@pytest.mark.parametrize("key", [None, b"", b"x" * 100, bytes(32)])
def test_wrong_hash_key_is_refused(workspace: Workspace, api: SandboxApi, key: bytes | None) -> None:
    """Refuses a wrong hash key for runs and for forgetting: a forgotten lead would be sent again."""
    forget_matching(workspace, "First Name=First1")
    path = workspace.ledger_path.with_name("job.db.key")
    path.unlink()
    if key is not None:
        path.write_bytes(key)

    run = workspace.run_in_process("run", "job.yaml", api=api)
    second = workspace.run_in_process("forget", "job.yaml", "--match", "First Name=First2", "--yes")

    assert (run.exit_code, second.exit_code) == (5, 5)
    assert "job.db.key" in run.stderr
    assert "job.db.key" in second.stderr
    assert api.audit()["accepted"] == 3


@pytest.mark.long
@pytest.mark.parametrize("change", [{"email_verifier": "10"}, {"enrichments": "[701]"}, {"dedupe": "false"}])
def test_duplicates_of_forgotten_lead(workspace: Workspace, api: SandboxApi, change: dict[str, str]) -> None:
    """Forgets every spelling and duplicate of the same request."""
    forget_matching(workspace, "First Name=First1")
    workspace.write_leads([*make_leads(6), make_leads(2)[1]])
    workspace.write_job(**change)

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert (result.exit_code, result.json_output["filtered"]) == (0, 2)
    assert sum(run["accepted"] for run in api.audit()["runs"] if run["params"]["first_name"] == "First1") == 1


@pytest.mark.long
def test_purged_lead_can_be_forgotten(workspace: Workspace, api: SandboxApi) -> None:
    """Finds a purged lead by its input row, because the ledger no longer has its params."""
    workspace.run_in_process("purge", "job.yaml", "--older-than", "0s", "--yes")
    assert forget_matching(workspace, "First Name=First1") == 1
    workspace.write_job(email_verifier="10")
    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    assert (result.exit_code, result.json_output["filtered"]) == (0, 1)


def test_purged_answers_are_not_resent(workspace: Workspace, api: SandboxApi) -> None:
    """Erases the values from ledger and output, and keeps the record of payment."""
    emails = [row["work_email"] for row in workspace.read_output()[:3]]

    result = workspace.run_in_process("purge", "job.yaml", "--older-than", "0s", "--yes", "--json")

    assert (result.exit_code, result.json_output["requests"]) == (0, 3)
    assert not any(email.encode() in ledger_bytes(workspace) for email in emails if email)
    assert b"First1" not in ledger_bytes(workspace)
    second = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    assert (second.json_output["submitted"], second.json_output["reused"]) == (3, 3)
    assert all("purged" in row["enrich_error"] and not row["work_email"] for row in workspace.read_output()[:3])
    assert check_ledger(workspace.ledger_location).problems == []


@BOTH_BACKENDS
@pytest.mark.long
def test_purged_answers_can_be_refreshed(workspace: Workspace, api: SandboxApi) -> None:
    """Sends purged leads again when policy.refresh applies, with params from the input."""
    before = workspace.read_output()
    workspace.run_in_process("purge", "job.yaml", "--older-than", "0s", "--yes")
    workspace.write_job(policy="{refresh: {found: 0s, not_found: 0s}}")

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert (result.exit_code, result.json_output["submitted"]) == (0, 6)
    assert [row["work_email"] for row in workspace.read_output()[:3]] == [row["work_email"] for row in before[:3]]
    assert check_ledger(workspace.ledger_location).problems == []


@BOTH_BACKENDS
@pytest.mark.long
def test_purge_keeps_recent_answers(workspace: Workspace) -> None:
    """Keeps answers that are not old enough."""
    assert (
        workspace.run_in_process("purge", "job.yaml", "--older-than", "1d", "--yes", "--json").json_output["requests"]
        == 0
    )
    assert b"First1" in ledger_bytes(workspace)


@pytest.mark.long
def test_explain_purged_answers(workspace: Workspace) -> None:
    """Shows the history without the erased values."""
    workspace.run_in_process("purge", "job.yaml", "--older-than", "0s", "--yes")
    output = workspace.run_in_process("explain", "job.yaml", "--row", "2", "--json").json_output
    (row,) = output["rows"]
    assert (row["status"], "purged" in row["why"]) == (workspace.read_output()[1]["enrich_status"], True)
    assert [attempt["answer"] for attempt in row["request"]["attempts"]] == [None]


def test_unknown_name_lists_each_column_once(workspace: Workspace) -> None:
    """The hint has each name once, though a column of the input is also that of a param."""
    result = workspace.run_in_process("forget", "job.yaml", "--match", "Zip Code=1", "--yes")
    assert result.exit_code == 2
    (hint,) = (line.removeprefix("hint: known: ") for line in result.stderr.splitlines() if "hint:" in line)
    assert len(set(hint.split(", "))) == len(hint.split(", ")) > 1


@pytest.mark.parametrize(
    "condition", [{}, {"where": "Note <> 'note 6'"}, {"only_if_empty": "[Note]"}, {"suppress": "never.txt"}]
)
def test_lead_that_was_never_sent(workspace: Workspace, api: SandboxApi, condition: dict[str, str]) -> None:
    """Later runs skip a lead that no run has sent, also one that the job's conditions leave out today."""
    (workspace.folder / "never.txt").write_text("company6.example\n")
    workspace.write_leads(make_leads(7))
    workspace.write_job(**condition)
    command = ("forget", "job.yaml", "--match", "First Name=First6", "--yes")
    unconfirmed = workspace.run_in_process(*command[:-1])
    assert "Later runs skip 1 request of this person. None is in the ledger. Without a terminal" in unconfirmed.stderr
    result = workspace.run_in_process(*command)
    assert result.stdout == "0 requests erased; later runs skip 1 more that are not in the ledger\n"
    again = workspace.run_in_process(*command[:-1], "--json")  # nothing is left to confirm
    assert again.json_output == {"exit_code": 0, "requests": 0, "never_sent": 0}
    workspace.write_job()
    assert workspace.run_job(api).submitted == 3
    assert workspace.read_output()[6]["enrich_status"] == "filtered"


def test_rehearsal_promises_nothing_about_real_runs(tmp_path: Path) -> None:
    """What only the ledger of the sandbox has not sent yet is not said to be barred from real runs."""
    workspace = Workspace(tmp_path)
    workspace.write_leads(make_leads(2))
    workspace.write_job()
    assert workspace.run_in_process("run", "job.yaml", "--sandbox").exit_code == 0
    workspace.write_leads(make_leads(3))
    result = workspace.run_in_process("forget", "job.yaml", "--match", "First Name=First2", "--yes")
    assert result.stdout == "0 requests erased\n"

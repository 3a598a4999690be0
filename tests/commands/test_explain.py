"""`enrich explain`: the complete history of one lead, from input and ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from enrich.commands.explain_history import describe_next_step
from enrich.job.spec import Policy, Refresh
from enrich.ledger.lock import lock_ledger
from enrich.models import State
from enrich.run.context import RunOptions
from tests.support.cases import in_turn
from tests.support.workspace import (
    BOTH_BACKENDS,
    SandboxApi,
    Workspace,
    clock_ahead,
    kill_process,
    make_leads,
    serve_api,
    wait_until,
)

DAY = 86_400


def explain_json(workspace: Workspace, *options: str) -> dict[str, Any]:
    """Return the JSON output."""
    result = workspace.run_in_process("explain", "job.yaml", *options, "--json")
    assert result.exit_code == 0, result.stderr
    assert (next(iter(result.json_output)), result.json_output["exit_code"]) == ("exit_code", 0)
    return result.json_output


def explain_text(workspace: Workspace, *options: str) -> str:
    """Return the text output."""
    result = workspace.run_in_process("explain", "job.yaml", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def only_row(explanation: dict[str, Any]) -> dict[str, Any]:
    """Return the only explained row."""
    (row,) = explanation["rows"]
    found: dict[str, Any] = row
    return found


@BOTH_BACKENDS
@pytest.mark.long
def test_explain_matches_output(tmp_path: Path, workspace: Workspace) -> None:
    """For found, missed and failed rows: status, provider, price, task, time and answer equal the output."""
    workspace.write_leads(make_leads(30))
    with serve_api(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0) as api:
        workspace.run_job(api)

    seen = set()
    for number, output in enumerate(workspace.read_output(), start=1):
        row = only_row(explain_json(workspace, "--row", str(number)))
        seen.add(output["enrich_status"])
        assert row["status"] == output["enrich_status"]
        attempt = row["request"]["attempts"][-1]
        assert attempt["task_id"] == output["enrich_task_id"]
        assert attempt["settled_at"] == output["enrich_at"]
        assert (attempt["provider"] or "") == output["enrich_provider"]
        assert attempt["credits"] == float(output["enrich_credits"])
        assert ((attempt["answer"] or {}).get("email") or "") == output["work_email"]
        assert (row["why"] or "") == output["enrich_error"]
        assert row["params"]["first_name"] == output["First Name"]
        if number > 12 and len(seen) == 3:
            break
    assert seen == {"found", "not_found", "failed"}


@pytest.mark.long
def test_explain_text(api: SandboxApi, workspace: Workspace) -> None:
    """Shows params with their source cells, the intent, the task, the answer, the price and the next step."""
    workspace.write_leads(make_leads(12))
    workspace.run_job(api)
    number = next(n for n, row in enumerate(workspace.read_output(), start=1) if row["work_email"])
    output = workspace.read_output()[number - 1]

    text = explain_text(workspace, "--row", str(number))

    assert text.startswith(f"row {number}: found\n")
    assert f"company{number - 1}.example'  from Website: 'https://www.company{number - 1}.example/about'" in text
    for word in ("recorded, at most", "credits reserved", f"accepted as task {output['enrich_task_id']}"):
        assert word in text
    assert f"{float(output['enrich_credits']):,.2f} credits, by {output['enrich_provider']}" in text
    assert f"email: {output['work_email']}" in text
    assert "final: the job has no policy.refresh for found" in text


@pytest.mark.long
def test_skipped_and_filtered_rows(api: SandboxApi, workspace: Workspace) -> None:
    """A skipped row names the param, a filtered row the rule."""
    workspace.write_job(only_if_empty="[Email]", where="Note <> 'out'")
    workspace.write_leads(
        [
            ["Ada", "", "engine.example", "", ""],
            ["Ada", "King", "engine.example", "ada@engine.example", ""],
            ["Ada", "King", "engine.example", "", "out"],
            ["Ada", "King", "engine.example", "", ""],
        ]
    )
    workspace.run_job(api)

    result = [only_row(explain_json(workspace, "--row", str(number))) for number in (1, 2, 3, 4)]

    assert [row["status"] for row in result[:3]] == ["invalid", "filtered", "filtered"]
    assert result[0]["why"] == "last_name blank (Last Name)"
    assert result[1]["why"] == "only_if_empty: Email has a value"
    assert result[2]["why"] == "where: Note <> 'out'"
    assert [row["request"] for row in result[:3]] == [None, None, None]
    assert result[3]["request"] is not None
    assert "row 2: filtered, only_if_empty: Email has a value" in explain_text(workspace, "--row", "2")
    assert "first_name  not sent  from First Name: 'Ada'" in explain_text(workspace, "--row", "1")


@pytest.mark.parametrize("has_run", [True, False])
def test_rows_over_the_cap(api: SandboxApi, workspace: Workspace, *, has_run: bool) -> None:
    """A row over `caps` is filtered as in the output, whether or not the ledger has its request; no run sends it."""
    workspace.write_job(caps="{by: company, max: 1}")
    workspace.write_leads(make_leads(1))
    workspace.run_job(api)
    row = make_leads(1)[0]
    workspace.write_leads([row, [f"{row[0]}x", *row[1:]]])
    if has_run:
        workspace.run_job(api)
    result = workspace.run_in_process("explain", "job.yaml", "--row", "2", "--json")
    (explained,) = result.json_output["rows"]
    assert (explained["status"], explained["why"]) == ("filtered", "over the per-group limit (caps)")
    assert (explained["request"] is not None) is has_run
    text = workspace.run_in_process("explain", "job.yaml", "--row", "2").stdout
    assert "row 2: filtered, over the per-group limit (caps)" in text
    assert "sends it" not in text


@BOTH_BACKENDS
def test_duplicate_rows(api: SandboxApi, workspace: Workspace) -> None:
    """Explains every matching row; letter case and surrounding spaces do not matter."""
    first, second = make_leads(2)
    workspace.write_leads([first, second, first, [" First0 ", *first[1:]]])
    workspace.run_job(api)

    result = explain_json(workspace, "--match", "First Name=fIRST0 ")

    assert [(row["row"], row["shared_with"]) for row in result["rows"]] == [(1, [3, 4]), (3, [1, 4]), (4, [1, 3])]
    assert (result["matches"], result["gone"]) == (3, [])
    assert len({row["fingerprint"] for row in result["rows"]}) == 1
    assert "same request as row 1, 4, charged once" in explain_text(workspace, "--row", "3")


@pytest.mark.long
def test_rows_without_dedupe(api: SandboxApi, workspace: Workspace) -> None:
    """With `dedupe: false` each occurrence has a request of its own and no related ones."""
    workspace.write_job(dedupe="false")
    workspace.write_leads(make_leads(1) * 2)
    workspace.run_job(api)

    first, second = explain_json(workspace, "--match", "First Name=First0")["rows"]

    assert first["request"]["attempts"][0]["task_id"] != second["request"]["attempts"][0]["task_id"]
    assert first["shared_with"] == second["shared_with"] == first["other_questions"] == []


def test_at_most_twenty_rows(workspace: Workspace) -> None:
    """Shows at most twenty rows and the total."""
    workspace.write_leads([[*row[:2], "engine.example", "", "same"] for row in make_leads(25)])

    result = explain_json(workspace, "--match", "Note=same")

    assert (result["matches"], len(result["rows"])) == (25, 20)
    assert "25 rows match; the first 20:" in explain_text(workspace, "--match", "Note=same")


def test_job_without_runs(workspace: Workspace) -> None:
    """Explains a row before any run, by the documentation of the API; creates no ledger."""
    workspace.write_leads([*make_leads(2), ["Ada", "", "engine.example", "", ""]])

    text = explain_text(workspace, "--row", "2")

    assert "job has never run (" in text
    assert "row 2: pending" in text
    assert "row 3: invalid, last_name blank (Last Name)" in explain_text(workspace, "--row", "3")
    assert not workspace.ledger_path.parent.exists()


@pytest.mark.long
def test_row_added_since_last_run(api: SandboxApi, workspace: Workspace) -> None:
    """Explains a row that was added after the last run."""
    workspace.write_leads(make_leads(1))
    workspace.run_job(api)
    workspace.write_leads(make_leads(2))

    assert "not sent yet; the next run sends it" in explain_text(workspace, "--row", "2")


@pytest.mark.long
def test_in_doubt_options(api: SandboxApi, workspace: Workspace) -> None:
    """Shows the unconfirmed attempt, its possible cost and both options; a retry is the next attempt of the history."""
    workspace.write_leads(make_leads(1))
    api.inject_fault("no-task-id")
    workspace.run_job(api)

    row = only_row(explain_json(workspace, "--row", "1"))
    assert row["status"] == "in_doubt"
    assert "--retry in_doubt" in row["request"]["outlook"]
    assert "--accept in_doubt" in row["request"]["outlook"]
    (first_attempt,) = row["request"]["attempts"]
    assert (first_attempt["task_id"], first_attempt["credits"]) == (None, None)
    assert "price unknown" in explain_text(workspace, "--row", "1")

    workspace.run_job(api, RunOptions(retry=frozenset({State.IN_DOUBT})))
    attempts = only_row(explain_json(workspace, "--row", "1"))["request"]["attempts"]
    assert [attempt["execution"] for attempt in attempts] == [1, 2]
    assert attempts[0] == first_attempt


@pytest.mark.long
def test_accepted_in_doubt(api: SandboxApi, workspace: Workspace) -> None:
    """Keeps the attempt in doubt; `--accept in_doubt` marks the request as failed."""
    workspace.write_leads(make_leads(1))
    api.inject_fault("no-task-id")
    workspace.run_job(api)
    workspace.run_job(api, RunOptions(accept_in_doubt=True))

    row = only_row(explain_json(workspace, "--row", "1"))

    assert row["status"] == "failed"
    assert row["request"]["attempts"][0]["state"] == "in_doubt"
    assert "marked as failed by --accept in_doubt" in row["request"]["outlook"]


@pytest.mark.long
def test_refreshed_lead_has_all_attempts(tmp_path: Path, workspace: Workspace) -> None:
    """Shows all attempts with their executions; the last match stays, and the next refresh has a date."""
    workspace.write_job(policy="{refresh: {found: 90d, not_found: 14d}}")
    workspace.write_leads(make_leads(1))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        for number in range(3):
            workspace.run_job(api, clock=clock_ahead(number * 100 * DAY))
            api.advance(100 * DAY)

    row = only_row(explain_json(workspace, "--row", "1"))

    assert [attempt["execution"] for attempt in row["request"]["attempts"]] == [1, 2, 3]
    assert {attempt["state"] for attempt in row["request"]["attempts"]} == {"found"}
    assert row["request"]["outlook"].startswith("sent again on ")
    assert row["request"]["outlook"].endswith("by policy.refresh (found: 90d)")
    workspace.write_job(policy="{refresh: {found: 100000d}}")
    assert only_row(explain_json(workspace, "--row", "1"))["request"]["outlook"].startswith("sent again on 2")


@pytest.mark.long
def test_last_match_is_kept_after_no_match(tmp_path: Path, workspace: Workspace) -> None:
    """The row is found, as in the output; the history includes the later miss."""
    workspace.write_job(policy="{refresh: {found: 90d}}")
    workspace.write_leads(make_leads(1))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.run_job(api)
        api.advance(100 * DAY)
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        workspace.run_job(api, clock=clock_ahead(100 * DAY))

    row = only_row(explain_json(workspace, "--row", "1"))

    assert row["status"] == workspace.read_output()[0]["enrich_status"] == "found"
    assert [attempt["state"] for attempt in row["request"]["attempts"]] == ["found", "not_found"]


@pytest.mark.long
def test_lead_no_longer_in_input(api: SandboxApi, workspace: Workspace) -> None:
    """Finds a removed lead by a job column, after its transforms; leads in the input don't count as removed."""
    workspace.write_leads(make_leads(3))
    workspace.run_job(api)
    workspace.write_leads(make_leads(2, start=1))

    for match in ("First Name=first0", "Website=http://COMPANY0.example/"):
        result = explain_json(workspace, "--match", match)
        assert (result["matches"], result["rows"]) == (0, [])
        (removed,) = result["gone"]
        assert removed["params"]["last_name"] == "Last0"
        assert len(removed["attempts"]) == 1
    text = explain_text(workspace, "--match", "First Name=first0")
    assert "No row of" in text
    assert "No longer in the input, but in the ledger:" in text
    assert explain_json(workspace, "--match", "First Name=First1")["gone"] == []
    assert explain_json(workspace, "--match", "Note=note 0")["gone"] == []


@pytest.mark.long
def test_requests_with_other_providers(api: SandboxApi, workspace: Workspace) -> None:
    """Other providers are another request; the lead's history includes both."""
    workspace.write_leads(make_leads(1))
    workspace.run_job(api)
    workspace.write_job(enrichments="[833]")
    workspace.run_job(api)

    row = only_row(explain_json(workspace, "--match", "Last Name=Last0"))

    assert row["request"]["enrichments"] == [833]
    (other,) = row["other_questions"]
    assert len(other["enrichments"]) > 1
    assert "other request for this lead" in explain_text(workspace, "--row", "1")


@BOTH_BACKENDS
@pytest.mark.long
def test_explain_during_run(tmp_path: Path, workspace: Workspace) -> None:
    """Shows until when an open task's result is kept; after a kill, it is collected by the next run."""
    workspace.write_leads(make_leads(1))
    with serve_api(tmp_path / "api.db", latency="fixed(3600)") as api:
        process = workspace.start_subprocess("run", "job.yaml", api=api)
        wait_until(lambda: api.audit()["accepted"] == 1)
        wait_until(lambda: workspace.open_task_count() == 1)
        text = explain_text(workspace, "--row", "1")
        kill_process(process)

    assert text.startswith("row 1: pending\n")
    assert "running at Databar; the result is kept until about " in text


@pytest.mark.parametrize(
    ("selection", "code", "message"),
    [
        ([], 2, "--row ROW or --match"),
        (["--row", "1", "--match", "Note=x"], 2, "--row ROW or --match"),
        (["--row", "0"], 2, "--row"),
        (["--row", "3"], 2, "the input has 2 rows"),
        (["--match", "Email"], 2, "COLUMN=VALUE"),
        (["--match", "First_Name=x"], 2, "did you mean `First Name`"),
    ],
)
def test_invalid_selection_is_exit_2(workspace: Workspace, selection: list[str], code: int, message: str) -> None:
    """Exits with 2 and a message with the valid form."""
    workspace.write_leads(make_leads(2))

    result = workspace.run_in_process("explain", "job.yaml", *selection)

    assert result.exit_code == code
    assert message in result.stderr


def test_column_name_with_equals_sign(workspace: Workspace) -> None:
    """Splits `--match` at the longest column name."""
    workspace.write_job(params="{first_name: a, last_name: a=b, company: c}")
    workspace.write_leads([["1", "2", "3"], ["b=2", "x", "y"]], header=["a", "a=b", "c"])

    assert [row["row"] for row in explain_json(workspace, "--match", "a=b=2")["rows"]] == [1]


@pytest.mark.long
def test_takes_no_lock_and_changes_nothing(api: SandboxApi, workspace: Workspace) -> None:
    """Takes no lock, uses no network, and leaves the ledger unchanged."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    before = workspace.ledger_path.read_bytes()
    calls = api.audit()["requests"]

    with lock_ledger(workspace.ledger_location, 0):
        explain_text(workspace, "--row", "1")

    assert workspace.ledger_path.read_bytes() == before
    assert api.audit()["requests"] == calls


@in_turn(
    ("state", "running", "message"),
    [
        (State.PENDING, False, "the next run with this lead sends it"),
        (State.SUBMITTING, True, "being sent now"),
        (State.SUBMITTING, False, "the next run marks it as unconfirmed"),
        (State.FAILED, False, "only with --retry failed"),
        (State.EXPIRED, False, "only with --retry expired"),
        (State.FOUND, False, "no policy.refresh for found"),
    ],
)
def test_every_state_has_next_step(state: State, running: bool, message: str) -> None:  # noqa: FBT001 - a table
    """Every state names the next step."""
    assert message in describe_next_step(state, [], Policy(refresh=Refresh()), 0, is_running=running)


def test_fields_of_a_step_that_has_never_run(workspace: Workspace) -> None:
    """A step may read fields that are not known yet: the job is not called wrong."""
    steps = "steps:\n  - {name: a, enrichment: 10, params: {email: Email}}\n"
    steps += "  - {name: b, enrichment: 80, params: {phone: status}}\n"
    workspace.write_job(f"version: 1\ninput: leads.csv\noutput: out.csv\n{steps}")
    workspace.write_leads(make_leads(1))
    result = workspace.run_in_process("explain", "job.yaml", "--row", "1")
    assert (result.exit_code, "the step `a` has never run" in result.stderr) == (5, True), result.stderr


def test_job_without_a_documented_param(workspace: Workspace) -> None:
    """Before the first run, a job may lack a param of the documentation: the row is explained by those it has."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(params="{first_name: First Name, company: Website}")
    result = workspace.run_in_process("explain", "job.yaml", "--row", "1")
    assert (result.exit_code, "has never run" in result.stdout) == (0, True), result.stderr

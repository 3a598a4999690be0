"""`policy.refresh` after `columns` have changed: what is a match is decided by today's columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.workspace import BOTH_BACKENDS, SandboxApi, Workspace, make_leads, serve_api

PARAMS = "{first_name: First Name, last_name: Last Name, company: Website}"
HEAD = """\
version: 1
input: leads.csv
output: out.csv
policy: {refresh: {AGES}}
limits: {requests_per_second: 1000}
"""
SINGLE = f"{HEAD}waterfall: email_getter\nparams: {PARAMS}\ncolumns: {{result: COLUMN}}\n"
STEPPED = f"""{HEAD}\
steps:
  - {{name: email, waterfall: email_getter, params: {PARAMS}, columns: {{result: COLUMN}}}}
"""
#: A place in the answer that none has.
ABSENT = "$enrichment_data.none.title"
#: An enrichment, whose answers name no provider: its source is that of each match.
ENRICHMENT = f"{HEAD}enrichment: 10\nparams: {{email: Email}}\ncolumns: {{result: COLUMN}}\n"
ENRICHMENT_STEP = f"""{HEAD}\
steps:
  - {{name: verify, enrichment: 10, params: {{email: Email}}, columns: {{result: COLUMN}}}}
"""
#: Another step has the same request.
SAME_REQUEST_TWICE = f"""{STEPPED}\
  - {{name: title, waterfall: email_getter, params: {PARAMS}, columns: {{title: {ABSENT}}}}}
"""
LEADS = 12


def write_job(workspace: Workspace, job: str, column: str, ages: str) -> None:
    """Write the job with the column of the result, and the ages of its refresh."""
    workspace.write_job(job.replace("COLUMN", column).replace("AGES", ages))


def matches(workspace: Workspace) -> list[str]:
    """Return the results that the output has."""
    assert workspace.run_in_process("collect", "job.yaml").exit_code == 0
    return [row["result"] for row in workspace.read_output()]


@BOTH_BACKENDS
@pytest.mark.long
@pytest.mark.parametrize("job", [SINGLE, STEPPED], ids=["single", "steps"])
def test_match_of_new_columns_is_not_bought_again(tmp_path: Path, workspace: Workspace, job: str) -> None:
    """An answer without the old column that has the new one is a match: no refresh of other answers buys it again."""
    workspace.write_leads(make_leads(LEADS))
    with serve_api(tmp_path / "api.db", hit_rate=0.5) as api:
        write_job(workspace, job, ABSENT, "not_found: 0s")
        first = workspace.run_job(api)
        write_job(workspace, job, "email", "not_found: 0s")
        before = matches(workspace)
        plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        again = workspace.run_job(api)
        after = [row["result"] for row in workspace.read_output()]
    assert workspace.run_in_process("ledger", "check", "job.yaml").exit_code == 0
    assert (first.submitted, first.found) == (LEADS, 0)
    assert 0 < sum(map(bool, before)) < LEADS
    assert plan["to_submit"] == again.submitted == LEADS - sum(map(bool, before))
    assert [value for value, known in zip(after, before, strict=True) if known] == [value for value in before if value]


@BOTH_BACKENDS
@pytest.mark.long
@pytest.mark.parametrize("job", [SINGLE, STEPPED], ids=["single", "steps"])
def test_match_of_new_columns_survives_a_miss(tmp_path: Path, workspace: Workspace, job: str) -> None:
    """A match by today's columns that is refreshed without a match stays the answer."""
    workspace.write_leads(make_leads(LEADS))
    state = tmp_path / "api.db"
    with serve_api(state, hit_rate=1.0) as api:
        write_job(workspace, job, ABSENT, "found: 0s, not_found: 0s")
        workspace.run_job(api)
    write_job(workspace, job, "email", "found: 0s, not_found: 0s")
    before = matches(workspace)
    with serve_api(state, hit_rate=0.0) as api:
        again = workspace.run_job(api)
        after = [row["result"] for row in workspace.read_output()]
    assert all(before)
    assert workspace.run_in_process("ledger", "check", "job.yaml").exit_code == 0
    assert (again.submitted, after) == (LEADS, before)


@BOTH_BACKENDS
@pytest.mark.long
@pytest.mark.parametrize("job", [SINGLE, STEPPED], ids=["single", "steps"])
def test_match_of_old_columns_has_the_age_of_no_match(tmp_path: Path, workspace: Workspace, job: str) -> None:
    """What was a match by other columns only is not bought again at the age of matches."""
    workspace.write_leads(make_leads(LEADS))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        write_job(workspace, job, "email", "found: 0s")
        workspace.run_job(api)
        write_job(workspace, job, ABSENT, "found: 0s")
        plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        assert (plan["to_submit"], workspace.run_job(api).submitted) == (0, 0)


@pytest.mark.long
@pytest.mark.parametrize("job", [SINGLE, STEPPED], ids=["single", "steps"])
@pytest.mark.parametrize(("old", "new", "ages"), [("email", ABSENT, "not_found: 0s"), (ABSENT, "email", "found: 0s")])
def test_answers_have_the_age_of_new_columns(  # noqa: PLR0917 - the fixtures and a case
    tmp_path: Path, workspace: Workspace, job: str, old: str, new: str, ages: str
) -> None:
    """What is a match, or no match, by today's columns only is sent again at the age of these."""
    workspace.write_leads(make_leads(LEADS))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        write_job(workspace, job, old, ages.replace("0s", "90d"))
        assert workspace.run_job(api).submitted == LEADS
        write_job(workspace, job, new, ages.replace("0s", "90d"))
        assert workspace.run_job(api).submitted == 0
        write_job(workspace, job, new, ages)
        plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        explained = workspace.run_in_process("explain", "job.yaml", "--row", "1").stdout
        again = workspace.run_job(api)
    assert workspace.run_in_process("ledger", "check", "job.yaml").exit_code == 0
    assert (plan["to_submit"], again.submitted) == (LEADS, LEADS)
    assert f"sent again by the next run, by policy.refresh ({ages})" in explained


@BOTH_BACKENDS
@pytest.mark.long
def test_request_of_two_steps_is_sent_once_in_a_run(workspace: Workspace, api: SandboxApi) -> None:
    """A step does not refresh what an earlier step of the same run has sent, though its columns are others."""
    workspace.write_leads(make_leads(LEADS))
    write_job(workspace, SAME_REQUEST_TWICE, "email", "found: 0s, not_found: 0s")
    assert [workspace.run_job(api).submitted for _ in range(2)] == [LEADS, LEADS]


@pytest.mark.parametrize(
    ("job", "column"), [(ENRICHMENT, "enrich_provider"), (ENRICHMENT_STEP, "enrich_verify_provider")]
)
@pytest.mark.parametrize(("old", "new", "source"), [(ABSENT, "status", "Mailproof"), ("status", ABSENT, "")])
def test_source_of_enrichment_is_at_the_matches_of_new_columns(  # noqa: PLR0917 - the fixtures and a case
    workspace: Workspace, api: SandboxApi, job: str, column: str, old: str, new: str, source: str
) -> None:
    """What is a match by today's columns has the enrichment's source as provider, in the change feed, too."""
    workspace.write_leads([[f"ada{number}@engine.example"] for number in range(LEADS)], ["Email"])
    job += "changes: {path: changes.csv, key: [Email]}\n"
    write_job(workspace, job, old, "found: 90d")
    workspace.run_job(api)
    write_job(workspace, job, new, "found: 90d")
    assert workspace.run_job(api).submitted == 0
    rows = workspace.read_output()
    assert [(bool(row["result"]), row[column]) for row in rows] == [(bool(source), source)] * LEADS
    changes = workspace.read_output("changes.csv")
    assert [change["provider"] for change in changes] == ([source] * LEADS if source else [])

"""Jobs with steps: suppressed, forgotten and purged leads stay so in every later step."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from enrich.models import State
from enrich.run.context import RunOptions
from tests.end_to_end.test_steps import HEADER, make_people, statuses_of
from tests.support.workspace import SandboxApi, Workspace, serve_api

#: A company, an e-mail address, a fallback that reads no company, and steps that read the address or nothing found.
JOB = """\
version: 1
input: leads.csv
output: out.csv
steps:
  - name: company
    waterfall: company_lookup
    params: {company_website: {column: Website, transform: [domain]}}
    columns: {clink: linkedin}
  - name: email
    waterfall: email_getter
    params: {first_name: First Name, last_name: Last Name, company: {column: Website, transform: [domain]}}
    columns: {work_email: email}
  - name: link
    waterfall: person_by_link
    only_if_empty: [work_email]
    params: {link: LinkedIn}
    columns: {work_email: work_email}
  - name: person
    waterfall: person_getter
    params: {email: work_email}
    columns: {plink: linkedin_url}
  - name: phone
    waterfall: phone_getter
    where: enrich_person_status <> 'not_found'
    params: {linkedin: LinkedIn}
    columns: {phone: phone}
limits: {requests_per_second: 1000}
"""
STEPS = ("company", "email", "link", "person", "phone")


def make_linked_people(count: int, companies: int | None = None) -> list[list[str]]:
    """Make leads that all have a profile link."""
    people = make_people(count, companies)
    for number, person in enumerate(people):
        person[-1] = f"https://profiles.example/in/{number}"
    return people


@pytest.fixture
def people(workspace: Workspace) -> Workspace:
    """Return a workspace with the job and six leads of three companies."""
    workspace.write_job(JOB)
    workspace.write_leads(make_linked_people(6, 3), HEADER)
    return workspace


def step_statuses(row: dict[str, str]) -> list[str]:
    """Return the status of a row in each step."""
    return [row[f"enrich_{step}_status"] for step in STEPS]


def test_suppressed_domain_is_left_out_of_all_steps(people: Workspace, api: SandboxApi) -> None:
    """A lead with a listed domain takes part in no step, also where the step does not read the domain."""
    (people.folder / "never.txt").write_text("company1.example\n")
    people.write_job(JOB + "suppress: never.txt\n")
    plan = people.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    assert [step["at_most"] for step in plan["steps"]] == [2, 4, 4, 4, 4]
    people.run_job(api)
    for row in people.read_output():
        is_listed = "company1.example" in row["Website"]
        assert (set(step_statuses(row)) == {"filtered"}) == is_listed
        assert (row["enrich_status"] == "filtered") == is_listed
        assert ("link: on a suppression list" in row["enrich_error"]) == is_listed


def test_suppressed_domain_that_a_step_found(people: Workspace, tmp_path: Path) -> None:
    """A listed domain that a step found leaves the lead out of all later steps, if any of them sends it."""
    people.write_job(JOB.replace("{link: LinkedIn}", "{link: clink}"))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        people.write_job(JOB[: JOB.index("  - name: email")])
        people.run_job(api)
        host = urlsplit("//" + people.read_output()[0]["clink"].partition("://")[2]).hostname
        (people.folder / "never.txt").write_text(f"{host}\n")
        people.write_job(JOB.replace("{link: LinkedIn}", "{link: clink}") + "suppress: never.txt\n")
        summary = people.run_job(api)
        rows = people.read_output()
    assert summary.submitted == 0
    assert {tuple(step_statuses(row)) for row in rows} == {("found", *["filtered"] * 4)}


def test_forgotten_person_is_sent_by_no_later_step(people: Workspace, tmp_path: Path) -> None:
    """After `forget` the person takes part in no step behind a forgotten request; colleagues stay as they are."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        people.run_job(api)
        before = people.read_output()
        result = people.run_in_process("forget", "job.yaml", "--match", "Last Name=Last1", "--yes", "--json")
        assert result.exit_code == 0
        plan = people.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        assert (plan["to_submit"], plan["cost"]["max"]) == (0, 0)
        summary = people.run_job(api)
        after = people.read_output()
    assert summary.submitted == 0
    assert [row for row in after if row["Last Name"] != "Last1"] == [
        row for row in before if row["Last Name"] != "Last1"
    ]
    assert step_statuses(after[1]) == ["found", *["filtered"] * 4]
    assert after[1]["enrich_error"].count("erased by `enrich forget`") == 4
    assert after[1]["work_email"] == after[1]["phone"] == ""


@pytest.mark.long
def test_sandbox_forgets_what_later_steps_have_sent(people: Workspace) -> None:
    """The address that one step found, and another has sent, is erased in the sandbox as in its ledger."""
    assert people.run_in_process("run", "job.yaml", "--sandbox", "--yes").exit_code in (0, 10)
    row = next(row for row in people.read_output("out.sandbox.csv") if row["work_email"])
    stored = sorted(people.ledger_path.parent.glob("job.sandbox*"))
    assert row["work_email"].encode() in b"".join(path.read_bytes() for path in stored)
    result = people.run_in_process("forget", "job.yaml", "--match", f"Last Name={row['Last Name']}", "--yes")
    assert result.exit_code == 0
    assert row["work_email"].encode() not in b"".join(path.read_bytes() for path in stored if path.exists())


def test_forgotten_person_who_was_never_sent(people: Workspace, api: SandboxApi) -> None:
    """A lead that `--limit` left over is in no step of later runs; what it shares with a colleague is sent for them."""
    people.run_job(api, RunOptions(limit=1))
    result = people.run_in_process("forget", "job.yaml", "--match", "Last Name=Last4", "--yes", "--json")
    assert result.json_output == {"exit_code": 0, "requests": 0, "never_sent": 3}
    people.run_job(api)
    rows = people.read_output()
    assert step_statuses(rows[4])[1:] == ["filtered"] * 4
    assert step_statuses(rows[1])[0] != "filtered" != step_statuses(rows[1])[1]


def test_purged_results_are_not_bought_by_fallbacks(people: Workspace, tmp_path: Path) -> None:
    """A column that is blank because its result was purged is no reason to send a fallback, nor what depends on it."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        people.run_job(api)
        assert people.run_in_process("purge", "job.yaml", "--older-than", "0s", "--yes").exit_code == 0
        plan = people.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        assert (plan["to_submit"], plan["cost"]["max"]) == (0, 0)
        assert people.run_job(api).submitted == 0
        for row in people.read_output():
            assert row["enrich_link_status"] == row["enrich_person_status"] == "filtered"
            for step in ("link", "person"):
                assert f"{step}: the result of `email` was purged" in row["enrich_error"]
        # With --retry the addresses are looked up again, and the later steps build on them.
        summary = people.run_job(api, RunOptions(retry=frozenset({State.FOUND})))
        rows = people.read_output()
    assert [step["submitted"] for step in summary.steps] == [3, 6, 0, 6, 6]
    assert statuses_of(rows, "person") == {"found": 6}


def test_purged_result_that_was_none(people: Workspace, tmp_path: Path) -> None:
    """A purged result without a match is known: the fallback that was sent stays, and a new one may be sent."""
    fallback = JOB[JOB.index("  - name: link") : JOB.index("  - name: person")]
    people.write_job(JOB.replace(fallback, ""))
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        people.run_job(api)
        assert people.run_in_process("purge", "job.yaml", "--older-than", "0s", "--yes").exit_code == 0
        people.write_job(JOB)
        assert [step["submitted"] for step in people.run_job(api).steps] == [0, 0, 6, 0, 0]


def test_colleague_of_a_forgotten_person(people: Workspace, tmp_path: Path) -> None:
    """A colleague who was not in the input loses the request about the company, which is erased, but no other."""
    leads = make_linked_people(6, 3)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        people.run_job(api)
        people.write_leads(leads[:1], HEADER)
        people.run_in_process("forget", "job.yaml", "--match", "Last Name=Last0", "--yes")
        people.write_leads(leads, HEADER)
        assert people.run_job(api).submitted == 0
        rows = people.read_output()
    assert set(step_statuses(rows[0])) == {"filtered"}
    assert step_statuses(rows[3]) == ["filtered", "found", "filtered", "found", "found"]


@pytest.mark.long
@pytest.mark.parametrize("merge", ["overwrite", "fill_empty"])
def test_purged_value_of_a_merged_column(people: Workspace, tmp_path: Path, merge: str) -> None:
    """The cell of the input is not sent in place of a purged value that had replaced it. One that stayed is known."""
    leads = make_linked_people(6, 3)
    for number, lead in enumerate(leads[:3]):
        lead[3] = f"old{number}@elsewhere.example"
    people.write_leads(leads, HEADER)
    people.write_job(JOB.replace("work_email: work_email", "Email: work_email").replace("work_email", "Email"))
    people.write_job(people.job_file.read_text().replace("Email: Email}", "Email: work_email}") + f"merge: {merge}\n")
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        people.run_job(api)
        assert people.run_in_process("purge", "job.yaml", "--older-than", "0s", "--yes").exit_code == 0
        assert people.run_job(api).submitted == 0
        rows = people.read_output()
    lost = [row["enrich_person_status"] == "filtered" for row in rows]
    assert lost == [merge == "overwrite"] * 3 + [True] * 3


def test_person_is_forgotten_before_a_new_step_has_run(workspace: Workspace, tmp_path: Path) -> None:
    """A step that was added since the last run sends nothing for the person, once it is known how it reads params."""
    head, verify = JOB[: JOB.index("  - name: company")], "  - name: verify\n    enrichment: 10\n"
    link = JOB[JOB.index("  - name: link") : JOB.index("  - name: person")].replace(
        "    only_if_empty: [work_email]\n", ""
    )
    leads = make_linked_people(3)
    for lead in leads:
        lead[3] = f"{lead[0]}@Example.example"
    workspace.write_leads(leads, HEADER)
    workspace.write_job(head + link)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.run_job(api)
        workspace.write_job(head + verify + "    params: {email: Email}\n    columns: {state: status}\n" + link)
        words = ("forget", "job.yaml", "--match", "First Name=First1", "--yes", "--json")
        refused = workspace.run_in_process(*words)
        assert (refused.exit_code, "the step `verify` has never run" in refused.stderr) == (5, True)
        assert workspace.run_in_process("run", "job.yaml", "--max-credits", "0", api=api).exit_code == 12
        result = workspace.run_in_process(*words)
        assert (result.exit_code, result.json_output["requests"]) == (0, 2), result.stderr
        workspace.run_job(api)
        verified = [run["params"]["email"] for run in api.audit()["runs"] if "email" in run["params"]]
    assert verified == ["first0@example.example", "first2@example.example"]
    assert workspace.read_output()[1]["enrich_status"] == "filtered"


def test_person_is_forgotten_after_the_target_has_changed(workspace: Workspace, api: SandboxApi) -> None:
    """A new target sends nothing for the person, once the ledger has how it reads params, which costs nothing."""
    job = "version: 1\ninput: leads.csv\noutput: out.csv\nenrichment: 10\nparams: {email: Email}\n"
    workspace.write_leads([["ada@engine.example"], ["bob@engine.example"]], ["Email"])
    workspace.write_job(job)
    workspace.run_job(api)
    workspace.write_job(job.replace("enrichment: 10", "enrichment: 12"))
    words = ("forget", "job.yaml", "--match", "Email=Ada@engine.example", "--yes", "--json")
    refused = workspace.run_in_process(*words)
    assert (refused.exit_code, "--max-credits 0" in refused.stderr) == (5, True)
    workspace.run_in_process("run", "job.yaml", "--max-credits", "0", api=api)
    result = workspace.run_in_process(*words)
    assert (result.exit_code, result.json_output["requests"]) == (0, 2), result.stderr
    assert workspace.run_job(api).submitted == 1
    assert [row["enrich_status"] for row in workspace.read_output()] == ["filtered", "found"]


def test_forget_follows_steps_without_columns(workspace: Workspace, tmp_path: Path) -> None:
    """What a step has found is followed where the job names no columns, also for a person who left the input."""
    job = JOB[: JOB.index("  - name: company")] + JOB[JOB.index("  - name: email") : JOB.index("  - name: link")]
    job += "  - name: verify\n    enrichment: 10\n    params: {email: email}\n    columns: {state: status}\n"
    people = make_people(3)
    workspace.write_job(job.replace("    columns: {work_email: email}\n", ""))
    workspace.write_leads(people, HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.run_job(api)
    workspace.write_leads(people[1:], HEADER)
    result = workspace.run_in_process("forget", "job.yaml", "--match", "First Name=First0", "--yes", "--json")
    assert (result.exit_code, result.json_output["requests"]) == (0, 2), result.stderr

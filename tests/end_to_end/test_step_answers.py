"""Whose answer a step's answer is: rows share requests, while each row's own condition decides whether it asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enrich.exit_codes import ExitCode
from enrich.models import State
from enrich.run.context import RunOptions
from enrich.sandbox.databar import Databar
from tests.end_to_end.test_steps import credits_of
from tests.support.cases import first_quick
from tests.support.workspace import BOTH_BACKENDS, SandboxApi, Workspace, serve_api

HEADER = ["First Name", "Last Name", "Website", "Title"]
ANN, BOB = ["Ann", "Aaa", "https://one.example", "Director"], ["Bob", "Bbb", "https://one.example", "Engineer"]
#: Both leads have one request about their company; only engineers want it, and a later step needs its answer.
JOB = """\
version: 1
input: leads.csv
output: out.csv
steps:
  - name: company
    waterfall: company_lookup
    where: Title = 'Engineer'
    params: {company_website: Website}
    columns: {link: linkedin}
  - name: email
    waterfall: email_getter
    params: {first_name: First Name, last_name: Last Name, company: link}
    columns: {mail: email}
limits: {requests_per_second: 1000}
"""
#: The first step alone: its params don't tell the leads apart.
COMPANY_JOB = JOB[: JOB.index("  - name: email")] + "limits: {requests_per_second: 1000}\n"
#: The same question in two steps with different conditions, and a step that needs the answer of the second.
TWICE = """\
version: 1
input: leads.csv
output: out.csv
steps:
  - name: first
    waterfall: email_getter
    where: Title = 'Director'
    params: {first_name: First Name, last_name: Last Name, company: Website}
    columns: {mail: email}
  - name: second
    waterfall: email_getter
    where: Title = 'Engineer'
    params: {first_name: First Name, last_name: Last Name, company: Website}
    columns: {mail_too: email}
  - name: person
    waterfall: person_getter
    params: {email: mail_too}
    columns: {link: linkedin_url}
limits: {requests_per_second: 1000}
"""


@pytest.fixture
def api(tmp_path: Path) -> Iterator[SandboxApi]:
    """Serve a sandbox that finds everything."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0, failure_rate=0.0) as served:
        yield served


def statuses(workspace: Workspace, step: str) -> list[str]:
    """Return the status of each row in a step."""
    return [row[f"enrich_{step}_status"] for row in workspace.read_output()]


@pytest.mark.parametrize("merged", first_quick(1, [False, True]))
def test_lists_and_booleans_are_no_params_of_later_steps(
    workspace: Workspace, api: SandboxApi, *, merged: bool
) -> None:
    """What an earlier step found is a param as in any other column: text and numbers, however they are written."""
    found = {"[1] Ltd": True, 5: True, ("a", "b"): False, "[]x": True, True: False, "true": False, ("only",): False}
    settings = {"merge": "fill_empty", "input": "leads.jsonl"} if merged else {}
    workspace.write_job(COMPANY_JOB, **settings)
    leads = [["Bob", f"Bbb{number}", f"https://c{number}.example", "Engineer"] for number in range(len(found))]
    workspace.write_leads(leads, HEADER)
    lines = [json.dumps(dict(zip(HEADER, lead, strict=True)) | {"link": []}) + "\n" for lead in leads]
    (workspace.folder / "leads.jsonl").write_text("".join(lines))
    workspace.run_job(api)
    for number, value in enumerate(found):
        workspace.sql(
            "UPDATE attempts SET answer = json_set(answer, '$.data[0].result.linkedin', json(?)) WHERE request_id = "
            "(SELECT id FROM requests WHERE params LIKE ?)",
            *(json.dumps(value), f"%c{number}.example%"),
        )
    workspace.write_job(JOB, **settings)
    workspace.run_job(api)
    assert statuses(workspace, "company") == ["found"] * len(found)
    assert statuses(workspace, "email") == ["found" if is_sent else "filtered" for is_sent in found.values()]
    assert api.audit()["accepted"] == len(found) + sum(found.values())


@pytest.mark.long
def test_question_of_another_step(workspace: Workspace, api: SandboxApi) -> None:
    """A step does not get the answer that another step has asked for."""
    workspace.write_job(TWICE)
    workspace.write_leads([ANN, BOB], HEADER)
    for _ in range(2):
        workspace.run_job(api)
        assert statuses(workspace, "first") == ["found", "filtered"]
        assert statuses(workspace, "second") == ["filtered", "found"]
        assert statuses(workspace, "person") == ["filtered", "found"]


@pytest.mark.long
def test_question_of_another_job(workspace: Workspace, api: SandboxApi) -> None:
    """A step does not get the answer that another job of the ledger has asked for, not even in a step of its name."""
    workspace.write_job(
        JOB.replace("    where: Title = 'Engineer'\n", "").replace("version: 1", "version: 1\nname: all")
    )
    workspace.write_leads([ANN, BOB], HEADER)
    workspace.run_job(api, RunOptions(new_ledger=True))
    (ledger,) = (workspace.folder / ".enrich").glob("*.db")
    workspace.write_job(JOB + f"ledger: .enrich/{ledger.name}\n")
    (workspace.folder / "out.csv").unlink()
    workspace.run_job(api)
    assert statuses(workspace, "company") == ["filtered", "found"]
    assert statuses(workspace, "email") == ["filtered", "found"]


@pytest.mark.parametrize(
    "job",
    first_quick(1, [pytest.param(JOB, id="names are sent"), pytest.param(COMPANY_JOB, id="only the company is sent")]),
)
def test_question_of_another_row(workspace: Workspace, api: SandboxApi, job: str) -> None:
    """A row does not get the answer for which another row has asked, in a limited run neither."""
    workspace.write_job(job)
    workspace.write_leads([ANN, BOB], HEADER)
    workspace.run_job(api)
    for options in (RunOptions(limit=5), RunOptions()):
        assert workspace.run_job(api, options).submitted == 0
        assert statuses(workspace, "company") == ["filtered", "found"]
    assert workspace.run_in_process("collect", "job.yaml").exit_code == 0
    assert statuses(workspace, "company") == ["filtered", "found"]
    for number, status in enumerate(statuses(workspace, "company"), 1):
        explained = workspace.run_in_process("explain", "job.yaml", "--row", str(number), "--json").json_output
        assert explained["rows"][0]["steps"][0]["status"] == status


@BOTH_BACKENDS
def test_question_of_another_row_where_the_run_stops(workspace: Workspace, api: SandboxApi) -> None:
    """A row does not get the answer of another row in the output of a run that ended before the step."""
    first = "  - name: phone\n    enrichment: 80\n    params: {phone: Website}\n    columns: {carrier: carrier}\n"
    workspace.write_job(COMPANY_JOB.replace("steps:\n", f"steps:\n{first}"))
    workspace.write_leads([ANN, BOB], HEADER)
    workspace.run_job(api)
    workspace.write_leads([ANN, BOB, ["Dan", "Ddd", "https://two.example", ""]], HEADER)
    api.inject_fault("no-credits", 1, "post")
    assert workspace.run_job(api).exit_code == ExitCode.CREDITS
    assert statuses(workspace, "phone") == ["found", "found", "pending"]
    assert statuses(workspace, "company") == ["filtered", "found", "filtered"]


@pytest.mark.long
def test_question_of_a_row_that_came_during_the_run(
    workspace: Workspace, api: SandboxApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row does not get the answer of another row that came into the input while the run was sending."""
    workspace.write_job(COMPANY_JOB)
    workspace.write_leads([ANN, BOB], HEADER)
    workspace.run_job(api)
    cat, submit = ["Cat", "Ccc", "https://two.example", "Engineer"], Databar.submit
    workspace.write_leads([ANN, cat], HEADER)

    def add_row(*arguments: Any, **options: Any) -> str:
        workspace.write_leads([ANN, cat, BOB], HEADER)
        return submit(*arguments, **options)

    monkeypatch.setattr(Databar, "submit", add_row)
    assert workspace.run_job(api).submitted == 1
    assert statuses(workspace, "company") == ["filtered", "found", "found"]


@pytest.mark.long
def test_question_of_a_row_that_was_removed(workspace: Workspace, api: SandboxApi) -> None:
    """A row does not get the answer for which a row has asked that is no longer in the input."""
    workspace.write_job(JOB)
    workspace.write_leads([ANN, BOB], HEADER)
    workspace.run_job(api)
    workspace.write_leads([ANN], HEADER)
    assert workspace.run_job(api).submitted == 0
    assert statuses(workspace, "company") == statuses(workspace, "email") == ["filtered"]


def test_own_answer_stays_beside_another_row(workspace: Workspace, api: SandboxApi) -> None:
    """A row that has asked keeps status, value and credits, also while another row shares its request."""
    workspace.write_job(JOB)
    workspace.write_leads([[*ANN[:3], "Engineer"], BOB], HEADER)
    workspace.run_job(api)
    before = workspace.read_output()
    workspace.write_leads([ANN, BOB], HEADER)
    assert workspace.run_job(api).submitted == 0
    for old, new in zip(before, workspace.read_output(), strict=True):
        assert {**old, "Title": ""} == {**new, "Title": ""}
    assert credits_of(before) == pytest.approx(api.audit()["credits_charged"])


@pytest.mark.long
def test_own_answer_stays_in_a_file_with_other_columns(workspace: Workspace, api: SandboxApi) -> None:
    """A row is known by the cells that are sent, in whatever order file and job have them, beside a new column."""
    sources = "company_website: [Website, {}]".format
    workspace.write_job(COMPANY_JOB.replace("company_website: Website", sources("First Name, Last Name")))
    workspace.write_leads([BOB], HEADER)
    workspace.run_job(api)
    workspace.write_job(COMPANY_JOB.replace("company_website: Website", sources("Last Name, First Name")))
    first, last, website, _ = BOB
    workspace.write_leads(
        [[website, "new", first, "Director", last]], ["Website", "New", "First Name", "Title", "Last Name"]
    )
    assert workspace.run_job(api).submitted == 0
    assert statuses(workspace, "company") == ["found"]


def test_refused_attempt_is_no_answer(workspace: Workspace, api: SandboxApi) -> None:
    """A row whose request was refused is filtered, not pending, once its condition no longer holds."""
    workspace.write_job(JOB)
    workspace.write_leads([BOB], HEADER)
    api.inject_fault("no-credits", 100, "post")
    for limit in (None, 0):
        assert workspace.run_job(api, RunOptions(limit=limit)).pending == 1
        assert workspace.sql("SELECT DISTINCT state FROM attempts") == [("refused",)]
        written = (workspace.folder / "out.csv").read_bytes()
        assert b"company: the API is out of credits" in written
    assert workspace.run_in_process("collect", "job.yaml", "--partial").exit_code == 0
    assert (workspace.folder / "out.csv").read_bytes() == written
    api.clear_faults()
    workspace.write_leads([[*BOB[:3], "Director"]], HEADER)
    assert workspace.run_job(api).submitted == 0
    assert statuses(workspace, "company") == ["filtered"]


@pytest.mark.long
def test_begun_leads_that_share_a_request(workspace: Workspace, api: SandboxApi) -> None:
    """All leads of a shared request go on in a limited run, and don't count."""
    job = JOB.replace("    where: Title = 'Engineer'\n", "")
    workspace.write_job(job[: job.index("  - name: email")])
    leads = [ANN, BOB, ["Cat", "Ccc", "https://two.example", ""]]
    workspace.write_leads(leads, HEADER)
    workspace.run_job(api)
    workspace.write_job(job)
    workspace.write_leads([*leads, ["Dan", "Ddd", "https://one.example", ""]], HEADER)
    workspace.run_job(api, RunOptions(limit=0))
    assert statuses(workspace, "email") == ["found", "found", "found", "pending"]


@pytest.mark.long
def test_limit_leaves_final_rows_final(workspace: Workspace, api: SandboxApi) -> None:
    """A row without a usable param is invalid, in a limited run too."""
    workspace.write_job(TWICE.replace("email: mail_too", "email: Website"))
    workspace.write_leads([ANN, BOB, ["Dan", "Ddd", "", "Director"]], HEADER)
    workspace.run_job(api, RunOptions(limit=1))
    assert statuses(workspace, "person")[2] == "invalid"


@pytest.mark.parametrize("cell", first_quick(0, ["N/A", "  "]))
def test_placeholder_does_not_complete_a_row(workspace: Workspace, tmp_path: Path, cell: str) -> None:
    """A merged cell that counts as blank is no value of `complete`."""
    workspace.write_job(
        JOB.replace("    where: Title = 'Engineer'\n", "")
        .replace("link: linkedin", "Title: linkedin")
        .replace("company: link", "company: Website")
        + "merge: fill_empty\ncomplete: [Title]\n"
    )
    workspace.write_leads([[*ANN[:3], cell]], HEADER)
    with serve_api(tmp_path / "none.db", hit_rate=0.0, failure_rate=0.0) as api:
        summary = workspace.run_job(api)
    assert (summary.found, summary.not_found) == (0, 1)


@pytest.mark.long
def test_provider_of_an_enrichment(workspace: Workspace, api: SandboxApi) -> None:
    """A step that is an enrichment names its source as provider, as a job without steps does."""
    body = "enrichment: 10\n{0}params: {{email: Title}}\n{0}columns: {{state: status}}\n"
    head, tail = JOB[: JOB.index("steps:")], "limits: {requests_per_second: 1000, max_credits: 10}\n"
    workspace.write_leads([[*ANN[:3], "ann@one.example"]], HEADER)
    workspace.write_job(head + body.format("") + tail)
    workspace.run_job(api)
    (row,) = workspace.read_output()
    assert (row["enrich_status"], row["enrich_provider"] != "") == ("found", True)
    workspace.write_job(head + "steps:\n  - name: verify\n    " + body.format("    ") + tail)
    (workspace.folder / "out.csv").unlink()
    workspace.run_job(api)
    assert workspace.read_output()[0]["enrich_verify_provider"] == row["enrich_provider"]


def test_each_row_has_its_own_request(workspace: Workspace, tmp_path: Path) -> None:
    """With `dedupe: false` each row that a step wants is sent and paid once, in whichever run, and keeps its answer."""
    job = JOB.replace("    where: Title = 'Engineer'\n", "    where: Title <> 'None'\n") + "dedupe: false\n"
    workspace.write_job(job)
    cat = ["Cat", "Ccc", "https://one.example", "None"]
    workspace.write_leads([ANN, cat, BOB, BOB, ANN], HEADER)
    with serve_api(tmp_path / "own.db", hit_rate=1.0, failure_rate=0.0) as api:
        api.inject_fault("error-after", 1, "post")
        assert workspace.run_job(api).in_doubt == 1
        assert statuses(workspace, "email").count("pending") == 1
        summary = workspace.run_job(api, RunOptions(retry=frozenset({State.IN_DOUBT})))
        rows, audit = workspace.read_output(), api.audit()
        assert (summary.found, summary.filtered) == (4, 1)
        # The unconfirmed request was paid, and sent again at the user's word.
        assert audit["accepted"] == 4 + 4 + 1
        for step in ("company", "email"):
            assert len({row[f"enrich_{step}_task_id"] for row in rows} - {""}) == 4
        assert all(float(row["enrich_credits"]) > 0 for row in rows if row["enrich_status"] == "found")
        workspace.write_job(job.replace("Title <> 'None'", "Title = 'Engineer'"))
        assert workspace.run_job(api).submitted == 0
        kept = ("enrich_company_status", "enrich_company_task_id", "enrich_company_credits", "link")
        for old, new in zip(rows, workspace.read_output(), strict=True):
            assert {name: old[name] for name in kept} == {name: new[name] for name in kept}

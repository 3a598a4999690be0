"""What the commands say of a job with steps: check, plan, status, explain, report, forget, and its mistakes."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from enrich.errors import JobError, RunDeclined
from enrich.job.job import load_job
from enrich.run.context import RunOptions
from enrich.run.summary import RunSummary
from tests.end_to_end.test_steps import HEADER, JOB, SHORT_JOB, STEPS, job_of, make_people
from tests.support.cases import first_quick
from tests.support.workspace import SandboxApi, Workspace, serve_api

#: The first two steps of the long job.
COMPANY_JOB = JOB[: JOB.index("  - name: again")] + "limits: {requests_per_second: 1000}\n"


@pytest.fixture
def people(workspace: Workspace) -> Workspace:
    """Return a workspace with the long job and twelve leads of four companies."""
    workspace.write_job(JOB)
    workspace.write_leads(make_people(12, 4), HEADER)
    return workspace


def test_check_shows_the_steps(people: Workspace, api: SandboxApi) -> None:
    """Each step with its target, the leads it wants at most, its price, and what it depends on."""
    result = people.run_in_process("check", "job.yaml", "--online", "--json", api=api)
    steps = {step["name"]: step for step in result.json_output["steps"]}
    assert result.exit_code == 0
    assert list(steps) == list(STEPS)
    assert {name: step["leads"] for name, step in steps.items()} == {
        "company": 12,
        "email": 12,
        "again": 12,
        "person": 12,
        "phone": 4,
    }
    assert steps["phone"]["depends_on"] == ["person"]
    assert steps["person"]["depends_on"] == ["email", "again"]
    assert steps["company"]["worst_price"] == 1.51
    text = people.run_in_process("check", "job.yaml", api=api).stdout.splitlines()
    assert text[0].startswith("ok: job: 12 leads, 12 can be sent, 5 steps")
    assert len(text) == 7


@pytest.mark.parametrize(
    ("condition", "is_noted"),
    first_quick(
        1,
        [
            ("only_if_empty: [work_email]", True),
            ("where: enrich_email_status = 'not_found'", False),
            ("where: work_email = ''", True),
            ("where: enrich_email_status <> 'found'", True),
            ("where: work_email <> '' AND Title <> 'x'", False),
            ("where: Title = 'Engineer'", False),
            ("only_if_empty: [work_email, Title]", False),
        ],
    ),
)
def test_plan_names_the_fallbacks(workspace: Workspace, api: SandboxApi, condition: str, *, is_noted: bool) -> None:
    """The plan says of each step whose condition also holds after a failure of an earlier one that it is sent then."""
    fallback = f"""\
  - name: link
    waterfall: person_by_link
    {condition}
    params: {{link: LinkedIn}}
    columns: {{by_link: work_email}}
limits:"""
    workspace.write_job(SHORT_JOB.replace("limits:", fallback))
    workspace.write_leads(make_people(2), HEADER)
    plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    note = "link: also sent where an earlier step failed or expired"
    assert (note in plan["notes"]) == is_noted, plan["notes"]


def test_plan_status_and_explain(people: Workspace, api: SandboxApi) -> None:
    """Of a plan the first step is exact, later ones are at most; after the run nothing is left to send."""
    people.write_job(COMPANY_JOB)
    plan = people.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    summary = people.run_job(api)
    assert plan["steps"][0] | {"cost": None} == {
        "name": "company",
        "waterfall": "company_lookup",
        "to_submit": 4,
        "at_most": 4,
        "likely": 4.0,
        "sent_again": 0,
        "worst_price": 1.51,
        "max_credits": None,
        "cost": None,
    }
    for planned, done in zip(plan["steps"], summary.steps, strict=True):
        assert done["submitted"] <= planned["at_most"]
    assert summary.credits_spent <= plan["cost"]["max"]
    assert plan["cost"]["likely"] is None
    after = people.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    assert (after["to_submit"], after["cost"]) == (0, {"min": 0.0, "likely": 0.0, "max": 0.0})
    check_status_and_explain(people, summary)


def check_status_and_explain(people: Workspace, summary: RunSummary) -> None:
    """Status counts requests and credits by step; explain tells of each step what was sent, or why not."""
    status = people.run_in_process("status", "job.yaml", "--json").json_output
    assert [step["credits_spent"] for step in status["steps"]] == [step["credits_spent"] for step in summary.steps]
    assert "company" in people.run_in_process("status", "job.yaml").stdout
    rows = people.read_output()
    explained = people.run_in_process("explain", "job.yaml", "--row", "2", "--json").json_output["rows"][0]
    assert [step["step"] for step in explained["steps"]] == list(STEPS[:2])
    assert [step["status"] for step in explained["steps"]] == [rows[1][f"enrich_{name}_status"] for name in STEPS[:2]]
    text = people.run_in_process("explain", "job.yaml", "--match", "Last Name=Last3").stdout
    assert text.startswith("row 4\n  step company: ")


@pytest.mark.long
def test_likely_cost_after_a_sample(people: Workspace, api: SandboxApi) -> None:
    """Once some leads were asked, the plan says what is likely by their hit rates."""
    people.write_job(job_of("company", "email", "person"))
    people.write_leads(make_people(60, 60), HEADER)
    people.run_in_process("run", "job.yaml", "--sample", "30", "--json", api=api)
    plan = people.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    likely, most = plan["cost"]["likely"], plan["cost"]["max"]
    assert 0 < likely < most
    before = api.audit()["credits_charged"]
    people.run_job(api)
    spent = api.audit()["credits_charged"] - before
    assert spent <= most
    assert likely / 3 < spent < 3 * likely


@pytest.mark.long
def test_plan_says_what_is_bought_again(people: Workspace, api: SandboxApi) -> None:
    """When an earlier step is asked again, the plan names the later answers that may be bought again."""
    job = job_of("company", "email", "person")
    people.write_job(job)
    people.run_job(api)
    people.write_job(
        job.replace("columns: {work_email: email}", "columns: {work_email: email}\n    policy: {refresh: {found: 0s}}")
    )
    plan = people.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    again = {step["name"]: step["sent_again"] for step in plan["steps"]}
    assert again["person"] > 0
    assert again["company"] == again["email"] == 0
    assert any(note.startswith("person: ") for note in plan["notes"])


@pytest.mark.long
def test_report_counts_columns_as_the_summary_does(people: Workspace, api: SandboxApi) -> None:
    """A column has the results of its own steps, also in rows for which a later step is pending."""
    summary = people.run_in_process("run", "job.yaml", "--max-credits", "9", "--json", api=api).json_output
    report = people.run_in_process("report", "job.yaml", "--json").json_output
    assert summary["pending"]
    assert {each["name"]: each["found"] for each in report["columns"]} == summary["columns"]
    assert report["columns"][0]["answered"] == summary["steps"][0]["found"] + summary["steps"][0]["not_found"]


def test_report_has_a_waterfall_for_each_step(people: Workspace, api: SandboxApi) -> None:
    """The report has a section for each step, and the cost of a lead."""
    steps = ["company", "email", "person"]
    people.write_job(job_of(*steps))
    people.run_job(api)
    report = people.run_in_process("report", "job.yaml", "-o", "report.html", "--json").json_output
    assert [each["step"] for each in report["step_waterfalls"]] == steps
    assert sum(each["spent"] for each in report["step_waterfalls"]) == pytest.approx(report["credits_spent"])
    page = (people.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("Step ") >= len(steps)
    assert "Per completed lead" in page


@pytest.mark.long
def test_forget_follows_the_steps(workspace: Workspace, tmp_path: Path) -> None:
    """A person's requests are erased in all steps; what is about their company stays for the others."""
    workspace.write_job(JOB.replace("where: TRY_CAST(staff AS INT) > 50", "where: 'true'"))
    workspace.write_leads(make_people(6, 2), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.run_job(api)
        result = workspace.run_in_process("forget", "job.yaml", "--match", "Last Name=Last3", "--yes", "--json")
        kept = workspace.sql("SELECT count(*) FROM requests WHERE forgotten = 0")[0][0]
        assert result.json_output["requests"] == 3  # e-mail, person, phone
        assert kept == workspace.sql("SELECT count(*) FROM requests")[0][0] - 3
        summary = workspace.run_job(api)
        row = workspace.read_output()[3]
    assert summary.submitted == 0
    assert row["enrich_company_status"] == "found"
    assert row["enrich_email_status"] == "filtered"
    assert "erased by `enrich forget`" in row["enrich_error"]


@pytest.mark.long
@pytest.mark.parametrize("is_in_input", [True, False])
def test_forget_leaves_colleagues(workspace: Workspace, tmp_path: Path, *, is_in_input: bool) -> None:
    """The link of a company names no person, while the address and the profile that were found for one do."""
    workspace.write_job("""\
version: 1
input: leads.csv
output: out.csv
steps:
  - {name: company, waterfall: company_lookup, params: {company_website: Website}, columns: {clink: linkedin}}
  - name: email
    waterfall: email_getter
    params: {first_name: First Name, last_name: Last Name, company: clink}
    columns: {mail: email}
  - {name: person, waterfall: person_getter, params: {email: mail}, columns: {plink: linkedin_url}}
  - {name: phone, waterfall: phone_getter, params: {linkedin: [plink, clink]}, columns: {phone: phone}}
limits: {requests_per_second: 1000}
""")
    ann, bob = ["Ann", "Aaa", "https://one.example"], ["Bob", "Bbb", "https://www.one.example"]
    workspace.write_leads([ann, bob], ["First Name", "Last Name", "Website"])
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        assert workspace.run_job(api).found == 2
    if not is_in_input:
        workspace.write_leads([bob], ["First Name", "Last Name", "Website"])
    result = workspace.run_in_process("forget", "job.yaml", "--match", "First Name=Ann", "--yes", "--json")
    # Without the row, nothing connects the request about its company with the person.
    assert result.json_output["requests"] == (4 if is_in_input else 3)
    workspace.write_leads([bob], ["First Name", "Last Name", "Website"])
    assert workspace.run_in_process("collect", "job.yaml").exit_code == 0
    (row,) = workspace.read_output()
    assert [row[f"enrich_{step}_status"] for step in ("company", "email", "person", "phone")] == ["found"] * 4


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        (
            "email: work_email}",
            "email: work_emial}",
            "steps.1.params.email: the input has no column `work_emial`",
            "work_email",
        ),
        (
            "email: work_email}",
            "email: [Firma, Vorname]}",
            "steps.1.params.email: the input has no column `Firma`",
            None,
        ),
        (
            "last_name: Last Name",
            "last_name: link",
            "steps.0.params.last_name: `link` comes from the step `person`",
            "move `email` after `person`",
        ),
        (
            "Last Name, company: {column: Website, transform: [domain]}}\n    columns: {work_email:",
            "link, company: Website}\n    columns: {link:",
            "steps.0.params.last_name: `link` comes from the step `person`",
            "move `email` after `person`",
        ),
        (
            "    waterfall: email_getter\n",
            "    waterfall: email_getter\n    where: link = ''\n",
            "steps.0.where: `link` comes from the step `person`",
            "move `email` after `person`",
        ),
        (
            "params: {email: work_email}",
            "params: {email: work_email}\n    where: enrich_person_status = ''",
            "steps.1.where: `enrich_person_status` comes from the step `person`",
            "only later steps can read it",
        ),
        (
            "params: {email: work_email}",
            "params: {email: link}",
            "steps.1.params.email: `link` comes from the step `person`",
            "only later steps can read it",
        ),
        (
            "limits: {",
            "order_by: [work_email]\nlimits: {",
            "order_by.0: `work_email` comes from the step `email`",
            "only later steps can read it",
        ),
        (
            "limits: {",
            "where: link <> ''\nlimits: {",
            "where: `link` comes from the step `person`",
            "only later steps can read it",
        ),
        ("name: person", "name: email", "steps.1.name: another step is named `email`", "another name"),
        ("waterfall: person_getter", "waterfal: person_getter", "steps.1.waterfal: unknown key", None),
        ("limits: {", "waterfall: x\nlimits: {", "waterfall: is a key of each step", None),
        ("limits: {", "changes: feed.csv\nlimits: {", "changes: a job with steps needs a `key`", "identify a lead"),
        (
            "limits: {",
            "complete: [work_mail]\nlimits: {",
            "complete.0: no step has the column `work_mail`",
            "work_email",
        ),
        (
            "    columns: {link: linkedin_url}\n",
            "complete: [xyz]\n",
            "complete.0: no step has the column `xyz`",
            "known: work_",
        ),
        (
            "{link: linkedin_url}",
            "{enrich_status: linkedin_url}",
            "steps.1.columns.enrich_status: this name belongs",
            None,
        ),
        (
            "{link: linkedin_url}",
            "{Title: linkedin_url}",
            "steps.1.columns.Title: the input already has a column",
            None,
        ),
        ("{link: linkedin_url}", "{enrich_email_status: linkedin_url}", "is a column of the step `email`", None),
        (
            "params: {email: work_email}",
            "params: {email: work_email}\n    suppress: x.txt",
            "suppress: unknown key",
            "job",
        ),
    ],
)
def test_mistakes(  # noqa: PLR0917 - the mistake and what is said of it
    workspace: Workspace, api: SandboxApi, old: str, new: str, message: str, hint: str | None
) -> None:
    """A mistake in the steps is exit 2 with its line, the key and the nearest name, before anything is sent."""
    workspace.write_job(SHORT_JOB.replace(old, new))
    workspace.write_leads(make_people(3), HEADER)
    for command in ("check", "plan", "run"):
        result = workspace.run_in_process(command, "job.yaml", "--json", api=api)
        assert result.exit_code == 2
        error = json.loads(result.stdout)["error"]
        assert message in error
        assert result.stderr.count(message) <= 1
        assert error.startswith("job.yaml:")
        assert hint is None or hint in error + result.stderr
    assert api.audit()["accepted"] == 0


#: Either step can send some of the leads: those with a web address, those with a link.
TWO_WAYS_JOB = """\
version: 1
input: leads.csv
output: out.csv
steps:
  - {name: company, waterfall: company_lookup, params: {company_website: Website}, columns: {staff: employees}}
  - {name: link, waterfall: person_by_link, params: {link: LinkedIn}, columns: {work_email: work_email}}
limits: {requests_per_second: 1000}
"""


def test_check_counts_the_leads_of_all_steps(workspace: Workspace, api: SandboxApi) -> None:
    """A lead can be sent if any step can send it, before a run and after it."""
    workspace.write_job(TWO_WAYS_JOB)
    links = ["https://linkedin.example/in/a", "https://linkedin.example/in/b"]
    workspace.write_leads([["one.example", ""], ["", links[0]], ["", links[1]], ["", ""]], ["Website", "LinkedIn"])
    for _ in range(2):
        output = workspace.run_in_process("check", "job.yaml", "--json", api=api).json_output
        assert [step["leads"] for step in output["steps"]] == [1, 2]
        assert (output["rows"], output["can_be_asked"]) == (4, 3)
        workspace.run_job(api)


def test_one_step_is_singular(workspace: Workspace, api: SandboxApi) -> None:
    """A job with one step has `1 step`, and its plan has no later requests."""
    workspace.write_job(TWO_WAYS_JOB.replace(TWO_WAYS_JOB.splitlines(keepends=True)[5], ""))
    workspace.write_leads([["one.example", ""]], ["Website", "LinkedIn"])
    assert "1 lead, 1 can be sent, 1 step as" in workspace.run_in_process("check", "job.yaml").stdout
    plan = workspace.run_in_process("plan", "job.yaml", api=api).stdout
    assert plan.startswith("1 lead, 1 step · 1 request to send · at most 1.51 credits")


def test_status_counts_failures_by_step(workspace: Workspace, tmp_path: Path) -> None:
    """The requests of a step are the sum of its columns, failed ones included. A long name keeps the columns."""
    workspace.write_job(TWO_WAYS_JOB.replace("name: company", "name: company_by_website"))
    workspace.write_leads([["one.example", ""], ["two.example", ""]], ["Website", "LinkedIn"])
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        workspace.run_job(api)
    lines = workspace.run_in_process("status", "job.yaml").stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("  step "))
    header, row = lines[first : first + 2]
    assert header.split() == ["step", "requests", "found", "no", "match", "failed", "open", "credits"]
    assert len(header) == len(row)
    assert row.split()[1:6] == ["2", "0", "0", "2", "0"]


def test_check_lists_all_mistakes(workspace: Workspace) -> None:
    """`check` lists every column that a step or `complete` names and that is not there, each with its line."""
    job = (
        SHORT_JOB.replace("First Name", "Frist Name")
        .replace("last_name: Last Name", "last_name: Lats Name")
        .replace("columns: {work_email:", "where: Titel = 'x' AND Frima <> ''\n    columns: {work_email:")
        .replace("params: {email: work_email}", "params: {email: work_emial}\n    only_if_empty: [Titl, link]")
        .replace("{link: linkedin_url}", "{link: linkedin_url, Title: title}")
        .replace("limits: {", "complete: [work_mail, xyz]\norder_by: [Compayn]\nlimits: {")
    )
    workspace.write_job(job)
    workspace.write_leads(make_people(3), HEADER)
    result = workspace.run_in_process("check", "job.yaml")
    problems = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    expected = (
        "order_by.0: the input has no column `Compayn`",
        "steps.1.columns.Title: the input already has a column with this name",
        "steps.0.params.first_name: the input has no column `Frist Name`",
        "steps.0.params.last_name: the input has no column `Lats Name`",
        "steps.0.where: the input has no column `Titel`",
        "steps.0.where: the input has no column `Frima`",
        "steps.1.params.email: the input has no column `work_emial`",
        "steps.1.only_if_empty.0: the input has no column `Titl`",
        "steps.1.only_if_empty.1: `link` comes from the step `person`",
        "complete.0: no step has the column `work_mail`",
        "complete.1: no step has the column `xyz`",
    )
    assert result.exit_code == 2
    assert len(problems) == len(expected), problems
    for problem, message in zip(problems, expected, strict=True):
        assert message in problem


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (
            "Artikel;Menge\nx;1\n",
            2,
            "job.yaml:2: input: the input has none of these columns: First Name, Last Name, Website",
        ),
        (
            "Artikel,Menge\nx,1\n",
            2,
            "job.yaml:2: input: the input has none of these columns: First Name, Last Name, Website",
        ),
        ("Ann,Lee,one.example\nBob,Day,two.example\n", 5, "the file has no header"),
    ],
)
def test_another_file_is_one_mistake(
    workspace: Workspace, api: SandboxApi, content: str, code: int, message: str
) -> None:
    """An input without any column that the params of the steps read is one error, as for a job without steps."""
    workspace.write_job(SHORT_JOB)
    (workspace.folder / "leads.csv").write_text(content)
    for command in ("check", "plan", "run"):
        result = workspace.run_in_process(command, "job.yaml", api=api)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.exit_code, len(errors)) == (code, 1), errors
        assert message in errors[0]
        assert ("looks separated by" in result.stderr) == (";" in content)


def test_complete_needs_steps(workspace: Workspace) -> None:
    """`complete` at a job without steps is an error that says what it is for."""
    workspace.write_job(complete="[work_email]")
    with pytest.raises(JobError) as caught:
        load_job(workspace.job_file)
    assert caught.value.hint == "`complete` is for a job with `steps`"


@pytest.mark.long
def test_metrics_by_step(people: Workspace, api: SandboxApi) -> None:
    """The metrics file has what each step found, sent and spent."""
    people.write_job(COMPANY_JOB + "metrics: enrich.prom\n")
    people.run_in_process("run", "job.yaml", api=api)
    lines = (people.folder / "enrich.prom").read_text(encoding="utf-8").splitlines()
    assert 'enrich_step_requests_submitted{job="job",step="company"} 4.0' in lines
    assert sum(line.startswith("enrich_step_credits_spent{") for line in lines) == 2


def test_question_before_the_first_run(people: Workspace, api: SandboxApi) -> None:
    """A first real run without a cap shows the plan of all steps; a no sends nothing."""
    people.write_job(SHORT_JOB)
    people.write_leads(make_people(4), HEADER)
    asked: list[str] = []

    def decline(text: str) -> bool:
        asked.append(text)
        return False

    with pytest.raises(RunDeclined):
        people.run_job(api, RunOptions(confirm=decline))
    assert api.audit()["accepted"] == 0
    assert asked[0].startswith("4 leads, 2 steps · 4 requests to send, then more")
    assert people.run_job(api, RunOptions(confirm=lambda _: True)).submitted > 4


@pytest.mark.long
def test_renamed_step(workspace: Workspace, api: SandboxApi) -> None:
    """Columns of a step that was renamed are left out of the next output, which check, plan and run say."""
    workspace.write_job(SHORT_JOB.replace("work_email", "Email") + "merge: fill_empty\n")
    workspace.write_leads(make_people(4), HEADER)
    workspace.run_job(api)
    renamed = SHORT_JOB.replace("name: email", "name: mail").replace("work_email", "Email") + "merge: fill_empty\n"
    workspace.write_job(renamed, input="night.csv")
    (workspace.folder / "out.csv").rename(workspace.folder / "night.csv")
    note = "the input has columns of a step `email`, which the job does not have"
    for command in ("check", "plan", "run"):
        result = workspace.run_in_process(command, "job.yaml", "--json", api=api)
        assert result.exit_code == 0, result.stderr
        assert sum(each.startswith(note) for each in result.json_output["notes"]) == 1
    assert result.json_output["submitted"] == 0
    names = list(workspace.read_output()[0])
    assert [name for name in names if name.startswith("enrich_email")] == []
    assert "enrich_mail_status" in names


def test_collect_with_a_step_that_is_new(workspace: Workspace, api: SandboxApi) -> None:
    """A job that has run can be collected when it has got another step, whose rows are pending."""
    workspace.write_leads(make_people(2), HEADER)
    workspace.write_job(SHORT_JOB[: SHORT_JOB.index("  - name: person")])
    workspace.run_job(api)
    workspace.write_job(SHORT_JOB)
    assert "2 rows pending" in workspace.run_in_process("collect", "job.yaml").stderr
    assert workspace.run_in_process("collect", "job.yaml", "--partial").exit_code == 0
    assert [row["enrich_person_status"] for row in workspace.read_output()] == ["pending"] * 2


def test_check_of_fields_that_are_not_known(workspace: Workspace, api: SandboxApi) -> None:
    """Offline, a field that an earlier step may have is no error; `--online` finds whether it has it."""
    verify = "  - name: verify\n    enrichment: 10\n    params: {email: email}\n"
    phone = "  - name: phone\n    waterfall: phone_getter\n    where: reason = ''\n    params: {linkedin: LinkedIn}\n"
    head = SHORT_JOB[: SHORT_JOB.index("  - name: person")].replace("work_email", "email")
    workspace.write_leads(make_people(2), HEADER)
    for job, code in ((head + verify + phone, 0), (head + verify + phone.replace("reason", "raeson"), 2)):
        workspace.write_job(job)
        offline = workspace.run_in_process("check", "job.yaml", "--json")
        assert offline.exit_code == 0, offline.stderr
        assert any("the steps after `verify` were not checked" in note for note in offline.json_output["notes"])
        assert [step["leads"] for step in offline.json_output["steps"]] == [2, 2, None]
        assert workspace.run_in_process("check", "job.yaml", "--online", api=api).exit_code == code
    workspace.write_job(head.replace("First Name", "Name") + verify + phone)
    assert "no column `Name`" in workspace.run_in_process("check", "job.yaml").stderr


def test_results_of_a_step_may_expire_earlier(workspace: Workspace, tmp_path: Path) -> None:
    """`policy.result_ttl` of a step counts: results expire after the shortest time of all steps."""
    workspace.write_job(SHORT_JOB)
    workspace.write_leads(make_people(3), HEADER)
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        workspace.submit_without_collecting(api)
    expiries = []
    for job in (SHORT_JOB, SHORT_JOB.replace("  - name: person\n", "  - name: person\n    policy: {result_ttl: 1h}\n")):
        workspace.write_job(job)
        shown = workspace.run_in_process("status", "job.yaml", "--json").json_output["next_expiry"]
        expiries.append(datetime.fromisoformat(shown))
    assert expiries[0] - expiries[1] == timedelta(hours=23)

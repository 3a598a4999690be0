"""Jobs with steps: several questions for each lead, each where the one before calls for it, under one cap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from enrich.exit_codes import ExitCode
from enrich.models import State
from enrich.run.context import RunOptions
from enrich.run.progress import Progress
from tests.support.workspace import (
    BOTH_BACKENDS,
    JumpingClock,
    SandboxApi,
    Workspace,
    clock_ahead,
    serve_api,
)

HEADER = ["First Name", "Last Name", "Website", "Email", "Title", "LinkedIn"]
#: Company → e-mail → a fallback where nothing was found → phone for directors.
JOB = """\
version: 1
input: leads.csv
output: out.csv
steps:
  - name: company
    waterfall: company_lookup
    params: {company_website: {column: Website, transform: [domain]}}
    columns: {staff: employees}
  - name: email
    waterfall: email_getter
    where: TRY_CAST(staff AS INT) > 50
    params: {first_name: First Name, last_name: Last Name, company: {column: Website, transform: [domain]}}
    columns: {work_email: email}
  - name: again
    waterfall: email_getter
    enrichments: [113]
    only_if_empty: [work_email]
    params: {first_name: First Name, last_name: Last Name, company: {column: Website, transform: [domain]}}
    columns: {work_email: email}
  - name: person
    waterfall: person_getter
    params: {email: work_email}
    columns: {link: linkedin_url}
  - name: phone
    waterfall: phone_getter
    where: "Title LIKE '%Director%' AND enrich_person_status = 'found'"
    params: {linkedin: [link, LinkedIn]}
    columns: {phone: phone}
complete: [work_email]
limits: {requests_per_second: 1000}
"""
STEPS = ("company", "email", "again", "person", "phone")
#: One step that others depend on, and one that does not.
SHORT_JOB = """\
version: 1
input: leads.csv
output: out.csv
steps:
  - name: email
    waterfall: email_getter
    params: {first_name: First Name, last_name: Last Name, company: {column: Website, transform: [domain]}}
    columns: {work_email: email}
  - name: person
    waterfall: person_getter
    params: {email: work_email}
    columns: {link: linkedin_url}
limits: {requests_per_second: 1000}
"""


def job_of(*names: str) -> str:
    """Return the long job with some of its steps."""
    head, *steps = JOB[: JOB.index("complete:")].split("  - name: ")
    kept = "".join(f"  - name: {step}" for step in steps if step.split("\n")[0] in names)
    return head + kept + JOB[JOB.index("complete:") :]


def make_people(count: int, companies: int | None = None) -> list[list[str]]:
    """Make leads, several of whom work for the same company, every third a director."""
    return [
        [
            f"First{number}",
            f"Last{number}",
            f"https://www.company{number % (companies or count)}.example/about",
            "",
            "Director of Sales" if number % 3 == 0 else "Engineer",
            f"https://linkedin.example/in/{number}" if number % 2 else "",
        ]
        for number in range(count)
    ]


def credits_of(rows: Iterable[dict[str, str]], column: str = "enrich_credits") -> float:
    """Add up a column of credits."""
    return round(sum(float(row[column] or 0) for row in rows), 6)


def statuses_of(rows: Iterable[dict[str, str]], step: str | None = None) -> Counter[str]:
    """Count the rows by their status, or by that of a step."""
    return Counter(row["enrich_status" if step is None else f"enrich_{step}_status"] for row in rows)


@pytest.fixture
def people(workspace: Workspace) -> Workspace:
    """Return a workspace with the long job and thirty leads of ten companies."""
    workspace.write_job(JOB)
    workspace.write_leads(make_people(30, 10), HEADER)
    return workspace


@BOTH_BACKENDS
def test_each_step_follows_from_those_before(people: Workspace, api: SandboxApi) -> None:
    """Each step asks where its condition holds, and the file, the receipt and the API's bill agree."""
    summary = people.run_job(api)
    rows, audit = people.read_output(), api.audit()

    assert summary.exit_code in (ExitCode.OK, ExitCode.SOME_FAILED)
    assert len(rows) == summary.rows == 30
    for row in rows:
        big = row["staff"] != "" and float(row["staff"]) > 50
        assert (row["enrich_email_status"] != "filtered") == big
        assert (row["enrich_again_status"] == "filtered") == (row["enrich_email_status"] == "found")
        assert (row["enrich_person_status"] == "filtered") == (row["work_email"] == "")
        asked_phone = "Director" in row["Title"] and row["enrich_person_status"] == "found"
        assert (row["enrich_phone_status"] != "filtered") == asked_phone
        assert (row["enrich_status"] == "found") == (row["work_email"] != "")
    # A company is asked once, though three leads share it.
    assert summary.steps[0]["submitted"] == 10
    assert [step["name"] for step in summary.steps] == list(STEPS)
    assert sum(step["submitted"] for step in summary.steps) == summary.submitted == audit["accepted"]
    assert audit["paid_twice"] == 0
    assert credits_of(rows) == pytest.approx(summary.credits_spent) == pytest.approx(audit["credits_charged"])
    for step in summary.steps:
        assert credits_of(rows, f"enrich_{step['name']}_credits") == pytest.approx(step["credits_spent"])
        assert {status: step[status] for status in statuses_of(rows, step["name"])} == statuses_of(rows, step["name"])
    assert summary.cost_per_lead == pytest.approx(summary.credits_spent / statuses_of(rows)["found"], abs=1e-6)
    # The columns come first, then five of each step, then three of the row.
    of_steps = [
        f"enrich_{step}_{name}" for step in STEPS for name in ("status", "provider", "credits", "task_id", "at")
    ]
    columns = ["staff", "work_email", "link", "phone"]
    assert list(rows[0]) == [*HEADER, *columns, *of_steps, "enrich_status", "enrich_error", "enrich_credits"]


@pytest.mark.long
def test_second_run_and_collect(people: Workspace, api: SandboxApi) -> None:
    """The same command again sends nothing and writes the same file; `collect` does from input and ledger alone."""
    first = people.run_job(api)
    before = (people.folder / "out.csv").read_bytes()
    summary = people.run_job(api)
    assert (summary.submitted, summary.credits_spent) == (0, 0.0)
    assert (people.folder / "out.csv").read_bytes() == before
    (people.folder / "out.csv").unlink()
    collected = people.run_in_process("collect", "job.yaml", "--json").json_output
    assert [step["found"] for step in collected["steps"]] == [step["found"] for step in first.steps]
    assert collected["cost_per_lead"] == first.cost_per_lead
    assert (people.folder / "out.csv").read_bytes() == before


@BOTH_BACKENDS
def test_waits_for_what_is_not_final(workspace: Workspace, tmp_path: Path) -> None:
    """A row whose earlier step is unconfirmed is sent nothing more; the others go on."""
    workspace.write_job(SHORT_JOB)
    workspace.write_leads(make_people(6), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        api.inject_fault("error-after", 2, "post")
        summary = workspace.run_job(api)
        rows = workspace.read_output()
        assert summary.exit_code == ExitCode.IN_DOUBT
        assert statuses_of(rows, "email") == {"in_doubt": 2, "found": 4}
        assert statuses_of(rows, "person") == {"pending": 2, "found": 4}
        assert statuses_of(rows) == {"in_doubt": 2, "found": 4}

        summary = workspace.run_job(api, RunOptions(retry=frozenset({State.IN_DOUBT})))
        assert (summary.exit_code, summary.submitted, summary.found) == (ExitCode.OK, 4, 6)


@BOTH_BACKENDS
@pytest.mark.long
def test_fallback_after_failure(workspace: Workspace, tmp_path: Path) -> None:
    """After a failed request the fallback may be sent, and its value is the row's."""
    fallback = """
  - name: link
    waterfall: person_by_link
    only_if_empty: [work_email]
    params: {link: {column: Website}}
    columns: {work_email: work_email}
limits:"""
    workspace.write_job(SHORT_JOB.replace("\nlimits:", fallback))
    workspace.write_leads(make_people(12), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0, failure_rate=0.5, free_failures=0.0) as api:
        summary = workspace.run_job(api)
        rows = workspace.read_output()
        assert summary.exit_code == ExitCode.SOME_FAILED
        failed = [row for row in rows if row["enrich_email_status"] == "failed"]
        assert {row["enrich_link_status"] for row in failed} == {"found", "failed"}
        for row in failed:
            assert row["enrich_status"] == row["enrich_link_status"]
        assert credits_of(rows) == pytest.approx(api.audit()["credits_charged"])


@pytest.mark.long
def test_keeps_answers_when_conditions_change(people: Workspace, api: SandboxApi) -> None:
    """What a step has found stays in the file when its condition no longer holds, and costs nothing again."""
    people.write_job(job_of("company", "email"))
    people.run_job(api)
    before = people.read_output()
    people.write_job(people.job_file.read_text().replace("> 50", "> 5000000"))
    summary = people.run_job(api)
    after = people.read_output()
    for old, new in zip(before, after, strict=True):
        for name in ("status", "credits", "task_id", "at"):
            assert new[f"enrich_email_{name}"] == old[f"enrich_email_{name}"]
        assert new["work_email"] == old["work_email"]
    assert credits_of(after) == pytest.approx(api.audit()["credits_charged"])
    assert summary.steps[1]["submitted"] == 0


@pytest.mark.long
def test_row_filtered_from_the_start_shares_no_answer(workspace: Workspace, api: SandboxApi) -> None:
    """A row that a condition leaves out is not given the answer that another row asked for."""
    job = job_of("company", "email")
    workspace.write_job(
        job.replace("columns: {staff: employees}", "columns: {staff: employees}\n    where: Title = 'Engineer'")
    )
    workspace.write_leads(make_people(12, 2), HEADER)
    workspace.run_job(api)
    for row in workspace.read_output():
        assert (row["enrich_company_status"] == "filtered") == (row["Title"] != "Engineer")


@pytest.mark.long
def test_refresh_of_an_earlier_step(people: Workspace, api: SandboxApi) -> None:
    """A refreshed company asks again only what its new answer changes; all else keeps its answers."""
    people.write_job(
        job_of("company", "email", "person").replace(
            "columns: {staff: employees}", "columns: {staff: employees}\n    policy: {refresh: {found: 30d}}"
        )
    )
    first = people.run_job(api)
    before = people.read_output()
    api.advance(40 * 86400)
    summary = people.run_job(api, clock=clock_ahead(40 * 86400))
    found_companies = first.steps[0]["submitted"] - sum(
        1 for row in {r["Website"]: r for r in before}.values() if row["enrich_company_status"] != "found"
    )
    assert summary.steps[0]["submitted"] == found_companies
    assert [step["submitted"] for step in summary.steps[1:]] == [0, 0]
    assert [row["work_email"] for row in people.read_output()] == [row["work_email"] for row in before]


@pytest.mark.long
def test_cap_of_a_step(people: Workspace, api: SandboxApi) -> None:
    """A step's cap holds its rows back with exit 12; steps that do not depend on it go on, and so does the next run."""
    job = JOB.replace("columns: {link: linkedin_url}", "columns: {link: linkedin_url}\n    limits: {max_credits: 4}")
    people.write_job(
        job.replace("linkedin: [link, LinkedIn]", "linkedin: LinkedIn").replace(
            "AND enrich_person_status = 'found'", ""
        )
    )
    summary = people.run_job(api)
    rows = people.read_output()
    assert summary.exit_code == ExitCode.CREDITS
    assert summary.error == "the credits cap of the step `person` is reached"
    assert credits_of(rows, "enrich_person_credits") <= 4
    assert statuses_of(rows, "person")["pending"] > 0
    assert statuses_of(rows, "phone")["pending"] == 0
    assert summary.steps[4]["submitted"] > 0
    paid = api.audit()["credits_charged"]
    for _ in range(4):
        summary = people.run_job(api)
        assert summary.credits_spent <= 4
        if summary.exit_code != ExitCode.CREDITS:
            break
    assert summary.pending == 0
    assert credits_of(people.read_output()) == pytest.approx(api.audit()["credits_charged"])
    assert api.audit()["credits_charged"] > paid


@pytest.mark.long
def test_cap_of_the_job(people: Workspace, api: SandboxApi) -> None:
    """The job's cap holds over all steps together, and later runs finish the work."""
    people.write_job(JOB.replace("requests_per_second: 1000", "requests_per_second: 1000, max_credits: 12"))
    people.write_leads(make_people(12, 4), HEADER)
    for _ in range(4):
        summary = people.run_job(api)
        assert summary.credits_spent <= 12
        if summary.exit_code != ExitCode.CREDITS:
            break
        assert summary.pending
    assert summary.pending == 0
    assert credits_of(people.read_output()) == pytest.approx(api.audit()["credits_charged"])
    assert api.audit()["paid_twice"] == 0


@pytest.mark.long
def test_column_named_like_a_pattern(people: Workspace, api: SandboxApi) -> None:
    """The column of a step and of its fallback may have any name."""
    fallback = SHORT_JOB.replace("person_getter", "email_getter").replace(
        "params: {email: work_email}", "params: {first_name: First Name, last_name: Last Name, company: Website}"
    )
    people.write_job(
        fallback.replace("work_email: email", '"^b.*$": email').replace("link: linkedin_url", '"^b.*$": email')
    )
    people.write_leads(make_people(3), HEADER)
    summary = people.run_job(api)
    assert summary.exit_code == ExitCode.OK
    assert [bool(row["^b.*$"]) for row in people.read_output()].count(True) == summary.found


def test_limit_counts_leads(people: Workspace, api: SandboxApi) -> None:
    """`--limit` begins so many leads; the next limited run finishes nothing twice and begins as many again."""
    people.write_job(SHORT_JOB)
    people.write_leads(make_people(7), HEADER)
    for number in (1, 2):
        summary = people.run_job(api, RunOptions(limit=3))
        rows = people.read_output()
        assert summary.exit_code == ExitCode.OK
        assert summary.steps[0]["submitted"] == 3
        assert statuses_of(rows)["pending"] == 7 - 3 * number
        assert all(row["enrich_email_status"] == "pending" for row in rows[3 * number :])
    assert credits_of(people.read_output()) == pytest.approx(api.audit()["credits_charged"])


@pytest.mark.long
def test_limit_counts_leads_that_skip_the_first_step(people: Workspace, api: SandboxApi) -> None:
    """A lead that the first step leaves out counts where it is asked first."""
    job = job_of("company", "email").replace("where: TRY_CAST(staff AS INT) > 50", "where: 'true'")
    people.write_job(
        job.replace("columns: {staff: employees}", "columns: {staff: employees}\n    where: Title = 'Engineer'")
    )
    people.write_leads(make_people(15), HEADER)
    summary = people.run_job(api, RunOptions(limit=5))
    rows = people.read_output()
    begun = [row for row in rows if any(row[f"enrich_{step}_task_id"] for step in ("company", "email"))]
    assert len(begun) == 5
    assert summary.exit_code == ExitCode.OK
    people.run_job(api)
    assert statuses_of(people.read_output())["pending"] == 0


@pytest.mark.long
def test_independent_steps_of_leads_beyond_the_limit(people: Workspace, api: SandboxApi) -> None:
    """A limited run sends nothing for other leads, not even in a step that depends on no other."""
    people.write_job(
        job_of("company", "email", "phone")
        .replace("linkedin: [link, LinkedIn]", "linkedin: LinkedIn")
        .replace("AND enrich_person_status = 'found'", "")
    )
    people.write_leads(make_people(12), HEADER)
    people.run_job(api, RunOptions(limit=4))
    begun = [row for row in people.read_output() if row["enrich_company_task_id"] or row["enrich_phone_task_id"]]
    assert len(begun) == 4


@BOTH_BACKENDS
@pytest.mark.long
def test_sample_counts_leads(people: Workspace, api: SandboxApi) -> None:
    """`--sample` begins so many leads, and their later steps are asked, too."""
    people.write_job(SHORT_JOB)
    people.write_leads(make_people(40), HEADER)
    summary = people.run_job(api, RunOptions(sample=8, seed=3))
    rows = people.read_output()
    begun = [row for row in rows if row["enrich_email_task_id"]]
    assert len(begun) == summary.steps[0]["submitted"] == 8
    assert {row["enrich_status"] for row in begun} <= {"found", "not_found", "failed"}
    assert statuses_of(rows)["pending"] == 32


def test_two_steps_with_one_question_share_it(workspace: Workspace, tmp_path: Path) -> None:
    """A question that two steps ask is paid once, and its credits stand at the first of them."""
    question = SHORT_JOB[SHORT_JOB.index("waterfall:") : SHORT_JOB.index("    columns: {work_email")]
    other = "waterfall: person_getter\n    params: {email: work_email}\n"
    workspace.write_job(SHORT_JOB.replace(other, question).replace("link: linkedin_url", "same: email"))
    workspace.write_leads(make_people(10), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        summary = workspace.run_job(api)
        rows = workspace.read_output()
        assert summary.submitted == api.audit()["accepted"] == 10
        assert all(row["same"] == row["work_email"] != "" for row in rows)
        assert credits_of(rows, "enrich_person_credits") == 0
        assert credits_of(rows) == pytest.approx(api.audit()["credits_charged"])


@pytest.mark.long
def test_single_jobs_and_steps_share_answers(workspace: Workspace, api: SandboxApi) -> None:
    """A job without steps that asked the same question has paid for the step, and the other way round."""
    single = (
        SHORT_JOB[: SHORT_JOB.index("steps:")]
        + """waterfall: email_getter
params: {first_name: First Name, last_name: Last Name, company: {column: Website, transform: [domain]}}
columns: {work_email: email}
"""
    )
    workspace.write_leads(make_people(10), HEADER)
    workspace.write_job(single)
    assert workspace.run_job(api).submitted == 10
    workspace.write_job(SHORT_JOB)
    (workspace.folder / "out.csv").unlink()
    summary = workspace.run_job(api)
    assert summary.steps[0]["submitted"] == 0
    workspace.write_job(single)
    (workspace.folder / "out.csv").unlink()
    assert workspace.run_job(api).submitted == 0


@pytest.mark.long
def test_merged_column_is_seen_by_later_steps(workspace: Workspace, tmp_path: Path) -> None:
    """`only_if_empty` over a merged column sees what an earlier step filled in, and the first value stays."""
    job = SHORT_JOB.replace("work_email: email", "Email: email").replace("email: work_email", "email: Email")
    job = job.replace("columns: {link: linkedin_url}", "columns: {link: linkedin_url}\n    only_if_empty: [Email]")
    workspace.write_job(job + "merge: fill_empty\n")
    people = make_people(10)
    people[0][3] = "known@company0.example"
    workspace.write_leads(people, HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        summary = workspace.run_job(api)
        rows = workspace.read_output()
    assert summary.steps[1]["submitted"] == 0
    assert statuses_of(rows, "person") == {"filtered": 10}
    assert rows[0]["Email"] == "known@company0.example"
    assert all("@" in row["Email"] for row in rows)


@pytest.mark.long
def test_found_address_on_the_suppression_list(workspace: Workspace, tmp_path: Path) -> None:
    """What a step found is compared with the list before a later step sends it."""
    workspace.write_job(SHORT_JOB)
    workspace.write_leads(make_people(10), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.write_job(SHORT_JOB[: SHORT_JOB.index("  - name: person")] + "limits: {requests_per_second: 1000}\n")
        workspace.run_job(api)
        listed = [row["work_email"] for row in workspace.read_output()[:3]]
        (workspace.folder / "never.txt").write_text("\n".join(listed) + "\n")
        workspace.write_job(SHORT_JOB + "suppress: never.txt\n")
        summary = workspace.run_job(api)
        rows = workspace.read_output()
    assert summary.steps[1]["submitted"] == 7
    assert [row["enrich_person_status"] for row in rows[:3]] == ["filtered"] * 3
    assert all("on a suppression list" in row["enrich_error"] for row in rows[:3])
    assert all(row["work_email"] for row in rows)


@pytest.mark.long
def test_canary_of_a_step(workspace: Workspace, tmp_path: Path) -> None:
    """A step's canary counts its own answers only, and stops the run."""
    canary = "columns: {link: linkedin_url}\n    canary: {rows: 4, min_hit_rate: 0.9}"
    workspace.write_job(SHORT_JOB.replace("columns: {link: linkedin_url}", canary))
    workspace.write_leads(make_people(10), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=0.6) as api:
        summary = workspace.run_job(api)
    assert summary.exit_code == ExitCode.CANARY
    assert str(summary.error).startswith("step `person`: the canary stopped the run")
    assert [step["submitted"] for step in summary.steps] == [10, 4]


@pytest.mark.long
def test_bulk_steps(people: Workspace, api: SandboxApi) -> None:
    """A step can send its requests in bulk; the bill is still that of the file."""
    people.write_job(job_of("company", "email", "person") + "dispatch: {bulk: 10}\n")
    summary = people.run_job(api)
    assert summary.exit_code in (ExitCode.OK, ExitCode.SOME_FAILED)
    assert summary.credits_spent == pytest.approx(api.audit()["credits_charged"])
    assert summary.submitted == api.audit()["accepted"]


@pytest.mark.long
def test_open_task_has_the_attempts_of_its_step(workspace: Workspace, tmp_path: Path) -> None:
    """A task of an earlier run that fails at no charge is sent again by the `max_attempts` of its step."""
    workspace.write_job(SHORT_JOB.replace("email_getter\n", "email_getter\n    policy: {max_attempts: 1}\n"))
    workspace.write_leads(make_people(4), HEADER)
    clock = JumpingClock()

    def end_when_submitted(progress: Progress) -> None:
        clock.jumped_s = 3600.0 if progress.submitted else 0.0

    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0, latency="fixed(60)") as api:
        workspace.submit_without_collecting(api)
        api.advance(61)
        workspace.run_job(api, RunOptions(max_time_s=600.0), clock=clock, on_progress=end_when_submitted)
        assert api.audit()["accepted"] == 4
    assert {row["enrich_email_status"] for row in workspace.read_output()} == {"failed"}


@pytest.mark.long
def test_change_replaces_the_value_of_another_step(workspace: Workspace, tmp_path: Path) -> None:
    """Where a step replaces what a fallback had found, the feed has the replaced value as the old one."""
    job = """\
version: 1
input: leads.csv
output: out.csv
steps:
  - name: email
    waterfall: email_getter
    where: WHERE
    params: {first_name: First Name, last_name: Last Name, company: {column: Website, transform: [domain]}}
    columns: {contact: email}
  - name: size
    waterfall: company_lookup
    only_if_empty: [contact]
    params: {company_website: {column: Website, transform: [domain]}}
    columns: {contact: employees, business: industries}
changes: {path: changes.csv, key: [First Name]}
"""
    workspace.write_leads(make_people(8, 8), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.job_file.write_text(job.replace("WHERE", "Email <> ''"), encoding="utf-8")
        workspace.run_job(api)
        sizes = {row["First Name"]: row["contact"] for row in workspace.read_output()}
        assert len(list(filter(None, sizes.values()))) == 8
        workspace.job_file.write_text(job.replace("WHERE", "Website NOT LIKE '%company0%'"), encoding="utf-8")
        workspace.run_job(api)
        lines = workspace.read_output("changes.csv")
        emails = {row["First Name"]: row["contact"] for row in workspace.read_output()}
        workspace.run_job(api)
        assert workspace.read_output("changes.csv") == []
    assert {line["First Name"]: (line["field"], line["old"], line["new"]) for line in lines} == {
        name: ("contact", sizes[name], email) for name, email in emails.items() if email != sizes[name]
    }
    assert len(lines) == 7


@pytest.mark.long
def test_changes_by_step(workspace: Workspace, tmp_path: Path) -> None:
    """The feed has a line for each field that a step found, once."""
    workspace.write_job(SHORT_JOB + "changes: {path: changes.csv, key: [First Name]}\n")
    workspace.write_leads(make_people(5), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.run_job(api)
        lines = workspace.read_output("changes.csv")
        assert Counter(line["field"] for line in lines) == {"work_email": 5, "link": 5}
        workspace.run_job(api)
        assert workspace.read_output("changes.csv") == []


@pytest.mark.long
def test_stragglers_hold_the_next_step_for_patience(workspace: Workspace, tmp_path: Path) -> None:
    """A task that runs too long no longer holds the others; the next run collects it and goes on."""
    workspace.write_job(SHORT_JOB + "policy: {patience: 2s}\n")
    workspace.write_leads(make_people(8), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        api.inject_fault("odd-status", 1, "post", polls=100_000)
        summary = workspace.run_job(api)
        rows = workspace.read_output()
        assert summary.exit_code == ExitCode.TIME
        assert statuses_of(rows, "email") == {"pending": 1, "found": 7}
        assert statuses_of(rows, "person") == {"pending": 1, "found": 7}


@pytest.mark.long
def test_limit_counts_leads_that_share_a_company(people: Workspace, api: SandboxApi) -> None:
    """Leads whose company is answered by another lead's request are begun only where the limit has room for them."""
    people.write_job(job_of("company", "email").replace("where: TRY_CAST(staff AS INT) > 50", "where: 'true'"))
    for number in range(1, 5):
        people.run_job(api, RunOptions(limit=9))
        begun = [row for row in people.read_output() if row["enrich_email_task_id"]]
        assert len(begun) == min(30, 9 * number)


@pytest.mark.long
def test_caps_count_leads_of_a_group(people: Workspace, api: SandboxApi) -> None:
    """Leads beyond the cap of their group take part in no step; those that were asked before stay."""
    steps = ("company", "email", "person")
    people.write_leads(make_people(12, 3), HEADER)
    people.write_job(
        job_of(*steps).replace("where: TRY_CAST(staff AS INT) > 50", "where: 'true'") + "caps: {by: Website, max: 2}\n"
    )
    people.run_job(api)
    rows = people.read_output()
    asked = [row for row in rows if row["enrich_email_task_id"]]
    assert [row["First Name"] for row in asked] == [f"First{number}" for number in range(6)]
    for row in rows[6:]:
        assert {row[f"enrich_{step}_status"] for step in steps} == {"filtered"}
        assert "per-group limit" in row["enrich_error"]
    # In another order the same leads are asked: those of earlier runs count first.
    people.write_leads(make_people(12, 3)[::-1], HEADER)
    summary = people.run_job(api)
    assert summary.submitted == 0
    assert sum(row["enrich_email_task_id"] != "" for row in people.read_output()) == 6
    assert people.run_in_process("collect", "job.yaml").exit_code == 0
    assert sum(row["enrich_email_task_id"] != "" for row in people.read_output()) == 6


@pytest.mark.long
def test_limited_run_names_invalid_and_filtered_rows(people: Workspace, api: SandboxApi) -> None:
    """In a limited run only what would be sent is pending; invalid and filtered rows are what they are."""
    leads = make_people(12)
    leads[5][0] = ""
    people.write_job(
        SHORT_JOB.replace("    columns: {work_email", "    where: Title = 'Engineer'\n    columns: {work_email")
    )
    people.write_leads(leads, HEADER)
    people.run_job(api, RunOptions(limit=2))
    rows = people.read_output()
    assert statuses_of(rows, "email")["filtered"] == 4
    assert statuses_of(rows, "email")["invalid"] == 1
    assert sum(row["enrich_email_task_id"] != "" for row in rows) == 2


def test_cells_that_are_left_out_of_any_step(workspace: Workspace, api: SandboxApi) -> None:
    """The summary counts the cells that any step leaves out of what it sends. One of two steps counts once."""
    job = SHORT_JOB.replace("columns: {work_email: email}", "columns: {work_email: email}\n    only_if_empty: [Email]")
    job = job.replace(
        "limits:",
        "  - name: again\n"
        "    waterfall: email_getter\n"
        "    only_if_empty: [Email, work_email]\n"
        "    params: {first_name: First Name, last_name: Last Name, company: {column: Website, transform: [domain]}}\n"
        "    columns: {other_email: email}\n"
        "  - name: phone\n"
        "    waterfall: phone_getter\n"
        "    params: {linkedin: LinkedIn}\n"
        "    columns: {phone: phone}\n"
        "limits:",
    )
    workspace.write_job(job)
    first, second, known = make_people(3)
    first[2] = known[2] = "gmail.com"
    known[3] = "ada@engine.example"
    workspace.write_leads([first, second, known], HEADER)

    summary = workspace.run_job(api)

    assert summary.left_out == {"company": {"free mail": 1}}

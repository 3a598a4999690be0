"""A job with steps against the same work by hand: several jobs, each of which reads the output of the one before."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from enrich.run.context import RunOptions
from tests.end_to_end.test_steps import HEADER, credits_of, make_people
from tests.support.workspace import SandboxApi, Workspace, serve_api

#: The example of the documentation: company, e-mail, a fallback by profile link, a check, a phone for directors.
STEPS: dict[str, str] = {
    "company": """
    waterfall: company_lookup
    params: {company_website: {column: Website, transform: [domain]}}
    columns: {staff: employees}
""",
    "email": """
    waterfall: email_getter
    where: TRY_CAST(staff AS INT) > 50
    params: {first_name: First Name, last_name: Last Name, company: Website}
    columns: {work_email: email}
""",
    "link": """
    waterfall: person_by_link
    only_if_empty: [work_email]
    params: {link: LinkedIn}
    columns: {work_email: work_email}
""",
    "verify": """
    enrichment: 10
    params: {email: work_email}
    columns: {email_state: status}
""",
    "phone": """
    waterfall: phone_getter
    where: "Title LIKE '%Director%' AND enrich_email_status = 'found'"
    params: {linkedin: LinkedIn}
    columns: {phone: phone}
""",
}
SHARED = "limits: {requests_per_second: 1000}\n"


def write_stepped_job(workspace: Workspace) -> None:
    """Write the job with steps."""
    steps = "".join(f"  - name: {name}{text.rstrip()}\n" for name, text in STEPS.items())
    workspace.write_job(
        f"version: 1\ninput: leads.csv\noutput: out.csv\nsteps:\n{steps}complete: [work_email]\n{SHARED}"
    )


def write_single_job(workspace: Workspace, name: str, read: str, written: str, text: str) -> None:
    """Write one step as a job of its own."""
    body = "".join(f"{line[4:]}\n" for line in text.strip("\n").splitlines())
    workspace.write_job(
        f"version: 1\nname: {name}\ninput: {read}\noutput: {written}\nledger: .enrich/{name}.db\n{body}{SHARED}"
    )


def questions_of(api: SandboxApi) -> list[str]:
    """Return what the API was asked, with the price of each question."""
    runs = [{name: value for name, value in run.items() if name != "task_ids"} for run in api.audit()["runs"]]
    return sorted(json.dumps(run, sort_keys=True) for run in runs)


@pytest.mark.long
def test_same_questions_same_bill_and_a_whole_file(workspace: Workspace, tmp_path: Path) -> None:
    """The steps ask what the jobs would ask by hand, at the same price, and their file keeps what these lose."""
    workspace.write_leads(make_people(60, 20), HEADER)
    with serve_api(tmp_path / "steps.db", hit_rate=0.6) as api:
        write_stepped_job(workspace)
        summary = workspace.run_job(api)
        asked, bill = questions_of(api), api.audit()["credits_charged"]
        rows = workspace.read_output()
    assert bill > 0
    assert credits_of(rows) == pytest.approx(bill)
    assert summary.credits_spent == pytest.approx(bill)

    with serve_api(tmp_path / "hand.db", hit_rate=0.6) as api:
        read = "leads.csv"
        for name, text in STEPS.items():
            by_hand = text.replace("work_email: work_email", "fallback: work_email")
            write_single_job(workspace, name, read, f"{name}.csv", by_hand)
            workspace.run_job(api, RunOptions(new_ledger=True))
            rows_by_hand = workspace.read_output(f"{name}.csv")
            read = f"{name}-next.csv"
            rewrite_by_hand(workspace.folder / read, name, rows_by_hand)
        assert questions_of(api) == asked
        assert api.audit()["credits_charged"] == pytest.approx(bill)
        # By hand the last job's columns replace those of the others: their status and their price are gone.
        assert credits_of(workspace.read_output("phone.csv")) < bill
    for row, by_hand_row in zip(rows, rows_by_hand, strict=True):
        assert row["staff"] == by_hand_row["staff"]
        assert row["work_email"] == by_hand_row["work_email"]
        assert row["phone"] == by_hand_row["phone"]
        assert row["email_state"] == by_hand_row["email_state"]


def rewrite_by_hand(path: Path, step: str, rows: list[dict[str, str]]) -> None:
    """Do what a person does between two jobs: keep the status under another name, move the fallback's value."""
    for row in rows:
        row[f"enrich_{step}_status"] = row.pop("enrich_status")
        for name in [name for name in row if name.startswith("enrich_") and not name.endswith("_status")]:
            del row[name]
        if fallback := row.pop("fallback", ""):
            row["work_email"] = fallback
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

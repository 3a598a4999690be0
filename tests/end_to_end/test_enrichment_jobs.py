"""Jobs that ask an enrichment instead of a waterfall: params, prices, pages, answers, and what the commands say."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from enrich.run.context import RunOptions
from tests.support.cases import first_quick, in_turn
from tests.support.documents import ROOT
from tests.support.workspace import (
    BOTH_BACKENDS,
    SandboxApi,
    Workspace,
    make_leads,
    serve_api,
)

VERIFY = """\
version: 1
input: leads.csv
output: out.csv
enrichment: 10
params: {email: Email}
columns: {email_state: status}
limits: {requests_per_second: 1000}
"""
PEOPLE = """\
version: 1
input: leads.csv
output: out.csv
enrichment: 60
params: {company_website: {column: Website, transform: [domain]}, limit: Number, seniority: Level}
columns: {first: first_name, second: 1.first_name}
limits: {max_credits: 100}
"""
PLACES = """\
version: 1
input: leads.csv
output: out.csv
enrichment: 70
pagination: {pages: 2}
params: {query: Query}
columns: {first: name, eleventh: 10.name}
limits: {max_credits: 100}
"""


def write_emails(workspace: Workspace, count: int, job: str = VERIFY) -> None:
    """Write a job and a list of addresses."""
    workspace.write_job(job)
    workspace.write_leads([[f"ada{number}@engine.example"] for number in range(count)], ["Email"])


def write_people(workspace: Workspace, *rows: tuple[str, str, str], **replaced: str) -> None:
    """Write a job that is priced by the number of people, and its input."""
    workspace.write_job(PEOPLE, **replaced)
    workspace.write_leads(rows, ["Website", "Number", "Level"])


def write_queries(workspace: Workspace, count: int, **replaced: str) -> None:
    """Write a job with pages, and its input."""
    workspace.write_job(PLACES, **replaced)
    workspace.write_leads([[f"bakery {number}"] for number in range(count)], ["Query"])


@BOTH_BACKENDS
def test_answers_prices_and_source(api: SandboxApi, workspace: Workspace) -> None:
    """A run asks once for each address, pays the price of each, and names the source of each answer."""
    write_emails(workspace, 5)
    with (workspace.folder / "leads.csv").open("a", encoding="utf-8") as file:
        file.write("ADA0@engine.example\nno address\n")

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.rows, summary.submitted, summary.found, summary.invalid) == (0, 7, 5, 6, 1)
    rows = workspace.read_output()
    assert {row["email_state"] for row in rows[:6]} <= {"valid", "invalid", "catch_all"}
    assert [row["enrich_provider"] for row in rows] == ["Mailproof"] * 6 + [""]
    audit = api.audit()
    assert sum(float(row["enrich_credits"] or 0) for row in rows) == pytest.approx(audit["credits_charged"]) == 0.05
    assert {entry["enrichment"] for entry in audit["runs"]} == {10}
    assert workspace.run_job(api).submitted == 0


@pytest.mark.long
def test_shipped_job_verifies_addresses(api: SandboxApi, workspace: Workspace) -> None:
    """`jobs/verify_emails.yaml` asks once for each address of its sample, and skips what is none."""
    made = workspace.run_in_process(
        "run", str(ROOT / "jobs" / "verify_emails.yaml"), "--ledger", "l.db", "--output", "out.csv", "--json", api=api
    )
    summary = made.json_output
    rows = workspace.read_output()
    counts = [summary[name] for name in ("exit_code", "rows", "submitted", "found", "invalid")]
    assert counts == [0, 23, 20, 21, 2]
    assert [bool(row["email_state"]) for row in rows].count(True) == 21
    assert sum(float(row["enrich_credits"] or 0) for row in rows) == pytest.approx(0.2)
    assert api.audit()["credits_charged"] == pytest.approx(0.2)


def test_default_columns_are_all_fields(api: SandboxApi, workspace: Workspace) -> None:
    """Without `columns` the output has the fields of the description."""
    write_emails(workspace, 1, VERIFY.replace("columns: {email_state: status}\n", ""))
    workspace.run_job(api)
    (row,) = workspace.read_output()
    assert {"email", "status", "reason"} <= row.keys()


SHAPES = ("wrapped", "wrapper_object", "flat", "flat_list")
MISSES = ("null", "empty_list", "empty_object", "null_result", "blank_result", "no_data")


@pytest.mark.long
@in_turn(("miss", "shape"), list(product(MISSES, SHAPES)))
def test_shapes_and_misses(tmp_path: Path, shape: Any, miss: Any) -> None:
    """Answers of every shape are read, and every kind of miss is a miss."""
    workspace = Workspace(tmp_path)
    workspace.write_job(VERIFY, enrichment="80", params="{phone: Phone}", columns="{kind: line_type, also: $line_type}")
    workspace.write_leads([[f"+1-202-555-01{number:02}"] for number in range(6)], ["Phone"])
    settings: dict[str, Any] = {"shape": shape, "miss_kinds": (miss,), "hit_rate": 0.5, "no_data_seconds": 0.1}
    with serve_api(tmp_path / "api.db", **settings) as api:
        summary = workspace.run_job(api)
        audit = api.audit()
    rows = workspace.read_output()
    found = [row["enrich_status"] for row in rows].count("found")
    assert (summary.exit_code, summary.found, summary.not_found) == (0, found, 6 - found)
    assert 0 < found < 6
    assert {row["kind"] for row in rows if row["enrich_status"] == "found"} <= {"mobile", "landline"}
    assert all(row["kind"] == row["also"] for row in rows)
    assert audit["credits_charged"] == pytest.approx(0.1 * found)


def test_bulk_tasks(api: SandboxApi, workspace: Workspace) -> None:
    """Many addresses go as one task; each row has its own answer."""
    write_emails(workspace, 25, VERIFY + "dispatch: {bulk: 10}\n")
    summary = workspace.run_job(api)
    assert (summary.exit_code, summary.submitted, summary.found) == (0, 25, 25)
    assert api.audit()["requests"]["bulk_run"] == 3
    assert all(row["email_state"] for row in workspace.read_output())


def test_kind_of_target_is_in_the_fingerprint(api: SandboxApi, workspace: Workspace) -> None:
    """A waterfall and an enrichment with equal params are different requests in one ledger."""
    write_emails(workspace, 3)
    workspace.run_job(api)
    workspace.write_job(VERIFY, enrichment="12")
    assert workspace.run_job(api).submitted == 3
    text = VERIFY.replace("enrichment: 10", "waterfall: person_getter").replace("email_state: status", "a: first_name")
    workspace.write_job(text)
    assert workspace.run_job(api).submitted == 3
    audit = api.audit()
    assert (audit["accepted"], audit["paid_twice"]) == (9, 0)


@pytest.mark.parametrize("shape", first_quick(0, SHAPES))
def test_paths_beside_the_result_of_a_waterfall(tmp_path: Path, workspace: Workspace, shape: Any) -> None:
    """Columns reach what each provider knew, also of one with dots in its name; in flat answers `$x` is `x`."""
    job = """\
version: 1
input: leads.csv
output: out.csv
waterfall: company_lookup
enrichments: [317, 301]
params: {company_website: {column: Website, transform: [domain]}}
columns: {rounds: funding.rounds, size: employees, by: $steps.0.provider, same: $employees}
limits: {requests_per_second: 1000}
"""
    dotted = "$enrichment_data.Orgsight.example.employees"
    workspace.write_job(job.replace("same: $employees", f'same: $employees, theirs: "{dotted}"'))
    workspace.write_leads(make_leads(12))
    with serve_api(tmp_path / "api.db", shape=shape, hit_rate=0.7, miss_kinds=("null", "blank_result")) as api:
        summary = workspace.run_job(api)
    rows = workspace.read_output()
    found = [row for row in rows if row["enrich_status"] == "found"]
    assert (summary.found, summary.not_found) == (len(found), 12 - len(found))
    assert 0 < len(found) < 12
    assert all(row["size"] and row["rounds"] for row in found)
    if shape.startswith("wrap"):
        assert all(row["by"] == "Orgsight.example" for row in found)
        assert {row["theirs"] == row["size"] for row in found if row["enrich_provider"] == row["by"]} == {True}
        assert not any(row["same"] for row in rows)
    else:
        assert all(row["same"] == row["size"] for row in found)
        assert not any(row["by"] or row["theirs"] for row in rows)


class TestPricePerParameter:
    """The price of a request is multiplied with one of its params."""

    def test_price_of_each_row(self, api: SandboxApi, workspace: Workspace) -> None:
        """Each row pays for its own number; what is no number, or none of the choices, is not sent."""
        write_people(
            workspace,
            ("a.example", "4", "Senior"),
            ("b.example", "2", ""),
            ("c.example", "many", ""),
            ("d.example", "", ""),
            ("e.example", "9" * 5_000, ""),
            ("f.example", "3", "boss"),
            ("g.example", "0", ""),
        )
        summary = workspace.run_job(api)
        rows = workspace.read_output()
        assert [row["enrich_credits"] for row in rows[:2]] == ["0.6", "0.3"] or summary.not_found
        assert [row["enrich_status"] for row in (*rows[2:5], rows[6])] == ["invalid"] * 4
        assert "no whole number above 0" in rows[2]["enrich_error"]
        assert "limit blank" in rows[3]["enrich_error"]
        sent = {entry["params"]["company_website"]: entry["params"] for entry in api.audit()["runs"]}
        assert sent["a.example"]["seniority"] == "senior"
        assert "seniority" not in sent["f.example"]
        assert sent.keys() == {"a.example", "b.example", "f.example"}

    @BOTH_BACKENDS
    def test_reaches_every_row_of_a_list(self, tmp_path: Path, workspace: Workspace) -> None:
        """A column takes the first row of a list, or the one with a number."""
        write_people(workspace, ("a.example", "3", ""))
        with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
            workspace.run_job(api)
        (row,) = workspace.read_output()
        assert row["first"]
        assert row["second"]
        assert row["enrich_status"] == "found"

    def test_cap_holds_with_prices_by_row(self, tmp_path: Path, workspace: Workspace) -> None:
        """Each request reserves its own price, so the cap holds and is used."""
        rows = [(f"company{number}.example", str(1 + number % 20), "") for number in range(60)]
        write_people(workspace, *rows, limits="{max_credits: 12}")
        with serve_api(tmp_path / "api.db", hit_rate=1.0, latency="fixed(0.2)") as api:
            summary = workspace.run_job(api)
            audit = api.audit()
        assert summary.exit_code == 12
        assert 12 - 3 < audit["credits_charged"] <= 12
        assert audit["credits_charged"] == pytest.approx(summary.credits_spent)
        reserved = workspace.sql("SELECT DISTINCT reserved FROM attempts ORDER BY reserved")
        assert reserved[0] == (150_000,)
        assert len(reserved) > 5

    def test_constant_makes_an_exact_price(self, api: SandboxApi, workspace: Workspace) -> None:
        """With a constant the plan knows the highest price."""
        write_people(workspace, ("a.example", "", ""), ("b.example", "", ""))
        workspace.write_job(PEOPLE, params='{company_website: Website, limit: {value: "20"}}')
        plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        assert (plan["worst_price"], plan["cost"]["max"], plan["priced_by"]) == (3.0, 6.0, None)

    def test_plan_without_a_limit_of_the_price(self, api: SandboxApi, workspace: Workspace) -> None:
        """Where the price depends on the row, the most that the plan and the run's summary expect is the cap."""
        write_people(workspace, ("a.example", "5", ""), ("b.example", "7", ""))
        plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        assert (plan["worst_price"], plan["cost"]["max"], plan["priced_by"]) == (None, 100.0, "limit")
        shown = workspace.run_in_process("plan", "job.yaml", "-v", api=api).stdout
        assert "People of a company 60 (0.15) times limit" in shown
        planned = workspace.run_job(api).planned
        assert planned is not None
        assert planned["max"] == 100.0

    @in_turn(
        ("changed", "message"),
        [
            ({"limits": "{in_flight: 5}"}, "`max_credits` is required"),
            ({"params": "{company_website: Website}"}, "requires `limit`"),
            ({"params": '{company_website: Website, limit: {value: "few"}}'}, "is not a whole number above 0"),
            ({"params": '{company_website: Website, limit: Number, seniority: {value: "diretor"}}'}, "`director`"),
            ({"params": "{company_website: Website, limit: Number, senority: Level}"}, "`seniority`"),
            ({"columns": "{first: frist_name}"}, "`first_name`"),
            ({"pagination": "{pages: 2}"}, "has no pages"),
            ({"enrichment": "61"}, "known: 10, 12, 60, 70, 80"),
        ],
    )
    def test_refuses_before_anything_is_sent(
        self, api: SandboxApi, workspace: Workspace, changed: dict[str, str], message: str
    ) -> None:
        """Wrong names and values, and a price without a limit, are errors of the job."""
        write_people(workspace, ("a.example", "5", ""), **changed)
        for command in (["run"], ["check", "--online"]):
            result = workspace.run_in_process(command[0], "job.yaml", *command[1:], api=api)
            assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
        assert api.audit()["accepted"] == 0

    def test_cap_of_the_command_line(self, api: SandboxApi, workspace: Workspace) -> None:
        """`--max-credits` is a limit, too, and what was paid can be collected without it."""
        write_people(workspace, ("a.example", "5", ""), limits="{in_flight: 5}")
        assert workspace.run_in_process("run", "job.yaml", "--max-credits", "5", api=api).exit_code == 0
        assert workspace.run_in_process("collect", "job.yaml").exit_code == 0


class TestPages:
    """An enrichment with pages is paid by page."""

    def test_pages_are_fetched_and_paid(self, tmp_path: Path, workspace: Workspace) -> None:
        """The job's pages are fetched; each costs its price, and rows of the second page can be reached."""
        write_queries(workspace, 2)
        with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
            summary = workspace.run_job(api)
            audit = api.audit()
        assert (summary.found, summary.credits_spent) == (2, 4.0)
        assert {entry["pages"] for entry in audit["runs"]} == {2}
        assert all(row["first"] and row["eleventh"] for row in workspace.read_output())
        assert workspace.sql("SELECT DISTINCT reserved FROM attempts") == [(2_000_000,)]

    @pytest.mark.long
    def test_one_page_is_the_default(self, api: SandboxApi, workspace: Workspace) -> None:
        """One page and no word about pages are the same request; more pages are another."""
        for pages, submitted in (("{pages: 1}", 1), ("null", 0), ("{pages: 3}", 1)):
            write_queries(workspace, 1, pagination=pages)
            assert workspace.run_job(api).submitted == submitted

    def test_needs_a_cap(self, api: SandboxApi, workspace: Workspace) -> None:
        """A price by page needs `max_credits`."""
        write_queries(workspace, 1, limits="{in_flight: 5}")
        result = workspace.run_in_process("run", "job.yaml", api=api)
        assert (result.exit_code, "grows with each page" in result.stderr) == (2, True)


def test_commands_know_enrichments(api: SandboxApi, workspace: Workspace) -> None:
    """Check, status, explain, reconcile and the receipt name the enrichment and its source."""
    write_emails(workspace, 4)
    offline = workspace.run_in_process("check", "job.yaml")
    assert (offline.exit_code, "the enrichment `10` is not in the documentation" in offline.stderr) == (0, True)
    receipt = workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output
    assert receipt["providers"] == [
        {
            "name": "Mailproof",
            "verifies": False,
            "asked": 4,
            "presumed": 0,
            "found": 4,
            "rejected": 0,
            "credits": 0.04,
            "cost_per_hit": 0.01,
        }
    ]
    checked = workspace.run_in_process("check", "job.yaml", "--json", api=api).json_output
    assert (checked["enrichment"], checked["described_by"]) == (10, "the API at the last run")
    assert "waterfall" not in checked
    explained = workspace.run_in_process("explain", "job.yaml", "--row", "1", "--json").json_output
    assert explained["rows"][0]["request"]["enrichment"] == 10
    assert "enrichment 10" in workspace.run_in_process("explain", "job.yaml", "--row", "1").stdout
    assert workspace.run_in_process("status", "job.yaml", "--json").exit_code == 0
    assert workspace.run_in_process("reconcile", "job.yaml", api=api).exit_code == 0


@pytest.mark.long
def test_report_names_the_enrichment(api: SandboxApi, workspace: Workspace) -> None:
    """The report has a waterfall of the enrichment's sources."""
    write_emails(workspace, 4)
    workspace.run_job(api)
    assert workspace.run_in_process("report", "job.yaml", "-o", "report.html").exit_code == 0
    page = (workspace.folder / "report.html").read_text(encoding="utf-8")
    assert 'Enrichment <bdi class="which">10, all runs' in page
    assert "Mailproof" in page


def test_changed_price_is_told(api: SandboxApi, workspace: Workspace) -> None:
    """`check --online` names a changed price, and a saved plan of the old one is refused."""
    write_emails(workspace, 4)
    workspace.run_job(api, RunOptions(limit=1))
    assert workspace.run_in_process("plan", "job.yaml", "-o", "plan.json", api=api).exit_code == 0
    api.set_prices({10: 0.5})
    checked = workspace.run_in_process("check", "job.yaml", "--online", api=api)
    assert "0.01 credits before, 0.5 credits now (more expensive)" in checked.stderr
    refused = workspace.run_in_process("run", "job.yaml", "--plan", "plan.json", api=api)
    assert (refused.exit_code, "the prices changed" in refused.stderr) == (5, True)


@pytest.mark.parametrize(("number", "limited"), first_quick(1, [("70", True), ("10", False), ("60", True)]))
def test_init_writes_a_job_that_runs(api: SandboxApi, workspace: Workspace, number: str, *, limited: bool) -> None:
    """`init --enrichment` matches the columns, says the price, and sets a cap where the price has no limit."""
    header = ["email", "company_website", "limit", "query"]
    workspace.write_leads([["ada@engine.example", "engine.example", "2", "bakery"]], header)
    made = workspace.run_in_process("init", "leads.csv", "--enrichment", number, "-o", "job.yaml", "--force", api=api)
    assert made.exit_code == 0, made.stderr
    text = workspace.job_file.read_text(encoding="utf-8")
    assert ("\nlimits: {max_credits: 100}" in text) == limited
    assert ("pagination: {pages: 1}" in text) == (number == "70")
    assert workspace.run_in_process("check", "job.yaml", "--online", api=api).exit_code == 0
    assert workspace.run_in_process("run", "job.yaml", "--yes", api=api).exit_code == 0
    assert api.audit()["accepted"] == 1


def test_init_chooses_one_target(api: SandboxApi, workspace: Workspace) -> None:
    """An enrichment and a waterfall, an unknown number, and `--offline` are refused."""
    write_emails(workspace, 1)
    for wrong in (["--waterfall", "email_getter"], ["--offline"]):
        assert workspace.run_in_process("init", "leads.csv", "--enrichment", "10", *wrong, api=api).exit_code == 2
    unknown = workspace.run_in_process("init", "leads.csv", "--enrichment", "99", "-o", "new.yaml", api=api)
    assert (unknown.exit_code, "the API has no enrichment `99`" in unknown.stderr) == (2, True)


def test_enrichments_lists_and_shows(api: SandboxApi, workspace: Workspace) -> None:
    """`enrich enrichments` lists all or some of them with their prices, and shows one with its params."""
    listed = workspace.run_in_process("enrichments", api=api).stdout
    assert "60  People of a company  0.15 credits for each limit" in listed
    # The API's list says nothing of pages.
    assert "70  Search places  1 credit" in listed
    assert "1 credit for each page" in workspace.run_in_process("enrichments", "70", api=api).stdout
    assert len(listed.splitlines()) == 5
    assert [line[:2] for line in workspace.run_in_process("enrichments", "email", api=api).stdout.splitlines()] == [
        "10",
        "12",
    ]
    assert len(workspace.run_in_process("enrichments", "a", "--json", api=api).json_output) == 5
    shown = workspace.run_in_process("enrichments", "60", api=api).stdout
    assert "seniority               select: entry, senior, director" in shown
    assert "price: 0.15 credits for each limit" in shown
    detail = workspace.run_in_process("enrichments", "60", "--json", api=api).json_output
    assert (detail["id"], detail["pricing"]["parameter"]) == (60, "limit")
    missing = workspace.run_in_process("enrichments", "99", api=api)
    assert (missing.exit_code, "no enrichment `99`" in missing.stderr) == (2, True)


@in_turn(
    ("keys", "message"),
    [
        ("enrichment: 10\nwaterfall: email_getter", "either a `waterfall` or an `enrichment`"),
        ('enrichment: "10"', "enrichment"),
        ("enrichment: 0", "enrichment"),
        ("enrichment: 10\nenrichments: [833]", "is for waterfalls"),
        ("enrichment: 10\nemail_verifier: 10", "is for waterfalls"),
        ("waterfall: email_getter\npagination: {pages: 2}", "is for enrichments"),
        ("enrichment: 70\npagination: {pages: 101}", "pages"),
        ("enrichment: 70\npagination: {page: 1}", "did you mean `pages`?"),
        ("name: a", "waterfall: is missing"),
    ],
)
def test_keys_of_one_target(workspace: Workspace, keys: str, message: str) -> None:
    """A job has one target, and only the keys of its kind; an error names the line."""
    workspace.write_leads([], ["Email"])
    workspace.write_job(VERIFY.replace("enrichment: 10", keys))
    result = workspace.run_in_process("check", "job.yaml")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_open_tasks_are_collected_by_their_own_columns(tmp_path: Path, workspace: Workspace) -> None:
    """An interrupted run is resumed, and its answers are those of the enrichment."""
    write_emails(workspace, 6)
    with serve_api(tmp_path / "api.db", latency="fixed(30)") as api:
        workspace.submit_without_collecting(api)
        api.advance(60)
        summary = workspace.run_job(api)
        audit = api.audit()
    assert (summary.exit_code, summary.found, summary.submitted) == (0, 6, 0)
    assert (audit["accepted"], audit["paid_twice"]) == (6, 0)
    answers = [json.loads(answer)["data"] for (answer,) in workspace.sql("SELECT answer FROM attempts")]
    assert {answer[0]["email"] for answer in answers} == {row["Email"] for row in workspace.read_output()}

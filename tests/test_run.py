"""The happy way of a row, end to end, and everything else that can be said of one."""

from __future__ import annotations

import csv
import gzip
import json
import os
import stat
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from enrich.model import RowStatus
from enrich.sandbox.settings import Shape
from enrich.surroundings import Options
from tests.harness import BOTH_IN_TIME, HASTY, Api, Office, people, serving

#: What section 5 of the contract promises; other people's scripts read these.
RECEIPT = {
    *("execution", "job", "rows", "requests", "submitted", "reused", "credits_spent", "polls", "rate_limited"),
    *("elapsed_s", "output", "exit_code", "found", "not_found", "failed", "expired", "in_doubt", "invalid"),
    *("filtered", "pending", "credits_unknown"),
}


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def test_a_csv_of_leads_comes_back_enriched(api: Api, office: Office) -> None:
    """Every row comes back in order, with the new columns and its status."""
    leads = people(60)
    office.write_leads(leads)

    done = office.command("run", "job.yaml", "--json", api=api)

    assert done.code == 0, done.stderr
    assert done.receipt["rows"] == done.receipt["requests"] == done.receipt["submitted"] == 60
    output = office.output()
    assert [row["First Name"] for row in output] == [lead[0] for lead in leads]
    assert {row["enrich_status"] for row in output} == {"found", "not_found"}
    assert all(bool(row["work_email"]) == (row["enrich_status"] == "found") for row in output)
    audit = api.audit()
    assert audit["accepted"] == 60
    assert audit["paid_twice"] == 0
    assert sum(float(row["enrich_credits"] or 0) for row in output) == audit["credits_charged"]


def test_the_second_night_pays_nothing(api: Api, office: Office) -> None:
    """The same command again answers from the ledger and writes the same output."""
    office.write_leads(people(20))
    office.command("run", "job.yaml", api=api)
    first = office.output()

    done = office.command("run", "job.yaml", "--json", api=api)

    assert done.code == 0
    assert (done.receipt["submitted"], done.receipt["reused"], done.receipt["credits_spent"]) == (0, 20, 0)
    assert office.output() == first
    assert api.audit()["accepted"] == 20


def test_the_json_receipt_is_one_object_with_the_promised_names(api: Api, office: Office) -> None:
    """Stdout carries one object that agrees with the output and the API; nothing else is said anywhere."""
    office.write_leads(people(12))

    done = office.enrich("run", "job.yaml", "--json", api=api)

    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    receipt = done.receipt
    assert receipt.keys() >= RECEIPT
    by_status = Counter(row["enrich_status"] for row in office.output())
    assert {status.value: receipt[status.value] for status in RowStatus} == {
        status.value: by_status[status] for status in RowStatus
    }
    audit = api.audit()
    assert receipt["credits_spent"] == audit["credits_charged"] == pytest.approx(10_000 - receipt["balance_after"])
    assert receipt["polls"] == audit["requests"]["task"]
    assert receipt["output"] == str(office.folder / "out.csv")
    assert (receipt["job"], receipt["exit_code"], receipt["credits_unknown"]) == ("job", 0, 0)


def test_a_successful_run_off_a_terminal_says_nothing(api: Api, office: Office) -> None:
    """Cron sends no mail about a night that went well."""
    office.write_leads(people(3))

    done = office.command("run", "job.yaml", api=api)

    assert (done.code, done.stdout, done.stderr) == (0, "", "")


def test_leads_come_and_go_as_gzip(api: Api, office: Office) -> None:
    """`.csv.gz` is read and written by its name alone."""
    office.write_job(input="leads.csv.gz", output="out.csv.gz")
    plain = office.write_leads(people(5))
    (office.folder / "leads.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()

    receipt = office.run(api)

    assert receipt.exit_code == 0
    with gzip.open(office.folder / "out.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["First Name"] for row in rows] == [f"First{number}" for number in range(5)]
    assert {row["enrich_status"] for row in rows} <= {"found", "not_found"}


def test_parquet_keeps_text_as_text_and_credits_as_numbers(api: Api, office: Office) -> None:
    """A Parquet output has all columns of the input as text, nulls for what is not known, and numeric credits."""
    office.write_job(output="out.parquet")
    leads = people(8)
    leads[0][4] = "=007"
    office.write_leads(leads)

    receipt = office.run(api)

    assert receipt.exit_code == 0
    frame = pl.read_parquet(office.folder / "out.parquet")
    assert frame["Note"].to_list() == [lead[4] for lead in leads]
    assert frame["Email"].to_list() == [""] * 8
    assert frame.schema["enrich_credits"] == pl.Float64()
    assert frame.filter(pl.col("enrich_status") == "not_found")["work_email"].is_null().all()
    assert frame["enrich_credits"].sum() == pytest.approx(api.audit()["credits_charged"])
    assert stat.S_IMODE((office.folder / "out.parquet").stat().st_mode) == 0o600


def test_one_output_can_hold_every_status(tmp_path: Path, office: Office) -> None:
    """Found, not found, failed, expired, in doubt, invalid, filtered and pending rows stand side by side."""
    state = tmp_path / "api.db"
    leads = people(30)
    leads[5][2] = ""
    leads[6][4] = "leave out"
    office.write_job(where="Note <> 'leave out'")
    office.write_leads(leads[:1])
    with serving(state, latency="fixed(60)") as slow:
        office.leave_at_the_api(slow)
        slow.advance(200_000)
    office.write_leads(leads)
    with serving(state, failure_rate=0.3, free_failures=0.0, hit_rate=0.5) as api:
        api.fault("no-task-id")

        receipt = office.run(api, Options(limit=22), HASTY)

        audit = api.audit()
    output = office.output()
    by_status = Counter(row["enrich_status"] for row in output)
    assert set(by_status) == {status.value for status in RowStatus}
    assert {status: getattr(receipt, status) for status in by_status} == by_status
    assert output[0]["enrich_status"] == "expired"
    assert (by_status["in_doubt"], by_status["pending"]) == (1, 30 - 2 - 1 - 22)
    assert output[5]["enrich_status"] == "invalid"
    assert output[5]["enrich_error"] == "company is empty (Website, Email)"
    assert output[6]["enrich_status"] == "filtered"
    assert all(row["enrich_error"] for row in output if row["enrich_status"] in ("failed", "expired", "in_doubt"))
    assert all(not row["enrich_credits"] for row in output if row["enrich_status"] in ("expired", "in_doubt"))
    assert not any(row["work_email"] for row in output if row["enrich_status"] != "found")
    assert receipt.exit_code == 14
    assert audit["paid_twice"] == 0


@pytest.mark.parametrize("shape", ["wrapped", "wrapper_object", "flat", "flat_list"])
def test_every_shape_of_a_result_is_read(tmp_path: Path, office: Office, shape: Shape) -> None:
    """The documents disagree about the shape of a result; each gives the same e-mail and the same bill."""
    office.write_leads(people(12))
    kinds = ("null", "empty_list", "empty_object", "null_result", "blank_result", "no_data")
    with serving(tmp_path / "api.db", shape=shape, miss_kinds=kinds, aliases=shape == "flat") as api:
        receipt = office.run(api, timing=HASTY)
        audit = api.audit()

    assert (receipt.exit_code, receipt.found, receipt.not_found) == (0, 10, 2)
    output = office.output()
    assert all(row["work_email"].endswith(".example") for row in output if row["enrich_status"] == "found")
    assert sum(float(row["enrich_credits"]) for row in output) == audit["credits_charged"] == receipt.credits_spent


def test_dotted_paths_and_json_values_become_cells(api: Api, office: Office) -> None:
    """A column takes a field of a nested result; objects and lists are written as JSON, numbers as they are."""
    office.write_job(
        waterfall="company_lookup",
        params="{company_website: Website}",
        columns='{city: headquarters.city, size: employees, stack: technologies, first: "technologies.0"}',
    )
    office.write_leads(people(12))

    receipt = office.run(api)

    assert receipt.exit_code == 0
    found = [row for row in office.output() if row["enrich_status"] == "found"]
    assert found
    for row in found:
        assert row["city"].isalpha()
        assert int(row["size"]) > 0
        assert json.loads(row["stack"])[0] == row["first"]


def test_the_waterfalls_own_fields_are_the_columns_by_default(api: Api, office: Office) -> None:
    """Without `columns` the output has the waterfall's output fields."""
    office.write_job(waterfall="person_getter", params="{email: Email}")
    text = office.job_file.read_text().replace("columns:\n  work_email: email\n", "")
    office.job_file.write_text(text)
    office.write_leads([["", "", "", f"ada.byron{number}@engine.example", ""] for number in range(6)])

    receipt = office.run(api)

    assert receipt.exit_code == 0
    row = next(row for row in office.output() if row["enrich_status"] == "found")
    assert row["first_name"] == "Ada"
    assert row["linkedin_url"].startswith("https://")


def test_misses_that_cost_are_billed_like_hits(tmp_path: Path, office: Office) -> None:
    """Providers may charge for nothing found: the column shows it and sums to the bill."""
    office.write_leads(people(12))
    with serving(tmp_path / "api.db", charge_misses=True, hit_rate=0.4) as api:
        receipt = office.run(api)
        audit = api.audit()

    output = office.output()
    assert all(float(row["enrich_credits"]) > 0 for row in output)
    assert sum(float(row["enrich_credits"]) for row in output) == pytest.approx(audit["credits_charged"])
    assert receipt.credits_spent == pytest.approx(audit["credits_charged"])


def test_a_price_that_nobody_tells_is_not_shown_as_nothing(tmp_path: Path, office: Office) -> None:
    """Where the API hides what an answer cost, the cell is blank and the receipt counts it as unknown."""
    office.write_leads(people(9))
    with serving(tmp_path / "api.db", hide_credits=True, shape="flat") as api:
        receipt = office.run(api)

    assert (receipt.exit_code, receipt.credits_unknown, receipt.credits_spent) == (0, 9, 0)
    assert {row["enrich_credits"] for row in office.output()} == {""}


def test_the_prices_of_the_steps_stand_in_for_a_hidden_price(tmp_path: Path, office: Office) -> None:
    """Where the API hides the sum but shows its parts, the parts are added up."""
    office.write_leads(people(9))
    with serving(tmp_path / "api.db", hide_credits=True, miss_kinds=("null_result",)) as api:
        receipt = office.run(api)
        audit = api.audit()

    assert receipt.credits_unknown == 0
    assert receipt.credits_spent == pytest.approx(audit["credits_charged"])


def test_the_chosen_providers_and_verifier_are_asked_in_the_jobs_order(api: Api, office: Office) -> None:
    """`enrichments` and `email_verifier` go to the API as they stand, and the output names who knew."""
    office.write_job(enrichments="[966, 833]", email_verifier="10")
    office.write_leads(people(9))

    receipt = office.run(api)

    assert receipt.exit_code == 0
    audit = api.audit()
    assert {(tuple(run["enrichments"]), run["email_verifier"]) for run in audit["runs"]} == {((966, 833), 10)}
    providers = {row["enrich_provider"] for row in office.output() if row["enrich_status"] == "found"}
    assert providers <= {"Peoplegrid", "Mailhound"}
    assert receipt.credits_spent == pytest.approx(audit["credits_charged"])


def test_the_default_providers_are_resolved_and_sent(api: Api, office: Office) -> None:
    """A job that names no providers sends the waterfall's own, so that a change of the vendor's changes nothing."""
    office.write_leads(people(1))

    office.run(api)

    assert api.audit()["runs"][0]["enrichments"] == [833, 966, 701, 745]


def test_equal_questions_are_paid_once(api: Api, office: Office) -> None:
    """Rows that ask the same share the answer; what it cost is shown on the first, so the column sums to the bill."""
    leads = people(6)
    spelt_otherwise = [["  First0 ", "Last0", "company0.example", "", "another"], *leads]
    office.write_leads([*leads, *spelt_otherwise])

    receipt = office.run(api)

    output = office.output()
    audit = api.audit()
    assert (receipt.rows, receipt.requests, receipt.submitted, audit["accepted"]) == (13, 6, 6, 6)
    assert [row["work_email"] for row in output[7:]] == [row["work_email"] for row in output[:6]]
    assert output[6]["work_email"] == output[0]["work_email"]
    assert output[6]["enrich_task_id"] == output[0]["enrich_task_id"]
    assert {row["enrich_credits"] for row in output[6:]} == {""}
    assert sum(float(row["enrich_credits"] or 0) for row in output) == audit["credits_charged"]


def test_without_dedupe_every_row_is_asked_literally(api: Api, office: Office) -> None:
    """`dedupe: false` runs and pays for each row, once: the second night still pays nothing."""
    office.write_job(dedupe="false")
    office.write_leads(people(3) * 2)

    first = office.run(api)
    second = office.run(api)

    assert (first.requests, first.submitted, second.submitted, second.reused) == (6, 6, 0, 6)
    audit = api.audit()
    assert (audit["accepted"], audit["distinct"]) == (6, 3)
    assert sum(float(row["enrich_credits"] or 0) for row in office.output()) == audit["credits_charged"]


def test_only_rows_that_need_it_are_asked(api: Api, office: Office) -> None:
    """`only_if_empty` leaves rows alone that have the answer already."""
    leads = people(6)
    leads[2][3] = "known@company2.example"
    leads[3][3] = "   "
    office.write_job(only_if_empty="[Email]")
    office.write_leads(leads)

    receipt = office.run(api)

    assert (receipt.submitted, receipt.filtered) == (5, 1)
    assert office.output()[2]["enrich_status"] == "filtered"


def test_what_a_spreadsheet_would_run_is_written_as_text(
    api: Api, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A formula that comes from the API gets a quote in CSV; the person's own cells stay as they are."""
    monkeypatch.setattr("enrich.sandbox.answers.fields", lambda *_: {"email": '=HYPERLINK("http://evil.example")'})
    leads = people(6)
    leads[0][4] = "=1+1"
    office.write_leads(leads)

    office.run(api)

    output = office.output()
    assert output[0]["Note"] == "=1+1"
    assert {row["work_email"] for row in output} == {"", '\'=HYPERLINK("http://evil.example")'}


def test_leads_of_every_script_are_asked_and_come_back(api: Api, office: Office) -> None:
    """Accents, other alphabets and emoji pass through unharmed, in the question and in the output."""
    names = [["Zoë", "Müller-Ünal"], ["김", "민준"], ["Ольга", "Иванова"], ["🦊", "O'Brien"]]
    office.write_leads([[*name, "https://www.münchen.example", "", "ñ"] for name in names])

    receipt = office.run(api)

    assert receipt.exit_code == 0
    assert [[row["First Name"], row["Last Name"]] for row in office.output()] == names
    assert {run["params"]["first_name"] for run in api.audit()["runs"]} == {name[0] for name in names}


def test_files_are_private_and_hold_neither_key_nor_needless_names(tmp_path: Path, office: Office) -> None:
    """Every file we write is for its owner only, none holds the key, and the log knows nobody's name."""
    key = "key-4f1c-that-nobody-must-see"
    office.write_leads([["Adalbert", "Byronsson", "enginesmith.example", "", "private note"], *people(9)])
    before = set(office.folder.rglob("*"))
    with serving(tmp_path / "api.db", api_key=key, failure_rate=0.3) as api:
        api.fault("no-task-id")
        old = os.umask(0)
        try:
            done = office.command("run", "job.yaml", "--json", "--log-file", "logs/enrich.log", api=api)
        finally:
            os.umask(old)

    assert done.code == 14
    written = [path for path in office.folder.rglob("*") if path.is_file() and path not in before]
    assert {path.name for path in written} >= {"out.csv", "enrich.log"}
    assert office.server or {path.name for path in written} >= {"job.db", "job.db.lock"}
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert key.encode() not in path.read_bytes(), path
    assert key not in done.stdout + done.stderr
    log = (office.folder / "logs" / "enrich.log").read_text().replace(str(office.place), "the ledger")
    for private in ("Adalbert", "Byronsson", "enginesmith", "private note", "First1", "company1.example", "@"):
        assert private not in log
    lines = [json.loads(line) for line in log.splitlines()]
    assert lines[-1]["event"] == "end"
    assert lines[-1]["receipt"] == {key: value for key, value in done.receipt.items() if key not in ("error", "hint")}


def test_the_log_is_appended_to(api: Api, office: Office) -> None:
    """Each night adds its lines; none overwrites the last."""
    office.write_leads(people(2))

    office.command("run", "job.yaml", "--log-file", "enrich.log", api=api)
    office.command("run", "job.yaml", "--log-file", "enrich.log", api=api)

    lines = [json.loads(line) for line in (office.folder / "enrich.log").read_text().splitlines()]
    assert [line["receipt"]["execution"] for line in lines if line["event"] == "end"] == [1, 2]


def test_the_output_may_have_a_date_and_a_folder_of_its_own(api: Api, office: Office) -> None:
    """Codes of strftime are filled in with local time and missing folders are made."""
    office.write_job(output="'results/%Y/leads-%Y.csv'")
    office.write_leads(people(1))

    receipt = office.run(api)

    assert receipt.output is not None
    assert Path(receipt.output).is_file()
    assert Path(receipt.output).match("results/20??/leads-20??.csv")


def test_by_default_the_output_stands_beside_the_job(api: Api, office: Office) -> None:
    """Without `output` it is `<input>_enriched.csv`."""
    text = office.job_file.read_text().replace("output: out.csv\n", "")
    office.job_file.write_text(text)
    office.write_leads(people(1))

    office.run(api)

    assert len(office.output("leads_enriched.csv")) == 1


def test_another_separator_and_encoding_go_in_and_out(api: Api, office: Office) -> None:
    """The input says how it is written, the output how it is to be."""
    office.write_job(
        input='{path: leads.csv, separator: ";", encoding: cp1252}',
        output='{path: out.csv, separator: "\\t", encoding: utf-16}',
    )
    text = "First Name;Last Name;Website;Email;Note\nJürgen;Groß;engine.example;;5 €\n"
    (office.folder / "leads.csv").write_text(text, encoding="cp1252")

    receipt = office.run(api)

    assert receipt.exit_code == 0
    written = (office.folder / "out.csv").read_text(encoding="utf-16").splitlines()
    assert written[1].split("\t")[:5] == ["Jürgen", "Groß", "engine.example", "", "5 €"]
    assert api.audit()["runs"][0]["params"]["first_name"] == "Jürgen"


def test_an_output_of_an_older_night_is_replaced_whole(api: Api, office: Office) -> None:
    """The new file takes the old one's place, mode and all, and nothing is left beside it."""
    office.write_leads(people(2))
    old = office.folder / "out.csv"
    old.write_text("an old night\n")
    old.chmod(0o644)

    office.run(api)

    assert len(office.output()) == 2
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    assert [path.name for path in office.folder.glob("*part*")] == []


def test_the_output_takes_an_api_that_limits_its_rate(tmp_path: Path, office: Office) -> None:
    """429s slow the run down and cost nothing twice."""
    office.write_job(limits="{requests_per_second: 60}")
    office.write_leads(people(15))
    with serving(tmp_path / "api.db", rate=30.0, burst=3, retry_after=None) as api:
        receipt = office.run(api)
        audit = api.audit()

    assert receipt.exit_code == 0
    assert 0 < receipt.rate_limited <= audit["requests"]["429"] < 60
    assert (audit["accepted"], audit["distinct"], audit["paid_twice"]) == (15, 15, 0)

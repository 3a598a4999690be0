"""Normal runs end to end, and every status and format of a row."""

from __future__ import annotations

import csv
import gzip
import json
import os
import stat
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from enrich.ledger import queue, transitions
from enrich.ledger.database import Database
from enrich.models import RowStatus
from enrich.run.context import RunOptions
from enrich.sandbox.settings import Shape
from tests.support.workspace import (
    BOTH_BACKENDS,
    SHORT_TIMEOUTS,
    SandboxApi,
    Workspace,
    make_leads,
    serve_api,
)

#: The guaranteed keys of the summary (section 5 of the contract), which users' scripts read.
SUMMARY_KEYS = {
    *("execution", "job", "rows", "requests", "submitted", "reused", "credits_spent", "polls", "rate_limited"),
    *("elapsed_s", "output", "exit_code", "found", "not_found", "failed", "expired", "in_doubt", "invalid"),
    *("filtered", "pending", "credits_unknown", "unconfirmed"),
}


@BOTH_BACKENDS
def test_csv_is_enriched(api: SandboxApi, workspace: Workspace) -> None:
    """Every row comes back in order, with the new columns and its status."""
    leads = make_leads(60)
    workspace.write_leads(leads)

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert result.exit_code == 0, result.stderr
    assert result.json_output["rows"] == result.json_output["requests"] == result.json_output["submitted"] == 60
    output = workspace.read_output()
    assert [row["First Name"] for row in output] == [lead[0] for lead in leads]
    assert {row["enrich_status"] for row in output} == {"found", "not_found"}
    assert all(bool(row["work_email"]) == (row["enrich_status"] == "found") for row in output)
    audit = api.audit()
    assert audit["accepted"] == 60
    assert audit["paid_twice"] == 0
    assert sum(float(row["enrich_credits"] or 0) for row in output) == audit["credits_charged"]


@BOTH_BACKENDS
@pytest.mark.long
def test_second_run_is_free(api: SandboxApi, workspace: Workspace) -> None:
    """The same command again answers from the ledger and writes the same output."""
    workspace.write_leads(make_leads(20))
    workspace.run_in_process("run", "job.yaml", api=api)
    first = workspace.read_output()

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert result.exit_code == 0
    assert (result.json_output["submitted"], result.json_output["reused"], result.json_output["credits_spent"]) == (
        0,
        20,
        0,
    )
    assert workspace.read_output() == first
    assert api.audit()["accepted"] == 20


def test_json_summary_keys(api: SandboxApi, workspace: Workspace) -> None:
    """Stdout has one object that agrees with the output and the API; nothing else is printed."""
    workspace.write_leads(make_leads(12))

    result = workspace.run_subprocess("run", "job.yaml", "--json", api=api)

    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    summary = result.json_output
    assert summary.keys() >= SUMMARY_KEYS
    by_status = Counter(row["enrich_status"] for row in workspace.read_output())
    assert {status.value: summary[status.value] for status in RowStatus} == {
        status.value: by_status[status] for status in RowStatus
    }
    audit = api.audit()
    assert summary["credits_spent"] == audit["credits_charged"] == pytest.approx(10_000 - summary["balance_after"])
    assert summary["polls"] == audit["requests"]["task"]
    assert summary["output"] == str(workspace.folder / "out.csv")
    assert (summary["job"], summary["exit_code"], summary["credits_unknown"]) == ("job", 0, 0)


def test_success_is_silent_off_terminal(api: SandboxApi, workspace: Workspace) -> None:
    """Prints nothing after a successful run, so that cron sends no mail."""
    workspace.write_leads(make_leads(3))

    result = workspace.run_in_process("run", "job.yaml", api=api)

    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.long
def test_gzip_input_and_output(api: SandboxApi, workspace: Workspace) -> None:
    """Reads and writes `.csv.gz` by its file name."""
    workspace.write_job(input="leads.csv.gz", output="out.csv.gz")
    plain = workspace.write_leads(make_leads(5))
    (workspace.folder / "leads.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()

    summary = workspace.run_job(api)

    assert summary.exit_code == 0
    with gzip.open(workspace.folder / "out.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["First Name"] for row in rows] == [f"First{number}" for number in range(5)]
    assert {row["enrich_status"] for row in rows} <= {"found", "not_found"}


@pytest.mark.long
def test_parquet_output_types(api: SandboxApi, workspace: Workspace) -> None:
    """A Parquet output has the input's columns as text, nulls for unknown values, and numeric credits."""
    workspace.write_job(output="out.parquet")
    leads = make_leads(8)
    leads[0][4] = "=007"
    workspace.write_leads(leads)

    summary = workspace.run_job(api)

    assert summary.exit_code == 0
    frame = pl.read_parquet(workspace.folder / "out.parquet")
    assert frame["Note"].to_list() == [lead[4] for lead in leads]
    assert frame["Email"].to_list() == [""] * 8
    assert frame.schema["enrich_credits"] == pl.Float64()
    assert frame.filter(pl.col("enrich_status") == "not_found")["work_email"].is_null().all()
    assert frame["enrich_credits"].sum() == pytest.approx(api.audit()["credits_charged"])
    assert stat.S_IMODE((workspace.folder / "out.parquet").stat().st_mode) == 0o600


@BOTH_BACKENDS
@pytest.mark.long
def test_output_with_every_status(tmp_path: Path, workspace: Workspace) -> None:
    """The output has found, not found, failed, expired, in doubt, invalid, filtered and pending rows together."""
    state = tmp_path / "api.db"
    leads = make_leads(30)
    leads[5][2] = ""
    leads[6][4] = "leave out"
    workspace.write_job(where="Note <> 'leave out'")
    workspace.write_leads(leads[:1])
    with serve_api(state, latency="fixed(60)") as slow:
        workspace.submit_without_collecting(slow)
        slow.advance(200_000)
    workspace.write_leads(leads)
    with serve_api(state, failure_rate=0.3, free_failures=0.0, hit_rate=0.5) as api:
        api.inject_fault("no-task-id")

        summary = workspace.run_job(api, RunOptions(limit=22), SHORT_TIMEOUTS)

        audit = api.audit()
    output = workspace.read_output()
    by_status = Counter(row["enrich_status"] for row in output)
    assert set(by_status) == {status.value for status in RowStatus}
    assert {status: getattr(summary, status) for status in by_status} == by_status
    assert output[0]["enrich_status"] == "expired"
    assert (by_status["in_doubt"], by_status["pending"]) == (1, 30 - 2 - 1 - 22)
    assert output[5]["enrich_status"] == "invalid"
    assert output[5]["enrich_error"] == "company blank (Website, Email)"
    assert output[6]["enrich_status"] == "filtered"
    assert all(row["enrich_error"] for row in output if row["enrich_status"] in ("failed", "expired", "in_doubt"))
    assert all(not row["enrich_credits"] for row in output if row["enrich_status"] in ("expired", "in_doubt"))
    assert not any(row["work_email"] for row in output if row["enrich_status"] != "found")
    assert summary.exit_code == 14
    assert audit["paid_twice"] == 0


@pytest.mark.long
@pytest.mark.parametrize("shape", ["wrapped", "wrapper_object", "flat", "flat_list"])
def test_every_result_shape(tmp_path: Path, workspace: Workspace, shape: Shape) -> None:
    """Each documented shape of a result gives the same email and the same bill."""
    workspace.write_leads(make_leads(12))
    kinds = ("null", "empty_list", "empty_object", "null_result", "blank_result", "no_data")
    with serve_api(tmp_path / "api.db", shape=shape, miss_kinds=kinds, aliases=shape == "flat") as api:
        summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)
        audit = api.audit()

    assert (summary.exit_code, summary.found, summary.not_found) == (0, 10, 2)
    output = workspace.read_output()
    assert all(row["work_email"].endswith(".example") for row in output if row["enrich_status"] == "found")
    assert sum(float(row["enrich_credits"]) for row in output) == audit["credits_charged"] == summary.credits_spent


@BOTH_BACKENDS
@pytest.mark.long
def test_nested_and_json_values(api: SandboxApi, workspace: Workspace) -> None:
    """A column takes a field of a nested result; objects and lists are written as JSON, numbers unchanged."""
    workspace.write_job(
        waterfall="company_lookup",
        params="{company_website: Website}",
        columns='{rounds: funding.rounds, size: employees, fields: industries, first: "industries.0"}',
    )
    workspace.write_leads(make_leads(12))

    summary = workspace.run_job(api)

    assert summary.exit_code == 0
    found = [row for row in workspace.read_output() if row["enrich_status"] == "found"]
    assert found
    for row in found:
        assert int(row["rounds"]) > 0
        assert int(row["size"]) > 0
        assert json.loads(row["fields"])[0] == row["first"]


@pytest.mark.long
def test_default_columns(api: SandboxApi, workspace: Workspace) -> None:
    """Without `columns` the output has the waterfall's output fields."""
    workspace.write_job(waterfall="person_getter", params="{email: Email}")
    text = workspace.job_file.read_text().replace("columns:\n  work_email: email\n", "")
    workspace.job_file.write_text(text)
    workspace.write_leads([["", "", "", f"ada.byron{number}@engine.example", ""] for number in range(6)])

    summary = workspace.run_job(api)

    assert summary.exit_code == 0
    row = next(row for row in workspace.read_output() if row["enrich_status"] == "found")
    assert row["first_name"] == "Ada"
    assert row["linkedin_url"].startswith("https://")


@pytest.mark.long
def test_charged_no_matches(tmp_path: Path, workspace: Workspace) -> None:
    """Shows the price of a charged no match, and the column sums to the bill."""
    workspace.write_leads(make_leads(12))
    with serve_api(tmp_path / "api.db", charge_misses=True, hit_rate=0.4) as api:
        summary = workspace.run_job(api)
        audit = api.audit()

    output = workspace.read_output()
    assert all(float(row["enrich_credits"]) > 0 for row in output)
    assert sum(float(row["enrich_credits"]) for row in output) == pytest.approx(audit["credits_charged"])
    assert summary.credits_spent == pytest.approx(audit["credits_charged"])


@pytest.mark.long
def test_unknown_price_is_blank(tmp_path: Path, workspace: Workspace) -> None:
    """An unknown price is a blank cell, and the summary counts it as unknown."""
    workspace.write_leads(make_leads(9))
    with serve_api(tmp_path / "api.db", hide_credits=True, shape="flat") as api:
        summary = workspace.run_job(api)

    assert (summary.exit_code, summary.credits_unknown, summary.credits_spent) == (0, 9, 0)
    assert {row["enrich_credits"] for row in workspace.read_output()} == {""}


@pytest.mark.long
def test_step_prices_replace_hidden_price(tmp_path: Path, workspace: Workspace) -> None:
    """Adds up the steps' prices where the API hides the sum."""
    workspace.write_leads(make_leads(9))
    with serve_api(tmp_path / "api.db", hide_credits=True, miss_kinds=("null_result",)) as api:
        summary = workspace.run_job(api)
        audit = api.audit()

    assert summary.credits_unknown == 0
    assert summary.credits_spent == pytest.approx(audit["credits_charged"])


@pytest.mark.long
def test_providers_and_verifier_order(api: SandboxApi, workspace: Workspace) -> None:
    """Sends `enrichments` and `email_verifier` in the job's order, and the output names the provider of each match."""
    workspace.write_job(enrichments="[966, 833]", email_verifier="10")
    workspace.write_leads(make_leads(9))

    summary = workspace.run_job(api)

    assert summary.exit_code == 0
    audit = api.audit()
    assert {(tuple(run["enrichments"]), run["email_verifier"]) for run in audit["runs"]} == {((966, 833), 10)}
    providers = {row["enrich_provider"] for row in workspace.read_output() if row["enrich_status"] == "found"}
    assert providers <= {"Peoplegrid", "Mailhound"}
    assert summary.credits_spent == pytest.approx(audit["credits_charged"])


def test_default_providers_are_sent(api: SandboxApi, workspace: Workspace) -> None:
    """Sends the waterfall's own providers when the job names none, so that a change of the defaults has no effect."""
    workspace.write_leads(make_leads(1))

    workspace.run_job(api)

    assert api.audit()["runs"][0]["enrichments"] == [833, 966, 701, 745]


@BOTH_BACKENDS
def test_duplicates_are_sent_once(api: SandboxApi, workspace: Workspace) -> None:
    """Rows with the same request share the answer; the first shows the cost, so the column sums to the bill."""
    leads = make_leads(6)
    other_spellings = [["  First0 ", "Last0", "company0.example", "", "another"], *leads]
    workspace.write_leads([*leads, *other_spellings])

    summary = workspace.run_job(api)

    output = workspace.read_output()
    audit = api.audit()
    assert (summary.rows, summary.requests, summary.submitted, audit["accepted"]) == (13, 6, 6, 6)
    assert [row["work_email"] for row in output[7:]] == [row["work_email"] for row in output[:6]]
    assert output[6]["work_email"] == output[0]["work_email"]
    assert output[6]["enrich_task_id"] == output[0]["enrich_task_id"]
    assert {row["enrich_credits"] for row in output[6:]} == {""}
    assert sum(float(row["enrich_credits"] or 0) for row in output) == audit["credits_charged"]


@BOTH_BACKENDS
@pytest.mark.long
def test_rows_without_dedupe(api: SandboxApi, workspace: Workspace) -> None:
    """`dedupe: false` sends and pays for each row once; the second run is free."""
    workspace.write_job(dedupe="false")
    workspace.write_leads(make_leads(3) * 2)

    first = workspace.run_job(api)
    second = workspace.run_job(api)

    assert (first.requests, first.submitted, second.submitted, second.reused) == (6, 6, 0, 6)
    audit = api.audit()
    assert (audit["accepted"], audit["distinct"]) == (6, 3)
    assert sum(float(row["enrich_credits"] or 0) for row in workspace.read_output()) == audit["credits_charged"]


def test_only_if_empty(api: SandboxApi, workspace: Workspace) -> None:
    """`only_if_empty` skips rows that have the answer already."""
    leads = make_leads(6)
    leads[2][3] = "known@company2.example"
    leads[3][3] = "   "
    workspace.write_job(only_if_empty="[Email]")
    workspace.write_leads(leads)

    summary = workspace.run_job(api)

    assert (summary.submitted, summary.filtered) == (5, 1)
    assert workspace.read_output()[2]["enrich_status"] == "filtered"


def test_formula_injection_is_escaped(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A formula from the API gets a leading quote in CSV; the input's own cells stay unchanged."""
    monkeypatch.setattr(
        "enrich.sandbox.answers.invent_fields", lambda *_: {"email": '=HYPERLINK("http://evil.example")'}
    )
    leads = make_leads(6)
    leads[0][4] = "=1+1"
    workspace.write_leads(leads)

    workspace.run_job(api)

    output = workspace.read_output()
    assert output[0]["Note"] == "=1+1"
    assert {row["work_email"] for row in output} == {"", '\'=HYPERLINK("http://evil.example")'}


@BOTH_BACKENDS
@pytest.mark.long
def test_unicode_leads(api: SandboxApi, workspace: Workspace) -> None:
    """Preserves accents, other alphabets and emoji in requests and output."""
    names = [["Zoë", "Müller-Ünal"], ["김", "민준"], ["Ольга", "Иванова"], ["🦊", "O'Brien"]]
    workspace.write_leads([[*name, "https://www.münchen.example", "", "ñ"] for name in names])

    summary = workspace.run_job(api)

    assert summary.exit_code == 0
    assert [[row["First Name"], row["Last Name"]] for row in workspace.read_output()] == names
    assert {run["params"]["first_name"] for run in api.audit()["runs"]} == {name[0] for name in names}


@pytest.mark.long
def test_umask_that_forbids_all(api: SandboxApi, workspace: Workspace) -> None:
    """Files of a process whose umask takes all rights are readable and writable by their owner."""
    workspace.write_leads(make_leads(2))
    before = set(workspace.folder.rglob("*"))
    command = [sys.executable, "-m", "enrich", "run", "job.yaml", "--log-file", "logs/enrich.log"]
    environ = workspace.environment(api) | {"PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        command, cwd=workspace.folder, env=environ, umask=0o777, capture_output=True, timeout=60, check=False
    )

    assert result.returncode == 0, result.stderr
    written = set(workspace.folder.rglob("*")) - before
    assert {path.name for path in written} >= {"out.csv", "enrich.log"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in written if path.is_file()} == {0o600}


def test_files_are_private(tmp_path: Path, workspace: Workspace) -> None:
    """Files are readable by their owner only; none has the key, and the log has no names."""
    key = "key-4f1c-that-nobody-must-see"
    workspace.write_leads([["Adalbert", "Byronsson", "enginesmith.example", "", "private note"], *make_leads(9)])
    before = set(workspace.folder.rglob("*"))
    with serve_api(tmp_path / "api.db", api_key=key, failure_rate=0.3) as api:
        api.inject_fault("no-task-id")
        old = os.umask(0)
        try:
            result = workspace.run_in_process("run", "job.yaml", "--json", "--log-file", "logs/enrich.log", api=api)
        finally:
            os.umask(old)

    assert result.exit_code == 14
    written = [path for path in workspace.folder.rglob("*") if path.is_file() and path not in before]
    assert {path.name for path in written} >= {"out.csv", "enrich.log", "job.db", "job.db.lock"}
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert key.encode() not in path.read_bytes(), path
    assert key not in result.stdout + result.stderr
    log = (workspace.folder / "logs" / "enrich.log").read_text().replace(str(workspace.ledger_location), "the ledger")
    for private in ("Adalbert", "Byronsson", "enginesmith", "private note", "First1", "company1.example", "@"):
        assert private not in log
    lines = [json.loads(line) for line in log.splitlines()]
    assert lines[-1]["event"] == "end"
    assert lines[-1]["receipt"] == {
        key: value for key, value in result.json_output.items() if key not in ("error", "hint")
    }


@pytest.mark.long
def test_log_is_appended(api: SandboxApi, workspace: Workspace) -> None:
    """Each run appends its lines to the log."""
    workspace.write_leads(make_leads(2))

    workspace.run_in_process("run", "job.yaml", "--log-file", "enrich.log", api=api)
    workspace.run_in_process("run", "job.yaml", "--log-file", "enrich.log", api=api)

    lines = [json.loads(line) for line in (workspace.folder / "enrich.log").read_text().splitlines()]
    assert [line["receipt"]["execution"] for line in lines if line["event"] == "end"] == [1, 2]


@pytest.mark.long
def test_output_name_with_date(api: SandboxApi, workspace: Workspace) -> None:
    """Fills in strftime codes with local time and makes missing folders."""
    workspace.write_job(output="'results/%Y/leads-%Y.csv'")
    workspace.write_leads(make_leads(1))

    summary = workspace.run_job(api)

    assert summary.output is not None
    assert Path(summary.output).is_file()
    assert Path(summary.output).match("results/20??/leads-20??.csv")


@pytest.mark.long
def test_default_output_name(api: SandboxApi, workspace: Workspace) -> None:
    """Without `output` it is `<input>_enriched.csv`."""
    text = workspace.job_file.read_text().replace("output: out.csv\n", "")
    workspace.job_file.write_text(text)
    workspace.write_leads(make_leads(1))

    workspace.run_job(api)

    assert len(workspace.read_output("leads_enriched.csv")) == 1


@pytest.mark.long
def test_other_separator_and_encoding(api: SandboxApi, workspace: Workspace) -> None:
    """Uses the input's and the output's own separator and encoding."""
    workspace.write_job(
        input='{path: leads.csv, separator: ";", encoding: cp1252}',
        output='{path: out.csv, separator: "\\t", encoding: utf-16}',
    )
    text = "First Name;Last Name;Website;Email;Note\nJürgen;Groß;engine.example;;5 €\n"
    (workspace.folder / "leads.csv").write_text(text, encoding="cp1252")

    summary = workspace.run_job(api)

    assert summary.exit_code == 0
    written = (workspace.folder / "out.csv").read_text(encoding="utf-16").splitlines()
    assert written[1].split("\t")[:5] == ["Jürgen", "Groß", "engine.example", "", "5 €"]
    assert api.audit()["runs"][0]["params"]["first_name"] == "Jürgen"


def test_output_is_replaced_atomically(api: SandboxApi, workspace: Workspace) -> None:
    """The new file replaces the old one with its mode, and nothing is left beside it."""
    workspace.write_leads(make_leads(2))
    old = workspace.folder / "out.csv"
    old.write_text("an old night\n")
    old.chmod(0o644)

    workspace.run_job(api)

    assert len(workspace.read_output()) == 2
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    assert [path.name for path in workspace.folder.glob("*part*")] == []


@pytest.mark.long
def test_rate_limited_api(tmp_path: Path, workspace: Workspace) -> None:
    """429s slow the run down, and nothing is paid twice."""
    workspace.write_job(limits="{requests_per_second: 60}")
    workspace.write_leads(make_leads(15))
    with serve_api(tmp_path / "api.db", rate=30.0, burst=3, retry_after=None) as api:
        summary = workspace.run_job(api)
        audit = api.audit()

    assert summary.exit_code == 0
    assert 0 < summary.rate_limited <= audit["requests"]["429"] < 60
    assert (audit["accepted"], audit["distinct"], audit["paid_twice"]) == (15, 15, 0)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["server"])
def test_results_of_lost_workers_count(api: SandboxApi, workspace: Workspace) -> None:
    """Counts a result that a worker stored and could not report before it was lost; requests the rest itself."""
    workspace.write_leads(make_leads(3))
    workspace.write_job(order_by="First Name")  # queued and written in this process

    async def reject_one_request() -> None:
        with closing(Database(workspace.ledger_location)) as ledger, ledger.transaction():
            (claimed,) = queue.claim(ledger, 1, 0, 0)
            transitions.record_rejected(ledger, [(claimed.attempt_id, "rejected", 0)])

    lost_workers = SimpleNamespace(run=reject_one_request, lost_reasons=["lost"], finish_early=lambda: None)
    engine = SimpleNamespace(make_worker_pool=lambda *_: lost_workers)
    summary = workspace.run_job(api, engine=engine)
    assert (summary.answers, summary.failed, summary.exit_code) == (3, 1, 10)
    assert summary.notes == ["workers were lost (lost). Other workers took over their tasks"]

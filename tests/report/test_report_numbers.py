"""The report's numbers agree with `status`, `runs`, the run summaries and the API's audit."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.commands.report import with_relative_paths
from enrich.exit_codes import JobArguments
from enrich.job.job import load_job
from enrich.ledger import queue, transitions
from enrich.ledger.lock import lock_ledger
from enrich.models import Answer, RowStatus, State
from enrich.report.build import build_report, latency_histogram
from enrich.report.data import Report
from tests.support.ledger import FREE_FAILURE, NO_MATCH, CommittingLedger
from tests.support.sample_reports import marked_values, report_json
from tests.support.workspace import (
    BOTH_BACKENDS,
    INSTANT_API,
    SandboxApi,
    Workspace,
    kill_process,
    make_leads,
    serve_api,
    wait_until,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TARGET = JobArguments("job.yaml --output out.csv", "job.yaml")
CREDIT = 1_000_000


def build_report_at(workspace: Workspace, now: datetime = NOW, **more: Any) -> Report:
    """Build the report in this process, at a given time."""
    return build_report(load_job(workspace.job_file), TARGET, now, **more)


def assert_agrees_with_status(workspace: Workspace, job: str = "job.yaml") -> dict[str, Any]:
    """Compare the report with `status` and `runs`; return the report."""
    report = report_json(workspace, job=job)
    status = workspace.run_in_process("status", job, "--json").json_output
    runs = workspace.run_in_process("runs", job, "--last", "99", "--json").json_output

    assert report["requests"] == {name: status[name] for name in report["requests"]}
    assert sum(report["requests"].values()) == status["requests"]
    for name in ("credits_spent", "credits_unknown"):
        assert report[name] == pytest.approx(runs["totals"][name])
    assert len(report["nights"]) == runs["totals"]["executions"]
    for run_number, run in zip(report["nights"], reversed(runs["executions"]), strict=True):
        for name in run_number.keys() & run.keys() - {"found"}:
            assert run_number[name] == run[name], name
    for run_number, execution in zip(reversed(report["nights"]), status["executions"], strict=False):
        for name in run_number.keys() & execution.keys():
            assert run_number[name] == execution[name], name
    waterfall = report["waterfall"]
    assert waterfall["spent"] == pytest.approx(report["credits_spent"])
    paid = sum(each["credits"] for each in waterfall["providers"])
    assert paid + waterfall["elsewhere"] == pytest.approx(waterfall["spent"])
    return report


def assert_agrees_with_audit(report: dict[str, Any], audit: dict[str, Any]) -> None:
    """Compare the provider statistics with the API's charges by provider."""
    true = audit["by_provider"]
    for each in report["waterfall"]["providers"]:
        assert each["found"] == true[each["name"]]["found"]
        assert each["asked"] + each["presumed"] == true[each["name"]]["calls"]
        assert each["credits"] == pytest.approx(true[each["name"]]["credits"])


@BOTH_BACKENDS
@pytest.mark.long
def test_page_matches_status(tmp_path: Path, workspace: Workspace) -> None:
    """The page has the same numbers of two runs as `status`."""
    workspace.write_job(email_verifier="10")
    with serve_api(tmp_path / "api.db", miss_kinds=("null_result",)) as api:
        for leads in (20, 45):
            workspace.write_leads(make_leads(leads))
            workspace.run_in_process("run", "job.yaml", api=api)
        audit = api.audit()
    assert workspace.run_in_process("report", "job.yaml").exit_code == 0
    page = (workspace.folder / "job_report.html").read_text(encoding="utf-8")
    status = workspace.run_in_process("status", "job.yaml", "--json").json_output

    assert (
        marked_values(page, "job", "credits_spent")
        == [pytest.approx(audit["credits_charged"])]
        == [status["credits_spent"]]
    )
    assert marked_values(page, "job", "rows") == [45]
    assert marked_values(page, "waterfall", "answers") == [audit["accepted"]]
    for execution in status["executions"]:
        about = f"run {execution['execution']}"
        for name in ("submitted", "credits_spent", "balance_after"):
            assert set(marked_values(page, about, name)) == {execution[name]}
        assert set(marked_values(page, about, "rate_limited")) == {execution["receipt"]["rate_limited"]}
    for name, true in audit["by_provider"].items():
        about = f"provider {name}"
        assert marked_values(page, about, "credits") == [pytest.approx(true["credits"])]
        assert set(marked_values(page, about, "calls")) == {true["calls"]}
    assert set(marked_values(page, "statuses", "found")) == {float(status["found"])}


@pytest.mark.long
def test_report_over_a_week(tmp_path: Path, workspace: Workspace) -> None:
    """The report agrees over a week of new leads, new prices, a kill -9, refunded cancellations and retries."""
    settings = replace(INSTANT_API, failure_rate=0.2, miss_kinds=("null_result",))
    with serve_api(tmp_path / "api.db", settings) as api:
        workspace.write_leads(make_leads(30))
        summaries = [workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output]
        api.set_prices({833: 1.25, 966: 3})
        workspace.write_leads(make_leads(50))
        summaries.append(workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output)
        assert api.audit()["credits_charged"] == pytest.approx(assert_agrees_with_status(workspace)["credits_spent"])
    with serve_api(tmp_path / "api.db", settings, latency="fixed(600)") as api:
        workspace.write_leads(make_leads(70))
        process = workspace.start_subprocess("run", "job.yaml", api=api)
        try:
            wait_until(lambda: workspace.open_task_count() == 20)
        finally:
            kill_process(process)
        at_work = report_json(workspace)
        with closing(workspace.open_ledger()) as ledger:
            cancel_tasks(api, [task.task_id for task in transitions.submitted_tasks(ledger)[:3]])
        api.advance(700)
    with serve_api(tmp_path / "api.db", settings) as api:
        summaries.append(workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output)
        summaries.append(
            workspace.run_in_process("run", "job.yaml", "--json", "--retry", "failed", api=api).json_output
        )
        audit = api.audit()

    report = assert_agrees_with_status(workspace)
    assert report["credits_spent"] == pytest.approx(audit["credits_charged"])
    assert sum(run["submitted"] for run in report["nights"]) == audit["accepted"]
    assert [run["outcome"] for run in report["nights"]][2] == "killed"
    assert (at_work["nights"][2]["outcome"], at_work["nights"][2]["polls"]) == ("killed", None)
    assert at_work["needs"][0]["commands"][0].startswith("enrich run ")
    assert any("killed" in note for note in report["notes"])
    ended = [run for run in report["nights"] if run["exit_code"] is not None]
    for run_number, summary in zip(ended, summaries, strict=True):
        for name in run_number.keys() & summary.keys() - {"found", "not_found", "failed", "expired", "elapsed_s"}:
            assert run_number[name] == summary[name], name
    # No lead is twice in the input, so each first answer is a row.
    first = ended[0]
    assert {name: first[name] for name in ("found", "not_found", "failed")} == {
        name: summaries[0][name] for name in ("found", "not_found", "failed")
    }
    assert report["statuses"] == {name: summaries[-1][name] for name in RowStatus}
    assert sum(run["found"] for run in report["nights"]) == report["requests"]["found"]
    assert sum(run["not_found"] for run in report["nights"]) == report["requests"]["not_found"]
    assert report["rows"] == summaries[-1]["rows"]
    assert sum(age["found"] for age in report["ages"]) == report["requests"]["found"]
    # Charged failures show their steps only sometimes, so only the matches equal the API's.
    true = audit["by_provider"]
    assert all(each["found"] == true[each["name"]]["found"] for each in report["waterfall"]["providers"])
    # The latencies of tasks left by the third run are unknown: they show when the next run polled them.
    assert report["latencies"]["longest"] < 60


def cancel_tasks(api: SandboxApi, task_ids: list[str]) -> None:
    """Cancel tasks, which refunds their credits."""
    with httpx.Client(verify=False, trust_env=False, headers={"x-apikey": api.api_key}) as http:  # noqa: S501 - loopback
        for task_id in task_ids:
            http.post(f"{api.base_url}/tasks/{task_id}/cancel").raise_for_status()


@BOTH_BACKENDS
@pytest.mark.long
def test_provider_stats_match_audit(tmp_path: Path, workspace: Workspace) -> None:
    """Each provider's statistics equal the audit, over two runs with different prices."""
    with serve_api(tmp_path / "api.db", INSTANT_API, miss_kinds=("blank_result",), charge_misses=True) as api:
        for count, price in ((20, 0.5), (45, 0.75)):
            api.set_prices({833: price})
            workspace.write_leads(make_leads(count))
            workspace.run_in_process("run", "job.yaml", api=api)
        audit = api.audit()

    report = assert_agrees_with_status(workspace)
    assert_agrees_with_audit(report, audit)
    assert report["waterfall"]["answers"] == 45
    assert (report["waterfall"]["untold"], report["waterfall"]["elsewhere"]) == (0, 0)


@BOTH_BACKENDS
@pytest.mark.long
def test_jobs_sharing_a_ledger(tmp_path: Path, workspace: Workspace) -> None:
    """Two jobs share a ledger, one in bulk: each shows its own spending, and together they equal the charges."""
    workspace.write_leads(make_leads(12), name="alpha.csv")
    workspace.write_leads(make_leads(30), name="beta.csv")
    for name, more in (("alpha", {}), ("beta", {"dispatch": "{bulk: 7}"})):
        workspace.write_job(ledger="shared.db", input=f"{name}.csv", output=f"{name}-out.csv", **more)
        workspace.job_file.rename(workspace.folder / f"{name}.yaml")
    with serve_api(tmp_path / "api.db", INSTANT_API, miss_kinds=("null",), charge_misses=True) as api:
        for name in ("alpha", "beta"):
            assert workspace.run_in_process("run", f"{name}.yaml", api=api).exit_code == 0
        audit = api.audit()

    alpha, beta = (assert_agrees_with_status(workspace, f"{name}.yaml") for name in ("alpha", "beta"))
    assert alpha["credits_spent"] + beta["credits_spent"] == pytest.approx(audit["credits_charged"])
    assert (alpha["nights"][0]["submitted"], beta["nights"][0]["submitted"]) == (12, 18)
    assert alpha["requests"] == beta["requests"]
    assert any("Other jobs use this ledger" in note for note in alpha["notes"])
    assert beta["rows"] == 30  # twelve were answered by the other job
    assert beta["latencies"]["count"] == 3  # tasks, not rows
    found = {
        each["name"]: each["found"] for each in [*alpha["waterfall"]["providers"], *beta["waterfall"]["providers"]]
    }
    assert found.keys() <= audit["by_provider"].keys()


def test_job_without_runs(workspace: Workspace) -> None:
    """A job without runs has no numbers, and the report creates no files."""
    report = report_json(workspace)

    assert (report["nights"], report["rows"], report["planned"], report["traffic"]) == ([], None, None, None)
    assert report["needs"] == [
        {"text": "Start with ten requests", "commands": [f"enrich run {workspace.job_file} --limit 10"]}
    ]
    assert not workspace.ledger_path.parent.exists()


@pytest.mark.long
def test_missing_input(finished_run: Workspace) -> None:
    """With the input missing its rows are unknown; runs, credits and providers are shown."""
    whole = report_json(finished_run)
    (finished_run.folder / "leads.csv").unlink()
    report = report_json(finished_run)

    assert report["rows"] is None
    assert report["statuses"] == {}
    assert report["columns"] == report["groups"] == report["ages"] == []
    assert report["nights"] == whole["nights"]
    assert report["waterfall"] == whole["waterfall"]
    assert report["notes"] == []
    assert "leads.csv" in report["needs"][0]["text"]
    assert report["needs"][0]["commands"] == [f"enrich check {finished_run.folder}/job.yaml"]


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"params": "{first_name: Gone, last_name: Last Name, company: Website}"},
        {"waterfall": "phone_getter"},
        {"input": '"-"'},
        {"only_if_empty": "[Gone]"},
        {"email_verifier": "77"},
    ],
)
def test_job_that_no_longer_fits(finished_run: Workspace, changes: dict[str, str]) -> None:
    """When the job no longer fits, the report shows why the rows are unknown; unless it is stdin, action is needed."""
    finished_run.write_job(**changes)
    report = report_json(finished_run)

    assert report["rows"] is None
    message = [*report["notes"], *(action["text"] for action in report["needs"])]
    assert [text.startswith("The rows are unknown: ") for text in message] == [True]
    assert bool(report["needs"]) is changes.keys().isdisjoint({"input", "waterfall"})
    assert len(report["nights"]) == 1


@pytest.mark.long
def test_other_columns_use_stored_answers(finished_run: Workspace) -> None:
    """Other columns are filled from stored answers, as the next run would write them."""
    finished_run.write_job(columns="{nothing: phone, mail: email}")
    report = report_json(finished_run)

    assert [(each["name"], each["found"]) for each in report["columns"]] == [
        ("nothing", 0),
        ("mail", report["requests"]["found"]),
    ]


@BOTH_BACKENDS
@pytest.mark.long
def test_unreadable_waterfall_description(finished_run: Workspace) -> None:
    """An unreadable description of a waterfall counts as missing, so nothing is inferred."""
    finished_run.sql("UPDATE targets SET description = '{\"identifier\": 7}'")
    report = report_json(finished_run)

    assert report["nights"][0]["found"] == report["requests"]["found"]
    assert report["waterfall"]["untold"] == report["requests"]["not_found"]


@BOTH_BACKENDS
@pytest.mark.long
def test_purged_and_forgotten_leads(finished_run: Workspace) -> None:
    """Purged and forgotten leads keep their cost; their unknown answers do not count as zero."""
    before = report_json(finished_run)
    assert finished_run.run_in_process("forget", "job.yaml", "--match", "First Name=First0", "--yes").exit_code == 0
    assert finished_run.run_in_process("purge", "job.yaml", "--older-than", "0s", "--yes").exit_code == 0
    report = report_json(finished_run)

    assert report["requests"] == before["requests"]
    assert report["credits_spent"] == before["credits_spent"]
    assert (report["statuses"]["filtered"], report["columns"][0]["answered"]) == (1, 0)
    assert report["waterfall"]["untold"] == report["waterfall"]["answers"] == 12
    assert sum("purged" in note for note in report["notes"]) == 2
    assert report["anomalies"] == []


@BOTH_BACKENDS
def test_report_during_run(workspace: Workspace) -> None:
    """A report during a run shows what is committed, and the active run is not reported as killed."""
    workspace.write_leads(make_leads(2))
    ledger = CommittingLedger.open(workspace.ledger_location).start_and_enroll(1, 2)
    ledger.submit()
    with lock_ledger(workspace.ledger_location, 0), ledger.wrapped.transaction():
        queue.claim(ledger.wrapped, ledger.execution, 1, 1)
        report = report_json(workspace)
    ledger.wrapped.close()

    (run,) = report["nights"]
    assert (run["outcome"], run["ended_at"], run["polls"], run["elapsed_s"]) == (
        "running",
        None,
        None,
        None,
    )
    assert report["needs"] == []
    assert any("still running" in note for note in report["notes"])


def test_retried_free_failure_is_not_counted(workspace: Workspace) -> None:
    """A free failure that was retried and found is one request and one match."""
    ledger = CommittingLedger.open(workspace.ledger_location).start_and_enroll(1, 2, 3)
    assert ledger.settle(ledger.submit(), FREE_FAILURE) is State.PENDING
    assert ledger.settle(ledger.submit()) is State.FOUND
    assert ledger.settle(ledger.submit(), NO_MATCH) is State.NOT_FOUND
    assert ledger.settle(ledger.submit(), FREE_FAILURE) is State.PENDING
    ledger.start_execution()
    ledger.enroll([1, 2, 3])
    assert ledger.settle(ledger.submit(), Answer(State.FAILED, credits=CREDIT)) is State.FAILED
    ledger.start_execution()
    ledger.enroll([1, 2, 3], retry=[State.FAILED])
    ledger.settle(ledger.submit())
    ledger.wrapped.close()

    report = build_report_at(workspace)

    fates = [(run.found, run.not_found, run.failed) for run in report.runs]
    assert fates == [(1, 1, 0), (0, 0, 1), (1, 0, 0)]
    assert (report.waterfall.answers, report.waterfall.failed, report.waterfall.retried) == (6, 3, 2)


@pytest.mark.long
def test_required_actions(tmp_path: Path, workspace: Workspace) -> None:
    """Failed, unconfirmed and unsent rows require action."""
    workspace.write_leads([*make_leads(8), ["", "", "", "", "nobody"]])
    workspace.write_job(rejects="rejects.csv")
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        api.inject_fault("no-task-id")
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 14
    report = build_report_at(workspace)

    run = "enrich run job.yaml --output out.csv"
    in_doubt_rows = ("enrich reconcile job.yaml", f"{run} --retry in_doubt", f"{run} --accept in_doubt")
    failed, in_doubt, skipped = report.actions
    assert (failed.text, failed.commands) == ("Retry 7 failed rows (may charge)", (f"{run} --retry failed",))
    assert "unconfirmed row may have been charged" in in_doubt.text
    assert in_doubt.commands == in_doubt_rows
    assert (skipped.text.partition(":")[0], skipped.commands) == ("1 row skipped", ())
    assert f"{workspace.folder}/rejects.csv has the reasons" in report.actions[-1].text


@pytest.mark.long
def test_commands_use_given_paths(api: SandboxApi, workspace: Workspace) -> None:
    """Commands use the paths as given, so they can be pasted."""
    workspace.write_leads(make_leads(3), name="other file.csv")
    api.inject_fault("no-task-id")
    workspace.run_in_process("run", "job.yaml", "--input", "other file.csv", "--ledger", "l.db", api=api)
    report = report_json(workspace, "--input", "other file.csv", "--ledger", "l.db")

    commands = [command for action in report["needs"] for command in action["commands"]]
    assert f"enrich reconcile {workspace.folder}/job.yaml --ledger {workspace.folder}/l.db" in commands
    assert any(f"--input '{workspace.folder}/other file.csv' --retry in_doubt" in command for command in commands)


def test_advice_after_failed_run(api: SandboxApi, workspace: Workspace) -> None:
    """The advice after a failed run equals its notification."""
    workspace.write_leads(make_leads(30))
    workspace.write_job(limits="{max_credits: 4, requests_per_second: 1000}")
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 12

    (action,) = build_report_at(workspace).actions
    assert action.text.startswith("Run 1 ended with exit code 12 (credits used up). ")
    assert action.commands == ("enrich run job.yaml --output out.csv",)


@pytest.mark.long
def test_answer_ages(finished_run: Workspace) -> None:
    """Each answer in the output is counted once by age, however many rows share it."""
    leads = make_leads(12)
    finished_run.write_leads([*leads, *leads])
    since = datetime.now(UTC)
    for days, label in ((0, "today"), (1.2, "1-7 days"), (7.9, "1-7 days"), (20, "8-30 days"), (400, "older")):
        ages = {
            age.label: age.found + age.not_found
            for age in build_report_at(finished_run, since + timedelta(days=days)).ages
        }
        assert {name for name, count in ages.items() if count} == {label}
        assert ages[label] == 12


@pytest.mark.long
def test_groups_by_input_column(api: SandboxApi, workspace: Workspace) -> None:
    """The largest groups come first; a value of a single row may be a person and gets no group."""
    notes = ["DE"] * 3 + ["", " "] + ["FR"] * 2 + ["Ada", "Bea"]
    workspace.write_leads([[*lead[:4], note] for lead, note in zip(make_leads(9), notes, strict=True)])
    workspace.write_job(report="{by: [Note, Website]}")
    workspace.run_in_process("run", "job.yaml", api=api)

    note, website = report_json(workspace)["groups"]
    assert [(group["name"], group["rows"]) for group in note["groups"]] == [
        ("DE", 3),
        ("(blank)", 2),
        ("FR", 2),
        ("all others", 2),
    ]
    assert note["rest"] == 2
    assert all(group["found"] <= group["answered"] == group["rows"] for group in note["groups"])
    assert [group["name"] for group in website["groups"]] == ["all others"]
    assert website["rest"] == 9

    with patch("enrich.report.input_stats.MAX_GROUP_VALUES", 4):
        report = report_json(workspace)
    assert report["groups"] == []
    assert report["notes"] == [
        f"The column `{name}` makes no groups: it has more than 100,000 different values."
        for name in ("Note", "Website")
    ]


@pytest.mark.long
def test_rows_only_on_request(finished_run: Workspace) -> None:
    """Rows (personal data) are in a report only on request: at most a thousand, with the rest counted."""
    plain = json.dumps(report_json(finished_run))
    assert "First1" not in plain
    assert "company1" not in plain

    shown = report_json(finished_run, "--with-rows")["leads"]
    assert shown["columns"] == ["First Name", "Last Name", "Website", "Email", "Note", "work_email", "enrich_status"]
    assert [row[0] for row in shown["cells"]] == [f"First{number}" for number in range(12)]
    assert shown["left_out"] == 0
    with patch("enrich.report.input_stats.MAX_LEAD_ROWS", 5):
        shown = report_json(finished_run, "--with-rows")["leads"]
    assert (len(shown["cells"]), shown["left_out"]) == (5, 7)


@pytest.mark.long
def test_traffic_from_progress(finished_run: Workspace) -> None:
    """Traffic comes from the stored progress, which every run has; without it, it is unknown."""
    received = report_json(finished_run)
    assert sum(received["traffic"]["polls"]) == received["nights"][0]["polls"]
    assert (sum(received["traffic"]["submitted"]), sum(received["traffic"]["answered"])) == (12, 12)

    finished_run.sql("UPDATE executions SET progress = '{}'")
    assert report_json(finished_run)["traffic"] is None


@given(st.lists(st.integers(0, 10**9), max_size=200))
def test_latency_histogram(waits: list[int]) -> None:
    """Each latency is in its bar; half are at most the median, and nine of ten at most p90."""
    waits.sort()
    made = latency_histogram(waits)
    if made is None:
        assert not waits
        return
    assert sum(bar.count for bar in made.bars) == made.count == len(waits)
    for bar in made.bars:
        assert bar.count == sum(1000 * bar.start <= wait < 1000 * bar.end for wait in waits)
    assert made.bars[0].count
    assert made.bars[-1].count
    assert 2 * sum(wait / 1000 <= made.median for wait in waits) >= len(waits)
    assert 10 * sum(wait / 1000 <= made.p90 for wait in waits) >= 9 * len(waits)
    assert made.longest == waits[-1] / 1000


@pytest.mark.long
def test_skipped_rows(api: SandboxApi, workspace: Workspace) -> None:
    """Rows without a request are counted by reason: a blank param, or the job's condition."""
    leads = make_leads(9)
    leads[0][1] = leads[1][1] = ""
    leads[2][4] = "no"
    workspace.write_leads(leads)
    workspace.write_job(where="\"Note <> 'no'\"")
    workspace.run_in_process("run", "job.yaml", api=api)
    report = report_json(workspace)
    invalid, filtered = report["skipped"]
    assert (invalid["step"], invalid["status"], invalid["rows"]) == ("", "invalid", 2)
    assert invalid["reason"].startswith("last_name ")
    assert filtered == {"step": "", "status": "filtered", "reason": "left out by where or only_if_empty", "rows": 1}
    assert sum(each["rows"] for each in report["skipped"]) + sum(report["requests"].values()) == report["rows"]


@pytest.mark.long
def test_page_has_no_absolute_path(finished_run: Workspace, tmp_path: Path) -> None:
    """Paths are relative to the working folder, or to that of the job file if it is elsewhere. `--json` keeps them."""
    (finished_run.folder / "leads.csv").unlink()
    written = finished_run.run_in_process("report", str(finished_run.job_file), "--json", "-o", "page.html")
    page = (finished_run.folder / "page.html").read_text(encoding="utf-8")
    assert str(finished_run.folder) not in page
    assert "<code>enrich check job.yaml</code>" in page
    assert "relative to the folder that contains <code>job.yaml</code>" in page
    assert written.json_output["needs"][0]["commands"] == [f"enrich check {finished_run.job_file}"]

    job, name = load_job(finished_run.job_file), finished_run.folder.name
    arguments = JobArguments(str(finished_run.job_file), str(finished_run.job_file))
    for folder, before in ((finished_run.folder.parent, f"{name}/"), (Path("/"), ""), (tmp_path / "elsewhere", "")):
        report = with_relative_paths(build_report(job, arguments, NOW), job, NOW, folder)
        assert (report.job_file, report.input) == (f"{before}job.yaml", f"{before}leads.csv")
        assert report.actions[0].commands == (f"enrich check {before}job.yaml",)
        assert str(finished_run.folder) not in json.dumps(report.as_json())

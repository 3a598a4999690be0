"""The report: its numbers are those of the status, of the runs, of the receipts, and of the API's own books."""

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

from enrich.job import load_job
from enrich.model import Answer, RowStatus, State
from enrich.report.facts import Report
from enrich.report.gather import gather
from enrich.report.nights import latencies
from enrich.store.lock import hold
from enrich.watch.outcome import Target
from tests.books import FREE_FAILURE, MISSED, Books
from tests.cases import first_quick
from tests.harness import BOTH_IN_TIME, CALM, Api, Office, kill, people, serving, until
from tests.reports import marked, told

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TARGET = Target("job.yaml --output out.csv", "job.yaml")
CREDIT = 1_000_000


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def gathered(office: Office, now: datetime = NOW, **more: Any) -> Report:
    """Gather the facts in this process, at a time."""
    return gather(load_job(office.job_file), TARGET, now, **more)


def assert_true(office: Office, job: str = "job.yaml") -> dict[str, Any]:
    """Hold the report against the status and the list of runs; return it."""
    report = told(office, job=job)
    status = office.command("status", job, "--json").receipt
    runs = office.command("runs", job, "--last", "99", "--json").receipt

    assert report["requests"] == {name: status[name] for name in report["requests"]}
    assert sum(report["requests"].values()) == status["requests"]
    for name in ("credits_spent", "credits_unknown"):
        assert report[name] == pytest.approx(runs["totals"][name])
    assert len(report["nights"]) == runs["totals"]["executions"]
    for night, run in zip(report["nights"], reversed(runs["executions"]), strict=True):
        for name in night.keys() & run.keys() - {"found"}:
            assert night[name] == run[name], name
    for night, execution in zip(reversed(report["nights"]), status["executions"], strict=False):
        for name in night.keys() & execution.keys():
            assert night[name] == execution[name], name
    waterfall = report["waterfall"]
    assert waterfall["spent"] == pytest.approx(report["credits_spent"])
    paid = sum(each["credits"] for each in waterfall["providers"])
    assert paid + waterfall["elsewhere"] == pytest.approx(waterfall["spent"])
    return report


def assert_earned(report: dict[str, Any], audit: dict[str, Any]) -> None:
    """Hold the waterfall against what the API charged for whom."""
    true = audit["by_provider"]
    for each in report["waterfall"]["providers"]:
        assert each["found"] == true[each["name"]]["found"]
        assert each["asked"] + each["presumed"] == true[each["name"]]["asked"]
        assert each["credits"] == pytest.approx(true[each["name"]]["credits"])


@pytest.mark.long
def test_the_page_says_what_the_status_and_the_books_say(tmp_path: Path, office: Office) -> None:
    """The numbers of two nights, read from the page itself."""
    office.write_job(email_verifier="10")
    with serving(tmp_path / "api.db", miss_kinds=("null_result",)) as api:
        for leads in (20, 45):
            office.write_leads(people(leads))
            office.command("run", "job.yaml", api=api)
        audit = api.audit()
    assert office.command("report", "job.yaml").code == 0
    page = (office.folder / "job_report.html").read_text(encoding="utf-8")
    status = office.command("status", "job.yaml", "--json").receipt

    assert (
        marked(page, "job", "credits_spent") == [pytest.approx(audit["credits_charged"])] == [status["credits_spent"]]
    )
    assert marked(page, "job", "rows") == [45]
    assert marked(page, "waterfall", "answers") == [audit["accepted"]]
    for execution in status["executions"]:
        about = f"night {execution['execution']}"
        for name in ("submitted", "credits_spent", "balance_after"):
            assert set(marked(page, about, name)) == {execution[name]}
        assert set(marked(page, about, "rate_limited")) == {execution["receipt"]["rate_limited"]}
    for name, true in audit["by_provider"].items():
        about = f"provider {name}"
        assert marked(page, about, "credits") == [pytest.approx(true["credits"])]
        assert set(marked(page, about, "asked_in_all")) == {true["asked"]}
    assert set(marked(page, "statuses", "found")) == {float(status["found"])}


@pytest.mark.long
def test_a_week_is_told_as_it_was(tmp_path: Path, office: Office) -> None:
    """New leads, new prices, a kill -9, tasks that were cancelled and refunded, failures asked again."""
    settings = replace(CALM, failure_rate=0.2, miss_kinds=("null_result",))
    with serving(tmp_path / "api.db", settings) as api:
        office.write_leads(people(30))
        receipts = [office.command("run", "job.yaml", "--json", api=api).receipt]
        api.reprice({833: 1.25, 966: 3})
        office.write_leads(people(50))
        receipts.append(office.command("run", "job.yaml", "--json", api=api).receipt)
        assert api.audit()["credits_charged"] == pytest.approx(assert_true(office)["credits_spent"])
    with serving(tmp_path / "api.db", settings, latency="fixed(600)") as api:
        office.write_leads(people(70))
        process = office.start("run", "job.yaml", api=api)
        try:
            until(lambda: office.at_the_api() == 20)
        finally:
            kill(process)
        at_work = told(office)
        with closing(office.ledger()) as ledger:
            cancel(api, [task.task_id for task in ledger.tasks()[:3]])
        api.advance(700)
    with serving(tmp_path / "api.db", settings) as api:
        receipts.append(office.command("run", "job.yaml", "--json", api=api).receipt)
        receipts.append(office.command("run", "job.yaml", "--json", "--retry", "failed", api=api).receipt)
        audit = api.audit()

    report = assert_true(office)
    assert report["credits_spent"] == pytest.approx(audit["credits_charged"])
    assert sum(night["submitted"] for night in report["nights"]) == audit["accepted"]
    assert [night["outcome"] for night in report["nights"]][2] == "killed"
    assert (at_work["nights"][2]["outcome"], at_work["nights"][2]["polls"]) == ("killed", None)
    assert at_work["needs"][0]["commands"][0].startswith("enrich run ")
    assert any("killed" in note for note in report["notes"])
    ended = [night for night in report["nights"] if night["exit_code"] is not None]
    for night, receipt in zip(ended, receipts, strict=True):
        for name in night.keys() & receipt.keys() - {"found", "not_found", "failed", "expired", "elapsed_s"}:
            assert night[name] == receipt[name], name
    # Nobody is there twice: what is answered for the first time is a row.
    first = ended[0]
    assert {name: first[name] for name in ("found", "not_found", "failed")} == {
        name: receipts[0][name] for name in ("found", "not_found", "failed")
    }
    assert report["statuses"] == {name: receipts[-1][name] for name in RowStatus}
    assert sum(night["found"] for night in report["nights"]) == report["requests"]["found"]
    assert sum(night["not_found"] for night in report["nights"]) == report["requests"]["not_found"]
    assert report["rows"] == receipts[-1]["rows"]
    assert sum(age["found"] for age in report["ages"]) == report["requests"]["found"]
    # Charged failures show their steps only now and then, so only finds are the API's own here.
    true = audit["by_provider"]
    assert all(each["found"] == true[each["name"]]["found"] for each in report["waterfall"]["providers"])
    # What the third night left behind tells when we came back, not how long it took.
    assert report["latencies"]["longest"] < 60


def cancel(api: Api, task_ids: list[str]) -> None:
    """Take tasks back, and get the credits again."""
    with httpx.Client(verify=False, trust_env=False, headers={"x-apikey": api.api_key}) as http:  # noqa: S501 - loopback
        for task_id in task_ids:
            http.post(f"{api.base_url}/tasks/{task_id}/cancel").raise_for_status()


def test_who_earned_it_is_what_the_api_charged(tmp_path: Path, office: Office) -> None:
    """Provider by provider, over two nights with other prices."""
    with serving(tmp_path / "api.db", CALM, miss_kinds=("blank_result",), charge_misses=True) as api:
        for count, price in ((20, 0.5), (45, 0.75)):
            api.reprice({833: price})
            office.write_leads(people(count))
            office.command("run", "job.yaml", api=api)
        audit = api.audit()

    report = assert_true(office)
    assert_earned(report, audit)
    assert report["waterfall"]["answers"] == 45
    assert (report["waterfall"]["untold"], report["waterfall"]["elsewhere"]) == (0, 0)


def test_jobs_that_share_a_ledger_have_their_own_nights(tmp_path: Path, office: Office) -> None:
    """One of them in bulk: each is told what it spent, together they are the bill."""
    office.write_leads(people(12), name="alpha.csv")
    office.write_leads(people(30), name="beta.csv")
    for name, more in (("alpha", {}), ("beta", {"dispatch": "{bulk: 7}"})):
        office.write_job(ledger="shared.db", input=f"{name}.csv", output=f"{name}-out.csv", **more)
        office.job_file.rename(office.folder / f"{name}.yaml")
    with serving(tmp_path / "api.db", CALM, miss_kinds=("null",), charge_misses=True) as api:
        for name in ("alpha", "beta"):
            assert office.command("run", f"{name}.yaml", api=api).code == 0
        audit = api.audit()

    alpha, beta = (assert_true(office, f"{name}.yaml") for name in ("alpha", "beta"))
    assert alpha["credits_spent"] + beta["credits_spent"] == pytest.approx(audit["credits_charged"])
    assert (alpha["nights"][0]["submitted"], beta["nights"][0]["submitted"]) == (12, 18)
    assert alpha["requests"] == beta["requests"]
    assert any("other jobs use this ledger" in note for note in alpha["notes"])
    assert beta["rows"] == 30  # twelve of them answered by the other
    assert beta["latencies"]["count"] == 3  # tasks, not rows
    found = {
        each["name"]: each["found"] for each in [*alpha["waterfall"]["providers"], *beta["waterfall"]["providers"]]
    }
    assert found.keys() <= audit["by_provider"].keys()


def test_a_job_that_never_ran_has_a_report(office: Office) -> None:
    """Nothing is known, nothing is made."""
    report = told(office)

    assert (report["nights"], report["rows"], report["planned"], report["traffic"]) == ([], None, None, None)
    assert report["notes"] == ["this job has never run: nothing is known yet"]
    assert not office.ledger_path.parent.exists()


def test_an_input_that_is_gone_leaves_the_rest(done: Office) -> None:
    """Its rows are not known; nights, credits and providers are."""
    whole = told(done)
    (done.folder / "leads.csv").unlink()
    report = told(done)

    assert report["rows"] is None
    assert report["statuses"] == {}
    assert report["columns"] == report["groups"] == report["ages"] == []
    assert report["nights"] == whole["nights"]
    assert report["waterfall"] == whole["waterfall"]
    assert report["notes"] == []
    assert "leads.csv" in report["needs"][0]["text"]
    assert report["needs"][0]["commands"] == [f"enrich check {done.folder}/job.yaml"]


@pytest.mark.parametrize(
    "changes",
    first_quick(
        1,
        [
            {"params": "{first_name: Gone, last_name: Last Name, company: Website}"},
            {"waterfall": "phone_getter"},
            {"input": '"-"'},
            {"only_if_empty": "[Gone]"},
            {"email_verifier": "77"},
        ],
    ),
)
def test_a_job_file_that_fits_no_more_leaves_the_rest(done: Office, changes: dict[str, str]) -> None:
    """It says why the rows are not known; where that is no pipe, somebody should look."""
    done.write_job(**changes)
    report = told(done)

    assert report["rows"] is None
    said = [*report["notes"], *(need["text"] for need in report["needs"])]
    assert [text.startswith("nothing is known of the rows: ") for text in said] == [True]
    assert bool(report["needs"]) is changes.keys().isdisjoint({"input", "waterfall"})
    assert len(report["nights"]) == 1


def test_other_columns_judge_the_same_answers(done: Office) -> None:
    """As in the output that the next run would write."""
    done.write_job(columns="{nothing: phone, mail: email}")
    report = told(done)

    assert [(each["name"], each["found"]) for each in report["columns"]] == [
        ("nothing", 0),
        ("mail", report["requests"]["found"]),
    ]


def test_an_old_description_of_the_waterfall_is_no_hindrance(done: Office) -> None:
    """One that nobody understands is as good as none: then nothing is presumed."""
    done.sql("UPDATE waterfalls SET description = '{\"identifier\": 7}'")
    report = told(done)

    assert report["nights"][0]["found"] == report["requests"]["found"]
    assert report["waterfall"]["untold"] == report["requests"]["not_found"]


def test_purged_and_forgotten_leads_are_not_known(done: Office) -> None:
    """That they were paid for is; what they answered is no zero."""
    before = told(done)
    assert done.command("forget", "job.yaml", "--match", "First Name=First0", "--yes").code == 0
    assert done.command("purge", "job.yaml", "--older-than", "0s", "--yes").code == 0
    report = told(done)

    assert report["requests"] == before["requests"]
    assert report["credits_spent"] == before["credits_spent"]
    assert (report["statuses"]["filtered"], report["columns"][0]["answered"]) == (1, 0)
    assert report["waterfall"]["untold"] == report["waterfall"]["answers"] == 12
    assert sum("purged" in note for note in report["notes"]) == 2
    assert report["anomalies"] == []


def test_a_run_at_work_is_told_as_such(office: Office) -> None:
    """What is committed is shown, and whoever holds the lock is no killed one."""
    office.write_leads(people(2))
    books = Books.open(office.place).begin(1, 2)
    books.submit()
    with hold(office.place, 0), books.ledger.transaction():
        books.ledger.claim(books.execution, 1, 1)
        report = told(office)
    books.ledger.close()

    (night,) = report["nights"]
    assert (night["outcome"], night["ended_at"], night["polls"], night["elapsed_s"]) == (
        "at work now",
        None,
        None,
        None,
    )
    assert report["needs"] == []
    assert any("at work" in note for note in report["notes"])


def test_a_failure_that_was_taken_back_is_no_fate(office: Office) -> None:
    """Failed at no charge, asked again, found: one request, one hit."""
    books = Books.open(office.place).begin(1, 2, 3)
    assert books.settle(books.submit(), FREE_FAILURE) is State.PENDING
    assert books.settle(books.submit()) is State.FOUND
    assert books.settle(books.submit(), MISSED) is State.NOT_FOUND
    assert books.settle(books.submit(), FREE_FAILURE) is State.PENDING
    books.start()
    books.enroll([1, 2, 3])
    assert books.settle(books.submit(), Answer(State.FAILED, credits=CREDIT)) is State.FAILED
    books.start()
    books.enroll([1, 2, 3], retry=[State.FAILED])
    books.settle(books.submit())
    books.ledger.close()

    fates = [(night.found, night.not_found, night.failed) for night in gathered(office).nights]

    assert fates == [(1, 1, 0), (0, 0, 1), (1, 0, 0)]


def test_what_waits_for_a_person_has_its_command(tmp_path: Path, office: Office) -> None:
    """Failed rows, doubts and rows that were never sent."""
    office.write_leads([*people(8), ["", "", "", "", "nobody"]])
    office.write_job(rejects="rejects.csv")
    with serving(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        api.fault("no-task-id")
        assert office.command("run", "job.yaml", api=api).code == 14
    report = gathered(office)

    run = "enrich run job.yaml --output out.csv"
    doubts = ("enrich reconcile job.yaml", f"{run} --retry in_doubt", f"{run} --accept in_doubt")
    assert [(need.text.partition(":")[0], need.commands) for need in report.needs] == [
        ("1 row in doubt", doubts),
        ("7 rows failed", (f"{run} --retry failed",)),
        ("1 row invalid, so never sent", ()),
    ]
    assert f"{office.folder}/rejects.csv says why" in report.needs[-1].text


def test_the_commands_name_the_paths_that_were_given(api: Api, office: Office) -> None:
    """They can be pasted anywhere."""
    office.write_leads(people(3), name="other file.csv")
    api.fault("no-task-id")
    office.command("run", "job.yaml", "--input", "other file.csv", "--ledger", "l.db", api=api)
    report = told(office, "--input", "other file.csv", "--ledger", "l.db")

    commands = [command for need in report["needs"] for command in need["commands"]]
    assert f"enrich reconcile {office.folder}/job.yaml --ledger {office.folder}/l.db" in commands
    assert any(f"--input '{office.folder}/other file.csv' --retry in_doubt" in command for command in commands)


def test_a_last_night_that_failed_says_what_helps(api: Api, office: Office) -> None:
    """As the notification of that night does."""
    office.write_leads(people(30))
    office.write_job(limits="{max_credits: 4, requests_per_second: 1000}")
    assert office.command("run", "job.yaml", api=api).code == 12

    (need,) = gathered(office).needs
    assert need.text.startswith("execution 1 ended with exit 12 (out of credits): top up")
    assert need.commands == ("enrich run job.yaml --output out.csv",)


def test_answers_have_their_age(done: Office) -> None:
    """Each that the output shows, once, whatever asks for it."""
    leads = people(12)
    done.write_leads([*leads, *leads])
    since = datetime.now(UTC)
    for days, label in ((0, "today"), (1.2, "1-7 days"), (7.9, "1-7 days"), (20, "8-30 days"), (400, "older")):
        ages = {age.label: age.found + age.not_found for age in gathered(done, since + timedelta(days=days)).ages}
        assert {name for name, count in ages.items() if count} == {label}
        assert ages[label] == 12


def test_rows_are_grouped_by_a_column_of_the_input(api: Api, office: Office) -> None:
    """The largest first; what only one row has may be a person, and is no group of its own."""
    notes = ["DE"] * 3 + ["", " "] + ["FR"] * 2 + ["Ada", "Bea"]
    office.write_leads([[*lead[:4], note] for lead, note in zip(people(9), notes, strict=True)])
    office.write_job(report="{by: [Note, Website]}")
    office.command("run", "job.yaml", api=api)

    note, website = told(office)["groups"]
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

    with patch("enrich.report.present.MOST_VALUES", 4):
        report = told(office)
    assert report["groups"] == []
    assert report["notes"] == [
        f"the column `{name}` makes no groups: it has more than 100,000 different values"
        for name in ("Note", "Website")
    ]


def test_leads_are_told_only_when_asked_for(done: Office) -> None:
    """Personal data is in no report else; at most a thousand rows, the rest is counted."""
    plain = json.dumps(told(done))
    assert "First1" not in plain
    assert "company1" not in plain

    shown = told(done, "--with-rows")["leads"]
    assert shown["columns"] == ["First Name", "Last Name", "Website", "Email", "Note", "work_email", "enrich_status"]
    assert [row[0] for row in shown["cells"]] == [f"First{number}" for number in range(12)]
    assert shown["left_out"] == 0
    with patch("enrich.report.present.MOST_ROWS", 5):
        shown = told(done, "--with-rows")["leads"]
    assert (len(shown["cells"]), shown["left_out"]) == (5, 7)


def test_traffic_is_what_the_run_wrote_down(done: Office) -> None:
    """Its pulse, when there is one; else what its attempts tell, and polls are not known."""
    heard = told(done)
    assert sum(heard["traffic"]["polls"]) == heard["nights"][0]["polls"]
    assert (sum(heard["traffic"]["submitted"]), sum(heard["traffic"]["answered"])) == (12, 12)

    done.sql("UPDATE executions SET pulse = '{}'")

    derived = told(done)["traffic"]
    assert (derived["execution"], sum(derived["submitted"]), sum(derived["answered"])) == (1, 12, 12)
    assert derived["polls"] == derived["rate_limited"] == []


@given(st.lists(st.integers(0, 10**9), max_size=200))
def test_latencies_are_all_counted(waits: list[int]) -> None:
    """Each in its bar; half took no longer than the median, nine of ten no longer than p90."""
    waits.sort()
    made = latencies(waits)
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

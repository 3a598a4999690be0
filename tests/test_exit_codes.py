"""Every exit code of the contract: when it comes, what it says, whether the output was written, what it cost."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from enrich.errors import ApiUnreachable
from enrich.execution import Timing
from enrich.model import State
from enrich.sandbox import Fault
from enrich.sandbox.databar import Databar, NotFoundError
from enrich.sandbox.questions import Refused as ApiRefusal
from enrich.store.lock import hold
from enrich.surroundings import Options
from tests.cases import first_quick
from tests.harness import AWAY, HASTY, ILL, Api, Done, Office, kill, people, serving, until

OLD = "the output of an older night\n"


@pytest.fixture
def old_output(office: Office) -> Path:
    """Put an output there that only a finished execution may replace."""
    path = office.folder / "out.csv"
    path.write_text(OLD)
    return path


def hastily(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the program, run in this process, the patience of `AWAY`."""
    values = tuple(getattr(AWAY, name) for name in Timing.__dataclass_fields__)
    monkeypatch.setattr(Timing.__init__, "__defaults__", values)


def told(done: Done, code: int, *words: str) -> dict[str, Any]:
    """Expect an exit: its code, one JSON object that agrees, an error on stderr with these words, no traceback."""
    assert done.code == code, done.stderr
    assert done.stdout.count("\n") == 1
    receipt = done.receipt
    assert receipt["exit_code"] == code
    for word in words:
        assert word in done.stderr
        assert code == 10 or word in receipt["error"] + receipt.get("hint", "") + done.stderr
    assert "Traceback" not in done.stderr
    return receipt


# 2: the command or the job is wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "job.yaml", "--no-such-option"], ["--no-such-option"]),
        (["run", "nowhere.yaml"], ["nowhere.yaml", "no such job file"]),
        (["run"], ["JOB"]),
        (["walk", "job.yaml"], ["walk"]),
        (["run", "job.yaml", "--retry", "found"], ["`found`", "failed, expired, in_doubt"]),
        (["run", "job.yaml", "--max-time", "5"], ["30m"]),
        (["run", "job.yaml", "--limit", "-1"], ["--limit"]),
        (["run", "job.yaml", "--max-credits", "-1"], ["--max-credits"]),
        (["run", "job.yaml", "--if-locked", "ignore"], ["wait=10m"]),
        (["run", "job.yaml", "--output", "leads.csv"], ["would replace the input"]),
        (["run", "job.yaml", "--output", "out.docx"], ["out.docx", ".parquet"]),
    ],
)
def test_a_wrong_command_is_exit_2(api: Api, office: Office, arguments: list[str], words: list[str]) -> None:
    """What is wrong on the command line is named, and the JSON error is there all the same."""
    office.write_leads(people(1))

    done = office.command(*arguments, "--json", api=api)

    told(done, 2, *words)
    assert api.audit()["accepted"] == 0


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"waterfall": "email_geter"}, ["job.yaml:4", "email_geter", "did you mean `email_getter`?"]),
        ({"params": "{first_nam: First Name}"}, ["job.yaml:5", "first_nam", "did you mean `first_name`?"]),
        ({"params": "{first_name: First Name}"}, ["job.yaml:5", "requires `last_name`"]),
        ({"enrichments": "[833, 999]"}, ["999", "833 Mailhound"]),
        ({"enrichments": "[833, 833]"}, ["833", "twice"]),
        ({"email_verifier": "11"}, ["11", "10 Mailproof"]),
        ({"columns": "{Note: email}"}, ["job.yaml:9", "columns.Note", "leads.csv"]),
        ({"columns": "{enrich_status: email}"}, ["enrich_status"]),
        ({"only_if_empty": "[Emial]"}, ["Emial", "did you mean `Email`?", "leads.csv"]),
        ({"where": "Contry = 'DE'"}, ["Contry", "leads.csv"]),
        ({"where": "Note ="}, ["where"]),
        ({"where": "count(Note) > 1"}, ["where"]),
        ({"where": "CAST(Note AS INT) > 1"}, ["where", "TRY_CAST"]),
        ({"input": "out.csv"}, ["would replace the input"]),
        ({"colour": "red"}, ["job.yaml:12", "colour", "unknown key"]),
        ({"version": "2"}, ["job.yaml:1", "version"]),
        ({"api_key": "sk-123"}, ["api_key", "DATABAR_API_KEY"]),
        ({"limits": "{max_credits: lots}"}, ["limits.max_credits"]),
        ({"params": "[unclosed"}, ["job.yaml:"]),
    ],
)
def test_a_wrong_job_is_exit_2_and_its_line_is_named(
    api: Api, office: Office, replaced: dict[str, str], words: list[str]
) -> None:
    """What is wrong in the job file is named with its line, its key and the nearest right name; nothing is sent."""
    office.write_leads(people(1))
    if replaced == {"input": "out.csv"}:
        office.write_leads(people(1), name="out.csv")
    office.write_job(**replaced)

    done = office.command("run", "job.yaml", "--json", api=api)

    told(done, 2, *words)
    assert "sk-123" not in done.stderr + done.stdout
    assert api.audit()["accepted"] == 0


@pytest.mark.parametrize("base_url", ["http://api.databar.ai/v1", "ftp://api.databar.ai", "nonsense"])
def test_an_address_that_would_show_the_key_is_exit_2(office: Office, base_url: str) -> None:
    """The key travels over https or loopback only."""
    office.write_leads(people(1))

    done = office.command("run", "job.yaml", "--json", DATABAR_BASE_URL=base_url, DATABAR_API_KEY="key-77")

    told(done, 2, "DATABAR_BASE_URL")
    assert "key-77" not in done.stderr


def test_an_output_in_the_ledgers_place_is_exit_2(api: Api, office: Office) -> None:
    """Written there, it would destroy the memory of what was paid for."""
    office.write_job(ledger="memory.csv")
    office.write_leads(people(2))

    done = office.command("run", "job.yaml", "--json", "--output", "memory.csv", api=api)

    told(done, 2, "ledger")
    assert api.audit()["accepted"] == 0


def test_an_address_without_the_api_is_exit_2(api: Api, office: Office) -> None:
    """A wrong path in DATABAR_BASE_URL is named as what it is."""
    office.write_leads(people(1))
    elsewhere = replace(api, base_url=api.base_url.replace("/v1", "/v2"))

    done = office.command("run", "job.yaml", "--json", api=elsewhere)

    told(done, 2, "404", "DATABAR_BASE_URL")


def test_a_job_that_the_api_rejects_as_a_whole_is_exit_2(
    api: Api, office: Office, old_output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 404 to a POST is about the job, not the row: the run stops, and the rows stay to be asked."""

    def submit(*_: object) -> str:
        raise NotFoundError("Waterfall not found")

    office.write_leads(people(40))
    monkeypatch.setattr(Databar, "submit", submit)

    done = office.command("run", "job.yaml", "--json", api=api)

    receipt = told(done, 2, "404", "Waterfall not found")
    assert (receipt["pending"], receipt["submitted"], receipt["in_doubt"]) == (40, 0, 0)
    assert old_output.read_text() == OLD
    monkeypatch.undo()
    assert office.run(api).submitted == 40


# 3: the key


def test_a_missing_key_is_exit_3(office: Office, old_output: Path) -> None:
    """Without a key nothing starts, and the three places to put it are named."""
    office.write_leads(people(1))

    done = office.command("run", "job.yaml", "--json", DATABAR_API_KEY="")

    told(done, 3, "DATABAR_API_KEY", "DATABAR_API_KEY_FILE", "~/.databar/config", "--sandbox")
    assert old_output.read_text() == OLD


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_wrong_key_is_exit_3_and_is_not_shown(tmp_path: Path, office: Office, old_output: Path, status: str) -> None:
    """The API refuses the key: nothing was spent, and the key is in no message and no file."""
    office.write_leads(people(1))
    with serving(tmp_path / "api.db", wrong_key=status) as api:
        wrong = replace(api, api_key="wrong-key-5c2")

        done = office.command("run", "job.yaml", "--json", "--log-file", "log", api=wrong)

        assert api.audit()["accepted"] == 0
    told(done, 3, status, "key")
    assert old_output.read_text() == OLD
    for text in (done.stderr, done.stdout, *(path.read_bytes().decode("latin-1") for path in _files(office))):
        assert "wrong-key-5c2" not in text


@pytest.mark.parametrize(("scope", "accepted"), [("post", 0), ("get", 40)])
def test_a_key_that_is_refused_in_the_middle_is_exit_3(
    api: Api, office: Office, old_output: Path, scope: str, accepted: int
) -> None:
    """A key that is withdrawn stops the run; what was bought is collected when there is a key again."""
    office.write_leads(people(40))
    api.fault("unauthorized", 100, scope)

    done = office.command("run", "job.yaml", "--json", api=api)

    receipt = told(done, 3, "401", "key")
    assert receipt["pending"] == 40
    assert receipt["submitted"] <= accepted
    assert old_output.read_text() == OLD
    api.heal()
    assert office.run(api).exit_code == 0
    audit = api.audit()
    assert (audit["accepted"], audit["paid_twice"]) == (40, 0)


# 4: the API


def test_an_api_that_cannot_be_reached_is_exit_4(
    office: Office, old_output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreachable at the start: no execution comes to be, nothing was spent, the old output stays."""
    hastily(monkeypatch)
    office.write_leads(people(1))
    nobody = Api("http://127.0.0.1:9/v1", "key")
    began = time.monotonic()

    done = office.command("run", "job.yaml", "--json", api=nobody)

    told(done, 4, "unreachable", "again later")
    assert done.receipt.keys() == {"exit_code", "error"}
    assert time.monotonic() - began < 15
    assert old_output.read_text() == OLD


def test_an_api_that_comes_back_in_time_is_waited_for(api: Api, office: Office) -> None:
    """A short outage at the start is sat out."""
    office.write_leads(people(2))
    api.fault("unavailable", 1, "all", seconds=0.4)

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.submitted) == (0, 2)


@pytest.mark.parametrize("fault", first_quick(1, ["html", "error-before", "rate-limit-bare", "redirect"]))
def test_an_api_that_only_fails_at_the_start_is_exit_4(api: Api, office: Office, fault: str) -> None:
    """An API that answers nonsense is as good as none."""
    office.write_leads(people(1))
    api.fault(fault, 100, "me")

    with pytest.raises(ApiUnreachable) as raised:
        office.run(api, timing=AWAY)

    assert raised.value.exit_code == 4


def test_an_api_that_goes_away_while_it_is_polled_is_exit_4(api: Api, office: Office) -> None:
    """An outage in the middle: the output is written with the rest pending, and the next run collects it."""
    office.write_leads(people(20))
    api.fault("unavailable", 1, "get", seconds=60)

    receipt = office.run(api, timing=ILL)

    assert receipt.exit_code == 4
    assert receipt.error is not None
    assert "503" in receipt.error
    assert receipt.pending == sum(row["enrich_status"] == "pending" for row in office.output()) > 0
    api.heal()
    second = office.run(api)
    assert (second.pending, second.submitted) == (0, 20 - receipt.submitted - (receipt.in_doubt or 0))
    assert api.audit()["accepted_more_than_once"] == 0


def test_an_api_that_takes_no_posts_any_more_is_exit_4(api: Api, office: Office) -> None:
    """5xx to POSTs are doubts, each of them; the run stops making more of them and leaves."""
    office.write_job(limits="{in_flight: 4}")
    office.write_leads(people(100))
    api.fault("error-before", 1000, "post", status=503)
    began = time.monotonic()

    receipt = office.run(api, timing=ILL)

    assert receipt.exit_code == 4
    assert 0 < (receipt.in_doubt or 0) <= 10
    assert receipt.pending == 100 - (receipt.in_doubt or 0)
    assert time.monotonic() - began < 40
    assert len(office.output()) == 100


@pytest.mark.long
def test_a_hiccup_of_the_api_does_not_stop_the_posts_for_long(api: Api, office: Office) -> None:
    """Half a second of 5xx with the wire full is one bad moment: the pauses grow from a second, not from a minute."""
    office.write_leads(people(60))
    api.fault("unavailable", 1, "post", seconds=0.5)
    began = time.monotonic()

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.pending) == (14, 0)
    assert 0 < (receipt.in_doubt or 0) <= 32
    assert time.monotonic() - began < 40


def test_an_api_that_answers_429_for_ever_is_exit_4(api: Api, office: Office) -> None:
    """Being told to wait, again and again, is no good answer."""
    office.write_leads(people(5))
    api.fault("rate-limit-bare", 100_000, "post")

    receipt = office.run(api, timing=ILL)

    assert (receipt.exit_code, receipt.in_doubt, receipt.pending) == (4, 0, 5)


# 5: refused before spending


def test_a_missing_input_is_exit_5(api: Api, office: Office, old_output: Path) -> None:
    """No file of leads: nothing is sent and the old output stays."""
    done = office.command("run", "job.yaml", "--json", api=api)

    told(done, 5, "leads.csv")
    assert old_output.read_text() == OLD


def test_a_balance_below_one_request_is_exit_5(tmp_path: Path, office: Office, old_output: Path) -> None:
    """Refused before anything is spent, with both amounts."""
    office.write_leads(people(3))
    with serving(tmp_path / "api.db", balance=3.5) as api:
        done = office.command("run", "job.yaml", "--json", api=api)

        assert api.audit()["accepted"] == 0
    told(done, 5, "balance", "3.5", "3.51")
    assert old_output.read_text() == OLD


def test_a_balance_that_nothing_is_asked_of_may_be_low(tmp_path: Path, office: Office) -> None:
    """When all answers are in the ledger, an empty account does not matter."""
    office.write_leads(people(3))
    state = tmp_path / "api.db"
    with serving(state, balance=11) as api:
        first = office.run(api)
        assert first.exit_code == 0
        api.top_up(-api.audit()["balance"])

        done = office.command("run", "job.yaml", "--json", api=api)

    assert told(done, 0)["reused"] == 3


def test_an_output_that_cannot_be_written_is_exit_5_before_spending(api: Api, office: Office) -> None:
    """A folder in the output's place is seen before the first POST."""
    office.write_leads(people(1))
    (office.folder / "out.csv").mkdir()

    done = office.command("run", "job.yaml", "--json", api=api)

    told(done, 5, "out.csv")
    assert api.audit()["accepted"] == 0


def test_a_file_that_is_no_ledger_is_exit_5(api: Api, office: Office) -> None:
    """A ledger's place that is taken by something else is left alone."""
    office.write_leads(people(1))
    office.ledger_path.parent.mkdir()
    office.ledger_path.write_text("this is a diary, not a database, and longer than a header of SQLite is " * 3)

    done = office.command("run", "job.yaml", "--json", api=api)

    told(done, 5, "job.db")
    assert "diary" in office.ledger_path.read_text()
    assert api.audit()["accepted"] == 0


def test_a_ledger_of_a_newer_program_is_exit_5(api: Api, office: Office) -> None:
    """An older program does not touch what a newer one wrote."""
    office.write_leads(people(1))
    office.run(api)
    with sqlite3.connect(office.ledger_path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()

    done = office.command("run", "job.yaml", "--json", api=api)

    told(done, 5, "newer")


# 10: some rows failed


def test_rows_that_failed_tonight_are_exit_10(tmp_path: Path, office: Office) -> None:
    """The output is written and says which rows failed and why; tomorrow that is no news any more."""
    office.write_leads(people(30))
    with serving(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0) as api:
        first = office.command("run", "job.yaml", "--json", api=api)
        second = office.command("run", "job.yaml", "--json", api=api)

    receipt = told(first, 10)
    failed = [row for row in office.output() if row["enrich_status"] == "failed"]
    assert receipt["failed"] == len(failed) > 0
    assert all("response" in row["enrich_error"] for row in failed)
    assert "--retry failed" in first.stderr
    assert told(second, 0)["failed"] == len(failed)


def test_a_param_that_the_api_refuses_fails_the_row_only(
    api: Api, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 400 that names a param is about that row: it failed at no cost, the others go on."""
    submit = Databar.submit

    def picky(self: Databar, order: Any, quirk: Any = None) -> str:
        if order.rows[0]["first_name"] == "First3":
            raise ApiRefusal({"error": "INVALID_PARAMS", "rows": [{"position": 1, "fields": {"company": ["Bad."]}}]})
        return submit(self, order, quirk)

    monkeypatch.setattr(Databar, "submit", picky)
    office.write_leads(people(6))

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.failed, receipt.submitted) == (10, 1, 5)
    assert office.output()[3]["enrich_error"] == "company: Bad."
    assert office.output()[3]["enrich_credits"] in ("", "0")


# 11: the lock


def test_a_second_execution_is_exit_11(api: Api, office: Office, old_output: Path) -> None:
    """One at a time: who comes second leaves at once and touches nothing."""
    office.write_leads(people(1))
    with hold(office.ledger_path, 0):
        fails = office.command("run", "job.yaml", "--json", api=api)
        skips = office.command("run", "job.yaml", "--json", "--if-locked", "skip", api=api)
        waits = office.command("run", "job.yaml", "--json", "--if-locked", "wait=1s", api=api)

    told(fails, 11, "another execution", "--if-locked")
    assert skips.code == skips.receipt["exit_code"] == 0
    told(waits, 11)
    assert old_output.read_text() == OLD
    assert api.audit()["accepted"] == 0


@pytest.mark.long
def test_a_second_execution_may_wait_for_its_turn(api: Api, office: Office) -> None:
    """`--if-locked wait` starts when the first one is done."""
    office.write_leads(people(1))
    holding, release = threading.Event(), threading.Event()

    def first() -> None:
        with hold(office.ledger_path, 0):
            holding.set()
            release.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    holding.wait(10)
    threading.Timer(0.5, release.set).start()

    done = office.command("run", "job.yaml", "--json", "--if-locked", "wait", api=api)

    thread.join()
    assert told(done, 0)["submitted"] == 1


@pytest.mark.long
def test_the_lock_dies_with_its_process(api: Api, office: Office) -> None:
    """A killed execution locks nobody out."""
    office.write_leads(people(1))
    api.fault("silence-before")
    process = office.start("run", "job.yaml", api=api)
    until(lambda: api.audit()["faults"].get("silence-before", 0) == 1)
    assert office.command("run", "job.yaml", "--json", api=api).code == 11

    kill(process)

    assert office.command("run", "job.yaml", "--json", api=api).code == 14


# 12: credits


def test_the_cap_is_kept_and_is_exit_12(api: Api, office: Office) -> None:
    """Never more than `--max-credits`, what is in flight included; the rest is pending and bought another night."""
    office.write_leads(people(20))

    done = office.command("run", "job.yaml", "--json", "--max-credits", "8", api=api)

    receipt = told(done, 12, "cap", "max_credits")
    assert 0 < receipt["submitted"] < 20
    assert receipt["credits_spent"] == pytest.approx(api.audit()["credits_charged"])
    assert receipt["credits_spent"] <= 8
    assert receipt["pending"] == sum(row["enrich_status"] == "pending" for row in office.output()) > 0
    assert office.run(api).pending == 0
    assert api.audit()["paid_twice"] == 0


def test_a_cap_of_nothing_buys_nothing(api: Api, office: Office) -> None:
    """`--max-credits 0` collects and writes, and sends nothing."""
    office.write_leads(people(2))

    done = office.command("run", "job.yaml", "--json", "--max-credits", "0", api=api)

    told(done, 12)
    assert api.audit()["accepted"] == 0


def test_an_account_that_runs_dry_is_exit_12(tmp_path: Path, office: Office) -> None:
    """406 from the API stops the buying; topped up, the next run goes on where this one stopped."""
    office.write_leads(people(30))
    with serving(tmp_path / "api.db", balance=15) as api:
        done = office.command("run", "job.yaml", "--json", api=api)

        receipt = told(done, 12, "406", "credits")
        assert 0 < receipt["submitted"] < 30
        assert receipt["pending"] == 30 - receipt["submitted"]
        assert receipt["in_doubt"] == 0
        assert len(office.output()) == 30
        api.top_up(1000)
        assert office.run(api).exit_code == 0
        audit = api.audit()
    assert (audit["accepted"], audit["paid_twice"]) == (30, 0)


# 13: time


def test_the_end_of_the_time_is_exit_13(tmp_path: Path, office: Office) -> None:
    """`--max-time` ends the run with the output written; what was bought is collected by the next one."""
    office.write_leads(people(5))
    state = tmp_path / "api.db"
    with serving(state, latency="fixed(30)") as api:
        began = time.monotonic()
        done = office.command("run", "job.yaml", "--json", "--max-time", "3s", api=api)
        assert time.monotonic() - began < 25
        api.advance(60)
        second = office.run(api)
        audit = api.audit()

    receipt = told(done, 13, "--max-time")
    assert receipt["pending"] == 5
    assert receipt["submitted"] > 0
    assert (second.exit_code, second.submitted, second.pending) == (0, 5 - receipt["submitted"], 0)
    assert (audit["accepted"], audit["paid_twice"]) == (5, 0)


def test_the_end_of_the_time_leaves_no_slow_post_in_doubt(tmp_path: Path, office: Office) -> None:
    """What is on the wire when the time is over is waited for, as after a signal."""
    office.write_leads(people(4))
    with serving(tmp_path / "api.db", faults=(Fault.parse("post:slow=1,seconds=4"),)) as api:
        receipt = office.run(api, Options(max_time_s=2.5))
    assert receipt.submitted > 0
    assert receipt.in_doubt == 0


def test_the_time_holds_for_what_earlier_nights_left_too(tmp_path: Path, office: Office) -> None:
    """Collecting what is outstanding counts as well: a slow API does not stretch the window."""
    office.write_leads(people(20))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api:
        office.leave_at_the_api(api)
        office.write_job(limits="{requests_per_second: 1}")
        began = time.monotonic()
        receipt = office.run(api, Options(max_time_s=1.0))

    assert time.monotonic() - began < 15
    assert (receipt.exit_code, receipt.pending) == (13, 20)


def test_enough_time_is_no_exit_13(api: Api, office: Office) -> None:
    """A run that is done before its time is over is a success."""
    office.write_leads(people(5))

    done = office.command("run", "job.yaml", "--json", "--max-time", "1m", api=api)

    told(done, 0)


def test_a_task_that_outlives_the_patience_is_exit_13(tmp_path: Path, office: Office) -> None:
    """A task that hangs no longer holds the run: the rest is written, the next run asks it first."""
    office.write_job(policy="{patience: 1s}")
    office.write_leads(people(3))
    with serving(tmp_path / "api.db", latency="fixed(300)") as api:
        done = office.command("run", "job.yaml", "--json", api=api)
        api.advance(400)
        second = office.run(api)

    receipt = told(done, 13, "still running")
    assert receipt["pending"] == 3
    assert (second.exit_code, second.pending, second.submitted) == (0, 0, 0)


# 14: in doubt


@pytest.mark.parametrize(
    "fault",
    first_quick(3, ["no-task-id", "error-after", "html-200", "broken-json", "wrong-json", "reset-after", "lost-task"]),
)
def test_requests_in_doubt_are_exit_14(api: Api, office: Office, fault: str) -> None:
    """Nobody can tell whether it was charged: the row says so, and it is not asked again by itself, ever."""
    office.write_leads(people(4))
    api.fault(fault)

    receipt = office.run(api, timing=HASTY)
    second = office.run(api, timing=HASTY)

    assert (receipt.exit_code, receipt.in_doubt) == (14, 1)
    assert (second.exit_code, second.in_doubt, second.submitted) == (14, 1, 0)
    row = next(row for row in office.output() if row["enrich_status"] == "in_doubt")
    assert row["enrich_error"]
    assert row["enrich_credits"] == ""
    audit = api.audit()
    assert (audit["accepted"], audit["accepted_more_than_once"]) == (4, 0)


def test_the_way_out_of_doubt_is_told(api: Api, office: Office) -> None:
    """The receipt on stderr says what a person may do."""
    office.write_leads(people(2))
    api.fault("no-task-id")

    done = office.command("run", "job.yaml", "--json", api=api)

    told(done, 14)
    assert "--retry in_doubt" in done.stderr


@pytest.mark.parametrize("fault", first_quick(1, ["rate-limit", "rate-limit-date", "redirect"]))
def test_a_refused_post_leaves_no_doubt(api: Api, office: Office, fault: str) -> None:
    """What provably was not accepted is simply sent again."""
    office.write_leads(people(3))
    api.fault(fault, 2, "post")

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.in_doubt, receipt.submitted) == (0, 0, 3)
    assert api.audit()["accepted_more_than_once"] == 0


# 130 and 143: signals


def interrupted(office: Office, api: Api, number: signal.Signals, ready: Callable[[], bool]) -> tuple[Done, float]:
    """Start the program, send it a signal once it is `ready`, tell how it ended and after how many seconds."""
    process = office.start("run", "job.yaml", "--json", api=api)
    until(ready)
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=90)
    return Done(process.returncode, out, err), time.monotonic() - began


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 143, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_signal_winds_the_run_down(
    tmp_path: Path, office: Office, old_output: Path, number: signal.Signals, code: int
) -> None:
    """No new POST, every answer on the wire is written down, the old output stays, the next run goes on."""
    office.write_leads(people(150))
    office.write_job(limits="{requests_per_second: 1000, in_flight: 60}")
    state = tmp_path / "api.db"
    with serving(state, latency="fixed(60)") as api:
        api.fault("slow", 500, "post", seconds=1)

        done, seconds = interrupted(office, api, number, lambda: api.audit()["requests"].get("run", 0) >= 20)

        audit = api.audit()
        receipt = told(done, code)
        assert seconds < 20
        assert old_output.read_text() == OLD
        assert receipt["submitted"] == audit["accepted"] < 150
        assert (receipt["in_doubt"], receipt["pending"]) == (0, 150)
        assert (audit["accepted_more_than_once"], receipt["output"]) == (0, None)
        api.heal()
        api.advance(100)
    with serving(state) as api:
        assert office.run(api).exit_code == 0
        audit = api.audit()
    assert (audit["accepted"], audit["accepted_more_than_once"]) == (150, 0)


def test_a_signal_does_not_wait_for_ever_for_a_silent_api(api: Api, office: Office) -> None:
    """POSTs that are never answered are in doubt after the exit, which comes all the same."""
    office.write_leads(people(40))
    api.fault("silence-after", 40)
    heard: list[float] = []

    def interrupt() -> None:
        until(lambda: api.audit()["faults"].get("silence-after", 0) >= 32)
        heard.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    receipt = office.run(api, timing=replace(HASTY, post_s=60.0))
    seconds = time.monotonic() - heard[0]
    thread.join()

    assert receipt.exit_code == 143
    assert HASTY.wire_s < seconds < 30
    assert Timing().wire_s + Timing().ready_s < 10
    assert (receipt.in_doubt, receipt.pending) == (32, 8)
    assert api.audit()["accepted"] == 32


@pytest.mark.long
def test_a_signal_fetches_what_is_ready(tmp_path: Path, office: Office) -> None:
    """Results that are there at the signal are written down before the exit."""
    office.write_leads(people(6))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api:
        done, _ = interrupted(office, api, signal.SIGINT, lambda: _ready(api, 6))

        receipt = told(done, 130)
        assert receipt["found"] + receipt["not_found"] == 6
        assert receipt["credits_spent"] == pytest.approx(api.audit()["credits_charged"])


def _ready(api: Api, accepted: int) -> bool:
    if api.audit()["accepted"] < accepted:
        return False
    api.advance(100)
    return True


@pytest.mark.long
def test_a_second_signal_leaves_at_once(api: Api, office: Office, old_output: Path) -> None:
    """Who presses Ctrl-C twice does not wait; the POST on the wire is in doubt at the next start."""
    office.write_leads(people(1))
    api.fault("silence-after")
    process = office.start("run", "job.yaml", api=api)
    until(lambda: api.audit()["faults"].get("silence-after", 0) == 1)
    began = time.monotonic()

    while process.poll() is None:  # a busy machine may not have heard the first before the second comes
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    process.communicate(timeout=90)

    assert process.returncode == 130
    assert time.monotonic() - began < Timing().wire_s
    assert old_output.read_text() == OLD
    receipt = office.run(api)
    assert (receipt.exit_code, receipt.in_doubt, receipt.submitted) == (14, 1, 0)


@pytest.mark.long
def test_a_signal_before_the_first_post_costs_nothing(api: Api, office: Office, old_output: Path) -> None:
    """Interrupted while the API is still being asked who we are: out at once."""
    office.write_leads(people(5))
    api.fault("slow", 1, "me", seconds=20)

    done, seconds = interrupted(office, api, signal.SIGTERM, lambda: api.audit()["requests"].get("me", 0) == 1)

    told(done, 143)
    assert seconds < 15
    assert api.audit()["accepted"] == 0
    assert old_output.read_text() == OLD


@pytest.mark.long
def test_a_signal_while_the_output_is_written_leaves_the_old_one(api: Api, office: Office, old_output: Path) -> None:
    """The half-written file goes, the old one stays, and the exit is quick however long the file is."""
    office.write_leads(people(10) * 3_000)
    part = office.folder / ".job.enrich-part"

    done, seconds = interrupted(office, api, signal.SIGTERM, part.exists)

    told(done, 143)
    assert seconds < 15
    assert not part.exists()
    assert old_output.read_text() == OLD


@pytest.mark.long
def test_a_signal_does_not_sit_out_a_retry_after(api: Api, office: Office) -> None:
    """An API that asks for an hour's pause does not keep the program from leaving."""
    office.write_leads(people(5))
    api.fault("rate-limit", 100, "post", retry_after=3600)

    done, seconds = interrupted(office, api, signal.SIGTERM, lambda: api.audit()["requests"].get("429", 0) > 0)

    told(done, 143)
    assert seconds < 30
    assert api.audit()["accepted"] == 0


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_a_signal_while_waiting_for_the_lock_is_told_too(
    api: Api, office: Office, number: signal.Signals, code: int
) -> None:
    """Every exit prints the object, also the one before an execution came to be."""
    office.write_leads(people(1))
    with hold(office.ledger_path, 0):
        process = office.start("run", "job.yaml", "--json", "--if-locked", "wait", "--log-file", "log", api=api)
        until((office.folder / "log").exists)
        time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=10)

    told(Done(process.returncode, out, err), code)


# When several hold


def test_the_graver_reason_is_the_exit_code(tmp_path: Path, office: Office) -> None:
    """Failed rows, doubts and the cap together: the cap; without it the doubts; without them the failures."""
    office.write_leads(people(30))
    with serving(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0) as api:
        api.fault("no-task-id")
        capped = office.command("run", "job.yaml", "--json", "--max-credits", "20", api=api)
        doubtful = office.run(api)
        failed = office.run(api, Options(retry=frozenset({State.IN_DOUBT, State.FAILED})))

    receipt = told(capped, 12)
    assert receipt["in_doubt"] == 1
    assert receipt["failed"] > 0
    assert (doubtful.exit_code, doubtful.in_doubt) == (14, 1)
    assert (failed.exit_code, failed.in_doubt) == (10, 0)


def test_a_refused_key_outranks_an_outage_and_a_cap(api: Api, office: Office) -> None:
    """401 while doubts are there: the key comes first, and the output is not written."""
    office.write_leads(people(5))
    api.fault("no-task-id", 2)
    api.fault("unauthorized", 50, "get")

    receipt = office.run(api, timing=HASTY)

    assert (receipt.exit_code, receipt.output) == (3, None)


def test_an_outage_outranks_the_doubts_that_it_made(api: Api, office: Office) -> None:
    """5xx to every POST: exit 4, with the doubts counted."""
    office.write_leads(people(5))
    api.fault("error-after", 50)

    receipt = office.run(api, timing=HASTY)

    assert receipt.exit_code in (4, 14)
    assert receipt.in_doubt == 5


# 1: a bug


def test_a_bug_is_exit_1_with_its_trace(api: Api, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw pages somebody, and the JSON object is there."""
    office.write_leads(people(1))

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("enrich.pipeline.connect", broken)

    done = office.command("run", "job.yaml", "--json", api=api)

    assert (done.code, done.receipt["exit_code"]) == (1, 1)
    assert "ZeroDivisionError" in done.stderr
    assert "bug" in done.stderr
    assert api.api_key not in done.stderr


def test_a_ledger_that_cannot_be_written_any_more_is_exit_1(api: Api, office: Office) -> None:
    """A full disk in the middle: nothing more is sent, and the program says so instead of spending blindly."""
    office.write_leads(people(100))
    office.command("run", "job.yaml", "--limit", "0", api=api)
    with sqlite3.connect(office.ledger_path) as db:
        db.execute(
            "CREATE TRIGGER full BEFORE UPDATE OF task_id ON attempts WHEN (SELECT count(*) FROM attempts) > 20 "
            "BEGIN SELECT raise(ABORT, 'database or disk is full'); END"
        )
    db.close()

    done = office.command("run", "job.yaml", "--json", api=api)

    told(done, 1, "ledger", "full")
    assert api.audit()["accepted"] <= 64
    with sqlite3.connect(office.ledger_path) as db:
        db.execute("DROP TRIGGER full")
    db.close()
    assert office.run(api).exit_code == 0
    assert api.audit()["accepted_more_than_once"] == 0


def _files(office: Office) -> list[Path]:
    return [path for path in office.folder.rglob("*") if path.is_file()]

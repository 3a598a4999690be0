"""Every exit code: when it occurs, its message, whether the output is written, and what it costs."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from msgspec.structs import replace

from enrich.errors import ApiUnreachable
from enrich.ledger.lock import lock_ledger
from enrich.models import State
from enrich.run import pipeline
from enrich.run.context import RunOptions
from enrich.run.run_state import Timeouts
from enrich.run.summary import RunSummary
from enrich.sandbox import Fault
from enrich.sandbox.databar import ApiError, Databar
from enrich.sandbox.lookups import Refused as ApiRefusal
from tests.support import short_waits
from tests.support.cases import first_quick, in_turn
from tests.support.workspace import (
    JOB,
    SHORT_OUTAGE_TIMEOUT,
    SHORT_STARTUP_TIMEOUT,
    SHORT_TIMEOUTS,
    STEP_JOB,
    ProgramResult,
    SandboxApi,
    Workspace,
    make_leads,
    serve_api,
    wait_until,
)

OLD_OUTPUT = "the output of an older night\n"


@pytest.fixture
def old_output(workspace: Workspace) -> Path:
    """Write an output that only a finished execution may replace."""
    path = workspace.folder / "out.csv"
    path.write_text(OLD_OUTPUT)
    return path


def assert_exit(result: ProgramResult, code: int, *messages: str) -> dict[str, Any]:
    """Assert an exit: its code, one JSON object that agrees, these words in an error on stderr, no traceback."""
    assert result.exit_code == code, result.stderr
    assert result.stdout.count("\n") == 1
    summary = result.json_output
    assert summary["exit_code"] == code
    for word in messages:
        assert word in result.stderr
        assert code == 10 or word in summary["error"] + summary.get("hint", "") + result.stderr
    assert "Traceback" not in result.stderr
    return summary


# 2: the command or the job is wrong


@in_turn(
    ("arguments", "messages"),
    [
        (["run", "job.yaml", "--no-such-option"], ["--no-such-option"]),
        (["run", "nowhere.yaml"], ["nowhere.yaml", "the job file does not exist"]),
        (["run"], ["JOB"]),
        (["walk", "job.yaml"], ["walk"]),
        (["run", "job.yaml", "--retry", "found"], ["`found`", "failed, expired, in_doubt"]),
        (["run", "job.yaml", "--max-time", "5"], ["30m"]),
        (["run", "job.yaml", "--limit", "-1"], ["--limit"]),
        (["run", "job.yaml", "--max-credits", "-1"], ["--max-credits"]),
        (["run", "job.yaml", "--if-locked", "ignore"], ["wait=10m"]),
        (["run", "job.yaml", "--output", "leads.csv"], ["are the same file"]),
        (["run", "job.yaml", "--output", "out.docx"], ["out.docx", ".parquet"]),
    ],
)
def test_usage_error_is_exit_2(
    api: SandboxApi, workspace: Workspace, arguments: list[str], messages: list[str]
) -> None:
    """Names the error of the command line, and prints the JSON error."""
    workspace.write_leads(make_leads(1))

    result = workspace.run_in_process(*arguments, "--json", api=api)

    assert_exit(result, 2, *messages)
    assert api.audit()["accepted"] == 0


@in_turn(
    ("replaced", "messages"),
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
        ({"colour": "red"}, ["job.yaml:12", "colour", "unknown key"]),
        ({"version": "2"}, ["job.yaml:1", "version"]),
        ({"api_key": "sk-123"}, ["api_key", "DATABAR_API_KEY"]),
        ({"limits": "{max_credits: lots}"}, ["limits.max_credits"]),
        ({"params": "[unclosed"}, ["job.yaml:"]),
        ({"input": "out.csv"}, ["are the same file"]),
    ],
)
def test_job_error_is_exit_2(
    api: SandboxApi, workspace: Workspace, replaced: dict[str, str], messages: list[str]
) -> None:
    """Names the line, the key and the nearest valid name in the job file; sends nothing."""
    workspace.write_leads(make_leads(1))
    if replaced == {"input": "out.csv"}:
        workspace.write_leads(make_leads(1), name="out.csv")
    workspace.write_job(**replaced)

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert_exit(result, 2, *messages)
    assert "sk-123" not in result.stderr + result.stdout
    assert api.audit()["accepted"] == 0


@in_turn("base_url", ["http://api.databar.ai/v1", "ftp://api.databar.ai", "nonsense"])
def test_insecure_base_url_is_exit_2(workspace: Workspace, base_url: str) -> None:
    """Sends the key over https or to loopback only."""
    workspace.write_leads(make_leads(1))

    result = workspace.run_in_process("run", "job.yaml", "--json", DATABAR_BASE_URL=base_url, DATABAR_API_KEY="key-77")

    assert_exit(result, 2, "DATABAR_BASE_URL")
    assert "key-77" not in result.stderr


def test_output_path_equal_to_ledger_is_exit_2(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses an output path that would overwrite the ledger."""
    workspace.write_job(ledger="memory.csv")
    workspace.write_leads(make_leads(2))

    result = workspace.run_in_process("run", "job.yaml", "--json", "--output", "memory.csv", api=api)

    assert_exit(result, 2, "ledger")
    assert api.audit()["accepted"] == 0


def test_wrong_base_path_is_exit_2(api: SandboxApi, workspace: Workspace) -> None:
    """Reports that the path in DATABAR_BASE_URL is wrong."""
    workspace.write_leads(make_leads(1))
    other_server = dataclasses.replace(api, base_url=api.base_url.replace("/v1", "/v2"))

    result = workspace.run_in_process("run", "job.yaml", "--json", api=other_server)

    assert_exit(result, 2, "404", "DATABAR_BASE_URL")


@pytest.mark.long
def test_waterfall_404_is_exit_2(
    api: SandboxApi, workspace: Workspace, old_output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 404 to a POST concerns the job, not the row: the run stops and the rows stay pending."""

    def submit(*_: object, **__: object) -> str:
        raise ApiError(404, "Waterfall not found")

    workspace.write_leads(make_leads(40))
    monkeypatch.setattr(Databar, "submit", submit)

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    summary = assert_exit(result, 2, "404", "Waterfall not found")
    assert (summary["pending"], summary["submitted"], summary["in_doubt"]) == (40, 0, 0)
    assert old_output.read_text() == OLD_OUTPUT
    monkeypatch.undo()
    assert workspace.run_job(api).submitted == 40


# 3: the key


def test_a_missing_key_is_exit_3(workspace: Workspace, old_output: Path) -> None:
    """Stops without a key and names the three places to put it."""
    workspace.write_leads(make_leads(1))

    result = workspace.run_in_process("run", "job.yaml", "--json", DATABAR_API_KEY="")

    assert_exit(result, 3, "DATABAR_API_KEY", "DATABAR_API_KEY_FILE", "~/.databar/config", "--sandbox")
    assert old_output.read_text() == OLD_OUTPUT


@pytest.mark.parametrize("status", ["401", "403"])
def test_wrong_key_is_exit_3(tmp_path: Path, workspace: Workspace, old_output: Path, status: str) -> None:
    """The API rejects the key: nothing is spent, and the key is in no message or file."""
    workspace.write_leads(make_leads(1))
    with serve_api(tmp_path / "api.db", wrong_key=status) as api:
        wrong = dataclasses.replace(api, api_key="wrong-key-5c2")

        result = workspace.run_in_process("run", "job.yaml", "--json", "--log-file", "log", api=wrong)

        assert api.audit()["accepted"] == 0
    assert_exit(result, 3, status, "key")
    assert old_output.read_text() == OLD_OUTPUT
    for text in (
        result.stderr,
        result.stdout,
        *(path.read_bytes().decode("latin-1") for path in _file_names(workspace)),
    ):
        assert "wrong-key-5c2" not in text


@pytest.mark.long
@pytest.mark.parametrize(("scope", "accepted"), [("post", 0), ("get", 40)])
def test_key_revoked_during_run_is_exit_3(
    api: SandboxApi, workspace: Workspace, old_output: Path, scope: str, accepted: int
) -> None:
    """A revoked key stops the run; open tasks are collected when there is a valid key."""
    workspace.write_leads(make_leads(40))
    api.inject_fault("unauthorized", 100, scope)

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    summary = assert_exit(result, 3, "401", "key")
    assert summary["pending"] == 40
    assert summary["submitted"] <= accepted
    assert old_output.read_text() == OLD_OUTPUT
    api.clear_faults()
    assert workspace.run_job(api).exit_code == 0
    audit = api.audit()
    assert (audit["accepted"], audit["paid_twice"]) == (40, 0)


# 4: the API


def test_unreachable_api_is_exit_4(workspace: Workspace, old_output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unreachable at the start: no execution is recorded, nothing is spent, the old output is kept."""
    monkeypatch.setattr(short_waits, "TIMEOUTS", SHORT_STARTUP_TIMEOUT)
    workspace.write_leads(make_leads(1))
    unassigned = SandboxApi("http://127.0.0.1:9/v1", "key")
    started_at = time.monotonic()

    result = workspace.run_in_process("run", "job.yaml", "--json", api=unassigned)

    assert_exit(result, 4, "unreachable", "again later")
    assert result.json_output.keys() == {"exit_code", "error"}
    assert time.monotonic() - started_at < 15
    assert old_output.read_text() == OLD_OUTPUT


@pytest.mark.parametrize(
    ("text", "changed"),
    first_quick(
        1,
        [
            (JOB, {}),
            (JOB, {"caps": "{by: Website, max: 1}"}),
            (JOB, {"changes": "{path: feed.csv, key: [Note]}", "rejects": "rejects.csv"}),
            (JOB, {"output": "out/"}),
            (STEP_JOB, {}),
        ],
    ),
)
def test_failing_api_at_start_writes_what_the_ledger_has(
    api: SandboxApi, workspace: Workspace, text: str, changed: dict[str, str]
) -> None:
    """Once a run has sent requests, the output is written from the ledger, and new leads are pending."""
    workspace.write_job(text, **changed)
    workspace.write_leads(make_leads(3))
    first = workspace.run_job(api)
    assert (first.exit_code, first.found) == (0, 3)
    workspace.write_leads([*make_leads(3, 1), *make_leads(1)])
    api.inject_fault("unavailable", 1, "all", seconds=600)

    summary = workspace.run_job(api, timing=SHORT_STARTUP_TIMEOUT)

    assert (summary.exit_code, summary.submitted, summary.execution) == (4, 0, 2)
    assert "unreachable" in (summary.error or "")
    assert (summary.rows, summary.found, summary.pending) == (4, 3, 1)
    assert summary.output == first.output
    if "output" not in changed:
        rows = workspace.read_output()
        assert [row["First Name"] for row in rows] == ["First1", "First2", "First3", "First0"]
        assert [row["enrich_status"] for row in rows] == ["found", "found", "pending", "found"]
    api.clear_faults()
    again = workspace.run_job(api)
    assert (again.exit_code, again.submitted, again.found) == (0, 1, 4)


@pytest.mark.parametrize("change", ["the waterfall is new", "a param is new", "nothing was sent"])
def test_failing_api_at_start_keeps_fuller_output(
    api: SandboxApi, workspace: Workspace, old_output: Path, change: str
) -> None:
    """The old output is kept if the ledger cannot have what it shows."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api, RunOptions(limit=0 if change == "nothing was sent" else None))
    if change == "the waterfall is new":
        workspace.write_job(waterfall="phone_getter", columns="{phone: phone}")
    elif change == "a param is new":
        workspace.write_job(params="{first_name: First Name, last_name: Last Name, company: Website, age: Note}")
    old_output.write_text(OLD_OUTPUT)
    api.inject_fault("unavailable", 1, "all", seconds=600)

    if change == "nothing was sent":
        with pytest.raises(ApiUnreachable) as unreachable:
            workspace.run_job(api, timing=SHORT_STARTUP_TIMEOUT)
        assert "No output is written: no run of this ledger has sent a request" in (unreachable.value.hint or "")
    else:
        problems: list[str] = []
        summary = workspace.run_job(api, timing=SHORT_STARTUP_TIMEOUT, on_problem=problems.append)
        assert (summary.exit_code, summary.output, summary.rows) == (4, None, None)
        assert problems == summary.notes
        reason = (
            "no run of this ledger has used the waterfall"
            if change == "the waterfall is new"
            else "no param with this name"
        )
        assert problems[0].startswith("no output is written, and an earlier one is unchanged: ")
        assert reason in problems[0]
    assert old_output.read_text() == OLD_OUTPUT


@pytest.mark.long
def test_short_outage_at_start_is_retried(api: SandboxApi, workspace: Workspace) -> None:
    """Waits through a short outage at the start."""
    workspace.write_leads(make_leads(2))
    api.inject_fault("unavailable", 1, "all", seconds=0.4)

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.submitted) == (0, 2)


@pytest.mark.parametrize("fault", first_quick(1, ["html", "error-before", "rate-limit-bare", "redirect"]))
def test_failing_api_at_start_is_exit_4(api: SandboxApi, workspace: Workspace, fault: str) -> None:
    """Treats invalid responses at the start as an unreachable API."""
    workspace.write_leads(make_leads(1))
    api.inject_fault(fault, 100, "me")

    with pytest.raises(ApiUnreachable) as error:
        workspace.run_job(api, timing=SHORT_STARTUP_TIMEOUT)

    assert error.value.exit_code == 4


@pytest.mark.long
def test_outage_while_polling_is_exit_4(api: SandboxApi, workspace: Workspace) -> None:
    """An outage in mid-run: writes the output with pending rows; the next run collects them."""
    workspace.write_leads(make_leads(20))
    api.inject_fault("unavailable", 1, "get", seconds=60)

    summary = workspace.run_job(api, timing=SHORT_OUTAGE_TIMEOUT)

    assert summary.exit_code == 4
    assert summary.error is not None
    assert "503" in summary.error
    assert summary.pending == sum(row["enrich_status"] == "pending" for row in workspace.read_output()) > 0
    api.clear_faults()
    second = workspace.run_job(api)
    assert (second.pending, second.submitted) == (0, 20 - summary.submitted - (summary.in_doubt or 0))
    assert api.audit()["accepted_more_than_once"] == 0


@pytest.mark.long
def test_failing_posts_are_exit_4(api: SandboxApi, workspace: Workspace) -> None:
    """Each 5xx to a POST leaves a request in doubt; the run stops sending and exits."""
    workspace.write_job(limits="{in_flight: 4}")
    workspace.write_leads(make_leads(100))
    api.inject_fault("error-before", 1000, "post", status=503)
    started_at = time.monotonic()

    summary = workspace.run_job(api, timing=SHORT_OUTAGE_TIMEOUT)

    assert summary.exit_code == 4
    assert 0 < (summary.in_doubt or 0) <= 10
    assert summary.pending == 100 - (summary.in_doubt or 0)
    assert time.monotonic() - started_at < 40
    assert len(workspace.read_output()) == 100


@pytest.mark.long
def test_short_post_failure_recovers(api: SandboxApi, workspace: Workspace) -> None:
    """Half a second of 5xx with many POSTs in flight counts once: pauses start at one second, not at a minute."""
    workspace.write_leads(make_leads(60))
    api.inject_fault("unavailable", 1, "post", seconds=0.5)
    started_at = time.monotonic()

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.pending) == (14, 0)
    assert 0 < (summary.in_doubt or 0) <= 32
    assert time.monotonic() - started_at < 40


@pytest.mark.long
def test_endless_429_is_exit_4(api: SandboxApi, workspace: Workspace) -> None:
    """Repeated 429s count as an outage in the end."""
    workspace.write_leads(make_leads(5))
    api.inject_fault("rate-limit-bare", 100_000, "post")

    summary = workspace.run_job(api, timing=SHORT_OUTAGE_TIMEOUT)

    assert (summary.exit_code, summary.in_doubt, summary.pending) == (4, 0, 5)


# 5: refused before spending


def test_a_missing_input_is_exit_5(api: SandboxApi, workspace: Workspace, old_output: Path) -> None:
    """Without an input file, sends nothing and keeps the old output."""
    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert_exit(result, 5, "leads.csv")
    assert old_output.read_text() == OLD_OUTPUT


def test_insufficient_balance_is_exit_5(tmp_path: Path, workspace: Workspace, old_output: Path) -> None:
    """Refuses before anything is spent, with both amounts."""
    workspace.write_leads(make_leads(3))
    with serve_api(tmp_path / "api.db", balance=3.5) as api:
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

        assert api.audit()["accepted"] == 0
    assert_exit(result, 5, "balance", "3.5", "3.51")
    assert old_output.read_text() == OLD_OUTPUT


@pytest.mark.long
def test_low_balance_without_new_requests(tmp_path: Path, workspace: Workspace) -> None:
    """An empty account does not matter when all answers are in the ledger."""
    workspace.write_leads(make_leads(3))
    state = tmp_path / "api.db"
    with serve_api(state, balance=11) as api:
        first = workspace.run_job(api)
        assert first.exit_code == 0
        api.top_up(-api.audit()["balance"])

        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert assert_exit(result, 0)["reused"] == 3


def test_unwritable_output_is_exit_5(api: SandboxApi, workspace: Workspace) -> None:
    """Finds a folder in the output's place before the first POST."""
    workspace.write_leads(make_leads(1))
    (workspace.folder / "out.csv").mkdir()

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert_exit(result, 5, "out.csv")
    assert api.audit()["accepted"] == 0


def test_not_a_ledger_is_exit_5(api: SandboxApi, workspace: Workspace) -> None:
    """Leaves another file in the ledger's place unchanged."""
    workspace.write_leads(make_leads(1))
    workspace.ledger_path.parent.mkdir()
    workspace.ledger_path.write_text("this is a diary, not a database, and longer than a header of SQLite is " * 3)

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert_exit(result, 5, "job.db")
    assert "diary" in workspace.ledger_path.read_text()
    assert api.audit()["accepted"] == 0


@pytest.mark.long
def test_newer_ledger_is_exit_5(api: SandboxApi, workspace: Workspace) -> None:
    """Leaves a ledger of a newer version unchanged."""
    workspace.write_leads(make_leads(1))
    workspace.run_job(api)
    with sqlite3.connect(workspace.ledger_path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert_exit(result, 5, "newer")


# 10: some rows failed


def test_failed_rows_are_exit_10(tmp_path: Path, workspace: Workspace) -> None:
    """Writes the output with each failed row and its reason; the next run exits with 0."""
    workspace.write_leads(make_leads(12))
    with serve_api(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0) as api:
        first = workspace.run_in_process("run", "job.yaml", "--json", api=api)
        second = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    summary = assert_exit(first, 10)
    failed = [row for row in workspace.read_output() if row["enrich_status"] == "failed"]
    assert summary["failed"] == len(failed) > 0
    assert all("response" in row["enrich_error"] for row in failed)
    assert "--retry failed" in first.stderr
    assert assert_exit(second, 0)["failed"] == len(failed)


@pytest.mark.long
def test_param_error_fails_row_only(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 400 that names a param fails that row at no cost; the others continue."""
    submit = Databar.submit

    def reject_param(self: Databar, target: Any, rows: Any, **options: Any) -> str:
        if rows[0]["first_name"] == "First3":
            raise ApiRefusal({"error": "INVALID_PARAMS", "rows": [{"position": 1, "fields": {"company": ["Bad."]}}]})
        return submit(self, target, rows, **options)

    monkeypatch.setattr(Databar, "submit", reject_param)
    workspace.write_leads(make_leads(6))

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.failed, summary.submitted) == (10, 1, 5)
    assert workspace.read_output()[3]["enrich_error"] == "company: Bad."
    assert workspace.read_output()[3]["enrich_credits"] in ("", "0")


@pytest.mark.parametrize(
    "body",
    first_quick(
        1,
        [
            {"detail": {"code": "PLAN", "reason": "upgrade your plan"}},
            {"detail": {"non_field_errors": ["bad"]}},
            {"detail": {"phone": ["Required"]}},
        ],
    ),
)
def test_refusal_of_the_job_fails_no_row(
    api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    """A 400 that names no param of the job stops the run, and the next run sends the rows."""

    def refuse(*_: object, **__: object) -> str:
        raise ApiRefusal(body)

    workspace.write_leads(make_leads(3))
    with monkeypatch.context() as patched:
        patched.setattr(Databar, "submit", refuse)
        refused = workspace.run_job(api)
    summary = workspace.run_job(api)

    assert (refused.exit_code, refused.failed, refused.pending) == (2, 0, 3)
    assert (summary.exit_code, summary.submitted, summary.failed) == (0, 3, 0)


# 11: the lock


@pytest.mark.long
def test_concurrent_run_is_exit_11(api: SandboxApi, workspace: Workspace, old_output: Path) -> None:
    """A second run exits immediately and changes nothing."""
    workspace.write_leads(make_leads(1))
    with lock_ledger(workspace.ledger_path, 0):
        fails = workspace.run_in_process("run", "job.yaml", "--json", api=api)
        skipped = workspace.run_in_process("run", "job.yaml", "--json", "--if-locked", "skip", api=api)
        waits = workspace.run_in_process("run", "job.yaml", "--json", "--if-locked", "wait=1s", api=api)

    assert_exit(fails, 11, "another run is using this ledger (process ", "--if-locked")
    assert skipped.exit_code == skipped.json_output["exit_code"] == 0
    assert_exit(waits, 11)
    assert old_output.read_text() == OLD_OUTPUT
    assert api.audit()["accepted"] == 0


@pytest.mark.long
def test_if_locked_wait(api: SandboxApi, workspace: Workspace) -> None:
    """`--if-locked wait` starts when the first run has ended."""
    workspace.write_leads(make_leads(1))
    lock_held, release = threading.Event(), threading.Event()

    def first() -> None:
        with lock_ledger(workspace.ledger_path, 0):
            lock_held.set()
            release.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    lock_held.wait(10)
    threading.Timer(0.5, release.set).start()

    result = workspace.run_in_process("run", "job.yaml", "--json", "--if-locked", "wait", api=api)

    thread.join()
    assert assert_exit(result, 0)["submitted"] == 1


# 12: credits


@pytest.mark.long
def test_cap_reached_is_exit_12(api: SandboxApi, workspace: Workspace) -> None:
    """Never exceeds `--max-credits`, running tasks included; a later run buys the pending rows."""
    workspace.write_leads(make_leads(20))

    result = workspace.run_in_process("run", "job.yaml", "--json", "--max-credits", "8", api=api)

    summary = assert_exit(result, 12, "cap", "max_credits")
    assert 0 < summary["submitted"] < 20
    assert summary["credits_spent"] == pytest.approx(api.audit()["credits_charged"])
    assert summary["credits_spent"] <= 8
    assert summary["pending"] == sum(row["enrich_status"] == "pending" for row in workspace.read_output()) > 0
    assert workspace.run_job(api).pending == 0
    assert api.audit()["paid_twice"] == 0


def test_zero_cap_sends_nothing(api: SandboxApi, workspace: Workspace) -> None:
    """`--max-credits 0` collects and writes, and sends nothing."""
    workspace.write_leads(make_leads(2))

    result = workspace.run_in_process("run", "job.yaml", "--json", "--max-credits", "0", api=api)

    assert_exit(result, 12)
    assert api.audit()["accepted"] == 0


def test_out_of_credits_is_exit_12(tmp_path: Path, workspace: Workspace) -> None:
    """406 from the API stops sending; after a top-up the next run resumes there."""
    workspace.write_leads(make_leads(12))
    with serve_api(tmp_path / "api.db", balance=6) as api:
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

        summary = assert_exit(result, 12, "406", "credits")
        assert 0 < summary["submitted"] < 12
        assert summary["pending"] == 12 - summary["submitted"]
        assert summary["in_doubt"] == 0
        assert len(workspace.read_output()) == 12
        api.top_up(1000)
        assert workspace.run_job(api).exit_code == 0
        audit = api.audit()
    assert (audit["accepted"], audit["paid_twice"]) == (12, 0)


# 13: time


@pytest.mark.long
def test_max_time_is_exit_13(tmp_path: Path, workspace: Workspace) -> None:
    """`--max-time` ends the run with the output written; the next run collects the open tasks."""
    workspace.write_leads(make_leads(5))
    state = tmp_path / "api.db"
    with serve_api(state, latency="fixed(30)") as api:
        started_at = time.monotonic()
        result = workspace.run_in_process("run", "job.yaml", "--json", "--max-time", "3s", api=api)
        assert time.monotonic() - started_at < 25
        api.advance(60)
        second = workspace.run_job(api)
        audit = api.audit()

    summary = assert_exit(result, 13, "--max-time")
    assert summary["pending"] == 5
    assert summary["submitted"] > 0
    assert (second.exit_code, second.submitted, second.pending) == (0, 5 - summary["submitted"], 0)
    assert (audit["accepted"], audit["paid_twice"]) == (5, 0)


@pytest.mark.long
def test_max_time_waits_for_posts_in_flight(tmp_path: Path, workspace: Workspace) -> None:
    """Waits for POSTs in flight when the time is over, as after a signal."""
    workspace.write_leads(make_leads(4))
    with serve_api(tmp_path / "api.db", faults=(Fault.parse("post:slow=1,seconds=4"),)) as api:
        summary = workspace.run_job(api, RunOptions(max_time_s=2.5))
    assert summary.submitted > 0
    assert summary.in_doubt == 0


@pytest.mark.long
def test_max_time_applies_to_earlier_tasks(tmp_path: Path, workspace: Workspace) -> None:
    """Collecting earlier tasks counts as well: a slow API does not extend the time."""
    workspace.write_leads(make_leads(20))
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        workspace.submit_without_collecting(api)
        workspace.write_job(limits="{requests_per_second: 1}")
        started_at = time.monotonic()
        summary = workspace.run_job(api, RunOptions(max_time_s=1.0))

    assert time.monotonic() - started_at < 15
    assert (summary.exit_code, summary.pending) == (13, 20)


@pytest.mark.long
def test_run_within_max_time_is_exit_0(api: SandboxApi, workspace: Workspace) -> None:
    """A run that finishes in time exits with 0."""
    workspace.write_leads(make_leads(5))

    result = workspace.run_in_process("run", "job.yaml", "--json", "--max-time", "1m", api=api)

    assert_exit(result, 0)


@pytest.mark.long
def test_task_timeout_is_exit_13(tmp_path: Path, workspace: Workspace) -> None:
    """A task that takes too long does not block the run: the rest is written, and the next run polls it first."""
    workspace.write_job(policy="{patience: 1s}")
    workspace.write_leads(make_leads(3))
    with serve_api(tmp_path / "api.db", latency="fixed(300)") as api:
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
        api.advance(400)
        second = workspace.run_job(api)

    summary = assert_exit(result, 13, "still running")
    assert summary["pending"] == 3
    assert (second.exit_code, second.pending, second.submitted) == (0, 0, 0)


# 14: in doubt


def test_in_doubt_is_exit_14(api: SandboxApi, workspace: Workspace) -> None:
    """The charge is unknown: the row has a note and no credits, and the summary names the user's options."""
    workspace.write_leads(make_leads(4))
    api.inject_fault("no-task-id")

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    second = workspace.run_job(api, timing=SHORT_TIMEOUTS)

    assert assert_exit(result, 14)["in_doubt"] == 1
    assert "--retry in_doubt" in result.stderr
    assert (second.exit_code, second.in_doubt, second.submitted) == (14, 1, 0)
    row = next(row for row in workspace.read_output() if row["enrich_status"] == "in_doubt")
    assert row["enrich_error"]
    assert row["enrich_credits"] == ""
    audit = api.audit()
    assert (audit["accepted"], audit["accepted_more_than_once"]) == (4, 0)


# 130 and 143: signals


def run_and_signal(
    workspace: Workspace, api: SandboxApi, number: signal.Signals, ready: Callable[[], bool]
) -> tuple[ProgramResult, float]:
    """Start the program, send a signal once it is `ready`; return how it ended and after how many seconds."""
    process = workspace.start_subprocess("run", "job.yaml", "--json", api=api)
    wait_until(ready)
    started_at = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=90)
    return ProgramResult(process.returncode, out, err), time.monotonic() - started_at


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)],
    ids=str,
)
def test_signal_stops_run_cleanly(
    tmp_path: Path, workspace: Workspace, old_output: Path, number: signal.Signals, code: int
) -> None:
    """Sends no new POST, records every answer in flight, keeps the old output; the next run resumes."""
    workspace.write_leads(make_leads(150))
    workspace.write_job(limits="{requests_per_second: 1000, in_flight: 60}")
    state = tmp_path / "api.db"
    with serve_api(state, latency="fixed(60)") as api:
        api.inject_fault("slow", 500, "post", seconds=1)

        result, seconds = run_and_signal(workspace, api, number, lambda: api.audit()["requests"].get("run", 0) >= 20)

        audit = api.audit()
        summary = assert_exit(result, code)
        assert seconds < 20
        assert old_output.read_text() == OLD_OUTPUT
        assert summary["submitted"] == audit["accepted"] < 150
        assert (summary["in_doubt"], summary["pending"]) == (0, 150)
        assert (audit["accepted_more_than_once"], summary["output"]) == (0, None)
        api.clear_faults()
        api.advance(100)
    with serve_api(state) as api:
        assert workspace.run_job(api).exit_code == 0
        audit = api.audit()
    assert (audit["accepted"], audit["accepted_more_than_once"]) == (150, 0)


@pytest.mark.long
def test_signal_with_silent_api(api: SandboxApi, workspace: Workspace) -> None:
    """Exits although POSTs are never answered; these are in doubt afterwards."""
    workspace.write_leads(make_leads(40))
    api.inject_fault("silence-after", 40)
    received: list[float] = []

    def interrupt() -> None:
        wait_until(lambda: api.audit()["faults"].get("silence-after", 0) >= 32)
        received.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    summary = workspace.run_job(api, timing=replace(SHORT_TIMEOUTS, post_s=60.0))
    seconds = time.monotonic() - received[0]
    thread.join()

    assert summary.exit_code == 143
    assert SHORT_TIMEOUTS.drain_posts_s < seconds < 30
    assert Timeouts().drain_posts_s + Timeouts().ready_results_s < 10
    assert (summary.in_doubt, summary.unconfirmed, summary.pending) == (32, 32, 8)
    assert api.audit()["accepted"] == 32


@pytest.mark.long
def test_signal_collects_ready_results(tmp_path: Path, workspace: Workspace) -> None:
    """Records results that are ready at the signal before the exit."""
    workspace.write_leads(make_leads(6))
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        result, _ = run_and_signal(workspace, api, signal.SIGINT, lambda: _posts_accepted(api, 6))

        summary = assert_exit(result, 130)
        assert summary["found"] + summary["not_found"] == 6
        assert summary["credits_spent"] == pytest.approx(api.audit()["credits_charged"])


def _posts_accepted(api: SandboxApi, accepted: int) -> bool:
    if api.audit()["accepted"] < accepted:
        return False
    api.advance(100)
    return True


@pytest.mark.long
def test_second_signal_exits_at_once(api: SandboxApi, workspace: Workspace, old_output: Path) -> None:
    """A second Ctrl-C exits immediately; the POST in flight is in doubt at the next start."""
    workspace.write_leads(make_leads(1))
    api.inject_fault("silence-after")
    process = workspace.start_subprocess("run", "job.yaml", api=api)
    wait_until(lambda: api.audit()["faults"].get("silence-after", 0) == 1)
    started_at = time.monotonic()

    while process.poll() is None:  # on a busy machine the second signal may come before the first is handled
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    process.communicate(timeout=90)

    assert process.returncode == 130
    assert time.monotonic() - started_at < Timeouts().drain_posts_s
    assert old_output.read_text() == OLD_OUTPUT
    summary = workspace.run_job(api)
    assert (summary.exit_code, summary.in_doubt, summary.submitted) == (14, 1, 0)


def test_signal_as_the_run_ends(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result stands. The handler from before the run may raise, so it is not called before the loop has ended."""
    workspace.write_leads(make_leads(1))
    open_and_run = pipeline._open_and_run

    async def signal_at_the_end(*given: Any) -> RunSummary:
        summary = await open_and_run(*given)
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
        return summary

    monkeypatch.setattr(pipeline, "_open_and_run", signal_at_the_end)
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        summary = workspace.run_job(api)
        assert (summary.exit_code, received) == (0, [])
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.long
def test_signal_before_first_post(api: SandboxApi, workspace: Workspace, old_output: Path) -> None:
    """Interrupted during the first requests for account and waterfall, exits immediately."""
    workspace.write_leads(make_leads(5))
    api.inject_fault("slow", 1, "me", seconds=20)

    result, seconds = run_and_signal(workspace, api, signal.SIGTERM, lambda: api.audit()["requests"].get("me", 0) == 1)

    assert_exit(result, 143)
    assert seconds < 15
    assert api.audit()["accepted"] == 0
    assert old_output.read_text() == OLD_OUTPUT


@pytest.mark.long
def test_signal_while_writing_output(api: SandboxApi, workspace: Workspace, old_output: Path) -> None:
    """Removes the partial output, keeps the old one, and exits quickly however long the file is."""
    workspace.write_leads(make_leads(10) * 3_000)
    part = workspace.part_path

    result, seconds = run_and_signal(workspace, api, signal.SIGTERM, part.exists)

    assert_exit(result, 143)
    assert seconds < 15
    assert not part.exists()
    assert old_output.read_text() == OLD_OUTPUT


@pytest.mark.long
def test_signal_during_retry_after(api: SandboxApi, workspace: Workspace) -> None:
    """A Retry-After of an hour does not delay the exit."""
    workspace.write_leads(make_leads(5))
    api.inject_fault("rate-limit", 100, "post", retry_after=3600)

    result, seconds = run_and_signal(workspace, api, signal.SIGTERM, lambda: api.audit()["requests"].get("429", 0) > 0)

    assert_exit(result, 143)
    assert seconds < 30
    assert api.audit()["accepted"] == 0


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_signal_while_waiting_for_lock(
    api: SandboxApi, workspace: Workspace, number: signal.Signals, code: int
) -> None:
    """Prints the JSON object on every exit, also before an execution exists."""
    workspace.write_leads(make_leads(1))
    with lock_ledger(workspace.ledger_path, 0):
        process = workspace.start_subprocess(
            "run", "job.yaml", "--json", "--if-locked", "wait", "--log-file", "log", api=api
        )
        wait_until((workspace.folder / "log").exists)
        time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=90)

    assert_exit(ProgramResult(process.returncode, out, err), code)


# Several at once


@pytest.mark.long
def test_exit_code_precedence(tmp_path: Path, workspace: Workspace) -> None:
    """Failed rows, unconfirmed requests and the cap together: the cap wins, then unconfirmed, then failed."""
    workspace.write_leads(make_leads(30))
    with serve_api(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0) as api:
        api.inject_fault("no-task-id")
        capped = workspace.run_in_process("run", "job.yaml", "--json", "--max-credits", "20", api=api)
        in_doubt = workspace.run_job(api)
        failed = workspace.run_job(api, RunOptions(retry=frozenset({State.IN_DOUBT, State.FAILED})))

    summary = assert_exit(capped, 12)
    assert summary["in_doubt"] == 1
    assert summary["failed"] > 0
    assert (in_doubt.exit_code, in_doubt.in_doubt) == (14, 1)
    assert (failed.exit_code, failed.in_doubt) == (10, 0)


@pytest.mark.long
def test_wrong_key_precedes_outage_and_cap(api: SandboxApi, workspace: Workspace) -> None:
    """401 beside unconfirmed requests: the wrong key wins, and the output is not written."""
    workspace.write_leads(make_leads(5))
    api.inject_fault("no-task-id", 2)
    api.inject_fault("unauthorized", 50, "get")

    summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)

    assert (summary.exit_code, summary.output) == (3, None)


@pytest.mark.long
def test_outage_precedes_in_doubt(api: SandboxApi, workspace: Workspace) -> None:
    """5xx to every POST: exit 4 with the unconfirmed requests counted."""
    workspace.write_leads(make_leads(5))
    api.inject_fault("error-after", 50)

    summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)

    assert summary.exit_code in (4, 14)
    assert summary.in_doubt == 5


# 1: a bug


def test_unexpected_error_is_exit_1(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error exits with 1 and prints the JSON object."""
    workspace.write_leads(make_leads(1))

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("enrich.run.startup.preflight", broken)

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert (result.exit_code, result.json_output["exit_code"]) == (1, 1)
    assert "ZeroDivisionError" in result.stderr
    assert "bug" in result.stderr
    assert api.api_key not in result.stderr


@in_turn(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "no more threads or processes can be started"),
        (OSError(errno.EMFILE, "Too many open files"), "too many open files"),
        (OSError(errno.ENFILE, "Too many open files in system"), "too many open files"),
    ],
)
def test_exhausted_system_is_no_bug(
    api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    """What the system has run out of, in one line, also in the log."""
    workspace.write_leads(make_leads(1))
    monkeypatch.setattr("enrich.run.startup.preflight", Mock(side_effect=error))

    result = workspace.run_in_process("run", "job.yaml", "--json", "--log-file", "run.log", api=api)

    assert (result.exit_code, result.json_output) == (1, {"exit_code": 1, "error": message})
    assert result.stderr.startswith(f"error: {message}\nhint: ")
    assert f'"error": "{message}"' in (workspace.folder / "run.log").read_text(encoding="utf-8")


def test_few_open_files_are_refused(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that could not open its connections and files is refused before anything is sent."""
    workspace.write_leads(make_leads(1))
    for limit, code in ((24, 5), (199, 5), (200, 0), (resource.RLIM_INFINITY, 0)):
        monkeypatch.setattr("resource.getrlimit", lambda _, limit=limit: (limit, limit))
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
        assert result.exit_code == code, result.stderr
        assert (f"too many open files: the limit is {limit}" in result.stderr) == (code == 5)
        assert api.audit()["accepted"] == (code == 0)


def _file_names(workspace: Workspace) -> list[Path]:
    return [path for path in workspace.folder.rglob("*") if path.is_file()]

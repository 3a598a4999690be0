"""`enrich status` and `enrich runs` show what the ledger has at any time, without changing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from enrich.commands.status import format_runs, format_status, read_runs, read_status
from enrich.errors import CommandRefused
from enrich.job.job import load_job
from enrich.ledger import queue, records, transitions
from enrich.ledger.database import Database
from enrich.ledger.lock import is_locked, lock_ledger
from enrich.models import Answer, State, iso_time
from tests.support.ledger import FREE_FAILURE, NO_MATCH, CommittingLedger
from tests.support.workspace import BOTH_BACKENDS, SandboxApi, Workspace, make_leads, serve_api

CREDIT = 1_000_000
DAY_MS = 86_400_000


def open_ledger(workspace: Workspace) -> CommittingLedger:
    """Open the ledger of the workspace's job, as a run does."""
    return CommittingLedger.open(load_job(workspace.job_file).ledger)


def test_job_without_runs(workspace: Workspace) -> None:
    """Shows zeros and "never run"; creates nothing on disk."""
    status = read_status(load_job(workspace.job_file))

    assert status["requests"] == status["pending"] == status["credits_spent"] == status["at_the_api"] == 0
    assert status["next_expiry"] is None
    assert status["executions"] == []
    assert not workspace.ledger_path.parent.exists()
    assert "never run" in next(format_status(status))


def test_json_begins_with_exit_code(workspace: Workspace) -> None:
    """The objects of `status` and `runs` begin with the exit code, as after an error."""
    for command in ("status", "runs"):
        printed = workspace.run_in_process(command, "job.yaml", "--json").json_output
        assert (next(iter(printed)), printed["exit_code"]) == ("exit_code", 0)


@BOTH_BACKENDS
def test_status_matches_ledger(workspace: Workspace) -> None:
    """Counts, credits and unknown prices match what happened, request by request."""
    ledger = open_ledger(workspace)
    ledger.now = 1_750_000_000_000
    ledger.start_and_enroll(*range(9))
    ledger.settle(ledger.submit(), Answer(State.FOUND, credits=CREDIT // 2))
    ledger.settle(ledger.submit(), Answer(State.FOUND))
    ledger.settle(ledger.submit(), NO_MATCH)
    ledger.settle(ledger.submit(), Answer(State.FAILED, credits=2 * CREDIT))
    ledger.settle(ledger.submit(), Answer(State.EXPIRED))
    ledger.settle(ledger.submit(), FREE_FAILURE)
    ledger.commit(transitions.mark_in_doubt, [(ledger.claim().attempt_id, "reset", ledger.now, None)])
    ledger.submit()
    ledger.now += 5_000
    ledger.submit()
    ledger.commit(records.end_execution, ledger.execution, 10, {"rows": 9}, ledger.now)
    ledger.wrapped.close()

    status = read_status(load_job(workspace.job_file))

    assert status["job"] == "job"
    assert status["requests"] == 9
    assert {name: status[name] for name in ("found", "not_found", "failed", "expired", "in_doubt", "pending")} == {
        "found": 2,
        "not_found": 1,
        "failed": 1,
        "expired": 1,
        "in_doubt": 1,
        "pending": 3,
    }
    assert (status["credits_spent"], status["credits_unknown"]) == (2.5, 2)
    assert status["at_the_api"] == 2
    assert status["next_expiry"] == iso_time(ledger.now - 5_000 + DAY_MS)
    assert status["last_expiry"] == iso_time(ledger.now + DAY_MS)
    (execution,) = status["executions"]
    assert (execution["exit_code"], execution["submitted"], execution["credits_spent"]) == (10, 8, 2.5)
    assert (execution["credits_unknown"], execution["receipt"]) == (2, {"rows": 9})
    shown = "\n".join(format_status(status))
    assert "2.50" in shown
    assert "2 results of unknown price" in shown
    assert status["next_expiry"] in shown


@BOTH_BACKENDS
def test_status_during_run(workspace: Workspace) -> None:
    """Shows committed data without waiting, and the execution as not ended."""
    ledger = open_ledger(workspace).start_and_enroll(1, 2)
    ledger.submit()
    with ledger.wrapped.transaction():
        queue.claim(ledger.wrapped, ledger.execution, 1, 1)
        status = read_status(load_job(workspace.job_file))
    ledger.wrapped.close()

    assert (status["requests"], status["pending"], status["at_the_api"]) == (2, 2, 1)
    (execution,) = status["executions"]
    assert execution["ended_at"] is execution["exit_code"] is execution["receipt"] is None
    assert "did not end" in "\n".join(format_status(status))


@BOTH_BACKENDS
def test_status_after_crash(workspace: Workspace) -> None:
    """Shows committed data after a crash; the unconfirmed request is decided by the next run."""
    ledger = open_ledger(workspace).start_and_enroll(1)
    ledger.claim()

    status = read_status(load_job(workspace.job_file))

    assert (status["pending"], status["in_doubt"]) == (1, 0)
    ledger.wrapped.close()


def test_last_executions_of_job(workspace: Workspace) -> None:
    """Lists at most ten executions, newest first, without those of other jobs in the ledger."""
    ledger = open_ledger(workspace)
    started = [ledger.start_execution() for _ in range(12)]
    ledger.commit(records.start_execution, "other", None, ledger.now)
    ledger.wrapped.close()

    status = read_status(load_job(workspace.job_file))

    assert [row["execution"] for row in status["executions"]] == started[:1:-1]


def test_status_matches_bill(api: SandboxApi, workspace: Workspace) -> None:
    """After a run, the credits equal the API's charges."""
    workspace.write_leads(make_leads(8))
    summary = workspace.run_job(api)

    status = read_status(load_job(workspace.job_file))

    assert status["credits_spent"] == pytest.approx(api.audit()["credits_charged"])
    assert (status["found"], status["not_found"]) == (summary.found, summary.not_found)
    assert status["executions"][0]["receipt"]["credits_spent"] == status["credits_spent"]


def test_not_a_ledger_is_refused(workspace: Workspace) -> None:
    """The message names the file."""
    workspace.ledger_path.parent.mkdir()
    workspace.ledger_path.write_text("First Name,Last Name\n" * 200, encoding="utf-8")

    with pytest.raises(CommandRefused, match=r"job\.db"):
        read_status(load_job(workspace.job_file))


def test_list_of_a_job_without_runs(workspace: Workspace) -> None:
    """Lists nothing and creates no ledger."""
    result = workspace.run_in_process("runs", "job.yaml")

    assert result.exit_code == 0
    assert result.stdout.startswith("job has never run")
    assert not workspace.ledger_path.parent.exists()


@BOTH_BACKENDS
def test_executions_are_listed_newest_first(tmp_path: Path, workspace: Workspace) -> None:
    """Lists time, exit code in words, rows, match rate, credits and balance of each execution."""
    workspace.write_leads(make_leads(20))
    with serve_api(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0) as api:
        summaries = [workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output for _ in range(2)]

    output = workspace.run_in_process("runs", "job.yaml", "--json").json_output

    assert [run["execution"] for run in output["executions"]] == [2, 1]
    newest, first = output["executions"]
    assert (newest["exit_code"], newest["outcome"]) == (0, "ok")
    assert (first["exit_code"], first["outcome"]) == (10, "some failed")
    for run, summary in zip((first, newest), summaries, strict=True):
        for name in ("rows", "submitted", "found", "credits_spent", "credits_unknown", "balance_after"):
            assert run[name] == summary[name]
        assert run["found_share"] == pytest.approx(summary["found"] / 20)
    assert output["totals"]["executions"] == 2
    assert output["totals"]["credits_spent"] == pytest.approx(summaries[0]["credits_spent"])

    shown = workspace.run_in_process("runs", "job.yaml").stdout.splitlines()
    assert len(shown) == 4
    assert "10 some failed" in shown[2]
    assert f"{summaries[0]['balance_after']:,.2f}" in shown[2]
    assert shown[3].startswith("All 2 runs: ")


def test_last_option(workspace: Workspace) -> None:
    """`--last N` limits the list; executions of other jobs in the same ledger are excluded."""
    ledger = open_ledger(workspace)
    for number in range(4):
        ledger.start_and_enroll(number)
        ledger.settle(ledger.submit())
        ledger.commit(records.end_execution, ledger.execution, 0, {"rows": 1, "found": 1}, ledger.now + 3_723_000)
    ledger.commit(records.start_execution, "other", None, ledger.now)
    ledger.wrapped.close()

    output = workspace.run_in_process("runs", "job.yaml", "--last", "2", "--json").json_output
    assert workspace.run_in_process("runs", "job.yaml", "--last", str(2**63)).exit_code == 0

    assert [run["execution"] for run in output["executions"]] == [4, 3]
    assert (output["totals"]["executions"], output["totals"]["submitted"]) == (4, 4)
    assert "1 h 02 min" in workspace.run_in_process("runs", "job.yaml").stdout


@BOTH_BACKENDS
def test_killed_or_running_execution(workspace: Workspace) -> None:
    """The execution that holds the lock is running; others without an end were killed."""
    ledger = open_ledger(workspace)
    ledger.start_execution()
    ledger.start_execution()
    ledger.wrapped.close()

    with lock_ledger(workspace.ledger_location, 0):
        while_running = workspace.run_in_process("runs", "job.yaml", "--json").json_output["executions"]
    killed = workspace.run_in_process("runs", "job.yaml", "--json").json_output["executions"]

    assert [run["outcome"] for run in while_running] == ["running", "killed"]
    assert [run["outcome"] for run in killed] == ["killed", "killed"]
    assert killed[0]["exit_code"] is killed[0]["ended_at"] is killed[0]["found_share"] is None
    assert "killed" in workspace.run_in_process("runs", "job.yaml").stdout


@BOTH_BACKENDS
def test_inspection_takes_no_lock(workspace: Workspace) -> None:
    """Takes no lock, so that a run can start at the same time."""
    assert is_locked(workspace.ledger_location) is False
    with lock_ledger(workspace.ledger_location, 0):
        assert is_locked(workspace.ledger_location) is True
    assert is_locked(workspace.ledger_location) is False


def test_line_width(workspace: Workspace) -> None:
    """Prints at most 80 columns, aligned with the header. For large numbers it leaves out time, then balance."""
    ledger = open_ledger(workspace).start_and_enroll(1)
    ledger.settle(ledger.submit(), NO_MATCH)

    def end_with(rows: int, balance: int) -> list[str]:
        summary = {"rows": rows, "found": rows}
        ended_ms = ledger.now + 3_600_000
        ledger.commit(records.end_execution, ledger.execution, 13, summary, ended_ms, balance)
        return list(format_runs(read_runs(load_job(workspace.job_file), 5)))

    shown = [end_with(*numbers)[:2] for numbers in ((263, 10**9), (1_234_567, 10**12), (10**15, 10**15))]
    ledger.wrapped.close()

    left_out = [{"time", "balance"} - set(header.split()) for header, _ in shown]
    assert left_out == [set(), {"time"}, {"time", "balance"}]
    assert all(len(header) == len(run) <= 80 for header, run in shown)
    assert shown[0][1].endswith(" 263    1  100%    0.00 1,000.00")
    assert "1,234,567" in shown[1][1]
    assert not any("?" in header for header, _ in shown)


def test_unknown_prices_have_a_column(workspace: Workspace) -> None:
    """The column `?` is there only with a result of unknown price; the last line explains it."""
    ledger = open_ledger(workspace).start_and_enroll(1)
    ledger.settle(ledger.submit(), Answer(State.FOUND, credits=None))
    ledger.wrapped.close()

    header, run, last = format_runs(read_runs(load_job(workspace.job_file), 5))

    assert "?" in header.split()
    assert "1" in run.split()
    assert last.endswith("1 result of unknown price (?)")


@BOTH_BACKENDS
def test_runs_during_run(api: SandboxApi, workspace: Workspace) -> None:
    """Works during a run without waiting."""
    workspace.write_leads(make_leads(1))
    workspace.run_in_process("run", "job.yaml", api=api)
    ledger = Database(workspace.ledger_location)
    with ledger.transaction():
        records.start_execution(ledger, "job", None, 1)
        output = workspace.run_in_process("runs", "job.yaml", "--json").json_output
    ledger.close()

    assert [run["execution"] for run in output["executions"]] == [1]

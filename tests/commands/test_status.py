"""`enrich status`: shows the ledger's contents at any time without changing it."""

from __future__ import annotations

import pytest

from enrich.commands.status import format_status, read_status
from enrich.errors import CommandRefused
from enrich.job.job import load_job
from enrich.ledger import queue, records, transitions
from enrich.models import Answer, State, iso_time
from tests.support.ledger import FREE_FAILURE, NO_MATCH, CommittingLedger
from tests.support.workspace import BOTH_BACKENDS, SandboxApi, Workspace, make_leads

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

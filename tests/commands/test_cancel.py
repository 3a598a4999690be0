"""`enrich cancel`: open tasks are cancelled and refunded, finished ones are collected, bulk tasks are listed."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest

from enrich.ledger.lock import lock_ledger
from enrich.ledger.verify import check_ledger
from enrich.monitoring.prometheus import read_metrics
from enrich.run.context import RunOptions
from tests.support.cases import first_quick, in_turn
from tests.support.raw_server import RawServer, ReceivedRequest, Reply, http_reply, serve_replies
from tests.support.workspace import (
    BOTH_BACKENDS,
    JOB,
    SandboxApi,
    Workspace,
    make_leads,
    serve_api,
)


@pytest.fixture
def slow_api(tmp_path: Path) -> Iterator[SandboxApi]:
    """Serve an API whose tasks run for a minute."""
    with serve_api(tmp_path / "slow.db", latency="fixed(60)", hit_rate=1.0) as api:
        yield api


@BOTH_BACKENDS
def test_open_tasks_are_cancelled_and_refunded(slow_api: SandboxApi, workspace: Workspace) -> None:
    """All open tasks are refunded; their leads are failed, not bought again by the next run, only by --retry."""
    workspace.write_leads(make_leads(8))
    workspace.submit_without_collecting(slow_api)

    summary = workspace.run_in_process("cancel", "job.yaml", "--json", api=slow_api).json_output

    audit = slow_api.audit()
    assert (summary["exit_code"], summary["cancelled"], summary["finished"], summary["still_open"]) == (0, 8, 0, 0)
    assert summary["credits_refunded"] == pytest.approx(8 * 3.51)
    assert summary["balance_after"] - summary["balance_before"] == pytest.approx(summary["credits_refunded"])
    assert (audit["refunded"], audit["charged"], audit["balance"]) == (8, 0, 10_000)
    status = workspace.run_in_process("status", "job.yaml", api=slow_api).stdout
    assert "; -" not in status  # a refund is no negative spending
    again = workspace.run_job(slow_api)
    assert (again.submitted, again.failed, again.exit_code) == (0, 8, 0)
    assert {row["enrich_error"] for row in workspace.read_output()} == {"cancelled by you"}
    assert {row["enrich_credits"] for row in workspace.read_output()} == {"0"}
    assert workspace.run_in_process("cancel", "job.yaml", "--json", api=slow_api).json_output["cancelled"] == 0
    retried = workspace.run_in_process("plan", "job.yaml", "--retry", "failed", "--json", api=slow_api).json_output
    assert retried["to_submit"] == 8


@BOTH_BACKENDS
def test_cancel_is_listed_as_what_it_is(slow_api: SandboxApi, workspace: Workspace) -> None:
    """The list of runs, the status and the report name a cancellation, and it is no success of the job."""
    workspace.write_job(metrics="job.prom")
    workspace.write_leads(make_leads(2))
    workspace.submit_without_collecting(slow_api)
    assert workspace.run_in_process("cancel", "job.yaml", api=slow_api).exit_code == 0

    listed = workspace.run_in_process("runs", "job.yaml", "--json").json_output["executions"]
    assert [run["outcome"] for run in listed] == ["cancellation", "out of time"]
    assert " 0 cancellation " in workspace.run_in_process("runs", "job.yaml").stdout
    assert "run 2 ended at" in (shown := workspace.run_in_process("status", "job.yaml").stdout)
    assert "with exit 0 (cancellation)" in shown
    reported = workspace.run_in_process("report", "job.yaml", "--json").json_output["nights"]
    assert [run["outcome"] for run in reported] == ["out of time", "cancellation"]
    assert workspace.run_in_process("run", "job.yaml").exit_code == 3  # without a key
    (first_end,) = workspace.sql("SELECT ended_ms FROM executions WHERE id = 1")[0]
    metrics = read_metrics(workspace.folder / "job.prom")
    assert metrics["enrich_last_success_timestamp_seconds", ""] == pytest.approx(first_end / 1000)


def test_finished_tasks_are_polled(slow_api: SandboxApi, workspace: Workspace) -> None:
    """A task that has finished meanwhile (409) keeps its answer, and its price."""
    workspace.write_leads(make_leads(6))
    workspace.submit_without_collecting(slow_api)
    slow_api.advance(40)
    workspace.write_leads(make_leads(9))
    workspace.submit_without_collecting(slow_api, 3)
    slow_api.advance(30)

    summary = workspace.run_in_process("cancel", "job.yaml", "--json", api=slow_api).json_output

    assert (summary["cancelled"], summary["finished"], summary["still_open"]) == (3, 6, 0)
    audit = slow_api.audit()
    assert summary["credits_spent"] == pytest.approx(audit["credits_charged"])
    next_run = workspace.run_job(slow_api, RunOptions(limit=0))
    assert (next_run.found, next_run.failed, next_run.submitted) == (6, 3, 0)
    paid = sum(float(row["enrich_credits"]) for row in workspace.read_output())
    assert paid == pytest.approx(audit["credits_charged"])
    assert (audit["refunded"], audit["paid_twice"]) == (3, 0)


def test_failure_that_is_sent_again_is_no_result(tmp_path: Path, workspace: Workspace) -> None:
    """Of a task that had failed at no charge, the summary counts no result, as that of a run: the next run sends it."""
    workspace.write_leads(make_leads(3))
    with serve_api(tmp_path / "api.db", latency="fixed(60)", failure_rate=1.0, free_failures=1.0) as api:
        workspace.submit_without_collecting(api)
        api.advance(60)
        assert workspace.run_in_process("cancel", "job.yaml", "--json", api=api).json_output["finished"] == 3
        last, _ = workspace.run_in_process("status", "job.yaml", "--json").json_output["executions"]
        plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    assert (last["receipt"]["answers"], plan["to_submit"]) == (0, 3)


@BOTH_BACKENDS
def test_text_names_the_refund_and_the_next_step(slow_api: SandboxApi, workspace: Workspace) -> None:
    """The text has the refund, and the command that sends the leads again, with the options that name the ledger."""
    workspace.write_leads(make_leads(2))
    workspace.submit_without_collecting(slow_api)
    ledger = workspace.server_url or str(workspace.ledger_path)
    summary = workspace.run_in_process("cancel", "job.yaml", "--ledger", ledger, api=slow_api)
    assert summary.exit_code == 0
    assert summary.stdout.splitlines()[0] == "job: 2 tasks cancelled: 7.02 credits refunded"
    _, _, command = summary.stdout.partition("again: ")
    assert shlex.split(command) == ["enrich", "run", "job.yaml", "--ledger", ledger, "--retry", "failed"]
    nothing = workspace.run_in_process("cancel", "job.yaml", api=slow_api)
    assert nothing.stdout.splitlines() == ["job: 0 tasks cancelled"]


def test_bulk_tasks_are_listed(slow_api: SandboxApi, workspace: Workspace) -> None:
    """A bulk task is named with its requests, and stays open."""
    workspace.write_job(JOB + "dispatch: {bulk: 10}\n")
    workspace.write_leads(make_leads(12))
    workspace.submit_without_collecting(slow_api)

    summary = workspace.run_in_process("cancel", "job.yaml", "--json", api=slow_api).json_output

    assert sorted(task["requests"] for task in summary["bulk"]) == [2, 10]
    assert (summary["cancelled"], slow_api.audit()["refunded"]) == (0, 0)
    shown = workspace.run_in_process("cancel", "job.yaml", api=slow_api).stdout
    assert all(f"not cancelled: bulk task {task['task_id']}" in shown for task in summary["bulk"])
    slow_api.advance(90)
    assert workspace.run_job(slow_api).found == 12


def test_needs_the_lock(slow_api: SandboxApi, workspace: Workspace) -> None:
    """While a run holds the ledger nothing is cancelled (exit 11)."""
    workspace.write_leads(make_leads(2))
    workspace.submit_without_collecting(slow_api)
    with lock_ledger(workspace.ledger_location, 0):
        result = workspace.run_in_process("cancel", "job.yaml", "--json", api=slow_api)
    assert (result.exit_code, result.json_output["exit_code"]) == (11, 11)
    assert slow_api.audit()["refunded"] == 0


@pytest.mark.parametrize(
    "fault", first_quick(1, ["error-after", "error-before", "rate-limit-bare", "reset-after", "broken-json"])
)
def test_repeats_after_faults(
    slow_api: SandboxApi, workspace: Workspace, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel that fails is repeated; whatever happened to it, the books agree with the API's."""
    monkeypatch.setattr("enrich.run.preflight.MAX_PAUSE_S", 0.02)
    workspace.write_leads(make_leads(3))
    workspace.submit_without_collecting(slow_api)
    slow_api.inject_fault(fault, 4, "all")
    summary = workspace.run_in_process("cancel", "job.yaml", "--json", api=slow_api).json_output
    assert (summary["exit_code"], summary["cancelled"], slow_api.audit()["refunded"]) == (0, 3, 3)
    assert workspace.run_job(slow_api).failed == 3


def test_refused_key(slow_api: SandboxApi, workspace: Workspace) -> None:
    """A wrong key is exit 3, and changes nothing."""
    workspace.write_leads(make_leads(2))
    workspace.submit_without_collecting(slow_api)
    wrong = workspace.run_in_process("cancel", "job.yaml", api=slow_api, DATABAR_API_KEY="wrong")
    assert (wrong.exit_code, workspace.open_task_count()) == (3, 2)


def test_unknown_task_stays_open(slow_api: SandboxApi, workspace: Workspace) -> None:
    """A task that the API does not know is left to the next run."""
    workspace.write_leads(make_leads(2))
    slow_api.inject_fault("lost-task", 1, "post")
    workspace.submit_without_collecting(slow_api)
    summary = workspace.run_in_process("cancel", "job.yaml", "--json", api=slow_api).json_output
    assert (summary["exit_code"], summary["cancelled"], summary["still_open"]) == (0, 1, 1)
    assert workspace.open_task_count() == 1


def test_finished_and_then_unknown_task_stays_open(slow_api: SandboxApi, workspace: Workspace) -> None:
    """A task that has finished (409), and that the API then does not know, is left to the next run, too."""
    workspace.write_leads(make_leads(2))
    workspace.submit_without_collecting(slow_api)
    with serve_cancellations(workspace, lambda _: http_reply(409, {}), poll_status=404) as (_, api):
        summary = workspace.run_in_process("cancel", "job.yaml", "--json", api=api).json_output
    assert (summary["exit_code"], summary["cancelled"], summary["still_open"]) == (0, 0, 2)
    assert workspace.open_task_count() == 2


def test_failure_with_a_price_is_finished(slow_api: SandboxApi, workspace: Workspace) -> None:
    """A task that had failed, and was charged, is not running any more."""
    workspace.write_leads(make_leads(2))
    workspace.submit_without_collecting(slow_api)
    failed = {"status": "failed", "error": "no provider", "data": None, "credits_spent": 2}
    with serve_cancellations(workspace, lambda task: http_reply(200, failed | {"task_id": task})) as (_, api):
        summary = workspace.run_in_process("cancel", "job.yaml", "--json", api=api).json_output
    assert (summary["finished"], summary["still_open"], summary["credits_spent"]) == (2, 0, 4)
    assert workspace.open_task_count() == 0


def cancel_at_api(api: SandboxApi, task_id: str) -> None:
    """Cancel a task as another client would."""
    with httpx.Client(verify=False, trust_env=False) as http:  # noqa: S501 - loopback
        answer = http.post(f"{api.base_url}/tasks/{task_id}/cancel", headers={"x-apikey": api.api_key})
    assert answer.status_code == 200


@pytest.mark.long
def test_cancelled_elsewhere_is_not_sent_again(slow_api: SandboxApi, workspace: Workspace) -> None:
    """A task that was cancelled at the API by another client is failed, and not bought again without --retry."""
    workspace.write_leads(make_leads(2))
    workspace.submit_without_collecting(slow_api)
    for (task_id,) in workspace.sql("SELECT DISTINCT task_id FROM attempts"):
        cancel_at_api(slow_api, task_id)
    summary = workspace.run_job(slow_api)
    assert (summary.submitted, summary.failed, summary.pending) == (0, 2, 0)


def test_other_jobs_and_hosts_are_left_alone(slow_api: SandboxApi, workspace: Workspace) -> None:
    """The open tasks of another job in the ledger stay; a ledger of another host is refused."""
    workspace.write_leads(make_leads(2))
    workspace.submit_without_collecting(slow_api)
    other = workspace.folder / "other.yaml"
    other.write_text(JOB + f"ledger: {workspace.ledger_path}\n", encoding="utf-8")
    assert workspace.run_in_process("cancel", "other.yaml", "--json", api=slow_api).json_output["cancelled"] == 0
    workspace.sql("UPDATE facts SET value = 'api.elsewhere.example' WHERE name = 'api_host'")
    assert workspace.run_in_process("cancel", "job.yaml", api=slow_api).exit_code == 2
    workspace.sql("DELETE FROM facts WHERE name = 'api_host'")
    workspace.sql("UPDATE facts SET value = 'theirs' WHERE name = 'workspace'")
    assert workspace.run_in_process("cancel", "job.yaml", api=slow_api).exit_code == 2
    assert slow_api.audit()["refunded"] == 0


@pytest.mark.long
def test_commands_after_a_cancel(slow_api: SandboxApi, workspace: Workspace) -> None:
    """The ledger is sound, and status, runs, report, explain and reconcile show the cancel."""
    workspace.write_leads(make_leads(3))
    workspace.submit_without_collecting(slow_api)
    workspace.run_in_process("cancel", "job.yaml", api=slow_api)
    assert check_ledger(workspace.ledger_path).problems == []
    status = workspace.run_in_process("status", "job.yaml", "--json").json_output
    assert status["failed"] == 3
    assert workspace.run_in_process("runs", "job.yaml").exit_code == 0
    assert "cancelled by you" in workspace.run_in_process("explain", "job.yaml", "--row", "1").stdout
    assert workspace.run_in_process("reconcile", "job.yaml", api=slow_api).exit_code == 0
    assert workspace.run_in_process("report", "job.yaml", "--json").json_output["statuses"]["failed"] == 3


@contextmanager
def serve_cancellations(
    workspace: Workspace, reply: Callable[[str], Reply], *, poll_status: int = 200
) -> Iterator[tuple[RawServer, SandboxApi]]:
    """Serve an API with running tasks, whose cancellations are answered by `reply`, given the task id."""

    def answer(request: ReceivedRequest) -> Reply:
        path = request.line.split()[1].split("/")
        if "tasks" not in path:
            return http_reply(200, {"balance": 10})
        task_id = path[path.index("tasks") + 1]
        return (
            reply(task_id)
            if request.line.startswith("POST")
            else http_reply(poll_status, {"task_id": task_id, "status": "processing"})
        )

    workspace.sql("DELETE FROM facts")  # the ledger is bound to the sandbox
    with serve_replies(answer) as server:
        yield server, SandboxApi(server.base_url, "some-key")


@pytest.mark.parametrize(
    ("charged", "unknown"), first_quick(2, [({"credits_spent": None}, 2), ({"credits_spent": 5_000}, 0), ({}, 2)])
)
def test_unknown_and_high_price(
    slow_api: SandboxApi, workspace: Workspace, charged: dict[str, float | None], unknown: int
) -> None:
    """What a cancelled task has cost may be unknown, which is not 0, or more than was reserved: nothing is refunded."""
    workspace.write_leads(make_leads(4))
    workspace.submit_without_collecting(slow_api)
    seen = count()

    def cancel_two(task_id: str) -> Reply:
        if next(seen) % 4 >= 2:
            return http_reply(404, {})
        return http_reply(200, {"task_id": task_id, "status": "cancelled", **charged})

    with serve_cancellations(workspace, cancel_two) as (_, api):
        summary = workspace.run_in_process("cancel", "job.yaml", "--json", api=api).json_output
        assert (summary["cancelled"], summary["credits_refunded"], summary["credits_unknown"]) == (2, 0, unknown)
        assert summary["credits_spent"] == (0 if unknown else 10_000)
        shown = workspace.run_in_process("cancel", "job.yaml", api=api).stdout.splitlines()
    at_least = "at least " if unknown else ""
    assert shown[0] == f"job: 2 tasks cancelled: {at_least}0.00 credits refunded"
    assert ("  2 results of unknown price" in shown) is bool(unknown)
    (cancelled,) = (run for run in workspace.run_in_process("runs", "job.yaml", "--json").json_output["executions"][:1])
    assert cancelled["credits_unknown"] == unknown


@pytest.fixture
def open_tasks(slow_api: SandboxApi, workspace: Workspace) -> Workspace:
    """Make a ledger with two open tasks."""
    workspace.write_leads(make_leads(2))
    workspace.submit_without_collecting(slow_api)
    return workspace


@in_turn(
    ("status", "body", "exit_code", "reason"),
    [
        (405, {"detail": "x"}, 4, "HTTP 405: x"),
        (400, {"detail": "x"}, 4, "the API rejects the request: HTTP 400: x"),
        (400, {"detail": {"company": ["x"]}}, 4, "the API rejects the request: HTTP 400: "),
        (307, None, 4, "HTTP 307: the API redirects the request"),
        (403, b"<html>", 4, "HTTP 403: Forbidden, with a page instead of the API's JSON"),
        (406, {"detail": "x"}, 12, "the API is out of credits: HTTP 406: x"),
        (200, b"<html>", 4, "the API's response cannot be read"),
        (204, None, 4, "the API's response cannot be read"),
        (200, {"task_id": "another", "status": "cancelled"}, 4, "the response is for another task"),
    ],
)
def test_refused_cancellations(open_tasks: Workspace, status: int, body: object, exit_code: int, reason: str) -> None:
    """A refusal is reported as it is and not repeated, and the other tasks are tried, too; the tasks stay open."""
    with (
        serve_cancellations(open_tasks, lambda _: http_reply(status, body)) as (server, api),
        patch("enrich.commands.cancel.CONCURRENT_TASKS", 1),
    ):
        result = open_tasks.run_in_process("cancel", "job.yaml", "--json", api=api)
    summary = result.json_output
    assert (result.exit_code, summary["exit_code"], summary["still_open"]) == (exit_code, exit_code, 2)
    assert summary["error"].startswith(f"tasks were not cancelled: {reason}")
    assert len([seen for seen in server.requests if seen.line.startswith("POST")]) == 2
    assert open_tasks.open_task_count() == 2


def test_needs_a_ledger(slow_api: SandboxApi, workspace: Workspace) -> None:
    """A job that has never run has nothing to cancel (exit 5)."""
    workspace.write_leads(make_leads(1))
    assert workspace.run_in_process("cancel", "job.yaml", api=slow_api).exit_code == 5

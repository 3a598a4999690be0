"""Healthcheck pings and notifications: what is sent when, without breaking a run or exposing personal data."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from enrich import exit_codes
from enrich.errors import install_hint
from enrich.exit_codes import ExitCode
from enrich.ledger.lock import lock_ledger
from enrich.monitoring import notifications
from tests.support.raw_server import http_reply, serve_replies
from tests.support.request_recorder import (
    RequestRecorder,
    assert_no_personal_data,
    log_events,
    log_lines,
    record_requests,
    searchable_leads,
)
from tests.support.workspace import SandboxApi, Workspace, serve_api, wait_until

LOG_OPTIONS = ("--log-file", "run.log")


@pytest.fixture
def recorder() -> Iterator[RequestRecorder]:
    """Return a server that records pings and notifications."""
    with record_requests() as received:
        yield received


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry at once."""
    monkeypatch.setattr(notifications, "RETRY_PAUSE_S", 0.0)


@pytest.fixture
def pinging_workspace(workspace: Workspace, recorder: RequestRecorder) -> Workspace:
    """Return a workspace whose job has a healthcheck."""
    workspace.write_job(healthcheck=recorder.url)
    workspace.write_leads(searchable_leads(3))
    return workspace


# The healthcheck


def test_start_and_success_pings(api: SandboxApi, pinging_workspace: Workspace, recorder: RequestRecorder) -> None:
    """Start and success pings carry one run id; the second has the result in one line and no personal data."""
    result = pinging_workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)

    assert (result.exit_code, result.stderr) == (0, "")
    assert recorder.paths == ["/secret-path/start", "/secret-path"]
    assert recorder.requests[0].query == recorder.requests[1].query
    assert len(recorder.requests[0].query["rid"][0]) == 36
    body = recorder.requests[1].body
    assert body.startswith("job: exit 0 (ok); ✓ ")
    assert "\n" not in body
    assert_no_personal_data(body, pinging_workspace)
    assert "secret-path" not in (pinging_workspace.folder / "run.log").read_text()


def test_failure_pings(api: SandboxApi, pinging_workspace: Workspace, recorder: RequestRecorder) -> None:
    """Unconfirmed requests and a missing key send failure pings; with a missing key there was no start ping."""
    api.inject_fault("no-task-id")
    assert pinging_workspace.run_in_process("run", "job.yaml", api=api).exit_code == 14
    assert recorder.paths == ["/secret-path/start", "/secret-path/fail"]

    assert pinging_workspace.run_in_process("run", "job.yaml").exit_code == 3
    assert recorder.paths[2:] == ["/secret-path/fail"]
    assert recorder.requests[2].body == "job: exit 3 (key rejected)"


@pytest.mark.long
def test_failed_rows_and_timeout_ping_success(
    tmp_path: Path, pinging_workspace: Workspace, recorder: RequestRecorder
) -> None:
    """Exit 10 pings success with its counts, and so does exit 13, because the next run continues."""
    pinging_workspace.write_leads(searchable_leads(12))
    with serve_api(tmp_path / "f.db", failure_rate=0.5, free_failures=0.0) as api:
        assert pinging_workspace.run_in_process("run", "job.yaml", api=api).exit_code == 10
    with serve_api(tmp_path / "s.db", latency="fixed(3600)") as api:
        code = pinging_workspace.run_in_process(
            "run", "job.yaml", "--retry", "failed", "--max-time", "1s", api=api
        ).exit_code

    assert code == 13
    assert recorder.paths == ["/secret-path/start", "/secret-path"] * 2


def test_locked_out_run_sends_no_ping(api: SandboxApi, pinging_workspace: Workspace, recorder: RequestRecorder) -> None:
    """A locked-out run sends no ping: the other run reports, and a skipped run is no failure."""
    with lock_ledger(pinging_workspace.ledger_path, 0):
        assert pinging_workspace.run_in_process("run", "job.yaml", api=api).exit_code == 11
        assert pinging_workspace.run_in_process("run", "job.yaml", "--if-locked", "skip", api=api).exit_code == 0

    assert recorder.requests == []


def test_sandbox_sends_no_ping(pinging_workspace: Workspace, recorder: RequestRecorder) -> None:
    """A sandbox run sends no ping, so it changes no dashboard."""
    assert pinging_workspace.run_in_process("run", "job.yaml", "--sandbox", "--limit", "0").exit_code == 0

    assert recorder.requests == []


@pytest.mark.long
def test_interrupted_run_sends_start_only(
    tmp_path: Path, pinging_workspace: Workspace, recorder: RequestRecorder
) -> None:
    """An interrupted run sends only its start ping, because it must exit quickly; the check notices the missing end."""
    with serve_api(tmp_path / "slow.db", latency="fixed(3600)") as api:
        process = pinging_workspace.start_subprocess("run", "job.yaml", api=api)
        wait_until(lambda: api.audit()["accepted"] == 3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=90)

    assert process.returncode == 143
    assert recorder.paths == ["/secret-path/start"]


def test_ping_is_retried(api: SandboxApi, pinging_workspace: Workspace, recorder: RequestRecorder) -> None:
    """A ping is retried after a 5xx, without a note when it succeeds at last."""
    recorder.statuses += [500, 503]

    result = pinging_workspace.run_in_process("run", "job.yaml", api=api)

    assert (result.exit_code, result.stderr) == (0, "")
    assert recorder.paths == ["/secret-path/start"] * 3 + ["/secret-path"]


def test_invalid_ping_url_is_not_retried(
    api: SandboxApi, pinging_workspace: Workspace, recorder: RequestRecorder
) -> None:
    """An invalid ping URL is not retried and gives one note a run with the host alone."""
    recorder.statuses += [404, 404]

    result = pinging_workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)

    assert result.exit_code == 0
    assert result.stderr == "note: the healthcheck at 127.0.0.1 could not be pinged: HTTP 404\n"
    assert len(recorder.requests) == 2
    assert log_events(pinging_workspace) == ["start", "end", "note"]
    assert "secret" not in (pinging_workspace.folder / "run.log").read_text()


@pytest.mark.long
@pytest.mark.parametrize("way", ["down", "hanging", "nowhere"])
def test_unresponsive_server_does_not_block_run(
    api: SandboxApi, pinging_workspace: Workspace, recorder: RequestRecorder, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """An unresponsive server does not block the run; one note reports the lost ping without secrets."""
    monkeypatch.setattr(notifications, "REQUEST_TIMEOUT_S", 0.1)
    monkeypatch.setattr(notifications, "END_TIMEOUT_S", 1.0)
    if way == "hanging":
        recorder.release.clear()
    else:
        address = {"down": "127.0.0.1:9", "nowhere": "no-such-host.invalid"}[way]
        pinging_workspace.write_job(healthcheck=f"http://{address}/secret-path")

    result = pinging_workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)

    assert result.exit_code == 0
    assert len(pinging_workspace.read_output()) == 3
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("note: the healthcheck at ")
    assert "secret" not in result.stderr + (pinging_workspace.folder / "run.log").read_text()


@pytest.mark.long
@pytest.mark.parametrize("value", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "http://["])
def test_loopback_ping_ignores_proxy(
    api: SandboxApi, pinging_workspace: Workspace, recorder: RequestRecorder, value: str
) -> None:
    """A ping to loopback ignores all proxy variables."""
    result = pinging_workspace.run_in_process(
        "run", "job.yaml", api=api, http_proxy=value, HTTP_PROXY=value, ALL_PROXY=value
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(recorder.requests) == 2


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_ping_uses_proxy(api: SandboxApi, pinging_workspace: Workspace, scheme: str) -> None:
    """A ping uses the proxy; an unusable proxy is a note with its name and without its password."""
    pinging_workspace.write_job(healthcheck=f"{scheme}://hc.example/secret-path")
    with serve_replies(http_reply(502)) as proxy:
        result = pinging_workspace.run_in_process(
            "run", "job.yaml", api=api, all_proxy=f"ada:secret@127.0.0.1:{proxy.port}"
        )
        line = "POST http://hc.example/secret-path" if scheme == "http" else "CONNECT hc.example:443"
        assert proxy.requests
        assert all(seen.line.startswith(line) for seen in proxy.requests)
    assert result.exit_code == 0
    assert "note: the healthcheck at hc.example" in result.stderr
    result = pinging_workspace.run_in_process("run", "job.yaml", api=api, ALL_PROXY="socks5://ada:secret@127.0.0.1:9")
    assert result.exit_code == 0
    assert "could not be pinged: ALL_PROXY: " in result.stderr
    assert "secret" not in result.stderr


def test_invalid_url_is_exit_2(api: SandboxApi, pinging_workspace: Workspace) -> None:
    """An invalid URL is exit 2 with the line of the job file."""
    pinging_workspace.write_job(healthcheck="https://1.2.3.999/secret-path")

    result = pinging_workspace.run_in_process("run", "job.yaml", api=api)

    assert result.exit_code == 2
    assert "job.yaml:12: healthcheck: must be a web address" in result.stderr
    assert "secret" not in result.stderr


# Notifications


@pytest.fixture
def notifying_workspace(workspace: Workspace, recorder: RequestRecorder) -> Workspace:
    """Return a workspace whose job sends notifications."""
    workspace.write_job(notify="people.txt")
    workspace.write_leads(searchable_leads(3))
    addresses = workspace.folder / "people.txt"
    addresses.write_text(f"# on call\n\njson://127.0.0.1:{recorder.port}/secret-path\n")
    addresses.chmod(0o600)
    return workspace


@pytest.mark.long
def test_notification_for_unconfirmed_requests(
    api: SandboxApi, notifying_workspace: Workspace, recorder: RequestRecorder
) -> None:
    """The title names the problem; the text has the run summary and the exact commands, and no personal data."""
    api.inject_fault("no-task-id")

    where = ("--ledger", "my ledger.db", "--output", "out.csv")
    result = notifying_workspace.run_in_process("run", "job.yaml", *where, *LOG_OPTIONS, api=api)

    assert result.exit_code == 14
    (received,) = recorder.requests
    notification = json.loads(received.body)
    assert notification["title"] == "enrich job: unconfirmed (exit 14)"
    assert "\n  1 unconfirmed\n" in notification["message"]
    commands = [shlex.split(line) for line in notification["message"].splitlines() if line.startswith("  enrich ")]
    job = [str(notifying_workspace.job_file), "--ledger", str(notifying_workspace.folder / "my ledger.db")]
    output = ["--output", str(notifying_workspace.folder / "out.csv")]
    assert commands == [
        ["enrich", "reconcile", *job],
        ["enrich", "run", *job, *output, "--retry", "in_doubt"],
        ["enrich", "run", *job, *output, "--accept", "in_doubt"],
    ]
    assert [notifying_workspace.run_in_process(*command[1:], api=api).exit_code for command in commands] == [0, 0, 0]
    assert_no_personal_data(notification["message"], notifying_workspace)
    assert "secret" not in result.stderr + (notifying_workspace.folder / "run.log").read_text()


def test_notification_for_missing_key(notifying_workspace: Workspace, recorder: RequestRecorder) -> None:
    """An error before the execution starts is notified, too."""
    assert notifying_workspace.run_in_process("run", "job.yaml").exit_code == 3

    output = json.loads(recorder.requests[0].body)
    assert output["title"] == "enrich job: key rejected (exit 3)"
    assert "DATABAR_API_KEY" in output["message"]
    assert f"enrich run {notifying_workspace.job_file}" in output["message"]


@pytest.mark.long
def test_no_notification_on_success(api: SandboxApi, notifying_workspace: Workspace, recorder: RequestRecorder) -> None:
    """A successful run sends no notification, and neither does the sandbox."""
    assert notifying_workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    with lock_ledger(notifying_workspace.ledger_path, 0):
        assert notifying_workspace.run_in_process("run", "job.yaml", api=api).exit_code == 11
    assert notifying_workspace.run_in_process("run", "job.yaml", "--sandbox", "--max-credits", "0").exit_code == 12

    assert recorder.requests == []


@pytest.mark.long
def test_missing_notify_extra(api: SandboxApi, notifying_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the notify extra, one note at the start reports it; the run is unaffected."""
    monkeypatch.setattr(notifications, "find_spec", lambda _: None)
    api.inject_fault("no-task-id")

    result = notifying_workspace.run_in_process("run", "job.yaml", "--quiet", api=api)

    assert result.exit_code == 14
    assert [line for line in result.stderr.splitlines() if line.startswith("note:")] == [
        f"note: notifications are not installed: {install_hint('notify')}"
    ]


@pytest.mark.long
def test_notifications_file_permissions(api: SandboxApi, notifying_workspace: Workspace) -> None:
    """The notifications file must be private, because its addresses are secrets."""
    (notifying_workspace.folder / "people.txt").chmod(0o644)

    result = notifying_workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)

    assert result.exit_code == 0
    assert "people.txt: other users can read the addresses: chmod 600" in result.stderr
    assert log_lines(notifying_workspace)[1]["event"] == "note"


@pytest.mark.long
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "notifications cannot be sent: No such file"),
        ("# nobody\n", "no address for notifications"),
        ("secret-nonsense\n", "no Apprise URL in line 1"),
        (b"\xff", "notifications cannot be sent: it is not UTF-8 text"),
    ],
)
def test_empty_notifications_file(
    api: SandboxApi, notifying_workspace: Workspace, content: str | bytes | None, words: str
) -> None:
    """An empty notifications file is reported at every run, not only when a notification is due."""
    path = notifying_workspace.folder / "people.txt"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    result = notifying_workspace.run_in_process("run", "job.yaml", api=api)

    assert result.exit_code == 0
    assert f"note: {path}: {words}" in result.stderr


def test_failure_of_apprise_does_not_stop_run(
    api: SandboxApi, notifying_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apprise, or one of its plugins, may be broken: a note says so, without the address."""
    monkeypatch.setattr(notifications, "_apprise_client", int)

    result = notifying_workspace.run_in_process("run", "job.yaml", api=api)

    assert result.exit_code == 0
    path = notifying_workspace.folder / "people.txt"
    assert f"note: {path}: notifications cannot be sent: ValueError in Apprise\n" in result.stderr


def test_invalid_lines_are_numbered(notifying_workspace: Workspace, recorder: RequestRecorder) -> None:
    """Invalid lines are reported by number without the address; valid ones are still notified."""
    path = notifying_workspace.folder / "people.txt"
    path.write_text(f"secret-nonsense\n{path.read_text()}json://127.0.0.1:9/secret\n")

    result = notifying_workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS)

    assert result.exit_code == 3
    assert len(recorder.requests) == 1
    assert f"note: {path}: no Apprise URL in line 1\n" in result.stderr
    assert f"note: {path}: some notifications failed: not delivered to line 5\n" in result.stderr
    assert "secret" not in result.stderr + (notifying_workspace.folder / "run.log").read_text()


def test_unresponsive_service_does_not_block_run(
    notifying_workspace: Workspace, recorder: RequestRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unresponsive service does not block the run's end; a note reports it."""
    monkeypatch.setattr(notifications, "SEND_TIMEOUT_S", 0.2)
    recorder.release.clear()

    result = notifying_workspace.run_in_process("run", "job.yaml")

    assert result.exit_code == 3
    assert "people.txt: some notifications failed: it took too long" in result.stderr


# The table of exit codes


def test_exit_codes_have_text_and_advice() -> None:
    """Each exit code that notifies has a command that helps, and each is either a success or a failure."""
    for code in ExitCode:
        assert bool(
            exit_codes.required_actions(code, {}, exit_codes.JobArguments("job.yaml", "job.yaml"))
        ) is exit_codes.requires_action(code)
    assert [code for code in ExitCode if exit_codes.requires_action(code)] == [1, 2, 3, 4, 5, 12, 14, 15]

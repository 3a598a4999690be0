"""`enrich doctor`: predicts problems of the next run, checked in cron's environment."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from enrich.ledger import transitions
from enrich.ledger.database import Database
from enrich.ledger.lock import lock_ledger
from tests.support.object_storage import BUCKET, put_object
from tests.support.workspace import SHORT_STARTUP_TIMEOUT, ProgramResult, SandboxApi, Workspace, make_leads, serve_api


@pytest.fixture
def ready_workspace(workspace: Workspace, api: SandboxApi) -> Workspace:
    """Make a job whose next runs will succeed."""
    workspace.write_leads(make_leads(3))
    workspace.write_job(limits="{max_credits: 50}")
    key = workspace.folder / "key"
    key.write_text(api.api_key, encoding="utf-8")
    key.chmod(0o600)
    return workspace


def run_doctor(
    workspace: Workspace, api: SandboxApi, *more: str, shell_environ: dict[str, str] | None = None
) -> ProgramResult:
    """Run the doctor with the crontab's variables; `shell_environ` is set in the shell only."""
    env = {"HOME": str(workspace.folder), "DATABAR_BASE_URL": api.base_url}
    env["DATABAR_API_KEY_FILE"] = str(workspace.folder / "key")
    given = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
    return workspace.run_in_process("doctor", "job.yaml", *given, *more, api=None, **(shell_environ or {}))


def findings_with_mark(result: ProgramResult, mark: str) -> dict[str, str]:
    """Return the findings with this mark: subject to message, with the remedy that is on the next line."""
    text = re.sub(r"\n +→ ", " → ", result.stdout)
    lines = [line.split(maxsplit=2) for line in text.splitlines()[:-1]]
    return {subject: message for found, subject, message in lines if found == mark}


@pytest.mark.long
def test_healthy_job(ready_workspace: Workspace, api: SandboxApi) -> None:
    """All findings are ok; nothing is written or charged."""
    before = {path: path.stat().st_mtime_ns for path in ready_workspace.folder.rglob("*")}
    result = run_doctor(ready_workspace, api)

    assert (result.exit_code, result.stderr) == (0, "")
    *lines, last = result.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {"ok"}
    assert last == "No problems found"
    assert {"key", "api", "clock", "job", "ledger", "disk", "balance", "program"} <= findings_with_mark(
        result, "ok"
    ).keys()
    assert {path: path.stat().st_mtime_ns for path in ready_workspace.folder.rglob("*")} == before
    assert api.audit()["accepted"] == 0


@pytest.mark.long
def test_objects_with_the_credentials_of_cron(
    ready_workspace: Workspace, api: SandboxApi, bucket: dict[str, str]
) -> None:
    """Looks for the input and the output's bucket, with the variables of the crontab and not of the shell."""
    put_object("leads.csv", (ready_workspace.folder / "leads.csv").read_bytes())
    ready_workspace.write_job(input=f"s3://{BUCKET}/leads.csv", output=f"s3://{BUCKET}/out/", rejects="s3://none/r.csv")
    given = [word for name, value in bucket.items() for word in ("--env", f"{name}={value}")]

    result = run_doctor(ready_workspace, api, *given)
    assert (result.exit_code, "no bucket `none`" in findings_with_mark(result, "fail")["storage"]) == (5, True)
    ready_workspace.write_job(rejects=f"s3://{BUCKET}/rejects.csv", input=f"s3://{BUCKET}/gone.csv")
    result = run_doctor(ready_workspace, api, *given)
    assert f"s3://{BUCKET}/gone.csv does not exist" in findings_with_mark(result, "fail")["storage"]
    ready_workspace.write_job(input=f"s3://{BUCKET}/leads.csv", output=f"s3://{BUCKET}/out/")
    assert "storage" in findings_with_mark(run_doctor(ready_workspace, api, *given), "ok")
    offline = [*given, "--env", "AWS_ENDPOINT_URL=http://127.0.0.1:9"]
    refused = run_doctor(ready_workspace, api, *offline, shell_environ=bucket)
    assert "cannot be reached" in findings_with_mark(refused, "fail")["storage"]
    assert "pass each with --env NAME" in findings_with_mark(refused, "fail")["storage"]


def test_healthy_job_after_runs(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Reads the ledger and leaves it unchanged."""
    assert ready_workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    before = ready_workspace.ledger_path.read_bytes()
    result = run_doctor(ready_workspace, api)
    assert result.exit_code == 0
    assert "3 requests in" in findings_with_mark(result, "ok")["ledger"]
    assert ready_workspace.ledger_path.read_bytes() == before
    assert api.audit()["accepted"] == 3


def test_key_only_in_shell_environment(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Reports a key that is set in the shell only: the job works by hand and fails from cron."""
    result = ready_workspace.run_in_process(
        "doctor", "job.yaml", "--env", f"HOME={ready_workspace.folder}", "--offline", api=api
    )
    assert result.exit_code == 3
    assert "DATABAR_API_KEY is set in this shell only, not in cron" in findings_with_mark(result, "fail")["key"]
    assert "DATABAR_BASE_URL is set in this shell only" in findings_with_mark(result, "warn")["api"]
    assert api.api_key not in result.stdout


def test_environment_file(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Reads an environment file like systemd's EnvironmentFile."""
    text = (
        f"# cron\nDATABAR_BASE_URL={api.base_url}\nDATABAR_API_KEY_FILE='{ready_workspace.folder}/key'\nHOME=/nowhere\n"
    )
    (ready_workspace.folder / "env").write_text(text, encoding="utf-8")
    assert ready_workspace.run_in_process("doctor", "job.yaml", "--env-file", "env").exit_code == 0
    for line in ("nonsense", "NAME=a\0b"):
        (ready_workspace.folder / "env").write_text(line, encoding="utf-8")
        refused = ready_workspace.run_in_process("doctor", "job.yaml", "--env-file", "env")
        assert (refused.exit_code, refused.stderr) == (2, "error: env: line 1: must be NAME=VALUE\n")
    endless = ready_workspace.run_in_process("doctor", "job.yaml", "--env-file", "/dev/zero")
    assert (endless.exit_code, "more than 1,048,576 bytes" in endless.stderr) == (2, True)
    assert ready_workspace.run_in_process("doctor", "job.yaml", "--env", "nonsense").exit_code == 2


@pytest.mark.long
@pytest.mark.parametrize(("name", "value"), [("ALL_PROXY", "socks5://p.example"), ("SSL_CERT_FILE", "/nowhere")])
def test_invalid_proxy_for_cron(ready_workspace: Workspace, api: SandboxApi, name: str, value: str) -> None:
    """Exits with 2 for an invalid proxy, as the run would; reports a proxy set in the shell only without failing."""
    way = ["--env", "DATABAR_BASE_URL=https://api.example/v1", "--env", f"{name}={value}", "--offline"]
    result = run_doctor(ready_workspace, api, *way)
    assert result.exit_code == 2
    assert findings_with_mark(result, "fail")["api"].startswith(f"{name}: ")
    result = run_doctor(ready_workspace, api, shell_environ={name: value})
    assert result.exit_code == 0
    assert f"{name} is set in this shell only" in findings_with_mark(result, "warn")["api"]


def test_missing_key(ready_workspace: Workspace) -> None:
    """Exits with 3 without a key, as the run would."""
    given = ("--env", f"HOME={ready_workspace.folder}", "--env", "ENRICH_LEDGER=other.db")
    result = ready_workspace.run_in_process("doctor", "job.yaml", *given)
    assert result.exit_code == 3
    finding = findings_with_mark(result, "fail")["key"]
    assert "no API key" in finding
    assert "`enrich cron job.yaml --at 02:00`" in finding  # it has no --ledger


def test_invalid_key(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Exits with 3 for an invalid key; with `--offline` the key is not checked."""
    (ready_workspace.folder / "key").write_text("old", encoding="utf-8")
    assert run_doctor(ready_workspace, api).exit_code == 3
    assert run_doctor(ready_workspace, api, "--offline").exit_code == 0


@pytest.mark.long
def test_key_file_readable_by_others(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Warns about a key file that others can read, and names the fix."""
    (ready_workspace.folder / "key").chmod(0o644)
    result = run_doctor(ready_workspace, api)
    assert result.exit_code == 0
    assert findings_with_mark(result, "warn")["key"].endswith(f"chmod 600 {ready_workspace.folder}/key")


@pytest.mark.long
def test_unreachable_api(ready_workspace: Workspace) -> None:
    """Exits with 4 when the API is unreachable."""
    unreachable_api = SandboxApi("http://127.0.0.1:9/v1", "key")
    with patch("enrich.run.run_state.Timeouts", lambda: SHORT_STARTUP_TIMEOUT):
        result = run_doctor(ready_workspace, unreachable_api)
    assert result.exit_code == 4
    assert "unreachable" in findings_with_mark(result, "fail")["api"]


def test_invalid_job(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Exits with 2 for an invalid job and still checks the key."""
    ready_workspace.write_job(watrfall="x")
    result = run_doctor(ready_workspace, api)
    assert result.exit_code == 2
    assert "watrfall" in findings_with_mark(result, "fail")["job"]
    assert "key" in findings_with_mark(result, "ok")


@pytest.mark.long
def test_cap_with_verifier(ready_workspace: Workspace, api: SandboxApi) -> None:
    """A job with a cap and a verifier has a price, so its cap can be enforced."""
    ready_workspace.write_job(email_verifier="10", limits="{max_credits: 500}")

    result = run_doctor(ready_workspace, api)

    assert (result.exit_code, findings_with_mark(result, "ok")["cap"]) == (0, "limits.max_credits is 500.00")


def test_missing_job_and_key(workspace: Workspace) -> None:
    """Without a job file a run ends with 2, before it needs the key. Both are reported."""
    result = workspace.run_in_process("doctor", "other.yaml", "--offline")
    assert list(findings_with_mark(result, "fail")) == ["job", "key"]
    assert result.exit_code == workspace.run_in_process("run", "other.yaml").exit_code == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("changed", "message", "code"),
    [
        ({"input": "none.csv"}, "does not exist", 5),
        ({"params": "{first_name: Frist Name}"}, "requires `last_name`", 2),
        ({"waterfall": "moon_getter"}, "no waterfall `moon_getter`", 2),
        ({"output": "leads.csv"}, "the same file", 2),
        ({"limits": "{min_balance: 1000000000}"}, "limits.min_balance", 5),
        ({"limits": "{max_credits: 0.5}"}, "nothing would be sent", 12),
    ],
)
def test_predicts_exit_code_of_run(
    ready_workspace: Workspace, api: SandboxApi, changed: dict[str, str], message: str, code: int
) -> None:
    """Reports each problem with the exit code that the run would have."""
    ready_workspace.write_job(**changed)
    result = run_doctor(ready_workspace, api)
    assert result.exit_code == code
    assert any(message in line for line in result.stdout.splitlines() if line.startswith("fail")), result.stderr


@pytest.mark.long
def test_old_input_and_missing_cap(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Warnings leave exit 0."""
    ready_workspace.write_job()
    three_days_ago = time.time() - 3 * 86_400
    os.utime(ready_workspace.folder / "leads.csv", (three_days_ago, three_days_ago))
    result = run_doctor(ready_workspace, api)
    assert result.exit_code == 0
    assert "check that the export still runs" in findings_with_mark(result, "warn")["input"]
    assert "max_credits is not set" in findings_with_mark(result, "warn")["cap"]


@pytest.mark.long
def test_run_in_progress(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Reports a run that holds the lock and does not disturb it."""
    ready_workspace.run_in_process("run", "job.yaml", api=api)
    with lock_ledger(ready_workspace.ledger_path, 0):
        result = run_doctor(ready_workspace, api)
    assert result.exit_code == 0
    assert "a run is in progress" in findings_with_mark(result, "warn")["lock"]


@pytest.mark.long
def test_unconfirmed_and_expiring_results(ready_workspace: Workspace, tmp_path: Path) -> None:
    """Reports unconfirmed requests that need a decision and results that will expire at the API."""
    with serve_api(tmp_path / "slow.db", latency="fixed(600)") as slow:
        (ready_workspace.folder / "key").write_text(slow.api_key, encoding="utf-8")
        ready_workspace.submit_without_collecting(slow)
        ledger = Database(ready_workspace.ledger_path)
        with ledger.transaction():
            transitions.mark_in_doubt(ledger, [(transitions.submitted_tasks(ledger)[0].attempts[0], "reset", 1, None)])
        ledger.close()
        result = run_doctor(ready_workspace, slow, "--at", "23:59")
        ready_workspace.write_job(limits="{max_credits: 50}", policy="{result_ttl: 1s}")
        result_after_expiry = run_doctor(ready_workspace, slow)
    assert "1 request may have been charged" in findings_with_mark(result, "warn")["unconfirmed"]
    lines = [line.strip() for line in result.stdout.splitlines()]
    for command in ("reconcile job.yaml", "run job.yaml --retry in_doubt", "run job.yaml --accept in_doubt"):
        assert f"enrich {command}" in lines
    assert "2 paid requests running at Databar" in result.stdout
    assert "2 expire before the next run" in findings_with_mark(result_after_expiry, "warn")["results"]


@pytest.mark.long
def test_last_run_stopped_by_cap(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Reports that the cap stopped the last run and left rows pending."""
    ready_workspace.write_leads(make_leads(20))
    ready_workspace.write_job(limits="{max_credits: 5}")
    assert ready_workspace.run_in_process("run", "job.yaml", api=api).exit_code == 12
    result = run_doctor(ready_workspace, api)
    assert result.exit_code == 0
    assert "1 of the last 1 run stopped for credits" in findings_with_mark(result, "warn")["cap"]


@pytest.mark.long
def test_ledger_on_network_file_system(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Reports a ledger on a network file system, whose locks are unreliable."""
    mounts = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {os.path.realpath(ready_workspace.folder)} rw - nfs4 nas:/x rw\n"
    with patch("enrich.commands.doctor_checks.read_mountinfo", lambda: mounts):
        result = run_doctor(ready_workspace, api)
    assert result.exit_code == 0
    assert "network file system (nfs4)" in findings_with_mark(result, "warn")["ledger"]


@pytest.mark.long
def test_clock_offset(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Reports the offset of the local clock from the API's."""
    an_hour_ago = time.time_ns() - 3_600 * 10**9
    with patch("enrich.databar.clock.time.time_ns", lambda: an_hour_ago):
        result = run_doctor(ready_workspace, api)
    assert result.exit_code == 0
    assert "behind the API's" in findings_with_mark(result, "warn")["clock"]


@pytest.mark.long
def test_non_utf8_locale_paths(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Reports non-ASCII paths only where the locale rules out UTF-8."""
    ready_workspace.write_job(output="Ausgänge.csv", limits="{max_credits: 50}")
    assert run_doctor(ready_workspace, api).exit_code == 0
    old = ("--env", "PYTHONUTF8=0", "--env", "PYTHONCOERCECLOCALE=0", "--env", "LC_ALL=C")
    result = run_doctor(ready_workspace, api, *old)
    assert result.exit_code == 5
    assert "in ascii" in findings_with_mark(result, "fail")["names"]


@pytest.mark.long
def test_json_is_one_object(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Prints one JSON object with marks, messages and fixes."""
    output = run_doctor(ready_workspace, api, "--json").json_output
    assert output["exit_code"] == 0
    assert output["findings"][0] == {
        "mark": "ok",
        "subject": "key",
        "message": "available to cron",
        "remedy": None,
    }


@pytest.mark.long
def test_balance_of_the_sandbox(ready_workspace: Workspace) -> None:
    """Shows the balance of the job's own sandbox, which `status` and `plan` show."""
    plan = ready_workspace.run_in_process("plan", "job.yaml", "--sandbox", "--json").json_output
    ready_workspace.run_in_process("run", "job.yaml", "--sandbox")
    result = ready_workspace.run_in_process("doctor", "job.yaml", "--sandbox")
    after = ready_workspace.run_in_process("plan", "job.yaml", "--sandbox", "--json").json_output
    assert after["balance"] < plan["balance"]
    assert f"{after['balance']:,.2f}" in result.stdout


@pytest.mark.long
def test_the_sandbox_needs_no_key(ready_workspace: Workspace) -> None:
    """Runs against the sandbox without a key and leaves nothing behind."""
    before = sorted(ready_workspace.folder.rglob("*"))
    result = ready_workspace.run_in_process("doctor", "job.yaml", "--sandbox")
    assert (result.exit_code, sorted(ready_workspace.folder.rglob("*"))) == (0, before)


@pytest.mark.long
def test_shell_environment_is_restored(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Restores the shell's environment after using cron's."""
    with patch.dict(os.environ, {"MINE": "1"}):
        before = dict(os.environ)
        run_doctor(ready_workspace, api)
        assert dict(os.environ) == before


@pytest.mark.long
def test_as_subprocess_with_empty_environment(ready_workspace: Workspace, api: SandboxApi) -> None:
    """Runs as a subprocess with an empty environment, as under cron."""
    result = ready_workspace.run_subprocess(
        "doctor", "job.yaml", "--env", f"HOME={ready_workspace.folder}", "--offline", api=api
    )
    assert result.exit_code == 3
    assert "set in this shell only, not in cron" in result.stdout

"""The ledger is removed, replaced, locked or out of space during a run: paid results reach the next run."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from enrich.errors import LedgerFailed
from enrich.ledger.verify import check_ledger
from tests.support.cases import first_quick
from tests.support.raw_server import Reply, http_reply, serve_replies
from tests.support.scripted_api import ScriptedApi, completed_reply, request_states, run_once, running_reply
from tests.support.workspace import (
    ProgramResult,
    SandboxApi,
    Workspace,
    kill_process,
    make_leads,
    serve_api,
    wait_until,
)

RUN = ("run", "job.yaml", "--json")
LEADS = 60


@pytest.fixture
def slow_api(tmp_path: Path) -> Iterator[SandboxApi]:
    """Serve an API whose tasks take a second."""
    with serve_api(tmp_path / "api.db", latency="fixed(1)") as api:
        yield api


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """Make a job whose run takes some seconds."""
    workspace.write_leads(make_leads(LEADS))
    workspace.write_job(limits="{requests_per_second: 25}")
    return workspace


def wait_for_end(process: subprocess.Popen[str]) -> ProgramResult:
    """Wait for the end of a run."""
    out, err = process.communicate(timeout=60)
    return ProgramResult(process.returncode, out, err)


def resume(workspace: Workspace, api: SandboxApi, *options: str) -> ProgramResult:
    """Run the job again, without its low rate: nothing happens to the ledger now."""
    workspace.write_job()
    result = workspace.run_subprocess(*RUN, *options, api=api)
    assert result.exit_code == 0, result.stderr
    assert not rescue_files(workspace)
    assert_nothing_lost(workspace, api)
    return result


def rescue_files(workspace: Workspace) -> list[Path]:
    """Return the rescue files."""
    return sorted(workspace.folder.rglob("*.rescue*"))


def rescue_lines(*files: Path) -> list[dict[str, Any]]:
    """Read rescue files; the last line about an attempt counts."""
    result = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            paid = json.loads(line)
            result[file, paid["attempt"]] = paid
    return list(result.values())


def assert_nothing_lost(workspace: Workspace, api: SandboxApi, *, in_doubt: int = 0) -> None:
    """Assert that every charged task is in the output, each lead was sent once, and the ledger is sound."""
    audit = api.audit()
    assert (audit["paid_twice"], audit["accepted_more_than_once"], audit["accepted"]) == (0, 0, LEADS)
    rows = workspace.read_output()
    assert [row["First Name"] for row in rows] == [f"First{number}" for number in range(LEADS)]
    assert sum(row["enrich_status"] == "in_doubt" for row in rows) == in_doubt
    assert not {"pending", "failed", "expired"} & {row["enrich_status"] for row in rows}
    tasks = {row["First Name"]: row["enrich_task_id"] for row in rows}
    for run in audit["runs"]:
        assert tasks[run["params"]["first_name"]] in (*run["task_ids"], "")
    assert workspace.run_in_process("ledger", "check", "job.yaml").stdout.startswith("ok")


def remove_database(workspace: Workspace) -> None:
    """Remove the database file only."""
    workspace.ledger_path.unlink()


def remove_wal(workspace: Workspace) -> None:
    """Remove what was written since the last checkpoint."""
    workspace.ledger_path.with_name("job.db-wal").unlink()


def remove_shm(workspace: Workspace) -> None:
    """Remove the shared-memory file that coordinates connections to the journal."""
    workspace.ledger_path.with_name("job.db-shm").unlink()


def remove_folder(workspace: Workspace) -> None:
    """Remove the ledger with its folder."""
    shutil.rmtree(workspace.ledger_path.parent)


def move_folder(workspace: Workspace) -> None:
    """Rename the ledger's folder."""
    workspace.ledger_path.parent.rename(workspace.folder / "elsewhere")


def replace_with_old_copy(workspace: Workspace) -> None:
    """Put an older copy in the ledger's place."""
    shutil.copy(workspace.ledger_path, workspace.folder / "old.db")
    (workspace.folder / "old.db").replace(workspace.ledger_path)
    for end in ("-wal", "-shm"):
        workspace.ledger_path.with_name(f"job.db{end}").unlink()


@pytest.mark.long
@pytest.mark.parametrize(
    "lose_ledger", [remove_database, remove_folder, move_folder, remove_wal, remove_shm, replace_with_old_copy]
)
def test_lost_ledger_stops_run(
    slow_api: SandboxApi, workspace: Workspace, lose_ledger: Callable[[Workspace], None]
) -> None:
    """Exits with 1 and stops sending; the next run imports the rescue file and pays for nothing again."""
    slow_api.inject_fault("slow", 200, "post", seconds=0.3)
    process = workspace.start_subprocess(*RUN, api=slow_api)
    wait_until(lambda: slow_api.audit()["accepted"] >= 20)

    lose_ledger(workspace)
    result = wait_for_end(process)

    assert result.exit_code == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "removed or replaced" in result.stderr
    assert "hint: put the ledger back" in result.stderr
    assert result.json_output["exit_code"] == 1
    accepted = slow_api.audit()["accepted"]
    assert accepted < LEADS
    assert not (workspace.folder / "out.csv").exists()
    (file,) = rescue_files(workspace)
    assert file.name in result.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    known = rescue_lines(file)
    assert {line["task_id"] for line in known if line.get("task_id")} == {
        task for run in slow_api.audit()["runs"] for task in run["task_ids"]
    }
    slow_api.clear_faults()

    second = resume(workspace, slow_api, "--new-ledger")

    assert any(file.name in note for note in second.json_output["notes"])


@pytest.mark.long
def test_restored_ledger_imports_rescue_file(slow_api: SandboxApi, workspace: Workspace) -> None:
    """Importing attempts that the ledger has already changes nothing."""
    process = workspace.start_subprocess(*RUN, api=slow_api)
    wait_until(lambda: slow_api.audit()["accepted"] >= 20)
    move_folder(workspace)
    assert wait_for_end(process).exit_code == 1
    (workspace.folder / "elsewhere").rename(workspace.ledger_path.parent)

    resume(workspace, slow_api)


@pytest.mark.long
@pytest.mark.parametrize("another", [False, True])
def test_removed_lock_file_stops_run(slow_api: SandboxApi, workspace: Workspace, *, another: bool) -> None:
    """Stops without an assertion error; a run that starts meanwhile pays for nothing twice."""
    slow_api.inject_fault("slow", 200, "post", seconds=0.3)
    process = workspace.start_subprocess(*RUN, api=slow_api)
    wait_until(lambda: slow_api.audit()["accepted"] >= 20)

    workspace.ledger_path.with_name("job.db.lock").unlink()
    second = workspace.start_subprocess(*RUN, api=slow_api) if another else None
    result = wait_for_end(process)

    assert result.exit_code == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "job.db.lock: the lock file was removed or replaced" in result.stderr
    if second is not None:
        assert wait_for_end(second).exit_code in (0, 11, 14)  # 11: the first run was still alive
    slow_api.clear_faults()
    resume(workspace, slow_api)


@pytest.mark.long
def test_foreign_lock_is_awaited(slow_api: SandboxApi, workspace: Workspace) -> None:
    """Sends nothing while another program locks the ledger, reports it, and resumes when it is released."""
    process = workspace.start_subprocess(*RUN, api=slow_api)
    wait_until(lambda: slow_api.audit()["accepted"] >= 20)
    with closing(sqlite3.connect(workspace.ledger_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        wait_until(lambda: len({slow_api.audit()["accepted"] for _ in range(30)}) == 1)
        before = slow_api.audit()["accepted"]
        assert process.poll() is None
        other.execute("ROLLBACK")
    result = wait_for_end(process)

    assert result.exit_code == 0, result.stderr
    assert before < LEADS
    assert_nothing_lost(workspace, slow_api)


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGTERM, None])
def test_foreign_lock_with_signal_or_max_time(
    slow_api: SandboxApi, workspace: Workspace, end: signal.Signals | None
) -> None:
    """A signal and --max-time wait some seconds; the task ids go into the rescue file."""
    slow_api.inject_fault("slow", 200, "post", seconds=0.5)
    more = () if end else ("--max-time", "10s")
    process = workspace.start_subprocess(*RUN, *more, api=slow_api)
    wait_until(lambda: slow_api.audit()["accepted"] >= 10)
    with closing(sqlite3.connect(workspace.ledger_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        if end:
            process.send_signal(end)
        result = wait_for_end(process)
        other.execute("ROLLBACK")

    assert result.exit_code == 1, result.stderr
    assert "another program has locked it" in result.stderr
    assert "Traceback" not in result.stderr
    slow_api.clear_faults()
    resume(workspace, slow_api)


@pytest.mark.long
def test_disk_full_keeps_task_ids(api: SandboxApi, workspace: Workspace) -> None:
    """The reserved space holds the task ids of all POSTs in flight."""
    workspace.write_job()
    result = workspace.run_subprocess(*RUN, api=api, max_file_bytes=150_000)

    assert result.exit_code == 1, result.stderr
    assert "the ledger cannot be written" in result.stderr
    assert "free some space" in result.stderr
    resume(workspace, api)


@pytest.mark.long
def test_successful_run_leaves_no_rescue_file(api: SandboxApi, workspace: Workspace) -> None:
    """Leaves no reserved space and no rescue file, also after a kill and another run."""
    process = workspace.start_subprocess(*RUN, api=api)
    wait_until(lambda: api.audit()["accepted"] >= 5)
    kill_process(process)
    assert workspace.run_subprocess(*RUN, api=api).exit_code in (0, 14)

    assert {path.name for path in workspace.ledger_path.parent.iterdir()} == {"job.db", "job.db.lock"}


#: A response to a POST that comes after the ledger is lost; then the states after the next run, and what it sends.
LATE_POST_REPLIES: dict[str, tuple[Callable[[str], Reply], str, list[str]]] = {
    "a task id": (ScriptedApi.post, "found", []),
    "an error": (lambda _: http_reply(500, {"detail": "sorry"}), "in_doubt", []),
    "an error with a task id": (lambda name: http_reply(500, {"task_id": f"t-{name}"}), "found", []),
    "a refusal of the params": (
        lambda _: http_reply(422, {"detail": [{"loc": ["body", "params", "last_name"], "msg": "too short"}]}),
        "failed",
        [],
    ),
    "a rate limit": (lambda _: http_reply(429, {}), "found", ["First0"]),
}


@pytest.mark.parametrize("response", first_quick(1, LATE_POST_REPLIES))
def test_response_to_a_post_after_the_ledger_is_lost(workspace: Workspace, response: str) -> None:
    """The next run has it from the rescue file: it sends only what was not accepted."""
    reply, state, sent = LATE_POST_REPLIES[response]
    scripted_api = ScriptedApi()
    workspace.write_leads(make_leads(1))

    def lose_ledger_and_reply(name: str) -> Reply:
        workspace.ledger_path.unlink(missing_ok=True)
        return reply(name)

    scripted_api.post = lose_ledger_and_reply
    with serve_replies(scripted_api) as server:
        with pytest.raises(LedgerFailed, match="kept in"):
            run_once(workspace, server.base_url)
        scripted_api.clear_requests()
        scripted_api.post = ScriptedApi.post
        summary = run_once(workspace, server.base_url)

    assert scripted_api.posts == sent
    assert request_states(workspace) == [state]
    assert summary.exit_code == (14 if state == "in_doubt" else 0)
    assert rescue_files(workspace) == []
    assert not check_ledger(workspace.ledger_path).problems


def test_task_ids_that_can_be_written_nowhere_are_in_the_message(workspace: Workspace) -> None:
    """The folders of the ledger and of the output are gone: the user gets the ids and the requests."""
    scripted_api = ScriptedApi()
    workspace.write_leads(make_leads(1))

    def rename_folder_and_reply(name: str) -> Reply:
        fingerprints.extend(workspace.sql("SELECT lower(hex(fingerprint)) FROM requests"))
        workspace.folder.rename(workspace.folder.with_name("elsewhere"))  # in one step
        return ScriptedApi.post(name)

    fingerprints: list[tuple[str]] = []
    scripted_api.post = rename_folder_and_reply
    with serve_replies(scripted_api) as server, pytest.raises(LedgerFailed) as failure:
        run_once(workspace, server.base_url)

    ((fingerprint,),) = fingerprints
    assert f"so keep their ids: t-First0 (request {fingerprint})" in failure.value.message


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize(("owner", "other"), [("First0", "First1"), ("First1", "First0")])
def test_task_id_of_another_request_after_the_ledger_is_lost(
    workspace: Workspace, owner: str, other: str, *, restored: bool
) -> None:
    """A POST that gets the id of another's task is unconfirmed, and never has its answer."""
    scripted_api, is_lost, is_polled_again = ScriptedApi(), Event(), Event()
    workspace.write_leads(make_leads(3))
    files = [Path(f"{workspace.ledger_path}{suffix}") for suffix in ("", "-wal", "-shm")]

    def post(name: str) -> Reply:
        if name == other:
            assert is_lost.wait(30)
        return ScriptedApi.post(owner if name == other else name)

    def poll(name: str) -> Reply:
        if name == "First2":
            if is_lost.is_set():
                is_polled_again.wait(1)  # the run still polls while this response is awaited
            return running_reply(name)
        if is_lost.is_set():
            is_polled_again.set()
        else:
            for file in files:
                file.rename(workspace.folder / file.name)
            is_lost.set()
        return completed_reply(name)

    scripted_api.post, scripted_api.task = post, poll
    with serve_replies(scripted_api) as server:
        with pytest.raises(LedgerFailed, match="kept in"):
            run_once(workspace, server.base_url)
        assert len(scripted_api.posts) == 3
        for file in files if restored else ():
            (workspace.folder / file.name).rename(file)
        scripted_api.clear_requests()
        scripted_api.task = completed_reply
        summary = run_once(workspace, server.base_url)

    rows = {row["First Name"]: (row["enrich_status"], row["work_email"]) for row in workspace.read_output()}
    found = {name: ("found", f"{name.lower()}@found.example") for name in (owner, "First2")}
    assert rows == found | {other: ("in_doubt", "")}
    assert (summary.exit_code, scripted_api.posts) == (14, [])
    assert not check_ledger(workspace.ledger_path).problems

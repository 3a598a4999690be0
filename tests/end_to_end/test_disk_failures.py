"""The disk is full, read-only, damaged or removed: a run reports it, and sends nothing that it cannot record."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from enrich.errors import CommandRefused
from enrich.ledger import verify
from enrich.ledger.database import Database, open_existing
from tests.support.ledger import CommittingLedger
from tests.support.workspace import ProgramResult, SandboxApi, Workspace, make_leads, serve_api, wait_until

OLD_OUTPUT = "the output of an older night\n"
MAX_POSTS_IN_FLIGHT = 64  # the most requests in doubt when the ledger can't be written any more


def run_with_file_limit(workspace: Workspace, api: SandboxApi, max_file_bytes: int, *arguments: str) -> ProgramResult:
    """Run the program where no file grows beyond `max_file_bytes`, as on a full disk."""
    return workspace.run_subprocess(*arguments, api=api, max_file_bytes=max_file_bytes)


def assert_exit(result: ProgramResult, code: int, *messages: str) -> dict[str, Any]:
    """Assert an exit: its code, also in the JSON object, these words on stderr, a hint, no traceback."""
    assert result.exit_code == code, result.stderr
    assert result.json_output["exit_code"] == code
    assert "Traceback" not in result.stderr
    for word in (*messages, "hint: "):
        assert word in result.stderr
    return result.json_output


def known_task_count(workspace: Workspace) -> int:
    """Count the tasks whose id is in the ledger."""
    with closing(sqlite3.connect(workspace.ledger_path)) as db:
        count: int = db.execute("SELECT count(*) FROM attempts WHERE task_id IS NOT NULL").fetchone()[0]
    return count


def assert_resumes(workspace: Workspace, api: SandboxApi, leads: int) -> None:
    """Run again with enough space; assert that every lead is answered or in doubt, and none is paid twice."""
    summary = workspace.run_job(api)
    audit = api.audit()
    rows = workspace.read_output()
    assert summary.exit_code in (0, 14)
    assert (summary.pending, len(rows)) == (0, leads)
    assert (summary.in_doubt or 0) <= MAX_POSTS_IN_FLIGHT
    assert (audit["paid_twice"], audit["accepted_more_than_once"]) == (0, 0)
    reported_tasks = {row["enrich_task_id"] for row in rows}
    in_doubt = {row["First Name"] for row in rows if row["enrich_status"] == "in_doubt"}
    for run in audit["runs"]:
        assert run["params"]["first_name"] in in_doubt or set(run["task_ids"]) <= reported_tasks
    assert workspace.run_in_process("ledger", "check", "job.yaml").exit_code == 0


# Full


@pytest.mark.long
def test_disk_full_during_run_is_exit_1(api: SandboxApi, workspace: Workspace) -> None:
    """Stops sending when the ledger can't be written; resumes when there is space."""
    workspace.write_leads(make_leads(150))
    (workspace.folder / "out.csv").write_text(OLD_OUTPUT)

    result = run_with_file_limit(workspace, api, 150_000, "run", "job.yaml", "--json")

    assert_exit(result, 1, "the ledger cannot be written", "free some space")
    audit = api.audit()
    assert 0 < audit["accepted"] < 150
    assert audit["accepted"] - known_task_count(workspace) <= MAX_POSTS_IN_FLIGHT
    assert (workspace.folder / "out.csv").read_text() == OLD_OUTPUT
    assert_resumes(workspace, api, 150)


@pytest.mark.long
def test_disk_full_at_start(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses before anything is sent when no ledger can be made, and leaves no partial one behind."""
    workspace.write_leads(make_leads(5))

    result = run_with_file_limit(workspace, api, 8_000, "run", "job.yaml", "--json")

    assert_exit(result, 5, "job.db: the ledger cannot be opened", "free some space")
    assert api.audit()["accepted"] == 0
    assert_resumes(workspace, api, 5)


@pytest.mark.long
def test_disk_full_before_first_post_is_exit_5(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses when a new ledger has no space for the requests: nothing was sent."""
    workspace.write_leads(make_leads(2_000))

    result = run_with_file_limit(workspace, api, 150_000, "run", "job.yaml", "--json")

    assert_exit(result, 5, "the ledger cannot be written", "free some space")
    assert api.audit()["accepted"] == 0
    assert workspace.run_in_process("run", "job.yaml", "--limit", "3", "--json", api=api).json_output["submitted"] == 3


def test_no_space_for_rescue_file_is_exit_5(api: SandboxApi, workspace: Workspace) -> None:
    """Sends nothing when task ids would have no place if the ledger could not be written; needs none without POSTs."""
    workspace.write_leads(make_leads(3))
    workspace.write_job(dispatch="{bulk: 1000}")

    result = run_with_file_limit(workspace, api, 1_000_000, "run", "job.yaml", "--json")

    assert_exit(result, 5, "job.db: the rescue file cannot be written", "File too large", "free some space")
    assert api.audit()["accepted"] == 0
    assert_resumes(workspace, api, 3)
    (workspace.folder / "out.csv").unlink()
    assert run_with_file_limit(workspace, api, 1_000_000, "run", "job.yaml", "--json").exit_code == 0
    assert len(workspace.read_output()) == 3


@pytest.mark.long
@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_disk_full_while_writing_output(api: SandboxApi, workspace: Workspace, name: str) -> None:
    """Names the fix; `collect` writes the output without paying when there is space."""
    # More than the ledger's journal needs, however many commits a slow machine makes.
    room = 3_000_000
    leads = [
        [*lead[:4], random.Random(number).randbytes(4_000).hex()] for number, lead in enumerate(make_leads(10) * 100)
    ]
    workspace.write_leads(leads)
    workspace.write_job(output=name)
    (workspace.folder / name).write_text(OLD_OUTPUT)

    result = run_with_file_limit(workspace, api, room, "run", "job.yaml", "--json")

    assert_exit(result, 1, f"{name}: the output cannot be written", "enrich collect")
    assert (workspace.folder / name).read_text() == OLD_OUTPUT
    assert not list(workspace.folder.glob(".*part*"))
    assert api.audit()["accepted"] == known_task_count(workspace) == 10
    assert workspace.run_in_process("collect", "job.yaml").exit_code == 0
    assert (workspace.folder / name).stat().st_size > room
    assert api.audit()["accepted"] == 10


@pytest.mark.long
def test_disk_full_during_cancel(tmp_path: Path, workspace: Workspace) -> None:
    """Names the fix, no bug; what was cancelled at the API is recorded by the next one, and never sent again."""
    workspace.write_leads(make_leads(60))
    with serve_api(tmp_path / "api.db", latency="fixed(3600)") as api:
        workspace.submit_without_collecting(api)

        result = run_with_file_limit(workspace, api, 60_000, "cancel", "job.yaml", "--json")

        assert_exit(result, 1, "the ledger cannot be written", "free some space")
        assert workspace.run_in_process("cancel", "job.yaml", "--json", api=api).json_output["cancelled"] > 0
        summary = workspace.run_job(api)
        assert (summary.failed, summary.submitted) == (60, 0)


# Read-only


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("target", ["file", "folder"])
def test_unwritable_ledger_is_exit_5(api: SandboxApi, workspace: Workspace, target: str) -> None:
    """Refuses before anything is sent."""
    workspace.write_leads(make_leads(3))
    Database(workspace.ledger_path).close()
    place, mode = (workspace.ledger_path, 0o400) if target == "file" else (workspace.ledger_path.parent, 0o500)
    place.chmod(mode)

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    place.chmod(0o700)
    assert (result.exit_code, result.json_output["exit_code"]) == (5, 5)
    assert "job.db" in result.stderr
    assert api.audit()["accepted"] == 0


@pytest.mark.parametrize("target", ["file", "folder"])
def test_unwritable_ledger_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Names what is read-only at the start, also where the lock of an earlier run is left: its WAL needs the folder."""
    path = workspace.ledger_path
    Database(path).close()
    place = path if target == "file" else path.parent
    monkeypatch.setattr(os, "access", lambda asked, _: Path(asked) != place)

    with pytest.raises(CommandRefused) as refusal:
        Database(path)

    reason = "it is read-only" if target == "file" else "its folder is read-only"
    assert str(refusal.value) == f"{path}: the ledger cannot be opened: {reason}"


def test_readable_ledger_in_a_folder_of_another_user() -> None:
    """A reader without permission to write there is shown the cause and the remedy, not a full disk."""
    user = os.getuid()
    reader = user or 65534  # root may write everywhere
    with TemporaryDirectory() as folder:
        path = Path(folder) / "job.db"
        Database(path).close()
        path.chmod(0o644)
        Path(folder).chmod(0o555)
        os.setresuid(reader, reader, user)
        try:
            with pytest.raises(CommandRefused) as refusal:
                Database(path, read_only=True)
        finally:
            os.setresuid(user, user, user)
            Path(folder).chmod(0o755)
    assert str(refusal.value) == f"{path}: the ledger cannot be opened: its folder is read-only"
    assert refusal.value.hint == "copy it to another folder, and name the copy with --ledger"


def test_read_only_folder_is_named_by_readers(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that only reads says why SQLite cannot open the ledger, and how to read it."""
    path = workspace.ledger_path
    Database(path).close()
    path.with_name("job.db-wal").mkdir()  # as in such a folder, SQLite cannot make this file
    monkeypatch.setattr(os, "access", lambda asked, _: Path(asked) != path.parent)

    result = workspace.run_in_process("status", "job.yaml")

    assert (result.exit_code, f"{path}: the ledger cannot be opened: its folder is read-only" in result.stderr) == (
        5,
        True,
    )
    assert "hint: copy it to another folder, and name the copy with --ledger" in result.stderr


def test_ledger_that_was_read_only(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run works again after the ledger was read-only for a while: reading gave its side files the same mode."""
    monkeypatch.setattr(os, "access", lambda asked, _: bool(Path(asked).stat().st_mode & 0o200))  # root may write all
    workspace.write_leads(make_leads(3))
    Database(workspace.ledger_path).close()
    workspace.ledger_path.chmod(0o400)
    workspace.run_in_process("status", "job.yaml")
    journals = [workspace.ledger_path.with_name(f"job.db{end}") for end in ("-wal", "-shm")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in journals] == [0o400, 0o400]
    workspace.ledger_path.chmod(0o600)

    with closing(Database(workspace.ledger_path)):
        assert [stat.S_IMODE(path.stat().st_mode) for path in journals] == [0o600, 0o600]
    assert workspace.run_job(api).submitted == 3


def test_unwritable_wal_is_exit_5(api: SandboxApi, workspace: Workspace) -> None:
    """A folder in the journal's place stops root as well."""
    workspace.write_leads(make_leads(3))
    Database(workspace.ledger_path).close()
    workspace.ledger_path.with_name("job.db-wal").mkdir()

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert_exit(result, 5, "job.db: the ledger cannot be opened")
    assert api.audit()["accepted"] == 0


# Damaged


def truncate(content: bytearray) -> None:
    """Cut off the second half."""
    del content[len(content) // 2 :]


def clear(content: bytearray) -> None:
    """Remove all content."""
    content.clear()


def corrupt_pages(content: bytearray) -> None:
    """Overwrite the newest pages with noise: the file still opens."""
    content[-12_288:-4_096] = random.Random(3).randbytes(8_192)


def corrupt_header(content: bytearray) -> None:
    """Overwrite the header with noise."""
    content[:100] = random.Random(3).randbytes(100)


@pytest.mark.long
@pytest.mark.parametrize("damage", [truncate, clear, corrupt_pages, corrupt_header])
def test_damaged_ledger_is_exit_5(api: SandboxApi, workspace: Workspace, damage: Callable[[bytearray], None]) -> None:
    """Refuses a damaged ledger, whose lost leads would be charged again; a restored backup works."""
    workspace.write_leads(make_leads(60))
    workspace.run_job(api)
    workspace.run_in_process("ledger", "backup", "job.yaml", "copy.db")
    content = bytearray(workspace.ledger_path.read_bytes())
    damage(content)
    workspace.ledger_path.write_bytes(content)

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert_exit(result, 5, "job.db", "restore a backup")
    assert workspace.ledger_path.read_bytes() == content
    assert api.audit()["accepted"] == 60
    for path in workspace.ledger_path.parent.glob("job.db*"):
        path.unlink()
    shutil.copyfile(workspace.folder / "copy.db", workspace.ledger_path)
    assert workspace.run_job(api).reused == 60
    assert api.audit()["accepted"] == 60


@pytest.mark.long
def test_backup_beside_stale_wal_is_refused(tmp_path: Path) -> None:
    """Refuses before anything is sent: SQLite would apply the killed run's journal to the backup."""
    ledger = CommittingLedger.open(tmp_path / "job.db").start_and_enroll(*range(300))
    with closing(open_existing(ledger.path, skip_integrity_check=True)) as records:
        verify.backup(records, tmp_path / "copy.db")
    for number in range(200):
        ledger.settle(ledger.submit(str(number)))
    (tmp_path / "restored.db-wal").write_bytes((tmp_path / "job.db-wal").read_bytes())
    (tmp_path / "copy.db").rename(tmp_path / "restored.db")
    ledger.wrapped.close()

    with pytest.raises(CommandRefused, match=r"damaged|malformed") as refusal:
        Database(tmp_path / "restored.db")

    assert "-wal" in str(refusal.value.hint)


def test_newer_ledger_is_unchanged(api: SandboxApi, workspace: Workspace) -> None:
    """Every command refuses a newer ledger and leaves it unchanged, byte for byte."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    with closing(sqlite3.connect(workspace.ledger_path)) as db:
        db.execute("PRAGMA user_version = 99")
    content = workspace.ledger_path.read_bytes()

    for command in (["run"], ["collect"], ["status"], ["ledger", "check"]):
        assert_exit(workspace.run_in_process(*command, "job.yaml", "--json", api=api), 5, "newer")

    assert workspace.ledger_path.read_bytes() == content
    assert api.audit()["accepted"] == 2


def test_kill_during_ledger_creation(api: SandboxApi, workspace: Workspace) -> None:
    """A partial ledger left by a kill does not count as a ledger and blocks no run."""
    workspace.write_leads(make_leads(2))
    workspace.ledger_path.parent.mkdir()
    part = workspace.ledger_path.with_name(".job.db.new")
    part.write_text("half a led")

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.submitted) == (0, 2)
    assert not part.exists()


# Removed


@pytest.mark.long
def test_output_folder_removed(tmp_path: Path, workspace: Workspace) -> None:
    """The run makes a removed output folder again; `collect` does so after the run."""
    workspace.write_leads(make_leads(5))
    workspace.write_job(output="out/out.csv")
    with serve_api(tmp_path / "api.db", latency="fixed(1)") as api:
        process = workspace.start_subprocess("run", "job.yaml", "--json", api=api)
        wait_until(lambda: api.audit()["accepted"] == 5)
        shutil.rmtree(workspace.folder / "out")
        out, err = process.communicate(timeout=90)
        result = ProgramResult(process.returncode, out, err)

        assert result.exit_code == 0, result.stderr
        written = workspace.read_output("out/out.csv")
        assert "pending" not in {row["enrich_status"] for row in written}
        shutil.rmtree(workspace.folder / "out")
        assert workspace.run_in_process("collect", "job.yaml").exit_code == 0
        assert workspace.read_output("out/out.csv") == written
        assert api.audit()["accepted"] == 5

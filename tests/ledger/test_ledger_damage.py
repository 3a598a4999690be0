"""A damaged ledger, or a path that can't be a ledger, is exit 5 with a message that quotes no content."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.errors import CommandRefused
from enrich.ledger.database import Database
from enrich.ledger.verify import check_ledger
from tests.support.cases import first_quick, in_turn
from tests.support.ledger import CommittingLedger
from tests.support.workspace import ProgramResult, SandboxApi, Workspace, make_leads, serve_api

SECRET = "Zaphira"
DOCTOR = ["doctor", "job.yaml", "--offline", "--env", "DATABAR_API_KEY", "--env", "DATABAR_BASE_URL"]
COMMANDS = [
    ["run", "job.yaml", "--limit", "0", "--json"],
    ["plan", "job.yaml", "--json"],
    ["status", "job.yaml", "--json"],
    ["runs", "job.yaml", "--json"],
    ["explain", "job.yaml", "--row", "1", "--json"],
    ["collect", "job.yaml", "--json"],
    ["report", "job.yaml", "-o", "report.html"],
    ["reconcile", "job.yaml", "--json"],
    ["forget", "job.yaml", "--match", f"First Name={SECRET}7", "--yes"],
    ["purge", "job.yaml", "--older-than", "1d", "--yes"],
    ["ledger", "check", "job.yaml", "--json"],
    ["ledger", "backup", "job.yaml", "copy.db"],
    ["ledger", "copy", "job.yaml", "other.db"],
    ["check", "job.yaml", "--json"],
    DOCTOR,
    ["cancel", "job.yaml"],
]
NAMES = [" ".join(command[:2]).removesuffix(" job.yaml") for command in COMMANDS]


@pytest.fixture(scope="module")
def paid_ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SandboxApi, Workspace, bytes]]:
    """Make a ledger with thirty leads, and return its bytes."""
    folder = tmp_path_factory.mktemp("damage")
    workspace = Workspace(folder / "office")
    workspace.folder.mkdir()
    workspace.write_job()
    workspace.write_leads([[f"{SECRET}{number}", *lead[1:]] for number, lead in enumerate(make_leads(30))])
    with serve_api(folder / "api.db") as api:
        assert workspace.run_job(api).exit_code == 0
        yield api, workspace, workspace.ledger_path.read_bytes()


def write_ledger(workspace: Workspace, content: bytes) -> None:
    """Replace the ledger with these bytes, without files beside it."""
    shutil.rmtree(workspace.ledger_path.parent)
    workspace.ledger_path.parent.mkdir()
    workspace.ledger_path.write_bytes(content)
    for name in ("other.db", "copy.db"):
        (workspace.folder / name).unlink(missing_ok=True)


def assert_error_without_content(result: ProgramResult, *codes: int) -> None:
    """Check for one of these exit codes, no traceback and no content of the ledger."""
    assert "Traceback" not in result.stderr
    assert result.exit_code in codes, result.stderr
    if result.exit_code:
        assert SECRET not in result.stderr + result.stdout
    if result.exit_code == 5 and "forgotten" not in result.stderr:
        assert "damaged" in result.stderr + result.stdout, result.stderr


def execute_raw(path: Path, *statements: str) -> None:
    """Execute statements that the program itself never would."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            db.execute(statement)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@pytest.mark.parametrize("command", first_quick(1, COMMANDS), ids=NAMES)
@in_turn("lost", [1, 4095, 4097, 40_000])
def test_truncated_file_is_reported(
    paid_ledger: tuple[SandboxApi, Workspace, bytes], command: list[str], lost: int
) -> None:
    """A truncated file is reported by every command, however much is missing."""
    api, workspace, content = paid_ledger
    write_ledger(workspace, content[:-lost])

    assert_error_without_content(workspace.run_in_process(*command, api=api), 5)


@pytest.mark.parametrize("command", first_quick(1, COMMANDS, single=True), ids=NAMES)
def test_overwritten_bytes_are_reported(paid_ledger: tuple[SandboxApi, Workspace, bytes], command: list[str]) -> None:
    """Overwritten bytes are reported where they are read, also in the schema's pages, and nothing is quoted."""
    api, workspace, content = paid_ledger
    chance = random.Random(len(command[0]))
    for start, length in [
        (0, 100),
        (20, 4),
        (150, 300),
        *((chance.randrange(len(content) - 400), 300) for _ in range(6)),
    ]:
        write_ledger(workspace, content[:start] + chance.randbytes(length) + content[start + length :])

        assert_error_without_content(workspace.run_in_process(*command, api=api), 5, 0)


def test_doctor_goes_on_beside_damage(
    paid_ledger: tuple[SandboxApi, Workspace, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger that is too large to be checked whenever it is opened is one failure among the doctor's findings."""
    api, workspace, content = paid_ledger
    monkeypatch.setattr("enrich.ledger.sqlite.ALWAYS_CHECKED_BYTES", 0)
    write_ledger(workspace, content)
    with closing(sqlite3.connect(workspace.ledger_path)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'executions'").fetchone()
    damaged = bytearray(content)
    damaged[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    write_ledger(workspace, bytes(damaged))

    result = workspace.run_in_process(*DOCTOR, api=api)

    assert_error_without_content(result, 5)
    assert re.search(r"^ok +program", result.stdout, re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
@in_turn(
    "statement",
    [
        f"UPDATE requests SET params = CAST(x'7b22{SECRET.encode().hex()}ff223a317d' AS TEXT)",
        f"UPDATE attempts SET answer = '{{\"{SECRET}'",
        f"UPDATE attempts SET provider = CAST(x'{SECRET.encode().hex()}ff' AS TEXT)",
        f"UPDATE executions SET paths = '[\"{SECRET}'",
        f"UPDATE executions SET summary = '{SECRET}'",
        f"UPDATE targets SET description = '{{{SECRET}'",
        f"UPDATE calls SET canonical = '{{{SECRET}'",
    ],
    ids=["params", "answer", "provider", "paths", "summary", "description", "call"],
)
def test_invalid_text_is_reported(
    paid_ledger: tuple[SandboxApi, Workspace, bytes], command: list[str], statement: str
) -> None:
    """Invalid text is reported without a traceback and without showing it."""
    api, workspace, content = paid_ledger
    write_ledger(workspace, content)
    execute_raw(workspace.ledger_path, statement)

    assert_error_without_content(workspace.run_in_process(*command, api=api), 5, 0)


def test_check_names_column_and_row(paid_ledger: tuple[SandboxApi, Workspace, bytes]) -> None:
    """The check decodes every text and parses all JSON, and names column and row."""
    api, workspace, content = paid_ledger
    write_ledger(workspace, content)
    execute_raw(
        workspace.ledger_path,
        "UPDATE requests SET params = CAST(x'7b22ff' AS TEXT) WHERE id = 3",
        f"UPDATE attempts SET answer = '{SECRET}' WHERE id = 5",
        "UPDATE facts SET value = CAST(x'ff' AS TEXT) WHERE name = 'workspace'",
    )

    result = workspace.run_in_process("ledger", "check", "job.yaml", api=api)

    assert result.exit_code == 5
    assert "requests.params, id 3: not UTF-8" in result.stdout
    assert "attempts.answer, id 5: not a JSON object" in result.stdout
    assert "facts.value, row 2: not UTF-8" in result.stdout
    assert SECRET not in result.stdout + result.stderr


@pytest.mark.parametrize("command", first_quick(2, [*COMMANDS[5:7], COMMANDS[0], COMMANDS[4]], single=True))
@in_turn("answer", [f'{{"{SECRET}', "", "[]", "5", "null", f'"{SECRET}"', "[" * 20_000])
def test_answer_that_is_no_object_is_named(
    paid_ledger: tuple[SandboxApi, Workspace, bytes], command: list[str], answer: str
) -> None:
    """An answer that is no JSON object is exit 5, and the message names its attempt."""
    api, workspace, content = paid_ledger
    write_ledger(workspace, content)
    with closing(sqlite3.connect(workspace.ledger_path)) as db, db:
        db.execute("UPDATE attempts SET answer = ? WHERE request_id = 1", (answer,))
        (attempt,) = db.execute("SELECT id FROM attempts WHERE request_id = 1").fetchone()

    result = workspace.run_in_process(*command, api=api)

    assert_error_without_content(result, 5)
    assert f"attempts.answer, id {attempt}: not a JSON object" in result.stderr


@pytest.mark.parametrize("answer", ["[]", "null", "[" * 20_000])
def test_damaged_answer_after_spending(api: SandboxApi, workspace: Workspace, answer: str) -> None:
    """When the run has sent requests, such an answer is exit 1: exit 5 says that nothing was spent."""
    workspace.write_leads(make_leads(3))
    workspace.run_job(api)
    with closing(sqlite3.connect(workspace.ledger_path)) as db, db:
        db.execute("UPDATE attempts SET answer = ? WHERE id = 2", (answer,))
    workspace.write_leads(make_leads(4))

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert_error_without_content(result, 1)
    assert result.json_output["submitted"] == 1
    assert "attempts.answer, id 2: not a JSON object" in result.stderr
    assert workspace.run_in_process("runs", "job.yaml", "--json").json_output["executions"][0]["exit_code"] == 1


@pytest.mark.parametrize("command", first_quick(2, [COMMANDS[5], COMMANDS[1], COMMANDS[0], COMMANDS[4]], single=True))
def test_description_that_is_none_is_named(
    paid_ledger: tuple[SandboxApi, Workspace, bytes], command: list[str]
) -> None:
    """A description of the target that lacks its keys is exit 5, and the message names the target."""
    api, workspace, content = paid_ledger
    write_ledger(workspace, content)
    execute_raw(workspace.ledger_path, "UPDATE targets SET description = '{}'", "UPDATE executions SET summary = '{}'")

    result = workspace.run_in_process(*command, api=api)

    assert_error_without_content(result, 5)
    assert "the description of the waterfall `email_getter` cannot be read" in result.stderr


@pytest.fixture(scope="module")
def small_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a ledger of a few pages."""
    ledger = CommittingLedger.open(tmp_path_factory.mktemp("sound") / "sound.db").start_and_enroll(*range(30))
    for number in range(20):
        ledger.settle(ledger.submit(str(number)))
    ledger.wrapped.close()
    return ledger.path


@given(share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_refused(small_ledger: Path, tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    """A file truncated to any length is refused as damaged, on writing and on reading."""
    content = small_ledger.read_bytes()
    length = int(share * len(content))
    path = tmp_path_factory.mktemp("cut") / "job.db"
    for read_only in (True, False):
        path.write_bytes(content[:length])
        with pytest.raises(CommandRefused, match="damaged"):
            Database(path, read_only=read_only).close()
    assert check_ledger(path).problems


@given(start=st.floats(0, 1), noise=st.binary(min_size=1, max_size=300))
def test_check_of_random_damage(
    small_ledger: Path, tmp_path_factory: pytest.TempPathFactory, start: float, noise: bytes
) -> None:
    """Wherever bytes are overwritten, the check ends with findings in its own words."""
    content = small_ledger.read_bytes()
    at = int(start * (len(content) - len(noise)))
    path = tmp_path_factory.mktemp("noise") / "job.db"
    path.write_bytes(content[:at] + noise + content[at + len(noise) :])

    try:
        found = check_ledger(path)
    except CommandRefused as refused:
        assert refused.message.startswith(str(path))  # noqa: PT017 - both outcomes are valid
        return
    assert all("example" not in problem and "F1" not in problem for problem in found.problems)


# Paths that can't be a ledger


def make_fifo(path: Path) -> None:
    """Make a named pipe without a writer."""
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    """Make a socket."""
    working_dir = Path.cwd()
    os.chdir(path.parent)
    with closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(path.name)
    os.chdir(working_dir)


def make_dangling_link(path: Path) -> None:
    """Make a link to a missing file."""
    path.symlink_to(path.with_name("gone.db"))


def make_link_loop(path: Path) -> None:
    """Make a link to itself."""
    path.symlink_to(path)


def make_device_link(path: Path) -> None:
    """Make a link to a device."""
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("command", first_quick(2, COMMANDS), ids=NAMES)
@in_turn("make", [make_fifo, make_socket, make_dangling_link, make_link_loop, make_device_link, Path.mkdir])
def test_special_files_are_refused(
    api: SandboxApi, workspace: Workspace, make: Callable[[Path], None], command: list[str]
) -> None:
    """A special file is refused at once with the reason, and no ledger is made elsewhere."""
    workspace.write_leads(make_leads(3))
    shutil.rmtree(workspace.ledger_path.parent, ignore_errors=True)
    workspace.ledger_path.parent.mkdir()
    make(workspace.ledger_path)

    result = workspace.run_in_process(*command, api=api)

    assert result.exit_code == 5, result.stderr
    assert "Traceback" not in result.stderr
    assert str(workspace.ledger_path) in result.stdout + result.stderr
    assert not workspace.ledger_path.with_name("gone.db").exists()
    assert api.audit()["accepted"] == 0


@pytest.mark.long
def test_symlinked_ledger_shares_lock(api: SandboxApi, workspace: Workspace) -> None:
    """A symbolic link uses the ledger and the lock at its target, so no other run gets in by another name."""
    workspace.write_leads(make_leads(3))
    assert workspace.run_job(api).exit_code == 0
    (workspace.folder / "link.db").symlink_to(workspace.ledger_path)

    result = workspace.run_in_process("run", "job.yaml", "--ledger", "link.db", "--json", api=api)

    assert result.exit_code == 0, result.stderr
    assert result.json_output["reused"] == 3
    assert not (workspace.folder / "link.db.lock").exists()


@pytest.mark.parametrize("command", first_quick(1, [["run", "job.yaml"], ["collect", "job.yaml"]]), ids=" ".join)
def test_hard_linked_ledger_is_refused(api: SandboxApi, workspace: Workspace, command: list[str]) -> None:
    """A hard link has a lock and a journal of its own, so two runs would damage the ledger and pay twice."""
    workspace.write_leads(make_leads(3))
    assert workspace.run_job(api).exit_code == 0
    other_name = workspace.folder / "hard.db"
    other_name.hardlink_to(workspace.ledger_path)
    workspace.write_leads(make_leads(6))

    for name in (workspace.ledger_path, other_name):
        result = workspace.run_in_process(*command, "--ledger", str(name), "--json", api=api)
        assert (result.exit_code, "hard link" in result.stderr) == (5, True), result.stderr
    other_name.unlink()

    assert api.audit()["accepted"] == 3
    assert workspace.run_job(api).submitted == 3

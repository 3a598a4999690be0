"""`enrich ledger`: check reports every violation and nothing else; a backup is complete even during a run."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant

from enrich.errors import CommandRefused
from enrich.ledger import queries, schema, transitions, verify
from enrich.ledger.database import Database, open_existing
from enrich.ledger.verify import INVARIANTS, LedgerCheck, check_ledger
from enrich.models import State
from enrich.run.context import RunOptions
from tests.ledger.test_ledger_stateful import LedgerStateMachine
from tests.support.cases import examples, first_quick
from tests.support.ledger import BINDING, COST, FREE_FAILURE, MAX_PRICE, NO_MATCH, CommittingLedger
from tests.support.workspace import (
    BOTH_BACKENDS,
    SHORT_TIMEOUTS,
    ProgramResult,
    SandboxApi,
    Workspace,
    kill_process,
    make_leads,
    serve_api,
    wait_until,
)

#: One way to break each invariant of the ledger that `filled_ledger` makes.
VIOLATIONS = {
    "request with another state than its newest attempt": "UPDATE requests SET state = 'pending' WHERE id = 1",
    "request with the newest attempt or answer of another request": "UPDATE requests SET answer_id = 1 WHERE id = 2",
    "request with two running attempts": (
        "INSERT INTO attempts (request_id, execution_id, previous_state, state, claimed_ms, reserved) "
        "VALUES (5, 1, 'pending', 'submitting', 1, 0)"
    ),
    "running attempt that its request does not wait for": (
        "UPDATE requests SET attempt_id = NULL, state = 'pending' WHERE id = 3"
    ),
    "answer that is not the newest match": "UPDATE requests SET answer_id = NULL WHERE id = 1",
    "settled attempt without an answer": "UPDATE attempts SET answer = NULL WHERE state = 'found'",
    "task without its id": "UPDATE attempts SET task_id = NULL WHERE state = 'submitted'",
    "row that refers to one that is not there": "DELETE FROM calls",
    "run with a negative reservation": "UPDATE executions SET reserved = -1",
    "run without a reservation for its running tasks": "UPDATE executions SET reserved = 1",
    "run with other spending than the sum of its attempts": "UPDATE executions SET spent = spent + 1",
    "run with another number of submitted requests than counted": "UPDATE executions SET submitted = submitted - 1",
    "run that reserved more than its cap": "UPDATE executions SET cap = 3",
    "bulk task that differs from its attempts": "UPDATE bulk_tasks SET size = 2",
    "row of a bulk task with its own price": "UPDATE attempts SET credits = 1 WHERE bulk_index = 1",
}


@pytest.fixture
def filled_ledger(ledger: CommittingLedger) -> CommittingLedger:
    """Make a ledger with requests in many states: found, no match, submitted, in doubt, submitting, failed, pending."""
    ledger.start_and_enroll(1, 2, 3, 4, 5, 6, 7, 8, 9, cap=100)
    ledger.settle(ledger.submit("a"))
    ledger.settle(ledger.submit("b"), NO_MATCH)
    ledger.submit("c")
    ledger.commit(transitions.mark_in_doubt, [(ledger.claim().attempt_id, "reset", ledger.now, None)])
    ledger.claim()
    ledger.commit(transitions.record_rejected, [(ledger.claim().attempt_id, "company: Bad.", ledger.now)])
    ledger.settle(ledger.submit("d"), FREE_FAILURE)
    ledger.commit(transitions.record_refused, [(ledger.claim().attempt_id, "429", ledger.now)])
    # The last three as one task: it is pending again, and is sent with two new ones.
    ledger.settle_bulk(ledger.submit_bulk(3), NO_MATCH, credits_=COST)
    ledger.wrapped.close()
    return ledger


def assert_sound(workspace: Workspace, *options: str) -> ProgramResult:
    """Assert that check finds no problem in the job's ledger, or in another."""
    result = workspace.run_in_process("ledger", "check", *(options or ("job.yaml",)), "--json")
    assert (result.exit_code, result.json_output["problems"]) == (0, [])
    return result


# Check


def test_check_of_sound_ledger(api: SandboxApi, workspace: Workspace) -> None:
    """Prints one line as text and one object as JSON; finds the ledger through the job."""
    workspace.write_leads(make_leads(5))
    workspace.run_job(api)

    line = workspace.run_in_process("ledger", "check", "job.yaml")
    result = workspace.run_in_process("ledger", "check", ".enrich/job.db", "--json")

    assert (line.exit_code, line.stdout, line.stderr) == (0, "ok: 5 requests, 5 attempts, 1 run\n", "")
    assert result.json_output == {
        "exit_code": 0,
        "ledger": ".enrich/job.db",
        "problems": [],
        "requests": 5,
        "attempts": 5,
        "executions": 1,
    }


def test_check_of_sandbox_and_other_ledgers(workspace: Workspace) -> None:
    """`--sandbox` and `--ledger` mean the same as for other commands and work with a job."""
    workspace.write_leads(make_leads(2))
    Database(workspace.folder / ".enrich" / "job.sandbox.db").close()
    Database(workspace.folder / "other.db").close()

    sandbox = workspace.run_in_process("ledger", "check", "job.yaml", "--sandbox", "--json")
    other = workspace.run_in_process("ledger", "check", "job.yaml", "--ledger", "other.db", "--json")
    twice = workspace.run_in_process("ledger", "check", "other.db", "--sandbox")

    assert sandbox.json_output["ledger"].endswith("job.sandbox.db")
    assert other.json_output["ledger"].endswith("other.db")
    assert (sandbox.exit_code, other.exit_code, twice.exit_code) == (0, 0, 2)


@pytest.mark.long
def test_check_imports_are_light(workspace: Workspace) -> None:
    """Starts without importing polars."""
    Database(workspace.folder / "other.db").close()
    process = workspace.start_subprocess("ledger", "check", "other.db", PYTHONPROFILEIMPORTTIME="1")
    out, err = process.communicate(timeout=90)

    assert (process.returncode, out) == (0, "ok: 0 requests, 0 attempts, 0 runs\n")
    assert "polars" not in err


def test_missing_ledger(workspace: Workspace) -> None:
    """Does not create a missing ledger."""
    result = workspace.run_in_process("ledger", "check", "job.yaml", "--json")

    assert (result.exit_code, result.json_output["exit_code"]) == (5, 5)
    assert "the ledger does not exist" in result.stderr
    assert not workspace.ledger_path.exists()


@BOTH_BACKENDS
def test_ledger_with_all_states_is_sound(filled_ledger: CommittingLedger) -> None:
    """Every possible state of a request satisfies the invariants."""
    assert check_ledger(filled_ledger.location) == LedgerCheck([], requests=9, attempts=11, executions=1)


@BOTH_BACKENDS
@pytest.mark.parametrize("violation", INVARIANTS)
def test_violations_are_reported(filled_ledger: CommittingLedger, workspace: Workspace, violation: str) -> None:
    """Names each invariant that is violated, and what to do."""
    filled_ledger.query_all(VIOLATIONS[violation])

    result = workspace.run_in_process("ledger", "check", str(filled_ledger.location))

    assert result.exit_code == 5
    assert any(line.endswith(f": {violation}") for line in result.stdout.splitlines()), result.stdout
    assert "damaged" in result.stderr
    assert "hint: restore a backup" in result.stderr


@BOTH_BACKENDS
@pytest.mark.parametrize("table", ["calls", "executions", "requests", "bulk_tasks", "attempts"])
def test_missing_rows_are_reported(filled_ledger: CommittingLedger, table: str) -> None:
    """A row that others refer to is missed, whatever its table is."""
    filled_ledger.query_all(f"DELETE FROM {table}")
    problems = check_ledger(filled_ledger.location).problems
    assert any(problem.endswith(": row that refers to one that is not there") for problem in problems), problems


def test_earlier_tasks_beyond_cap_are_sound(tmp_path: Path) -> None:
    """Tasks of an earlier execution that settle in this one may exceed its cap."""
    ledger = CommittingLedger.open(tmp_path / "ledger.db").start_and_enroll(1, 2, 3)
    left = [ledger.submit(name) for name in "abc"]
    ledger.start_execution(cap=1)
    for attempt in left:
        ledger.settle(attempt)

    assert check_ledger(ledger.path).problems == []
    ledger.wrapped.close()


def test_backup_of_older_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies a ledger of an older version, so that the older program can be used again."""
    workspace = Workspace(tmp_path)
    workspace.write_job()
    workspace.ledger_path.parent.mkdir()
    Database(workspace.ledger_path).close()
    monkeypatch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, "CREATE TABLE remarks (x INTEGER) STRICT"])

    result = workspace.run_in_process("ledger", "backup", "job.yaml", "copy.db")

    assert result.exit_code == 0, result.stderr
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS) - 1,)


def test_refused_retry_is_sound(tmp_path: Path) -> None:
    """After a refused retry, the request has its previous state and attempt; an accepted doubt stays recorded."""
    ledger = CommittingLedger.open(tmp_path / "ledger.db").start_and_enroll(1, 2)
    for _ in range(2):
        ledger.commit(transitions.mark_in_doubt, [(ledger.claim().attempt_id, "reset", ledger.now, None)])
    ledger.enroll((1,), retry={State.IN_DOUBT})
    ledger.commit(transitions.record_refused, [(ledger.claim().attempt_id, "429", ledger.now)])
    assert check_ledger(ledger.path).problems == []
    with ledger.wrapped.transaction():
        ledger.wrapped.session.execute("UPDATE requests SET state = 'failed' WHERE state = 'in_doubt'")

    assert check_ledger(ledger.path).problems == []
    ledger.enroll((1, 2), retry={State.FAILED})
    ledger.submit("later")
    ledger.commit(transitions.record_refused, [(ledger.claim().attempt_id, "429", ledger.now)])
    assert check_ledger(ledger.path).problems == []
    ledger.wrapped.close()


class CheckedStateMachine(LedgerStateMachine):
    """The ledger's state machine, checked after every step."""

    @invariant()
    def check_finds_nothing(self) -> None:
        """The check finds no problem in any state."""
        assert check_ledger(self.ledger.location).problems == []


TestChecked = pytest.mark.long(CheckedStateMachine.TestCase)
TestChecked.settings = settings(
    max_examples=examples(12),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


@pytest.mark.long
def test_killed_run_leaves_sound_ledger(tmp_path: Path, workspace: Workspace) -> None:
    """Sound after a kill in mid-run, and after the next run."""
    workspace.write_leads(make_leads(80))
    with serve_api(tmp_path / "api.db", latency="uniform(0.05,0.4)") as api:
        process = workspace.start_subprocess("run", "job.yaml", api=api)
        try:
            wait_until(lambda: api.audit()["requests"].get("run", 0) >= 40)
        finally:
            kill_process(process)
        assert_sound(workspace)
        workspace.run_job(api)

    assert assert_sound(workspace).json_output["executions"] == 2


@pytest.mark.long
def test_faulty_run_leaves_sound_ledger(tmp_path: Path, workspace: Workspace) -> None:
    """Sound after unconfirmed, refused, failed and free-failed requests and a cap; then after retries and a refresh."""
    workspace.write_leads(make_leads(30))
    workspace.write_job(limits="{requests_per_second: 1000, max_credits: 80}")
    with serve_api(tmp_path / "api.db", failure_rate=0.3, free_failures=0.5) as api:
        for fault in ("no-task-id", "reset-after", "reset-before", "html-200", "lost-task"):
            api.inject_fault(fault, 2)
        api.inject_fault("rate-limit", 2, "post")
        workspace.run_job(api, timing=SHORT_TIMEOUTS)
        assert_sound(workspace)
        api.inject_fault("rate-limit", 3, "post")
        workspace.write_job(policy="{refresh: {found: 1s, not_found: 1s}}")
        retry_all = RunOptions(retry=frozenset({State.FAILED, State.IN_DOUBT, State.EXPIRED}))
        summary = workspace.run_job(api, retry_all, SHORT_TIMEOUTS)

    assert summary.submitted
    assert assert_sound(workspace).json_output["executions"] == 2


@pytest.mark.parametrize("damage", first_quick(1, ["empty", "cut", "cut to a page", "header", "middle", "schema"]))
@pytest.mark.parametrize("command", first_quick(1, ["check", "backup"]))
def test_damaged_file_is_exit_5(workspace: Workspace, command: str, damage: str) -> None:
    """Exits with 5 and names the problem, without a traceback, for any damaged file."""
    path = workspace.folder / "ledger.db"
    ledger = CommittingLedger.open(path).start_and_enroll(*range(600))
    for number in range(100):
        ledger.settle(ledger.submit(str(number)))
    ledger.wrapped.close()
    damage_file(path, damage)

    result = workspace.run_in_process("ledger", command, "ledger.db", *(["copy.db"] if command == "backup" else []))

    if command == "backup" and result.exit_code == 0:  # A backup copies pages unchanged.
        assert check_ledger(workspace.folder / "copy.db").problems
        return
    assert result.exit_code == 5, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "ledger" in result.stderr
    if command == "check":
        assert "damaged" in result.stdout
        assert "hint: restore a backup" in result.stderr


def damage_file(path: Path, damage: str) -> None:
    """Damage a ledger's file."""
    content = bytearray(path.read_bytes())
    noise = random.Random(5).randbytes(12_000)
    match damage:
        case "empty":
            content.clear()
        case "cut":
            del content[len(content) // 2 + 100 :]
        case "cut to a page":
            del content[4096:]
        case "header":
            content[:100] = noise[:100]
        case "schema":
            content[100:4096] = noise[: 4096 - 100]
        case _:
            content[len(content) // 2 : len(content) // 2 + len(noise)] = noise
    path.write_bytes(content)


# Backup


@pytest.mark.long
def test_backup_during_run(tmp_path: Path, workspace: Workspace) -> None:
    """Each backup during a run is sound, readable by its owner only, and usable as the ledger."""
    workspace.write_leads(make_leads(150))
    workspace.write_job(limits="{requests_per_second: 400}")
    copy = workspace.folder / "copies" / "job.db"
    copy.parent.mkdir()
    requests, codes = [], []
    with serve_api(tmp_path / "api.db", latency="uniform(0.05,0.3)") as api:
        process = workspace.start_subprocess("run", "job.yaml", api=api)
        try:
            wait_until(lambda: api.audit()["requests"].get("run", 0) >= 20)
            while process.poll() is None:
                codes.append(workspace.run_in_process("ledger", "backup", "job.yaml", "copies/job.db").exit_code)
                requests.append(assert_sound(workspace, "copies/job.db").json_output["attempts"])
        finally:
            kill_process(process)

    assert process.returncode == 0
    assert set(codes) == {0}
    assert requests == sorted(requests)
    assert 20 <= requests[0] < 150
    assert copy.stat().st_mode & 0o777 == 0o600
    assert list(copy.parent.iterdir()) == [copy]
    with closing(Database(copy)) as ledger:
        assert queries.state_counts(ledger)
    assert_sound(workspace)


@pytest.mark.long
def test_restored_backup_is_used(api: SandboxApi, workspace: Workspace) -> None:
    """Uses a backup in the ledger's place and buys none of its leads again."""
    workspace.write_leads(make_leads(8))
    workspace.run_job(api)
    assert workspace.run_in_process("ledger", "backup", "job.yaml", "copy.db").exit_code == 0
    workspace.ledger_path.unlink()
    (workspace.folder / "copy.db").rename(workspace.ledger_path)

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.submitted, summary.reused) == (0, 0, 8)


def test_older_backup_is_replaced(filled_ledger: CommittingLedger, tmp_path: Path) -> None:
    """Replaces an older backup that anyone could read, and the partial file of a killed backup."""
    target = tmp_path / "copy.db"
    with closing(open_existing(filled_ledger.location, skip_integrity_check=True)) as records:
        verify.backup(records, target)
        target.chmod(0o644)
        (tmp_path / ".copy.db.part").write_text("half a fi")
        (tmp_path / ".copy.db.part-journal").write_text("stale")
        verify.backup(records, target)

    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir() if "copy" in path.name) == ["copy.db"]
    assert check_ledger(target) == check_ledger(filled_ledger.path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ledger.db", "the ledger itself"),
        ("link.db", "the ledger itself"),
        ("leads.csv", "no copy of a ledger"),
        ("in_use.db", "in use"),
        ("gone.db", "has the journal of a missing database"),
        ("folder", "no file"),
        ("nowhere/copy.db", "cannot be written: No such file"),
        ("leads.csv/copy.db", "cannot be written: Not a directory"),
    ],
)
def test_invalid_backup_path_is_exit_5(
    filled_ledger: CommittingLedger, tmp_path: Path, target: str, message: str
) -> None:
    """Refuses to replace the ledger, other files and other ledgers; leaves nothing behind."""
    (tmp_path / "leads.csv").write_text("First Name,Last Name\n" * 9)
    (tmp_path / "link.db").symlink_to(filled_ledger.path)
    (tmp_path / "gone.db-wal").write_text("frames")
    (tmp_path / "folder").mkdir()
    Database(tmp_path / "in_use.db").close()
    (tmp_path / "in_use.db.lock").touch()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    with (
        closing(open_existing(filled_ledger.location, skip_integrity_check=True)) as records,
        pytest.raises(CommandRefused, match=message) as refusal,
    ):
        verify.backup(records, tmp_path / target)

    assert refusal.value.exit_code == 5
    assert target in refusal.value.message
    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and "ledger.db-" not in path.name}
    assert {path: content for path, content in before.items() if "ledger.db-" not in path.name} == after


@pytest.mark.long
def test_disk_full_during_backup_is_exit_5(filled_ledger: CommittingLedger, workspace: Workspace) -> None:
    """Keeps the older backup complete and removes the partial new one."""
    copy = workspace.folder / "copy.db"
    assert workspace.run_in_process("ledger", "backup", str(filled_ledger.path), "copy.db").exit_code == 0
    old = copy.read_bytes()
    script = (
        "import resource, sys; from enrich.cli import run_command; sys.dont_write_bytecode = True; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        f"sys.exit(run_command(['ledger', 'backup', {str(filled_ledger.path)!r}, {str(copy)!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=False)

    assert result.returncode == 5
    assert "copy.db: the copy cannot be written" in result.stderr
    assert copy.read_bytes() == old
    assert [path.name for path in workspace.folder.iterdir() if "copy" in path.name] == ["copy.db"]


def test_price_above_maximum_is_sound(tmp_path: Path) -> None:
    """A price above the announced maximum is no problem of the ledger."""
    ledger = CommittingLedger.open(tmp_path / "ledger.db").start_and_enroll(1, cap=MAX_PRICE)
    attempt = ledger.claim().attempt_id
    ledger.commit(transitions.record_accepted, [(attempt, "t", ledger.now)], BINDING)
    ledger.settle(attempt, replace(NO_MATCH, credits=MAX_PRICE * 3))

    assert check_ledger(ledger.path).problems == []
    ledger.wrapped.close()

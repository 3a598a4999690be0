"""`enrich ledger`: a check tells what is wrong with a ledger and nothing else; a copy is whole though a run goes on."""

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
from hypothesis.stateful import invariant, run_state_machine_as_test

from enrich.errors import Refused
from enrich.model import State
from enrich.store import schema
from enrich.store.database import Database
from enrich.store.ledger import Ledger
from enrich.store.records import INVARIANTS, Findings, Records, check
from enrich.surroundings import Options
from tests.books import BOUND, COST, FREE_FAILURE, MISSED, PRICE, Books
from tests.cases import examples, first_quick
from tests.harness import BOTH_IN_TIME, HASTY, Api, Done, Office, kill, people, serving, until
from tests.postgres import Postgres
from tests.test_ledger_stateful import Machine, MachineOnServer

#: One way to break each invariant of the ledger that `night` makes.
BREAKS = {
    "request whose state is not that of its newest attempt": "UPDATE requests SET state = 'pending' WHERE id = 1",
    "request whose newest attempt or answer is another request's": "UPDATE requests SET answer_id = 1 WHERE id = 2",
    "request with two attempts at the API at once": (
        "INSERT INTO attempts (request_id, execution_id, came_from, state, claimed_ms, reserved) "
        "VALUES (5, 1, 'pending', 'submitting', 1, 0)"
    ),
    "attempt at the API that its request does not wait for": (
        "UPDATE requests SET attempt_id = NULL, state = 'pending' WHERE id = 3"
    ),
    "answer that is not the newest that was found": "UPDATE requests SET answer_id = NULL WHERE id = 1",
    "attempt that was answered without an answer": "UPDATE attempts SET answer = NULL WHERE state = 'found'",
    "task without its id": "UPDATE attempts SET task_id = NULL WHERE state = 'submitted'",
    "row that refers to one that is not there": "DELETE FROM calls",
    "execution that has reserved less than nothing": "UPDATE executions SET reserved = -1",
    "execution that has not set aside what is at the API": "UPDATE executions SET reserved = 1",
    "execution whose spending is not the sum of what it settled": "UPDATE executions SET spent = spent + 1",
    "execution that submitted another number than it counted": "UPDATE executions SET submitted = submitted - 1",
    "execution that bought for more than its cap": "UPDATE executions SET cap = 3",
    "bundle that is not what its attempts say": "UPDATE bundles SET size = 2",
    "row of a bundle with a price of its own": "UPDATE attempts SET credits = 1 WHERE place = 1",
}


@pytest.fixture
def night(books: Books) -> Books:
    """Make a ledger with requests in many states: found, missed, at the API, in doubt, on the wire, failed, waiting."""
    books.begin(1, 2, 3, 4, 5, 6, 7, 8, 9, cap=100)
    books.settle(books.submit("a"))
    books.settle(books.submit("b"), MISSED)
    books.submit("c")
    books.do(Ledger.doubt, [(books.claim().attempt_id, "reset", books.now, None)])
    books.claim()
    books.do(Ledger.rejected, [(books.claim().attempt_id, "company: Bad.", books.now)])
    books.settle(books.submit("d"), FREE_FAILURE)
    books.do(Ledger.refused, [(books.claim().attempt_id, "429", books.now)])
    # The last three as one task: it waits again, and is asked with two that are new.
    books.settle_bundle(books.submit_bundle(3), MISSED, credits_=COST)
    books.ledger.close()
    return books


def sound(office: Office, *place: str) -> Done:
    """Expect that the job's ledger (or another) is sound."""
    done = office.command("ledger", "check", *(place or ("job.yaml",)), "--json")
    assert (done.code, done.receipt["problems"]) == (0, [])
    return done


# Check


def test_a_sound_ledger_is_told_with_its_counts(api: Api, office: Office) -> None:
    """For people one line, for programs one object; a job's ledger is found through the job."""
    office.write_leads(people(5))
    office.run(api)

    line = office.command("ledger", "check", "job.yaml")
    told = office.command("ledger", "check", ".enrich/job.db", "--json")

    assert (line.code, line.stdout, line.stderr) == (0, "ok: 5 requests, 5 attempts, 1 executions\n", "")
    assert told.receipt == {
        "exit_code": 0,
        "ledger": ".enrich/job.db",
        "problems": [],
        "requests": 5,
        "attempts": 5,
        "executions": 1,
    }


def test_the_ledger_of_the_sandbox_and_any_other_are_checked_too(office: Office) -> None:
    """`--sandbox` and `--ledger` mean what they mean elsewhere, and go with a job."""
    office.write_leads(people(2))
    Ledger(office.folder / ".enrich" / "job.sandbox.db").close()
    Ledger(office.folder / "other.db").close()

    sandbox = office.command("ledger", "check", "job.yaml", "--sandbox", "--json")
    other = office.command("ledger", "check", "job.yaml", "--ledger", "other.db", "--json")
    twice = office.command("ledger", "check", "other.db", "--sandbox")

    assert sandbox.receipt["ledger"].endswith("job.sandbox.db")
    assert other.receipt["ledger"].endswith("other.db")
    assert (sandbox.code, other.code, twice.code) == (0, 0, 2)


def test_a_check_imports_nothing_that_is_slow(office: Office) -> None:
    """Who looks into a ledger need not wait for polars."""
    Ledger(office.folder / "other.db").close()
    process = office.start("ledger", "check", "other.db", PYTHONPROFILEIMPORTTIME="1")
    out, err = process.communicate(timeout=30)

    assert (process.returncode, out) == (0, "ok: 0 requests, 0 attempts, 0 executions\n")
    assert "polars" not in err


def test_a_ledger_that_is_not_there_is_told(office: Office) -> None:
    """It is not made by looking."""
    done = office.command("ledger", "check", "job.yaml", "--json")

    assert (done.code, done.receipt["exit_code"]) == (5, 5)
    assert "there is no such ledger" in done.stderr
    assert not office.ledger_path.exists()


@pytest.mark.parametrize("where", BOTH_IN_TIME)
def test_a_mixed_night_is_sound(night: Books) -> None:
    """Every state that a request can have holds the invariants."""
    assert check(night.place) == Findings([], requests=9, attempts=11, executions=1)


@pytest.mark.parametrize("where", BOTH_IN_TIME)
@pytest.mark.parametrize("broken", INVARIANTS)
def test_what_is_broken_is_told(night: Books, office: Office, where: str, broken: str) -> None:
    """Each invariant, violated by hand, is named, and the way out with it."""
    if where == "server" and broken == "row that refers to one that is not there":
        pytest.skip("a server does not let it come to that")
    night.all(BREAKS[broken])

    done = office.command("ledger", "check", str(night.place))

    assert done.code == 5
    assert any(line.endswith(f"times: {broken}") for line in done.stdout.splitlines()), done.stdout
    assert "not sound" in done.stderr
    assert "hint: restore a backup" in done.stderr


def test_what_a_cap_did_not_buy_does_not_break_it(tmp_path: Path) -> None:
    """Tasks of an earlier execution settle in this one, beyond its cap: that is no problem of the ledger."""
    books = Books.open(tmp_path / "ledger.db").begin(1, 2, 3)
    left = [books.submit(name) for name in "abc"]
    books.start(cap=1)
    for attempt in left:
        books.settle(attempt)

    assert check(books.path).problems == []
    books.ledger.close()


def test_an_older_ledger_can_be_copied_before_it_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way back to the older program is a copy that was made before."""
    office = Office(tmp_path)
    office.write_job()
    office.ledger_path.parent.mkdir()
    Database(office.ledger_path).close()
    monkeypatch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, "CREATE TABLE remarks (x INTEGER) STRICT"])

    done = office.command("ledger", "backup", "job.yaml", "copy.db")

    assert done.code == 0, done.stderr
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("PRAGMA user_version").fetchone() == (1,)


def test_a_retry_that_is_refused_leaves_a_sound_ledger(tmp_path: Path) -> None:
    """The request stands where it stood, with the attempt before; what was given up has its doubt on record."""
    books = Books.open(tmp_path / "ledger.db").begin(1, 2)
    for _ in range(2):
        books.do(Ledger.doubt, [(books.claim().attempt_id, "reset", books.now, None)])
    books.enroll((1,), retry={State.IN_DOUBT})
    books.do(Ledger.refused, [(books.claim().attempt_id, "429", books.now)])
    assert check(books.path).problems == []
    with books.ledger.transaction():
        books.ledger._db.execute("UPDATE requests SET state = 'failed' WHERE state = 'in_doubt'")

    assert check(books.path).problems == []
    books.enroll((1, 2), retry={State.FAILED})
    books.submit("later")
    books.do(Ledger.refused, [(books.claim().attempt_id, "429", books.now)])
    assert check(books.path).problems == []
    books.ledger.close()


class Checked(Machine):
    """The model of the ledger, with a check after every step."""

    @invariant()
    def the_check_finds_nothing(self) -> None:
        """Whatever happened, it is sound."""
        assert check(self.books.place).problems == []


class CheckedOnServer(Checked, MachineOnServer):
    """The same, with the ledger on a server."""


@pytest.mark.long
def test_the_check_finds_nothing_on_a_server(postgres: Postgres) -> None:
    """Whatever happened there, it is sound."""
    MachineOnServer.server = postgres
    run_state_machine_as_test(
        CheckedOnServer, settings=settings(TestChecked.settings, max_examples=examples(4), stateful_step_count=15)
    )


TestChecked = Checked.TestCase
TestChecked.settings = settings(
    max_examples=examples(12),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


@pytest.mark.long
def test_a_killed_run_leaves_a_sound_ledger(tmp_path: Path, office: Office) -> None:
    """Killed in the thick of it and looked at before and after the next run."""
    office.write_leads(people(80))
    with serving(tmp_path / "api.db", latency="uniform(0.05,0.4)") as api:
        process = office.start("run", "job.yaml", api=api)
        try:
            until(lambda: api.audit()["requests"].get("run", 0) >= 40)
        finally:
            kill(process)
        sound(office)
        office.run(api)

    assert sound(office).receipt["executions"] == 2


def test_a_night_with_faults_leaves_a_sound_ledger(tmp_path: Path, office: Office) -> None:
    """Doubts, refusals, failures, free failures, a cap; then retries and a refresh of all that is old."""
    office.write_leads(people(30))
    office.write_job(limits="{max_credits: 80}")
    with serving(tmp_path / "api.db", failure_rate=0.3, free_failures=0.5) as api:
        for fault in ("no-task-id", "reset-after", "reset-before", "html-200", "lost-task"):
            api.fault(fault, 2)
        api.fault("rate-limit", 2, "post")
        office.run(api, timing=HASTY)
        sound(office)
        api.fault("rate-limit", 3, "post")
        office.write_job(policy="{refresh: {found: 1s, not_found: 1s}}")
        everything = Options(retry=frozenset({State.FAILED, State.IN_DOUBT, State.EXPIRED}))
        receipt = office.run(api, everything, HASTY)

    assert receipt.submitted
    assert sound(office).receipt["executions"] == 2


@pytest.mark.parametrize("damage", first_quick(1, ["empty", "cut", "cut to a page", "header", "middle", "schema"]))
@pytest.mark.parametrize("command", first_quick(2, ["check", "backup"]))
def test_a_damaged_file_is_told_and_is_no_bug(office: Office, command: str, damage: str) -> None:
    """Whatever happened to the file: exit 5 and what it is, never a trace."""
    path = office.folder / "ledger.db"
    books = Books.open(path).begin(*range(600))
    for number in range(100):
        books.settle(books.submit(str(number)))
    books.ledger.close()
    damaged(path, damage)

    done = office.command("ledger", command, "ledger.db", *(["copy.db"] if command == "backup" else []))

    if command == "backup" and done.code == 0:  # pages are copied as they are
        assert check(office.folder / "copy.db").problems
        return
    assert done.code == 5, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "ledger" in done.stderr
    if command == "check":
        assert "damaged" in done.stdout
        assert "hint: restore a backup" in done.stderr


def damaged(path: Path, damage: str) -> None:
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
def test_a_copy_made_while_a_run_goes_on_is_whole(tmp_path: Path, office: Office) -> None:
    """Copy after copy, each sound, only for its owner's eyes and a ledger to go on with."""
    office.write_leads(people(150))
    office.write_job(limits="{requests_per_second: 400}")
    copy = office.folder / "copies" / "job.db"
    copy.parent.mkdir()
    requests, codes = [], []
    with serving(tmp_path / "api.db", latency="uniform(0.05,0.3)") as api:
        process = office.start("run", "job.yaml", api=api)
        try:
            until(lambda: api.audit()["requests"].get("run", 0) >= 20)
            while process.poll() is None:
                codes.append(office.command("ledger", "backup", "job.yaml", "copies/job.db").code)
                requests.append(sound(office, "copies/job.db").receipt["attempts"])
        finally:
            kill(process)

    assert process.returncode == 0
    assert set(codes) == {0}
    assert requests == sorted(requests)
    assert 20 <= requests[0] < 150
    assert copy.stat().st_mode & 0o777 == 0o600
    assert list(copy.parent.iterdir()) == [copy]
    with closing(Ledger(copy)) as ledger:
        assert ledger.counts()
    sound(office)


def test_a_restored_copy_goes_on(api: Api, office: Office) -> None:
    """In the ledger's place it is the ledger: what it knows is not bought again."""
    office.write_leads(people(8))
    office.run(api)
    assert office.command("ledger", "backup", "job.yaml", "copy.db").code == 0
    office.ledger_path.unlink()
    (office.folder / "copy.db").rename(office.ledger_path)

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.submitted, receipt.reused) == (0, 0, 8)


def test_an_older_copy_is_replaced(night: Books, tmp_path: Path) -> None:
    """Also when it could be read by all and a killed backup left its part."""
    target = tmp_path / "copy.db"
    with closing(Records(night.place)) as records:
        records.backup(target)
        target.chmod(0o644)
        (tmp_path / ".copy.db.part").write_text("half a fi")
        (tmp_path / ".copy.db.part-journal").write_text("stale")
        records.backup(target)

    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir() if "copy" in path.name) == ["copy.db"]
    assert check(target) == check(night.path)


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("ledger.db", "the ledger itself"),
        ("link.db", "the ledger itself"),
        ("leads.csv", "no copy of a ledger"),
        ("in_use.db", "in use"),
        ("gone.db", "journal of a database that is gone"),
        ("folder", "no file"),
        ("nowhere/copy.db", "cannot be written: No such file"),
        ("leads.csv/copy.db", "cannot be written: Not a directory"),
    ],
)
def test_a_copy_that_cannot_be_is_exit_5(night: Books, tmp_path: Path, target: str, word: str) -> None:
    """The ledger, other files and other ledgers are not replaced; nothing is left behind."""
    (tmp_path / "leads.csv").write_text("First Name,Last Name\n" * 9)
    (tmp_path / "link.db").symlink_to(night.path)
    (tmp_path / "gone.db-wal").write_text("frames")
    (tmp_path / "folder").mkdir()
    Ledger(tmp_path / "in_use.db").close()
    (tmp_path / "in_use.db.lock").touch()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    with closing(Records(night.place)) as records, pytest.raises(Refused, match=word) as refusal:
        records.backup(tmp_path / target)

    assert refusal.value.exit_code == 5
    assert target in refusal.value.message
    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and "ledger.db-" not in path.name}
    assert {path: content for path, content in before.items() if "ledger.db-" not in path.name} == after


def test_a_copy_for_which_there_is_no_room_is_exit_5(night: Books, office: Office) -> None:
    """The older copy stays whole, and no part of the new one is left."""
    copy = office.folder / "copy.db"
    assert office.command("ledger", "backup", str(night.path), "copy.db").code == 0
    old = copy.read_bytes()
    script = (
        "import resource, sys; from enrich.cli import run_command; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        f"sys.exit(run_command(['ledger', 'backup', {str(night.path)!r}, {str(copy)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == 5
    assert "copy.db: the copy cannot be written" in done.stderr
    assert copy.read_bytes() == old
    assert [path.name for path in office.folder.iterdir() if "copy" in path.name] == ["copy.db"]


def test_a_price_above_the_worst_is_no_damage(tmp_path: Path) -> None:
    """An API that charges more than it said breaks its word, not the ledger."""
    books = Books.open(tmp_path / "ledger.db").begin(1, cap=PRICE)
    attempt = books.claim().attempt_id
    books.do(Ledger.accepted, [(attempt, "t", books.now)], BOUND)
    books.settle(attempt, replace(MISSED, credits=PRICE * 3))

    assert check(books.path).problems == []
    books.ledger.close()

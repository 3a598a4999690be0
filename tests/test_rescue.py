"""The ledger under a run: removed, replaced, locked or without room. What was paid for reaches the next run."""

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
from typing import Any

import pytest

from tests.cases import first_quick
from tests.harness import Api, Done, Office, kill, people, serving, until

RUN = ("run", "job.yaml", "--json")
LEADS = 60


@pytest.fixture
def slow_api(tmp_path: Path) -> Iterator[Api]:
    """Serve an API whose tasks take a second."""
    with serving(tmp_path / "api.db", latency="fixed(1)") as api:
        yield api


@pytest.fixture
def office(office: Office) -> Office:
    """Let a run take some seconds for its leads."""
    office.write_leads(people(LEADS))
    office.write_job(limits="{requests_per_second: 25}")
    return office


def ended(process: subprocess.Popen[str]) -> Done:
    """Wait for the end of a run."""
    out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)


def rescued(office: Office) -> list[Path]:
    """Find the rescue files."""
    return sorted(office.folder.rglob("*.rescue*"))


def lines(*files: Path) -> list[dict[str, Any]]:
    """Read rescue files; the last line about an attempt counts."""
    told = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            paid = json.loads(line)
            told[file, paid["attempt"]] = paid
    return list(told.values())


def nothing_lost(office: Office, api: Api, *, doubtful: int = 0) -> None:
    """Expect every charged task in the output, each lead sent once, and a sound ledger."""
    audit = api.audit()
    assert (audit["paid_twice"], audit["accepted_more_than_once"], audit["accepted"]) == (0, 0, LEADS)
    rows = office.output()
    assert [row["First Name"] for row in rows] == [f"First{number}" for number in range(LEADS)]
    assert sum(row["enrich_status"] == "in_doubt" for row in rows) == doubtful
    assert not {"pending", "failed", "expired"} & {row["enrich_status"] for row in rows}
    tasks = {row["First Name"]: row["enrich_task_id"] for row in rows}
    for run in audit["runs"]:
        assert tasks[run["params"]["first_name"]] in (*run["task_ids"], "")
    assert office.command("ledger", "check", "job.yaml").stdout.startswith("ok")


def removed(office: Office) -> None:
    """Remove the database alone."""
    office.ledger_path.unlink()


def removed_journal(office: Office) -> None:
    """Remove what was written since the last checkpoint."""
    office.ledger_path.with_name("job.db-wal").unlink()


def removed_shared_memory(office: Office) -> None:
    """Remove the file by which connections agree on the journal."""
    office.ledger_path.with_name("job.db-shm").unlink()


def removed_folder(office: Office) -> None:
    """Remove the ledger with its folder."""
    shutil.rmtree(office.ledger_path.parent)


def moved_folder(office: Office) -> None:
    """Rename the ledger's folder."""
    office.ledger_path.parent.rename(office.folder / "elsewhere")


def replaced(office: Office) -> None:
    """Put an older copy in the ledger's place."""
    shutil.copy(office.ledger_path, office.folder / "old.db")
    (office.folder / "old.db").replace(office.ledger_path)
    for end in ("-wal", "-shm"):
        office.ledger_path.with_name(f"job.db{end}").unlink()


def linked_elsewhere(office: Office) -> None:
    """Put a link to another file in the ledger's place."""
    office.ledger_path.unlink()
    other = office.folder / "other"
    other.mkdir()
    office.ledger_path.symlink_to(other / "job.db")
    shutil.copy(office.folder / "leads.csv", other / "job.db")


GONE = [removed, removed_folder, moved_folder]
SLOWER = [removed_journal, removed_shared_memory, replaced]


@pytest.mark.parametrize("how", first_quick(1, [*GONE, *(pytest.param(how, marks=pytest.mark.long) for how in SLOWER)]))
def test_a_ledger_that_is_gone_stops_the_run_and_nothing_paid_is_lost(
    slow_api: Api, office: Office, how: Callable[[Office], None]
) -> None:
    """Exit 1, nothing more is sent; the next run takes in the rescue file and pays for nothing again."""
    slow_api.fault("slow", 200, "post", seconds=0.3)
    process = office.start(*RUN, api=slow_api)
    until(lambda: slow_api.audit()["accepted"] >= 20)

    how(office)
    done = ended(process)

    assert done.code == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "removed or replaced" in done.stderr
    assert "hint: put the ledger back" in done.stderr
    assert done.receipt["exit_code"] == 1
    accepted = slow_api.audit()["accepted"]
    assert accepted < LEADS
    assert not (office.folder / "out.csv").exists()
    (file,) = rescued(office)
    assert file.name in done.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    known = lines(file)
    assert {line["task_id"] for line in known if line.get("task_id")} == {
        task for run in slow_api.audit()["runs"] for task in run["task_ids"]
    }
    slow_api.heal()

    again = office.enrich(*RUN, "--new-ledger", api=slow_api)

    assert again.code == 0, again.stderr
    assert any(file.name in note for note in again.receipt["notes"])
    assert not rescued(office)
    nothing_lost(office, slow_api)


@pytest.mark.long
def test_a_ledger_that_is_put_back_takes_in_what_it_lacks(slow_api: Api, office: Office) -> None:
    """Taking in what it knows already changes nothing."""
    process = office.start(*RUN, api=slow_api)
    until(lambda: slow_api.audit()["accepted"] >= 20)
    moved_folder(office)
    assert ended(process).code == 1
    (office.folder / "elsewhere").rename(office.ledger_path.parent)

    again = office.enrich(*RUN, api=slow_api)

    assert again.code == 0, again.stderr
    assert not rescued(office)
    nothing_lost(office, slow_api)


@pytest.mark.long
@pytest.mark.parametrize("another", [False, True])
def test_a_lock_file_that_is_removed_ends_the_run_in_words(slow_api: Api, office: Office, *, another: bool) -> None:
    """No assertion; a run that begins meanwhile pays for nothing twice."""
    slow_api.fault("slow", 200, "post", seconds=0.3)
    process = office.start(*RUN, api=slow_api)
    until(lambda: slow_api.audit()["accepted"] >= 20)

    office.ledger_path.with_name("job.db.lock").unlink()
    second = office.start(*RUN, api=slow_api) if another else None
    done = ended(process)

    assert done.code == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "job.db.lock: the lock file was removed or replaced" in done.stderr
    if second is not None:
        assert ended(second).code in (0, 14)
    slow_api.heal()
    again = office.enrich(*RUN, api=slow_api)
    assert again.code == 0, again.stderr
    assert not rescued(office)
    nothing_lost(office, slow_api)


@pytest.mark.long
def test_a_foreign_lock_is_waited_for(slow_api: Api, office: Office) -> None:
    """Nothing is sent meanwhile, the person is told, and the run goes on when it is released."""
    process = office.start(*RUN, api=slow_api)
    until(lambda: slow_api.audit()["accepted"] >= 20)
    with closing(sqlite3.connect(office.ledger_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        until(lambda: len({slow_api.audit()["accepted"] for _ in range(30)}) == 1)
        before = slow_api.audit()["accepted"]
        assert process.poll() is None
        other.execute("ROLLBACK")
    done = ended(process)

    assert done.code == 0, done.stderr
    assert before < LEADS
    nothing_lost(office, slow_api)


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGTERM, None])
def test_a_foreign_lock_does_not_hold_up_the_end(slow_api: Api, office: Office, end: signal.Signals | None) -> None:
    """A signal and --max-time wait some seconds; the task ids go into the rescue file."""
    slow_api.fault("slow", 200, "post", seconds=0.5)
    more = () if end else ("--max-time", "4s")
    process = office.start(*RUN, *more, api=slow_api)
    until(lambda: slow_api.audit()["accepted"] >= 10)
    with closing(sqlite3.connect(office.ledger_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        if end:
            process.send_signal(end)
        done = ended(process)
        other.execute("ROLLBACK")

    assert done.code == 1, done.stderr
    assert "another program has locked it" in done.stderr
    assert "Traceback" not in done.stderr
    slow_api.heal()
    assert office.enrich(*RUN, api=slow_api).code == 0
    assert not rescued(office)
    nothing_lost(office, slow_api)


@pytest.mark.long
def test_a_full_disk_loses_no_task(api: Api, office: Office) -> None:
    """The reserved room takes the task ids of all POSTs on the wire."""
    office.write_job()
    done = office.enrich(*RUN, api=api, room=150_000)

    assert done.code == 1, done.stderr
    assert "the ledger cannot be written" in done.stderr
    assert "make room" in done.stderr
    again = office.enrich(*RUN, api=api)
    assert again.code == 0, again.stderr
    nothing_lost(office, api)


@pytest.mark.long
def test_a_run_that_ends_well_leaves_no_file(api: Api, office: Office) -> None:
    """Neither the reserved room nor a rescue file, also after a kill and another run."""
    process = office.start(*RUN, api=api)
    until(lambda: api.audit()["accepted"] >= 5)
    kill(process)
    assert office.enrich(*RUN, api=api).code in (0, 14)

    assert {path.name for path in office.ledger_path.parent.iterdir()} == {"job.db", "job.db.lock"}

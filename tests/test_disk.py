"""The disk under a run: full, read-only, damaged, gone. Told, never guessed; nothing is sent that is not remembered."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from enrich.errors import Refused
from enrich.store.ledger import Ledger
from enrich.store.records import Records
from tests.books import Books
from tests.cases import first_quick
from tests.harness import Api, Done, Office, people, serving, until

OLD = "the output of an older night\n"
ON_THE_WIRE = 64  # the most that may be in doubt when the ledger can't remember any more


def cramped(office: Office, api: Api, room: int, *arguments: str) -> Done:
    """Run the program where no file grows beyond `room` bytes, as on a full disk."""
    return office.enrich(*arguments, api=api, room=room)


def told(done: Done, code: int, *words: str) -> dict[str, Any]:
    """Expect an exit: its code here and in the JSON object, these words on stderr, a hint, no trace."""
    assert done.code == code, done.stderr
    assert done.receipt["exit_code"] == code
    assert "Traceback" not in done.stderr
    for word in (*words, "hint: "):
        assert word in done.stderr
    return done.receipt


def remembered(office: Office) -> int:
    """Count the tasks whose id the ledger has."""
    with closing(sqlite3.connect(office.ledger_path)) as db:
        count: int = db.execute("SELECT count(*) FROM attempts WHERE task_id IS NOT NULL").fetchone()[0]
    return count


def goes_on(office: Office, api: Api, leads: int) -> None:
    """Run again where there is room: every lead is answered or in doubt, and nothing was bought twice."""
    receipt = office.run(api)
    audit = api.audit()
    rows = office.output()
    assert receipt.exit_code in (0, 14)
    assert (receipt.pending, len(rows)) == (0, leads)
    assert (receipt.in_doubt or 0) <= ON_THE_WIRE
    assert (audit["paid_twice"], audit["accepted_more_than_once"]) == (0, 0)
    told_tasks = {row["enrich_task_id"] for row in rows}
    doubtful = {row["First Name"] for row in rows if row["enrich_status"] == "in_doubt"}
    for run in audit["runs"]:
        assert run["params"]["first_name"] in doubtful or set(run["task_ids"]) <= told_tasks
    assert office.command("ledger", "check", "job.yaml").code == 0


# Full


@pytest.mark.long
def test_a_disk_that_fills_up_in_the_middle_is_exit_1(api: Api, office: Office) -> None:
    """Once the ledger can't remember, nothing is sent any more; with room again the run goes on."""
    office.write_leads(people(150))
    (office.folder / "out.csv").write_text(OLD)

    done = cramped(office, api, 150_000, "run", "job.yaml", "--json")

    told(done, 1, "the ledger cannot be written", "make room")
    audit = api.audit()
    assert 0 < audit["accepted"] < 150
    assert audit["accepted"] - remembered(office) <= ON_THE_WIRE
    assert (office.folder / "out.csv").read_text() == OLD
    goes_on(office, api, 150)


@pytest.mark.long
def test_a_disk_that_is_full_from_the_start_costs_nothing(api: Api, office: Office) -> None:
    """No ledger can be made: refused before anything is sent, and no half of one stays in the way."""
    office.write_leads(people(5))

    done = cramped(office, api, 8_000, "run", "job.yaml", "--json")

    told(done, 5, "job.db: the ledger cannot be opened")
    assert api.audit()["accepted"] == 0
    goes_on(office, api, 5)


@pytest.mark.parametrize("name", ["out.csv", pytest.param("out.parquet", marks=pytest.mark.long)])
def test_no_room_for_the_output_keeps_the_old_one_and_the_answers(api: Api, office: Office, name: str) -> None:
    """Told with the way out; `collect` writes it without paying when there is room."""
    # Room that the ledger's journal never needs, however many commits a slow machine makes.
    room = 3_000_000
    leads = [[*lead[:4], random.Random(number).randbytes(4_000).hex()] for number, lead in enumerate(people(10) * 100)]
    office.write_leads(leads)
    office.write_job(output=name)
    (office.folder / name).write_text(OLD)

    done = cramped(office, api, room, "run", "job.yaml", "--json")

    told(done, 1, f"{name}: the output cannot be written", "enrich collect")
    assert (office.folder / name).read_text() == OLD
    assert not list(office.folder.glob(".*part*"))
    assert api.audit()["accepted"] == remembered(office) == 10
    assert office.command("collect", "job.yaml").code == 0
    assert (office.folder / name).stat().st_size > room
    assert api.audit()["accepted"] == 10


# Read-only


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_ledger_that_cannot_be_written_is_exit_5(api: Api, office: Office, what: str) -> None:
    """Seen before anything is sent."""
    office.write_leads(people(3))
    Ledger(office.ledger_path).close()
    place, mode = (office.ledger_path, 0o400) if what == "file" else (office.ledger_path.parent, 0o500)
    place.chmod(mode)

    done = office.command("run", "job.yaml", "--json", api=api)

    place.chmod(0o700)
    assert (done.code, done.receipt["exit_code"]) == (5, 5)
    assert "job.db" in done.stderr
    assert api.audit()["accepted"] == 0


def test_a_ledger_whose_journal_cannot_be_written_is_exit_5(api: Api, office: Office) -> None:
    """What binds root as well: a folder in the journal's place."""
    office.write_leads(people(3))
    Ledger(office.ledger_path).close()
    office.ledger_path.with_name("job.db-wal").mkdir()

    done = office.command("run", "job.yaml", "--json", api=api)

    told(done, 5, "job.db: the ledger cannot be opened")
    assert api.audit()["accepted"] == 0


# Damaged


def cut(content: bytearray) -> None:
    """Lose the second half."""
    del content[len(content) // 2 :]


def emptied(content: bytearray) -> None:
    """Lose everything."""
    content.clear()


def overwritten(content: bytearray) -> None:
    """Find noise where the newest pages were: the file opens all the same."""
    content[-12_288:-4_096] = random.Random(3).randbytes(8_192)


def beheaded(content: bytearray) -> None:
    """Find noise where the header was."""
    content[:100] = random.Random(3).randbytes(100)


@pytest.mark.parametrize("damage", first_quick(1, [cut, emptied, overwritten, beheaded]))
def test_a_damaged_ledger_is_exit_5_and_nothing_is_sent(
    api: Api, office: Office, damage: Callable[[bytearray], None]
) -> None:
    """What it forgot would be paid for again: the way out is a backup, and it works."""
    office.write_leads(people(60))
    office.run(api)
    office.command("ledger", "backup", "job.yaml", "copy.db")
    content = bytearray(office.ledger_path.read_bytes())
    damage(content)
    office.ledger_path.write_bytes(content)

    done = office.command("run", "job.yaml", "--json", api=api)

    told(done, 5, "job.db", "restore a backup")
    assert office.ledger_path.read_bytes() == content
    assert api.audit()["accepted"] == 60
    for path in office.ledger_path.parent.glob("job.db*"):
        path.unlink()
    shutil.copyfile(office.folder / "copy.db", office.ledger_path)
    assert office.run(api).reused == 60
    assert api.audit()["accepted"] == 60


def test_a_backup_restored_beside_an_old_journal_is_refused(tmp_path: Path) -> None:
    """SQLite plays the killed run's journal into it: that is seen before anything is sent."""
    books = Books.open(tmp_path / "job.db").begin(*range(300))
    with closing(Records(books.path)) as records:
        records.backup(tmp_path / "copy.db")
    for number in range(200):
        books.settle(books.submit(str(number)))
    (tmp_path / "restored.db-wal").write_bytes((tmp_path / "job.db-wal").read_bytes())
    (tmp_path / "copy.db").rename(tmp_path / "restored.db")
    books.ledger.close()

    with pytest.raises(Refused, match=r"damaged|malformed") as refusal:
        Ledger(tmp_path / "restored.db")

    assert "-wal" in str(refusal.value.hint)


def test_a_newer_ledger_is_left_as_it_is(api: Api, office: Office) -> None:
    """Refused by every command that opens it, to the byte the same afterwards."""
    office.write_leads(people(2))
    office.run(api)
    with closing(sqlite3.connect(office.ledger_path)) as db:
        db.execute("PRAGMA user_version = 99")
    content = office.ledger_path.read_bytes()

    for command in (["run"], ["collect"], ["status"], ["ledger", "check"]):
        told(office.command(*command, "job.yaml", "--json", api=api), 5, "newer")

    assert office.ledger_path.read_bytes() == content
    assert api.audit()["accepted"] == 2


def test_the_start_of_a_ledger_may_be_killed(api: Api, office: Office) -> None:
    """What a kill left of a ledger that was being made is no ledger, and in nobody's way."""
    office.write_leads(people(2))
    office.ledger_path.parent.mkdir()
    part = office.ledger_path.with_name(".job.db.new")
    part.write_text("half a led")

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.submitted) == (0, 2)
    assert not part.exists()


# Gone


@pytest.mark.long
def test_an_output_folder_that_vanished_loses_no_answer(tmp_path: Path, office: Office) -> None:
    """Removed while the run was at work it is made again; removed afterwards, `collect` makes it again."""
    office.write_leads(people(5))
    office.write_job(output="out/out.csv")
    with serving(tmp_path / "api.db", latency="fixed(1)") as api:
        process = office.start("run", "job.yaml", "--json", api=api)
        until(lambda: api.audit()["accepted"] == 5)
        shutil.rmtree(office.folder / "out")
        out, err = process.communicate(timeout=30)
        done = Done(process.returncode, out, err)

        assert done.code == 0, done.stderr
        written = office.output("out/out.csv")
        assert "pending" not in {row["enrich_status"] for row in written}
        shutil.rmtree(office.folder / "out")
        assert office.command("collect", "job.yaml").code == 0
        assert office.output("out/out.csv") == written
        assert api.audit()["accepted"] == 5

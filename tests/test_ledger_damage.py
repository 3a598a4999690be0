"""A damaged ledger, or a path that can be no ledger: words and exit 5 from every command, and nothing quoted."""

from __future__ import annotations

import os
import random
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.errors import Refused
from enrich.store.ledger import Ledger
from enrich.store.records import check
from tests.books import Books
from tests.cases import first_quick
from tests.harness import Api, Done, Office, people, serving

SECRET = "Zaphira"
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
]
NAMES = [" ".join(command[:2]).removesuffix(" job.yaml") for command in COMMANDS]


@pytest.fixture(scope="module")
def paid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, Office, bytes]]:
    """Make a ledger with thirty leads, and keep its bytes."""
    folder = tmp_path_factory.mktemp("damage")
    office = Office(folder / "office")
    office.folder.mkdir()
    office.write_job()
    office.write_leads([[f"{SECRET}{number}", *lead[1:]] for number, lead in enumerate(people(30))])
    with serving(folder / "api.db") as api:
        assert office.run(api).exit_code == 0
        yield api, office, office.ledger_path.read_bytes()


def put(office: Office, content: bytes) -> None:
    """Put other bytes in the ledger's place, and nothing beside it."""
    shutil.rmtree(office.ledger_path.parent)
    office.ledger_path.parent.mkdir()
    office.ledger_path.write_bytes(content)
    for name in ("other.db", "copy.db"):
        (office.folder / name).unlink(missing_ok=True)


def in_words(done: Done, *codes: int) -> None:
    """Expect one of these exits, without a trace and without a word of the content."""
    assert "Traceback" not in done.stderr
    assert done.code in codes, done.stderr
    if done.code:
        assert SECRET not in done.stderr + done.stdout
    if done.code == 5 and "forgotten" not in done.stderr:
        assert "damaged" in done.stderr + done.stdout, done.stderr


def changed(path: Path, *statements: str) -> None:
    """Write what no program of ours would."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            db.execute(statement)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@pytest.mark.parametrize("command", first_quick(2, COMMANDS), ids=NAMES)
@pytest.mark.parametrize("lost", [1, 4095, 4097, 40_000])
def test_a_file_that_is_cut_off_is_damaged(paid: tuple[Api, Office, bytes], command: list[str], lost: int) -> None:
    """Whatever is missing at its end, by every command."""
    api, office, content = paid
    put(office, content[:-lost])

    in_words(office.command(*command, api=api), 5)


@pytest.mark.parametrize("command", first_quick(2, COMMANDS, single=True), ids=NAMES)
def test_bytes_that_are_overwritten_are_damage(paid: tuple[Api, Office, bytes], command: list[str]) -> None:
    """Anywhere, also in the pages of the schema: damage is told where it is seen, and nothing is quoted."""
    api, office, content = paid
    chance = random.Random(len(command[0]))
    for start, length in [
        (0, 100),
        (20, 4),
        (150, 300),
        *((chance.randrange(len(content) - 400), 300) for _ in range(6)),
    ]:
        put(office, content[:start] + chance.randbytes(length) + content[start + length :])

        in_words(office.command(*command, api=api), 5, 0)


@pytest.mark.parametrize("command", first_quick(2, COMMANDS), ids=NAMES)
@pytest.mark.parametrize(
    "statement",
    [
        f"UPDATE requests SET params = CAST(x'7b22{SECRET.encode().hex()}ff223a317d' AS TEXT)",
        f"UPDATE attempts SET answer = '{{\"{SECRET}'",
        f"UPDATE attempts SET provider = CAST(x'{SECRET.encode().hex()}ff' AS TEXT)",
        f"UPDATE executions SET paths = '[\"{SECRET}'",
        f"UPDATE executions SET receipt = '{SECRET}'",
        f"UPDATE waterfalls SET description = '{{{SECRET}'",
        f"UPDATE calls SET canonical = '{{{SECRET}'",
    ],
    ids=["params", "answer", "provider", "paths", "receipt", "description", "call"],
)
def test_a_text_that_cannot_be_read_is_damage(
    paid: tuple[Api, Office, bytes], command: list[str], statement: str
) -> None:
    """No trace, and nothing of the text is shown."""
    api, office, content = paid
    put(office, content)
    changed(office.ledger_path, statement)

    in_words(office.command(*command, api=api), 5, 0)


def test_a_check_names_column_and_row(paid: tuple[Api, Office, bytes]) -> None:
    """Each text is decoded, and each JSON parsed."""
    api, office, content = paid
    put(office, content)
    changed(
        office.ledger_path,
        "UPDATE requests SET params = CAST(x'7b22ff' AS TEXT) WHERE id = 3",
        f"UPDATE attempts SET answer = '{SECRET}' WHERE id = 5",
        "UPDATE facts SET value = CAST(x'ff' AS TEXT) WHERE name = 'workspace'",
    )

    done = office.command("ledger", "check", "job.yaml", api=api)

    assert done.code == 5
    assert "requests.params, id 3: not UTF-8" in done.stdout
    assert "attempts.answer, id 5: not JSON" in done.stdout
    assert "facts.value, row 2: not UTF-8" in done.stdout
    assert SECRET not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a ledger of a few pages."""
    books = Books.open(tmp_path_factory.mktemp("sound") / "sound.db").begin(*range(30))
    for number in range(20):
        books.settle(books.submit(str(number)))
    books.ledger.close()
    return books.path


@given(share=st.floats(0, 1, exclude_max=True))
def test_no_cut_is_taken_for_a_ledger(sound: Path, tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    """A file of any shorter length is refused as damaged, by those who write and those who read."""
    content = sound.read_bytes()
    length = int(share * len(content))
    path = tmp_path_factory.mktemp("cut") / "job.db"
    for read_only in (True, False):
        path.write_bytes(content[:length])
        with pytest.raises(Refused, match="damaged"):
            Ledger(path, read_only=read_only).close()
    assert check(path).problems


@given(start=st.floats(0, 1), noise=st.binary(min_size=1, max_size=300))
def test_a_check_never_fails_and_never_quotes(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, start: float, noise: bytes
) -> None:
    """Wherever bytes are overwritten, the check ends with findings in our own words."""
    content = sound.read_bytes()
    at = int(start * (len(content) - len(noise)))
    path = tmp_path_factory.mktemp("noise") / "job.db"
    path.write_bytes(content[:at] + noise + content[at + len(noise) :])

    try:
        found = check(path)
    except Refused as refused:
        assert refused.message.startswith(str(path))  # noqa: PT017 - both ways out are right
        return
    assert all("example" not in problem and "F1" not in problem for problem in found.problems)


# What can be no ledger


def fifo(path: Path) -> None:
    """Make a named pipe that nothing writes to."""
    os.mkfifo(path)


def listening(path: Path) -> None:
    """Make a socket."""
    here = Path.cwd()
    os.chdir(path.parent)
    with closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(path.name)
    os.chdir(here)


def dangling(path: Path) -> None:
    """Make a link to a file that is not there."""
    path.symlink_to(path.with_name("gone.db"))


def loop(path: Path) -> None:
    """Make a link to itself."""
    path.symlink_to(path)


def device(path: Path) -> None:
    """Make a link to a device."""
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("command", first_quick(2, COMMANDS), ids=NAMES)
@pytest.mark.parametrize("make", [fifo, listening, dangling, loop, device, Path.mkdir])
def test_what_can_be_no_ledger_is_refused(
    api: Api, office: Office, make: Callable[[Path], None], command: list[str]
) -> None:
    """At once, with the reason; no ledger is made in another place."""
    office.write_leads(people(3))
    office.ledger_path.parent.mkdir()
    make(office.ledger_path)

    done = office.command(*command, api=api)

    assert done.code == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert str(office.ledger_path) in done.stderr
    assert not office.ledger_path.with_name("gone.db").exists()
    assert api.audit()["accepted"] == 0


def test_a_link_to_a_ledger_is_that_ledger(api: Api, office: Office) -> None:
    """It is used where it is, its lock too, so that no other run gets at it by another name."""
    office.write_leads(people(3))
    assert office.run(api).exit_code == 0
    (office.folder / "link.db").symlink_to(office.ledger_path)

    done = office.command("run", "job.yaml", "--ledger", "link.db", "--json", api=api)

    assert done.code == 0, done.stderr
    assert done.receipt["reused"] == 3
    assert not (office.folder / "link.db.lock").exists()

"""`enrich ledger copy`: from a file to a server and back, all of it or nothing, and both say the same."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enrich.errors import LedgerLocked, Refused
from enrich.place import LedgerPlace, Postgres, locate_ledger
from enrich.privacy import key_path, make_key
from enrich.store import copying
from enrich.store.copying import TABLES, copy
from enrich.store.database import exists
from enrich.store.ledger import Ledger
from enrich.store.lock import hold
from enrich.store.records import check
from tests import postgres as servers
from tests.books import CALL, COST, FREE_FAILURE, MISSED, Books, ask
from tests.cases import examples
from tests.harness import BOTH_IN_TIME, Api, Office, people


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Copy from both kinds of ledgers."""
    return str(request.param)


@pytest.fixture
def server(postgres: servers.Postgres, tmp_path: Path) -> LedgerPlace:
    """Name a place on the server where nothing is."""
    return locate_ledger(tmp_path, postgres.url(), tmp_path / "keys")


@pytest.fixture
def night(books: Books) -> Books:
    """Make a ledger with something in every table."""
    books.begin(1, 2, 3, 4, 5, 6, 7, 8, 9, cap=100)
    books.settle(books.submit("a"))
    books.settle(books.submit("b"), MISSED)
    books.submit("c")
    books.do(Ledger.doubt, [(books.claim().attempt_id, "reset", books.now, None)])
    books.do(Ledger.rejected, [(books.claim().attempt_id, "company: Bad.", books.now)])
    books.settle(books.submit("d"), FREE_FAILURE)
    books.settle_bundle(books.submit_bundle(3), MISSED, credits_=COST)
    books.do(Ledger.remember_waterfall, "email_getter", {"name": "é"}, [1, 2])
    books.do(Ledger.deliver, "job", [(0, b"key", 1)])
    books.do(Ledger.forget, make_key(books.place), [(2, b"0" * 16, "{}")], books.now)
    books.do(Ledger.remember_latencies, CALL, [(0.5, 3.25), (1e-300, 1 / 3)])
    books.do(Ledger.end_execution, books.execution, 10, {"rows": 9}, books.now)
    return books


def everything(place: LedgerPlace) -> dict[str, list[str]]:
    """Read all that a ledger remembers, in any order."""
    return {table: sorted(map(repr, ask(place, f"SELECT {_columns(place, table)} FROM {table}"))) for table in TABLES}


def _columns(place: LedgerPlace, table: str) -> str:
    if isinstance(place, Path):
        names = ask(place, "SELECT name FROM pragma_table_info(?)", table)
    else:
        names = ask(
            place,
            "SELECT column_name FROM information_schema.columns WHERE table_schema = ? AND table_name = ?",
            place.schema,
            table,
        )
    return ", ".join(sorted(name for (name,) in names if name != "owner_id"))


def test_no_table_is_left_behind(night: Books) -> None:
    """Whoever adds a table says whether it is copied; the night has something in each."""
    if isinstance(night.place, Postgres):
        named = {
            name for (name,) in night.all("SELECT tablename FROM pg_tables WHERE schemaname = ?", night.place.schema)
        }
        named -= {"ledger", "owners", "allowance", "seen", "commits"}
    else:
        named = {name for (name,) in night.all("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert named == set(TABLES)
    assert all(everything(night.place).values())


def test_there_and_back_is_the_same(night: Books, server: LedgerPlace, tmp_path: Path) -> None:
    """Every number, text and key arrives, on the server and in a file again; what was copied stays as it was."""
    before, back = everything(night.place), tmp_path / "back" / "ledger.db"

    there = copy(night.place, server)
    again = copy(server, back)

    assert replace(there, key=None) == replace(again, key=None)
    assert everything(night.place) == everything(server) == everything(back) == before
    assert key_path(night.place).read_bytes() == key_path(server).read_bytes() == key_path(back).read_bytes()
    assert key_path(back).stat().st_mode & 0o777 == 0o600
    assert check(night.place) == check(server) == check(back)


def test_a_copy_is_a_ledger_to_go_on_with(night: Books, server: LedgerPlace, tmp_path: Path) -> None:
    """New requests, attempts and executions get numbers of their own, and what was at the API settles."""
    for target in (server, tmp_path / "copy.db"):
        copy(night.place, target)
        books = Books.open(target)
        (task,) = [task for task in books.ledger.tasks() if task.task_id == "c"]
        books.begin(7, 20, 21)
        books.settle(task.attempts[0])
        books.settle(books.submit("new"))
        books.submit_bundle(1)
        books.ledger.close()
        assert check(target).problems == []


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(st.none() | st.integers() | TEXT, lambda inner: st.lists(inner, max_size=3)).map(json.dumps)
NUMBER = st.integers(-(2**63), 2**63 - 1)


@given(
    facts=st.dictionaries(TEXT.filter(lambda name: "\0" not in name), TEXT | JSON, max_size=4),
    asked=st.lists(TEXT | JSON, max_size=4),
    latencies=st.dictionaries(st.floats(min_value=5e-324, allow_infinity=False), st.floats(5e-324, 1e308), max_size=3),
    hashes=st.sets(st.binary(max_size=20), max_size=4),
    balance=NUMBER,
)
@settings(max_examples=examples(30), suppress_health_check=list(HealthCheck))
@pytest.mark.long
def test_whatever_was_written_is_read_again(
    postgres: servers.Postgres,
    *,
    facts: dict[str, str],
    asked: list[str],
    latencies: dict[float, float],
    hashes: set[bytes],
    balance: int,
) -> None:
    """Signs of all alphabets, JSON with a NUL in it, the largest numbers; a bare NUL becomes what stands for it."""
    with tempfile.TemporaryDirectory() as name:
        first, back = Path(name) / "first.db", Path(name) / "back.db"
        server = locate_ledger(Path(name), postgres.url(), Path(name))
        books = Books.open(first)
        books.begin(*range(len(asked)))
        with books.ledger.transaction():
            db = books.ledger._db
            db.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            db.executemany("UPDATE requests SET params = ? WHERE id = ?", [(it, n) for n, it in enumerate(asked, 1)])
            db.executemany("INSERT INTO forgotten VALUES (?)", [(it,) for it in hashes])
            db.execute("UPDATE executions SET balance_before = ?", (balance,))
            books.ledger.remember_latencies(CALL, latencies.items())
        books.ledger.close()

        assert copy(first, server).digest == copy(server, back).digest

        assert everything(server) == everything(back)
        postgres.drop_schemas()
        plain = {table: [row.replace("\\x00", "\ufffd") for row in rows] for table, rows in everything(first).items()}
        stands = {table: [row.replace("\\x00", "\ufffd") for row in rows] for table, rows in everything(back).items()}
        assert {table: sorted(rows) for table, rows in plain.items()} == {
            table: sorted(rows) for table, rows in stands.items()
        }


def test_nothing_is_replaced(night: Books, server: LedgerPlace, tmp_path: Path) -> None:
    """A ledger in which something stands stays as it is, and so does the key of another."""
    for target in (server, tmp_path / "other.db"):
        books = Books.open(target).begin(1)
        books.ledger.close()
        before = everything(target)
        with pytest.raises(Refused, match="not empty"):
            copy(night.place, target)
        assert everything(target) == before
    taken = tmp_path / "taken.db"
    key_path(taken).write_bytes(b"another")
    with pytest.raises(Refused, match=r"taken\.db\.key: here lies the key of another ledger"):
        copy(night.place, taken)
    assert key_path(taken).read_bytes() == b"another"
    assert not exists(taken)


def test_what_fails_leaves_nothing_and_may_be_tried_again(
    night: Books, server: LedgerPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is there as a whole or not at all."""
    for target in (server, tmp_path / "copy.db"):
        with monkeypatch.context() as broken:
            broken.setattr(copying, "_copy_key", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                copy(night.place, target)
        assert not exists(target)
        copy(night.place, target)
        assert everything(target) == everything(night.place)


@pytest.mark.parametrize("held", ["source", "target"])
def test_a_run_is_not_disturbed(night: Books, server: LedgerPlace, held: str) -> None:
    """While one is at work with either, nothing is copied."""
    with hold(night.place if held == "source" else server, 0), pytest.raises(LedgerLocked):
        copy(night.place, server)


def test_a_ledger_is_not_copied_onto_itself(night: Books) -> None:
    """However it is named."""
    with pytest.raises(Refused, match="the ledger itself"):
        copy(night.place, night.place)


def test_what_is_not_there_is_not_copied(place: LedgerPlace, server: LedgerPlace, tmp_path: Path) -> None:
    """It is told, and no empty copy is made of it."""
    for target in (server, tmp_path / "copy.db"):
        with pytest.raises(Refused, match="no such ledger"):
            copy(place, target)
        assert not exists(target)


def test_what_is_not_sound_is_not_copied(night: Books, server: LedgerPlace) -> None:
    """Equal to what is wrong is wrong, too: it is told, and nothing stays."""
    night.all("UPDATE executions SET spent = spent + 1")
    with pytest.raises(Refused, match="execution whose spending is not the sum"):
        copy(night.place, server)
    assert not exists(server)


def test_a_difference_is_found(night: Books, server: LedgerPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not arrive, or arrives as something else, is no copy."""
    take = copying._New.fill

    def lose(new: copying._New, tables: Mapping[str, tuple[list[str], Iterator[tuple[Any, ...]]]]) -> None:
        take(
            new,
            {
                table: (columns, islice(rows, int(table == "delivered"), None))
                for table, (columns, rows) in tables.items()
            },
        )

    monkeypatch.setattr(copying._New, "fill", lose)
    with pytest.raises(Refused, match="delivered differs"):
        copy(night.place, server)


# The command


def test_a_job_moves_to_a_server_and_buys_nothing_again(api: Api, office: Office, postgres: servers.Postgres) -> None:
    """Its ledger is copied, the job file says so, and the next run uses every answer again; likewise back."""
    office.write_leads(people(6))
    assert office.command("run", "job.yaml", api=api).code == 0
    url = postgres.url()

    there = replace(office, environ=postgres.environ).command("ledger", "copy", "job.yaml", url, "--json")
    moved = replace(office, server=url, environ=postgres.environ)
    moved.write_job()
    ran = moved.run(api)
    back = moved.command("ledger", "copy", "job.yaml", "back.db")

    assert (there.code, back.code) == (0, 0), there.stderr + back.stderr
    assert (there.receipt["to"], there.receipt["key"], there.receipt["rows"]["requests"]) == (url, None, 6)
    assert (ran.reused, ran.submitted) == (6, 0)
    assert back.stdout.startswith("ok: ")
    assert "run no more with the old one" in back.stdout
    assert api.audit()["paid_twice"] == 0


def test_the_key_lies_where_the_job_looks_for_it(
    api: Api, office: Office, postgres: servers.Postgres, tmp_path: Path
) -> None:
    """Whoever was forgotten is not asked about again, from whichever folder the copy was made."""
    office.write_leads(people(3))
    office.run(api)
    assert office.command("forget", "job.yaml", "--match", "First Name=First1", "--yes").code == 0
    url, away = postgres.url(), Office(tmp_path, environ=postgres.environ)

    done = away.command("ledger", "copy", str(office.job_file), url)
    moved = replace(office, server=url, environ=postgres.environ)
    moved.write_job()

    assert done.code == 0, done.stderr
    assert f"is {key_path(moved.place)}" in done.stdout
    ran = moved.run(api)
    assert (ran.reused, ran.submitted) == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("job.yaml", "job.yaml"), 5, "the ledger itself"),
        (("job.yaml", "copy.db"), 5, "no such ledger"),
        (("job.yaml", "mysql://x/y"), 2, "keeps no ledger"),
        (("job.yaml",), 2, "TO"),
        (("nothing.yaml", "copy.db"), 2, "nothing.yaml"),
    ],
)
def test_what_cannot_be_copied_is_told(office: Office, arguments: tuple[str, ...], code: int, word: str) -> None:
    """With the exit code of its kind, never a trace."""
    done = office.command("ledger", "copy", *arguments)

    assert (done.code, word in done.stderr) == (code, True), done.stderr
    assert not (office.folder / "copy.db").exists()

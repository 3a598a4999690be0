"""`enrich ledger copy`: from SQLite to PostgreSQL and back, complete or not at all, with identical contents."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.errors import CommandRefused, LedgerLocked
from enrich.job.locations import LedgerLocation, PostgresLocation, parse_ledger_location
from enrich.ledger import database_copy, decisions, erasure, records, transitions
from enrich.ledger.database import ledger_exists
from enrich.ledger.database_copy import COPIED_TABLES, copy_ledger
from enrich.ledger.erasure import key_path, read_or_make_key
from enrich.ledger.lock import lock_ledger
from enrich.ledger.postgres import PostgresSession
from enrich.ledger.verify import check_ledger
from tests.support import postgres as servers
from tests.support.cases import examples
from tests.support.ledger import CALL, COST, FREE_FAILURE, NO_MATCH, CommittingLedger, run_sql
from tests.support.workspace import SandboxApi, Workspace, both_backends, make_leads

backend = both_backends


@pytest.fixture
def server_location(postgres: servers.PostgresServer, tmp_path: Path) -> LedgerLocation:
    """Return an empty location on the server."""
    return parse_ledger_location(tmp_path, postgres.ledger_url(), tmp_path / "keys")


@pytest.fixture
def filled_ledger(ledger: CommittingLedger) -> CommittingLedger:
    """Make a ledger with rows in every table."""
    ledger.start_and_enroll(1, 2, 3, 4, 5, 6, 7, 8, 9, cap=100)
    ledger.settle(ledger.submit("a"))
    ledger.settle(ledger.submit("b"), NO_MATCH)
    ledger.submit("c")
    ledger.commit(transitions.mark_in_doubt, [(ledger.claim().attempt_id, "reset", ledger.now, None)])
    ledger.commit(transitions.record_rejected, [(ledger.claim().attempt_id, "company: Bad.", ledger.now)])
    ledger.settle(ledger.submit("d"), FREE_FAILURE)
    ledger.settle_bulk(ledger.submit_bulk(3), NO_MATCH, credits_=COST)
    ledger.commit(records.save_description, CALL, {"name": "é"}, [1, 2])
    ledger.commit(records.mark_delivered, "job", [(b"key", "email", records.Delivery(1, "email"))])
    ledger.commit(lambda db: db.execute("INSERT INTO step_rows VALUES (1, -7)"))
    ledger.commit(erasure.forget, read_or_make_key(ledger.location), [(2, b"0" * 16, "{}")], ledger.now)
    ledger.commit(decisions.store_known_batch, "job", range(20_000, 20_003), b"digest", '{"ids":[1,null,2]}')
    ledger.commit(records.save_latencies, CALL, [(0.5, 3.25), (1e-300, 1 / 3)])
    ledger.commit(records.end_execution, ledger.execution, 10, {"rows": 9}, ledger.now)
    return ledger


def table_contents(ledger_location: LedgerLocation) -> dict[str, list[str]]:
    """Read all stored rows, in any order."""
    return {
        table: sorted(map(repr, run_sql(ledger_location, f"SELECT {_columns(ledger_location, table)} FROM {table}")))
        for table in COPIED_TABLES
    }


def _columns(ledger_location: LedgerLocation, table: str) -> str:
    if isinstance(ledger_location, Path):
        names = run_sql(ledger_location, "SELECT name FROM pragma_table_info(?)", table)
    else:
        names = run_sql(
            ledger_location,
            "SELECT column_name FROM information_schema.columns WHERE table_schema = ? AND table_name = ?",
            ledger_location.schema,
            table,
        )
    return ", ".join(sorted(name for (name,) in names if name != "lease_id"))


def test_all_tables_are_covered(filled_ledger: CommittingLedger) -> None:
    """Each table is listed as copied or not, and the test data has rows in each."""
    if isinstance(filled_ledger.location, PostgresLocation):
        named = {
            name
            for (name,) in filled_ledger.query_all(
                "SELECT tablename FROM pg_tables WHERE schemaname = ?", filled_ledger.location.schema
            )
        }
        named -= {"ledger_version", "leases", "seen", "commits"}
    else:
        named = {name for (name,) in filled_ledger.query_all("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert named == set(COPIED_TABLES)
    assert all(table_contents(filled_ledger.location).values())


@pytest.mark.long
def test_copy_roundtrip_is_identical(
    filled_ledger: CommittingLedger, server_location: LedgerLocation, tmp_path: Path
) -> None:
    """Copying to the server and back to a file keeps every number, text and key; the source stays as it was."""
    before, back = table_contents(filled_ledger.location), tmp_path / "back" / "ledger.db"

    to_server = copy_ledger(filled_ledger.location, server_location)
    again = copy_ledger(server_location, back)

    assert replace(to_server, key=None) == replace(again, key=None)
    assert table_contents(filled_ledger.location) == table_contents(server_location) == table_contents(back) == before
    assert (
        key_path(filled_ledger.location).read_bytes()
        == key_path(server_location).read_bytes()
        == key_path(back).read_bytes()
    )
    assert key_path(back).stat().st_mode & 0o777 == 0o600
    assert check_ledger(filled_ledger.location) == check_ledger(server_location) == check_ledger(back)


@pytest.mark.long
def test_copy_can_be_used(filled_ledger: CommittingLedger, server_location: LedgerLocation, tmp_path: Path) -> None:
    """A copy can be used: new rows get new ids, and open tasks settle."""
    for target in (server_location, tmp_path / "copy.db"):
        copy_ledger(filled_ledger.location, target)
        ledger = CommittingLedger.open(target)
        (task,) = [task for task in transitions.submitted_tasks(ledger.wrapped) if task.task_id == "c"]
        ledger.start_and_enroll(7, 20, 21)
        ledger.settle(task.attempts[0])
        ledger.settle(ledger.submit("new"))
        ledger.submit_bulk(1)
        ledger.wrapped.close()
        assert check_ledger(target).problems == []


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(st.none() | st.integers() | TEXT, lambda inner: st.lists(inner, max_size=3)).map(json.dumps)
NUMBER = st.integers(-(2**63), 2**63 - 1)


@given(
    facts=st.dictionaries(TEXT.filter(lambda name: "\0" not in name), TEXT | JSON, max_size=4),
    asked=st.lists(st.dictionaries(TEXT, TEXT, max_size=3).map(json.dumps), max_size=4),
    latencies=st.dictionaries(st.floats(min_value=5e-324, allow_infinity=False), st.floats(5e-324, 1e308), max_size=3),
    hashes=st.sets(st.binary(max_size=20), max_size=4),
    balance=NUMBER,
)
@pytest.mark.timeout(400)
@settings(max_examples=examples(8), suppress_health_check=list(HealthCheck))
@pytest.mark.long
def test_any_values_are_copied(
    postgres: servers.PostgresServer,
    *,
    facts: dict[str, str],
    asked: list[str],
    latencies: dict[float, float],
    hashes: set[bytes],
    balance: int,
) -> None:
    """Any alphabet, JSON with a NUL and the largest numbers are copied; a bare NUL becomes its replacement."""
    with tempfile.TemporaryDirectory() as name:
        first, back = Path(name) / "first.db", Path(name) / "back.db"
        server = parse_ledger_location(Path(name), postgres.ledger_url(), Path(name))
        ledger = CommittingLedger.open(first)
        ledger.start_and_enroll(*range(len(asked)))
        with ledger.wrapped.transaction():
            db = ledger.wrapped.session
            db.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            db.executemany("UPDATE requests SET params = ? WHERE id = ?", [(it, n) for n, it in enumerate(asked, 1)])
            db.executemany("INSERT INTO forgotten VALUES (?)", [(it,) for it in hashes])
            db.execute("UPDATE executions SET balance_before = ?", (balance,))
            records.save_latencies(ledger.wrapped, CALL, latencies.items())
        ledger.wrapped.close()

        assert copy_ledger(first, server).digest == copy_ledger(server, back).digest

        assert table_contents(server) == table_contents(back)
        postgres.drop_schemas()
        plain = {
            table: [row.replace("\\x00", "\ufffd") for row in rows] for table, rows in table_contents(first).items()
        }
        stands = {
            table: [row.replace("\\x00", "\ufffd") for row in rows] for table, rows in table_contents(back).items()
        }
        assert {table: sorted(rows) for table, rows in plain.items()} == {
            table: sorted(rows) for table, rows in stands.items()
        }


@pytest.mark.long
def test_existing_target_is_refused(
    filled_ledger: CommittingLedger, server_location: LedgerLocation, tmp_path: Path
) -> None:
    """A target that contains data or another ledger's key is refused and stays as it was."""
    for target in (server_location, tmp_path / "other.db"):
        ledger = CommittingLedger.open(target).start_and_enroll(1)
        ledger.wrapped.close()
        before = table_contents(target)
        with pytest.raises(CommandRefused, match="not empty"):
            copy_ledger(filled_ledger.location, target)
        assert table_contents(target) == before
    taken = tmp_path / "taken.db"
    key_path(taken).write_bytes(b"another")
    with pytest.raises(CommandRefused, match=r"taken\.db\.key: this is the key of another ledger"):
        copy_ledger(filled_ledger.location, taken)
    assert key_path(taken).read_bytes() == b"another"
    assert not ledger_exists(taken)


@pytest.mark.long
def test_failed_copy_leaves_nothing(
    filled_ledger: CommittingLedger, server_location: LedgerLocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed copy leaves nothing."""
    for target in (server_location, tmp_path / "copy.db"):
        with monkeypatch.context() as broken:
            broken.setattr(database_copy, "_copy_forgotten_key", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                copy_ledger(filled_ledger.location, target)
        assert not ledger_exists(target)
        copy_ledger(filled_ledger.location, target)
        assert table_contents(target) == table_contents(filled_ledger.location)


@pytest.mark.long
@pytest.mark.parametrize("held", ["source", "target"])
def test_copy_refused_during_run(filled_ledger: CommittingLedger, server_location: LedgerLocation, held: str) -> None:
    """While a run uses either ledger, nothing is copied."""
    with lock_ledger(filled_ledger.location if held == "source" else server_location, 0), pytest.raises(LedgerLocked):
        copy_ledger(filled_ledger.location, server_location)


def test_copy_onto_itself_is_refused(filled_ledger: CommittingLedger) -> None:
    """Copying a ledger onto itself is refused, whatever its name."""
    with pytest.raises(CommandRefused, match="the ledger itself"):
        copy_ledger(filled_ledger.location, filled_ledger.location)
    if isinstance(filled_ledger.location, Path):
        other_name = filled_ledger.location.with_name("other.db")
        other_name.symlink_to(filled_ledger.location)
        with pytest.raises(CommandRefused, match="the ledger itself"):
            copy_ledger(filled_ledger.location, other_name)


@pytest.mark.long
def test_missing_source_is_refused(
    ledger_location: LedgerLocation, server_location: LedgerLocation, tmp_path: Path
) -> None:
    """A missing source is an error, and no empty copy is made."""
    for target in (server_location, tmp_path / "copy.db"):
        with pytest.raises(CommandRefused, match="the ledger does not exist"):
            copy_ledger(ledger_location, target)
        assert not ledger_exists(target)


@pytest.mark.long
def test_damaged_source_is_refused(filled_ledger: CommittingLedger, server_location: LedgerLocation) -> None:
    """A damaged source is refused and leaves no copy, although the copy would equal it."""
    filled_ledger.query_all("UPDATE executions SET spent = spent + 1")
    with pytest.raises(CommandRefused, match="run with other spending than the sum"):
        copy_ledger(filled_ledger.location, server_location)
    assert not ledger_exists(server_location)


@pytest.mark.long
def test_differences_are_detected(
    filled_ledger: CommittingLedger, server_location: LedgerLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is missing or different in the copy is detected."""
    load_rows = PostgresSession.load_rows

    def lose_a_row(session: PostgresSession, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        load_rows(session, table, columns, islice(rows, int(table == "delivered"), None))

    monkeypatch.setattr(PostgresSession, "load_rows", lose_a_row)
    with pytest.raises(CommandRefused, match="delivered differs"):
        copy_ledger(filled_ledger.location, server_location)


# The command


@pytest.mark.long
def test_job_moves_to_server_without_resending(
    api: SandboxApi, workspace: Workspace, postgres: servers.PostgresServer
) -> None:
    """A job can move its ledger to a server and back; the next run uses every answer and resends nothing."""
    workspace.write_leads(make_leads(6))
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    url = postgres.ledger_url()

    to_server = dataclasses.replace(workspace, environ=postgres.environ).run_in_process(
        "ledger", "copy", "job.yaml", url, "--json"
    )
    moved = dataclasses.replace(workspace, server_url=url, environ=postgres.environ)
    moved.write_job()
    ran = moved.run_job(api)
    back = moved.run_in_process("ledger", "copy", "job.yaml", "back.db")

    assert (to_server.exit_code, back.exit_code) == (0, 0), to_server.stderr + back.stderr
    assert (to_server.json_output["to"], to_server.json_output["key"], to_server.json_output["rows"]["requests"]) == (
        url,
        None,
        6,
    )
    assert (ran.reused, ran.submitted) == (6, 0)
    assert back.stdout.startswith("ok: ")
    assert "run with the old ledger again" in back.stdout
    assert api.audit()["paid_twice"] == 0


@pytest.mark.long
def test_hash_key_is_copied(
    api: SandboxApi, workspace: Workspace, postgres: servers.PostgresServer, tmp_path: Path
) -> None:
    """Forgotten leads stay forgotten after a copy, whichever folder it was made from."""
    workspace.write_leads(make_leads(3))
    workspace.run_job(api)
    assert workspace.run_in_process("forget", "job.yaml", "--match", "First Name=First1", "--yes").exit_code == 0
    url, away = postgres.ledger_url(), Workspace(tmp_path, environ=postgres.environ)

    result = away.run_in_process("ledger", "copy", str(workspace.job_file), url)
    moved = dataclasses.replace(workspace, server_url=url, environ=postgres.environ)
    moved.write_job()

    assert result.exit_code == 0, result.stderr
    assert f"is {key_path(moved.ledger_location)}" in result.stdout
    ran = moved.run_job(api)
    assert (ran.reused, ran.submitted) == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("job.yaml", "job.yaml"), 5, "the ledger itself"),
        (("job.yaml", "copy.db"), 5, "the ledger does not exist"),
        (("job.yaml", "mysql://x/y"), 2, "cannot be used for a ledger"),
        (("job.yaml",), 2, "TO"),
        (("nothing.yaml", "copy.db"), 2, "nothing.yaml"),
    ],
)
def test_copy_errors_have_exit_codes(workspace: Workspace, arguments: tuple[str, ...], code: int, word: str) -> None:
    """Each error has the exit code of its kind and no traceback."""
    result = workspace.run_in_process("ledger", "copy", *arguments)

    assert (result.exit_code, word in result.stderr) == (code, True), result.stderr
    assert not (workspace.folder / "copy.db").exists()

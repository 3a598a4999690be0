"""A server that is lost, or alive but silent, while a ledger is opened or written."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from enrich.errors import LedgerFailed
from enrich.job.locations import PostgresLocation, parse_ledger_location
from enrich.ledger import enroll, records
from enrich.ledger import postgres as postgres_session
from enrich.ledger.database import Database
from enrich.ledger.postgres import PostgresSession
from enrich.ledger.verify import check_ledger
from enrich.ledger.writer import LedgerWriter
from tests.support.ledger import run_sql
from tests.support.postgres import PostgresServer
from tests.support.workspace import Workspace, kill_process, make_leads, serve_api, wait_until

pytestmark = pytest.mark.long


@pytest.fixture
def ledger_location(postgres: PostgresServer, tmp_path: Path) -> PostgresLocation:
    """Return the location of a new ledger."""
    location = parse_ledger_location(tmp_path, postgres.ledger_url(), tmp_path)
    assert isinstance(location, PostgresLocation)
    Database(location).close()
    return location


@pytest.mark.parametrize("lost_at", ["CREATE TEMP TABLE IF NOT EXISTS unknown_requests", "COMMIT"])
@pytest.mark.parametrize("losses", [1, 2])
def test_connection_lost_while_a_pass_begins(
    ledger_location: PostgresLocation, monkeypatch: pytest.MonkeyPatch, lost_at: str, losses: int
) -> None:
    """A pass whose connection is lost while it begins has its temporary table once the server is back."""
    execute = PostgresSession.execute
    lost: list[str] = []

    def losing_execute(self: PostgresSession, text: str, *values: object) -> object:
        if text.startswith(lost_at) and len(lost) < losses:
            lost.append(text)
            run_sql(ledger_location, "SELECT pg_terminate_backend(?)", self._connection.info.backend_pid)
        return execute(self, text, *values)  # type: ignore[arg-type]

    monkeypatch.setattr(PostgresSession, "execute", losing_execute)
    with closing(Database(ledger_location)) as ledger:

        def begin_pass() -> None:
            with ledger.transaction():
                enroll.begin_pass(ledger)

        ledger.retry_on_disconnect(begin_pass)
        assert ledger.value("SELECT to_regclass('pg_temp.unknown_requests')") is not None
    assert len(lost) == losses


# A server that is silent


#: A statement is given up after 1 s, and a silent server after 4 s.
SHORT_TIMEOUTS = {
    "STATEMENT_TIMEOUT_S": 1.0,
    "SHORT_STATEMENT_TIMEOUT_S": 0.5,
    "SHORT_OUTAGE_TIMEOUT_S": 1.0,
    "CONNECT_TIMEOUT_S": 2,
    "OUTAGE_TIMEOUT_S": 4.0,
}


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use short timeouts in this process."""
    for name, seconds in SHORT_TIMEOUTS.items():
        monkeypatch.setattr(postgres_session, name, seconds)


@contextmanager
def locked_table(location: PostgresLocation, table: str) -> Iterator[psycopg.Connection]:
    """Hold a lock on a table of the ledger that even readers wait for."""
    with psycopg.connect(location.conninfo, options=f"-c search_path={location.schema}") as holder:
        holder.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield holder


def start_executions(
    location: PostgresLocation, count: int, between: Callable[[Database], None] = lambda _: None
) -> list[str]:
    """Record executions one by one, and return their jobs; `between` is called once, after the first."""

    async def scenario(ledger: Database) -> None:
        async with LedgerWriter(ledger) as writer:
            for number in range(count):
                await writer.submit(records.start_execution, f"job {number}", None, 1)
                if number == 0:
                    await asyncio.to_thread(between, ledger)

    with closing(Database(location)) as ledger:
        asyncio.run(scenario(ledger))
    return [job for (job,) in run_sql(location, "SELECT job FROM executions ORDER BY id")]


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.parametrize("table", ["executions", "commits"])
def test_locked_table_is_waited_for(ledger_location: PostgresLocation, table: str) -> None:
    """A transition that waits longer than a statement may take is made once, when the lock is gone in time."""

    def lock_for_a_while(_: Database) -> None:
        held, release = threading.Event(), threading.Timer(2.0, lambda: None)

        def hold() -> None:
            with locked_table(ledger_location, table):
                held.set()
                release.join()

        release.start()
        threading.Thread(target=hold).start()
        held.wait()

    assert start_executions(ledger_location, 3, lock_for_a_while) == ["job 0", "job 1", "job 2"]


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.parametrize("table", ["executions", "commits"])
def test_table_that_stays_locked_is_given_up(ledger_location: PostgresLocation, table: str) -> None:
    """A server that executes nothing for as long as an outage may last ends the run; nothing was written."""
    began = time.monotonic()
    with locked_table(ledger_location, table) as holder:
        with pytest.raises(LedgerFailed, match="no response from the server for"):
            start_executions(ledger_location, 1)
        assert 3 < time.monotonic() - began < 8
        holder.rollback()
    assert run_sql(ledger_location, "SELECT job FROM executions") == []


@pytest.mark.usefixtures("short_timeouts")
def test_wait_for_silent_server_can_be_shortened(
    ledger_location: PostgresLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`shorten_waits` ends the wait for a statement that has begun."""
    monkeypatch.setattr(postgres_session, "STATEMENT_TIMEOUT_S", 600.0)
    monkeypatch.setattr(postgres_session, "OUTAGE_TIMEOUT_S", 600.0)
    began = time.monotonic()
    with closing(Database(ledger_location)) as ledger, locked_table(ledger_location, "executions"):
        threading.Timer(0.5, ledger.shorten_waits).start()
        with pytest.raises(Exception, match="no response from the server"):
            ledger.retry_on_disconnect(lambda: records.newest_execution_id(ledger))
    assert time.monotonic() - began < 10


def backend_pids(server: PostgresServer, query: str = "true") -> list[int]:
    """Return the ids of the server's processes for connections."""
    with closing(server.connect("postgres")) as db:
        found = db.execute(f"SELECT pid FROM pg_stat_activity WHERE application_name = 'enrich' AND {query}").fetchall()
    return [pid for (pid,) in found]


@pytest.mark.usefixtures("short_timeouts")
def test_stopped_server_process_is_replaced(ledger_location: PostgresLocation, postgres: PostgresServer) -> None:
    """A server process that is stopped between two transactions is given up, and each of them is made once."""
    stopped: list[int] = []

    def stop_backend(ledger: Database) -> None:
        stopped.append(ledger.session._connection.info.backend_pid)  # type: ignore[union-attr]
        os.kill(stopped[0], signal.SIGSTOP)

    try:
        made = start_executions(ledger_location, 3, stop_backend)
    finally:
        os.kill(stopped[0], signal.SIGCONT)
    assert made == ["job 0", "job 1", "job 2"]
    assert stopped[0] not in backend_pids(postgres, "state <> 'idle'")
    assert len(run_sql(ledger_location, "SELECT 1 FROM executions")) == 3


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.parametrize("resumes", [True, False])
def test_commit_that_is_stopped_is_made_once(
    ledger_location: PostgresLocation, monkeypatch: pytest.MonkeyPatch, *, resumes: bool
) -> None:
    """A COMMIT that a stopped server process has received, but not executed, counts once it is executed.

    Until then its outcome is not known: the transition is neither repeated nor reported as made.
    """
    stopped: list[int] = []
    commit = PostgresSession.commit

    def commit_while_stopped(self: PostgresSession) -> None:
        if self._open_transaction is not None and not stopped:
            stopped.append(self._connection.info.backend_pid)
            os.kill(stopped[0], signal.SIGSTOP)
            if resumes:
                threading.Timer(2.0, os.kill, (stopped[0], signal.SIGCONT)).start()
        commit(self)

    monkeypatch.setattr(PostgresSession, "commit", commit_while_stopped)
    if resumes:
        assert start_executions(ledger_location, 2) == ["job 0", "job 1"]
        return
    try:
        with pytest.raises(LedgerFailed, match="no response from the server for"):
            start_executions(ledger_location, 2)
    finally:
        os.kill(stopped[0], signal.SIGCONT)
    assert len(run_sql(ledger_location, "SELECT 1 FROM executions")) <= 1


def server_processes(server: PostgresServer) -> list[int]:
    """Return the ids of all of the server's processes, its main one first."""
    main = int((server.folder / "data" / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{main}/task/{main}/children").read_text(encoding="ascii").split()
    return [main, *map(int, children)]


@contextmanager
def frozen_server(server: PostgresServer) -> Iterator[None]:
    """Stop all processes of a server: its port accepts connections, and nothing answers."""
    frozen = server_processes(server)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("ended_by", ["SIGTERM", "--max-time"])
def test_frozen_server_does_not_keep_a_run(tmp_path: Path, own_postgres: PostgresServer, ended_by: str) -> None:
    """While the server is frozen, the first SIGTERM and --max-time end a run, and the next one resumes."""
    workspace = Workspace(tmp_path, f"{own_postgres.ledger_url()}&lease=3", own_postgres.environ)
    workspace.write_job(limits="{requests_per_second: 60}")
    workspace.write_leads(make_leads(150))
    options = ("--max-time", "8s") if ended_by == "--max-time" else ()
    # A server that is silent for minutes is no outage yet, but nothing is waited for long after the end was asked for.
    timeouts = SHORT_TIMEOUTS | {"STATEMENT_TIMEOUT_S": 240.0, "OUTAGE_TIMEOUT_S": 300.0}
    prelude = f"from enrich.ledger import postgres; vars(postgres).update({timeouts})"
    with serve_api(tmp_path / "api.db", latency="uniform(0.1,0.5)") as api:
        process = workspace.start_subprocess("run", "job.yaml", "--json", *options, api=api, prelude=prelude)
        try:
            wait_until(lambda: bool(api.audit()["requests"].get("run", 0) >= 30))
            with frozen_server(own_postgres):
                if ended_by == "SIGTERM":
                    process.send_signal(signal.SIGTERM)
                out, err = process.communicate(timeout=100)
        finally:
            kill_process(process)
        result = workspace.run_subprocess("run", "job.yaml", "--json", api=api)
        audit = api.audit()

    assert json.loads(out)["exit_code"] == process.returncode
    assert "Traceback" not in err
    assert result.exit_code in {0, 14}, result.stderr
    assert audit["paid_twice"] == audit["accepted_more_than_once"] == 0
    assert check_ledger(workspace.ledger_location).problems == []

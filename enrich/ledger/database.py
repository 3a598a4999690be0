"""Opens a ledger's database (a SQLite file or a PostgreSQL schema) and runs transactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from enrich.errors import JobError
from enrich.job.locations import LedgerLocation, PostgresLocation
from enrich.ledger.dialect import DATABASE_ERRORS, Session
from enrich.ledger.open_files import ledger_file_exists
from enrich.ledger.sqlite import JOURNAL_SUFFIXES, open_sqlite

if TYPE_CHECKING:
    from enrich.ledger.postgres import FencingToken
from collections.abc import Iterable

from enrich.models import Call


def load_postgres() -> ModuleType:
    """Import `enrich.ledger.postgres_schema`. Raises JobError when psycopg is not installed."""
    try:
        from enrich.ledger import postgres_schema  # noqa: PLC0415 - slow to import, and SQLite ledgers do not need it
    except ModuleNotFoundError as error:
        if error.name != "psycopg":
            raise
        hint = "pip install 'databar-enrich[cluster]'"
        raise JobError("a ledger in PostgreSQL needs the extra `cluster`", hint) from error
    return postgres_schema


T = TypeVar("T")
#: How long opening waits for an unreachable server, in seconds, when nothing has started yet.
OPEN_TIMEOUT_S = 3.0


class Database:
    """One ledger over one connection."""

    def __init__(  # noqa: PLR0913 - all but the location are exceptions
        self,
        location: LedgerLocation,
        *,
        read_only: bool = False,
        any_version: bool = False,
        skip_integrity_check: bool = False,
        fencing_token: FencingToken | None = None,
        open_timeout_s: float = OPEN_TIMEOUT_S,
    ) -> None:
        """Open the ledger and create it if it is missing. With `read_only` it can be read during a run.

        With `any_version` a ledger of another version is opened as it is. With `skip_integrity_check` the caller checks
        for damage. With a `fencing_token` every transaction fails once the owner has lost its lease. An unreachable
        server is retried for `open_timeout_s` seconds. Raises CommandRefused when this is not a ledger, when it was
        written by a newer version of enrich, or when it cannot be written.
        """
        self.location = location
        #: The owner that this connection writes as, where processes hold their work by leases. None: no leases.
        self.owner_id = None if fencing_token is None else fencing_token.owner_id
        if isinstance(location, PostgresLocation):
            self._db: Session = load_postgres().open_schema(
                location,
                read_only=read_only,
                any_version=any_version,
                fencing_token=fencing_token,
                open_timeout_s=open_timeout_s,
            )
        else:
            self._db = open_sqlite(
                location, read_only=read_only, any_version=any_version, skip_integrity_check=skip_integrity_check
            )

    def watch_files(self) -> None:
        """Record which files the ledger is open in. The caller holds the ledger's lock."""
        if isinstance(self.location, Path):
            self._db.watch_files(self.location)

    def check_files(self) -> None:
        """Raise LedgerMoved when one of the recorded files was removed or replaced."""
        self._db.check_files()

    def close(self) -> None:
        """Close the connection. Committed data stays."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Run the block in one transaction. When it raises, everything it wrote is rolled back."""
        try:
            self._db.begin()
            yield
            if self._db.in_transaction:  # false when the block has rolled back
                self._db.commit()
        except BaseException:
            self._db.rollback()
            raise

    def shorten_waits(self) -> None:
        """Shorten all waits for an unreachable server. Can be called from any thread."""
        self._db.shorten_waits()

    def retry_on_disconnect(self, action: Callable[[], T]) -> T:
        """Run an action that is one transaction. Retry it after a lost connection, even if it may be committed."""
        while True:
            try:
                return action()
            except DATABASE_ERRORS as failure:
                if self.reconnect(failure) is None:
                    raise

    def rollback(self) -> None:
        """Roll back and end the current transaction."""
        self._db.rollback()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read from one snapshot, also during a run."""
        self._db.begin_snapshot()
        try:
            yield
        finally:
            self._db.rollback()

    def reconnect(self, failure: BaseException) -> bool | None:
        """Recover after a failure in a transaction, so that its whole block can be run again.

        Return whether the failed transaction was committed after all. None: the failure is permanent.
        """
        return self._db.reconnect(failure)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Isolate one of several operations of a transaction: when it raises, only its own changes are rolled back."""
        self._db.execute("SAVEPOINT move")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # false when a full disk has already ended the transaction
                self._db.execute("ROLLBACK TO move")
                self._db.execute("RELEASE move")
            raise
        self._db.execute("RELEASE move")

    def enable_secure_delete(self) -> None:
        """Overwrite deleted data from now on, if the database supports it."""
        self._db.enable_secure_delete()

    def discard_erased_data(self) -> bool:
        """Remove erased data from where the database keeps old versions.

        Return whether that is complete. It is not while another connection still reads an older snapshot.
        """
        return self._db.discard_erased_data()

    def _stream_rows(self, sql: str) -> Iterator[Mapping[str, Any]]:
        """Stream the rows of a query that are too many to hold in memory."""
        names: list[str] = [column[0] for column in self._db.execute(f"{sql} LIMIT 0").description or ()]
        return (dict(zip(names, row, strict=True)) for row in self._db.stream(sql))

    def _rows(self, sql: str, *values: object) -> Iterator[Mapping[str, Any]]:
        cursor = self._db.execute(sql, values)
        names = [column[0] for column in cursor.description or ()]
        return (dict(zip(names, row, strict=True)) for row in cursor)


def ledger_exists(location: LedgerLocation) -> bool:
    """Return whether a ledger exists at this location.

    Raises CommandRefused when the server cannot be reached, and when the path is a dangling link or not a file.
    """
    return (
        load_postgres().schema_exists(location)
        if isinstance(location, PostgresLocation)
        else ledger_file_exists(location)
    )


def delete_ledger(location: LedgerLocation) -> None:
    """Delete a ledger permanently. Raises CommandRefused when the server cannot be reached, and OSError."""
    if isinstance(location, PostgresLocation):
        load_postgres().drop_schema_tables(location)
        return
    for name in (location, *(location.with_name(f"{location.name}{end}") for end in JOURNAL_SUFFIXES)):
        name.unlink(missing_ok=True)


class LatencyQueries(Database):
    """A ledger that stores how long tasks take, for the poll schedule."""

    def load_latencies(self, call: Call, bulk_size: int | None = None) -> list[tuple[float, float]]:
        """Return pairs (seconds, answers): how many answers took at most that many seconds. Empty before the first run.

        With `bulk_size`, those of bulk tasks with that many requests.
        """
        return self._db.execute(
            "SELECT seconds, answers FROM latencies WHERE call = ? ORDER BY seconds", (_call_key(call, bulk_size),)
        ).fetchall()

    def save_latencies(self, call: Call, learned: Iterable[tuple[float, float]], bulk_size: int | None = None) -> None:
        """Replace the stored durations of a call."""
        name = _call_key(call, bulk_size)
        self._db.execute("DELETE FROM latencies WHERE call = ?", (name,))
        self._db.executemany(
            "INSERT INTO latencies VALUES (?, ?, ?)", ((name, seconds, answers) for seconds, answers in learned)
        )


def _call_key(call: Call, bulk_size: int | None) -> str:
    return call.canonical() + ("" if bulk_size is None else f" bulk {bulk_size}")

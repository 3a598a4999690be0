"""A ledger's database: a file, or a schema on a server; written in transactions."""

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
    """Load `enrich.ledger.postgres_schema`. Raises JobError when its driver was not installed."""
    try:
        from enrich.ledger import postgres_schema  # noqa: PLC0415 - it would take its time from everybody
    except ModuleNotFoundError as error:
        if error.name != "psycopg":
            raise
        hint = "pip install 'databar-enrich[cluster]'"
        raise JobError("a ledger in PostgreSQL needs the extra `cluster`", hint) from error
    return postgres_schema


T = TypeVar("T")
#: So long a server that is away is waited for when nothing was begun yet.
OPEN_TIMEOUT_S = 3.0


class Database:
    """One ledger, one connection."""

    def __init__(  # noqa: PLR0913 - all but the place are exceptions
        self,
        location: LedgerLocation,
        *,
        read_only: bool = False,
        any_version: bool = False,
        skip_integrity_check: bool = False,
        fencing_token: FencingToken | None = None,
        open_timeout_s: float = OPEN_TIMEOUT_S,
    ) -> None:
        """Open the ledger, making it when it is not there; `read_only` looks while an execution is at work.

        `unchecked` leaves it to the caller to look for damage.
        With a `fence` every transaction fails once its owner has lost the lease. A server that is away is waited for
        `patience_s`. Raises Refused when this is no ledger,
        when it is newer than this program or can't be written.
        """
        self.location = location
        #: Who writes, where processes hold what they are at by leases.
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
        """Record which files the ledger is open in; the caller holds its lock."""
        if isinstance(self.location, Path):
            self._db.watch_files(self.location)

    def check_files(self) -> None:
        """Raise LedgerMoved when one of them was removed or replaced."""
        self._db.check_files()

    def close(self) -> None:
        """Close the database; what was committed stays."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """One commit; nothing of it stays when the block raises."""
        try:
            self._db.begin()
            yield
            if self._db.in_transaction:  # unless the block has taken all of it back
                self._db.commit()
        except BaseException:
            self._db.rollback()
            raise

    def shorten_waits(self) -> None:
        """Hear, from any thread, that nobody wants to wait long for a server any more."""
        self._db.shorten_waits()

    def retry_on_disconnect(self, action: Callable[[], T]) -> T:
        """Do what makes a transaction of its own; when the server was away, again, though it may have been done."""
        while True:
            try:
                return action()
            except DATABASE_ERRORS as failure:
                if self.reconnect(failure) is None:
                    raise

    def rollback(self) -> None:
        """Take back what a transaction wrote so far, and end it."""
        self._db.rollback()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """See everything as it stands at this moment, though a run goes on."""
        self._db.begin_snapshot()
        try:
            yield
        finally:
            self._db.rollback()

    def reconnect(self, failure: BaseException) -> bool | None:
        """Be ready again after a failure in a transaction, whose whole block may be done again then.

        Tell whether what it wrote is there all the same; None: the failure stays.
        """
        return self._db.reconnect(failure)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """One move of many in a transaction: when it raises, the others stay."""
        self._db.execute("SAVEPOINT move")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # a full disk may have ended it
                self._db.execute("ROLLBACK TO move")
                self._db.execute("RELEASE move")
            raise
        self._db.execute("RELEASE move")

    def enable_secure_delete(self) -> None:
        """Overwrite from now on what is deleted, where the database can."""
        self._db.enable_secure_delete()

    def discard_erased_data(self) -> bool:
        """Leave nothing of what was erased where the database keeps its past.

        Return whether that is done: not while somebody reads the ledger as it was before.
        """
        return self._db.discard_erased_data()

    def _stream_rows(self, sql: str) -> Iterator[Mapping[str, Any]]:
        """Yield rows that are too many to be held at once."""
        names: list[str] = [column[0] for column in self._db.execute(f"{sql} LIMIT 0").description or ()]
        return (dict(zip(names, row, strict=True)) for row in self._db.stream(sql))

    def _rows(self, sql: str, *values: object) -> Iterator[Mapping[str, Any]]:
        cursor = self._db.execute(sql, values)
        names = [column[0] for column in cursor.description or ()]
        return (dict(zip(names, row, strict=True)) for row in cursor)


def ledger_exists(location: LedgerLocation) -> bool:
    """Tell whether a ledger was ever made there.

    Raises Refused when the server can't be asked, and when the path is a dangling link or no file.
    """
    return (
        load_postgres().schema_exists(location)
        if isinstance(location, PostgresLocation)
        else ledger_file_exists(location)
    )


def delete_ledger(location: LedgerLocation) -> None:
    """Remove a ledger for good. Raises Refused when the server can't be asked, and OSError."""
    if isinstance(location, PostgresLocation):
        load_postgres().drop_schema_tables(location)
        return
    for name in (location, *(location.with_name(f"{location.name}{end}") for end in JOURNAL_SUFFIXES)):
        name.unlink(missing_ok=True)


class LatencyQueries(Database):
    """A ledger that remembers when it pays to ask."""

    def load_latencies(self, call: Call, bulk_size: int | None = None) -> list[tuple[float, float]]:
        """Tell how many answers took at most how many seconds, as it was remembered; nothing before the first.

        `bulk`: those of tasks for so many requests.
        """
        return self._db.execute(
            "SELECT seconds, answers FROM latencies WHERE call = ? ORDER BY seconds", (_call_key(call, bulk_size),)
        ).fetchall()

    def save_latencies(self, call: Call, learned: Iterable[tuple[float, float]], bulk_size: int | None = None) -> None:
        """Remember this instead of what was remembered of the call."""
        name = _call_key(call, bulk_size)
        self._db.execute("DELETE FROM latencies WHERE call = ?", (name,))
        self._db.executemany(
            "INSERT INTO latencies VALUES (?, ?, ?)", ((name, seconds, answers) for seconds, answers in learned)
        )


def _call_key(call: Call, bulk_size: int | None) -> str:
    return call.canonical() + ("" if bulk_size is None else f" bulk {bulk_size}")

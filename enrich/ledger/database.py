"""Opens a ledger's database (a SQLite file or a PostgreSQL schema) and runs transactions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from enrich.errors import CommandRefused, EnrichError, needs_extra
from enrich.job.locations import LedgerLocation, PostgresLocation
from enrich.ledger.dialect import DATABASE_ERRORS, Cursor, Dialect
from enrich.ledger.file_identity import ledger_file_exists
from enrich.ledger.sqlite import SqliteSession, open_in_memory, open_sqlite, remove_with_journals

if TYPE_CHECKING:
    from enrich.ledger.dialect import FencingToken
    from enrich.ledger.postgres import PostgresSession


def load_postgres() -> ModuleType:
    """Import `enrich.ledger.postgres_schema`. Raises JobError when psycopg is not installed."""
    with needs_extra("cluster", "PostgreSQL support is not installed"):
        from enrich.ledger import postgres_schema  # noqa: PLC0415 - slow to import, and SQLite ledgers do not need it
    return postgres_schema


T = TypeVar("T")
#: How long opening waits for an unreachable server, in seconds, when nothing has started yet.
OPEN_TIMEOUT_S = 3.0


class StepCost(NamedTuple):
    """The cost of a step in a run: `exact` when it was last summed.

    `at_most` adds the highest price of the attempts claimed since, up to the id `newest`, and what answers have cost
    beyond it since. The attempts of earlier runs have ids up to `earlier`.
    """

    exact: int
    at_most: int
    newest: int
    earlier: int


class Database:
    """One ledger over one connection."""

    def __init__(  # noqa: PLR0913 - all but the location are for rare cases
        self,
        location: LedgerLocation,
        *,
        read_only: bool = False,
        any_version: bool = False,
        skip_integrity_check: bool = False,
        fencing_token: FencingToken | None = None,
        open_timeout_s: float = OPEN_TIMEOUT_S,
        in_memory: bool = False,
    ) -> None:
        """Open the ledger and create it if it is missing. With `read_only` it can be read during a run.

        With `in_memory` it is a new one without a file. With `any_version` a ledger of another version is opened as it
        is. With `skip_integrity_check` the caller checks for damage. With a `fencing_token` every transaction fails
        once the holder has lost its lease. An unreachable server is retried for `open_timeout_s` seconds. Raises
        CommandRefused when this is not a ledger, when it was written by a newer version of enrich, or when it cannot be
        written.
        """
        self.location = location
        #: Where the next claim starts, by `new_up_to`: the last claimed position, and the claims since a full look.
        self.claimed_up_to: dict[int | None, tuple[int, int]] = {}
        #: What a step of an execution has cost.
        self.step_costs: dict[tuple[int, str | None], StepCost] = {}
        #: The id of the request that the last batch of the input ended with; see `enroll`.
        self.matched_up_to = 0
        #: With leases, several processes write to the ledger, and the table `seen` of a pass is theirs together.
        self.shares_passes = isinstance(location, PostgresLocation) and not read_only and not in_memory
        #: Names of facts that are certainly in the ledger (see `bindings.bind`).
        self.known_facts: frozenset[str] = frozenset()
        if isinstance(location, PostgresLocation) and not in_memory:
            self.session: SqliteSession | PostgresSession = load_postgres().open_schema(
                location,
                read_only=read_only,
                any_version=any_version,
                fencing_token=fencing_token,
                open_timeout_s=open_timeout_s,
            )
        elif isinstance(location, Path) and not in_memory:
            self.session = open_sqlite(
                location, read_only=read_only, any_version=any_version, skip_integrity_check=skip_integrity_check
            )
        else:
            self.session = open_in_memory()
        self.dialect: Dialect = self.session.dialect

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Cursor:
        """Run one statement. Parameters are written as `?` or `?1`."""
        return self.session.execute(sql, values)

    def value(self, sql: str, *values: object) -> Any:  # noqa: ANN401 - of any type
        """Return the first column of the first row of a query that has a row."""
        return self.session.execute(sql, values).fetchone()[0]

    def number(self, sql: str, *values: object) -> int:
        """Return the first column of the first row of a query as a whole number."""
        return int(self.value(sql, *values))

    def exists(self, source: str, *values: object) -> bool:
        """Return whether `FROM …` has a row."""
        return bool(self.value(f"SELECT EXISTS (SELECT 1 {source})", *values))

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> None:
        """Run one statement for each of many rows."""
        self.session.executemany(sql, rows)

    def write_together(self, statements: Iterable[tuple[str, Sequence[Any]]], /) -> list[int]:
        """Run several UPDATEs, on a server as one statement. Return the number of rows that each changed.

        Parameters are written as `?`. No UPDATE may change a row that another one changes, or read a column that an
        earlier one sets: as one statement, all of them see what was there before.
        """
        statements = list(statements)
        if not self.dialect.joins_writes:
            return [self.execute(sql, values).rowcount for sql, values in statements]
        names = [f"write_{number}" for number in range(len(statements))]
        parts = ", ".join(f"{name} AS ({sql} RETURNING 1)" for name, (sql, _) in zip(names, statements, strict=True))
        counts = ", ".join(f"(SELECT count(*) FROM {name})" for name in names)
        values = [value for _, its_values in statements for value in its_values]
        return list(self.execute(f"WITH {parts} SELECT {counts}", values).fetchone())

    def stream(self, sql: str, values: Sequence[Any] = (), /) -> Iterator[Any]:
        """Yield the rows of a query that are too many to hold in memory."""
        return self.session.stream(sql, values)

    def watch_files(self) -> None:
        """Record which files the ledger is open in. The caller holds the ledger's lock."""
        if isinstance(self.session, SqliteSession) and isinstance(self.location, Path):
            self.session.watch_files(self.location)

    def check_files(self) -> None:
        """Raise LedgerMoved when one of the recorded files was removed or replaced."""
        self.session.check_files()

    def close(self) -> None:
        """Close the connection. Committed data stays."""
        self.session.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Run the block in one transaction. When it raises, everything it wrote is rolled back."""
        try:
            self.session.begin()
            yield
            if self.session.in_transaction:  # false when the block has rolled back
                self.session.commit()
        except BaseException:
            self.rollback()
            raise

    @contextmanager
    def temporary_transaction(self) -> Iterator[None]:
        """Use the open transaction, or open one that writes only to temporary tables."""
        if self.session.in_transaction:
            yield
            return
        self.session.begin_temporary()
        try:
            yield
            self.session.commit()
        except BaseException:
            self.session.rollback()
            raise

    def shorten_waits(self) -> None:
        """Shorten all waits for an unreachable server. Can be called from any thread."""
        self.session.shorten_waits()

    def retry_on_disconnect(self, action: Callable[[], T]) -> T:
        """Run one idempotent transaction. Retry after a lost connection, although the commit may have succeeded."""
        while True:
            try:
                return action()
            except DATABASE_ERRORS as failure:
                if self.reconnect(failure) is None:
                    raise

    def rollback(self) -> None:
        """Roll back and end the current transaction."""
        self._clear_known()
        self.session.rollback()

    def _clear_known(self) -> None:
        """Forget what is known of the ledger's content: it may have been read after a change that is rolled back."""
        self.claimed_up_to.clear()
        self.step_costs.clear()
        self.known_facts = frozenset()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read from one snapshot, also during a run."""
        self.session.begin_snapshot()
        try:
            yield
        finally:
            self.session.rollback()

    def reconnect(self, failure: BaseException) -> bool | None:
        """Recover after a failure in a transaction, so that its whole block can be run again.

        Return whether the failed transaction was committed after all. None: the failure is permanent.
        """
        return self.session.reconnect(failure)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Isolate one of several operations of a transaction: when it raises, only its own changes are rolled back."""
        self.session.execute("SAVEPOINT operation")
        try:
            yield
        except BaseException:
            self._clear_known()
            if self.session.in_transaction:  # false when a full disk has already ended the transaction
                self.session.execute("ROLLBACK TO operation")
                self.session.execute("RELEASE operation")
            raise
        self.session.execute("RELEASE operation")

    def column_names(self, sql: str, *values: object) -> list[str]:
        """Return the names of the columns of a query."""
        return [column[0] for column in self.session.execute(f"{sql} LIMIT 0", values).description or ()]

    def rows(self, sql: str, *values: object) -> Iterator[Mapping[str, Any]]:
        """Stream the rows of a query, each as a mapping by column name. They may be too many to hold in memory."""
        names = self.column_names(sql, *values)
        return (dict(zip(names, row, strict=True)) for row in self.session.stream(sql, values))


def ledger_exists(location: LedgerLocation) -> bool:
    """Return whether a ledger exists at this location.

    Raises CommandRefused when the server cannot be reached, and when the path is a dangling link or not a file.
    """
    return (
        load_postgres().schema_exists(location)
        if isinstance(location, PostgresLocation)
        else ledger_file_exists(location)
    )


def open_existing(
    location: LedgerLocation, *, any_version: bool = False, skip_integrity_check: bool = False
) -> Database:
    """Open a ledger read-only. For the parameters see Database.

    Raises CommandRefused when it is missing, not a ledger, or of another version.
    """
    if not ledger_exists(location):
        raise CommandRefused(f"{location}: the ledger does not exist", "the first `enrich run` creates it")
    return Database(location, read_only=True, any_version=any_version, skip_integrity_check=skip_integrity_check)


@contextmanager
def open_or_empty(location: LedgerLocation) -> Iterator[Database]:
    """Open a ledger read-only, or an empty one where there is none yet."""
    exists = ledger_exists(location)
    with closing(Database(location, read_only=exists, in_memory=not exists)) as ledger:
        yield ledger


def delete_ledger(location: LedgerLocation) -> None:
    """Delete a ledger permanently. Raises CommandRefused when the server cannot be reached, and OSError."""
    if isinstance(location, PostgresLocation):
        load_postgres().drop_schema_tables(location)
    else:
        remove_with_journals(location)


def try_read(location: LedgerLocation, query: Callable[[Database], T]) -> T | None:
    """Run one query. None when the ledger is missing or cannot be read."""
    try:
        with closing(open_existing(location)) as db:
            return query(db)
    except (EnrichError, *DATABASE_ERRORS):
        return None

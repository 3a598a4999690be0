"""What the ledger asks of a database, whichever keeps it, and the few words in which the databases differ."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

#: A server that is away in the middle of a run is waited for so long, in seconds.
OUTAGE_TIMEOUT_S = 300.0


class DatabaseFailed(Exception):
    """The database of a ledger that is no file could not do what it was asked."""


class TransactionInterrupted(DatabaseFailed):
    """Nothing of the transaction was written, or nobody knows: the connection was lost, or others were in the way."""


#: What a database raises that could not do what it was asked.
DATABASE_ERRORS = (sqlite3.Error, DatabaseFailed)


@dataclass(frozen=True, slots=True)
class Dialect:
    """Parts of SQL that are another in each database."""

    #: A number that counts up by itself, as the primary key.
    serial_key: str
    #: The type of bytes.
    blob_type: str
    #: Where a pass over the input is kept: it ends with the connection, or several processes share it.
    passes_are_shared: bool
    #: Whether processes hold what they are at by leases.
    has_leases: bool
    #: Rows that are read to be changed, which another may be about to change, too.
    for_update: str = ""
    #: … and which are left to whoever holds them.
    skip_locked: str = ""
    #: Keeps SQLite's planner from an index on what follows.
    no_index: str = ""
    #: Joins in the order in which they are written, where the planner would choose a worse one.
    ordered_join: str = "JOIN"
    #: Behind a column: read its text as JSON.
    as_json: str = ""
    #: Behind a column of text that rows are sorted by: as its bytes are, whatever language the database has.
    byte_order: str = ""
    #: Puts all values of a group into one JSON list.
    json_list: str = ""
    #: A column of text as its bytes, which need not be UTF-8.
    as_bytes: str = "{}"
    #: Rows that refer to what is not there.
    orphan_query: str = "SELECT 1 WHERE false"
    #: Keeps others from comparing the same task ids (a JSON list of lists) until this transaction ends.
    lock_task_ids: str = ""
    #: What no process is at any more: nobody began it with a lease, or the lease ran out, or it was us.
    not_held_by_others: str = "true"


class Cursor(Protocol):
    """What a statement brought."""

    @property
    def rowcount(self) -> int:
        """How many rows were changed."""

    @property
    def description(self) -> Sequence[Any] | None:
        """The columns, the name of each first."""

    def fetchone(self) -> Any:  # noqa: ANN401 - a row
        """Return the next row, None after the last."""

    def fetchall(self) -> list[Any]:
        """Return all other rows."""

    def __iter__(self) -> Iterator[Any]: ...


class Session(Protocol):
    """A connection to the database of one ledger. SQL has `?` or `?1` for its values."""

    dialect: Dialect

    @property
    def in_transaction(self) -> bool:
        """Tell whether a transaction was begun."""

    def watch_files(self, path: Path) -> None:
        """Record the files of the ledger, which `check_files` compares from then on."""

    def check_files(self) -> None:
        """Raise LedgerMoved when a file of the ledger was removed or replaced since `watch_files`."""

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Cursor:
        """Do one statement."""

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> object:
        """Do one statement for each of many rows."""

    def stream(self, sql: str, values: Sequence[Any] = (), /) -> Iterator[Any]:
        """Yield the rows of a query that are too many to be held at once."""

    def deferred_references(self) -> AbstractContextManager[None]:
        """Let rows be loaded in any order, in a transaction: who refers to whom is checked at its end."""

    def load_rows(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], /) -> None:
        """Add many rows to a table, with numbers of their own; those that come later count on from these."""

    def begin(self) -> None:
        """Begin a transaction that writes."""

    def begin_snapshot(self) -> None:
        """Begin a transaction that sees everything as it stands now."""

    def begin_temporary(self) -> None:
        """Begin a transaction that writes to temporary tables alone."""

    def commit(self) -> None:
        """End it; what it wrote is durable."""

    def rollback(self) -> None:
        """Take back what it wrote, if one was begun and is there yet."""

    def reconnect(self, failure: BaseException) -> bool | None:
        """Be ready again after a failure in a transaction.

        Tell whether what it wrote is there all the same; None: the failure stays.
        """

    def has_temporary_table(self, table: str) -> bool:
        """Tell whether this connection has made a temporary table."""

    def shorten_waits(self) -> None:
        """Hear, from any thread, that nobody wants to wait long any more."""

    def clear_table(self, table: str) -> None:
        """Empty a temporary table."""

    def analyze(self, table: str) -> None:
        """Let the planner know how many rows a temporary table has."""

    def integrity_problems(self) -> Iterator[str]:
        """Read the whole database; yield what is not sound about it."""

    def enable_secure_delete(self) -> None:
        """Overwrite from now on what is deleted."""

    def discard_erased_data(self) -> bool:
        """Leave nothing of what was erased where the database keeps its past; tell whether that is done."""

    def close(self) -> None:
        """Let go of the database."""

"""The parts of SQL that differ between SQLite and PostgreSQL, and the errors of both.

`CROSS JOIN` makes SQLite join two tables in the written order. Otherwise it might read a whole table for each batch. On
PostgreSQL it is an ordinary join.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from msgspec import Struct

#: How long a run waits for a server that became unreachable, in seconds.
OUTAGE_TIMEOUT_S = 300.0


class DatabaseFailed(Exception):
    """An operation on a PostgreSQL ledger failed."""


class TransactionInterrupted(DatabaseFailed):
    """The transaction was not written, or its result is unknown: connection lost, or conflict with another process."""


#: What a failed database operation raises.
DATABASE_ERRORS = (sqlite3.Error, DatabaseFailed)


class Dialect(Struct, frozen=True):
    """The parts of SQL that differ between databases."""

    #: Column definition of an auto-incremented primary key.
    serial_key: str
    #: Column type for bytes.
    blob_type: str
    #: Whether processes hold the tasks they work on by leases.
    has_leases: bool
    #: Suffix of SELECT: lock the rows that are about to be changed, but skip rows that another transaction has locked.
    skip_locked: str = ""
    #: Prefix that keeps SQLite's planner from using an index on the following column.
    no_index: str = ""
    #: Suffix of a text column: read its content as JSON.
    as_json: str = ""
    #: Suffix of a text column in ORDER BY: sort by bytes, whatever the collation of the database is.
    byte_order: str = ""
    #: Collects all values of a group into one JSON list.
    json_list: str = ""
    #: Reads a text column as bytes, which may be invalid UTF-8.
    as_bytes: str = "{}"
    #: Whether one statement can hold several that write.
    joins_writes: bool = False
    #: Keeps other transactions from comparing the same task ids (a JSON list of lists) until this one ends.
    lock_task_ids: str = ""
    #: Condition for attempts that no other process holds: without a lease, with an ended one, or our own.
    not_held_by_others: str = "true"


class Cursor(Protocol):
    """The result of a statement."""

    @property
    def rowcount(self) -> int:
        """The number of rows that were changed."""

    @property
    def description(self) -> Sequence[Any] | None:
        """The columns; the first item of each is its name."""

    def fetchone(self) -> Any:  # noqa: ANN401 - a row
        """Return the next row, None after the last."""

    def fetchall(self) -> list[Any]:
        """Return all remaining rows."""

    def __iter__(self) -> Iterator[Any]: ...


#: Exactly the condition of the index `open_attempts`. With other wording SQLite would read all attempts.
OPEN_ATTEMPT = "state IN ('submitting', 'submitted')"
#: Exactly the condition of the index `queue` in SQLite: requests that this run may send, including those sent before.
QUEUED = "queue_position IS NOT NULL AND state NOT IN ('submitting', 'submitted')"
#: The numbers of a JSON list.
JSON_NUMBERS = "SELECT CAST(value AS BIGINT) FROM json_each(CAST({} AS TEXT))"
#: Attempt ids follow the order of runs, so the attempts of run ?1 and later are found without reading all of them.
SINCE_EXECUTION = "id > coalesce((SELECT id FROM attempts WHERE execution_id < ?1 ORDER BY id DESC LIMIT 1), 0)"
#: A LIMIT without effect. It fits into SQLite's 64-bit integers.
MAX_ROWS = 2**62


#: What the result of an attempt `a` cost. A request that was sent again may receive the same task from the API's cache:
#: its price is with the earlier attempt.
RESULT_PRICE = (
    "CASE WHEN a.credits = 0 AND a.previous_id IS NOT NULL THEN coalesce((SELECT max(o.credits) FROM attempts o "
    "WHERE o.task_id = a.task_id AND o.request_id = a.request_id), 0) ELSE a.credits END"
)


class FencingToken(Struct, frozen=True):
    """The lease of a writer, which must be valid. The server ends transactions idle for `idle_timeout_s`."""

    lease_id: int
    idle_timeout_s: float

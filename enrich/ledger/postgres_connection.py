"""A connection to PostgreSQL (psycopg 3) with a deadline for each statement, its types, and its errors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import inf
from typing import Any, TypeVar

import psycopg
from psycopg import errors
from psycopg.adapt import Loader
from psycopg.types.string import StrDumper

from enrich.ledger.dialect import DatabaseFailed, TransactionInterrupted

T = TypeVar("T")
#: A conflict with another transaction: run this one again.
CONFLICT_ERRORS = (errors.DeadlockDetected, errors.SerializationFailure)
#: The server is unreachable, shutting down or starting up.
_CONNECTION_ERRORS = (psycopg.OperationalError, psycopg.InterfaceError, errors.IdleInTransactionSessionTimeout)
#: Retrying does not help against these.
PERMANENT_ERRORS = (
    errors.InvalidPassword,
    errors.InvalidAuthorizationSpecification,
    errors.InvalidCatalogName,
    errors.DiskFull,
)


class Connection(psycopg.Connection[Any]):
    """A connection that is closed when a statement takes longer than `deadline` allows."""

    #: Returns until when a statement may take that began at this monotonic time, both in seconds.
    deadline: Callable[[float], float] = staticmethod(lambda _: inf)

    def prepare(self, deadline: Callable[[float], float]) -> None:
        """Set the deadlines and our types."""
        self.deadline = deadline
        self.adapters.register_loader("numeric", _NumberLoader)
        self.adapters.register_dumper(str, _TextDumper)

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **options: Any) -> T:  # noqa: ANN401 - as in psycopg
        """Run one exchange with the server. Raises OperationalError when it takes too long."""
        return super().wait(self._until_deadline(gen), *args, **options)

    def _until_deadline(self, exchange: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        began = time.monotonic()
        try:
            awaited = next(exchange)
            while True:
                ready = yield awaited  # nothing is ready: asked again ten times a second
                if not ready and time.monotonic() > self.deadline(began):
                    self.pgconn.finish()
                    raise StatementTimeout(began)
                awaited = exchange.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result


class UnsuitableDatabase(DatabaseFailed):
    """This database cannot hold a ledger: why, and what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def check_database(connection: Connection, connect: Callable[[], Connection]) -> None:
    """Raise UnsuitableDatabase when a ledger cannot work there. `connect` opens another connection to compare with."""
    ((encoding, may_create, database, role, pid),) = connection.execute(
        "SELECT current_setting('server_encoding'), has_database_privilege(current_database(), 'TEMPORARY'), "
        "current_database(), current_user, pg_backend_pid()"
    ).fetchall()
    if encoding != "UTF8":
        raise UnsuitableDatabase(
            f"the encoding of the database is {encoding}", "make one with createdb --encoding=UTF8"
        )
    if not may_create:
        raise UnsuitableDatabase(
            "this user may not create temporary tables", f"GRANT TEMPORARY ON DATABASE {database} TO {role}"
        )
    if pid == connection.info.backend_pid:
        return
    # A pooler is between. If it keeps sessions, each has one process of the server, and shares it with none.
    with connect() as other:
        ((other_pid,), (pid_again,)) = (
            row for each in (other, connection) for row in each.execute("SELECT pg_backend_pid()").fetchall()
        )
    if pid == other_pid or pid != pid_again:
        raise UnsuitableDatabase(
            "a connection pooler gives each transaction another connection",
            "name the server itself, or a pool in session mode",
        )


class StatementTimeout(psycopg.OperationalError):
    """The server is connected but was silent for too long. Whether it executes the statement is not known."""

    def __init__(self, began: float) -> None:
        super().__init__(f"no response from the server for {time.monotonic() - began:.0f} s")
        #: When the statement began, in monotonic seconds.
        self.began = began


class _NumberLoader(Loader):
    """Loads numeric values as Python numbers; a sum of integers becomes an int."""

    def load(self, data: Any) -> int | float:  # noqa: ANN401 - bytes or a buffer
        text = bytes(data)
        return float(text) if b"." in text or b"N" in text else int(text)


class _TextDumper(StrDumper):
    """Replaces NUL in text by U+FFFD: PostgreSQL text cannot hold NUL."""

    def dump(self, obj: str) -> Any:  # noqa: ANN401 - bytes or a buffer
        return super().dump(obj.replace("\0", "\ufffd") if "\0" in obj else obj)


@lru_cache(maxsize=1024)
def to_psycopg_sql(text: str) -> tuple[str, bool]:
    """Convert `?` and `?1` to psycopg's placeholders. Return also whether they are numbered."""
    text = text.replace("%", "%%")
    if re.search(r"\?\d", text):
        return re.sub(r"\?(\d+)", r"%(p\1)s", text), True
    return text.replace("?", "%s"), False


def to_psycopg_query(text: str, values: Sequence[Any]) -> tuple[str, Sequence[Any] | dict[str, Any]]:
    """Convert a statement and its values for psycopg."""
    query, is_numbered = to_psycopg_sql(text)
    return query, {f"p{number}": value for number, value in enumerate(values, 1)} if is_numbered else values


@contextmanager
def as_database_errors() -> Iterator[None]:
    """Raise psycopg's errors as DatabaseFailed, and as TransactionInterrupted when a retry may help."""
    try:
        yield
    except psycopg.Error as error:
        is_retryable = isinstance(error, (*CONFLICT_ERRORS, *_CONNECTION_ERRORS)) and not isinstance(
            error, PERMANENT_ERRORS
        )
        raise (TransactionInterrupted if is_retryable else DatabaseFailed)(error_text(error)) from error


def is_unreachable(error: BaseException | None) -> bool:
    """Return whether the server is unreachable now but may come back."""
    return isinstance(error, TransactionInterrupted) or (
        isinstance(error, _CONNECTION_ERRORS) and not isinstance(error, PERMANENT_ERRORS)
    )


def error_text(error: BaseException) -> str:
    """Return the message of the server or driver on one line, without values of the statement."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return " ".join((primary or str(error)).split())

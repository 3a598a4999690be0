"""A ledger for tests: leads by number, one commit for each change, and queries with plain SQL."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg

from enrich.job.locations import LedgerLocation
from enrich.ledger.dialect import Cursor
from enrich.ledger.ledger import Ledger
from enrich.models import Answer, Call, Claim, RequestSelection, RowRequest, State

P = ParamSpec("P")
T = TypeVar("T")

CALL = Call("email_getter", (833, 966, 701, 745))
#: The maximum price of one request, and the cost of an answer here, in millionths of a credit.
MAX_PRICE, COST = 5, 2
FOUND = Answer(State.FOUND, provider="Mailhound", credits=COST, raw='{"data":{"email":"a@b.example"}}')
NO_MATCH = Answer(State.NOT_FOUND, credits=0, raw='{"data":null}')
FREE_FAILURE = Answer(State.FAILED, "try later", credits=0, free_failure=True)
BINDING = {"api_host": "api.example", "workspace": "ours"}


def fingerprint(number: int) -> bytes:
    """Return the fingerprint of a lead's request."""
    return number.to_bytes(16)


def params(number: int) -> str:
    """Return the params of a lead."""
    return json.dumps({"first_name": f"F{number}", "last_name": f"L{number}", "company": f"c{number}.example"})


def row_requests(numbers: Iterable[int], first: int = 0) -> list[RowRequest]:
    """Return one batch of the input, its first row at position `first`."""
    return [RowRequest(first + row, fingerprint(number), params(number)) for row, number in enumerate(numbers)]


def run_sql(location: LedgerLocation, sql: str, *values: object) -> list[Any]:
    """Run SQL on a ledger through a separate connection; the ledger need not be sound."""
    if isinstance(location, Path):
        with closing(sqlite3.connect(location, isolation_level=None)) as file:
            return file.execute(sql, values).fetchall()
    options = f"-c search_path={location.schema}"
    with psycopg.connect(location.conninfo, autocommit=True, options=options) as server:
        cursor = server.execute(sql.replace("%", "%%").replace("?", "%s"), values)
        return cursor.fetchall() if cursor.description else []


def record_statements(ledger: Ledger, statements: list[str]) -> None:
    """Record the SQL statements that a ledger runs from now on."""
    db = ledger._db
    if isinstance(db, sqlite3.Connection):
        db.set_trace_callback(statements.append)
        return
    execute = db.execute

    def recording_execute(sql: str, values: Sequence[Any] = (), /) -> Cursor:
        statements.append(sql)
        return execute(sql, values)

    db.execute = recording_execute  # type: ignore[method-assign]


@dataclass
class CommittingLedger:
    """A ledger that commits each change separately."""

    location: LedgerLocation
    wrapped: Ledger
    execution: int = 0
    now: int = 1_000

    @classmethod
    def open(cls, location: LedgerLocation) -> CommittingLedger:
        """Open a ledger, as an execution does."""
        return cls(location, Ledger(location))

    @property
    def path(self) -> Path:
        """The path of a ledger in a file."""
        assert isinstance(self.location, Path)
        return self.location

    def commit(self, move: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a change in a transaction of its own."""
        with self.wrapped.transaction():
            return move(self.wrapped, *args, **kwargs)

    def start_execution(self, cap: int | None = None) -> int:
        """Start an execution."""
        self.execution = self.commit(Ledger.start_execution, "job", cap, self.now)
        return self.execution

    def enroll(
        self, *batches: Iterable[int], retry: Collection[State] = (), stale: Mapping[State, int] | None = None
    ) -> None:
        """Enroll an input, batch by batch."""
        self.commit(Ledger.begin_pass, RequestSelection(frozenset(retry), stale or {}))
        position = 0
        for numbers in batches:
            batch = row_requests(numbers, position)
            position += len(batch)
            self.commit(Ledger.enroll, CALL, batch)
        self.commit(Ledger.apply_limits)
        self.commit(Ledger.fill_queue)

    def claim(self, price: int = MAX_PRICE) -> Claim:
        """Claim the next request; there must be one."""
        (claim,) = self.commit(Ledger.claim, self.execution, price, self.now)
        return claim

    def submit(self, task_id: str | None = None) -> int:
        """Claim the next request and record it as accepted; return its attempt."""
        attempt = self.claim().attempt_id
        self.commit(Ledger.record_accepted, [(attempt, task_id or f"task-{attempt}", self.now)], BINDING)
        return attempt

    def settle(self, attempt: int, answer: Answer = FOUND, max_attempts: int = 3) -> State:
        """Record an answer; return the request's new state."""
        (state,) = self.commit(Ledger.settle, [(attempt, answer, self.now)], self.execution, max_attempts)
        return state

    def submit_bulk(self, size: int, task_id: str | None = None) -> list[int]:
        """Claim the next requests as one bulk task and record it as accepted; return their attempts."""
        claims = self.commit(Ledger.claim, self.execution, MAX_PRICE, self.now, size, bulk=True)
        attempts = [claim.attempt_id for claim in claims]
        task_id = task_id or f"bundle-{attempts[0]}"
        self.commit(Ledger.record_accepted, [(attempt, task_id, self.now) for attempt in attempts], BINDING)
        return attempts

    def settle_bulk(self, attempts: Iterable[int], *answers: Answer, credits_: int | None) -> list[State]:
        """Record the answers of a bulk task (a single answer counts for all rows) and its price."""
        attempts = list(attempts)
        per_row = answers if len(answers) > 1 else answers * len(attempts)
        settled = [
            (attempt, replace(answer, credits=None), self.now)
            for attempt, answer in zip(attempts, per_row, strict=True)
        ]
        return self.commit(Ledger.settle_bulk_task, settled, self.execution, 3, credits_)

    def start_and_enroll(self, *numbers: int, cap: int | None = None) -> CommittingLedger:
        """Start an execution and enroll these leads."""
        self.start_execution(cap)
        self.enroll(numbers)
        return self

    def state_of(self, number: int) -> State:
        """Return the state of a lead's request."""
        return State(self.query_one("SELECT state FROM requests WHERE fingerprint = ?", fingerprint(number))[0])

    @property
    def execution_counters(self) -> tuple[int, int, int, int]:
        """The execution's spent, reserved, unknown and submitted."""
        row = self.wrapped.execution(self.execution)
        return row["spent"], row["reserved"], row["unknown"], row["submitted"]

    def query_one(self, sql: str, *values: object) -> Any:
        """Return the first row of a query through a separate connection."""
        return self.query_all(sql, *values)[0]

    def query_all(self, sql: str, *values: object) -> list[Any]:
        """Return the rows of a query through a separate connection."""
        return run_sql(self.location, sql, *values)

    def reopen(self) -> None:
        """Close the ledger and open it again, as after a kill."""
        self.wrapped.close()
        self.wrapped = Ledger(self.location)


def sqlite_connection(ledger: Ledger) -> sqlite3.Connection:
    """Return the SQLite connection of a ledger in a file."""
    assert isinstance(ledger._db, sqlite3.Connection)
    return ledger._db

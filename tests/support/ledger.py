"""A ledger for tests: leads by number, one commit for each change, and queries with plain SQL."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import psycopg

from enrich.job.locations import LedgerLocation
from enrich.job.target import Target, TargetKind
from enrich.ledger import enroll, queue, records, transitions
from enrich.ledger.database import Database
from enrich.ledger.dialect import Cursor
from enrich.models import Answer, ClaimedRequest, RequestBatch, RequestResult, RequestSelection, State

P = ParamSpec("P")
T = TypeVar("T")

CALL = Target(TargetKind.WATERFALL, "email_getter", (833, 966, 701, 745))
#: The maximum price of one request, and the cost of an answer here, in millionths of a credit.
MAX_PRICE, COST = 5, 2
FOUND = Answer(State.FOUND, provider="Mailhound", credits=COST, raw='{"data":{"email":"a@b.example"}}')
NO_MATCH = Answer(State.NOT_FOUND, credits=0, raw='{"data":null}')
FREE_FAILURE = Answer(State.FAILED, "try later", credits=0, free_failure=True)
#: Selects the requests that have no answer yet, without limits.
DEFAULT_SELECTION = RequestSelection()
BINDING = {"api_host": "api.example", "workspace": "ours"}


def fingerprint(number: int) -> bytes:
    """Return the fingerprint of a lead's request."""
    return number.to_bytes(16)


def params(number: int) -> str:
    """Return the params of a lead."""
    return json.dumps({"first_name": f"F{number}", "last_name": f"L{number}", "company": f"c{number}.example"})


class RowRequest(NamedTuple):
    """The request of one row; see `RequestBatch`."""

    position: int
    fingerprint: bytes
    params: str
    queue_position: int | None = None
    group: str | None = None


def as_batch(rows: Iterable[RowRequest]) -> RequestBatch:
    """Return the requests of rows as a batch."""
    rows = list(rows)
    order = [row.position if row.queue_position is None else row.queue_position for row in rows]
    groups = [row.group for row in rows]
    return RequestBatch(
        [row.position for row in rows],
        [row.fingerprint for row in rows],
        [row.params for row in rows],
        order if any(row.queue_position is not None for row in rows) else None,
        groups if any(groups) else None,
    )


def row_requests(numbers: Iterable[int], first: int = 0) -> RequestBatch:
    """Return one batch of the input, its first row at position `first`."""
    return as_batch(RowRequest(first + row, fingerprint(number), params(number)) for row, number in enumerate(numbers))


def results_of(ledger: Database, batch: RequestBatch, selection: RequestSelection | None = None) -> list[RequestResult]:
    """Return the results of a batch."""
    columns = enroll.request_results(ledger, batch, selection)
    return sorted(map(RequestResult._make, zip(*columns.values(), strict=True)))


def run_sql(location: LedgerLocation, sql: str, *values: object) -> list[Any]:
    """Run SQL on a ledger through a separate connection; the ledger need not be sound."""
    if isinstance(location, Path):
        with closing(sqlite3.connect(location, isolation_level=None)) as file:
            return file.execute(sql, values).fetchall()
    options = f"-c search_path={location.schema}"
    with psycopg.connect(location.conninfo, autocommit=True, options=options) as server:
        cursor = server.execute(sql.replace("%", "%%").replace("?", "%s"), values)
        return cursor.fetchall() if cursor.description else []


def record_statements(ledger: Database, statements: list[str]) -> None:
    """Record the SQL statements that a ledger runs from now on."""
    db = ledger.session
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
    wrapped: Database
    execution: int = 0
    now: int = 1_000

    @classmethod
    def open(cls, location: LedgerLocation) -> CommittingLedger:
        """Open a ledger, as an execution does."""
        return cls(location, Database(location))

    @property
    def path(self) -> Path:
        """The path of a ledger in a file."""
        assert isinstance(self.location, Path)
        return self.location

    def commit(self, move: Callable[Concatenate[Database, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a change in a transaction of its own."""
        with self.wrapped.transaction():
            return move(self.wrapped, *args, **kwargs)

    def start_execution(self, cap: int | None = None) -> int:
        """Start an execution."""
        self.execution = self.commit(records.start_execution, "job", cap, self.now)
        return self.execution

    def enroll(
        self, *batches: Iterable[int], retry: Collection[State] = (), stale: Mapping[State, int] | None = None
    ) -> None:
        """Enroll an input, batch by batch."""
        selection = RequestSelection(frozenset(retry), stale or {})
        self.commit(enroll.begin_pass)
        position = 0
        for numbers in batches:
            batch = row_requests(numbers, position)
            position += len(batch.positions)
            self.commit(enroll.enroll, CALL, batch, selection)
        self.commit(enroll.apply_limits, selection)
        self.commit(queue.fill_queue, selection)

    def claim(self, price: int = MAX_PRICE) -> ClaimedRequest:
        """Claim the next request; there must be one."""
        (claim,) = self.commit(queue.claim, self.execution, price, self.now)
        return claim

    def submit(self, task_id: str | None = None) -> int:
        """Claim the next request and record it as accepted; return its attempt."""
        attempt = self.claim().attempt_id
        self.commit(transitions.record_accepted, [(attempt, task_id or f"task-{attempt}", self.now)], BINDING)
        return attempt

    def settle(self, attempt: int, answer: Answer = FOUND, max_attempts: int = 3) -> State:
        """Record an answer; return the request's new state."""
        (state,) = self.commit(transitions.settle, [(attempt, answer, self.now)], self.execution, max_attempts)
        return state

    def submit_bulk(self, size: int, task_id: str | None = None) -> list[int]:
        """Claim the next requests as one bulk task and record it as accepted; return their attempts."""
        claims = self.commit(queue.claim, self.execution, MAX_PRICE, self.now, size, bulk=True)
        attempts = [claim.attempt_id for claim in claims]
        task_id = task_id or f"bundle-{attempts[0]}"
        self.commit(transitions.record_accepted, [(attempt, task_id, self.now) for attempt in attempts], BINDING)
        return attempts

    def settle_bulk(self, attempts: Iterable[int], *answers: Answer, credits_: int | None) -> list[State]:
        """Record the answers of a bulk task (a single answer counts for all rows) and its price."""
        attempts = list(attempts)
        per_row = answers if len(answers) > 1 else answers * len(attempts)
        settled = [
            (attempt, replace(answer, credits=None), self.now)
            for attempt, answer in zip(attempts, per_row, strict=True)
        ]
        return self.commit(transitions.settle_bulk_task, settled, self.execution, 3, credits_)

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
        row = records.read_execution(self.wrapped, self.execution)
        return row.spent, row.reserved, row.unknown, row.submitted

    def query_one(self, sql: str, *values: object) -> Any:
        """Return the first row of a query through a separate connection."""
        return self.query_all(sql, *values)[0]

    def query_all(self, sql: str, *values: object) -> list[Any]:
        """Return the rows of a query through a separate connection."""
        return run_sql(self.location, sql, *values)

    def reopen(self) -> None:
        """Close the ledger and open it again, as after a kill."""
        self.wrapped.close()
        self.wrapped = Database(self.location)


def sqlite_connection(ledger: Database) -> sqlite3.Connection:
    """Return the SQLite connection of a ledger in a file."""
    assert isinstance(ledger.session, sqlite3.Connection)
    return ledger.session

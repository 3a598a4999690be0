"""Reads past runs and single leads from a ledger. Read-only, also during a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from enrich.errors import CommandRefused, EnrichError
from enrich.job.locations import LedgerLocation
from enrich.ledger.database import Database, ledger_exists
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.enroll import OPEN_ATTEMPT
from enrich.models import State


@dataclass(frozen=True, slots=True)
class ExecutionRow:
    """One run. Times are milliseconds since 1970 (UTC), credits are millionths; None: not known."""

    id: int
    started_ms: int
    ended_ms: int | None
    exit_code: int | None
    submitted: int
    spent: int
    unknown: int
    balance_after: int | None
    receipt: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LatestExecutionRow:
    """The newest run of a job. Times are milliseconds since 1970 (UTC), credits are millionths.

    `newest` is the id of the newest run of any job in the ledger. `oldest_ms` is when the oldest running task was
    submitted.
    """

    id: int
    started_ms: int
    ended_ms: int | None
    exit_code: int | None
    cap: int | None
    reserved: int
    spent: int
    unknown: int
    submitted: int
    balance_after: int | None
    pulse: str | None
    newest: int
    oldest_ms: int | None


@dataclass(frozen=True, slots=True)
class LedgerTotals:
    """Totals of the whole ledger, all jobs: credits in millionths, answers of unknown price, unconfirmed, submitted."""

    spent: int
    unknown: int
    in_doubt: int
    submitted: int


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request: its state, the params sent (JSON), and the waterfall call it belongs to."""

    id: int
    fingerprint: bytes
    state: State
    params: str
    call: Mapping[str, Any]
    attempt_id: int | None
    answer_id: int | None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One attempt: a POST and its outcome. Times are milliseconds since 1970 (UTC), credits are millionths."""

    id: int
    execution_id: int
    job: str
    state: str
    task_id: str | None
    claimed_ms: int
    submitted_ms: int | None
    settled_ms: int | None
    settled_execution_id: int | None
    reserved: int
    credits: int | None
    provider: str | None
    error: str | None
    answer: str | None
    #: Size and price (millionths) of the bulk task that it was part of. None: it was sent alone.
    bulk_size: int | None = None
    task_credits: int | None = None


T = TypeVar("T")
_SELECT_REQUEST = "SELECT r.*, c.canonical FROM requests r JOIN calls c ON c.id = r.call_id "


class LedgerReader(Database):
    """A ledger that is opened read-only."""

    def __init__(self, location: LedgerLocation) -> None:
        """Open the ledger. Raises CommandRefused when it is missing, not a ledger, or of another version."""
        if not ledger_exists(location):
            raise CommandRefused(f"{location}: there is no such ledger", "it is made by the first `enrich run`")
        super().__init__(location, read_only=True)

    def begin_snapshot(self) -> None:
        """Read from one snapshot from now on."""
        self._db.begin_snapshot()

    # Executions

    def executions(self, job: str) -> Iterator[ExecutionRow]:
        """Yield the runs of a job, newest first."""
        for row in self._rows("SELECT * FROM executions WHERE job = ? ORDER BY id DESC", job):
            receipt = json.loads(row["receipt"]) if row["receipt"] else {}
            yield ExecutionRow(
                row["id"],
                row["started_ms"],
                row["ended_ms"],
                row["exit_code"],
                row["submitted"],
                row["spent"],
                row["unknown"],
                row["balance_after"],
                receipt,
            )

    def newest_execution_id(self) -> int:
        """Return the id of the newest run of any job, 0 when there is none."""
        (number,) = self._db.execute("SELECT coalesce(max(id), 0) FROM executions").fetchone()
        return int(number)

    def latest_execution(self, job: str) -> LatestExecutionRow | None:
        """Return the newest run of a job. Reads only a few rows. None: the job has not run."""
        cursor = self._db.execute(
            "SELECT *, (SELECT max(id) FROM executions) AS newest, "
            f"(SELECT min(submitted_ms) FROM attempts WHERE {OPEN_ATTEMPT} AND state = 'submitted') AS oldest_ms "
            "FROM executions WHERE job = ? ORDER BY id DESC LIMIT 1",
            (job,),
        )
        row = cursor.fetchone()
        if row is None:
            return None
        values = dict(zip((column[0] for column in cursor.description or ()), row, strict=True))
        return LatestExecutionRow(**{each.name: values[each.name] for each in fields(LatestExecutionRow)})

    def last_ended_ms(self, job: str, codes: Collection[int]) -> int | None:
        """Return when a run of a job last ended with one of these exit codes (ms). None: never."""
        placeholders = ",".join("?" * len(codes))
        row = self._db.execute(
            f"SELECT max(ended_ms) FROM executions WHERE job = ? AND exit_code IN ({placeholders})", (job, *codes)
        ).fetchone()
        return None if row[0] is None else int(row[0])

    def totals(self) -> LedgerTotals:
        """Return the totals of the ledger."""
        row = self._db.execute(
            "SELECT coalesce(sum(paid), 0), "
            "count(*) FILTER (WHERE paid IS NULL AND state IN ('found', 'not_found', 'failed', 'expired')), "
            "(SELECT count(*) FROM requests WHERE state = 'in_doubt'), "
            "count(*) FILTER (WHERE state = 'submitted') FROM billed"
        ).fetchone()
        return LedgerTotals(*map(int, row))

    # One lead

    def find_request(self, fingerprint: bytes) -> RequestRow | None:
        """Find a request by fingerprint. None: the ledger does not have it."""
        return next(map(_request_row, self._rows(_SELECT_REQUEST + "WHERE r.fingerprint = ?", fingerprint)), None)

    def find_by_params(self, params: str) -> Iterator[RequestRow]:
        """Yield the requests with the same params, of any waterfall call."""
        return map(_request_row, self._rows(_SELECT_REQUEST + "WHERE r.params = ? ORDER BY r.id", params))

    def find_by_any_param(self, params: Mapping[str, str]) -> Iterator[RequestRow]:
        """Yield the requests with one of these values in the same param, ignoring case."""
        folded = {name: value.casefold() for name, value in params.items()}
        for row in self._stream_rows(_SELECT_REQUEST + "ORDER BY r.id"):
            sent = json.loads(row["params"])
            if any(str(sent.get(name, "")).casefold() == value for name, value in folded.items()):
                yield _request_row(row)

    def attempts(self, request_id: int) -> list[AttemptRow]:
        """Return every attempt of a request, oldest first."""
        rows = self._rows(
            "SELECT a.*, e.job, b.size AS together, b.credits AS task_credits FROM attempts a "
            "JOIN executions e ON e.id = a.execution_id LEFT JOIN bundles b ON b.id = a.bundle_id "
            "WHERE a.request_id = ? ORDER BY a.id",
            request_id,
        )
        names = "state task_id claimed_ms submitted_ms settled_ms settled_in reserved credits provider error answer "
        names += "together task_credits"
        return [
            AttemptRow(row["id"], row["execution_id"], row["job"], *(row[name] for name in names.split()))
            for row in rows
        ]


def try_read(location: LedgerLocation, query: Callable[[LedgerReader], T]) -> T | None:
    """Run one query. None when the ledger is missing or cannot be read."""
    try:
        with closing(LedgerReader(location)) as history:
            return query(history)
    except (EnrichError, *DATABASE_ERRORS):
        return None


def _request_row(row: Mapping[str, Any]) -> RequestRow:
    return RequestRow(
        row["id"],
        row["fingerprint"],
        State(row["state"]),
        row["params"],
        json.loads(row["canonical"]),
        row["attempt_id"],
        row["answer_id"],
    )

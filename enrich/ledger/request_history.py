"""Reads single requests with all their attempts. Read-only, also during a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from enrich.ledger.database import Database
from enrich.models import State


class RequestRow(Struct, frozen=True):
    """One request: its state, the params sent (JSON), and the call it belongs to."""

    id: int
    fingerprint: bytes
    state: State
    params: str
    call: Mapping[str, Any]
    attempt_id: int | None
    answer_id: int | None


class AttemptRow(Struct, frozen=True):
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


_SELECT_REQUEST = "SELECT r.*, c.canonical FROM requests r JOIN calls c ON c.id = r.call_id "


def find_request(db: Database, fingerprint: bytes) -> RequestRow | None:
    """Find a request by fingerprint. None: the ledger does not have it."""
    return next(map(_request_row, db.rows(_SELECT_REQUEST + "WHERE r.fingerprint = ?", fingerprint)), None)


def find_by_params(db: Database, params: str) -> Iterator[RequestRow]:
    """Yield the requests with the same params, of any call."""
    return map(_request_row, db.rows(_SELECT_REQUEST + "WHERE r.params = ? ORDER BY r.id", params))


def find_by_any_param(db: Database, params: Mapping[str, str]) -> Iterator[RequestRow]:
    """Yield the requests with one of these values in the same param, ignoring case."""
    folded = {name: value.casefold() for name, value in params.items()}
    for row in db.rows(_SELECT_REQUEST + "ORDER BY r.id"):
        sent = json.loads(row["params"])
        if any(str(sent.get(name, "")).casefold() == value for name, value in folded.items()):
            yield _request_row(row)


def attempts(db: Database, request_id: int) -> list[AttemptRow]:
    """Return every attempt of a request, oldest first."""
    rows = db.rows(
        "SELECT a.*, e.job, b.size AS bulk_size, b.credits AS task_credits FROM attempts a "
        "JOIN executions e ON e.id = a.execution_id LEFT JOIN bulk_tasks b ON b.id = a.bulk_task_id "
        "WHERE a.request_id = ? ORDER BY a.id",
        request_id,
    )
    return [AttemptRow(**{name: row[name] for name in AttemptRow.__struct_fields__}) for row in rows]


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

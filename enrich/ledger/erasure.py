"""Erases requests and answers: `forget` by person, `purge` by age."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from enrich.ledger import bindings, enroll
from enrich.ledger.database import Database
from enrich.ledger.dialect import OPEN_ATTEMPT
from enrich.ledger.forgotten import ForgottenRequests, key_id, keyed_hash, read_key


def load_forgotten(db: Database) -> ForgottenRequests:
    """Return the hashes of forgotten requests. Raises CommandRefused when their key is missing or another one."""
    hashes = frozenset(row[0] for row in db.execute("SELECT hash FROM forgotten"))
    return (
        ForgottenRequests(read_key(db.location, bindings.read_fact(db, "forgotten_key")), hashes)
        if hashes
        else ForgottenRequests(b"")
    )


def forget(db: Database, key: bytes, requests: Iterable[tuple[int, bytes, str]], now_ms: int) -> None:
    """Erase requests (id, fingerprint, params) and all their answers.

    Hashes under the key, states and credits stay.
    """
    enroll.begin_pass(db)  # In PostgreSQL the rows of the last pass are still there, with group names
    db.execute("DELETE FROM known_batches")
    bindings.bind(db, {"forgotten_key": key_id(key)})
    for request_id, fingerprint, params in requests:
        hashed = keyed_hash(key, fingerprint)
        db.execute("INSERT INTO forgotten VALUES (?) ON CONFLICT DO NOTHING", (keyed_hash(key, params.encode()),))
        db.execute(
            "UPDATE requests SET fingerprint = ?, params = '{}', erased_ms = ?, forgotten = 1, queue_position = NULL "
            f"WHERE id = ? AND NOT {OPEN_ATTEMPT}",
            (hashed, now_ms, request_id),
        )
        db.execute(
            "DELETE FROM delivered WHERE attempt_id IN (SELECT id FROM attempts WHERE request_id = ?)", (request_id,)
        )
        db.execute("DELETE FROM step_rows WHERE request_id = ?", (request_id,))
        # The API's message about a whole task may concern anyone in it.
        db.execute(
            "UPDATE attempts SET answer = NULL, error = 'failed; what the API said was erased with a person of the "
            "same task' WHERE state = 'failed' AND task_id IS NOT NULL "
            "AND bulk_task_id IN (SELECT bulk_task_id FROM attempts WHERE request_id = ?)",
            (request_id,),
        )
        db.execute(
            "UPDATE attempts SET answer = NULL WHERE state = 'expired' "
            "AND bulk_task_id IN (SELECT bulk_task_id FROM attempts WHERE request_id = ?)",
            (request_id,),
        )
        db.execute(
            "UPDATE attempts SET answer = NULL, error = NULL, task_id = NULL, erased_ms = ? WHERE request_id = ?",
            (now_ms, request_id),
        )


def purge(db: Database, before_ms: int, now_ms: int) -> int:
    """Erase params, answers and errors of requests settled before `before_ms`; return how many.

    States and credits stay.
    """
    enroll.begin_pass(db)
    purged = db.execute(
        "UPDATE requests SET params = '{}', erased_ms = ? WHERE erased_ms IS NULL AND queue_position IS NULL "
        "AND state IN ('found', 'not_found', 'failed', 'expired') AND NOT EXISTS (SELECT 1 FROM attempts a "
        "WHERE a.request_id = requests.id AND (a.settled_ms IS NULL OR a.settled_ms >= ?))",
        (now_ms, before_ms),
    ).rowcount
    db.execute(
        "UPDATE attempts SET answer = NULL, error = NULL, erased_ms = ?1 WHERE erased_ms IS NULL "
        "AND request_id IN (SELECT id FROM requests WHERE erased_ms = ?1)",
        (now_ms,),
    )
    # The answer of a whole task is stored with its first request, which may have been sent again since.
    db.execute(
        "UPDATE attempts SET answer = NULL WHERE state IN ('failed', 'expired') AND answer IS NOT NULL "
        "AND bulk_task_id IN (SELECT id FROM bulk_tasks WHERE settled_ms < ?)",
        (before_ms,),
    )
    return purged


def requests_with_answers(db: Database) -> Iterator[Mapping[str, Any]]:
    """Yield all requests that were not forgotten: id, fingerprint, state, params and `answers` (a JSON list)."""
    answers = db.dialect.json_list.format("a.answer")
    return db.stream_rows(
        f"SELECT r.id, r.fingerprint, r.state, r.params, (SELECT {answers} FROM attempts a "
        "WHERE a.request_id = r.id AND a.answer IS NOT NULL) AS answers FROM requests r WHERE r.forgotten = 0"
    )

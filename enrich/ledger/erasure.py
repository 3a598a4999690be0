"""Erases requests and answers: `forget` by person, `purge` by age. Of forgotten people only keyed hashes stay."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes
from typing import Any

from msgspec import Struct

from enrich.errors import CommandRefused
from enrich.files.atomic import atomic_write
from enrich.job.local_files import read_bounded
from enrich.job.locations import LedgerLocation, path_beside_ledger
from enrich.json_text import to_json_text
from enrich.ledger import enroll, records
from enrich.ledger.database import Database
from enrich.ledger.dialect import JSON_NUMBERS, OPEN_ATTEMPT
from enrich.ledger.file_identity import make_private_folder


class ForgottenRequests(Struct, frozen=True):
    """Requests about forgotten people. Only their keyed hashes are known."""

    key: bytes
    hashes: frozenset[bytes] = frozenset()

    def __contains__(self, params: str) -> bool:
        """Return whether a request with these params (JSON, as sent) is about a forgotten person."""
        return bool(self.hashes) and keyed_hash(self.key, params.encode()) in self.hashes


_KEY_BYTES = 32


def key_path(ledger: LedgerLocation) -> Path:
    """Return the path of the key file. It is not in the ledger, so a copy of the ledger alone identifies no person."""
    return path_beside_ledger(ledger, ".key")


def read_key(ledger: LedgerLocation, expected_key_id: str | None) -> bytes:
    """Read the key. Raises CommandRefused when it is missing or wrong: forgotten people would be looked up again."""
    path = key_path(ledger)
    try:
        key = read_bounded(path)
    except OSError as error:
        reason = error.strerror
    else:
        if len(key) == _KEY_BYTES and expected_key_id in (None, key_id(key)):
            return key
        reason = "it is not the one that they were forgotten with"
    raise CommandRefused(
        f"{path}: the key of the erased people cannot be used: {reason}",
        "restore it from a backup: without it, erased people would be sent again",
    )


def read_or_make_key(ledger: LedgerLocation) -> bytes:
    """Read the key, or create it."""
    path = key_path(ledger)
    if not path.exists():
        write_key(path, token_bytes(_KEY_BYTES))
    return read_key(ledger, None)


def write_key(path: Path, key: bytes) -> None:
    """Write a key durably (mode 0600)."""
    make_private_folder(path.parent)
    with atomic_write(path, path.with_name(f".{path.name}.part")) as file:
        file.write(key)


def keyed_hash(key: bytes, value: bytes) -> bytes:
    """Hash personal data so that it cannot be identified without the key."""
    return blake2b(value, key=key, digest_size=16, person=b"enrich-forgotten").digest()


def key_id(key: bytes) -> str:
    """Return an identifier of a key that does not reveal the key."""
    return blake2b(key, digest_size=16, person=b"enrich-key").hexdigest()


def load_forgotten(db: Database) -> ForgottenRequests:
    """Return the hashes of forgotten requests. Raises CommandRefused when their key is missing or another one."""
    hashes = frozenset(row[0] for row in db.execute("SELECT hash FROM forgotten"))
    return (
        ForgottenRequests(read_key(db.location, records.read_fact(db, "forgotten_key")), hashes)
        if hashes
        else ForgottenRequests(b"")
    )


def forget(
    db: Database, key: bytes, requests: Iterable[tuple[int, bytes, str]], now_ms: int, unsent: Iterable[str] = ()
) -> None:
    """Erase requests (id, fingerprint, params) and all their answers. `unsent` are params that no run may send.

    Hashes under the key, states and credits stay.
    """
    enroll.begin_pass(db)  # In PostgreSQL the rows of the last pass are still there, with group names
    db.execute("DELETE FROM known_batches")
    records.bind(db, {"forgotten_key": key_id(key)})

    known = list(requests)
    hashes = [keyed_hash(key, params.encode()) for params in (*unsent, *(params for *_, params in known))]
    db.executemany("INSERT INTO forgotten VALUES (?) ON CONFLICT DO NOTHING", [(each,) for each in hashes])
    db.executemany(
        "UPDATE requests SET fingerprint = ?, params = '{}', erased_ms = ?, forgotten = 1, queue_position = NULL "
        f"WHERE id = ? AND NOT {OPEN_ATTEMPT}",
        [(keyed_hash(key, fingerprint), now_ms, request_id) for request_id, fingerprint, _ in known],
    )
    ids = (to_json_text([request_id for request_id, *_ in known]),)
    of_requests = f"request_id IN ({JSON_NUMBERS.format('?')})"
    same_tasks = f"bulk_task_id IN (SELECT bulk_task_id FROM attempts WHERE {of_requests})"
    db.execute(f"DELETE FROM delivered WHERE attempt_id IN (SELECT id FROM attempts WHERE {of_requests})", ids)
    db.execute(f"DELETE FROM step_rows WHERE {of_requests}", ids)
    _erase_api_messages(db, of_requests, same_tasks, ids)
    db.execute(
        f"UPDATE attempts SET answer = NULL, error = NULL, task_id = NULL, erased_ms = {now_ms:d} WHERE {of_requests}",
        ids,
    )


def _erase_api_messages(db: Database, of_requests: str, same_tasks: str, ids: tuple[str]) -> None:
    """Erase the messages of the API about bulk tasks, and about POSTs that were not accepted: they may name any lead.

    Both conditions select attempts with `ids`: those of the forgotten requests, and those of their bulk tasks.
    """
    ended_runs = db.execute(
        "SELECT DISTINCT e.id, e.summary FROM executions e JOIN attempts a ON a.execution_id = e.id "
        f"WHERE (a.{of_requests} OR a.{same_tasks}) AND e.summary{db.dialect.as_json}->>'error' = a.error",
        ids * 2,
    ).fetchall()
    summaries = [
        (to_json_text(json.loads(summary) | {"error": "what the API said was erased with a person"}), execution_id)
        for execution_id, summary in ended_runs
    ]
    db.executemany("UPDATE executions SET summary = ? WHERE id = ?", summaries)
    db.execute(
        "UPDATE attempts SET answer = NULL, error = CASE state WHEN 'failed' THEN 'failed; ' ELSE '' END || "
        f"'what the API said was erased with a person of the same task' WHERE {same_tasks} AND "
        "(state = 'failed' AND task_id IS NOT NULL OR state IN ('refused', 'in_doubt') AND error LIKE '%HTTP %')",
        ids,
    )
    db.execute(f"UPDATE attempts SET answer = NULL WHERE state IN ('expired', 'in_doubt') AND {same_tasks}", ids)


def forgotten_task_count(db: Database) -> int:
    """Return how many tasks of forgotten people the ledger had."""
    return db.number(
        "SELECT count(*) FROM requests r JOIN attempts a ON a.request_id = r.id "
        "WHERE r.erased_ms IS NOT NULL AND r.forgotten = 1"
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
        "UPDATE attempts SET answer = NULL WHERE state IN ('failed', 'expired', 'in_doubt') AND answer IS NOT NULL "
        "AND bulk_task_id IS NOT NULL AND settled_ms < ?",
        (before_ms,),
    )
    return purged


def requests_with_answers(db: Database) -> Iterator[Mapping[str, Any]]:
    """Yield all requests that were not forgotten: id, fingerprint, state, params and `answers` (a JSON list)."""
    answers = db.dialect.json_list.format("a.answer")
    return db.rows(
        f"SELECT r.id, r.fingerprint, r.state, r.params, (SELECT {answers} FROM attempts a "
        "WHERE a.request_id = r.id AND a.answer IS NOT NULL) AS answers FROM requests r WHERE r.forgotten = 0"
    )

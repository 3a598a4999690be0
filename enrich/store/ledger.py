"""The durable record of requests, tasks, results, credits and executions: all SQL, every move, no policy.

A method is one move inside the caller's transaction: `with ledger.transaction(): …`, or many of
them in one commit through `journal.Journal`. Durable means `synchronous=FULL` in WAL mode: a
committed move survives a power cut (SQLite docs: "Pragma synchronous").
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from enrich.model import MOVES, Answer, Claim, State, Task
from enrich.privacy import Forgotten, keyed, proof, read_key
from enrich.store.figures import Figures
from enrich.store.intake import OPEN_ATTEMPT, QUEUED


class CapReached(Exception):
    """The budget has no room for another request now; what is in flight may free some."""


class Ledger(Figures):
    """What was asked, of whom, at what price, and what came of it; the caller holds the lock beside it."""

    # What the ledger is bound to

    def fact(self, name: str) -> str | None:
        """Look up what the ledger is bound to (`api_host`, `workspace`)."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def bind(self, facts: Mapping[str, str | None]) -> None:
        """Bind the ledger, once: what is bound stays."""
        known = [(name, value) for name, value in facts.items() if value is not None]
        self._db.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?)", known)

    def waterfall(self, identifier: str) -> tuple[dict[str, Any], list[int] | None] | None:
        """Return the waterfall as last described, and its default providers as first resolved."""
        row = self._db.execute(
            "SELECT description, providers FROM waterfalls WHERE identifier = ?", (identifier,)
        ).fetchone()
        return None if row is None else (json.loads(row[0]), None if row[1] is None else json.loads(row[1]))

    def remember_waterfall(self, identifier: str, description: Mapping[str, Any], providers: Sequence[int]) -> None:
        """Keep the description; the providers are replaced too, so pass the old ones to keep them."""
        self._db.execute(
            "INSERT OR REPLACE INTO waterfalls VALUES (?, ?, ?)",
            (identifier, json.dumps(description, ensure_ascii=False), json.dumps(list(providers))),
        )

    # Executions

    def recover(self, now_ms: int) -> int:
        """Put what a crash left in `submitting` in doubt (edge d); return how many."""
        self._db.execute(
            "UPDATE requests SET state = 'in_doubt', attempts = attempts + 1, position = NULL "
            f"WHERE id IN (SELECT request_id FROM attempts WHERE state = 'submitting' AND {OPEN_ATTEMPT})"
        )
        return self._db.execute(
            "UPDATE attempts SET state = 'in_doubt', settled_ms = ?, error = 'the program ended between the request "
            f"and its answer' WHERE state = 'submitting' AND {OPEN_ATTEMPT}",
            (now_ms,),
        ).rowcount

    def start_execution(
        self, job: str, cap: int | None, now_ms: int, balance: int | None = None, paths: Sequence[str] = ()
    ) -> int:
        """Begin an execution. What is in flight from earlier ones settles in it, so it counts against its cap.

        `paths` are the job's columns: whoever collects what this one leaves behind judges it by them.
        """
        row = self._db.execute(
            "INSERT INTO executions (job, started_ms, cap, balance_before, paths, reserved) VALUES (?, ?, ?, ?, ?, "
            f"(SELECT coalesce(sum(reserved), 0) FROM attempts WHERE {OPEN_ATTEMPT})) RETURNING id",
            (job, now_ms, cap, balance, json.dumps(list(paths))),
        ).fetchone()
        return int(row[0])

    def end_execution(
        self,
        execution_id: int,
        exit_code: int,
        receipt: Mapping[str, Any],
        now_ms: int,
        balance: int | None = None,
    ) -> None:
        """Write down how an execution ended."""
        self._db.execute(
            "UPDATE executions SET ended_ms = ?, exit_code = ?, receipt = ?, balance_after = ? WHERE id = ?",
            (now_ms, exit_code, json.dumps(receipt), balance, execution_id),
        )

    def execution(self, execution_id: int) -> sqlite3.Row:
        """Return one execution, with `spent`, `reserved`, `unknown` and `submitted`."""
        return next(self._rows("SELECT * FROM executions WHERE id = ?", execution_id))

    def was_used(self, job: str | None = None) -> bool:
        """Tell whether anything was ever submitted from this ledger (for a job)."""
        sql = "SELECT EXISTS (SELECT 1 FROM executions WHERE submitted > 0 AND (?1 IS NULL OR job = ?1))"
        row = self._db.execute(sql, (job,)).fetchone()
        return bool(row[0])

    def executions(self, job: str | None = None, last: int = -1) -> list[sqlite3.Row]:
        """Return the newest `last` executions (of one job), newest first."""
        sql = "SELECT * FROM executions WHERE ?1 IS NULL OR job = ?1 ORDER BY id DESC LIMIT ?2"
        return list(self._rows(sql, job, last))

    # Submit: pending → submitting → submitted

    def claim(self, execution_id: int, price: int, now_ms: int, *, only_new: bool = False) -> Claim | None:
        """Take the next wanted request (edge a), its worst price reserved; None when the queue is empty.

        `only_new` passes over those that were answered before. Raises CapReached when the cap has no room for
        `price` now.
        """
        row = self._db.execute(
            f"SELECT id, params, state, attempt_id FROM requests WHERE {QUEUED} "
            f"{'AND +state = ?1 ' if only_new else ''}ORDER BY position LIMIT 1",
            (State.PENDING,) if only_new else (),
        ).fetchone()
        if row is None:
            return None
        request_id, params, state, previous_id = row
        reserved = self._db.execute(
            "UPDATE executions SET reserved = reserved + ?1 "
            "WHERE id = ?2 AND (cap IS NULL OR spent + reserved + ?1 <= cap)",
            (price, execution_id),
        )
        if not reserved.rowcount:
            raise CapReached
        attempt = self._db.execute(
            "INSERT INTO attempts (request_id, execution_id, came_from, previous_id, state, claimed_ms, reserved) "
            "VALUES (?, ?, ?, ?, 'submitting', ?, ?) RETURNING id",
            (request_id, execution_id, state, previous_id, now_ms, price),
        ).fetchone()
        self._db.execute(
            "UPDATE requests SET state = 'submitting', attempt_id = ?, attempts = iif(state = 'pending', attempts, 0) "
            "WHERE id = ?",
            (attempt[0], request_id),
        )
        return Claim(attempt[0], params)

    def accepted(self, attempt_id: int, task_id: str, now_ms: int, bound_to: Mapping[str, str | None]) -> None:
        """Write down the task id (edge b) and, with the first of them, whose ledger this is."""
        self._close(attempt_id, State.SUBMITTING, State.SUBMITTED, "submitted", task_id=task_id, submitted_ms=now_ms)
        self._count_attempt(attempt_id)
        self._db.execute(
            "UPDATE executions SET submitted = submitted + 1 "
            "WHERE id = (SELECT execution_id FROM attempts WHERE id = ?)",
            (attempt_id,),
        )
        self.bind(bound_to)

    def refused(self, attempt_id: int, reason: str, now_ms: int) -> None:
        """Nothing was accepted (edge c): back to where it stood, in the queue, at no cost and not counted."""
        came_from, previous_id = self._db.execute(
            "SELECT came_from, previous_id FROM attempts WHERE id = ?", (attempt_id,)
        ).fetchone()
        self._close(
            attempt_id, State.SUBMITTING, State(came_from), "refused", error=reason, settled_ms=now_ms, credits=0
        )
        if came_from != State.PENDING:
            self._db.execute(
                "UPDATE requests SET attempt_id = ? WHERE id = (SELECT request_id FROM attempts WHERE id = ?)",
                (previous_id, attempt_id),
            )
        self._release(attempt_id)

    def rejected(self, attempt_id: int, reason: str, now_ms: int) -> None:
        """Fail the request whose params the API refused (edge c): it costs nothing."""
        self._close(attempt_id, State.SUBMITTING, State.FAILED, "failed", error=reason, settled_ms=now_ms, credits=0)
        self._release(attempt_id)

    def doubt(self, attempt_id: int, reason: str, now_ms: int) -> None:
        """Nobody can tell whether it was charged (edges d, e): the reservation stays."""
        (state,) = self._db.execute(
            "SELECT state FROM requests WHERE id = (SELECT request_id FROM attempts WHERE id = ?)", (attempt_id,)
        ).fetchone()
        self._close(attempt_id, State(state), State.IN_DOUBT, "in_doubt", error=reason, settled_ms=now_ms)
        if state == State.SUBMITTING:
            self._count_attempt(attempt_id)

    # Settle: submitted → an answer

    def tasks(self) -> list[Task]:
        """Return all tasks that wait for their answer, nearest expiry first."""
        rows = self._db.execute(
            "SELECT a.id, a.task_id, a.submitted_ms, a.seen_alive, e.paths FROM attempts a "
            "JOIN executions e ON e.id = a.execution_id "
            f"WHERE a.state = 'submitted' AND a.{OPEN_ATTEMPT} ORDER BY a.submitted_ms"
        )
        return [
            Task(attempt_id, task_id, at, bool(alive), tuple(json.loads(paths)))
            for attempt_id, task_id, at, alive, paths in rows
        ]

    def alive(self, attempt_id: int) -> None:
        """Write down that the API knows the task."""
        self._db.execute("UPDATE attempts SET seen_alive = 1 WHERE id = ?", (attempt_id,))

    def settle(self, attempt_id: int, answer: Answer, execution_id: int, now_ms: int, max_attempts: int) -> State:
        """Write down an answer (edge e); a failure at no charge goes back to the queue (edge g).

        Returns the state that the request has now.
        """
        (attempts,) = self._db.execute(
            "SELECT attempts FROM requests WHERE id = (SELECT request_id FROM attempts WHERE id = ?)", (attempt_id,)
        ).fetchone()
        again = answer.free_failure and attempts < max_attempts
        state = State.PENDING if again else answer.state
        self._close(
            attempt_id,
            State.SUBMITTED,
            state,
            answer.state,
            settled_ms=now_ms,
            settled_in=execution_id,
            credits=answer.credits,
            provider=answer.provider,
            error=answer.error,
            answer=answer.raw,
        )
        if answer.state is State.FOUND:
            self._db.execute(
                "UPDATE requests SET answer_id = ?1 WHERE id = (SELECT request_id FROM attempts WHERE id = ?1)",
                (attempt_id,),
            )
        known = answer.credits is not None
        self._db.execute(
            "UPDATE executions SET spent = spent + ?, unknown = unknown + ?, "
            "reserved = reserved - (SELECT iif(?, reserved, 0) FROM attempts WHERE id = ?) WHERE id = ?",
            (answer.credits or 0, not known, known, attempt_id, execution_id),
        )
        return state

    def _close(self, attempt_id: int, before: State, after: State, outcome: str, **known: object) -> None:
        """Move an attempt to its outcome and its request with it; both must stand where they are thought to."""
        columns = "".join(f", {name} = :{name}" for name in known)
        attempt = self._db.execute(
            f"UPDATE attempts SET state = :outcome{columns} WHERE id = :id AND state = :before RETURNING request_id",
            {"outcome": outcome, "id": attempt_id, "before": before, **known},
        ).fetchone()
        if attempt is None or (before, after) not in MOVES:
            raise AssertionError(f"attempt {attempt_id} cannot go from {before} to {after}")
        # What came to its end leaves the queue; what was refused or failed for nothing keeps its place.
        keeps_place = outcome in ("refused", State.SUBMITTED) or after is State.PENDING
        moved = self._db.execute(
            "UPDATE requests SET state = ?, position = iif(?, position, NULL) "
            "WHERE id = ? AND attempt_id = ? AND state = ?",
            (after, keeps_place, attempt[0], attempt_id, before),
        )
        if moved.rowcount != 1:
            raise AssertionError(f"the request of attempt {attempt_id} is not {before}")

    def _count_attempt(self, attempt_id: int) -> None:
        self._db.execute(
            "UPDATE requests SET attempts = attempts + 1 WHERE id = (SELECT request_id FROM attempts WHERE id = ?)",
            (attempt_id,),
        )

    def _release(self, attempt_id: int) -> None:
        """Give the reservation of an attempt back to the execution that made it."""
        self._db.execute(
            "UPDATE executions SET reserved = executions.reserved - a.reserved "
            "FROM attempts a WHERE a.id = ? AND executions.id = a.execution_id",
            (attempt_id,),
        )

    # The change feed

    def undelivered(self, job: str, told: Iterable[tuple[int, bytes, int]]) -> list[tuple[int, str | None]]:
        """Tell which rows (index, row key, attempt) a job's feed has not told yet, and the answer it told before."""
        self._db.execute(
            "CREATE TEMP TABLE IF NOT EXISTS told (i INTEGER PRIMARY KEY, row_key BLOB, attempt_id INTEGER)"
        )
        self._db.execute("DELETE FROM told")
        self._db.executemany("INSERT INTO told VALUES (?, ?, ?)", told)
        return self._db.execute(
            "SELECT t.i, a.answer FROM told t LEFT JOIN delivered d ON d.job = ? AND d.row_key = t.row_key "
            "LEFT JOIN attempts a ON a.id = d.attempt_id WHERE d.attempt_id IS NOT t.attempt_id ORDER BY t.i",
            (job,),
        ).fetchall()

    def deliver(self, job: str, told: Iterable[tuple[int, bytes, int]]) -> None:
        """Remember what a job's feed has told."""
        self._db.executemany(
            "INSERT OR REPLACE INTO delivered VALUES (?, ?, ?)", ((job, key, attempt) for _, key, attempt in told)
        )

    # Forgetting

    def forgotten(self) -> Forgotten:
        """Tell who was forgotten. Raises Refused when the key to it is missing, or another."""
        hashes = frozenset(row[0] for row in self._db.execute("SELECT hash FROM forgotten"))
        return Forgotten(read_key(self.path, self.fact("forgotten_key")), hashes) if hashes else Forgotten(b"")

    def forget(self, key: bytes, requests: Iterable[tuple[int, bytes, str]], now_ms: int) -> None:
        """Erase requests (id, fingerprint, params) with all that was answered.

        What stays is hashes under the key, states and credits.
        """
        self.bind({"forgotten_key": proof(key)})
        for request_id, fingerprint, params in requests:
            hashed = keyed(key, fingerprint)
            self._db.execute("INSERT OR IGNORE INTO forgotten VALUES (?)", (keyed(key, params.encode()),))
            self._db.execute(
                "UPDATE requests SET fingerprint = ?, params = '{}', erased_ms = ?, forgotten = 1, position = NULL "
                f"WHERE id = ? AND NOT {OPEN_ATTEMPT}",
                (hashed, now_ms, request_id),
            )
            self._db.execute(
                "DELETE FROM delivered WHERE attempt_id IN (SELECT id FROM attempts WHERE request_id = ?)",
                (request_id,),
            )
            self._db.execute(
                "UPDATE attempts SET answer = NULL, error = NULL, task_id = NULL, erased_ms = ? WHERE request_id = ?",
                (now_ms, request_id),
            )

    def purge(self, before_ms: int, now_ms: int) -> int:
        """Drop params, answers and errors of what was settled before a time; that it was paid for is remembered."""
        purged = self._db.execute(
            "UPDATE requests SET params = '{}', erased_ms = ? WHERE erased_ms IS NULL AND position IS NULL "
            "AND state IN ('found', 'not_found', 'failed', 'expired') AND id NOT IN "
            "(SELECT request_id FROM attempts WHERE settled_ms IS NULL OR settled_ms >= ?)",
            (now_ms, before_ms),
        ).rowcount
        self._db.execute(
            "UPDATE attempts SET answer = NULL, error = NULL, erased_ms = ?1 WHERE erased_ms IS NULL "
            "AND request_id IN (SELECT id FROM requests WHERE erased_ms = ?1)",
            (now_ms,),
        )
        return purged

    def requests(self) -> Iterator[sqlite3.Row]:
        """Yield all requests that were not erased: id, fingerprint, state, params and `answers` (a JSON list)."""
        return self._rows(
            "SELECT r.id, r.fingerprint, r.state, r.params, (SELECT json_group_array(a.answer) FROM attempts a "
            "WHERE a.request_id = r.id AND a.answer IS NOT NULL) AS answers FROM requests r WHERE NOT r.forgotten"
        )

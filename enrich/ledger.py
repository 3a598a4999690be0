"""The durable record of requests, tasks, results, credits and executions: all SQL, every move, no policy.

A method is one move inside the caller's transaction: `with ledger.transaction(): …`, or many of
them in one commit through `journal.Journal`. Durable means `synchronous=FULL` in WAL mode: a
committed move survives a power cut (SQLite docs: "Pragma synchronous").
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from enrich.database import Database
from enrich.model import MOVES, Answer, Call, Claim, Standing, State, Task

#: Word for word the condition of the index `open_attempts`: without it SQLite would read all attempts.
OPEN_ATTEMPT = "state IN ('submitting', 'submitted')"
#: Likewise of the index `queue`: what this execution may ask, whatever it has been asked before.
QUEUED = "position IS NOT NULL AND state NOT IN ('submitting', 'submitted')"


class CapReached(Exception):
    """The budget has no room for another request now; what is in flight may free some."""


class Ledger(Database):
    """What was asked, of whom, at what price, and what came of it; the caller holds the lock beside it."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the ledger as Database does, ready to be joined with batches of the input."""
        super().__init__(path, read_only=read_only)
        self._db.execute("CREATE TEMP TABLE batch (i INTEGER PRIMARY KEY, fingerprint BLOB, params TEXT)")
        self._db.execute("CREATE TEMP TABLE seen (request_id INTEGER PRIMARY KEY, position INTEGER)")

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

    def start_execution(self, job: str, cap: int | None, now_ms: int, balance: int | None = None) -> int:
        """Begin an execution. What is in flight from earlier ones settles in it, so it counts against its cap."""
        row = self._db.execute(
            "INSERT INTO executions (job, started_ms, cap, balance_before, reserved) VALUES (?, ?, ?, ?, "
            f"(SELECT coalesce(sum(reserved), 0) FROM attempts WHERE {OPEN_ATTEMPT})) RETURNING id",
            (job, now_ms, cap, balance),
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

    def was_used(self) -> bool:
        """Tell whether anything was ever submitted from this ledger."""
        row = self._db.execute("SELECT EXISTS (SELECT 1 FROM executions WHERE submitted > 0)").fetchone()
        return bool(row[0])

    def executions(self, job: str | None = None, last: int = -1) -> list[sqlite3.Row]:
        """Return the newest `last` executions (of one job), newest first."""
        sql = "SELECT * FROM executions WHERE ?1 IS NULL OR job = ?1 ORDER BY id DESC LIMIT ?2"
        return list(self._rows(sql, job, last))

    # Enroll: from the input to the queue

    def clear_queue(self) -> None:
        """Forget what earlier executions wanted: a lead that left the file is never paid for."""
        self._db.execute(f"UPDATE requests SET position = NULL WHERE {QUEUED}")
        self._db.execute(
            f"UPDATE requests SET position = NULL WHERE id IN (SELECT request_id FROM attempts WHERE {OPEN_ATTEMPT})"
        )

    def begin_pass(self) -> None:
        """Begin to read the input from its start: no request was seen yet."""
        self._db.execute("DELETE FROM seen")

    def enroll(
        self,
        call: Call,
        wanted: Iterable[tuple[int, bytes, str]],
        *,
        retry: Collection[State] = (),
        stale: Mapping[State, int] | None = None,
    ) -> None:
        """Mark the requests that this execution wants, making those that are new.

        `wanted` holds (position, fingerprint, params as JSON). Marked are those without an answer, those in a
        state of `retry` (edge f), and those of `stale` whose answer came before that time (edge h). The mark
        is a place in the queue; it ends with the execution, and so does the person's word.
        """
        self._load(wanted)
        canonical = json.dumps(call.body() | {"waterfall": call.waterfall}, sort_keys=True)
        self._db.execute("INSERT OR IGNORE INTO calls (canonical) VALUES (?)", (canonical,))
        self._db.execute(
            "INSERT INTO requests (fingerprint, call_id, params, state) "
            "SELECT fingerprint, (SELECT id FROM calls WHERE canonical = ?), params, 'pending' "
            "FROM batch WHERE true ORDER BY i ON CONFLICT (fingerprint) DO NOTHING",
            (canonical,),
        )
        self._see()
        again = {"open": "state IN ('pending', 'submitting', 'submitted')"}
        again |= {state: f"state = '{state}'" for state in retry}
        for state, before_ms in (stale or {}).items():
            settled_ms = "(SELECT settled_ms FROM attempts a WHERE a.id = attempt_id)"
            again[state] = f"state = '{state}' AND {settled_ms} < {before_ms:d}"
        self._db.execute(
            "UPDATE requests SET position = s.position FROM temp.seen s "
            "WHERE s.request_id = requests.id AND requests.position IS NULL "
            "AND id IN (SELECT r.id FROM batch b JOIN requests r ON r.fingerprint = b.fingerprint) "
            f"AND ({' OR '.join(again.values())})"
        )

    def accept_doubts(self, wanted: Iterable[tuple[int, bytes, str]]) -> int:
        """Settle what is in doubt as failed (edge f, by the person's word); its attempt stays in doubt on record."""
        self._load(wanted)
        return self._db.execute(
            "UPDATE requests SET state = 'failed' WHERE state = 'in_doubt' "
            "AND id IN (SELECT r.id FROM batch b JOIN requests r ON r.fingerprint = b.fingerprint)"
        ).rowcount

    def enrolled(self) -> dict[State, int]:
        """Count the distinct requests of this pass by their state; those in the queue are pending."""
        rows = self._db.execute(
            "SELECT CASE WHEN r.position IS NOT NULL AND r.state NOT IN ('submitting', 'submitted') "
            "THEN 'pending' ELSE r.state END, count(*) "
            "FROM seen s JOIN requests r ON r.id = s.request_id GROUP BY 1"
        )
        return {State(state): count for state, count in rows}

    def standing(self, asked: Iterable[tuple[int, bytes]]) -> Iterator[Standing]:
        """Tell what is known of each (position, fingerprint) of a batch; a request never enrolled is left out."""
        self._load((position, fingerprint, None) for position, fingerprint in asked)
        self._see()
        rows = self._rows(
            "SELECT b.i, s.position = b.i, "
            "CASE WHEN r.answer_id IS NULL THEN r.state ELSE a.state END, "
            "a.answer, a.error, a.provider, a.credits, a.task_id, a.settled_ms "
            "FROM batch b JOIN requests r ON r.fingerprint = b.fingerprint "
            "JOIN seen s ON s.request_id = r.id "
            "LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) ORDER BY b.i"
        )
        for index, first, state, *known in rows:
            yield Standing(index, bool(first), State(state), *known)

    def _load(self, asked: Iterable[tuple[int, bytes, str | None]]) -> None:
        self._db.execute("DELETE FROM batch")
        self._db.executemany("INSERT INTO batch VALUES (?, ?, ?)", asked)

    def _see(self) -> None:
        self._db.execute(
            "INSERT OR IGNORE INTO seen SELECT r.id, b.i FROM batch b "
            "JOIN requests r ON r.fingerprint = b.fingerprint ORDER BY b.i"
        )

    # Submit: pending → submitting → submitted

    def claim(self, execution_id: int, price: int, now_ms: int) -> Claim | None:
        """Take the next wanted request (edge a), its worst price reserved; None when the queue is empty.

        Raises CapReached when the cap has no room for `price` now.
        """
        row = self._db.execute(
            f"SELECT id, params, state, attempt_id FROM requests WHERE {QUEUED} ORDER BY position LIMIT 1"
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
            "SELECT id, task_id, submitted_ms, seen_alive FROM attempts "
            f"WHERE state = 'submitted' AND {OPEN_ATTEMPT} ORDER BY submitted_ms"
        )
        return [Task(attempt_id, task_id, at, bool(alive)) for attempt_id, task_id, at, alive in rows]

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

    # Looking

    def counts(self) -> dict[State, int]:
        """Count all requests by state."""
        rows = self._db.execute("SELECT state, count(*) FROM requests GROUP BY state")
        return {State(state): count for state, count in rows}

    def totals(self) -> tuple[int, int]:
        """Sum the known credits of all attempts (millionths), and count the answers whose price is not known."""
        row = self._db.execute(
            "SELECT coalesce(sum(credits), 0), "
            "coalesce(sum(credits IS NULL AND state IN ('found', 'not_found', 'failed', 'expired')), 0) FROM attempts"
        ).fetchone()
        return int(row[0]), int(row[1])

    def movements(self, since: int) -> list[tuple[str, bool, int, int, int]]:
        """Sum up the attempts that were made or settled since an execution.

        Rows are (`known` when the price is, else the attempt's state; was it made since; number; credits; reserved).
        """
        return self._db.execute(
            "SELECT CASE WHEN credits IS NOT NULL THEN 'known' ELSE state END, execution_id >= ?1, "
            "count(*), coalesce(sum(credits), 0), sum(reserved) FROM attempts "
            "WHERE state <> 'refused' AND (execution_id >= ?1 OR settled_in >= ?1 OR state = 'submitted') "
            "GROUP BY 1, 2",
            (since,),
        ).fetchall()

"""The moves of requests from the queue to their answers: the SQL of every edge of the state diagram.

A move takes all that came together, in a few statements however many they are; each of them must
stand where it is thought to, or nothing of the move stays. Requests that are sent as one task
(`dispatch: bulk`) share a bundle: its price is known for the whole of it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from enrich.model import Answer, Claim, State, Task, written
from enrich.store.intake import OPEN_ATTEMPT, QUEUED
from enrich.store.review import Review

#: An attempt, what is told of it, and when (ms).
Told = tuple[int, str, int]


#: The numbers of a JSON list.
NUMBERS = "SELECT CAST(value AS BIGINT) FROM json_each(CAST({} AS TEXT))"


class CapReached(Exception):
    """The budget has no room for another request now; what is in flight may free some."""


class Moves(Review):
    """A ledger whose requests are submitted and settled."""

    #: The names of the facts that are known to be in the ledger.
    _bound: frozenset[str] = frozenset()

    # Submit: pending → submitting → submitted

    def claim(  # noqa: PLR0913 - its budget, and which
        self, execution_id: int, price: int, now_ms: int, room: int = 1, *, only_new: bool = False, bulk: bool = False
    ) -> list[Claim]:
        """Take the next `room` wanted requests (edge a), the worst price of each reserved; none: the queue is empty.

        `only_new` passes over those that were answered before; `bulk` makes them one bundle. Raises CapReached when
        the cap has no room for `price` now.
        """
        dialect = self._db.dialect
        new = f"AND {dialect.no_index}state = ?2 " if only_new else ""
        queue = self._db.execute(
            f"SELECT id FROM requests WHERE {QUEUED} {new}ORDER BY position LIMIT ?1 {dialect.skip_locked}",
            (room, State.PENDING) if only_new else (room,),
        )
        if not (wanted := [row[0] for row in queue]):
            return []
        (left,) = self._db.execute(
            f"SELECT cap - spent - reserved FROM executions WHERE id = ? {dialect.for_update}", (execution_id,)
        ).fetchone()
        if left is not None and price * len(wanted) > left:
            wanted = wanted[: max(0, left // price if price else 0)]
        if not wanted:
            raise CapReached
        self._db.execute(
            "UPDATE executions SET reserved = reserved + ? WHERE id = ?", (price * len(wanted), execution_id)
        )
        bundle = None
        if bulk:
            insert = "INSERT INTO bundles (execution_id, size) VALUES (?, ?) RETURNING id"
            (bundle,) = self._db.execute(insert, (execution_id, len(wanted))).fetchone()
        made = self._db.execute(
            "INSERT INTO attempts "
            "(request_id, execution_id, came_from, previous_id, state, claimed_ms, reserved, bundle_id, place) "
            "SELECT r.id, ?2, r.state, r.attempt_id, 'submitting', ?3, ?4, CAST(?5 AS BIGINT), "
            "CASE WHEN CAST(?5 AS BIGINT) IS NOT NULL THEN key END "
            "FROM json_each(CAST(?1 AS TEXT)) JOIN requests r ON r.id = CAST(value AS BIGINT) ORDER BY key "
            "RETURNING id",
            (written(wanted), execution_id, now_ms, price, bundle),
        ).fetchall()
        rows = self._db.execute(
            "UPDATE requests SET state = 'submitting', attempt_id = a.id, attempts = CASE WHEN a.came_from = 'pending' "
            "THEN attempts ELSE 0 END FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value AS BIGINT) "
            "WHERE requests.id = a.request_id RETURNING attempt_id, params",
            (written([number for (number,) in made]),),
        ).fetchall()
        return [Claim(attempt_id, params, bundle) for attempt_id, params in sorted(rows)]

    def accepted(self, told: Sequence[Told], bound_to: Mapping[str, str | None]) -> None:
        """Write down the task ids (edge b) and, with the first of them, whose ledger this is."""
        self._tell(
            told,
            "submitting",
            attempt="state = 'submitted', task_id = value->>1, submitted_ms = CAST(value->>2 AS BIGINT)",
            request="state = 'submitted', attempts = attempts + 1",
        )
        self._db.execute(
            "UPDATE executions SET submitted = submitted + ? "
            "WHERE id = (SELECT execution_id FROM attempts WHERE id = ?)",
            (len(told), told[0][0]),
        )
        self.bind(bound_to)

    def refused(self, told: Sequence[Told]) -> None:
        """Nothing was accepted (edge c): back to where they stood, in the queue, at no cost and not counted."""
        self._tell(
            told,
            "submitting",
            attempt="state = 'refused', error = value->>1, settled_ms = CAST(value->>2 AS BIGINT), credits = 0",
            request="state = a.came_from, "
            "attempt_id = CASE WHEN a.came_from = 'pending' THEN attempt_id ELSE a.previous_id END",
        )
        self._release(told)

    def rejected(self, told: Sequence[Told]) -> None:
        """Fail the requests whose params the API refused (edge c): it costs nothing."""
        self._tell(
            told,
            "submitting",
            attempt="state = 'failed', error = value->>1, settled_ms = CAST(value->>2 AS BIGINT), credits = 0",
            request="state = 'failed', position = NULL",
        )
        self._release(told)

    def doubt(self, told: Sequence[Told]) -> None:
        """Nobody can tell whether it was charged (edges d, e): the reservations stay."""
        self._tell(
            told,
            "submitting",
            "submitted",
            attempt="state = 'in_doubt', error = value->>1, settled_ms = CAST(value->>2 AS BIGINT)",
            request="state = 'in_doubt', position = NULL, "
            "attempts = attempts + CASE WHEN a.state = 'submitting' THEN 1 ELSE 0 END",
        )

    # Settle: submitted → an answer

    def tasks(self) -> list[Task]:
        """Return all tasks that wait for their answer and that no other process is at, nearest expiry first."""
        # Who only looks sees all of them.
        ours = self._db.dialect.ours if self._shared else "true"
        rows = self._db.execute(
            "SELECT a.id, a.bundle_id, a.task_id, a.submitted_ms, a.seen_alive, e.paths FROM attempts a "
            "JOIN executions e ON e.id = a.execution_id "
            f"WHERE a.state = 'submitted' AND a.{OPEN_ATTEMPT} AND {ours} "
            "ORDER BY a.submitted_ms, a.bundle_id, a.place, a.id"
        )
        tasks = []
        for bundle, together in groupby(rows, key=lambda row: row[1]):
            for alone in [list(together)] if bundle is not None else ([row] for row in together):
                _, _, task_id, at, alive, paths = alone[0]
                attempts = tuple(row[0] for row in alone)
                tasks.append(Task(attempts, task_id, at, bool(alive), tuple(json.loads(paths)), bundle))
        return tasks

    def alive(self, attempts: Sequence[int]) -> None:
        """Write down that the API knows the tasks."""
        self._db.execute(
            f"UPDATE attempts SET seen_alive = 1 WHERE id IN ({NUMBERS.format('?')})", (written(attempts),)
        )

    def settle(self, told: Sequence[tuple[int, Answer, int]], execution_id: int, max_attempts: int) -> list[State]:
        """Write down answers (edge e), each with its time (ms); a failure at no charge goes back (edge g).

        Returns the states that the requests have now.
        """
        states = self._settle(told, execution_id, max_attempts)
        known = [attempt_id for attempt_id, answer, _ in told if answer.credits is not None]
        spent = sum(answer.credits or 0 for _, answer, _ in told)
        self._charge(execution_id, spent, len(told) - len(known), known)
        return states

    def settle_bundle(
        self,
        told: Sequence[tuple[int, Answer, int]],
        execution_id: int,
        max_attempts: int,
        credits_: int | None,
    ) -> list[State]:
        """Write down the answers of one task, whose price is known for all of them together, or not at all."""
        states = self._settle(told, execution_id, max_attempts)
        attempts = [attempt_id for attempt_id, _, _ in told]
        self._db.execute(
            "UPDATE bundles SET credits = ?, settled_ms = ?, settled_in = ? "
            "WHERE id = (SELECT bundle_id FROM attempts WHERE id = ?)",
            (credits_, told[0][2], execution_id, attempts[0]),
        )
        known = credits_ is not None
        self._charge(execution_id, credits_ or 0, 0 if known else len(told), attempts if known else [])
        return states

    def _settle(self, told: Sequence[tuple[int, Answer, int]], execution_id: int, max_attempts: int) -> list[State]:
        again = f"CAST(value->>7 AS INTEGER) = 1 AND attempts < {max_attempts:d}"
        self._tell(
            [
                (number, a.state, now_ms, a.credits, a.provider, a.error, a.raw, int(a.free_failure))
                for number, a, now_ms in told
            ],
            "submitted",
            attempt="state = value->>1, settled_ms = CAST(value->>2 AS BIGINT), "
            "credits = CAST(value->>3 AS BIGINT), provider = value->>4, "
            f"error = value->>5, answer = value->>6, settled_in = {execution_id:d}",
            # What came to its end leaves the queue; what failed for nothing keeps its place.
            request=f"state = CASE WHEN {again} THEN 'pending' ELSE value->>1 END, "
            f"position = CASE WHEN {again} THEN position END, "
            "answer_id = CASE WHEN value->>1 = 'found' THEN a.id ELSE answer_id END",
        )
        if not any(answer.free_failure for _, answer, _ in told):
            return [answer.state for _, answer, _ in told]
        rows = self._db.execute(
            "SELECT r.state FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value AS BIGINT) "
            "JOIN requests r ON r.id = a.request_id ORDER BY key",
            (written([number for number, _, _ in told]),),
        )
        return [State(row[0]) for row in rows]

    def bind(self, facts: Mapping[str, str | None]) -> None:
        """Bind the ledger, once: what is bound stays."""
        known = [(name, value) for name, value in facts.items() if value is not None and name not in self._bound]
        if not known:
            return
        # What was read is there to stay; what we write may be taken back.
        self._bound = frozenset(name for (name,) in self._db.execute("SELECT name FROM facts").fetchall())
        self._db.executemany("INSERT INTO facts VALUES (?, ?) ON CONFLICT DO NOTHING", known)

    def _tell(self, told: Sequence[tuple[Any, ...]], *before: str, attempt: str, request: str) -> None:
        """Change attempts and their requests, which must stand alike, where they are thought to.

        What is told is `value`, the attempt is `a`.
        """
        what = written(told)
        stood = ", ".join(f"'{state}'" for state in before)
        moved = self._db.execute(
            f"UPDATE requests SET {request} "
            "FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value->>0 AS BIGINT) "
            f"WHERE requests.id = a.request_id AND attempt_id = a.id AND requests.state = a.state "
            f"AND a.state IN ({stood})",
            (what,),
        ).rowcount
        closed = self._db.execute(
            f"UPDATE attempts SET {attempt} FROM json_each(CAST(? AS TEXT)) "
            f"WHERE attempts.id = CAST(value->>0 AS BIGINT) AND attempts.state IN ({stood})",
            (what,),
        ).rowcount
        if not moved == closed == len(told):
            numbers = ", ".join(str(first[0]) for first in told)
            raise AssertionError(f"the attempts {numbers} and their requests are not all {' or '.join(before)}")

    def _release(self, told: Sequence[Told]) -> None:
        """Give the reservations of attempts back to the executions that made them."""
        self._db.execute(
            "UPDATE executions SET reserved = executions.reserved - freed.reserved FROM (SELECT execution_id, "
            f"sum(reserved) AS reserved FROM attempts WHERE id IN ({NUMBERS.format('?')}) GROUP BY 1) freed "
            "WHERE executions.id = freed.execution_id",
            (written([first[0] for first in told]),),
        )

    def _charge(self, execution_id: int, spent: int, unknown: int, known: Sequence[int]) -> None:
        """Count what was spent; the attempts whose price is known need their reservation no more."""
        self._db.execute(
            "UPDATE executions SET spent = spent + ?2, unknown = unknown + ?3, reserved = reserved - (SELECT "
            f"coalesce(sum(reserved), 0) FROM attempts WHERE id IN ({NUMBERS.format('?4')})) WHERE id = ?1",
            (execution_id, spent, unknown, written(known)),
        )

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

from enrich.model import TASK_ID_TWICE, Acceptance, Answer, Claim, State, Task, written
from enrich.store.intake import OPEN_ATTEMPT, QUEUED
from enrich.store.task_ids import NUMBERS, TaskIds

#: Word for word the condition of the index `written_off`.
WRITTEN_OFF = "state IN ('in_doubt', 'expired') AND a.task_id IS NOT NULL AND a.gone = 0"
#: An attempt, what is told of it, and when (ms).
Told = tuple[int, str, int]
#: An attempt in doubt, the reason, when (ms), and the task id that the API's answer carried, if any.
Doubt = tuple[int, str, int, str | None]

#: The attempt `a`, or one of its bundle, is of a request that is about to be asked again.
_QUEUED_AGAIN = (
    "EXISTS (SELECT 1 FROM attempts q JOIN requests s ON s.id = q.request_id WHERE (q.id = a.id OR "
    "q.bundle_id = a.bundle_id) AND s.position IS NOT NULL AND s.attempt_id = q.id "
    "AND s.state IN ('in_doubt', 'expired'))"
)


class CapReached(Exception):
    """The budget has no room for another request now; what is in flight may free some."""


class Moves(TaskIds):
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

    def accepted(self, told: Sequence[Told], bound_to: Mapping[str, str | None]) -> list[Acceptance]:
        """Write down task ids (edge b) and, with the first of them, what the ledger is bound to.

        An id that an attempt of another question has is no acceptance (edge d). Returns what each id means.
        """
        means = self._compare_ids({attempt: task_id for attempt, task_id, _ in told})
        taken = [each for each in told if means[each[0]] is Acceptance.TAKEN]
        fine = [each for each in told if means[each[0]] is not Acceptance.TAKEN]
        if taken:
            self.doubt([(attempt, f"{TASK_ID_TWICE}: {task_id}", at, None) for attempt, task_id, at in taken])
        if fine:
            self._tell(
                fine,
                "submitting",
                attempt="state = 'submitted', task_id = value->>1, submitted_ms = CAST(value->>2 AS BIGINT)",
                request="state = 'submitted', attempts = attempts + 1",
            )
            self._db.execute(
                "UPDATE executions SET submitted = submitted + ? "
                "WHERE id = (SELECT execution_id FROM attempts WHERE id = ?)",
                (len(fine), fine[0][0]),
            )
            self.bind(bound_to)
        return [means[attempt] for attempt, _, _ in told]

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

    def doubt(self, told: Sequence[Doubt]) -> None:
        """It is not known whether it was charged (edges d, e): the reservations stay.

        An id that the answer carried is kept and asked for later; one that another question has is kept in words only.
        """
        ids = {attempt: task_id for attempt, _, _, task_id in told if task_id is not None}
        means = self._compare_ids(ids) if ids else {}
        said = [
            (attempt, f"{reason}; {TASK_ID_TWICE}: {task_id}", at, None)
            if means.get(attempt) is Acceptance.TAKEN
            else (attempt, reason, at, task_id)
            for attempt, reason, at, task_id in told
        ]
        self._tell(
            said,
            "submitting",
            "submitted",
            attempt="state = 'in_doubt', error = value->>1, settled_ms = CAST(value->>2 AS BIGINT), "
            "task_id = coalesce(task_id, value->>3)",
            request="state = 'in_doubt', position = NULL, "
            "attempts = attempts + CASE WHEN a.state = 'submitting' THEN 1 ELSE 0 END",
        )

    # Settle: submitted → an answer

    def tasks(self) -> list[Task]:
        """Return all tasks that wait for their answer and that no other process is at, nearest expiry first."""
        # Who only looks sees all of them.
        ours = self._db.dialect.ours if self._shared else "true"
        return self._read_tasks(f"a.state = 'submitted' AND a.{OPEN_ATTEMPT} AND {ours}")

    def written_off(self, since_ms: int, *, queued: bool = False) -> list[Task]:
        """Return tasks in doubt, or expired by a 404, whose fate a free question may tell, nearest expiry first.

        `since_ms`: submitted after that (ms); `queued`: whose request is about to be asked again. Their ids belong to
        no other attempt. A bundle is left out when a request of it was asked again meanwhile.
        """
        which = f"AND {_QUEUED_AGAIN}" if queued else ""
        return self._read_tasks(
            f"a.{WRITTEN_OFF} AND a.credits IS NULL AND coalesce(a.submitted_ms, a.claimed_ms) > ? {which} "
            # A doubt that the person has accepted as lost is not in doubt any more.
            "AND (r.state = a.state OR r.attempt_id <> a.id) AND NOT EXISTS (SELECT 1 FROM attempts o "
            "WHERE o.task_id = a.task_id AND o.id <> a.id AND coalesce(o.bundle_id <> a.bundle_id, true)) "
            "AND (SELECT credits FROM bundles WHERE id = a.bundle_id) IS NULL "
            "AND (a.bundle_id IS NULL OR NOT EXISTS (SELECT 1 FROM attempts o JOIN requests s ON s.id = o.request_id "
            "WHERE o.bundle_id = a.bundle_id AND (s.attempt_id <> o.id OR s.state <> o.state OR o.gone = 1 "
            "OR o.state NOT IN ('in_doubt', 'expired'))))",
            since_ms,
        )

    def _read_tasks(self, which: str, *values: object) -> list[Task]:
        rows = self._db.execute(
            "SELECT a.id, a.bundle_id, a.task_id, coalesce(a.submitted_ms, a.claimed_ms), a.seen_alive, e.paths, "
            "r.attempt_id <> a.id FROM attempts a JOIN executions e ON e.id = a.execution_id "
            f"JOIN requests r ON r.id = a.request_id WHERE {which} ORDER BY 4, a.bundle_id, a.place, a.id",
            values,
        )
        tasks = []
        for bundle, together in groupby(rows, key=lambda row: row[1]):
            for alone in [list(together)] if bundle is not None else ([row] for row in together):
                _, _, task_id, at, alive, paths, late = alone[0]
                attempts = tuple(row[0] for row in alone)
                tasks.append(Task(attempts, task_id, at, bool(alive), tuple(json.loads(paths)), bundle, bool(late)))
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
        told = self._priced_once(told)
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
        if credits_ and self._is_paid(told[0][0]):
            credits_ = 0
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
                (number, a.state, now_ms, a.credits, a.provider, a.error, a.raw, int(a.free_failure), int(a.gone))
                for number, a, now_ms in told
            ],
            "submitted",
            attempt="state = value->>1, settled_ms = CAST(value->>2 AS BIGINT), "
            "credits = CAST(value->>3 AS BIGINT), provider = value->>4, "
            # What could not be read is kept, though there is no answer in the end.
            f"error = value->>5, answer = coalesce(value->>6, answer), gone = CAST(value->>8 AS INTEGER), "
            f"settled_in = {execution_id:d}",
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

    # Free questions: what was written off is asked for once more

    def revive(self, attempts: Sequence[int], execution_id: int) -> None:
        """Wait again for a task that an earlier execution wrote off, and that the API knows after all (edge i)."""
        numbers = written(attempts)
        self._unsettle(numbers)
        self._db.execute(
            "UPDATE executions SET submitted = executions.submitted + late.number FROM "
            "(SELECT execution_id, count(*) AS number FROM attempts "
            f"WHERE submitted_ms IS NULL AND id IN ({NUMBERS.format('?')}) GROUP BY 1) late "
            "WHERE executions.id = late.execution_id",
            (numbers,),
        )
        self._db.execute(
            "UPDATE executions SET reserved = reserved + (SELECT coalesce(sum(reserved), 0) FROM attempts "
            f"WHERE execution_id <> ?1 AND id IN ({NUMBERS.format('?2')})) WHERE id = ?1",
            (execution_id, numbers),
        )
        owner = ", owner_id = NULL" if self._db.dialect.leases else ""
        self._tell(
            [(attempt,) for attempt in attempts],
            "in_doubt",
            "expired",
            attempt="state = 'submitted', submitted_ms = coalesce(submitted_ms, claimed_ms), settled_ms = NULL, "
            f"settled_in = NULL, error = NULL, seen_alive = 1{owner}",
            request="state = 'submitted'",
        )

    def _unsettle(self, numbers: str) -> None:
        """Take back that executions settled these attempts (a JSON list) at a price that was not known."""
        those = f"id IN ({NUMBERS.format('?')})"
        self._db.execute(
            "UPDATE executions SET unknown = unknown - late.number FROM (SELECT settled_in, count(*) AS number "
            f"FROM attempts WHERE settled_in IS NOT NULL AND {those} GROUP BY 1) late "
            "WHERE executions.id = late.settled_in",
            (numbers,),
        )
        self._db.execute(
            "UPDATE bundles SET settled_ms = NULL, settled_in = NULL "
            f"WHERE id IN (SELECT bundle_id FROM attempts WHERE {those})",
            (numbers,),
        )

    def settle_superseded(self, attempt_id: int, answer: Answer, now_ms: int, execution_id: int) -> None:
        """Write down what an attempt cost whose request was asked again meanwhile; the request stays as it is."""
        self._unsettle(written([attempt_id]))
        self._db.execute(
            "UPDATE attempts SET credits = ?, answer = ?, provider = ?, settled_ms = ?, settled_in = ? WHERE id = ?",
            (answer.credits, answer.raw, answer.provider, now_ms, execution_id, attempt_id),
        )
        self._release([(attempt_id, "", now_ms)])
        self._charge(execution_id, answer.credits or 0, 0, [])

    def mark_gone(self, attempts: Sequence[int]) -> None:
        """Write down that the API has deleted a result: it is not asked for any more."""
        self._db.execute(f"UPDATE attempts SET gone = 1 WHERE id IN ({NUMBERS.format('?')})", (written(attempts),))

    def keep_unread(self, attempts: Sequence[int], reason: str, raw: str | None) -> None:
        """Keep an answer that could not be read, or does not count, with the reason; its task stays open."""
        self._db.execute(
            f"UPDATE attempts SET error = ? WHERE state = 'submitted' AND id IN ({NUMBERS.format('?')})",
            (reason, written(attempts)),
        )
        answer = None if raw is None else written({"unread": raw})
        self._db.execute("UPDATE attempts SET answer = ? WHERE state = 'submitted' AND id = ?", (answer, attempts[0]))

    def unqueue(self, attempts: Sequence[int]) -> None:
        """Do not ask the requests of these attempts again in this execution."""
        self._db.execute(
            f"UPDATE requests SET position = NULL WHERE attempt_id IN ({NUMBERS.format('?')})", (written(attempts),)
        )

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

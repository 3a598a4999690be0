"""The transitions of requests from the queue to their answers: the SQL of every edge of the state diagram.

An operation takes a list of attempts and needs a few statements, whatever the length of the list. Every attempt must be
in the expected state, or the whole operation is rolled back. Requests sent as one bulk task (`dispatch: bulk`) share a
row of `bundles`: the price is known only for the whole task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from enrich.ledger.enroll import OPEN_ATTEMPT, QUEUED
from enrich.ledger.task_ids import JSON_NUMBERS, TaskIdQueries
from enrich.models import DUPLICATE_TASK_ID, Acceptance, Answer, Claim, State, Task, to_json_text

#: An attempt id, its new value (task id or error), and when (ms).
AttemptUpdate = tuple[int, str, int]
#: An unconfirmed attempt, the reason, when (ms), and the task id of the API's answer, if it had one.
InDoubtUpdate = tuple[int, str, int, str | None]


class CapReached(Exception):
    """The credit cap has no room for another request now. Running tasks may free some of it when they settle."""


class QueueTransitions(TaskIdQueries):
    """A ledger with the transitions for submitting and settling."""

    #: Names of facts that are certainly in the ledger.
    _known_facts: frozenset[str] = frozenset()

    # Submit: pending → submitting → submitted

    def claim(  # noqa: PLR0913 - the budget and the selection
        self,
        execution_id: int,
        max_price: int,
        now_ms: int,
        count: int = 1,
        *,
        only_new: bool = False,
        bulk: bool = False,
    ) -> list[Claim]:
        """Claim the next `count` queued requests (edge a) and reserve `max_price` (millionths) for each.

        Empty: the queue is empty. `only_new` skips requests that were answered before; `bulk` makes one bulk task of
        them. Raises CapReached when the cap has no room for `max_price` now.
        """
        dialect = self._db.dialect
        only_new_sql = f"AND {dialect.no_index}state = ?2 " if only_new else ""
        queued_rows = self._db.execute(
            f"SELECT id FROM requests WHERE {QUEUED} {only_new_sql}ORDER BY position LIMIT ?1 {dialect.skip_locked}",
            (count, State.PENDING) if only_new else (count,),
        )
        if not (request_ids := [row[0] for row in queued_rows]):
            return []
        (remaining,) = self._db.execute(
            f"SELECT cap - spent - reserved FROM executions WHERE id = ? {dialect.for_update}", (execution_id,)
        ).fetchone()
        if remaining is not None and max_price * len(request_ids) > remaining:
            request_ids = request_ids[: max(0, remaining // max_price if max_price else 0)]
        if not request_ids:
            raise CapReached
        self._db.execute(
            "UPDATE executions SET reserved = reserved + ? WHERE id = ?", (max_price * len(request_ids), execution_id)
        )
        bulk_task_id = None
        if bulk:
            insert = "INSERT INTO bundles (execution_id, size) VALUES (?, ?) RETURNING id"
            (bulk_task_id,) = self._db.execute(insert, (execution_id, len(request_ids))).fetchone()
        attempt_rows = self._db.execute(
            "INSERT INTO attempts "
            "(request_id, execution_id, came_from, previous_id, state, claimed_ms, reserved, bundle_id, place) "
            "SELECT r.id, ?2, r.state, r.attempt_id, 'submitting', ?3, ?4, CAST(?5 AS BIGINT), "
            "CASE WHEN CAST(?5 AS BIGINT) IS NOT NULL THEN key END "
            "FROM json_each(CAST(?1 AS TEXT)) JOIN requests r ON r.id = CAST(value AS BIGINT) ORDER BY key "
            "RETURNING id",
            (to_json_text(request_ids), execution_id, now_ms, max_price, bulk_task_id),
        ).fetchall()
        rows = self._db.execute(
            "UPDATE requests SET state = 'submitting', attempt_id = a.id, attempts = CASE WHEN a.came_from = 'pending' "
            "THEN attempts ELSE 0 END FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value AS BIGINT) "
            "WHERE requests.id = a.request_id RETURNING attempt_id, params",
            (to_json_text([number for (number,) in attempt_rows]),),
        ).fetchall()
        return [Claim(attempt_id, params, bulk_task_id) for attempt_id, params in sorted(rows)]

    def record_accepted(self, updates: Sequence[AttemptUpdate], facts: Mapping[str, str | None]) -> list[Acceptance]:
        """Store task ids (edge b) and, with the first of them, what the ledger is bound to.

        An id that an attempt of another request already has is not accepted (edge d). Returns what each id means.
        """
        acceptances = self._check_task_ids({attempt: task_id for attempt, task_id, _ in updates})
        conflicting_updates = [each for each in updates if acceptances[each[0]] is Acceptance.CONFLICT]
        accepted_updates = [each for each in updates if acceptances[each[0]] is not Acceptance.CONFLICT]
        if conflicting_updates:
            self.mark_in_doubt(
                [(attempt, f"{DUPLICATE_TASK_ID}: {task_id}", at, None) for attempt, task_id, at in conflicting_updates]
            )
        if accepted_updates:
            self._transition(
                accepted_updates,
                "submitting",
                set_attempt="state = 'submitted', task_id = value->>1, submitted_ms = CAST(value->>2 AS BIGINT)",
                set_request="state = 'submitted', attempts = attempts + 1",
            )
            self._db.execute(
                "UPDATE executions SET submitted = submitted + ? "
                "WHERE id = (SELECT execution_id FROM attempts WHERE id = ?)",
                (len(accepted_updates), accepted_updates[0][0]),
            )
            self.bind(facts)
        return [acceptances[attempt] for attempt, _, _ in updates]

    def record_refused(self, updates: Sequence[AttemptUpdate]) -> None:
        """Return requests that the API did not accept (edge c) to their previous state, free and not counted.

        They stay in the queue.
        """
        self._transition(
            updates,
            "submitting",
            set_attempt="state = 'refused', error = value->>1, settled_ms = CAST(value->>2 AS BIGINT), credits = 0",
            set_request="state = a.came_from, "
            "attempt_id = CASE WHEN a.came_from = 'pending' THEN attempt_id ELSE a.previous_id END",
        )
        self._release_reservations(updates)

    def record_rejected(self, updates: Sequence[AttemptUpdate]) -> None:
        """Fail the requests whose params the API refused (edge c). They cost nothing."""
        self._transition(
            updates,
            "submitting",
            set_attempt="state = 'failed', error = value->>1, settled_ms = CAST(value->>2 AS BIGINT), credits = 0",
            set_request="state = 'failed', position = NULL",
        )
        self._release_reservations(updates)

    def mark_in_doubt(self, updates: Sequence[InDoubtUpdate]) -> None:
        """Mark attempts as unconfirmed: they may have been charged (edges d, e), so the reservations stay.

        A task id from the API's answer is stored and polled later. An id that another request has is only mentioned in
        the error.
        """
        task_ids = {attempt: task_id for attempt, _, _, task_id in updates if task_id is not None}
        acceptances = self._check_task_ids(task_ids) if task_ids else {}
        checked_updates = [
            (attempt, f"{reason}; {DUPLICATE_TASK_ID}: {task_id}", at, None)
            if acceptances.get(attempt) is Acceptance.CONFLICT
            else (attempt, reason, at, task_id)
            for attempt, reason, at, task_id in updates
        ]
        self._transition(
            checked_updates,
            "submitting",
            "submitted",
            set_attempt="state = 'in_doubt', error = value->>1, settled_ms = CAST(value->>2 AS BIGINT), "
            "task_id = coalesce(task_id, value->>3)",
            set_request="state = 'in_doubt', position = NULL, "
            "attempts = attempts + CASE WHEN a.state = 'submitting' THEN 1 ELSE 0 END",
        )

    # Settle: submitted → an answer

    def submitted_tasks(self) -> list[Task]:
        """Return all tasks that wait for their answer and that no other process holds, nearest expiry first."""
        # A reader that did not open the ledger for writing sees the tasks of all processes.
        condition = self._db.dialect.not_held_by_others if self._pass_is_shared else "true"
        return self._read_tasks(f"a.state = 'submitted' AND a.{OPEN_ATTEMPT} AND {condition}")

    def _read_tasks(self, condition: str, *values: object) -> list[Task]:
        rows = self._db.execute(
            "SELECT a.id, a.bundle_id, a.task_id, coalesce(a.submitted_ms, a.claimed_ms), a.seen_alive, e.paths, "
            "r.attempt_id <> a.id FROM attempts a JOIN executions e ON e.id = a.execution_id "
            f"JOIN requests r ON r.id = a.request_id WHERE {condition} ORDER BY 4, a.bundle_id, a.place, a.id",
            values,
        )
        tasks = []
        for bulk_task_id, group in groupby(rows, key=lambda row: row[1]):
            for task_rows in [list(group)] if bulk_task_id is not None else ([row] for row in group):
                _, _, task_id, submitted_ms, acknowledged, paths, superseded = task_rows[0]
                attempts = tuple(row[0] for row in task_rows)
                tasks.append(
                    Task(
                        attempts,
                        task_id,
                        submitted_ms,
                        bool(acknowledged),
                        tuple(json.loads(paths)),
                        bulk_task_id,
                        bool(superseded),
                    )
                )
        return tasks

    def mark_acknowledged(self, attempt_ids: Sequence[int]) -> None:
        """Record that the API has acknowledged the tasks of these attempts."""
        self._db.execute(
            f"UPDATE attempts SET seen_alive = 1 WHERE id IN ({JSON_NUMBERS.format('?')})", (to_json_text(attempt_ids),)
        )

    def settle(self, answers: Sequence[tuple[int, Answer, int]], execution_id: int, max_attempts: int) -> list[State]:
        """Store answers (edge e), each with its time (ms). A failure at no charge goes back to the queue (edge g).

        Returns the new states of the requests.
        """
        answers = self._charge_once(answers)
        states = self._write_answers(answers, execution_id, max_attempts)
        priced_ids = [attempt_id for attempt_id, answer, _ in answers if answer.credits is not None]
        spent = sum(answer.credits or 0 for _, answer, _ in answers)
        self._charge(execution_id, spent, len(answers) - len(priced_ids), priced_ids)
        return states

    def settle_bulk_task(
        self,
        answers: Sequence[tuple[int, Answer, int]],
        execution_id: int,
        max_attempts: int,
        credits_: int | None,
    ) -> list[State]:
        """Store the answers of one bulk task. `credits_` is the price of the whole task; None: not known."""
        if credits_ and self._is_task_paid(answers[0][0]):
            credits_ = 0
        states = self._write_answers(answers, execution_id, max_attempts)
        attempt_ids = [attempt_id for attempt_id, _, _ in answers]
        self._db.execute(
            "UPDATE bundles SET credits = ?, settled_ms = ?, settled_in = ? "
            "WHERE id = (SELECT bundle_id FROM attempts WHERE id = ?)",
            (credits_, answers[0][2], execution_id, attempt_ids[0]),
        )
        is_priced = credits_ is not None
        self._charge(execution_id, credits_ or 0, 0 if is_priced else len(answers), attempt_ids if is_priced else [])
        return states

    def _write_answers(
        self, answers: Sequence[tuple[int, Answer, int]], execution_id: int, max_attempts: int
    ) -> list[State]:
        retry_condition = f"CAST(value->>7 AS INTEGER) = 1 AND attempts < {max_attempts:d}"
        self._transition(
            [
                (
                    number,
                    a.state,
                    now_ms,
                    a.credits,
                    a.provider,
                    a.error,
                    a.raw,
                    int(a.free_failure),
                    int(a.result_deleted),
                )
                for number, a, now_ms in answers
            ],
            "submitted",
            set_attempt="state = value->>1, settled_ms = CAST(value->>2 AS BIGINT), "
            "credits = CAST(value->>3 AS BIGINT), provider = value->>4, "
            # Keep an earlier answer that could not be read, even if the task ends without an answer.
            f"error = value->>5, answer = coalesce(value->>6, answer), gone = CAST(value->>8 AS INTEGER), "
            f"settled_in = {execution_id:d}",
            # Settled requests leave the queue. A failure at no charge keeps its place.
            set_request=f"state = CASE WHEN {retry_condition} THEN 'pending' ELSE value->>1 END, "
            f"position = CASE WHEN {retry_condition} THEN position END, "
            "answer_id = CASE WHEN value->>1 = 'found' THEN a.id ELSE answer_id END",
        )
        if not any(answer.free_failure for _, answer, _ in answers):
            return [answer.state for _, answer, _ in answers]
        rows = self._db.execute(
            "SELECT r.state FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value AS BIGINT) "
            "JOIN requests r ON r.id = a.request_id ORDER BY key",
            (to_json_text([number for number, _, _ in answers]),),
        )
        return [State(row[0]) for row in rows]

    def bind(self, facts: Mapping[str, str | None]) -> None:
        """Bind the ledger to facts. A fact that is already bound stays unchanged."""
        new_facts = [
            (name, value) for name, value in facts.items() if value is not None and name not in self._known_facts
        ]
        if not new_facts:
            return
        # Facts that were read are permanent. Our own insert may still be rolled back.
        self._known_facts = frozenset(name for (name,) in self._db.execute("SELECT name FROM facts").fetchall())
        self._db.executemany("INSERT INTO facts VALUES (?, ?) ON CONFLICT DO NOTHING", new_facts)

    def _transition(
        self, updates: Sequence[tuple[Any, ...]], *from_states: str, set_attempt: str, set_request: str
    ) -> None:
        """Change attempts and their requests. Both must be in the same one of `from_states`.

        In the SQL, `value` is the JSON list of an update and `a` is the attempt.
        """
        updates_json = to_json_text(updates)
        from_states_sql = ", ".join(f"'{state}'" for state in from_states)
        requests_changed = self._db.execute(
            f"UPDATE requests SET {set_request} "
            "FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value->>0 AS BIGINT) "
            f"WHERE requests.id = a.request_id AND attempt_id = a.id AND requests.state = a.state "
            f"AND a.state IN ({from_states_sql})",
            (updates_json,),
        ).rowcount
        attempts_changed = self._db.execute(
            f"UPDATE attempts SET {set_attempt} FROM json_each(CAST(? AS TEXT)) "
            f"WHERE attempts.id = CAST(value->>0 AS BIGINT) AND attempts.state IN ({from_states_sql})",
            (updates_json,),
        ).rowcount
        if not requests_changed == attempts_changed == len(updates):
            numbers = ", ".join(str(first[0]) for first in updates)
            raise AssertionError(f"the attempts {numbers} and their requests are not all {' or '.join(from_states)}")

    def _release_reservations(self, updates: Sequence[AttemptUpdate]) -> None:
        """Return the reservations of attempts to the runs that made them."""
        self._db.execute(
            "UPDATE executions SET reserved = executions.reserved - freed.reserved FROM (SELECT execution_id, "
            f"sum(reserved) AS reserved FROM attempts WHERE id IN ({JSON_NUMBERS.format('?')}) GROUP BY 1) freed "
            "WHERE executions.id = freed.execution_id",
            (to_json_text([first[0] for first in updates]),),
        )

    def _charge(self, execution_id: int, spent: int, unknown: int, priced_ids: Sequence[int]) -> None:
        """Add `spent` credits and `unknown` prices to a run; release the reservations of `priced_ids`."""
        self._db.execute(
            "UPDATE executions SET spent = spent + ?2, unknown = unknown + ?3, reserved = reserved - (SELECT "
            f"coalesce(sum(reserved), 0) FROM attempts WHERE id IN ({JSON_NUMBERS.format('?4')})) WHERE id = ?1",
            (execution_id, spent, unknown, to_json_text(priced_ids)),
        )

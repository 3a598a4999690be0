"""Tasks that were written off (in doubt, expired) and polled again for free."""

from __future__ import annotations

from collections.abc import Sequence

from enrich.ledger.queue import QueueTransitions
from enrich.ledger.task_ids import JSON_NUMBERS
from enrich.models import Answer, Task, to_json_text

#: Exactly the condition of the index `written_off`.
WRITTEN_OFF = "state IN ('in_doubt', 'expired') AND a.task_id IS NOT NULL AND a.gone = 0"
#: The request of attempt `a`, or of another attempt of the same bulk task, is queued to be sent again.
_QUEUED_AGAIN = (
    "EXISTS (SELECT 1 FROM attempts q JOIN requests s ON s.id = q.request_id WHERE (q.id = a.id OR "
    "q.bundle_id = a.bundle_id) AND s.position IS NOT NULL AND s.attempt_id = q.id "
    "AND s.state IN ('in_doubt', 'expired'))"
)


class WrittenOffQueries(QueueTransitions):
    """Reads written-off tasks and changes their state when the API still has them."""

    def written_off_tasks(self, since_ms: int, *, only_queued: bool = False) -> list[Task]:
        """Return written-off tasks whose result a free GET may find, nearest expiry first.

        These are tasks in doubt, and tasks that expired by a 404.

        `since_ms`: submitted after that (ms). `only_queued`: only those whose request is queued to be sent again. No
        other attempt has the task's id. A bulk task is left out when one of its requests was sent again meanwhile.
        """
        queued_condition = f"AND {_QUEUED_AGAIN}" if only_queued else ""
        return self._read_tasks(
            f"a.{WRITTEN_OFF} AND a.credits IS NULL AND coalesce(a.submitted_ms, a.claimed_ms) > ? {queued_condition} "
            # Requests that the user accepted as failed are no longer in doubt.
            "AND (r.state = a.state OR r.attempt_id <> a.id) AND NOT EXISTS (SELECT 1 FROM attempts o "
            "WHERE o.task_id = a.task_id AND o.id <> a.id AND coalesce(o.bundle_id <> a.bundle_id, true)) "
            "AND (SELECT credits FROM bundles WHERE id = a.bundle_id) IS NULL "
            "AND (a.bundle_id IS NULL OR NOT EXISTS (SELECT 1 FROM attempts o JOIN requests s ON s.id = o.request_id "
            "WHERE o.bundle_id = a.bundle_id AND (s.attempt_id <> o.id OR s.state <> o.state OR o.gone = 1 "
            "OR o.state NOT IN ('in_doubt', 'expired'))))",
            since_ms,
        )

    def revive(self, attempt_ids: Sequence[int], execution_id: int) -> None:
        """Wait again for tasks that an earlier run wrote off but the API still has (edge i)."""
        ids_json = to_json_text(attempt_ids)
        self._unsettle(ids_json)
        self._db.execute(
            "UPDATE executions SET submitted = executions.submitted + late.number FROM "
            "(SELECT execution_id, count(*) AS number FROM attempts "
            f"WHERE submitted_ms IS NULL AND id IN ({JSON_NUMBERS.format('?')}) GROUP BY 1) late "
            "WHERE executions.id = late.execution_id",
            (ids_json,),
        )
        self._db.execute(
            "UPDATE executions SET reserved = reserved + (SELECT coalesce(sum(reserved), 0) FROM attempts "
            f"WHERE execution_id <> ?1 AND id IN ({JSON_NUMBERS.format('?2')})) WHERE id = ?1",
            (execution_id, ids_json),
        )
        clear_owner = ", owner_id = NULL" if self._db.dialect.has_leases else ""
        self._transition(
            [(attempt,) for attempt in attempt_ids],
            "in_doubt",
            "expired",
            set_attempt="state = 'submitted', submitted_ms = coalesce(submitted_ms, claimed_ms), settled_ms = NULL, "
            f"settled_in = NULL, error = NULL, seen_alive = 1{clear_owner}",
            set_request="state = 'submitted'",
        )

    def _unsettle(self, ids_json: str) -> None:
        """Undo the settlement of attempts (a JSON list of ids) that was made at an unknown price."""
        condition = f"id IN ({JSON_NUMBERS.format('?')})"
        self._db.execute(
            "UPDATE executions SET unknown = unknown - late.number FROM (SELECT settled_in, count(*) AS number "
            f"FROM attempts WHERE settled_in IS NOT NULL AND {condition} GROUP BY 1) late "
            "WHERE executions.id = late.settled_in",
            (ids_json,),
        )
        self._db.execute(
            "UPDATE bundles SET settled_ms = NULL, settled_in = NULL "
            f"WHERE id IN (SELECT bundle_id FROM attempts WHERE {condition})",
            (ids_json,),
        )

    def settle_superseded(self, attempt_id: int, answer: Answer, now_ms: int, execution_id: int) -> None:
        """Store the cost of an attempt whose request was sent again meanwhile. The request stays unchanged."""
        self._unsettle(to_json_text([attempt_id]))
        self._db.execute(
            "UPDATE attempts SET credits = ?, answer = ?, provider = ?, settled_ms = ?, settled_in = ? WHERE id = ?",
            (answer.credits, answer.raw, answer.provider, now_ms, execution_id, attempt_id),
        )
        self._release_reservations([(attempt_id, "", now_ms)])
        self._charge(execution_id, answer.credits or 0, 0, [])

    def mark_result_deleted(self, attempt_ids: Sequence[int]) -> None:
        """Record that the API has deleted a result, so that it is not polled again."""
        self._db.execute(
            f"UPDATE attempts SET gone = 1 WHERE id IN ({JSON_NUMBERS.format('?')})", (to_json_text(attempt_ids),)
        )

    def save_unusable_answer(self, attempt_ids: Sequence[int], reason: str, raw: str | None) -> None:
        """Store an answer that could not be read or does not count, with the reason. Its task stays open."""
        self._db.execute(
            f"UPDATE attempts SET error = ? WHERE state = 'submitted' AND id IN ({JSON_NUMBERS.format('?')})",
            (reason, to_json_text(attempt_ids)),
        )
        answer = None if raw is None else to_json_text({"unread": raw})
        self._db.execute(
            "UPDATE attempts SET answer = ? WHERE state = 'submitted' AND id = ?", (answer, attempt_ids[0])
        )

    def remove_from_queue(self, attempt_ids: Sequence[int]) -> None:
        """Keep the requests of these attempts from being sent again in this run."""
        self._db.execute(
            f"UPDATE requests SET position = NULL WHERE attempt_id IN ({JSON_NUMBERS.format('?')})",
            (to_json_text(attempt_ids),),
        )

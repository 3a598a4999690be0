"""Resumes what earlier runs left behind: requests that were being sent, tasks that wait, and tasks written off.

On PostgreSQL a process holds its tasks by a lease (`lease_table`). After a lease has ended, the attempts that its
holder was sending become unconfirmed, and any process may take over its tasks that wait for an answer. A SQLite ledger
is used by one run only, so everything in it belongs to that run.
"""

from __future__ import annotations

from collections.abc import Sequence

from enrich.json_text import to_json_text
from enrich.ledger import lease_table, transitions
from enrich.ledger.database import Database
from enrich.ledger.dialect import JSON_NUMBERS, OPEN_ATTEMPT
from enrich.ledger.lease_table import OWN_LEASE_ID
from enrich.models import Answer, Task

#: Exactly the condition of the index `written_off`, with a range of its column: else SQLite reads the ids of all tasks.
WRITTEN_OFF = "state IN ('in_doubt', 'expired') AND a.task_id IS NOT NULL AND a.gone = 0 AND a.claimed_ms >= 0"
#: The request of attempt `a`, or of another attempt of the same bulk task, is queued to be sent again.
_QUEUED_AGAIN = (
    "EXISTS (SELECT 1 FROM attempts q JOIN requests s ON s.id = q.request_id WHERE (q.id = a.id OR "
    "q.bulk_task_id = a.bulk_task_id) AND s.queue_position IS NOT NULL AND s.attempt_id = q.id "
    "AND s.state IN ('in_doubt', 'expired'))"
)


def recover(db: Database, now_ms: int) -> int:
    """Mark attempts that a crash left in `submitting` as `in_doubt` (edge d). Return how many.

    Attempts that another process holds by its lease are left alone. Tasks of an expired lease wait for any poller.
    """
    lease_table.other_holders(db)
    # Use RETURNING: leases may change between two statements.
    attempt_rows = db.execute(
        "UPDATE attempts SET state = 'in_doubt', settled_ms = ?, error = 'the program ended between the request "
        f"and its answer' WHERE state = 'submitting' AND {OPEN_ATTEMPT} "
        f"AND {db.dialect.not_held_by_others} RETURNING id",
        (now_ms,),
    ).fetchall()
    if attempt_rows:
        db.execute(
            "UPDATE requests SET state = 'in_doubt', attempt_count = attempt_count + 1, queue_position = NULL "
            f"{_REQUESTS_OF_ATTEMPTS} AND requests.state = 'submitting'",
            (to_json_text([number for (number,) in attempt_rows]),),
        )
    return len(attempt_rows)


#: End of an UPDATE of the requests whose newest attempts are listed.
_REQUESTS_OF_ATTEMPTS = (
    "FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value AS BIGINT) "
    "WHERE requests.id = a.request_id AND attempt_id = a.id"
)


def take_over_tasks(db: Database, limit: int | None = None) -> list[Task]:
    """Take over up to `limit` waiting tasks that no process holds, nearest expiry first; return them."""
    if not db.dialect.has_leases:
        return transitions.submitted_tasks(db)
    unheld = (
        f"state = 'submitted' AND {OPEN_ATTEMPT} AND {db.dialect.not_held_by_others} "
        f"AND lease_id IS DISTINCT FROM {OWN_LEASE_ID}"
    )
    rows = db.execute(
        f"WITH next AS (SELECT id, bulk_task_id FROM attempts WHERE {unheld} "
        "ORDER BY submitted_ms, bulk_task_id LIMIT ? FOR UPDATE SKIP LOCKED) "
        f"UPDATE attempts SET lease_id = {OWN_LEASE_ID} WHERE {OPEN_ATTEMPT} AND (id IN (SELECT id FROM next) "
        "OR bulk_task_id IN (SELECT bulk_task_id FROM next)) RETURNING id",
        (limit,),
    ).fetchall()
    attempt_ids = {number for (number,) in rows}
    return [task for task in transitions.submitted_tasks(db) if attempt_ids.issuperset(task.attempts)] if rows else []


def release_tasks(db: Database) -> None:
    """Release our tasks that wait for an answer, so that other processes can poll them."""
    db.execute(
        f"UPDATE attempts SET lease_id = NULL WHERE state = 'submitted' AND {OPEN_ATTEMPT} "
        f"AND lease_id = {OWN_LEASE_ID}"
    )


def written_off_tasks(db: Database, since_ms: int, *, only_queued: bool = False) -> list[Task]:
    """Return written-off tasks whose result a free GET may find, nearest expiry first: in doubt, or expired by a 404.

    `since_ms`: submitted after that (ms). `only_queued`: only those whose request is queued to be sent again. No
    other attempt has the task's id. A bulk task is left out when one of its requests was sent again meanwhile.
    """
    queued_condition = f"AND {_QUEUED_AGAIN}" if only_queued else ""
    return transitions.read_tasks(
        db,
        f"a.{WRITTEN_OFF} AND a.credits IS NULL AND coalesce(a.submitted_ms, a.claimed_ms) > ? {queued_condition} "
        # Requests that the user accepted as failed are no longer in doubt.
        "AND (r.state = a.state OR r.attempt_id <> a.id) AND NOT EXISTS (SELECT 1 FROM attempts o "
        "WHERE o.task_id = a.task_id AND o.id <> a.id AND coalesce(o.bulk_task_id <> a.bulk_task_id, true)) "
        "AND (SELECT credits FROM bulk_tasks WHERE id = a.bulk_task_id) IS NULL "
        "AND (a.bulk_task_id IS NULL OR NOT EXISTS (SELECT 1 FROM attempts o JOIN requests s ON s.id = o.request_id "
        "WHERE o.bulk_task_id = a.bulk_task_id AND (s.attempt_id <> o.id OR s.state <> o.state OR o.gone = 1 "
        "OR o.state NOT IN ('in_doubt', 'expired'))))",
        since_ms,
    )


def revive(db: Database, attempt_ids: Sequence[int], execution_id: int) -> None:
    """Wait again for tasks that an earlier run wrote off but the API still has (edge i)."""
    db.step_costs.clear()
    ids_json = to_json_text(attempt_ids)
    _unsettle(db, ids_json)
    db.execute(
        "UPDATE executions SET submitted = executions.submitted + late.number FROM "
        "(SELECT execution_id, count(*) AS number FROM attempts "
        f"WHERE submitted_ms IS NULL AND id IN ({JSON_NUMBERS.format('?')}) GROUP BY 1) late "
        "WHERE executions.id = late.execution_id",
        (ids_json,),
    )
    db.execute(
        "UPDATE executions SET reserved = reserved + (SELECT coalesce(sum(reserved), 0) FROM attempts "
        f"WHERE execution_id <> ?1 AND id IN ({JSON_NUMBERS.format('?2')})) WHERE id = ?1",
        (execution_id, ids_json),
    )
    clear_lease = ", lease_id = NULL" if db.dialect.has_leases else ""
    transitions.transition(
        db,
        [(attempt,) for attempt in attempt_ids],
        "in_doubt",
        "expired",
        set_attempt="state = 'submitted', submitted_ms = coalesce(submitted_ms, claimed_ms), settled_ms = NULL, "
        f"settled_execution_id = NULL, error = NULL, acknowledged = 1{clear_lease}",
        set_request="state = 'submitted'",
    )


def _unsettle(db: Database, ids_json: str) -> None:
    """Undo the settlement of attempts (a JSON list of ids) that was made at an unknown price."""
    condition = f"id IN ({JSON_NUMBERS.format('?')})"
    db.execute(
        "UPDATE executions SET unknown = unknown - late.number FROM (SELECT settled_execution_id, count(*) AS number "
        f"FROM attempts WHERE settled_execution_id IS NOT NULL AND {condition} GROUP BY 1) late "
        "WHERE executions.id = late.settled_execution_id",
        (ids_json,),
    )
    db.execute(
        "UPDATE bulk_tasks SET settled_ms = NULL, settled_execution_id = NULL "
        f"WHERE id IN (SELECT bulk_task_id FROM attempts WHERE {condition})",
        (ids_json,),
    )


def settle_superseded(db: Database, attempt_id: int, answer: Answer, now_ms: int, execution_id: int) -> None:
    """Store the cost of an attempt whose request was sent again meanwhile. The request stays unchanged."""
    db.step_costs.clear()
    _unsettle(db, to_json_text([attempt_id]))
    db.execute(
        "UPDATE attempts SET credits = ?, answer = ?, provider = ?, settled_ms = ?, settled_execution_id = ? WHERE "
        "id = ?",
        (answer.credits, answer.raw, answer.provider, now_ms, execution_id, attempt_id),
    )
    transitions.release_reservations(db, [(attempt_id, "", now_ms)])
    db.execute("UPDATE executions SET spent = spent + ? WHERE id = ?", (answer.credits or 0, execution_id))


def mark_result_deleted(db: Database, attempt_ids: Sequence[int]) -> None:
    """Record that the API has deleted a result, so that it is not polled again."""
    db.execute(f"UPDATE attempts SET gone = 1 WHERE id IN ({JSON_NUMBERS.format('?')})", (to_json_text(attempt_ids),))


def save_unusable_answer(db: Database, attempt_ids: Sequence[int], reason: str, raw: str | None) -> None:
    """Store an answer that could not be read or does not count, with the reason. Its task stays open."""
    db.execute(
        f"UPDATE attempts SET error = ? WHERE state = 'submitted' AND id IN ({JSON_NUMBERS.format('?')})",
        (reason, to_json_text(attempt_ids)),
    )
    answer = None if raw is None else to_json_text({"unread": raw})
    db.execute("UPDATE attempts SET answer = ? WHERE state = 'submitted' AND id = ?", (answer, attempt_ids[0]))


def remove_from_queue(db: Database, attempt_ids: Sequence[int]) -> None:
    """Keep the requests of these attempts from being sent again in this run."""
    db.execute(
        f"UPDATE requests SET queue_position = NULL {_REQUESTS_OF_ATTEMPTS}",
        (to_json_text(attempt_ids),),
    )

"""Compares task ids: each belongs to one request, whose answer is charged once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from enrich.json_text import to_json_text
from enrich.ledger.database import Database
from enrich.ledger.dialect import JSON_NUMBERS
from enrich.models import Acceptance, Answer

#: What the result of an attempt `a` cost. A request that was sent again may receive the same task from the API's cache:
#: its price is with the earlier attempt.
RESULT_PRICE = (
    "CASE WHEN a.credits = 0 AND a.previous_id IS NOT NULL THEN coalesce((SELECT max(o.credits) FROM attempts o "
    "WHERE o.task_id = a.task_id AND o.request_id = a.request_id), 0) ELSE a.credits END"
)


def has_task(db: Database, task_id: str) -> bool:
    """Return whether any attempt has this task id."""
    return db.exists("FROM attempts WHERE task_id = ?", task_id)


def check_task_ids(db: Database, ids_by_attempt: Mapping[int, str]) -> dict[int, Acceptance]:
    """Compare the task ids of attempts with each other and with those in the ledger. Return what each means."""
    acceptances = dict.fromkeys(ids_by_attempt, Acceptance.NEW)
    ids = to_json_text([[task_id] for task_id in set(ids_by_attempt.values())])
    if db.dialect.lock_task_ids:
        db.execute(db.dialect.lock_task_ids, (ids,)).fetchall()
    known_ids = db.execute(
        "SELECT DISTINCT task_id FROM attempts WHERE task_id IN (SELECT value->>0 FROM json_each(CAST(? AS TEXT)))",
        (ids,),
    )
    shared_ids = {task_id for (task_id,) in known_ids}
    attempts_by_id: dict[str, list[int]] = {}
    for attempt, task_id in ids_by_attempt.items():
        attempts_by_id.setdefault(task_id, []).append(attempt)
    for task_id, attempt_ids in sorted(attempts_by_id.items()):
        if task_id not in shared_ids and len(attempt_ids) == 1:
            continue
        rows = db.execute(
            # The attempts of a bulk task are one POST and share its id. Attempts that have the id come first.
            "SELECT coalesce(-a.bulk_task_id, a.id), a.id, a.bulk_index, r.call_id, r.params FROM attempts a "
            f"JOIN requests r ON r.id = a.request_id WHERE a.task_id = ?1 OR a.id IN ({JSON_NUMBERS.format('?2')}) "
            "ORDER BY a.task_id IS NULL, a.id",
            (task_id, to_json_text(attempt_ids)),
        ).fetchall()
        requests_by_post: dict[int, list[object]] = {}
        for post, _, *request in rows:
            requests_by_post.setdefault(post, []).append(request)
        first_post, first_request = next(iter(requests_by_post.items()))
        for post, attempt, *_ in rows:
            if attempt in acceptances and post != first_post:
                acceptances[attempt] = (
                    Acceptance.CACHED if requests_by_post[post] == first_request else Acceptance.CONFLICT
                )
    return acceptances


def charge_once(db: Database, answers: Sequence[tuple[int, Answer, int]]) -> list[tuple[int, Answer, int]]:
    """Charge a task that two attempts share (the API's cache) only once."""
    charged_ids = [attempt_id for attempt_id, answer, _ in answers if answer.credits]
    if not charged_ids:
        return list(answers)
    rows = db.execute(
        "SELECT a.id, a.task_id, max(CASE WHEN o.credits > 0 THEN 1 ELSE 0 END) FROM attempts a "
        "JOIN attempts o ON o.task_id = a.task_id AND o.id <> a.id "
        f"WHERE a.id IN ({JSON_NUMBERS.format('?')}) GROUP BY 1, 2",
        (to_json_text(charged_ids),),
    ).fetchall()
    shared_ids = {attempt_id: task_id for attempt_id, task_id, _ in rows}
    paid_ids = {task_id for _, task_id, is_paid in rows if is_paid}
    charged_once = []
    for attempt_id, answer, now_ms in answers:
        task_id = shared_ids.get(attempt_id)
        charged_once.append((attempt_id, replace(answer, credits=0) if task_id in paid_ids else answer, now_ms))
        if task_id is not None:
            paid_ids.add(task_id)
    return charged_once


def is_task_paid(db: Database, attempt_id: int) -> bool:
    """Return whether another bulk task has the same task id and a price."""
    return db.exists(
        "FROM attempts a JOIN attempts o ON o.task_id = a.task_id "
        "JOIN bulk_tasks b ON b.id = o.bulk_task_id WHERE a.id = ? AND b.id <> a.bulk_task_id AND b.credits > 0",
        attempt_id,
    )


def unknown_task_ids(db: Database, task_ids: Sequence[str]) -> list[str]:
    """Return the task ids that no attempt has."""
    rows = db.execute(
        "SELECT value->>0 FROM json_each(CAST(? AS TEXT)) "
        "WHERE NOT EXISTS (SELECT 1 FROM attempts WHERE task_id = value->>0)",
        (to_json_text([(task,) for task in task_ids]),),
    )
    return [task for (task,) in rows]

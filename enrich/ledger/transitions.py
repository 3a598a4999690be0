"""The transitions of requests from the queue to their answers: the SQL of every edge of the state diagram.

An operation takes a list of attempts and needs a few statements, whatever the length of the list. Every attempt must be
in the expected state, or the whole operation is rolled back. Requests sent as one bulk task (`dispatch: bulk`) share a
row of `bulk_tasks`: the price is known only for the whole task. A task id belongs to one request, whose answer is
charged once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import groupby
from typing import Any

from enrich.json_text import to_json_text
from enrich.ledger import records
from enrich.ledger.database import Database
from enrich.ledger.dialect import JSON_NUMBERS, OPEN_ATTEMPT
from enrich.ledger.queue import count_overruns_of_steps
from enrich.ledger.records import read_paths
from enrich.models import DUPLICATE_TASK_ID, Acceptance, Answer, State, Task

#: An UPDATE and its parameters.
Statement = tuple[str, tuple[Any, ...]]
#: An attempt id, its new value (task id or error), and when (ms).
AttemptUpdate = tuple[int, str, int]
#: An unconfirmed attempt, the reason, when (ms), and the task id of the API's answer, if it had one.
InDoubtUpdate = tuple[int, str, int, str | None]


def record_accepted(
    db: Database, updates: Sequence[AttemptUpdate], facts: Mapping[str, str | None]
) -> list[Acceptance]:
    """Store task ids (edge b) and, with the first of them, what the ledger is bound to.

    An id that an attempt of another request already has is not accepted (edge d). Returns what each id means.
    """
    acceptances = check_task_ids(db, {attempt: task_id for attempt, task_id, _ in updates})
    conflicting_updates = [each for each in updates if acceptances[each[0]] is Acceptance.CONFLICT]
    accepted_updates = [each for each in updates if acceptances[each[0]] is not Acceptance.CONFLICT]
    if conflicting_updates:
        mark_in_doubt(
            db, [(attempt, f"{DUPLICATE_TASK_ID}: {task_id}", at, None) for attempt, task_id, at in conflicting_updates]
        )
    if accepted_updates:
        transition(
            db,
            accepted_updates,
            "submitting",
            set_attempt="state = 'submitted', task_id = value->>1, submitted_ms = CAST(value->>2 AS BIGINT)",
            set_request="state = 'submitted', attempt_count = attempt_count + 1",
            also=[(_COUNT_SUBMITTED, (len(accepted_updates), accepted_updates[0][0]))],
        )
        records.bind(db, facts)
    return [acceptances[attempt] for attempt, _, _ in updates]


def record_refused(db: Database, updates: Sequence[AttemptUpdate]) -> None:
    """Return requests that the API did not accept (edge c) to their previous state, free and not counted.

    They stay in the queue.
    """
    transition(
        db,
        updates,
        "submitting",
        set_attempt="state = 'refused', error = value->>1, settled_ms = CAST(value->>2 AS BIGINT), credits = 0",
        set_request="state = a.previous_state, "
        "attempt_id = CASE WHEN a.previous_state = 'pending' THEN attempt_id ELSE a.previous_id END",
    )
    db.claimed_up_to.clear()
    release_reservations(db, updates)


def release_unsent(db: Database, attempt_ids: AbstractSet[int], now_ms: int) -> None:
    """Return claims whose POST was not sent; otherwise they would become unconfirmed.

    Claims that run before this may still add to `attempt_ids`.
    """
    if attempt_ids:
        record_refused(db, [(attempt, "not sent: the run ended", now_ms) for attempt in sorted(attempt_ids)])


def record_rejected(db: Database, updates: Sequence[AttemptUpdate]) -> None:
    """Fail the requests whose params the API refused (edge c). They cost nothing."""
    transition(
        db,
        updates,
        "submitting",
        set_attempt="state = 'failed', error = value->>1, settled_ms = CAST(value->>2 AS BIGINT), credits = 0",
        set_request="state = 'failed', queue_position = NULL",
    )
    release_reservations(db, updates)


def mark_in_doubt(db: Database, updates: Sequence[InDoubtUpdate]) -> None:
    """Mark attempts as unconfirmed: they may have been charged (edges d, e), so the reservations stay.

    A task id from the API's answer is stored and polled later. An id that another request has is only mentioned in
    the error.
    """
    answered_ids = {attempt: task_id for attempt, _, _, task_id in updates if task_id is not None}
    acceptances = check_task_ids(db, answered_ids) if answered_ids else {}
    checked_updates = [
        (attempt, f"{reason}; {DUPLICATE_TASK_ID}: {task_id}", at, None)
        if acceptances.get(attempt) is Acceptance.CONFLICT
        else (attempt, reason, at, task_id)
        for attempt, reason, at, task_id in updates
    ]
    transition(
        db,
        checked_updates,
        "submitting",
        "submitted",
        set_attempt="state = 'in_doubt', error = value->>1, settled_ms = CAST(value->>2 AS BIGINT), "
        "task_id = coalesce(task_id, value->>3)",
        set_request="state = 'in_doubt', queue_position = NULL, "
        "attempt_count = attempt_count + CASE WHEN a.state = 'submitting' THEN 1 ELSE 0 END",
    )


def submitted_tasks(db: Database) -> list[Task]:
    """Return all tasks that wait for their answer and that no other process holds, nearest expiry first."""
    # A reader that did not open the ledger for writing sees the tasks of all processes.
    condition = db.dialect.not_held_by_others if db.shares_passes else "true"
    return read_tasks(db, f"a.state = 'submitted' AND a.{OPEN_ATTEMPT} AND {condition}")


def open_tasks_of(db: Database, job: str) -> list[Task]:
    """Return the tasks that wait for their answer and were sent by a job, nearest expiry first."""
    return read_tasks(db, f"a.state = 'submitted' AND a.{OPEN_ATTEMPT} AND e.job = ?", job)


def read_tasks(db: Database, condition: str, *values: object) -> list[Task]:
    """Return the tasks whose attempts `a` (of requests `r`, made in executions `e`) fulfil an SQL condition."""
    rows = db.execute(
        "SELECT a.id, a.bulk_task_id, a.task_id, coalesce(a.submitted_ms, a.claimed_ms), a.acknowledged, e.paths, "
        "a.step, r.attempt_id <> a.id, a.reserved FROM attempts a JOIN executions e ON e.id = a.execution_id "
        f"JOIN requests r ON r.id = a.request_id WHERE {condition} ORDER BY 4, a.bulk_task_id, a.bulk_index, a.id",
        values,
    )
    tasks = []
    for _, group in groupby(rows, key=lambda row: row[0] if row[1] is None else -row[1]):
        task_rows = list(group)
        _, bulk_task_id, task_id, submitted_ms, acknowledged, paths, step, superseded, _ = task_rows[0]
        tasks.append(
            Task(
                tuple(row[0] for row in task_rows),
                task_id,
                submitted_ms,
                bool(acknowledged),
                tuple(read_paths(paths, step)),
                bulk_task_id,
                bool(superseded),
                sum(row[-1] for row in task_rows),
                step or "",
            )
        )
    return tasks


def mark_acknowledged(db: Database, attempt_ids: Sequence[int]) -> None:
    """Record that the API has acknowledged the tasks of these attempts."""
    db.execute(
        f"UPDATE attempts SET acknowledged = 1 WHERE id IN ({JSON_NUMBERS.format('?')})", (to_json_text(attempt_ids),)
    )


def settle(
    db: Database, answers: Sequence[tuple[int, Answer, int]], execution_id: int, max_attempts: int
) -> list[State]:
    """Store answers (edge e), each with its time (ms). A failure at no charge goes back to the queue (edge g).

    Returns the new states of the requests.
    """
    answers = charge_once(db, answers)
    priced_ids = [attempt_id for attempt_id, answer, _ in answers if answer.credits is not None]
    spent = sum(answer.credits or 0 for _, answer, _ in answers)
    charged = _charge_sql(execution_id, spent, len(answers) - len(priced_ids), priced_ids)
    return _write_answers(db, answers, execution_id, max_attempts, also=[charged])


def settle_bulk_task(
    db: Database, answers: Sequence[tuple[int, Answer, int]], execution_id: int, max_attempts: int, credits_: int | None
) -> list[State]:
    """Store the answers of one bulk task. `credits_` is the price of the whole task; None: not known."""
    if credits_ and is_task_paid(db, answers[0][0]):
        credits_ = 0
    attempt_ids = [attempt_id for attempt_id, _, _ in answers]
    settled = (_SETTLE_BULK_TASK, (credits_, answers[0][2], execution_id, attempt_ids[0]))
    is_priced = credits_ is not None
    charged = _charge_sql(
        execution_id, credits_ or 0, 0 if is_priced else len(answers), attempt_ids if is_priced else []
    )
    return _write_answers(db, answers, execution_id, max_attempts, also=[settled, charged])


def _write_answers(
    db: Database,
    answers: Sequence[tuple[int, Answer, int]],
    execution_id: int,
    max_attempts: int,
    *,
    also: Sequence[Statement],
) -> list[State]:
    retry_condition = f"CAST(value->>2 AS INTEGER) = 1 AND attempt_count < {max_attempts:d}"
    transition(
        db,
        [
            (number, a.state, int(a.free_failure), now_ms, a.credits, a.provider, a.error, a.raw, int(a.result_deleted))
            for number, a, now_ms in answers
        ],
        "submitted",
        set_attempt="state = value->>1, settled_ms = CAST(value->>3 AS BIGINT), "
        "credits = CAST(value->>4 AS BIGINT), provider = value->>5, "
        # Keep an earlier answer that could not be read, even if the task ends without an answer.
        f"error = value->>6, answer = coalesce(value->>7, answer), gone = CAST(value->>8 AS INTEGER), "
        f"settled_execution_id = {execution_id:d}",
        # Settled requests leave the queue. A failure at no charge keeps its place.
        set_request=f"state = CASE WHEN {retry_condition} THEN 'pending' ELSE value->>1 END, "
        f"queue_position = CASE WHEN {retry_condition} THEN queue_position END, "
        "answer_id = CASE WHEN value->>1 = 'found' THEN a.id ELSE answer_id END",
        also=also,
    )
    count_overruns_of_steps(db, [attempt_id for attempt_id, _, _ in answers])
    if not any(answer.free_failure for _, answer, _ in answers):
        return [answer.state for _, answer, _ in answers]
    db.claimed_up_to.clear()
    rows = db.execute(
        "SELECT r.state FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value AS BIGINT) "
        "JOIN requests r ON r.id = a.request_id ORDER BY key",
        (to_json_text([number for number, _, _ in answers]),),
    )
    return [State(row[0]) for row in rows]


_COUNT_SUBMITTED = (
    "UPDATE executions SET submitted = submitted + ? WHERE id = (SELECT execution_id FROM attempts WHERE id = ?)"
)
_SETTLE_BULK_TASK = (
    "UPDATE bulk_tasks SET credits = ?, settled_ms = ?, settled_execution_id = ? "
    "WHERE id = (SELECT bulk_task_id FROM attempts WHERE id = ?)"
)
_CHARGE = (
    "UPDATE executions SET spent = spent + ?, unknown = unknown + ?, reserved = reserved - (SELECT "
    f"coalesce(sum(reserved), 0) FROM attempts WHERE id IN ({JSON_NUMBERS.format('?')})) WHERE id = ?"
)


def transition(
    db: Database,
    updates: Sequence[tuple[Any, ...]],
    *from_states: str,
    set_attempt: str,
    set_request: str,
    also: Sequence[Statement] = (),
) -> None:
    """Change attempts and their requests. Both must be in the same one of `from_states`.

    In the SQL, `value` is the JSON list of an update, and `a` is the attempt. Requests are given the first three fields
    of an update only, because answers are long. `also` are UPDATEs of other tables.
    """
    request_updates = [update[:3] for update in updates]
    # An expression keeps PostgreSQL from the index `open_attempts`, which has settled attempts until it is vacuumed.
    is_in_state = "coalesce({}.state, '') IN (" + ", ".join(f"'{state}'" for state in from_states) + ")"
    requests_sql = (
        f"UPDATE requests SET {set_request} "
        "FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value->>0 AS BIGINT) "
        f"WHERE requests.id = a.request_id AND attempt_id = a.id AND requests.state = a.state "
        f"AND {is_in_state.format('a')}"
    )
    attempts_sql = (
        f"UPDATE attempts SET {set_attempt} FROM json_each(CAST(? AS TEXT)) "
        f"WHERE attempts.id = CAST(value->>0 AS BIGINT) AND {is_in_state.format('attempts')}"
    )
    requests_changed, attempts_changed, *_ = db.write_together(
        [(requests_sql, (to_json_text(request_updates),)), (attempts_sql, (to_json_text(updates),)), *also]
    )
    if not requests_changed == attempts_changed == len(updates):
        numbers = ", ".join(str(first[0]) for first in updates)
        raise AssertionError(f"the attempts {numbers} and their requests are not all {' or '.join(from_states)}")


def release_reservations(db: Database, updates: Sequence[AttemptUpdate]) -> None:
    """Return the reservations of attempts to the runs that made them."""
    db.execute(
        "UPDATE executions SET reserved = executions.reserved - freed.reserved FROM (SELECT execution_id, "
        f"sum(reserved) AS reserved FROM attempts WHERE id IN ({JSON_NUMBERS.format('?')}) GROUP BY 1) freed "
        "WHERE executions.id = freed.execution_id",
        (to_json_text([first[0] for first in updates]),),
    )


def _charge_sql(execution_id: int, spent: int, unknown: int, priced_ids: Sequence[int]) -> Statement:
    return _CHARGE, (spent, unknown, to_json_text(priced_ids), execution_id)


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
        # With IN or EXISTS PostgreSQL may join the ids with all attempts.
        "SELECT value->>0 FROM json_each(CAST(? AS TEXT)) "
        "WHERE (SELECT count(*) FROM attempts WHERE task_id = value->>0) > 0",
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
            "SELECT coalesce(-a.bulk_task_id, a.id), a.id, a.bulk_index, r.call_id, r.params FROM "
            f"(SELECT id FROM attempts WHERE task_id = ?1 UNION {JSON_NUMBERS.format('?2')}) b "
            "CROSS JOIN attempts a JOIN requests r ON r.id = a.request_id WHERE a.id = b.id "
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

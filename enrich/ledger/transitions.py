"""The transitions of requests from the queue to their answers: the SQL of every edge of the state diagram.

An operation takes a list of attempts and needs a few statements, whatever the length of the list. Every attempt must be
in the expected state, or the whole operation is rolled back. Requests sent as one bulk task (`dispatch: bulk`) share a
row of `bulk_tasks`: the price is known only for the whole task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate, groupby
from typing import Any

from enrich.json_text import to_json_text
from enrich.ledger import bindings, task_ids
from enrich.ledger.claim_costs import highest_prices, left_of_step_cap
from enrich.ledger.database import Database
from enrich.ledger.dialect import JSON_NUMBERS, OPEN_ATTEMPT, QUEUED
from enrich.ledger.execution_records import read_paths
from enrich.models import DUPLICATE_TASK_ID, Acceptance, Answer, ClaimedRequest, State, Task

#: A claim looks only behind the last one: beside an old snapshot, such as a backup's, the index keeps an entry for each
#: claimed request. After this many claims it looks at the whole queue, as other processes return requests.
CLAIMS_PER_FULL_LOOK = 64

#: An UPDATE and its parameters.
Statement = tuple[str, tuple[Any, ...]]
#: An attempt id, its new value (task id or error), and when (ms).
AttemptUpdate = tuple[int, str, int]
#: An unconfirmed attempt, the reason, when (ms), and the task id of the API's answer, if it had one.
InDoubtUpdate = tuple[int, str, int, str | None]


class CapReached(Exception):
    """The credit cap has no room for another request now. Running tasks may free some of it when they settle."""


class StepCapReached(CapReached):
    """The cap of the step has no room, that of the run has."""


def claim(  # noqa: PLR0913 - the budget and the selection
    db: Database,
    execution_id: int,
    max_price: int,
    now_ms: int,
    count: int = 1,
    *,
    new_up_to: int | None = None,
    bulk: bool = False,
    priced_by: str | None = None,
    step: str | None = None,
    step_cap: int | None = None,
) -> list[ClaimedRequest]:
    """Claim the next `count` queued requests (edge a) and reserve `max_price` (millionths) for each.

    Empty: the queue is empty. `new_up_to`: only requests without an answer, up to this place in the queue. `bulk` makes
    one bulk task. With `priced_by`, `max_price` is multiplied by the number in this param. `step_cap` is the `step`'s.
    Raises CapReached.
    """
    bound, bounded_looks = db.claimed_up_to.get(new_up_to, (-1, 0))
    is_full_look = bound < 0 or bounded_looks >= CLAIMS_PER_FULL_LOOK
    queued_rows = [] if is_full_look else _queued_after(db, bound, count, new_up_to)
    if not queued_rows:
        is_full_look, queued_rows = True, _queued_after(db, -1, count, new_up_to)
    if not (request_ids := [request_id for request_id, _ in queued_rows]):
        return []
    prices = highest_prices(db, request_ids, max_price, priced_by)
    total_price = sum(prices)
    left_after = db.value(f"{_RESERVE} RETURNING cap - spent - reserved", total_price, execution_id)
    remaining = None if left_after is None else left_after + total_price
    step_remaining = None if step_cap is None else left_of_step_cap(db, execution_id, step, step_cap, total_price)
    for left, reached in ((remaining, CapReached), (step_remaining, StepCapReached)):
        if left is not None and sum(prices) > left:
            affordable = sum(total <= left for total in accumulate(prices))
            request_ids, prices = request_ids[:affordable], prices[:affordable]
        if not request_ids:
            db.execute(_RESERVE, (-total_price, execution_id))
            raise reached
    if sum(prices) < total_price:
        db.execute(_RESERVE, (sum(prices) - total_price, execution_id))
    last_claimed = max(bound, queued_rows[len(request_ids) - 1][1])
    db.claimed_up_to[new_up_to] = (last_claimed, 0 if is_full_look else bounded_looks + 1)
    bulk_task_id = None
    if bulk:
        insert = "INSERT INTO bulk_tasks (execution_id, size) VALUES (?, ?) RETURNING id"
        bulk_task_id = db.value(insert, execution_id, len(request_ids))
    priced_requests = list(zip(request_ids, prices, strict=True))
    return _record_claim(db, execution_id, priced_requests, now_ms, bulk_task_id, step)


def _record_claim(  # noqa: PLR0913, PLR0917 - each is a column
    db: Database,
    execution_id: int,
    priced_requests: Sequence[tuple[int, int]],
    now_ms: int,
    bulk_task_id: int | None,
    step: str | None,
) -> list[ClaimedRequest]:
    """Insert an attempt in `submitting` for each request (id, price), in the order given."""
    attempt_rows = db.execute(
        "INSERT INTO attempts (request_id, execution_id, previous_state, previous_id, state, claimed_ms, reserved, "
        "bulk_task_id, bulk_index, step) "
        "SELECT r.id, ?2, r.state, r.attempt_id, 'submitting', ?3, CAST(value->>1 AS BIGINT), CAST(?4 AS BIGINT), "
        "CASE WHEN CAST(?4 AS BIGINT) IS NOT NULL THEN key END, CAST(?5 AS TEXT) "
        "FROM json_each(CAST(?1 AS TEXT)) JOIN requests r ON r.id = CAST(value->>0 AS BIGINT) ORDER BY key "
        "RETURNING id",
        (to_json_text(priced_requests), execution_id, now_ms, bulk_task_id, step),
    ).fetchall()
    rows = db.execute(
        "UPDATE requests SET state = 'submitting', attempt_id = a.id, "
        "attempts = CASE a.previous_state WHEN 'pending' THEN attempts ELSE 0 END "
        "FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value AS BIGINT) "
        "WHERE requests.id = a.request_id RETURNING attempt_id, params",
        (to_json_text([number for (number,) in attempt_rows]),),
    ).fetchall()
    return [ClaimedRequest(attempt_id, params, bulk_task_id) for attempt_id, params in sorted(rows)]


def _queued_after(db: Database, position: int, count: int, new_up_to: int | None) -> list[tuple[int, int]]:
    """Return id and position of the next queued requests behind a position, locked for this transaction."""
    only_new = "" if new_up_to is None else f"AND {db.dialect.no_index}state = 'pending' AND queue_position <= ?3 "
    return db.execute(
        f"SELECT id, queue_position FROM requests WHERE {QUEUED} AND queue_position > ?2 {only_new}"
        f"ORDER BY queue_position LIMIT ?1 {db.dialect.skip_locked}",
        (count, position) if new_up_to is None else (count, position, new_up_to),
    ).fetchall()


def record_accepted(
    db: Database, updates: Sequence[AttemptUpdate], facts: Mapping[str, str | None]
) -> list[Acceptance]:
    """Store task ids (edge b) and, with the first of them, what the ledger is bound to.

    An id that an attempt of another request already has is not accepted (edge d). Returns what each id means.
    """
    acceptances = task_ids.check_task_ids(db, {attempt: task_id for attempt, task_id, _ in updates})
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
            set_request="state = 'submitted', attempts = attempts + 1",
            also=[(_COUNT_SUBMITTED, (len(accepted_updates), accepted_updates[0][0]))],
        )
        bindings.bind(db, facts)
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
    acceptances = task_ids.check_task_ids(db, answered_ids) if answered_ids else {}
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
        "attempts = attempts + CASE WHEN a.state = 'submitting' THEN 1 ELSE 0 END",
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
    answers = task_ids.charge_once(db, answers)
    priced_ids = [attempt_id for attempt_id, answer, _ in answers if answer.credits is not None]
    spent = sum(answer.credits or 0 for _, answer, _ in answers)
    charged = _charge_sql(execution_id, spent, len(answers) - len(priced_ids), priced_ids)
    return _write_answers(db, answers, execution_id, max_attempts, also=[charged])


def settle_bulk_task(
    db: Database, answers: Sequence[tuple[int, Answer, int]], execution_id: int, max_attempts: int, credits_: int | None
) -> list[State]:
    """Store the answers of one bulk task. `credits_` is the price of the whole task; None: not known."""
    if credits_ and task_ids.is_task_paid(db, answers[0][0]):
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
    retry_condition = f"CAST(value->>2 AS INTEGER) = 1 AND attempts < {max_attempts:d}"
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
    if not any(answer.free_failure for _, answer, _ in answers):
        return [answer.state for _, answer, _ in answers]
    db.claimed_up_to.clear()
    rows = db.execute(
        "SELECT r.state FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value AS BIGINT) "
        "JOIN requests r ON r.id = a.request_id ORDER BY key",
        (to_json_text([number for number, _, _ in answers]),),
    )
    return [State(row[0]) for row in rows]


_RESERVE = "UPDATE executions SET reserved = reserved + ? WHERE id = ?"
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
    from_states_sql = ", ".join(f"'{state}'" for state in from_states)
    requests_sql = (
        f"UPDATE requests SET {set_request} "
        "FROM json_each(CAST(? AS TEXT)) JOIN attempts a ON a.id = CAST(value->>0 AS BIGINT) "
        f"WHERE requests.id = a.request_id AND attempt_id = a.id AND requests.state = a.state "
        f"AND a.state IN ({from_states_sql})"
    )
    attempts_sql = (
        f"UPDATE attempts SET {set_attempt} FROM json_each(CAST(? AS TEXT)) "
        f"WHERE attempts.id = CAST(value->>0 AS BIGINT) AND attempts.state IN ({from_states_sql})"
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

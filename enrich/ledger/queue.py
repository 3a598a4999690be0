"""The queue: holds the requests that a run sends, and gives them out in order while the caps of the run and step allow.

A claim (edge a of the state diagram) reserves the highest price of a request before it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from itertools import accumulate

from enrich.json_text import to_json_text
from enrich.ledger.database import Database, StepCost
from enrich.ledger.dialect import JSON_NUMBERS, OPEN_ATTEMPT, QUEUED
from enrich.models import DECISIONS_TO_SEND, ClaimedRequest, RequestSelection, State

#: A condition of the table `seen`: requests that the run sends.
TO_SEND = f"decision IN ({', '.join(repr(decision.value) for decision in DECISIONS_TO_SEND)})"


def fill_queue(db: Database, selection: RequestSelection) -> None:
    """Queue the selected requests. Leads that left the file are removed from the queue and never paid for.

    The queue position is valid for this run only, and so is `--retry`. Running requests get a position too: if they
    fail at no charge, they are sent again. When the user limits the number of requests, this applies only to
    requests that this selection has sent.
    """
    db.claimed_up_to.clear()
    open_request_ids = f"SELECT request_id FROM attempts WHERE {OPEN_ATTEMPT}"
    waiting = "" if selection.is_limited else " OR decision = 'waiting'"
    chosen = f"({TO_SEND}{waiting} OR (decision = 'planned' AND id IN ({open_request_ids})))"
    db.execute(
        f"UPDATE requests SET queue_position = (SELECT queue_position FROM seen WHERE id = requests.id AND {chosen}) "
        f"WHERE id IN (SELECT id FROM requests WHERE {QUEUED} UNION ALL {open_request_ids} "
        f"UNION ALL SELECT id FROM seen WHERE {chosen})"
    )


def queue_position_of_new(db: Database, number: int) -> int:
    """Return the place in the queue of the last of the first `number` requests without an answer."""
    first = f"SELECT queue_position FROM requests WHERE {QUEUED} AND state = 'pending' ORDER BY queue_position LIMIT ?"
    return db.number(f"SELECT coalesce(max(queue_position), -1) FROM ({first}) AS first", number)


def queued_count(db: Database, states: Collection[State] = tuple(State)) -> int:
    """Count the queued requests that are not running and in one of these states."""
    names = ", ".join(f"'{state}'" for state in states)
    return db.number(f"SELECT count(*) FROM requests WHERE {QUEUED} AND state IN ({names})")


#: A claim looks only behind the last one: beside an old snapshot, such as a backup's, the index keeps an entry for each
#: claimed request. After this many claims it looks at the whole queue, as other processes return requests.
CLAIMS_PER_FULL_LOOK = 64


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
        "attempt_count = CASE a.previous_state WHEN 'pending' THEN attempt_count ELSE 0 END "
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


_RESERVE = "UPDATE executions SET reserved = reserved + ? WHERE id = ?"


def left_of_step_cap(db: Database, execution_id: int, step: str | None, step_cap: int, price: int) -> int:
    """Return what is left of the step's cap. It is exact when less than `price` is left.

    Summing all attempts at each claim is slow. So claims since the last sum count at their highest price, and at what
    their answers cost beyond it. The sum is repeated once half of the rest is claimed.
    """
    if (known := db.step_costs.get((execution_id, step))) is not None:
        newest, reserved = db.execute(
            "SELECT coalesce(max(id), ?1), "
            "coalesce(sum(CASE WHEN execution_id = ?2 AND step = ?3 THEN reserved END), 0) FROM attempts WHERE id > ?1",
            (known.newest, execution_id, step),
        ).fetchone()
        known = StepCost(known.exact, known.at_most + int(reserved), int(newest), known.earlier)
    if known is None or known.at_most + price > known.exact + (step_cap - known.exact) // 2:
        newest = db.number("SELECT coalesce(max(id), 0) FROM attempts")
        of_earlier_run = "SELECT id FROM attempts WHERE execution_id < ? ORDER BY id DESC LIMIT 1"
        earlier = known.earlier if known else db.number(f"SELECT coalesce(({of_earlier_run}), 0)", execution_id)
        exact = _exact_cost(db, execution_id, step, earlier)
        known = StepCost(exact, exact, newest, earlier)
    db.step_costs[execution_id, step] = known
    return step_cap - known.at_most


def count_overruns_of_steps(db: Database, attempt_ids: Sequence[int]) -> None:
    """Add what settled attempts cost more than was reserved for them to what their steps cost at most."""
    if not db.step_costs:
        return
    rows = db.execute(
        "SELECT step, sum(paid) - sum(reserved) FROM billed WHERE paid IS NOT NULL "
        f"AND id IN ({JSON_NUMBERS.format('?')}) GROUP BY 1",
        (to_json_text(attempt_ids),),
    )
    overruns = {step: int(overrun) for step, overrun in rows if overrun > 0}
    for (execution_id, step), known in db.step_costs.items():
        at_most = known.at_most + overruns.get(step, 0)
        db.step_costs[execution_id, step] = known._replace(at_most=at_most)


def _exact_cost(db: Database, execution_id: int, step: str | None, earlier: int) -> int:
    """Add up what a step has cost in a run: the price of what is settled, the highest price of everything else.

    What earlier runs have sent counts where the run has settled it, or may settle it.
    """
    cost = (
        "SELECT coalesce(sum(CASE WHEN b.credits IS NULL THEN coalesce(a.credits, a.reserved) "
        "WHEN a.bulk_index = 0 THEN b.credits ELSE 0 END), 0) "
        "FROM attempts a LEFT JOIN bulk_tasks b ON b.id = a.bulk_task_id"
    )
    own = db.number(f"{cost} WHERE a.step = ? AND a.execution_id = ?", step, execution_id)
    return own + db.number(
        f"{cost} WHERE {db.dialect.no_index}a.step = ?1 AND a.id <= ?3 "
        f"AND (a.settled_execution_id = ?2 OR a.{OPEN_ATTEMPT})",
        step,
        execution_id,
        earlier,
    )


def highest_prices(db: Database, request_ids: Sequence[int], price: int, priced_by: str | None) -> list[int]:
    """Return the highest price of each request, in millionths."""
    if priced_by is None:
        return [price] * len(request_ids)
    rows = db.execute(
        f"SELECT id, params FROM requests WHERE id IN ({JSON_NUMBERS.format('?')})", (to_json_text(request_ids),)
    )
    counts = {request_id: int(json.loads(params)[priced_by]) for request_id, params in rows.fetchall()}
    return [price * counts[request_id] for request_id in request_ids]

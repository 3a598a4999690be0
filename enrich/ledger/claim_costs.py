"""What a claim may cost: the highest price of each request, and what is left of the cap of its step."""

from __future__ import annotations

import json
from collections.abc import Sequence

from enrich.json_text import to_json_text
from enrich.ledger.database import Database, StepCost
from enrich.ledger.dialect import JSON_NUMBERS, OPEN_ATTEMPT


def left_of_step_cap(db: Database, execution_id: int, step: str | None, step_cap: int, price: int) -> int:
    """Return what is left of the step's cap. It is exact when less than `price` is left.

    Summing all attempts at each claim is slow. So claims since the last sum count at their highest price, and the sum
    is repeated once half of the rest is claimed.
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

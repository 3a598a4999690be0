"""The highest price of each request, which a claim compares with its caps."""

from __future__ import annotations

import json
from collections.abc import Sequence

from enrich.ledger.database import Database
from enrich.ledger.sql_fragments import JSON_NUMBERS
from enrich.models import to_json_text


def highest_prices(db: Database, request_ids: Sequence[int], price: int, priced_by: str | None) -> list[int]:
    """Return the highest price of each request, in millionths."""
    if priced_by is None:
        return [price] * len(request_ids)
    rows = db.execute(
        f"SELECT id, params FROM requests WHERE id IN ({JSON_NUMBERS.format('?')})", (to_json_text(request_ids),)
    )
    counts = {request_id: int(json.loads(params)[priced_by]) for request_id, params in rows.fetchall()}
    return [price * counts[request_id] for request_id in request_ids]

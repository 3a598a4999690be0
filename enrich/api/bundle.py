"""Reads what a bulk task says: the answers of many rows, and one price; pure functions, no I/O.

`data` is a list along the rows that were sent, null where nothing was returned; only the counts in
`progress` say how many of these nulls are misses and how many failed, and nobody says which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from enrich.api.answer import Phase, error_text, has_value, parse_data
from enrich.model import Answer, State, to_micros


def read_bundle(
    task: Mapping[str, Any], raw: str, phase: Phase, size: int, paths: Iterable[str]
) -> tuple[list[Answer], int | None]:
    """Judge a bulk task of `size` rows that is no longer running; return their answers and the price in millionths.

    The price is None when it is not known; that of a single row never is. An answer whose rows can't be told
    apart fails them all; its JSON (`raw`) stays with the first of them.
    """
    spent = to_micros(task.get("credits_spent"))
    data = task.get("data")
    said = error_text(task.get("error"))
    if phase is Phase.GONE:
        return [Answer(State.EXPIRED, "the result expired at the API before it was fetched", raw=raw)] * size, spent
    if phase is Phase.FAILED:
        free = spent == 0 and not data
        reason = said or f"the API says: {task.get('status')}"
        return _alike(Answer(State.FAILED, reason, free_failure=free), size, raw), spent
    rows = [None] * size if data is None or data == [] else data
    if not isinstance(rows, list) or len(rows) != size:
        count = f"{len(rows)} rows" if isinstance(rows, list) else "no list"
        reason = f"the API answered {size} rows with {count}: nobody can tell which is whose"
        return _alike(Answer(State.FAILED, reason), size, raw), spent
    blank = _blank(task.get("progress"), rows.count(None), said)
    paths = tuple(paths)
    return [blank if row is None else _row(row, paths) for row in rows], spent


def _row(row: object, paths: tuple[str, ...]) -> Answer:
    parsed = parse_data(row)
    state = State.FOUND if has_value(parsed.fields, paths) else State.NOT_FOUND
    return Answer(
        state, None, parsed.provider, raw=json.dumps({"data": row}, ensure_ascii=False, separators=(",", ":"))
    )


def _written(row: object) -> str:
    try:
        return orjson.dumps(row).decode()
    except TypeError:  # a number that is too large for it
        return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def _blank(progress: object, nulls: int, said: str | None) -> Answer:
    """Judge the rows for which nothing was returned: misses, unless some of them failed."""
    counts = progress if isinstance(progress, Mapping) else {}
    failed = counts.get("failed")
    if not isinstance(failed, int) or failed <= 0:
        return Answer(State.NOT_FOUND, raw='{"data":null}')
    if failed >= nulls:
        return Answer(State.FAILED, said or "the API says: failed")
    reason = (
        f"failed or not found: {failed} of the {nulls} rows without an answer failed, and the API does not say which"
    )
    return Answer(State.FAILED, f"{reason} ({said})" if said else reason)


def _alike(answer: Answer, size: int, raw: str) -> list[Answer]:
    first = Answer(answer.state, answer.error, raw=raw, free_failure=answer.free_failure)
    return [first, *([answer] * (size - 1))]

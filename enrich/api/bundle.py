"""Reads what a bulk task says: the answers of many rows, and one price; pure functions, no I/O.

`data` is a list along the rows that were sent, null where nothing was returned; only the counts in
`progress` say how many of these nulls are misses and how many failed, and nobody says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from enrich.api.answer import TaskPhase, TaskReply, error_text, has_value, is_blank, parse_data, parse_price
from enrich.model import Answer, State, to_json_text


def read_bulk_answers(
    reply: TaskReply, phase: TaskPhase, size: int, paths: Iterable[str]
) -> tuple[list[Answer], int | None]:
    """Judge a bulk task of `size` rows that is no longer running; return their answers and the price in millionths.

    The price is None when it is not known; that of a single row never is. An answer whose rows can't be told
    apart fails them all; its JSON stays with the first of them, as the `bundle` that it is.
    """
    task, raw = reply.body, reply.raw
    spent = parse_price(task.get("credits_spent"))
    data = task.get("data")
    message = error_text(task.get("error"))
    if phase is TaskPhase.GONE:
        # What a task says that is gone is no price.
        expired = Answer(State.EXPIRED, "the result expired at the API before it was fetched", result_deleted=True)
        return _same_answers(expired, size, raw), None
    if phase is TaskPhase.FAILED:
        is_empty = is_blank(data) or (isinstance(data, list) and all(map(is_blank, data)))
        reason = message or f"the API says: {task.get('status')}"
        return _same_answers(Answer(State.FAILED, reason, free_failure=spent == 0 and is_empty), size, raw), spent
    rows = [None] * size if is_blank(data) else data
    if not isinstance(rows, list) or len(rows) != size:
        count = f"{len(rows)} rows" if isinstance(rows, list) else "no list"
        reason = f"the API answered {size} rows with {count}: nobody can tell which is whose"
        return _same_answers(Answer(State.FAILED, reason), size, raw), spent
    blank_answer = _blank_row_answer(task.get("progress"), sum(map(is_blank, rows)), message, free=spent == 0)
    paths = tuple(paths)
    return [blank_answer if is_blank(row) else _row_answer(row, paths, reply.note) for row in rows], spent


def _row_answer(row: object, paths: tuple[str, ...], note: str | None) -> Answer:
    parsed = parse_data(row)
    state = State.FOUND if has_value(parsed.fields, paths) else State.NOT_FOUND
    try:
        return Answer(state, note, parsed.provider, raw=to_json_text({"data": row}))
    except RecursionError:
        return Answer(State.FAILED, "the API's answer is nested too deeply")


def _blank_row_answer(progress: object, blank_rows: int, message: str | None, *, free: bool) -> Answer:
    """Judge the rows for which nothing was returned: misses, unless some of them failed."""
    counts = progress if isinstance(progress, Mapping) else {}
    failed = counts.get("failed")
    if not isinstance(failed, int) or failed <= 0:
        return Answer(State.NOT_FOUND, raw='{"data":null}')
    if failed >= blank_rows:
        return Answer(State.FAILED, message or "the API says: failed", free_failure=free)
    reason = f"failed or not found: {failed} of the {blank_rows} rows without an answer failed, and the API does not say which"
    return Answer(State.FAILED, f"{reason} ({message})" if message else reason)


def _same_answers(answer: Answer, size: int, raw: str) -> list[Answer]:
    """Give all rows the same answer; what the API wrote is not the first row's own."""
    return [replace(answer, raw=f'{{"bundle":{raw}}}'), *([answer] * (size - 1))]

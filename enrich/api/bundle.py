"""Reads what a bulk task says: the answers of many rows, and one price; pure functions, no I/O.

`data` is a list along the rows that were sent, null where nothing was returned; only the counts in
`progress` say how many of these nulls are misses and how many failed, and nobody says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from enrich.api.answer import Phase, TaskReply, error_text, has_value, is_blank, parse_data, price_of
from enrich.model import Answer, State, written


def read_bundle(reply: TaskReply, phase: Phase, size: int, paths: Iterable[str]) -> tuple[list[Answer], int | None]:
    """Judge a bulk task of `size` rows that is no longer running; return their answers and the price in millionths.

    The price is None when it is not known; that of a single row never is. An answer whose rows can't be told
    apart fails them all; its JSON stays with the first of them, as the `bundle` that it is.
    """
    task, raw = reply.body, reply.raw
    spent = price_of(task.get("credits_spent"))
    data = task.get("data")
    said = error_text(task.get("error"))
    if phase is Phase.GONE:
        # What a task says that is gone is no price.
        gone = Answer(State.EXPIRED, "the result expired at the API before it was fetched", gone=True)
        return _alike(gone, size, raw), None
    if phase is Phase.FAILED:
        nothing = is_blank(data) or (isinstance(data, list) and all(map(is_blank, data)))
        reason = said or f"the API says: {task.get('status')}"
        return _alike(Answer(State.FAILED, reason, free_failure=spent == 0 and nothing), size, raw), spent
    rows = [None] * size if is_blank(data) else data
    if not isinstance(rows, list) or len(rows) != size:
        count = f"{len(rows)} rows" if isinstance(rows, list) else "no list"
        reason = f"the API answered {size} rows with {count}: nobody can tell which is whose"
        return _alike(Answer(State.FAILED, reason), size, raw), spent
    blank = _blank(task.get("progress"), sum(map(is_blank, rows)), said, free=spent == 0)
    paths = tuple(paths)
    return [blank if is_blank(row) else _row(row, paths, reply.note) for row in rows], spent


def _row(row: object, paths: tuple[str, ...], note: str | None) -> Answer:
    parsed = parse_data(row)
    state = State.FOUND if has_value(parsed.fields, paths) else State.NOT_FOUND
    try:
        return Answer(state, note, parsed.provider, raw=written({"data": row}))
    except RecursionError:
        return Answer(State.FAILED, "the API's answer is nested too deeply")


def _blank(progress: object, blanks: int, said: str | None, *, free: bool) -> Answer:
    """Judge the rows for which nothing was returned: misses, unless some of them failed."""
    counts = progress if isinstance(progress, Mapping) else {}
    failed = counts.get("failed")
    if not isinstance(failed, int) or failed <= 0:
        return Answer(State.NOT_FOUND, raw='{"data":null}')
    if failed >= blanks:
        return Answer(State.FAILED, said or "the API says: failed", free_failure=free)
    reason = (
        f"failed or not found: {failed} of the {blanks} rows without an answer failed, and the API does not say which"
    )
    return Answer(State.FAILED, f"{reason} ({said})" if said else reason)


def _alike(answer: Answer, size: int, raw: str) -> list[Answer]:
    """Give all rows the same answer; what the API wrote is not the first row's own."""
    return [replace(answer, raw=f'{{"bundle":{raw}}}'), *([answer] * (size - 1))]

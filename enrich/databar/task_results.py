"""Parses task results in every shape observed from the API. Pure functions, no I/O.

The API documentation is inconsistent about the `data` of a completed single run. It can be a list with one
wrapper object (`result`, `steps`, `enrichment_data`), the wrapper object itself, or the flat fields. An enrichment
answers with flat fields, or with a list of them. This module reads all of these. Its
checks are for `dict`, as JSON objects are: those for `Mapping` take ten times as long.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import isfinite
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from enrich.job.cell_text import is_blank as is_blank_text
from enrich.models import MICROS_PER_CREDIT, Answer, State, parse_count, pluralize, to_micros, whole_number


class TaskPhase(Enum):
    """Phase of a task at the API."""

    RUNNING = "running"
    COMPLETED = "completed"
    NO_DATA = "no_data"  # provisional: counts as no match after a short grace period
    FAILED = "failed"
    GONE = "gone"


#: Keys are lower-case values of the API's `status`. An unknown status counts as still running.
PHASE_BY_STATUS = {
    "completed": TaskPhase.COMPLETED,
    "success": TaskPhase.COMPLETED,
    "partially_completed": TaskPhase.COMPLETED,
    "no_data": TaskPhase.NO_DATA,
    "failed": TaskPhase.FAILED,
    "error": TaskPhase.FAILED,
    "cancelled": TaskPhase.FAILED,
    "canceled": TaskPhase.FAILED,
    "gone": TaskPhase.GONE,
}

#: Upper limit for the price of one answer, in millionths of a credit. A higher value counts as unknown.
MAX_ANSWER_CREDITS = 1_000_000 * MICROS_PER_CREDIT
#: Steps beyond this number are ignored.
MAX_STEPS = 1_000
#: At least one of these keys besides `result` marks a wrapper object. Without them, `result` is a flat field.
_RESULT_WRAPPER_KEYS = ("steps", "enrichment_data", "result_field")


class TaskReply(Struct, frozen=True):
    """The API's response about a task: the parsed body, the same body as JSON text, and a `note` on any defect."""

    body: dict[str, Any]
    raw: str
    note: str | None = None


class ParsedData(NamedTuple):
    """The parsed `data` of a task. `provider` is None when the response does not name one."""

    fields: Mapping[str, Any]
    provider: str | None
    #: What is around the fields; None: the answer is flat.
    wrapper: Mapping[str, Any] | None = None
    steps: Sequence[Mapping[str, Any]] = ()
    #: The rows of a flat answer that is a list.
    rows: Sequence[object] = ()
    #: Number of steps beyond MAX_STEPS, which were ignored.
    unread_steps: int = 0

    def steps_cost(self) -> tuple[int | None, bool]:
        """Return the cost of the steps (millionths; None: unknown), and whether any step may have cost something."""
        costs = [parse_price(step.get("cost")) for step in self.steps]
        known = [cost for cost in costs if cost is not None]
        is_complete = len(known) == len(costs) and not self.unread_steps
        total = sum(known)
        return total if costs and is_complete and total <= MAX_ANSWER_CREDITS else None, any(known) or not is_complete


def parse_price(value: object) -> int | None:
    """Parse the price of an answer into millionths of a credit. None if it is missing or not a valid price."""
    price = to_micros(value)
    return price if price is not None and price <= MAX_ANSWER_CREDITS else None


def is_incomplete(task: Mapping[str, Any], size: int = 1) -> bool:
    """Check whether a finished task of `size` rows lacks some that it counts as running, or was charged for no data."""
    data = task.get("data")
    blanks = list(map(is_blank, data)) if isinstance(data, list) and data else [is_blank(data)]
    if _has_running_rows(task):
        return any(blanks) or len(blanks) < size
    return all(blanks) and bool(parse_price(task.get("credits_spent")))


def _has_running_rows(task: Mapping[str, Any]) -> bool:
    progress = task.get("progress")
    running = whole_number(progress.get("processing")) if isinstance(progress, dict) else None
    return running is not None and running > 0


def _is_free(task: Mapping[str, Any]) -> bool:
    """Check whether a task that failed cost nothing. Rows that it counts as running can still be charged."""
    return parse_price(task.get("credits_spent")) == 0 and not _has_running_rows(task)


def is_cancelled(task: Mapping[str, Any]) -> bool:
    """Check whether a task was cancelled. A single one is not sent again unless the user says so."""
    return str(task.get("status", "")).strip().lower() in {"cancelled", "canceled"}


def task_phase(task: Mapping[str, Any]) -> TaskPhase:
    """Return the phase of a task."""
    return PHASE_BY_STATUS.get(str(task.get("status", "")).strip().lower(), TaskPhase.RUNNING)


def parse_data(data: object, provider: str | None = None, *, find_provider: bool = True) -> ParsedData:
    """Parse the `data` of a single run, in any of its shapes. `find_provider=False`: the provider is known already."""
    rows = data if isinstance(data, list) else ()
    data = _first_item(data)
    fields = _unwrap_fields(data)
    if not isinstance(data, dict) or fields is data:
        return ParsedData(fields, None, rows=rows)
    listed_steps = data.get("steps")
    listed_steps = listed_steps if isinstance(listed_steps, list) else []
    steps: list[Mapping[str, Any]] = [step for step in listed_steps[:MAX_STEPS] if isinstance(step, dict)]
    if find_provider:
        provider = _find_provider(fields, data.get("enrichment_data"), steps)
    return ParsedData(fields, provider, data, steps, unread_steps=max(0, len(listed_steps) - MAX_STEPS))


def _first_item(data: object) -> object:
    if not isinstance(data, list):
        return data
    for item in data:
        if item is not None:
            return item
    return None


def _unwrap_fields(data: object) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        return {}
    if "result" not in data or data.keys().isdisjoint(_RESULT_WRAPPER_KEYS):
        return data
    result = data["result"]
    if isinstance(result, dict):
        return result
    names = data.get("result_field")
    name = names[0] if isinstance(names, list) and names else names
    named = {name: result} if isinstance(name, str) else {}
    # A value without a name is a field of the answer: a verifier may call its verdict `result`.
    return named if named or is_blank(result) or "enrichment_data" in data else data


def _find_provider(fields: Mapping[str, Any], provider_data: object, steps: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the provider whose own data contains a value of the result, or else the last one named by a step."""
    values = [value for value in fields.values() if not is_blank(value)]
    if not values:
        return None
    if isinstance(provider_data, dict):
        for name, data in provider_data.items():
            own = data.values() if isinstance(data, dict) else [data]
            if any(value in values for value in own):
                return str(name)
    named_steps = [step for step in steps if not is_blank(step.get("provider"))]
    matching_steps = [step for step in named_steps if any(step.get("result") == value for value in values)]
    last = (matching_steps or [step for step in named_steps if step.get("is_verified") is True] or named_steps)[-1:]
    return str(last[0]["provider"]) if last else None


def is_blank(value: object) -> bool:
    """Check whether a value is empty: null, blank text, [], {}, NaN or infinity."""
    if isinstance(value, dict | list):
        return not value
    if isinstance(value, str):
        return is_blank_text(value)
    return value is None or (isinstance(value, float) and not isfinite(value))


def value_at(fields: object, path: str) -> Any:  # noqa: ANN401 - a JSON field can be any type
    """Return the value at a dotted path (`person.emails.0`), or of a field whose name has the dots. None: none."""
    if isinstance(fields, dict):
        if path in fields:
            return fields[path]
        head, _, rest = path.partition(".")
        return value_at(fields[head], rest) if rest and head in fields else None
    if isinstance(fields, list):
        head, _, rest = path.partition(".")
        index = parse_count(head)
        if index is not None and index < len(fields):
            return value_at(fields[index], rest) if rest else fields[index]
    return None


#: Paths that begin so are outside the result.
BESIDE = "$"
#: Data outside the result about its origin. It makes no match.
_STEPS_KEYS = ("is_verified", "steps")


def is_beside(path: str) -> bool:
    """Check whether a path reads more than the result fields: beside the result, or a numbered row."""
    return path.startswith(BESIDE) or parse_count(path.partition(".")[0]) is not None


def column_values(data: object, paths: Iterable[str]) -> list[Any]:
    """Return the values at the paths of the job's columns in the `data` of a single run; None where there is none.

    `$is_verified`, `$steps.0.provider` and `$enrichment_data.NAME.title` are outside the result. In a flat answer `$x`
    is the field `x`. In a list of rows, the fields are those of the first; `1.name` is in the second.
    """
    paths = list(paths)
    if not any(map(is_beside, paths)):
        fields = _unwrap_fields(_first_item(data))
        return [value_at(fields, path) for path in paths]
    parsed = parse_data(data)
    return [column_value(parsed, path) for path in paths]


def column_value(parsed: ParsedData, path: str) -> Any:  # noqa: ANN401 - a JSON field can be any type
    """Return the value at the path of a column, as `column_values` does."""
    if not path.startswith(BESIDE):
        in_list = parsed.rows and parse_count(path.partition(".")[0]) is not None
        return value_at(parsed.rows if in_list else parsed.fields, path)
    path = path.removeprefix(BESIDE)
    if parsed.wrapper is None:
        return value_at(parsed.fields, path)
    if path == "is_verified":
        has_provider = parsed.provider is not None
        credited = [step for step in parsed.steps if has_provider and step.get("provider") == parsed.provider]
        values = list(parsed.fields.values())
        last = ([step for step in credited if step.get("result") in values] or credited)[-1:]
        return last[0].get("is_verified") if last else None
    head, _, rest = path.partition(".")
    named = parsed.wrapper.get(head)
    if head != "enrichment_data" or not rest or not isinstance(named, dict):
        return value_at(parsed.wrapper, path)
    # The name of a provider may hold dots.
    for name in sorted(named, key=len, reverse=True):
        if rest == name:
            return named[name]
        if rest.startswith(f"{name}."):
            return value_at(named[name], rest.removeprefix(f"{name}."))
    return None


def makes_match(path: str) -> bool:
    """Check whether a value at this path makes a match. How the result was found does not."""
    return not path.startswith(BESIDE) or path.removeprefix(BESIDE).partition(".")[0] not in _STEPS_KEYS


def has_value(parsed: ParsedData, paths: Iterable[str]) -> bool:
    """Check whether one of the job's columns has a value that makes the request a match."""
    return any(makes_match(path) and not is_blank(column_value(parsed, path)) for path in paths)


def error_text(error: object) -> str | None:
    """Format an error (text, list of texts or an object) as one line. None if it is blank."""
    if is_blank(error):
        return None
    if isinstance(error, list):
        return "; ".join(text for text in map(error_text, error) if text) or None
    text = error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)
    # SQLite's JSON functions cut text at the first NUL.
    return " ".join(text.replace("\0", " ").split())


def read_answer(reply: TaskReply, phase: TaskPhase, paths: Iterable[str]) -> Answer:
    """Convert a task that is no longer running into an answer: found if one of the `paths` has a value."""
    task, raw, note = reply.body, reply.raw, reply.note
    parsed = parse_data(task.get("data"))
    spent = parse_price(task.get("credits_spent"))
    steps_cost, any_cost = parsed.steps_cost()
    cost = spent if "credits_spent" in task else steps_cost
    if parsed.unread_steps:
        note = f"{parsed.unread_steps:,} of the steps in the API's response were not read"
    match phase:
        case TaskPhase.GONE:
            return Answer(State.EXPIRED, "the result expired before it was fetched", raw=raw, result_deleted=True)
        case TaskPhase.FAILED:
            message = error_text(task.get("error")) or f"API: {task.get('status')}"
            free = _is_free(task) and not any_cost and not is_cancelled(task)
            return Answer(State.FAILED, message, parsed.provider, cost, raw, free_failure=free)
        case TaskPhase.COMPLETED | TaskPhase.NO_DATA | TaskPhase.RUNNING:
            if has_value(parsed, paths):
                return Answer(State.FOUND, note, parsed.provider, cost, raw)
            return Answer(State.NOT_FOUND, note or error_text(task.get("error")), parsed.provider, cost, raw)


@dataclass(slots=True)
class BulkReader:
    """Converts bulk tasks into answers of their rows, and records whether the API lists matches only.

    Such a list has no order, so a full one without null may be one, too. The API returned it before July 2026. A list
    in order has null for a row without a match.
    """

    matches_only: bool = False

    def read(
        self, reply: TaskReply, phase: TaskPhase, size: int, paths: Iterable[str]
    ) -> tuple[list[Answer], int | None]:
        """Convert a bulk task of `size` rows that is no longer running into one answer per row and a total price.

        The price is in millionths of a credit, or None if unknown. The price of a single row is never known.
        If the response cannot be split into rows, all rows fail. Its JSON is kept with the first row, under `bundle`.
        """
        if phase is TaskPhase.COMPLETED:
            self._observe(reply.body, size)
        task, raw = reply.body, reply.raw
        spent = parse_price(task.get("credits_spent"))
        data = task.get("data")
        message = error_text(task.get("error"))
        if phase is TaskPhase.GONE:
            # Ignore `credits_spent` of an expired task: it is not a reliable price.
            expired = Answer(State.EXPIRED, "the result expired before it was fetched", result_deleted=True)
            return _same_answers(expired, size, raw), None
        if phase is TaskPhase.FAILED:
            is_empty = is_blank(data) or (isinstance(data, list) and all(map(is_blank, data)))
            reason = message or f"API: {task.get('status')}"
            failed = Answer(State.FAILED, reason, free_failure=is_empty and _is_free(task))
            return _same_answers(failed, size, raw), spent
        rows = [None] * size if is_blank(data) else [data] if size == 1 and isinstance(data, dict) else data
        if not isinstance(rows, list) or len(rows) != size:
            count = pluralize(len(rows), "row") if isinstance(rows, list) else "no list"
            reason = f"the API answered {pluralize(size, 'row')} with {count}: the rows cannot be matched"
            return _same_answers(Answer(State.FAILED, reason), size, raw), spent
        blanks = list(map(is_blank, rows))
        if self.matches_only and size > 1 and not any(blanks):
            reason = "the API lists matches only, in no order: the rows cannot be matched"
            return _same_answers(Answer(State.FAILED, reason), size, raw), spent
        blank_answer = _blank_row_answer(task.get("progress"), sum(blanks), message, free=_is_free(task))
        if all(blanks):
            return [blank_answer] * size, spent
        paths, raw_data = tuple(paths), msgspec.json.decode(raw, type=_RawTask).data
        raw_rows = msgspec.json.decode(raw_data, type=list[msgspec.Raw]) if isinstance(data, list) else [raw_data]
        return [
            blank_answer if blank else _row_answer(row, str(raw_row, "utf-8"), paths, reply.note)
            for row, raw_row, blank in zip(rows, raw_rows, blanks, strict=True)
        ], spent

    def _observe(self, task: Mapping[str, Any], size: int) -> None:
        """Record whether this task lists matches only."""
        data = task.get("data")
        if isinstance(data, list) and not is_incomplete(task, size):
            has_null = any(map(is_blank, data))
            if has_null and len(data) == size:
                self.matches_only = False
            elif data and not has_null and len(data) < size:
                self.matches_only = True


class _RawTask(msgspec.Struct):
    """The data of a task as JSON text: its numbers stay as they are written."""

    data: msgspec.Raw


def _row_answer(row: object, raw: str, paths: tuple[str, ...], note: str | None) -> Answer:
    parsed = parse_data(row)
    state = State.FOUND if has_value(parsed, paths) else State.NOT_FOUND
    return Answer(state, note, parsed.provider, raw=f'{{"data":{raw}}}')


def _blank_row_answer(progress: object, blank_rows: int, message: str | None, *, free: bool) -> Answer:
    """Return the answer for rows without data: no match, unless `progress` reports failed rows."""
    counts = progress if isinstance(progress, Mapping) else {}
    failed = whole_number(counts.get("failed"))
    if failed is None or failed <= 0:
        return Answer(State.NOT_FOUND, raw='{"data":null}')
    if failed >= blank_rows:
        return Answer(State.FAILED, message or "API: failed", free_failure=free)
    reason = (
        f"failed or no match: {failed} of the {blank_rows} rows without a result failed, "
        "and the API does not report which"
    )
    return Answer(State.FAILED, f"{reason} ({message})" if message else reason)


def _same_answers(answer: Answer, size: int, raw: str) -> list[Answer]:
    """Return the same answer for all rows. The raw JSON is stored under `bundle`: it is not the first row's own."""
    return [replace(answer, raw=f'{{"bundle":{raw}}}'), *([answer] * (size - 1))]

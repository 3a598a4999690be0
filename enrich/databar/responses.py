"""Interprets the API's HTTP responses. Pure functions, no I/O.

The outcome of a submit POST depends only on this table:

no connection (refused, DNS, TLS, timeout while connecting)    RequestNotAccepted
3xx                                                            RequestNotAccepted (redirects are not followed)
401, 403                                                       Unauthorized
406                                                            OutOfCredits
429                                                            RateLimited
400, 422 that name a param of the job                          BadParams
400, 422 that name none of them; 404; 413 in bulk              JobRejected
any 2xx with a task id                                         accepted, unless another request has this id
anything else: 2xx without a task id, every 5xx, other 4xx,
read timeout, connection reset, a body that is not JSON        SubmissionUnconfirmed (with the task id, if any)

A poll response is valid if it names the requested task. A response that names no task (404, 410, 401, or a body
without an id) is valid if it came over a new connection. Any other response raises InvalidPollResponse, and the
task is polled again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from enrich.databar.task_results import TaskReply
from enrich.databar.text_filter import clean_json, clean_line, clean_text, decode_json, nan_as_null
from enrich.databar.transport import HttpAnswer
from enrich.errors import (
    ApiCallFailed,
    BadParams,
    InvalidPollResponse,
    JobRejected,
    OutOfCredits,
    RateLimited,
    RequestNotAccepted,
    RequestRefused,
    SubmissionUnconfirmed,
    TaskUnknown,
    Unauthorized,
)
from enrich.json_text import parse_json
from enrich.models import PLAIN_NUMBER, whole_number

#: A longer id is not accepted as a task id.
MAX_ID_LENGTH = 512
#: Deeper JSON is rejected. SQLite's JSON functions stop at 1,000 levels, and Python's parser at about the same.
MAX_DEPTH = 200
_CONTAINERS = (dict, list)
#: A longer Retry-After is reduced to this.
MAX_RETRY_AFTER_S = 3600.0
#: Number of bytes kept of an unreadable response.
MAX_UNREADABLE_BYTES = 1 << 20
NOT_UTF8_NOTE = "the API's response is not valid UTF-8: unreadable bytes are shown as �"
#: Invalid bytes, control characters and long numbers in other parts of a response do not make its id unreadable.
_ID_DECODER = json.JSONDecoder(parse_int=str, strict=False)
_REASONS = {status.value: status.phrase for status in HTTPStatus}


def parse_body(received: bytes, key: str) -> tuple[Any, str]:
    """Clean a body, mask the key, return its value and its text with all numbers as written. Raises ValueError."""
    text = nan_as_null(decode_json(clean_json(received, key)))
    try:
        value = parse_json(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value, text


def _check_depth(value: Any) -> None:  # noqa: ANN401 - a JSON document
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > MAX_DEPTH:
            raise ValueError("nested too deeply")
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, _CONTAINERS)
        ]


def task_ids(body: object) -> list[str]:
    """Return the task ids in a body: `task_id`, and `request_id`, its older name."""
    if not isinstance(body, Mapping):
        return []
    values = (body.get(name) for name in ("task_id", "request_id"))
    return [
        str(value).strip()
        for value in values
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip()
    ]


def usable_task_id(content: bytes, key: str) -> str | None:
    """Return the task id in the response to a POST. None if there is no id that can be polled.

    An id that needs cleaning is unusable, because the cleaned id could belong to another task.
    """
    try:
        body = _ID_DECODER.decode(decode_json(content))
    except (ValueError, RecursionError):
        return None
    return next((name for name in task_ids(body) if _is_usable_id(name, key)), None)


def _is_usable_id(task_id: str, key: str) -> bool:
    only_dots = not task_id.strip(".")  # dots in a URL path point to another resource
    is_clean = "\ufffd" not in task_id and clean_text(task_id, key) == task_id
    return len(task_id) <= MAX_ID_LENGTH and task_id.isprintable() and not only_dots and is_clean


def _read_poll_error(answer: HttpAnswer, key: str) -> TaskReply:
    """Return a deleted task (410), or raise the error of an unsuccessful response to a poll."""
    error = response_error(answer, key)
    if isinstance(error, RateLimited):
        raise error
    if not answer.is_fresh:
        raise InvalidPollResponse(error.message, new_connection=False)
    if answer.status == HTTPStatus.GONE:
        return TaskReply({"status": "gone"}, '{"status":"gone"}')
    if answer.status == HTTPStatus.NOT_FOUND:
        raise TaskUnknown(error.message)
    if isinstance(error, Unauthorized | OutOfCredits):
        raise error
    is_refused = answer.status < HTTPStatus.INTERNAL_SERVER_ERROR
    raise RequestRefused(error.message) if is_refused else RequestNotAccepted(error.message)


def read_task_reply(answer: HttpAnswer, task_id: str, key: str) -> TaskReply:
    """Interpret a response to a poll of `task_id`, by the rules at the top of this file.

    Raises InvalidPollResponse, RateLimited, TaskUnknown (404), Unauthorized and other RequestNotAccepted errors.
    """
    if not answer.is_success:
        return _read_poll_error(answer, key)
    content, new_connection = answer.content, answer.is_fresh
    try:
        value, text = parse_body(content, key)
    except ValueError as error:
        start = clean_text(content[:MAX_UNREADABLE_BYTES].decode(errors="replace"), key)
        reason = str(error) if "nested" in str(error) else "it is not JSON"
        raise InvalidPollResponse(
            f"the API's response cannot be read: {reason}", start, new_connection=new_connection
        ) from error
    ids = task_ids(value)
    if ids and task_id not in ids:
        raise InvalidPollResponse("the response is for another task", text, ids[0], new_connection=new_connection)
    if not ids and not new_connection:
        raise InvalidPollResponse("the API's response has no task id", text, new_connection=False)
    if not isinstance(value, dict) or "status" not in value:
        raise InvalidPollResponse("the API's response is not a task", text, new_connection=new_connection)
    has_unreadable_bytes = "\ufffd" in text and "\ufffd".encode() not in content
    return TaskReply(value, text, NOT_UTF8_NOTE if has_unreadable_bytes else None)


def response_error(
    answer: HttpAnswer, key: str, params: Collection[str] = (), rows: int | None = None
) -> ApiCallFailed:
    """Return the error for an unsuccessful response. One of the `params` fails a row; `rows`: of a bulk POST."""
    status = answer.status
    body: object = None
    with suppress(ValueError):
        body = parse_body(answer.content, key)[0]
    reason = _error_detail(body) or _REASONS.get(status, "no reason given")
    message = clean_line(f"HTTP {status}: {reason}", key)
    if 300 <= status < 400:  # noqa: PLR2004
        return RequestNotAccepted(f"HTTP {status}: the API redirects the request")
    match status:
        case 401 | 403 if body is None and answer.content.strip():
            return RequestNotAccepted(
                f"{message}, with a page instead of the API's JSON: "
                "a firewall, proxy or CDN rejects the request, not the API the key"
            )
        case 401 | 403:
            return Unauthorized(
                f"the API rejects the key: {message}", "check the key, and that the plan has API access"
            )
        case 407:
            return RequestNotAccepted(f"the proxy requires a login: {message}")
        case 406:
            return OutOfCredits(f"the API is out of credits: {message}")
        case 429:
            return RateLimited(message, _retry_after(answer))
        case 400 | 422:
            return _params_error(body, params, rows, message)
        case 413 if rows is not None:
            return JobRejected(f"the API rejects this number of rows per request: {message}", "lower `dispatch.bulk`")
        case 404:
            return JobRejected(message)
        case _:
            return SubmissionUnconfirmed(message, usable_task_id(answer.content, key))


def _params_error(body: object, params: Collection[str], rows: int | None, message: str) -> BadParams | JobRejected:
    reasons = wrong_rows(body, rows or 1, params)
    if reasons is not None:
        return BadParams({row: clean_line(reason) for row, reason in reasons.items()}, message)
    return JobRejected(f"the API rejects the request: {message}")


def _retry_after(answer: HttpAnswer) -> float | None:
    """Return Retry-After in seconds, or None. A date (RFC 9110) is compared with the API's own `Date` header."""
    value = answer.header(b"retry-after").strip()
    if PLAIN_NUMBER.fullmatch(value):
        return min(max(0.0, float(value)), MAX_RETRY_AFTER_S)
    try:
        at = parsedate_to_datetime(value)
        now = parsedate_to_datetime(answer.header(b"date"))
        return min(max(0.0, (at - now).total_seconds()), MAX_RETRY_AFTER_S)
    except (ValueError, TypeError, ArithmeticError):
        return None


def _error_detail(body: object) -> str:
    """Return the API's message in an error body, without the input values that the API may echo."""
    detail = body.get("detail") if isinstance(body, Mapping) else None
    if isinstance(detail, str):
        return detail[:200]
    if isinstance(detail, list):
        return "; ".join(
            f"{join_text(item.get('loc'), '.')}: {item.get('msg')}" for item in detail if isinstance(item, Mapping)
        )[:200]
    return json.dumps(detail)[:200] if detail is not None else ""


#: Keys of an error object that are no params, even if a param has this name.
ERROR_KEYS = frozenset({"position", "error", "code", "message", "msg", "type", "status", "detail"})


def wrong_rows(body: object, size: int, params: Collection[str]) -> dict[int, str] | None:
    """Return the rows of a request of `size` rows with errors about `params`: row index (from 0) to message.

    None: the body names none of them. {}: it names some, but not in which of several rows. Supported shapes are
    `{"fields": {…}}`, `{"detail": {…}}`, `{"rows": [{"position": FROM_1, "fields": {…}}]}`, `{"detail": [{…}, …]}` with
    one object per row, and FastAPI's `{"detail": [{"loc": ["body", "params", ROW, NAME], "msg": …}]}`.
    """
    rows: dict[int, dict[str, str]] = {}
    for named_row, (name, message) in _param_errors(body, params, size):
        row = 0 if size == 1 else named_row
        if row is None or not 0 <= row < size:
            return {}
        rows.setdefault(row, {})[name] = message
    return {row: "; ".join(f"{name}: {text}" for name, text in errors.items()) for row, errors in rows.items()} or None


def join_text(text: object, separator: str = " ") -> str:
    """Join a list of texts into one. A single text is returned as it is."""
    return separator.join(map(str, text)) if isinstance(text, list) else str(text)


def _param_errors(body: object, params: Collection[str], size: int) -> Iterator[tuple[int | None, tuple[str, str]]]:
    """Yield each error about `params` as (row index, (param, message)). The row is None if the body does not name it.

    Other names are parts of the body (`enrichments`), of an error (`reason`), or params that the job does not send.
    """
    if not isinstance(body, Mapping):
        return
    detail, rows = body.get("detail"), body.get("rows")
    yield from ((None, error) for error in _field_errors(body.get("fields"), params))
    if isinstance(detail, list):
        one_per_row = len(detail) == size and all(isinstance(item, Mapping) and "loc" not in item for item in detail)
        for index, item in enumerate(detail):
            if isinstance(item, Mapping) and "loc" in item:
                yield from _fastapi_error(item, params)
            else:
                yield from ((index if one_per_row else None, error) for error in _field_errors(item, params))
    else:
        yield from ((None, error) for error in _field_errors(detail, params))
    for item in rows if isinstance(rows, list) else []:
        position = item.get("position") if isinstance(item, Mapping) else None
        row = None if (number := whole_number(position)) is None else number - 1
        yield from ((row, error) for error in _field_errors(item, params))


def _fastapi_error(item: Mapping[str, object], params: Collection[str]) -> Iterator[tuple[int | None, tuple[str, str]]]:
    """Yield the param error in one item of FastAPI's `detail` list."""
    loc = item["loc"]
    if not isinstance(loc, list) or "params" not in loc[:-1]:
        return
    place = loc[loc.index("params") + 1 :]
    if name := next(filter(None, (_find_param(part, params) for part in place)), None):
        yield whole_number(place[0]), (name, str(item.get("msg", "refused")))


def _field_errors(item: object, params: Collection[str]) -> Iterator[tuple[str, str]]:
    if not isinstance(item, Mapping):
        return
    fields = item.get("fields")
    if not isinstance(fields, Mapping):
        fields = {name: value for name, value in item.items() if name not in ERROR_KEYS}
    yield from ((name, join_text(value)) for key, value in fields.items() if (name := _find_param(key, params)))


def _find_param(key: object, params: Collection[str]) -> str | None:
    """Return the one of `params` that a key such as `company`, `Company` or `params.company` names; None: no one."""
    parts = str(key).casefold().split(".")
    return next((param for param in params if param.casefold() in parts), None)

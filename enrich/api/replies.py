"""Reads what the API's HTTP answers mean; pure functions, no I/O.

What an answer to a run POST means for the request, and nothing else decides it:

no connection (refused, DNS, TLS, time-out before it stands)   NotAccepted
3xx                                                            NotAccepted (never followed)
401, 403                                                       Unauthorized
406                                                            OutOfCredits
429                                                            RateLimited
400, 422 that name a param                                     BadParams
400, 422 that name none; 404; in bulk 413                      JobRejected
any 2xx with a task id                                         accepted, unless another request has that id
anything else: 2xx without task id, every 5xx, other 4xx,
no answer in time, reset, a body that is not JSON              Ambiguous (with the task id, if it carries one)

An answer to a poll counts when it names the task that was asked for. One that names no task (404, 410, 401, or a
body without an id) counts when it came over a connection of its own; any other is NotBelieved and asked again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import orjson

from enrich.api.answer import TaskReply
from enrich.api.complaints import named_params, named_rows, words
from enrich.api.outside_text import clean_json, clean_line, clean_text
from enrich.errors import (
    Ambiguous,
    BadParams,
    CallFailed,
    JobRejected,
    NotAccepted,
    NotBelieved,
    OutOfCredits,
    RateLimited,
    TaskUnknown,
    Unauthorized,
)
from enrich.model import written

#: A longer id is no task id.
LONGEST_ID = 512
#: Answers that are nested deeper are not read: SQLite's JSON ends at 1,000 levels, Python's at about as many.
DEEPEST = 200
#: A longer Retry-After is not believed.
LONGEST_RETRY_AFTER_S = 3600.0
#: So much is kept of an answer that cannot be read.
UNREADABLE_BYTES = 1 << 20
NOT_UTF8 = "the API's answer is not valid UTF-8: what could not be read is shown as �"
#: Perhaps a whole number of more than 64 bits: orjson would make a float of it.
_LONG_NUMBER = re.compile(rb"[1-9][0-9]{18}")
_SECONDS = re.compile(r"-?[0-9]+(\.[0-9]*)?")


class _Missing(JobRejected):
    """404."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A JSON body: its value, the same as JSON text, and whether all of its bytes could be read."""

    value: Any
    text: str
    whole: bool = True


def parsed(response: httpx.Response) -> Parsed:
    """Clean and parse a body; what is no character (a lone surrogate, wrong UTF-8) is replaced.

    Raises ValueError when it is not JSON, or nested too deeply.
    """
    received = response.content
    body = clean_json(received, _key(response))
    try:
        if not _LONG_NUMBER.search(body):
            return _not_too_deep(Parsed(orjson.loads(body), body.decode()))
    except orjson.JSONDecodeError:
        pass  # broken, or of the things that Python reads and JSON does not have
    try:
        try:
            value = json.loads(body, parse_constant=_no_number)
        except UnicodeDecodeError:
            value = json.loads(body.decode(errors="replace"), parse_constant=_no_number)
        text = written(value)
        had_it = b"\xef\xbf\xbd" in received or b"fffd" in received.lower()
        return _not_too_deep(Parsed(json.loads(text), text, had_it or "\ufffd" not in text))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_number(_: str) -> None:
    """Read NaN and Infinity, which JSON does not have, as null."""


def _not_too_deep(reply: Parsed) -> Parsed:
    if reply.text.count("[") + reply.text.count("{") <= DEEPEST:
        return reply
    level, depth = [reply.value], 0
    while level:
        if (depth := depth + 1) > DEEPEST:
            raise ValueError("nested too deeply")
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [value for item in inner for value in (item.values() if isinstance(item, dict) else item)]
    return reply


def _json(response: httpx.Response) -> object:
    try:
        return parsed(response).value
    except ValueError:
        return None


def _key(response: httpx.Response) -> str:
    return str(response.request.headers["x-apikey"])


def named_ids(body: object) -> list[str]:
    """List the ids that a body gives its task, `request_id` being the older name."""
    if not isinstance(body, Mapping):
        return []
    values = (body.get(name) for name in ("task_id", "request_id"))
    return [
        str(value).strip()
        for value in values
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip()
    ]


def usable_id(response: httpx.Response) -> str | None:
    """Find the task id in the answer to a POST; None where there is none that can be asked for.

    One that would have to be cleaned is none: it could become another's.
    """
    try:
        # Wrong bytes elsewhere in the answer don't make the id unreadable.
        body = json.loads(response.content.decode(errors="replace"), parse_int=_whole_number)
    except (ValueError, RecursionError):
        return None
    return next((name for name in named_ids(body) if _is_usable(name, _key(response))), None)


def _whole_number(digits: str) -> int | str:
    """Read a whole number; Python refuses those of more than 4,300 digits."""
    return int(digits) if len(digits) < LONGEST_ID else digits


def _is_usable(name: str, key: str) -> bool:
    dots = not name.strip(".")  # a path of dots leads elsewhere
    whole = "\ufffd" not in name and clean_text(name, key) == name
    return len(name) <= LONGEST_ID and name.isprintable() and not dots and whole


def task_reply(response: httpx.Response, task_id: str) -> TaskReply:
    """Judge the answer to a poll of `task_id`; see the top of this file."""
    fresh = bool(response.extensions["fresh"])
    if not response.is_success:
        error = refusal(response)
        if isinstance(error, RateLimited):
            raise error
        if not fresh:
            raise NotBelieved(error.message, fresh=False)
        if response.status_code == httpx.codes.GONE:
            return TaskReply({"status": "gone"}, '{"status":"gone"}')
        if isinstance(error, _Missing):
            raise TaskUnknown(error.message)
        raise error if isinstance(error, NotAccepted) else NotAccepted(error.message)
    try:
        reply = parsed(response)
    except ValueError as error:
        start = clean_text(response.content[:UNREADABLE_BYTES].decode(errors="replace"), _key(response))
        reason = str(error) if "nested" in str(error) else "it is not JSON"
        raise NotBelieved(f"the API's answer cannot be read: {reason}", start, fresh=fresh) from error
    named = named_ids(reply.value)
    if named and task_id not in named:
        raise NotBelieved("the API answered with another task", reply.text, named[0], fresh=fresh)
    if not named and not fresh:
        raise NotBelieved("the API's answer names no task", reply.text, fresh=False)
    if not isinstance(reply.value, dict) or "status" not in reply.value:
        raise NotBelieved("the API's answer is not a task", reply.text, fresh=fresh)
    return TaskReply(reply.value, reply.text, None if reply.whole else NOT_UTF8)


def refusal(response: httpx.Response, rows: int | None = None) -> CallFailed:
    """Say what an answer other than 200 means; `rows`: how many were sent in bulk."""
    status = response.status_code
    body = _json(response)
    key = response.request.headers["x-apikey"]
    said = clean_line(f"HTTP {status}: {_detail(body) or response.reason_phrase or 'no reason given'}", key)
    if 300 <= status < 400:  # noqa: PLR2004
        return NotAccepted(f"HTTP {status}: the API redirects the request")
    match status:
        case 401 | 403 if body is None and response.content.strip():
            return NotAccepted(
                f"{said}, with a page instead of the API's JSON: "
                "a firewall, a proxy or the CDN before the API refuses the request, not the API the key"
            )
        case 401 | 403:
            return Unauthorized(f"the API refuses the key: {said}", "check the key, and that the plan has API access")
        case 407:
            return NotAccepted(f"the proxy wants a login: {said}")
        case 406:
            return OutOfCredits(f"the API is out of credits: {said}")
        case 429:
            return RateLimited(said, _retry_after(response))
        case 400 | 422:
            return _complaint(body, rows, said)
        case 413 if rows is not None:
            return JobRejected(f"the API refuses this number of rows at once: {said}", "lower `dispatch.bulk`")
        case 404:
            return _Missing(said)
        case _:
            return Ambiguous(said, usable_id(response))


def _complaint(body: object, rows: int | None, said: str) -> BadParams | JobRejected:
    named = named_params(body) or None if rows is None else named_rows(body, rows)
    if named is not None:
        return BadParams({row: clean_line(reason) for row, reason in named.items()}, said)
    return JobRejected(f"the API refuses the request: {said}")


def _retry_after(response: httpx.Response) -> float | None:
    """Read Retry-After (RFC 9110: seconds, or a date, measured against the API's own clock), in seconds."""
    value = response.headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(value):
        return min(max(0.0, float(value)), LONGEST_RETRY_AFTER_S)
    try:
        at = parsedate_to_datetime(value)
        now = parsedate_to_datetime(response.headers["date"])
        return min(max(0.0, (at - now).total_seconds()), LONGEST_RETRY_AFTER_S)
    except (LookupError, ValueError, TypeError, ArithmeticError):
        return None


def _detail(body: object) -> str:
    """Find the API's own words in an error body, without the input that it may echo."""
    detail = body.get("detail") if isinstance(body, Mapping) else None
    if isinstance(detail, str):
        return detail[:200]
    if isinstance(detail, list):
        return "; ".join(
            f"{words(item.get('loc'), '.')}: {item.get('msg')}" for item in detail if isinstance(item, Mapping)
        )[:200]
    return json.dumps(detail)[:200] if detail is not None else ""

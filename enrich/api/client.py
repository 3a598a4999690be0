"""The API's calls and their typed errors: the only HTTP.

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
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import orjson
from pydantic import BaseModel, ValidationError

from enrich import __version__
from enrich.api.answer import TaskReply
from enrich.api.complaints import named_params, named_rows, words
from enrich.api.credentials import Access
from enrich.api.network import find_certificates, find_proxy
from enrich.api.transport import AnswerTooLarge, CertificateRefused, Transport
from enrich.api.waterfall import User, Waterfall
from enrich.errors import (
    Ambiguous,
    BadParams,
    CallFailed,
    CertificateUntrusted,
    JobRejected,
    NotAccepted,
    NotBelieved,
    OutOfCredits,
    RateLimited,
    TaskUnknown,
    Unauthorized,
)
from enrich.model import Clock, written

#: POSTs on the wire at once, at most: what a kill can leave in doubt.
POSTS_ON_THE_WIRE = 32
#: Each has many requests in it, and all of them are in doubt when its answer is lost.
BULK_POSTS_ON_THE_WIRE = 4
POLLS_ON_THE_WIRE = 32
CONNECT_S, POST_S, GET_S = 10.0, 60.0, 30.0
MAX_REDIRECTS = 3
#: A longer id is no task id.
LONGEST_ID = 512
#: Answers that are nested deeper are not read: SQLite's JSON ends at 1,000 levels, Python's at about as many.
DEEPEST = 200


class Client:
    """The API over HTTP. Use as an async context manager; one event loop."""

    def __init__(
        self,
        access: Access,
        clock: Clock,
        *,
        post_s: float = POST_S,
        get_s: float = GET_S,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Talk to the API at `access`; `post_s` and `get_s` are how long an answer may take in seconds.

        Raises JobError when the proxy or the certificates that `environ` names cannot be used.
        """
        self._base = access.base_url
        self._clock = clock
        self._told_date = ""
        # Made once, as far as can be: the making of requests costs as much as their sending.
        self._headers = httpx.Headers(
            {
                "host": httpx.URL(self._base).netloc.decode(),
                "x-apikey": access.key.get_secret_value(),
                "user-agent": f"databar-enrich/{__version__}",
                "accept-encoding": "gzip, deflate",  # what httpx can always read
            }
        )
        self._post_headers = httpx.Headers([*self._headers.raw, (b"content-type", b"application/json")])
        self._run_urls: dict[str, httpx.URL] = {}
        self._post_time, self._get_time = {"timeout": {"read": post_s}}, {"timeout": {"read": get_s}}
        # Reading the certificates takes longer than a whole run on loopback.
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if access.base_url.startswith("https:"):
            tls = find_certificates(environ) or httpx.create_ssl_context(trust_env=False)
        proxy = find_proxy(environ, access.base_url)
        # A POST never reads what an earlier exchange left on its connection.
        self._posts = Transport(POSTS_ON_THE_WIRE, CONNECT_S, tls, reuse=False, proxy=proxy)
        self._gets = Transport(POLLS_ON_THE_WIRE, CONNECT_S, tls, proxy=proxy)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._posts.aclose()
        await self._gets.aclose()

    async def user(self) -> User:
        """Ask whose key it is and what the balance is. Raises Unauthorized, NotAccepted."""
        return _parse(User, await self._get("/user/me"))

    async def waterfalls(self) -> list[Waterfall]:
        """List the waterfalls. Raises Unauthorized, NotAccepted."""
        listed = await self._get("/waterfalls/")
        if not isinstance(listed, list):
            raise NotAccepted("the API's list of waterfalls is not a list")
        return [_parse(Waterfall, item) for item in listed]

    async def waterfall(self, identifier: str) -> Waterfall:
        """Describe one waterfall. Raises JobRejected when there is none of that name, Unauthorized, NotAccepted."""
        waterfall = _parse(Waterfall, await self._get(f"/waterfalls/{quote(identifier, safe='')}"))
        if waterfall.identifier.casefold() != identifier.casefold():
            raise NotAccepted("the API described another waterfall")
        return waterfall

    async def run(self, waterfall: str, body: bytes, rows: int | None = None) -> str:
        """Submit one paid run, or in bulk so many rows as one task, by exactly one POST; return the task id.

        Raises as the table at the top of this file says, and nothing else.
        """
        path = f"/waterfalls/{quote(waterfall, safe='')}/{'run' if rows is None else 'bulk-run'}"
        if (url := self._run_urls.get(path)) is None:
            url = self._run_urls[path] = httpx.URL(self._base + path)
        try:
            response = await self._posts.handle_async_request(
                httpx.Request("POST", url, headers=self._post_headers, content=body, extensions=self._post_time)
            )
        except CertificateRefused as error:
            raise CertificateUntrusted(str(error)) from error
        except httpx.ConnectError as error:
            raise NotAccepted(f"no connection to the API: {error}") from error
        except httpx.HTTPError as error:
            raise Ambiguous(f"no answer from the API: {error}") from error
        self._observe(response)
        if response.is_success:
            if task_id := readable_id(_json(response)):
                return task_id
            raise Ambiguous(f"the API answered {response.status_code} without a task id")
        raise _refusal(response, rows)

    async def task(self, task_id: str, *, fresh: bool = False) -> TaskReply:
        """Ask how a task is, with `fresh` over a new connection. One that expired (410) has the status `gone`.

        Raises TaskUnknown (404), Unauthorized, RateLimited, NotBelieved, and NotAccepted for all else that asking
        again may mend.
        """
        response = await self._fetch(f"/tasks/{quote(task_id, safe='')}", fresh=fresh)
        try:
            return _task_reply(response, task_id)
        except NotBelieved:
            _close_connection(response)
            raise

    async def _get(self, path: str) -> Any:  # noqa: ANN401 - a JSON document is anything
        """GET over a new connection: what is read there cannot be the answer to an earlier request. Return the JSON."""
        response = await self._fetch(path, fresh=True)
        if not response.is_success:
            refusal = _refusal(response)
            raise NotAccepted(refusal.message) if isinstance(refusal, Ambiguous | BadParams) else refusal
        try:
            return _parsed(response.content).value
        except ValueError as error:
            raise NotAccepted("the API's answer is not JSON") from error

    async def _fetch(self, path: str, *, fresh: bool) -> httpx.Response:
        """GET. Redirects are followed to the same host only: the key goes with them."""
        url = httpx.URL(self._base + path)
        extensions = self._get_time | {"fresh": fresh}
        try:
            for _ in range(MAX_REDIRECTS):
                response = await self._gets.handle_async_request(
                    httpx.Request("GET", url, headers=self._headers, extensions=extensions)
                )
                self._observe(response)
                if not response.has_redirect_location:
                    break
                url = response.url.join(response.headers["location"])
                if _origin(str(url)) != _origin(self._base):
                    raise NotAccepted("the API redirects to another host")
        except CertificateRefused as error:
            raise CertificateUntrusted(str(error)) from error
        except AnswerTooLarge as error:
            start = error.start[:UNREADABLE_BYTES].decode(errors="replace")
            raise NotBelieved(f"the API's answer cannot be read: {error}", start) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotAccepted(f"no answer from the API: {error}") from error
        return response

    def _observe(self, response: httpx.Response) -> None:
        """Read the API's clock, once a second; not from a cache, whose answers are as old as their `Age` says."""
        told = response.headers.get("date", "")
        if told == self._told_date or "age" in response.headers:
            return
        self._told_date = told
        try:
            self._clock.observe(int(parsedate_to_datetime(told).timestamp() * 1000))
        except (ValueError, OverflowError):
            return


M = TypeVar("M", bound=BaseModel)


#: So much is kept of an answer that cannot be read.
UNREADABLE_BYTES = 1 << 20
NOT_UTF8 = "the API's answer is not valid UTF-8: what could not be read is shown as �"
#: Perhaps a whole number of more than 64 bits: orjson would make a float of it.
_LONG_NUMBER = re.compile(rb"[1-9][0-9]{18}")


class _Missing(JobRejected):
    """404."""


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _parse(kind: type[M], data: object) -> M:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise NotAccepted(f"the API's answer is not a {kind.__name__.lower()}") from error


@dataclass(frozen=True, slots=True)
class _Parsed:
    """A JSON body: its value, the same as JSON text, and whether all of its bytes could be read."""

    value: Any
    text: str
    whole: bool = True


def _parsed(body: bytes) -> _Parsed:
    """Parse a body; what is no character (a lone surrogate, wrong UTF-8) is replaced.

    Raises ValueError when it is not JSON, or nested too deeply.
    """
    try:
        if not _LONG_NUMBER.search(body):
            return _not_too_deep(_Parsed(orjson.loads(body), body.decode()))
    except orjson.JSONDecodeError:
        pass  # broken, or of the things that Python reads and JSON does not have
    try:
        try:
            value, whole = json.loads(body, parse_constant=_no_number), True
        except UnicodeDecodeError:
            value, whole = json.loads(body.decode(errors="replace"), parse_constant=_no_number), False
        text = written(value)
        return _not_too_deep(_Parsed(json.loads(text), text, whole))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_number(_: str) -> None:
    """Read NaN and Infinity, which JSON does not have, as null."""


def _not_too_deep(parsed: _Parsed) -> _Parsed:
    if parsed.text.count("[") + parsed.text.count("{") <= DEEPEST:
        return parsed
    level, depth = [parsed.value], 0
    while level:
        if (depth := depth + 1) > DEEPEST:
            raise ValueError("nested too deeply")
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [value for item in inner for value in (item.values() if isinstance(item, dict) else item)]
    return parsed


def _json(response: httpx.Response) -> object:
    try:
        return _parsed(response.content).value
    except ValueError:
        return None


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


def readable_id(body: object) -> str | None:
    """Find the task id in a body; None where there is none that can be asked for."""
    usable = (name for name in named_ids(body) if len(name) <= LONGEST_ID and name.isprintable() and name.strip("."))
    return next(usable, None)


def _task_reply(response: httpx.Response, task_id: str) -> TaskReply:
    """Judge the answer to a poll of `task_id`; see the top of this file."""
    fresh = bool(response.extensions.get("fresh", True))
    if not response.is_success:
        refusal = _refusal(response)
        if isinstance(refusal, RateLimited):
            raise refusal
        if not fresh:
            raise NotBelieved(refusal.message, fresh=False)
        if response.status_code == httpx.codes.GONE:
            return TaskReply({"status": "gone"}, '{"status":"gone"}')
        if isinstance(refusal, _Missing):
            raise TaskUnknown(refusal.message)
        raise refusal if isinstance(refusal, NotAccepted) else NotAccepted(refusal.message)
    try:
        parsed = _parsed(response.content)
    except ValueError as error:
        start = response.content[:UNREADABLE_BYTES].decode(errors="replace")
        reason = str(error) if "nested" in str(error) else "it is not JSON"
        raise NotBelieved(f"the API's answer cannot be read: {reason}", start, fresh=fresh) from error
    named = named_ids(parsed.value)
    if named and task_id not in named:
        raise NotBelieved("the API answered with another task", parsed.text, named[0], fresh=fresh)
    if not named and not fresh:
        raise NotBelieved("the API's answer names no task", parsed.text, fresh=False)
    if not isinstance(parsed.value, dict) or "status" not in parsed.value:
        raise NotBelieved("the API's answer is not a task", parsed.text, fresh=fresh)
    return TaskReply(parsed.value, parsed.text, None if parsed.whole else NOT_UTF8)


def _close_connection(response: httpx.Response) -> None:
    close = response.extensions.get("close")
    if close is not None:
        close()


def _refusal(response: httpx.Response, rows: int | None = None) -> CallFailed:
    """Say what an answer other than 200 means; `rows`: how many were sent in bulk."""
    status = response.status_code
    body = _json(response)
    key = response.request.headers["x-apikey"]
    said = f"HTTP {status}: {_detail(body) or response.reason_phrase or 'no reason given'}".replace(key, "[key]")
    said = "".join(letter if letter.isprintable() else " " for letter in said)  # it is read on a terminal
    if 300 <= status < 400:  # noqa: PLR2004
        return NotAccepted(f"HTTP {status}: the API redirects the request")
    match status:
        case 401 | 403:
            return Unauthorized(f"the API refuses the key: {said}", "check the key, and that the plan has API access")
        case 406:
            return OutOfCredits(f"the API is out of credits: {said}")
        case 429:
            return RateLimited(said, _retry_after(response))
        case 400 | 422:
            named = named_params(body) or None if rows is None else named_rows(body, rows)
            if named is not None:
                return BadParams({row: told.replace(key, "[key]") for row, told in named.items()}, said)
            return JobRejected(f"the API refuses the request: {said}")
        case 413 if rows is not None:
            return JobRejected(f"the API refuses so many rows at once: {said}", "lower `dispatch.bulk`")
        case 404:
            return _Missing(said)
        case _:
            return Ambiguous(said, readable_id(body))


def _retry_after(response: httpx.Response) -> float | None:
    """Read Retry-After (RFC 9110: seconds, or a date, measured against the API's own clock)."""
    value = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(value)
        now = parsedate_to_datetime(response.headers["date"])
        return max(0.0, (at - now).total_seconds())
    except (KeyError, ValueError, TypeError):
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

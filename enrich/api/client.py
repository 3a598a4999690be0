"""The API's calls and their typed errors: the only HTTP.

What an answer to a run POST means for the request, and nothing else decides it:

no connection (refused, DNS, TLS, time-out before it stands)   NotAccepted
3xx                                                            NotAccepted (never followed)
401, 403 with JSON, or without a body                          Unauthorized
401, 403 with a page (HTML, text): a CDN or a proxy refuses    NotAccepted
407: the proxy wants a login                                   NotAccepted
406                                                            OutOfCredits
429                                                            RateLimited
400, 422 that name a param                                     BadParams
400, 422 that name none; 404; in bulk 413                      JobRejected
200 with a task id                                             accepted
anything else: 200 without task id, every 5xx, other 4xx,
no answer in time, reset, a body that is not JSON              Ambiguous
"""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import orjson
from pydantic import BaseModel, ValidationError

from enrich import __version__
from enrich.api.complaints import named_params, named_rows, words
from enrich.api.credentials import Access
from enrich.api.outside_text import clean_json, clean_line, clean_text
from enrich.api.transport import Transport
from enrich.api.waterfall import User, Waterfall
from enrich.errors import (
    Ambiguous,
    BadParams,
    CallFailed,
    JobRejected,
    NotAccepted,
    NotUnderstood,
    OutOfCredits,
    RateLimited,
    TaskUnknown,
    Unauthorized,
)
from enrich.model import Clock

#: POSTs on the wire at once, at most: what a kill can leave in doubt.
POSTS_ON_THE_WIRE = 32
#: Each has many requests in it, and all of them are in doubt when its answer is lost.
BULK_POSTS_ON_THE_WIRE = 4
POLLS_ON_THE_WIRE = 32
#: A server may close a connection that was idle; a POST must not meet that moment.
POST_IDLE_S = 1.0
POLL_IDLE_S = 15.0
CONNECT_S, POST_S, GET_S = 10.0, 60.0, 30.0
MAX_REDIRECTS = 3
#: A longer Retry-After is not believed.
LONGEST_RETRY_AFTER_S = 3600.0


class Client:
    """The API over HTTP. Use as an async context manager; one event loop."""

    def __init__(self, access: Access, clock: Clock, *, post_s: float = POST_S, get_s: float = GET_S) -> None:
        """Talk to the API at `access`; `post_s` and `get_s` are how long an answer may take in seconds."""
        self._base = access.base_url
        self._key = access.key.get_secret_value()
        self._clock = clock
        self._told_date = ""
        # Made once, as far as can be: the making of requests costs as much as their sending.
        self._headers = httpx.Headers(
            {
                "host": httpx.URL(self._base).netloc.decode(),
                "x-apikey": self._key,
                "user-agent": f"databar-enrich/{__version__}",
                "accept-encoding": "gzip, deflate",  # what httpx can always read
            }
        )
        self._post_headers = httpx.Headers([*self._headers.raw, (b"content-type", b"application/json")])
        self._run_urls: dict[str, httpx.URL] = {}
        self._post_time, self._get_time = {"timeout": {"read": post_s}}, {"timeout": {"read": get_s}}
        # Reading the certificates takes longer than a whole run on loopback.
        secure = access.base_url.startswith("https:")
        tls = httpx.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._posts = Transport(POSTS_ON_THE_WIRE, POST_IDLE_S, CONNECT_S, tls)
        self._gets = Transport(POLLS_ON_THE_WIRE, POLL_IDLE_S, CONNECT_S, tls)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._posts.aclose()
        await self._gets.aclose()

    async def user(self) -> User:
        """Ask whose key it is and what the balance is. Raises Unauthorized, NotAccepted."""
        return _parse(User, (await self._get("/user/me"))[0])

    async def waterfalls(self) -> list[Waterfall]:
        """List the waterfalls. Raises Unauthorized, NotAccepted."""
        listed, _ = await self._get("/waterfalls/")
        if not isinstance(listed, list):
            raise NotUnderstood("the API's list of waterfalls is not a list")
        read = []
        for item in listed:
            with suppress(NotUnderstood):
                read.append(_parse(Waterfall, item))
        return read

    async def waterfall(self, identifier: str) -> Waterfall:
        """Describe one waterfall. Raises JobRejected when there is none of that name, Unauthorized, NotAccepted."""
        described, _ = await self._get(f"/waterfalls/{quote(identifier, safe='')}")
        return _parse(Waterfall, described)

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
        except httpx.ConnectError as error:
            raise NotAccepted(f"no connection to the API: {clean_line(str(error), self._key)}") from error
        except httpx.HTTPError as error:
            raise Ambiguous(f"no answer from the API: {clean_line(str(error), self._key)}") from error
        self._observe(response)
        if response.status_code == httpx.codes.OK:
            return _task_id(response)
        raise _refusal(response, rows)

    async def task(self, task_id: str) -> tuple[dict[str, Any], str]:
        """Ask how a task is; return it parsed, and as the API wrote it (JSON). One that expired (410) is `gone`.

        Raises TaskUnknown (404), Unauthorized, RateLimited, and NotAccepted for all that asking again may mend.
        """
        try:
            task, text = await self._get(f"/tasks/{quote(task_id, safe='')}")
        except _Gone:
            return {"status": "gone"}, '{"status":"gone"}'
        except _Missing as error:
            raise TaskUnknown(error.message) from error
        except JobRejected as error:
            raise NotAccepted(error.message) from error
        if not isinstance(task, dict) or "status" not in task:
            raise NotAccepted("the API's answer is not a task")
        return task, text

    async def _get(self, path: str) -> tuple[Any, str]:
        """GET; return the JSON, parsed and as text. Redirects are followed to the same host only: the key goes too."""
        url = httpx.URL(self._base + path)
        try:
            for _ in range(MAX_REDIRECTS):
                response = await self._gets.handle_async_request(
                    httpx.Request("GET", url, headers=self._headers, extensions=self._get_time)
                )
                self._observe(response)
                if not response.has_redirect_location:
                    break
                url = response.url.join(response.headers["location"])
                if _origin(str(url)) != _origin(self._base):
                    raise NotAccepted("the API redirects to another host")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotAccepted(f"no answer from the API: {clean_line(str(error), self._key)}") from error
        if response.status_code == httpx.codes.OK:
            try:
                return _parsed(response.content, self._key)
            except ValueError as error:
                raise NotAccepted("the API's answer is not JSON") from error
        if response.status_code == httpx.codes.GONE:
            raise _Gone("the result expired")
        refusal = _refusal(response)
        raise NotAccepted(refusal.message) if isinstance(refusal, Ambiguous | BadParams) else refusal

    def _observe(self, response: httpx.Response) -> None:
        """Hear the API's clock, once a second."""
        told = response.headers.get("date", "")
        if told == self._told_date:
            return
        self._told_date = told
        try:
            self._clock.observe(int(parsedate_to_datetime(told).timestamp() * 1000))
        except (ValueError, OverflowError):
            return


M = TypeVar("M", bound=BaseModel)


#: Perhaps a whole number of more than 64 bits: orjson would make a float of it.
_LONG_NUMBER = re.compile(rb"[1-9][0-9]{18}")


_SECONDS = re.compile(r"-?[0-9]+(\.[0-9]*)?")


class _Gone(CallFailed):
    """410."""


class _Missing(JobRejected):
    """404."""


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _parse(kind: type[M], data: object) -> M:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise NotUnderstood(f"the API's answer is not a {kind.__name__.lower()}") from error


def _parsed(body: bytes, key: str) -> tuple[object, str]:
    """Clean a body and parse it; return it as JSON, too. Raises ValueError."""
    body = clean_json(body, key)
    try:
        if not _LONG_NUMBER.search(body):
            return orjson.loads(body), body.decode()
    except ValueError:
        pass  # broken, or of the things that Python reads and JSON does not have
    try:
        text = json.dumps(json.loads(body), ensure_ascii=False).encode(errors="replace").decode()
        return json.loads(text), text
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _json(response: httpx.Response) -> object:
    try:
        return _parsed(response.content, response.request.headers["x-apikey"])[0]
    except ValueError:
        return None


def _task_id(response: httpx.Response) -> str:
    """Read the task id; `request_id` is its older name. One that must be cleaned is none: it could become another's."""
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        body = None
    if isinstance(body, Mapping):
        for name in ("task_id", "request_id"):
            value = body.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
                if clean_text(str(value), response.request.headers["x-apikey"]) != str(value):
                    raise Ambiguous("the API answered 200 with a task id that has control characters or the key")
                return str(value)
    raise Ambiguous("the API answered 200 without a task id")


def _refusal(response: httpx.Response, rows: int | None = None) -> CallFailed:
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
            return JobRejected(f"the API refuses so many rows at once: {said}", "lower `dispatch.bulk`")
        case 404:
            return _Missing(said)
        case _:
            return Ambiguous(said)


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

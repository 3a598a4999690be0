"""Makes all HTTP calls to the Databar API and raises typed errors. `replies` interprets the responses."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from enrich import __version__
from enrich.databar.answers import TaskReply
from enrich.databar.clock import Clock
from enrich.databar.credentials import ApiAccess
from enrich.databar.network import find_proxy, load_certificates
from enrich.databar.outside_text import clean_line, clean_text
from enrich.databar.replies import parse_body, read_task_reply, response_error, usable_task_id
from enrich.databar.transport import AnswerTooLarge, CertificateRefused, Transport
from enrich.databar.waterfall import User, Waterfall
from enrich.errors import (
    BadParams,
    CertificateUntrusted,
    InvalidPollResponse,
    RequestNotAccepted,
    SubmissionUnconfirmed,
    UnexpectedResponse,
)

#: Maximum number of concurrent POSTs, and so of the requests that a kill can leave unconfirmed.
MAX_POSTS_IN_FLIGHT = 32
#: Lower, because each bulk POST carries many requests. If its response is lost, all of them are unconfirmed.
MAX_BULK_POSTS_IN_FLIGHT = 4
MAX_POLLS_IN_FLIGHT = 32
CONNECT_TIMEOUT_S, POST_TIMEOUT_S, GET_TIMEOUT_S = 10.0, 60.0, 30.0
MAX_REDIRECTS = 3


class Client:
    """HTTP client of the Databar API. Use it as an async context manager, in one event loop."""

    def __init__(
        self,
        access: ApiAccess,
        clock: Clock,
        *,
        post_timeout_s: float = POST_TIMEOUT_S,
        get_timeout_s: float = GET_TIMEOUT_S,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Create a client for the API at `access`. Both timeouts cover a whole response, in seconds.

        Raises JobError if the proxy or the certificates configured in `environ` cannot be used.
        """
        self._base_url = access.base_url
        self._key = access.key.get_secret_value()
        self._clock = clock
        self._last_date = ""
        # Build headers and URLs once: creating a request costs as much time as sending it.
        self._headers = httpx.Headers(
            {
                "host": httpx.URL(self._base_url).netloc.decode(),
                "x-apikey": self._key,
                "user-agent": f"databar-enrich/{__version__}",
                "accept-encoding": "gzip, deflate",  # the encodings that httpx always supports
            }
        )
        self._post_headers = httpx.Headers([*self._headers.raw, (b"content-type", b"application/json")])
        self._run_urls: dict[str, httpx.URL] = {}
        self._post_timeout, self._get_timeout = (
            {"timeout": {"read": post_timeout_s}},
            {"timeout": {"read": get_timeout_s}},
        )
        # Load certificates only for https: loading takes longer than a whole run on loopback.
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if access.base_url.startswith("https:"):
            tls = load_certificates(environ) or httpx.create_ssl_context(trust_env=False)
        proxy = find_proxy(environ, access.base_url)
        # POST connections are never reused, so a POST cannot read leftover bytes of an earlier exchange.
        self._post_transport = Transport(MAX_POSTS_IN_FLIGHT, CONNECT_TIMEOUT_S, tls, reuse=False, proxy=proxy)
        self._get_transport = Transport(MAX_POLLS_IN_FLIGHT, CONNECT_TIMEOUT_S, tls, proxy=proxy)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._post_transport.aclose()
        await self._get_transport.aclose()

    async def get_user(self) -> User:
        """Fetch the workspace and the balance of the key. Raises Unauthorized, RequestNotAccepted."""
        return _parse(User, await self._get("/user/me"))

    async def list_waterfalls(self) -> list[Waterfall]:
        """List the waterfalls, without unreadable ones. Raises Unauthorized, RequestNotAccepted."""
        listed = await self._get("/waterfalls/")
        if not isinstance(listed, list):
            raise UnexpectedResponse("the API's list of waterfalls is not a list")
        read = []
        for item in listed:
            with suppress(UnexpectedResponse):
                read.append(_parse(Waterfall, item))
        return read

    async def get_waterfall(self, identifier: str) -> Waterfall:
        """Fetch one waterfall. Raises JobRejected if it does not exist, Unauthorized, RequestNotAccepted."""
        waterfall = _parse(Waterfall, await self._get(f"/waterfalls/{quote(identifier, safe='')}"))
        if waterfall.identifier.casefold() != identifier.casefold():
            raise RequestNotAccepted("the API described another waterfall")
        return waterfall

    async def submit(self, waterfall: str, body: bytes, rows: int | None = None) -> str:
        """Submit one paid request, or `rows` rows as one bulk task, with exactly one POST. Return the task id.

        Raises only the errors in the table at the top of `replies`.
        """
        path = f"/waterfalls/{quote(waterfall, safe='')}/{'run' if rows is None else 'bulk-run'}"
        if (url := self._run_urls.get(path)) is None:
            url = self._run_urls[path] = httpx.URL(self._base_url + path)
        try:
            response = await self._post_transport.handle_async_request(
                httpx.Request("POST", url, headers=self._post_headers, content=body, extensions=self._post_timeout)
            )
        except CertificateRefused as error:
            raise CertificateUntrusted(clean_line(str(error), self._key)) from error
        except httpx.ConnectError as error:
            raise RequestNotAccepted(f"no connection to the API: {clean_line(str(error), self._key)}") from error
        except httpx.HTTPError as error:
            raise SubmissionUnconfirmed(f"no answer from the API: {clean_line(str(error), self._key)}") from error
        self._observe_clock(response)
        if not response.is_success:
            raise response_error(response, rows)
        if task_id := usable_task_id(response):
            return task_id
        raise SubmissionUnconfirmed(f"the API answered {response.status_code} without a task id that can be asked for")

    async def poll_task(self, task_id: str, *, new_connection: bool = False) -> TaskReply:
        """Poll a task, over a new connection if `new_connection` is set. An expired task (410) has the status `gone`.

        Raises TaskUnknown (404), Unauthorized, RateLimited, InvalidPollResponse, and RequestNotAccepted for any other
        error that a retry may resolve.
        """
        response = await self._fetch(f"/tasks/{quote(task_id, safe='')}", new_connection=new_connection)
        try:
            return read_task_reply(response, task_id)
        except InvalidPollResponse:
            response.extensions["close"]()
            raise

    async def _get(self, path: str) -> Any:  # noqa: ANN401 - a JSON document can be any type
        """GET a JSON document over a new connection, which cannot carry the response to an earlier request."""
        response = await self._fetch(path, new_connection=True)
        if not response.is_success:
            error = response_error(response)
            raise RequestNotAccepted(error.message) if isinstance(error, SubmissionUnconfirmed | BadParams) else error
        try:
            return parse_body(response).value
        except ValueError as error:
            raise RequestNotAccepted("the API's answer is not JSON") from error

    async def _fetch(self, path: str, *, new_connection: bool) -> httpx.Response:
        """Send a GET. Follow redirects only to the same host, because they carry the API key."""
        url = httpx.URL(self._base_url + path)
        extensions = self._get_timeout | {"fresh": new_connection}
        try:
            for _ in range(MAX_REDIRECTS):
                response = await self._get_transport.handle_async_request(
                    httpx.Request("GET", url, headers=self._headers, extensions=extensions)
                )
                self._observe_clock(response)
                if not response.has_redirect_location:
                    break
                url = response.url.join(response.headers["location"])
                if _origin(str(url)) != _origin(self._base_url):
                    raise RequestNotAccepted("the API redirects to another host")
        except CertificateRefused as error:
            raise CertificateUntrusted(clean_line(str(error), self._key)) from error
        except AnswerTooLarge as error:
            start = clean_text(error.start.decode(errors="replace"), self._key)
            raise InvalidPollResponse(
                f"the API's answer cannot be read: {error}", start, new_connection=new_connection
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RequestNotAccepted(f"no answer from the API: {clean_line(str(error), self._key)}") from error
        return response

    def _observe_clock(self, response: httpx.Response) -> None:
        """Pass the response's `Date` to the clock when it changes (once a second at most).

        A response with an `Age` header comes from a cache, so its date is old and is ignored.
        """
        date = response.headers.get("date", "")
        if date == self._last_date or "age" in response.headers:
            return
        self._last_date = date
        try:
            self._clock.observe(int(parsedate_to_datetime(date).timestamp() * 1000))
        except (ValueError, TypeError, OverflowError):
            return


M = TypeVar("M", bound=BaseModel)


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _parse(kind: type[M], data: object) -> M:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UnexpectedResponse(f"the API's answer is not a {kind.__name__.lower()}") from error

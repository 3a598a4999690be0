"""The API's calls and their typed errors: the only HTTP. What an answer means is in `replies`."""

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
from enrich.models import Clock

#: POSTs on the wire at once, at most: what a kill can leave in doubt.
MAX_POSTS_IN_FLIGHT = 32
#: Each has many requests in it, and all of them are in doubt when its answer is lost.
MAX_BULK_POSTS_IN_FLIGHT = 4
MAX_POLLS_IN_FLIGHT = 32
CONNECT_TIMEOUT_S, POST_TIMEOUT_S, GET_TIMEOUT_S = 10.0, 60.0, 30.0
MAX_REDIRECTS = 3


class Client:
    """The API over HTTP. Use as an async context manager; one event loop."""

    def __init__(
        self,
        access: ApiAccess,
        clock: Clock,
        *,
        post_timeout_s: float = POST_TIMEOUT_S,
        get_timeout_s: float = GET_TIMEOUT_S,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Talk to the API at `access`; `post_s` and `get_s` are how long an answer may take in seconds.

        Raises JobError when the proxy or the certificates that `environ` names cannot be used.
        """
        self._base_url = access.base_url
        self._key = access.key.get_secret_value()
        self._clock = clock
        self._last_date = ""
        # Made once, as far as can be: the making of requests costs as much as their sending.
        self._headers = httpx.Headers(
            {
                "host": httpx.URL(self._base_url).netloc.decode(),
                "x-apikey": self._key,
                "user-agent": f"databar-enrich/{__version__}",
                "accept-encoding": "gzip, deflate",  # what httpx can always read
            }
        )
        self._post_headers = httpx.Headers([*self._headers.raw, (b"content-type", b"application/json")])
        self._run_urls: dict[str, httpx.URL] = {}
        self._post_timeout, self._get_timeout = (
            {"timeout": {"read": post_timeout_s}},
            {"timeout": {"read": get_timeout_s}},
        )
        # Reading the certificates takes longer than a whole run on loopback.
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if access.base_url.startswith("https:"):
            tls = load_certificates(environ) or httpx.create_ssl_context(trust_env=False)
        proxy = find_proxy(environ, access.base_url)
        # A POST never reads what an earlier exchange left on its connection.
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
        """Ask whose key it is and what the balance is. Raises Unauthorized, NotAccepted."""
        return _parse(User, await self._get("/user/me"))

    async def list_waterfalls(self) -> list[Waterfall]:
        """List the waterfalls. Raises Unauthorized, NotAccepted."""
        listed = await self._get("/waterfalls/")
        if not isinstance(listed, list):
            raise UnexpectedResponse("the API's list of waterfalls is not a list")
        read = []
        for item in listed:
            with suppress(UnexpectedResponse):
                read.append(_parse(Waterfall, item))
        return read

    async def get_waterfall(self, identifier: str) -> Waterfall:
        """Describe one waterfall. Raises JobRejected when there is none of that name, Unauthorized, NotAccepted."""
        waterfall = _parse(Waterfall, await self._get(f"/waterfalls/{quote(identifier, safe='')}"))
        if waterfall.identifier.casefold() != identifier.casefold():
            raise RequestNotAccepted("the API described another waterfall")
        return waterfall

    async def submit(self, waterfall: str, body: bytes, rows: int | None = None) -> str:
        """Submit one paid run, or in bulk so many rows as one task, by exactly one POST; return the task id.

        Raises as the table at the top of this file says, and nothing else.
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
        """Ask how a task is, with `fresh` over a new connection. One that expired (410) has the status `gone`.

        Raises TaskUnknown (404), Unauthorized, RateLimited, NotBelieved, and NotAccepted for all else that asking
        again may mend.
        """
        response = await self._fetch(f"/tasks/{quote(task_id, safe='')}", new_connection=new_connection)
        try:
            return read_task_reply(response, task_id)
        except InvalidPollResponse:
            response.extensions["close"]()
            raise

    async def _get(self, path: str) -> Any:  # noqa: ANN401 - a JSON document is anything
        """GET over a new connection: what is read there cannot be the answer to an earlier request. Return the JSON."""
        response = await self._fetch(path, new_connection=True)
        if not response.is_success:
            error = response_error(response)
            raise RequestNotAccepted(error.message) if isinstance(error, SubmissionUnconfirmed | BadParams) else error
        try:
            return parse_body(response).value
        except ValueError as error:
            raise RequestNotAccepted("the API's answer is not JSON") from error

    async def _fetch(self, path: str, *, new_connection: bool) -> httpx.Response:
        """GET. Redirects are followed to the same host only: the key goes with them."""
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
        """Read the API's clock, once a second; not from a cache, whose answers are as old as their `Age` says."""
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

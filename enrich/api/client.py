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
from enrich.api.answer import TaskReply
from enrich.api.credentials import Access
from enrich.api.network import find_certificates, find_proxy
from enrich.api.outside_text import clean_line, clean_text
from enrich.api.replies import parsed, refusal, task_reply, usable_id
from enrich.api.transport import AnswerTooLarge, CertificateRefused, Transport
from enrich.api.waterfall import User, Waterfall
from enrich.errors import (
    Ambiguous,
    BadParams,
    CertificateUntrusted,
    NotAccepted,
    NotBelieved,
    NotUnderstood,
)
from enrich.model import Clock

#: POSTs on the wire at once, at most: what a kill can leave in doubt.
POSTS_ON_THE_WIRE = 32
#: Each has many requests in it, and all of them are in doubt when its answer is lost.
BULK_POSTS_ON_THE_WIRE = 4
POLLS_ON_THE_WIRE = 32
CONNECT_S, POST_S, GET_S = 10.0, 60.0, 30.0
MAX_REDIRECTS = 3


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
            raise NotUnderstood("the API's list of waterfalls is not a list")
        read = []
        for item in listed:
            with suppress(NotUnderstood):
                read.append(_parse(Waterfall, item))
        return read

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
            raise CertificateUntrusted(clean_line(str(error), self._key)) from error
        except httpx.ConnectError as error:
            raise NotAccepted(f"no connection to the API: {clean_line(str(error), self._key)}") from error
        except httpx.HTTPError as error:
            raise Ambiguous(f"no answer from the API: {clean_line(str(error), self._key)}") from error
        self._observe(response)
        if not response.is_success:
            raise refusal(response, rows)
        if task_id := usable_id(response):
            return task_id
        raise Ambiguous(f"the API answered {response.status_code} without a task id that can be asked for")

    async def task(self, task_id: str, *, fresh: bool = False) -> TaskReply:
        """Ask how a task is, with `fresh` over a new connection. One that expired (410) has the status `gone`.

        Raises TaskUnknown (404), Unauthorized, RateLimited, NotBelieved, and NotAccepted for all else that asking
        again may mend.
        """
        response = await self._fetch(f"/tasks/{quote(task_id, safe='')}", fresh=fresh)
        try:
            return task_reply(response, task_id)
        except NotBelieved:
            response.extensions["close"]()
            raise

    async def _get(self, path: str) -> Any:  # noqa: ANN401 - a JSON document is anything
        """GET over a new connection: what is read there cannot be the answer to an earlier request. Return the JSON."""
        response = await self._fetch(path, fresh=True)
        if not response.is_success:
            error = refusal(response)
            raise NotAccepted(error.message) if isinstance(error, Ambiguous | BadParams) else error
        try:
            return parsed(response).value
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
            raise CertificateUntrusted(clean_line(str(error), self._key)) from error
        except AnswerTooLarge as error:
            start = clean_text(error.start.decode(errors="replace"), self._key)
            raise NotBelieved(f"the API's answer cannot be read: {error}", start, fresh=fresh) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotAccepted(f"no answer from the API: {clean_line(str(error), self._key)}") from error
        return response

    def _observe(self, response: httpx.Response) -> None:
        """Read the API's clock, once a second; not from a cache, whose answers are as old as their `Age` says."""
        told = response.headers.get("date", "")
        if told == self._told_date or "age" in response.headers:
            return
        self._told_date = told
        try:
            self._clock.observe(int(parsedate_to_datetime(told).timestamp() * 1000))
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
        raise NotUnderstood(f"the API's answer is not a {kind.__name__.lower()}") from error

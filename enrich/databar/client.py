"""Makes all HTTP calls to the Databar API and raises typed errors. `responses` interprets the responses."""

from __future__ import annotations

import os
import ssl
from collections.abc import Collection, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import certifi
from pydantic import BaseModel, ValidationError

from enrich import __version__
from enrich.databar.clock import CLOCK_SAMPLES, Clock
from enrich.databar.description import MODELS, Description, User
from enrich.databar.environment import ApiAccess, find_proxy, load_certificates
from enrich.databar.responses import parse_body, read_task_reply, response_error, usable_task_id
from enrich.databar.task_results import TaskReply
from enrich.databar.text_filter import clean_line, clean_text
from enrich.databar.transport import (
    AnswerTooLarge,
    CertificateRefused,
    ConnectionFailed,
    HttpAnswer,
    Origin,
    Transport,
    TransportError,
    serialize_headers,
)
from enrich.errors import (
    CertificateUntrusted,
    InvalidPollResponse,
    RequestNotAccepted,
    SubmissionUnconfirmed,
    TaskFinished,
    UnexpectedResponse,
)
from enrich.job.target import Target, TargetKind

#: Maximum number of concurrent POSTs, and so of the requests that a kill can leave unconfirmed.
MAX_POSTS_IN_FLIGHT = 32
#: Lower, because each bulk POST carries many requests. If its response is lost, all of them are unconfirmed.
MAX_BULK_POSTS_IN_FLIGHT = 4
MAX_POLLS_IN_FLIGHT = 32
CONNECT_TIMEOUT_S, POST_TIMEOUT_S, GET_TIMEOUT_S = 10.0, 60.0, 30.0
MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
#: The API searches enrichments for no shorter text.
MIN_QUERY_LENGTH = 3


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
        """Create a client for `access`. Both timeouts cover a whole response. Raises JobError (proxy, certificates)."""
        self._base_url = access.base_url
        self._key = access.key.get_secret_value()
        self._clock = clock
        self._last_date, self._dates_observed = "", 0
        # Build headers and URLs once: creating a request costs as much time as sending it.
        self._origin = Origin.of(self._base_url)
        self._header_lines = serialize_headers(
            {
                "host": self._origin.host_header,
                "x-apikey": self._key,
                "user-agent": f"databar-enrich/{__version__}",
                "accept-encoding": "gzip",
            }
        )
        self._base_path = _encoded_path(self._base_url).rstrip(b"/")
        self._post_timeout_s, self._get_timeout_s = post_timeout_s, get_timeout_s
        # Load certificates only for https: loading takes longer than a whole run on loopback.
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if access.base_url.startswith("https:"):
            tls = load_certificates(environ) or ssl.create_default_context(cafile=certifi.where())
        proxy = find_proxy(environ, access.base_url)
        # One for POSTs, one for GETs, so that polls take no place of a POST.
        self._post_transport = Transport(self._origin, MAX_POSTS_IN_FLIGHT, CONNECT_TIMEOUT_S, tls, proxy=proxy)
        self._get_transport = Transport(self._origin, MAX_POLLS_IN_FLIGHT, CONNECT_TIMEOUT_S, tls, proxy=proxy)

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

    async def list_descriptions(self, kind: TargetKind, query: str | None = None) -> list[Description]:
        """List the waterfalls or enrichments, without unreadable ones. Raises Unauthorized, RequestNotAccepted.

        `query` searches enrichments. A list of enrichments has no params and no fields.
        """
        search = f"?q={quote(query, safe='')}" if query and len(query) >= MIN_QUERY_LENGTH else ""
        listed = await self._get(f"/{kind}s/{search}")
        if not isinstance(listed, list):
            raise UnexpectedResponse(f"the API's list of {kind}s is not a list")
        read: list[Description] = []
        for item in listed:
            with suppress(UnexpectedResponse):
                read.append(_parse(MODELS[kind], item))
        return read

    async def get_description(self, target: Target) -> Description:
        """Fetch a description. Raises JobRejected for an unknown target, Unauthorized, RequestNotAccepted."""
        description: Description = _parse(MODELS[target.kind], await self._get(target.path))
        if description.identifier.casefold() != target.id.casefold():
            raise RequestNotAccepted(f"the API described another {target.kind}")
        return description

    async def submit(self, target: Target, body: bytes, params: Collection[str] = (), rows: int | None = None) -> str:
        """Submit one paid request, or `rows` rows as one bulk task, with exactly one POST. Return the task id.

        `params` are the names of all params of the job. Raises only the errors in the table at the top of `responses`.
        """
        path = f"{target.path}/{'run' if rows is None else 'bulk-run'}"
        answer = await self._post(path, body)
        if not answer.is_success:
            raise response_error(answer, self._key, params, rows)
        if task_id := usable_task_id(answer.content, self._key):
            return task_id
        raise SubmissionUnconfirmed(f"the API answered {answer.status} without a usable task id")

    async def cancel_task(self, task_id: str) -> TaskReply:
        """Cancel a running task, which refunds what is unfinished. It may be repeated: the second time it has finished.

        Raises TaskFinished (409), and the errors of `poll_task`.
        """
        path = f"/tasks/{quote(task_id, safe='')}/cancel"
        try:
            answer = await self._post(path, b"")
        except SubmissionUnconfirmed as error:
            raise RequestNotAccepted(error.message) from error
        if answer.status == HTTPStatus.CONFLICT:
            raise TaskFinished(response_error(answer, self._key).message)
        return read_task_reply(answer, task_id, self._key)

    async def _post(self, path: str, body: bytes) -> HttpAnswer:
        """Send one POST over a new connection, so that it cannot read leftover bytes of an earlier exchange."""
        request = b"POST %s%s HTTP/1.1\r\n%scontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
            self._base_path, path.encode(), self._header_lines, len(body), body
        )  # fmt: skip
        try:
            answer = await self._post_transport.exchange(request, self._post_timeout_s)
        except CertificateRefused as error:
            raise CertificateUntrusted(clean_line(str(error), self._key)) from error
        except ConnectionFailed as error:
            raise RequestNotAccepted(f"no connection to the API: {clean_line(str(error), self._key)}") from error
        except TransportError as error:
            raise SubmissionUnconfirmed(f"no response from the API: {clean_line(str(error), self._key)}") from error
        self._observe_clock(answer)
        return answer

    async def poll_task(self, task_id: str, *, new_connection: bool = False) -> TaskReply:
        """Poll a task, over a new connection if `new_connection` is set. An expired task (410) has the status `gone`.

        Raises TaskUnknown (404), Unauthorized, RateLimited, InvalidPollResponse, and RequestNotAccepted for any other
        error that a retry may resolve.
        """
        path = f"/tasks/{quote(task_id, safe='')}"
        answer = await self._fetch(path, new_connection=new_connection)
        try:
            return read_task_reply(answer, task_id, self._key)
        except InvalidPollResponse:
            answer.close()
            raise

    async def _get(self, path: str) -> Any:  # noqa: ANN401 - a JSON document can be any type
        """GET a JSON document over a new connection, which cannot carry the response to an earlier request."""
        answer = await self._fetch(path, new_connection=True)
        if not answer.is_success:
            error = response_error(answer, self._key)
            raise RequestNotAccepted(error.message) if isinstance(error, SubmissionUnconfirmed) else error
        try:
            return parse_body(answer.content, self._key)[0]
        except ValueError as error:
            raise RequestNotAccepted("the API's response is not JSON") from error

    async def _fetch(self, path: str, *, new_connection: bool) -> HttpAnswer:
        """Send a GET. Follow redirects only to the same host, because they carry the API key."""
        url = self._base_url + path
        target = self._base_path + path.encode()
        try:
            for _ in range(MAX_REDIRECTS):
                request = b"GET %s HTTP/1.1\r\n%s\r\n" % (target, self._header_lines)
                answer = await self._get_transport.exchange(request, self._get_timeout_s, reuse=not new_connection)
                self._observe_clock(answer)
                if answer.status not in _REDIRECTS or not (location := answer.header(b"location")):
                    break
                url = urljoin(url, location)
                target = _encoded_path(url)
                if Origin.of(url) != self._origin:
                    raise RequestNotAccepted("the API redirects to another host")
        except CertificateRefused as error:
            raise CertificateUntrusted(clean_line(str(error), self._key)) from error
        except AnswerTooLarge as error:
            start = clean_text(error.start.decode(errors="replace"), self._key)
            raise InvalidPollResponse(
                f"the API's response cannot be read: {error}", start, new_connection=new_connection
            ) from None
        except (TransportError, ValueError) as error:
            raise RequestNotAccepted(f"no response from the API: {clean_line(str(error), self._key)}") from error
        return answer

    def _observe_clock(self, answer: HttpAnswer) -> None:
        """Pass the `Date` of the first responses to the clock, then when it changes. Skip cached responses (`Age`)."""
        date = answer.header(b"date")
        is_repeated = date == self._last_date and self._dates_observed >= CLOCK_SAMPLES
        if is_repeated or any(name == b"age" for name, _ in answer.headers):
            return
        self._last_date = date
        self._dates_observed += 1
        try:
            self._clock.observe(int(parsedate_to_datetime(date).timestamp() * 1000))
        except (ValueError, TypeError, OverflowError):
            return


M = TypeVar("M", bound=BaseModel)


def _encoded_path(url: str) -> bytes:
    """Return path and query of a URL as they are sent. Raises ValueError."""
    parts = urlsplit(url)
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    return quote(target, safe="/?%:@!$&'()*+,;=~").encode()


def _parse(kind: type[M], data: object) -> M:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UnexpectedResponse(f"the API's response is not a {kind.__name__.lower()}") from error

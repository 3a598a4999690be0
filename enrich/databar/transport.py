"""The HTTP below httpx: aiohttp's connections, with exceptions that prove whether bytes may have left.

httpx's own transport scans its whole pool and looks for a missing module (sniffio) on every request.
The stock `httpx_aiohttp` transport asks a thread for the proxy each time, and turns a connection that
was reset after the request had left into `httpx.ConnectTimeout`, which reads as "never sent" and would
pay twice; so the phase decides here: `httpx.ConnectError` means that no connection was handed over,
anything later is `httpx.ReadError`.

An answer is read only from a connection that was quiet before its request: aiohttp alone would keep a
stray answer for the next request.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio import sslproto
from collections.abc import Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any

import aiohttp
import httpx
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import RawResponseMessage
from aiohttp.http_parser import HttpParser
from aiohttp.streams import StreamReader
from multidict import CIMultiDict
from yarl import URL

from enrich.databar.network import Proxy
from enrich.databar.unpacking import Decompressor

#: A process that was stopped (a laptop that slept) finds the time over and the answer there: the answer counts.
RESUME_GRACE_S = 0.2
#: A connection that was idle for longer is not used again.
MAX_IDLE_S = 15.0
#: The largest answer in bytes, on the wire and unpacked.
MAX_ANSWER_BYTES = 32 * 1024 * 1024
#: Of answers that grow beyond this one is read at a time, so that many of them need no more memory than one.
LARGE_BYTES = 512 * 1024
#: So much of an answer that is too large is kept.
KEPT_START_BYTES = 64 * 1024
#: aiohttp holds twice as much of an answer that is not read yet.
READ_BUFFER_BYTES = 64 * 1024


class AnswerTooLarge(httpx.ReadError):
    """The answer has more than the allowed bytes; `start` are the first of them, unpacked."""

    def __init__(self, start: bytes, max_bytes: int, request: httpx.Request) -> None:
        super().__init__(f"the answer is larger than {max_bytes // 1024} KiB", request=request)
        self.start = start


class CertificateRefused(httpx.ConnectError):
    """The certificate of the API, or of the proxy, is not trusted: nothing was sent."""


class _BodyTooLarge(Exception):
    """More bytes came than an answer may have."""


class _HttpProtocol(ResponseHandler):
    """One connection: closed as soon as bytes come that belong to no request, or too many."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_bytes: int) -> None:
        super().__init__(loop)
        self.request_count = 0
        self._max_bytes = self._bytes_left = max_bytes
        self._awaiting_answer = False
        self._body: StreamReader | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with a connection, perhaps to a proxy."""
        if isinstance(transport, sslproto._SSLProtocolTransport):  # noqa: SLF001 - the next line says why
            # Before Python 3.11.8 a handshake that fails inside of TLS fails in this method, and loses its reason.
            transport._force_close = lambda _: transport.abort()  # type: ignore[attr-defined]  # noqa: SLF001
        super().connection_made(transport)

    @property
    def is_too_large(self) -> bool:
        """Whether more came than an answer may have."""
        return self._bytes_left < 0

    def set_response_params(self, **params: Any) -> None:  # noqa: ANN401 - whatever aiohttp passes
        """Begin a request."""
        self.request_count += 1
        self._awaiting_answer, self._body, self._bytes_left = True, None, self._max_bytes
        super().set_response_params(**params)

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """Take the head of an answer; a second one belongs to no request."""
        if self._body is not None:
            self.disconnect()
            return
        message, body = data
        if message.code >= 200:  # noqa: PLR2004 - the others are interim: the answer follows
            self._body = body
        super().feed_data(data, size)

    def data_received(self, data: bytes) -> None:
        """Take bytes; no bytes: go on with those that were held back."""
        if not self._awaiting_answer:
            if data:
                self.disconnect()
            return
        self._bytes_left -= len(data)
        if self.is_too_large:
            error = _BodyTooLarge()
            self.set_exception(error)
            if self._body is not None:
                self._body.set_exception(error)
            self.disconnect()
            return
        super().data_received(data)
        if self._body is not None and self._body.is_eof():
            self._awaiting_answer = False
            # Whatever comes next is not parsed any more; what the parser has begun is another answer.
            parser, self._parser = self._parser, None
            if parser is not None and _has_more_data(parser):
                self.disconnect()

    def close(self) -> None:
        """Close at once: TLS would wait half a minute for the other side's farewell, for each POST."""
        self.abort()

    def disconnect(self) -> None:
        """Close the connection at once; a request that waits on it fails."""
        if self.transport is not None:
            self.transport.abort()


def _has_more_data(parser: HttpParser[Any]) -> bool:
    try:
        return parser.feed_eof() is not None
    except Exception:  # noqa: BLE001 - it is no answer either
        return True


#: The connections that the request at hand was given, and whether each was fresh: several when aiohttp repeats a GET.
_used_connections: ContextVar[list[tuple[_HttpProtocol, bool]]] = ContextVar("_given")


class _Connector(aiohttp.TCPConnector):
    """Gives connections that are quiet; aiohttp's tracing would say which, too, at a tenth of the whole cost."""

    def __init__(self, max_bytes: int, **settings: Any) -> None:  # noqa: ANN401 - aiohttp's own
        super().__init__(**settings)
        self._factory = partial(_HttpProtocol, self._loop, max_bytes)  # type: ignore[assignment] # it makes a subclass

    async def connect(self, *args: Any, **kwargs: Any) -> Connection:  # noqa: ANN401 - whatever aiohttp passes
        while True:
            connection = await super().connect(*args, **kwargs)
            protocol = connection.protocol
            assert isinstance(protocol, _HttpProtocol)  # noqa: S101 - it is made above
            try:
                # The first turn of the loop finds what has come, the second reads it.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            except BaseException:
                connection.close()
                raise
            if protocol.is_connected():
                _used_connections.get().append((protocol, not protocol.request_count))
                return connection
            connection.close()
            if not protocol.request_count:
                raise ConnectionError("the connection ended, or bytes came, before the request")


class Transport(httpx.AsyncBaseTransport):
    """An httpx transport for one event loop. It reads neither the environment nor `~/.netrc`.

    A request with `extensions["fresh"]` gets a connection of its own, beside the others. Of a response,
    `extensions["fresh"]` says whether its connection carried no other request, and `extensions["close"]`
    closes that connection. Its content is unpacked.
    """

    def __init__(  # noqa: PLR0913 - the last three by name
        self,
        max_connections: int,
        connect_timeout_s: float,
        tls: ssl.SSLContext,
        *,
        reuse: bool = True,
        proxy: Proxy | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        """Keep at most `connections`, made within `connect_s` seconds each; `reuse`: for several requests."""
        self._max_connections = max_connections
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._reuse = reuse
        self._max_bytes = max_bytes
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._large_body_lock = asyncio.Lock()
        self._proxy = proxy
        self._proxy_settings: dict[str, Any] = {}
        if proxy is not None:
            self._proxy_settings["proxy"] = URL(proxy.url)
            if proxy.authorization is not None:
                self._proxy_settings["proxy_headers"] = {"proxy-authorization": proxy.authorization.get_secret_value()}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request and read its whole answer, in the request's read time-out in all.

        Raises httpx.ConnectError when nothing can have left, httpx.ReadError when something may have.
        """
        used: list[tuple[_HttpProtocol, bool]] = []
        _used_connections.set(used)
        body = bytearray()
        timeout_s = request.extensions["timeout"]["read"]
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                # Not at once: what came while we were stopped is read before.
                timer = loop.call_later(timeout_s, lambda: limit.reschedule(loop.time() + RESUME_GRACE_S))
                try:
                    status, headers = await self._exchange(request, body)
                finally:
                    timer.cancel()
        except Exception as error:  # noqa: BLE001 - each becomes one that says what may have left
            failure = self._as_httpx_error(error, request, used, body)
        else:
            protocol, fresh = used[-1]
            extensions = {"fresh": fresh, "close": protocol.disconnect}
            return httpx.Response(status, headers=headers, content=bytes(body), request=request, extensions=extensions)
        body.clear()  # the traceback holds it
        # Not from the handler: aiohttp's exceptions hold the headers, and the proxy's password.
        raise failure

    async def aclose(self) -> None:
        """Close the connections."""
        for session in self._sessions.values():
            await session.close()

    async def _exchange(self, request: httpx.Request, body: bytearray) -> tuple[int, Sequence[tuple[bytes, bytes]]]:
        """Send a request, read its answer into `body`; return the status and the headers."""
        headers = CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw)
        session = self._get_session(reuse=self._reuse and not request.extensions.get("fresh"))
        async with (
            AsyncExitStack() as stack,
            session.request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=headers,
                data=request.content or None,
                allow_redirects=False,
                **self._proxy_settings,
            ) as response,
        ):
            unpacker = Decompressor(response.headers.getall("content-encoding", ()))
            is_large = False
            while data := await response.content.readany():
                for piece in unpacker.decompress(data):
                    body += piece
                    if len(body) > self._max_bytes:
                        raise _BodyTooLarge
                    if is_large:
                        await asyncio.sleep(0)  # let other requests run
                    elif len(body) > LARGE_BYTES:
                        await stack.enter_async_context(self._large_body_lock)
                        is_large = True
            unpacker.finish()
            return response.status, [pair for pair in response.raw_headers if pair[0].lower() != b"content-encoding"]

    def _get_session(self, *, reuse: bool) -> aiohttp.ClientSession:
        """Begin with the first request: a session belongs to its loop."""
        if (session := self._sessions.get(reuse)) is None:
            keep_alive = {"keepalive_timeout": MAX_IDLE_S} if reuse else {"force_close": True}
            session = self._sessions[reuse] = aiohttp.ClientSession(
                connector=_Connector(self._max_bytes, limit=self._max_connections, ssl=self._tls, **keep_alive),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=READ_BUFFER_BYTES,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
                trust_env=False,
            )
        return session

    def _as_httpx_error(
        self, error: Exception, request: httpx.Request, used: Sequence[tuple[_HttpProtocol, bool]], body: bytearray
    ) -> httpx.TransportError:
        """Say what went wrong, and whether something may have left."""
        if isinstance(error, _BodyTooLarge) or (used and used[-1][0].is_too_large):
            return AnswerTooLarge(bytes(body[:KEPT_START_BYTES]), self._max_bytes, request)
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            certificate_error = error.certificate_error
            reason_text = getattr(certificate_error, "verify_message", "") or str(certificate_error)
            return CertificateRefused(f"the certificate of {error.host} is refused: {reason_text}", request=request)
        if isinstance(error, aiohttp.ClientHttpProxyError):
            reason = f"HTTP {error.status}"
        elif isinstance(error, aiohttp.ClientError) and not isinstance(error, OSError):
            # Its words quote what came, which may be about anybody.
            reason = "the connection ended too early, or what came is not HTTP"
        elif type(error) is TimeoutError:  # aiohttp's own, of a kind below it, say what they are
            reason = f"no answer in {request.extensions['timeout']['read']:g} s"
        else:
            reason = str(error) or type(error).__name__
        if used:
            return httpx.ReadError(reason, request=request)
        if self._proxy is not None:
            reason = f"{reason} (through the proxy {self._proxy.url} of {self._proxy.variable})"
        return httpx.ConnectError(reason, request=request)

"""HTTP transport for httpx, built on aiohttp. Its exceptions show whether any bytes may have been sent.

httpx's own transport scans its whole pool and looks for a missing module (sniffio) on every request. The
`httpx_aiohttp` transport looks up the proxy in a thread on every request. It also reports a connection that was
reset after the request was sent as `httpx.ConnectTimeout`. That means "never sent", so a retry would be charged twice.

This transport decides by phase. `httpx.ConnectError` means that the request never got a connection. Any later
failure is `httpx.ReadError`.

A request uses a connection only if no unexpected bytes arrived on it before. aiohttp alone would return a stray
response to the next request.
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

#: Extra seconds after a timeout. A suspended process (a sleeping laptop) can then still read a response that arrived.
RESUME_GRACE_S = 0.2
#: A connection idle for longer than this is not reused.
MAX_IDLE_S = 15.0
#: Maximum size of a response, both compressed and decompressed.
MAX_ANSWER_BYTES = 32 * 1024 * 1024
#: Responses larger than this are read one at a time, so that many of them need no more memory than one.
LARGE_BYTES = 512 * 1024
#: Number of bytes kept of a response that is too large.
KEPT_START_BYTES = 64 * 1024
#: aiohttp buffers up to twice this size of an unread response.
READ_BUFFER_BYTES = 64 * 1024


class AnswerTooLarge(httpx.ReadError):
    """The response exceeds the size limit. `start` holds its first bytes, decompressed."""

    def __init__(self, start: bytes, max_bytes: int, request: httpx.Request) -> None:
        super().__init__(f"the answer is larger than {max_bytes // 1024} KiB", request=request)
        self.start = start


class CertificateRefused(httpx.ConnectError):
    """The certificate of the API or the proxy is not trusted. Nothing was sent."""


class _BodyTooLarge(Exception):
    """The response exceeds the size limit."""


class _HttpProtocol(ResponseHandler):
    """One connection. It closes as soon as it receives unexpected bytes or too many bytes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_bytes: int) -> None:
        super().__init__(loop)
        self.request_count = 0
        self._max_bytes = self._bytes_left = max_bytes
        self._awaiting_answer = False
        self._body: StreamReader | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Handle a new connection to the API or to a proxy."""
        if isinstance(transport, sslproto._SSLProtocolTransport):  # noqa: SLF001 - see the next comment
            # Before Python 3.11.8, `_force_close` fails after a failed handshake inside TLS, which hides the reason.
            transport._force_close = lambda _: transport.abort()  # type: ignore[attr-defined]  # noqa: SLF001
        super().connection_made(transport)

    @property
    def is_too_large(self) -> bool:
        """Whether the response exceeds the size limit."""
        return self._bytes_left < 0

    def set_response_params(self, **params: Any) -> None:  # noqa: ANN401 - passed through from aiohttp
        """Start a new request on this connection."""
        self.request_count += 1
        self._awaiting_answer, self._body, self._bytes_left = True, None, self._max_bytes
        super().set_response_params(**params)

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """Handle the head of a response. Close the connection on a second head, which belongs to no request."""
        if self._body is not None:
            self.disconnect()
            return
        message, body = data
        if message.code >= 200:  # noqa: PLR2004 - 1xx responses are interim; the final one follows
            self._body = body
        super().feed_data(data, size)

    def data_received(self, data: bytes) -> None:
        """Handle received bytes. Empty data means: continue parsing the bytes held back so far."""
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
            # The response is complete: parse nothing more. Any data left in the parser belongs to another response.
            parser, self._parser = self._parser, None
            if parser is not None and _has_more_data(parser):
                self.disconnect()

    def close(self) -> None:
        """Close at once. A TLS shutdown could wait 30 seconds for the peer, after every POST."""
        self.abort()

    def disconnect(self) -> None:
        """Close the connection at once. A request waiting on it fails."""
        if self.transport is not None:
            self.transport.abort()


def _has_more_data(parser: HttpParser[Any]) -> bool:
    try:
        return parser.feed_eof() is not None
    except Exception:  # noqa: BLE001 - leftover bytes that do not parse are unexpected, too
        return True


#: Connections used by the current request, each with whether it was new. Several if aiohttp repeats a GET.
_used_connections: ContextVar[list[tuple[_HttpProtocol, bool]]] = ContextVar("_given")


class _Connector(aiohttp.TCPConnector):
    """Hands out connections without unexpected bytes, and records which ones a request used.

    aiohttp's tracing could record them, too, but takes 10% of the total CPU time.
    """

    def __init__(self, max_bytes: int, **settings: Any) -> None:  # noqa: ANN401 - passed through to aiohttp
        super().__init__(**settings)
        self._factory = partial(_HttpProtocol, self._loop, max_bytes)  # type: ignore[assignment] # makes a subclass

    async def connect(self, *args: Any, **kwargs: Any) -> Connection:  # noqa: ANN401 - passed through to aiohttp
        while True:
            connection = await super().connect(*args, **kwargs)
            protocol = connection.protocol
            assert isinstance(protocol, _HttpProtocol)  # noqa: S101 - created by self._factory
            try:
                # Give the event loop two turns: the first detects received bytes, the second reads them.
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
    """An httpx transport for one event loop. It does not read the environment or `~/.netrc`.

    A request with `extensions["fresh"]` gets its own new connection. On a response, `extensions["fresh"]` is True if
    the connection carried no earlier request, and `extensions["close"]` is a function that closes the connection.
    The response content is decompressed.
    """

    def __init__(  # noqa: PLR0913 - the last three are keyword-only
        self,
        max_connections: int,
        connect_timeout_s: float,
        tls: ssl.SSLContext,
        *,
        reuse: bool = True,
        proxy: Proxy | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        """Set the limits. `reuse` allows several requests on one connection, one after the other."""
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
        """Send one request and read the whole response. The request's read timeout (seconds) covers all of it.

        Raises httpx.ConnectError if nothing was sent, httpx.ReadError if something may have been sent.
        """
        used: list[tuple[_HttpProtocol, bool]] = []
        _used_connections.set(used)
        body = bytearray()
        timeout_s = request.extensions["timeout"]["read"]
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                # Add a grace period: bytes that arrived while this process was suspended are read first.
                timer = loop.call_later(timeout_s, lambda: limit.reschedule(loop.time() + RESUME_GRACE_S))
                try:
                    status, headers = await self._exchange(request, body)
                finally:
                    timer.cancel()
        except Exception as error:  # noqa: BLE001 - converted to an error that shows whether bytes may have been sent
            failure = self._as_httpx_error(error, request, used, body)
        else:
            protocol, fresh = used[-1]
            extensions = {"fresh": fresh, "close": protocol.disconnect}
            return httpx.Response(status, headers=headers, content=bytes(body), request=request, extensions=extensions)
        body.clear()  # the traceback keeps a reference to it
        # Raise outside the except block, without a cause: aiohttp's exceptions hold the headers and the proxy password.
        raise failure

    async def aclose(self) -> None:
        """Close the connections."""
        for session in self._sessions.values():
            await session.close()

    async def _exchange(self, request: httpx.Request, body: bytearray) -> tuple[int, Sequence[tuple[bytes, bytes]]]:
        """Send a request and read the response into `body`. Return the status and the headers."""
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
        """Create the session on the first request, because a session is bound to its event loop."""
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
        """Convert an error to one that shows whether bytes may have been sent."""
        if isinstance(error, _BodyTooLarge) or (used and used[-1][0].is_too_large):
            return AnswerTooLarge(bytes(body[:KEPT_START_BYTES]), self._max_bytes, request)
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            certificate_error = error.certificate_error
            reason_text = getattr(certificate_error, "verify_message", "") or str(certificate_error)
            return CertificateRefused(f"the certificate of {error.host} is refused: {reason_text}", request=request)
        if isinstance(error, aiohttp.ClientHttpProxyError):
            reason = f"HTTP {error.status}"
        elif isinstance(error, aiohttp.ClientError) and not isinstance(error, OSError):
            # Drop aiohttp's message: it quotes the received bytes, which may hold personal data.
            reason = "the connection ended too early, or what came is not HTTP"
        elif type(error) is TimeoutError:  # not aiohttp's subclasses, which have their own message
            reason = f"no answer in {request.extensions['timeout']['read']:g} s"
        else:
            reason = str(error) or type(error).__name__
        if used:
            return httpx.ReadError(reason, request=request)
        if self._proxy is not None:
            reason = f"{reason} (through the proxy {self._proxy.url} of {self._proxy.variable})"
        return httpx.ConnectError(reason, request=request)

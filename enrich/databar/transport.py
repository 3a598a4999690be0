"""Sends requests over connections of its own. Its exceptions show whether any bytes may have been sent.

`ConnectionFailed` means that the request never got a connection, and that nothing was sent. Any later failure is
`AnswerLost`. A request uses a connection only if no unexpected bytes arrived on it before.

Measured on loopback, a POST over a new connection takes a quarter of the processor time that it takes with aiohttp,
whose connector and request objects cost more than the system calls. Aiohttp would also return a stray response to the
next request.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from math import inf
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohappyeyeballs
import idna
from msgspec import Struct

from enrich.databar.environment import Proxy
from enrich.databar.http_connection import AnswerExceedsLimit, Decompressor, HttpConnection

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
#: How long the addresses of a host are reused, in seconds.
ADDRESSES_TTL_S = 10.0
#: Seconds after which the next address of a host is tried, too (RFC 8305).
NEXT_ADDRESS_S = 0.25


class TransportError(Exception):
    """No complete response."""


class ConnectionFailed(TransportError):
    """There was no connection for the request. Nothing was sent."""


class AnswerLost(TransportError):
    """The request, or a part of it, may have been sent."""


class AnswerTooLarge(AnswerLost):
    """The response exceeds the size limit. `start` holds its first bytes, decompressed."""

    def __init__(self, start: bytes, max_bytes: int) -> None:
        super().__init__(f"the response is larger than {max_bytes // 1024} KiB")
        self.start = start


class CertificateRefused(ConnectionFailed):
    """The certificate of the API or the proxy is not trusted. Nothing was sent."""


class Origin(NamedTuple):
    """Where requests go."""

    host: str
    port: int
    is_tls: bool

    @classmethod
    def of(cls, url: str) -> Origin:
        """Return the origin of a URL. Raises ValueError."""
        parts = urlsplit(url)
        is_tls, host = parts.scheme == "https", parts.hostname or ""
        if not host.isascii():
            host = idna.encode(host).decode()
        return cls(host, parts.port or (443 if is_tls else 80), is_tls)

    @property
    def host_header(self) -> str:
        """The value of the Host header. The default port is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


class HttpAnswer(Struct, frozen=True):
    """A complete response. `content` is decompressed, names of `headers` are in lower case.

    `is_fresh`: the connection carried no earlier request. `close` closes the connection.
    """

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    content: bytes
    is_fresh: bool
    close: Callable[[], None]

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300  # noqa: PLR2004

    def header(self, name: bytes) -> str:
        """Return the first header of this name, or an empty text."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")


def serialize_headers(headers: Mapping[str, str]) -> bytes:
    """Return headers as they are sent. Raises ValueError if one has a line break, which would begin another."""
    if any(sign in name + value for name, value in headers.items() for sign in "\r\n"):
        raise ValueError("a header has a line break")
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()


class Transport:
    """Sends requests to one server in one event loop. It does not read the environment or `~/.netrc`."""

    def __init__(  # noqa: PLR0913 - the last two are keyword-only
        self,
        origin: Origin,
        max_connections: int,
        connect_timeout_s: float,
        tls: ssl.SSLContext,
        *,
        proxy: Proxy | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        self._origin = origin
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._proxy = proxy
        self._max_bytes = max_bytes
        self._large_body_lock = asyncio.Lock()
        #: The limits of concurrent requests: one for those that may reuse a connection, one for the others.
        self._request_limits = {reuse: asyncio.Semaphore(max_connections) for reuse in (True, False)}
        self._idle: list[HttpConnection] = []
        #: The addresses of the server, or of the proxy, and until when they are used.
        self._addresses: tuple[float, list[Any]] = (-inf, [])

    async def exchange(self, request: bytes, timeout_s: float, *, reuse: bool = False) -> HttpAnswer:
        """Send a request over a new connection and read the whole response within `timeout_s` seconds.

        With `reuse` it may follow other requests on a connection, and is sent again if that turns out to be closed.
        Raises ConnectionFailed if nothing was sent, AnswerLost if something may have been sent.
        """
        sent_on: list[HttpConnection] = []
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                # Add a grace period: bytes that arrived while this process was suspended are read first.
                timer = loop.call_later(timeout_s, lambda: limit.reschedule(loop.time() + RESUME_GRACE_S))
                try:
                    async with self._request_limits[reuse]:
                        return await self._send(request, sent_on, reuse=reuse)
                finally:
                    timer.cancel()
        except Exception as error:  # noqa: BLE001 - converted to an error that shows whether bytes may have been sent
            reason = f"no response in {timeout_s:g} s" if limit.expired() else str(error) or type(error).__name__
            failure = self._as_transport_error(error, reason, was_sent=bool(sent_on))
        raise failure  # without a cause, which could hold the proxy's password

    async def aclose(self) -> None:
        """Close the connections."""
        for connection in self._idle:
            connection.disconnect()
        self._idle.clear()
        await asyncio.sleep(0)  # the event loop closes the sockets

    async def _send(self, request: bytes, sent_on: list[HttpConnection], *, reuse: bool) -> HttpAnswer:
        """Send a request on a quiet connection, which is added to `sent_on`, and read the response."""
        while True:
            connection = await self._idle_connection() if reuse else None
            connection = connection or await self._new_connection()
            try:
                sent_on.append(connection)
                connection.send(request)
                content = await self._read(connection)
            except OSError:
                connection.disconnect()
                if connection.request_count > 1 and not connection.has_answer_bytes:
                    reuse = False
                    continue
                raise
            except BaseException:
                connection.disconnect()
                raise
            if reuse and connection.is_reusable:
                self._idle.append(connection)
            else:
                connection.disconnect()
            is_fresh = connection.request_count == 1
            return HttpAnswer(connection.status, connection.headers, content, is_fresh, connection.disconnect)

    async def _read(self, connection: HttpConnection) -> bytes:
        """Read the body of a response. Raises AnswerTooLarge."""
        body = bytearray()
        try:
            await self._read_into(body, connection)
        except AnswerExceedsLimit:
            start = bytes(body[:KEPT_START_BYTES])
            body.clear()  # the traceback keeps a reference to it
            raise AnswerTooLarge(start, self._max_bytes) from None
        return bytes(body)

    async def _read_into(self, body: bytearray, connection: HttpConnection) -> None:
        data, is_complete = await connection.receive()
        encodings = [value.decode("latin-1") for name, value in connection.headers if name == b"content-encoding"]
        unpacker = Decompressor(encodings)
        is_large = False
        async with AsyncExitStack() as stack:
            while True:
                for piece in unpacker.decompress(data):
                    body += piece
                    if len(body) > self._max_bytes:
                        raise AnswerExceedsLimit
                    if is_large:
                        await asyncio.sleep(0)  # let other requests run
                    elif len(body) > LARGE_BYTES:
                        await stack.enter_async_context(self._large_body_lock)
                        is_large = True
                if is_complete:
                    break
                data, is_complete = await connection.receive()
        unpacker.finish()

    async def _idle_connection(self) -> HttpConnection | None:
        """Return an idle connection that is quiet, the last used one first."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if now - connection.idle_since > MAX_IDLE_S:
                connection.disconnect()
            elif await _is_quiet(connection):
                return connection
        return None

    async def _new_connection(self) -> HttpConnection:
        """Connect, through the proxy if there is one."""
        try:
            async with asyncio.timeout(self._connect_timeout_s) as limit:
                if self._proxy is None:
                    connection = await self._connect(self._origin)
                else:
                    connection = await self._connect_by_proxy(self._proxy)
        except TimeoutError:
            if not limit.expired():
                raise
            raise ConnectionError(f"Connection timeout: no connection in {self._connect_timeout_s:g} s") from None
        if not await _is_quiet(connection):
            raise ConnectionError("the connection ended, or bytes came, before the request")
        return connection

    async def _connect(self, origin: Origin) -> HttpConnection:
        loop = asyncio.get_running_loop()
        factory = partial(HttpConnection, self._max_bytes)
        tls: dict[str, Any] = {"ssl": self._tls, "server_hostname": _tls_name(origin)} if origin.is_tls else {}
        addresses = await self._find_addresses(origin)
        try:
            if len(addresses) == 1:
                host, port, *_ = addresses[0][4]
                return (await loop.create_connection(factory, host, port, **tls))[1]
            found = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_S)
            return (await loop.create_connection(factory, sock=found, **tls))[1]
        except ssl.SSLCertVerificationError as error:
            raise _bad_certificate(origin, error) from error

    async def _connect_by_proxy(self, proxy: Proxy) -> HttpConnection:
        """Open a tunnel through the proxy."""
        origin, parts = self._origin, urlsplit(proxy.url)
        proxy_origin = Origin(parts.hostname or "", parts.port or 0, parts.scheme == "https")
        connection = await self._connect(proxy_origin)
        try:
            host = f"[{origin.host}]" if ":" in origin.host else origin.host
            request = f"CONNECT {host}:{origin.port} HTTP/1.1\r\nhost: {host}:{origin.port}\r\n"
            if proxy.authorization is not None:
                request += f"proxy-authorization: {proxy.authorization.get_secret_value()}\r\n"
            status = await connection.open_tunnel(f"{request}\r\n".encode())
            if not 200 <= status < 300:  # noqa: PLR2004
                raise ConnectionError(f"HTTP {status}")
            if origin.is_tls:
                await connection.start_tls(self._tls, _tls_name(origin))
        except ssl.SSLCertVerificationError as error:
            connection.disconnect()
            raise _bad_certificate(origin, error) from error
        except BaseException:
            connection.disconnect()
            raise
        return connection

    async def _find_addresses(self, origin: Origin) -> list[Any]:
        """Return the addresses of a host, as of `getaddrinfo`."""
        loop = asyncio.get_running_loop()
        known_until, addresses = self._addresses
        if loop.time() >= known_until:
            addresses = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
            self._addresses = loop.time() + ADDRESSES_TTL_S, addresses
        return addresses

    def _as_transport_error(self, error: Exception, reason: str, *, was_sent: bool) -> TransportError:
        """Convert an error to one that shows whether bytes may have been sent."""
        if isinstance(error, AnswerTooLarge):
            return error
        if isinstance(error, CertificateRefused):
            return CertificateRefused(reason)
        if was_sent:
            return AnswerLost(reason)
        if self._proxy is not None:
            reason = f"{reason} (through the proxy {self._proxy.url} of {self._proxy.variable})"
        return ConnectionFailed(reason)


async def _is_quiet(connection: HttpConnection) -> bool:
    """Return whether a connection is open and no bytes wait on it."""
    try:
        # Give the event loop two turns: the first detects received bytes, the second reads them.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    except BaseException:
        connection.disconnect()
        raise
    return connection.is_open


def _tls_name(origin: Origin) -> str:
    return origin.host.removesuffix(".")


def _bad_certificate(origin: Origin, error: ssl.SSLCertVerificationError) -> CertificateRefused:
    reason = getattr(error, "verify_message", "") or str(error)
    return CertificateRefused(f"the certificate of {origin.host} is refused: {reason}")

"""One HTTP/1.1 connection that carries one request at a time, and proves which bytes answer it.

Bytes that arrive while no answer is awaited, or behind an answer, belong to no request: the connection closes. The
parser is llhttp (httptools), in its strict mode: what is ambiguous, such as two lengths, is an error.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import zlib
from asyncio import sslproto
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import cast

import httptools

#: Reading pauses when more than this of an answer waits to be processed.
READ_BUFFER_BYTES = 64 * 1024
#: Maximum size of the status line and the headers, and of any interim answers before them.
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADER_BYTES = 8 * 1024


class AnswerBroken(ConnectionError):
    """The connection ended before the answer did, or the bytes received are not HTTP. Does not quote them."""

    def __init__(self) -> None:
        super().__init__("the connection ended too early, or the response is not HTTP")


class AnswerExceedsLimit(Exception):
    """The answer is larger than allowed."""

    def __init__(self) -> None:
        super().__init__("the response is too large")


class HttpConnection(asyncio.Protocol):
    """A connection to the API or to a proxy. It is closed at the first irregularity, never with a TLS shutdown."""

    def __init__(self, max_bytes: int) -> None:
        """Accept answers of up to `max_bytes` on the wire."""
        self._loop = asyncio.get_running_loop()
        self._max_bytes = self._bytes_left = max_bytes
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        #: Number of requests sent, without CONNECT.
        self.request_count = 0
        #: Time on the loop's clock when the last answer was complete.
        self.idle_since = 0.0
        #: Whether another request may follow on this connection.
        self.is_reusable = False
        self._start_answer(is_tunnel=False)
        self._parser: httptools.HttpResponseParser | None = None

    def _start_answer(self, *, is_tunnel: bool) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._parser = httptools.HttpResponseParser(self)
        self._bytes_left = self._max_bytes
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._is_tunnel = is_tunnel
        self._has_head = self._is_complete = self._has_stray_bytes = False
        self._ends_with_connection = False
        self._error: Exception | None = None

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def has_answer_bytes(self) -> bool:
        """Whether any byte arrived since the last request."""
        return self._bytes_left < self._max_bytes

    def send(self, request: bytes) -> None:
        """Send a request. From now on, its bytes may have left."""
        assert self._transport is not None  # noqa: S101 - the caller has checked `is_open`
        self.request_count += 1
        self.is_reusable = False
        self._start_answer(is_tunnel=False)
        self._transport.write(request)

    async def receive(self) -> tuple[bytes, bool]:
        """Wait for the answer, or a part of it. Returns bytes of the body, and whether it is complete."""
        while not (self._is_complete or self._buffered > READ_BUFFER_BYTES or self._error):
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None and not self._pieces:
            raise self._error
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self._buffered = [], 0
        if self._error is None and not self._is_complete and self._transport is not None:
            self._transport.resume_reading()
        return data, self._is_complete

    async def open_tunnel(self, request: bytes) -> int:
        """Send a CONNECT request to a proxy and return the status of its answer."""
        assert self._transport is not None  # noqa: S101 - just connected
        self._start_answer(is_tunnel=True)
        self._transport.write(request)
        await self.receive()
        return self.status

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Start TLS through the tunnel."""
        assert self._transport is not None  # noqa: S101 - the tunnel is open
        transport = await self._loop.start_tls(self._transport, self, context, server_hostname=host)
        if transport is None:
            raise AnswerBroken
        self._transport = transport

    def disconnect(self) -> None:
        """Close the connection at once. A request waiting on it fails. A TLS shutdown could take 30 seconds."""
        if self._transport is not None:
            with suppress(AttributeError):  # Python 3.11.2: a TLS transport that was closed twice
                self._transport.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._is_complete, self._parser = False, None
        self.disconnect()
        self._wake()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Handle a new connection."""
        if sys.version_info < (3, 11, 8) and isinstance(transport, sslproto._SSLProtocolTransport):  # noqa: SLF001
            # There `_force_close` fails after a failed handshake inside TLS, which hides the reason.
            transport._force_close = lambda _: transport.abort()  # type: ignore[attr-defined]  # noqa: SLF001
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of the connection. It completes an answer without a length."""
        self._transport = None
        if self._parser is None:
            return
        if exc is None and self._ends_with_connection:
            self._is_complete, self._parser = True, None
            self._wake()
        else:
            self._fail(exc or AnswerBroken())

    def data_received(self, data: bytes) -> None:
        """Handle received bytes."""
        parser = self._parser
        if parser is None:
            self.disconnect()
            return
        self._bytes_left -= len(data)
        is_broken = False
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            is_broken = True
        received = self._max_bytes - self._bytes_left
        if self._bytes_left < 0:
            self._fail(AnswerExceedsLimit())
        elif self._is_complete:
            self._parser = None
            self.idle_since = self._loop.time()
            if is_broken or self._has_stray_bytes:
                self.disconnect()
            self._wake()
        elif is_broken or (not self._has_head and received > MAX_HEAD_BYTES):
            self._fail(AnswerBroken())
        elif self._buffered > READ_BUFFER_BYTES and self._transport is not None:
            self._transport.pause_reading()
            self._wake()

    # Called by the parser.

    def on_message_begin(self) -> None:
        """Begin an answer. A second one belongs to no request."""
        self._has_stray_bytes = self._is_complete

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header of the answer. Raises AnswerBroken, which ends the parsing."""
        if len(name) + len(value) > MAX_HEADER_BYTES:
            raise AnswerBroken
        if not self._is_complete:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Keep the status. An interim answer (1xx) is followed by another head."""
        if self._is_complete:
            return
        assert self._parser is not None  # noqa: S101 - it has called this
        self.status = self._parser.get_status_code()
        if self.status < 200:  # noqa: PLR2004
            self.headers = []
            return
        self._has_head = True
        self._is_complete = self._is_tunnel
        self._ends_with_connection = not any(
            name in {b"content-length", b"transfer-encoding"} for name, _ in self.headers
        )

    def on_body(self, data: bytes) -> None:
        """Keep a piece of the body."""
        if self._is_complete:
            self._has_stray_bytes = True
        else:
            self._pieces.append(data)
            self._buffered += len(data)

    def on_message_complete(self) -> None:
        """Complete the answer."""
        if self._has_head and not self._is_complete:
            assert self._parser is not None  # noqa: S101 - it has called this
            self._is_complete, self.is_reusable = True, self._parser.should_keep_alive()


CHUNK_BYTES = 64 * 1024
#: Maximum number of gzip members in a body. Each takes time, even an empty one.
MAX_MEMBERS = 1000
#: zlib's `wbits` value for gzip.
_GZIP = 31


class DecompressionError(Exception):
    """The body is damaged or has an unsupported encoding."""


class Decompressor:
    """Decompresses one body, given its content-encoding headers. Raises DecompressionError."""

    def __init__(self, encodings: Iterable[str]) -> None:
        named = [name.strip().lower() for line in encodings for name in line.split(",")]
        codings = [name for name in named if name not in {"", "identity"}]
        if codings not in ([], ["gzip"], ["x-gzip"]):
            raise DecompressionError("the response has an encoding that was not requested")
        self._is_gzip = bool(codings)
        self._member: zlib._Decompress | None = None
        self._members = 0

    def decompress(self, data: bytes) -> Iterator[bytes]:
        """Yield the decompressed data in chunks of at most 64 KiB. Uncompressed data stays one chunk."""
        if not self._is_gzip:
            yield data
            return
        has_more = False
        while data or has_more:
            if self._member is None:
                self._members += 1
                if self._members > MAX_MEMBERS:
                    raise DecompressionError("the compressed response has extra data")
                self._member = zlib.decompressobj(_GZIP)
            try:
                chunk = self._member.decompress(data, CHUNK_BYTES)
            except zlib.error:
                raise DecompressionError("the compressed response is damaged") from None
            yield chunk
            if self._member.eof:
                data, has_more, self._member = self._member.unused_data, False, None
            else:
                data, has_more = self._member.unconsumed_tail, len(chunk) == CHUNK_BYTES

    def finish(self) -> None:
        """Raise DecompressionError if the body is incomplete."""
        if self._member is not None:
            raise DecompressionError("the compressed response is truncated")

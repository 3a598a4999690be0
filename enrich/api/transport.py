"""The wire below httpx: aiohttp's connections, with exceptions that prove whether bytes may have left.

httpx's own transport scans its whole pool and looks for a missing module (sniffio) on every request.
The stock `httpx_aiohttp` transport asks a thread for the proxy each time, and turns a connection that
was reset after the request had left into `httpx.ConnectTimeout`, which reads as "never sent" and would
pay twice; so the phase decides here: `httpx.ConnectError` means that no connection was handed over,
anything later is `httpx.ReadError`.
"""

from __future__ import annotations

import asyncio
import ssl
from contextvars import ContextVar
from typing import Any
from urllib.request import getproxies

import aiohttp
import httpx
from aiohttp.connector import Connection
from multidict import CIMultiDict
from yarl import URL

#: A process that was stopped (a laptop that slept) finds the time over and the answer there: the answer counts.
STOPPED_S = 0.2

#: Whether the request at hand was given a connection.
_connected: ContextVar[list[bool]] = ContextVar("_connected")


class _Connector(aiohttp.TCPConnector):
    """Tells when a connection is handed over; aiohttp's tracing would, too, at a tenth of the whole cost."""

    async def connect(self, *args: Any, **kwargs: Any) -> Connection:  # noqa: ANN401 - whatever aiohttp passes
        connection = await super().connect(*args, **kwargs)
        _connected.get().append(True)
        return connection


class Transport(httpx.AsyncBaseTransport):
    """An httpx transport for one event loop; environment proxies (`HTTPS_PROXY`, `NO_PROXY`) are honoured."""

    def __init__(self, connections: int, idle_s: float, connect_s: float, tls: ssl.SSLContext) -> None:
        """Keep at most `connections`, none idle for more than `idle_s`; one must stand within `connect_s` seconds."""
        self._connections = connections
        self._idle_s = idle_s
        self._connect_s = connect_s
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request and read its whole answer, in the request's read time-out in all.

        Raises httpx.ConnectError when nothing can have left, httpx.ReadError when something may have.
        """
        session = self._session or self._open()
        headers = CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw)
        seconds = request.extensions["timeout"]["read"]
        connected: list[bool] = []
        _connected.set(connected)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                # Not at once: what came while we were stopped is read before.
                over = loop.call_later(seconds, lambda: limit.reschedule(loop.time() + STOPPED_S))
                try:
                    async with session.request(
                        request.method,
                        URL(str(request.url), encoded=True),
                        headers=headers,
                        data=request.content or None,
                        allow_redirects=False,
                    ) as response:
                        body = await response.read()
                finally:
                    over.cancel()
            return httpx.Response(response.status, headers=response.raw_headers, content=body, request=request)
        except Exception as error:
            if connected and isinstance(error, aiohttp.ClientError) and not isinstance(error, OSError):
                # Its words quote what came, which may be about anybody.
                raise httpx.ReadError(
                    "the connection ended too early, or what came is not HTTP", request=request
                ) from None
            # aiohttp's own time-outs, of a kind below it, say what they are.
            reason = f"no answer in {seconds:g} s" if type(error) is TimeoutError else str(error)
            kind = httpx.ReadError if connected else httpx.ConnectError
            raise kind(reason or type(error).__name__, request=request) from error

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        """Begin with the first request: a session belongs to its loop."""
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=self._connections, keepalive_timeout=self._idle_s, ssl=self._tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
            # Where there is none, a thread would look for one with every request.
            trust_env=bool(getproxies()),
        )
        return self._session

"""The wire below httpx: aiohttp's connections, with exceptions that prove whether bytes may have left.

httpx's own transport costs several times the processor time. The stock `httpx_aiohttp` transport
turns a connection that was reset after the request had left into `httpx.ConnectTimeout`, which reads
as "never sent" and would pay twice; so the phase decides here: `httpx.ConnectError` means that no
connection was handed over, anything later is `httpx.ReadError`.
"""

from __future__ import annotations

import asyncio
import ssl
from contextvars import ContextVar

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

_connected: ContextVar[list[bool]] = ContextVar("_connected")


async def _on_connection(*_: object) -> None:
    _connected.get([]).append(True)


class Transport(AiohttpTransport):
    """An httpx transport; environment proxies (`HTTPS_PROXY`, `NO_PROXY`) and `SSL_CERT_FILE` are honoured."""

    def __init__(self, connections: int, idle_s: float, tls: ssl.SSLContext) -> None:
        """Keep at most `connections`, and none that was idle for more than `idle_s` seconds."""
        self._connections = connections
        self._idle_s = idle_s
        super().__init__(verify=tls, client=self._session)

    def _session(self) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(_on_connection)
        trace.on_connection_reuseconn.append(_on_connection)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._connections, keepalive_timeout=self._idle_s, ssl=self.ssl_context
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
            trust_env=True,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request and read its whole answer.

        Raises httpx.ConnectError when nothing can have left, httpx.ReadError when something may have.
        """
        connected: list[bool] = []
        token = _connected.set(connected)
        try:
            response = await super().handle_async_request(request)
            try:
                await response.aread()
            finally:
                # An answer that was not read to its end would keep its connection, and there are few.
                await response.aclose()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            reason = str(error) or type(error).__name__
            if connected:
                raise httpx.ReadError(reason, request=request) from error
            raise httpx.ConnectError(reason, request=request) from error
        finally:
            _connected.reset(token)
        return response

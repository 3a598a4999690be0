"""The wire below httpx: aiohttp's connections, with exceptions that prove whether bytes may have left.

httpx's own transport scans its whole pool and looks for a missing module (sniffio) on every request.
The stock `httpx_aiohttp` transport turns a connection that was reset after the request had left into
`httpx.ConnectTimeout`, which reads as "never sent" and would pay twice; so the phase decides here:
`httpx.ConnectError` means that no connection was handed over, anything later is `httpx.ReadError`.
"""

from __future__ import annotations

import asyncio
import ssl
from contextvars import ContextVar

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

#: A process that was stopped (a laptop that slept) finds the time over and the answer there: the answer counts.
STOPPED_S = 0.2

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
        """Send one request and read its whole answer, in the request's read time-out in all.

        Raises httpx.ConnectError when nothing can have left, httpx.ReadError when something may have.
        """
        connected: list[bool] = []
        token = _connected.set(connected)
        timeout = request.extensions["timeout"]
        # The time is kept here: aiohttp would give up an answer that is there already, see STOPPED_S.
        request.extensions = {**request.extensions, "timeout": {"connect": timeout.get("connect")}}
        exchange = asyncio.create_task(self._exchange(request))
        _connected.reset(token)
        try:
            for patience in (timeout.get("read"), STOPPED_S):
                done, _ = await asyncio.wait([exchange], timeout=patience)
                if done:
                    return exchange.result()
            raise TimeoutError(f"no answer in {timeout.get('read'):g} s")
        except Exception as error:
            reason = str(error) or type(error).__name__
            if connected:
                raise httpx.ReadError(reason, request=request) from error
            raise httpx.ConnectError(reason, request=request) from error
        finally:
            if not exchange.done():
                exchange.cancel()
                await asyncio.wait([exchange])

    async def _exchange(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        try:
            await response.aread()
        finally:
            # An answer that was not read to its end would keep its connection, and there are few.
            await response.aclose()
        return response

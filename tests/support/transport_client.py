"""Requests over a transport of their own, without the client above it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from enrich.databar.transport import HttpAnswer, Origin, Transport

T = TypeVar("T")


@dataclass(frozen=True)
class Sender:
    """Sends requests to one server."""

    transport: Transport
    base_url: str

    async def __call__(
        self, path: str, method: str = "GET", *, fresh: bool = False, seconds: float = 5.0
    ) -> HttpAnswer:
        """Send a request and read its answer."""
        origin, base_path = Origin.of(self.base_url), urlsplit(self.base_url).path
        head = f"{method} {base_path}{path} HTTP/1.1\r\nhost: {origin.host_header}\r\n"
        head += "content-length: 0\r\n" if method == "POST" else ""
        request = f"{head}\r\n".encode()
        return await self.transport.exchange(request, seconds, reuse=method == "GET" and not fresh)


def with_transport(
    base_url: str,
    use: Callable[[Sender], Awaitable[T]],
    *,
    run: Callable[[Coroutine[Any, Any, T]], T] = asyncio.run,
    **settings: Any,
) -> T:
    """Open a transport and use it, in the event loop of `run`; `settings` are its own."""

    async def use_and_close() -> T:
        transport = Transport(Origin.of(base_url), 32, 5.0, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), **settings)
        try:
            return await use(Sender(transport, base_url))
        finally:
            await transport.aclose()

    return run(use_and_close())


def send_get(base_url: str, path: str = "/a", seconds: float = 5.0, **settings: Any) -> HttpAnswer:
    """Send one GET."""
    response: HttpAnswer = with_transport(base_url, lambda send: send(path, seconds=seconds), **settings)
    return response

"""Requests over a transport of their own, without the client above it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from enrich.databar.transport import Transport

T = TypeVar("T")


@dataclass(frozen=True)
class Sender:
    """Sends requests to one server."""

    transport: Transport
    base_url: str

    async def __call__(
        self, path: str, method: str = "GET", *, fresh: bool = False, seconds: float = 5.0
    ) -> httpx.Response:
        """Send a request and read its answer."""
        extensions = {"timeout": {"read": seconds}} | ({"fresh": True} if fresh else {})
        request = httpx.Request(method, self.base_url + path, extensions=extensions)
        return await self.transport.handle_async_request(request)


def with_transport(base_url: str, use: Callable[[Sender], Awaitable[T]], **settings: Any) -> T:
    """Open a transport and use it; `settings` are its own."""

    async def use_and_close() -> T:
        transport = Transport(32, 5.0, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), **settings)
        try:
            return await use(Sender(transport, base_url))
        finally:
            await transport.aclose()

    return asyncio.run(use_and_close())


def send_get(base_url: str, path: str = "/a", seconds: float = 5.0, **settings: Any) -> httpx.Response:
    """Send one GET."""
    return with_transport(base_url, lambda send: send(path, seconds=seconds), **settings)

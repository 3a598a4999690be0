"""A simple hand-written loop: POST, then GET the answer, in concurrent tasks. No ledger, no output.

`python -m benchmarks.loops httpx --tasks 10 --rows 2000 --base-url http://127.0.0.1:8000/v1`

The same loop over plain httpx, over httpx with the transport of `enrich`, and over aiohttp alone; for a server without
latency. It prints one JSON object: the number of answered rows, and the seconds this took after the imports.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import uvloop

from benchmarks.leads import ENRICHMENTS, lead_params
from benchmarks.server import API_KEY, WATERFALL

HEADERS = {"x-apikey": API_KEY}
#: Sends a method, a URL and a body; returns the response's JSON.
SendRequest = Callable[[str, str, Any], Awaitable[Any]]


class EnrichTransport(httpx.AsyncBaseTransport):
    """The transport of `enrich`, as a transport of httpx."""

    def __init__(self, connections: int, base_url: str) -> None:
        from enrich.databar.transport import Origin, Transport  # noqa: PLC0415 - keeps it out of the other loops' memory

        self._transport = Transport(Origin.of(base_url), connections, 10.0, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request."""
        head = b"%s %s HTTP/1.1\r\n" % (request.method.encode(), request.url.raw_path)
        head += b"".join(b"%s: %s\r\n" % pair for pair in request.headers.raw)
        answer = await self._transport.exchange(b"%s\r\n%s" % (head, request.content), 30.0, reuse=True)
        headers = [pair for pair in answer.headers if pair[0] != b"content-encoding"]
        return httpx.Response(answer.status, headers=headers, content=answer.content, request=request)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()


@asynccontextmanager
async def open_httpx(transport: httpx.AsyncBaseTransport | None) -> AsyncIterator[SendRequest]:
    """Send requests with httpx; None: with its own transport."""
    async with httpx.AsyncClient(headers=HEADERS, transport=transport, timeout=30) as client:

        async def send(method: str, url: str, body: Any) -> Any:
            response = await client.request(method, url, json=body)
            response.raise_for_status()
            return response.json()

        yield send


@asynccontextmanager
async def open_aiohttp() -> AsyncIterator[SendRequest]:
    """Send requests with aiohttp alone."""
    async with aiohttp.ClientSession(headers=HEADERS) as session:

        async def send(method: str, url: str, body: Any) -> Any:
            async with session.request(method, url, json=body) as response:
                response.raise_for_status()
                return await response.json()

        yield send


async def worker(send: SendRequest, base_url: str, numbers: Iterator[int]) -> int:
    """Process leads until none is left; return how many have an answer."""
    answered = 0
    for number in numbers:
        body = {"params": lead_params(number), "enrichments": ENRICHMENTS}
        task_id = (await send("POST", f"{base_url}/waterfalls/{WATERFALL}/run", body))["task_id"]
        task = await send("GET", f"{base_url}/tasks/{task_id}", None)
        if task["status"] != "completed":
            raise RuntimeError("this loop is for a server without latency")
        answered += bool(task["data"][0]["result"]["email"])
    return answered


async def enrich_rows(kind: str, base_url: str, tasks: int, rows: int) -> int:
    """Enrich `rows` rows in `tasks` concurrent tasks; return how many have an answer."""
    numbers = iter(range(rows))
    open_client = {
        "httpx": lambda: open_httpx(None),
        "transport": lambda: open_httpx(EnrichTransport(tasks, base_url)),
        "aiohttp": open_aiohttp,
    }[kind]
    async with open_client() as send:
        return sum(await asyncio.gather(*(worker(send, base_url, numbers) for _ in range(tasks))))


def main() -> None:
    """Run one loop and print its result."""
    parser = argparse.ArgumentParser(prog="benchmarks.loops", description=__doc__)
    parser.add_argument("kind", choices=("httpx", "transport", "aiohttp"))
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    runner = uvloop.run if options.uvloop else asyncio.run
    began = time.perf_counter()
    rows = runner(enrich_rows(options.kind, options.base_url, options.tasks, options.rows))
    print(json.dumps({"rows": rows, "elapsed_s": round(time.perf_counter() - began, 3)}))


if __name__ == "__main__":
    main()

"""A fake API that is fast enough not to be the limit: hand-written HTTP/1.1 on uvloop, in a separate process.

`python -m benchmarks.server --port 8000 --latency "lognormal(4,0.6)" --rate 100 --retry-after 1`

It has the waterfall `email_getter` only. It prints its address once it listens. `GET /__counts` returns the number of
answered requests by endpoint and status, `GET /__busiest` the largest number of requests in any one second, and
`GET /__idle` the seconds since the last task was ready.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen
from uuid import uuid4

import msgspec
import uvloop

from enrich.sandbox.catalogue import WATERFALLS
from enrich.sandbox.faults import PeakRate
from enrich.sandbox.settings import Latency, parse_latency

ROOT = Path(__file__).parent.parent
API_KEY = "benchmark"
WATERFALL = "email_getter"
PRICE, BALANCE = 0.51, 1e9


def _make_wrapper(name: str, email: str) -> str:
    """Return one result in the vendor's format: found by the second provider, about 500 bytes."""
    step = {"details": None, "is_verified": False, "provider_logo": "https://logos.example/833.png"}
    wrapper = {
        "result": {"email": email},
        "result_field": ["email"],
        "enrichment_data": {"Mailhound": {}, name: {"email": email, "score": 91}},
        "steps": [
            {"action": "search", "provider": "Mailhound", "result": "not_found", "cost": "0", **step},
            {"action": "search", "provider": name, "result": "found", "cost": str(PRICE), **step},
        ],
    }
    return json.dumps(wrapper, separators=(",", ":"))


WRAPPER = _make_wrapper("Peoplegrid", "lead-%(lead)s@engine.example").encode()
TASK = (
    b'{"task_id":"%(task)s","request_id":"%(task)s","status":"%(status)s",%(progress)s"data":%(data)s,'
    b'"error":null,"credits_spent":%(spent).2f}'
)
PROGRESS = b'"progress":{"total":%d,"completed":%d,"no_data":0,"failed":0,"processing":%d},'
STATUS_TEXTS = {200: b"OK", 404: b"Not Found", 422: b"Unprocessable Entity", 429: b"Too Many Requests"}


@dataclass(slots=True)
class TokenBucket:
    """A token bucket, full at first: `rate` requests per second (0: no limit), `burst` at once."""

    rate: float
    burst: float
    retry_after: float | None
    _tokens: float = field(init=False)
    _at: float | None = None

    def __post_init__(self) -> None:
        self._tokens = self.burst

    def accepts(self, now: float) -> bool:
        """Return True when a request is allowed at `now` (seconds)."""
        if not self.rate:
            return True
        if self._at is not None:
            self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(frozen=True, slots=True)
class Reply:
    """A response, and the endpoint that it is counted for."""

    endpoint: str
    status: int
    body: bytes


class FakeApi:
    """Accepts runs and returns tasks. A task is the time at which it is ready; of a bulk run, the times of its rows."""

    def __init__(self, sample: Latency, bucket: TokenBucket) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()
        self.bucket = bucket
        self.peak_rate = PeakRate()
        self._sample = sample
        self._tasks: dict[bytes, float | list[float]] = {}
        self._suffix = str(uuid4())[8:].encode()
        self._rows = 0
        self._last_ready = 0.0
        self._chance = random.Random(0)
        self._document = WATERFALLS[WATERFALL].to_json()

    def answer(self, method: bytes, path: bytes, body: bytes) -> Reply:
        """Answer one request."""
        if path == b"/__counts":
            return Reply("counts", 200, self._counts_json())
        if path == b"/__busiest":
            return Reply("busiest", 200, b"%d" % self.peak_rate.peak)
        now = time.monotonic()
        if path == b"/__idle":
            return Reply("idle", 200, b"%.3f" % (now - self._last_ready))
        self.peak_rate.count()
        endpoint, task = _route(method, path)
        if not self.bucket.accepts(now):
            reply = Reply(endpoint, 429, b'{"detail":"Too many requests"}')
        elif endpoint == "task":
            reply = self._task_reply(task, now)
        elif endpoint in {"run", "bulk-run"}:
            reply = self._submit(endpoint, body, now)
        else:
            reply = self._metadata_reply(endpoint)
        self.counts[reply.endpoint, reply.status] += 1
        return reply

    def _submit(self, endpoint: str, body: bytes, now: float) -> Reply:
        params = msgspec.json.decode(body).get("params")
        if not isinstance(params, dict if endpoint == "run" else list) or not params:
            return Reply(endpoint, 422, b'{"detail":[{"loc":["body","params"],"msg":"Field required"}]}')
        task = b"%08x%s" % (len(self._tasks), self._suffix)
        if endpoint == "run":
            self._tasks[task] = self._ready_time(now)
        else:
            self._tasks[task] = sorted(self._ready_time(now) for _ in params)
        self._rows += 1 if endpoint == "run" else len(params)
        return Reply(endpoint, 200, b'{"task_id":"%s","request_id":"%s","status":"created"}' % (task, task))

    def _ready_time(self, now: float) -> float:
        # The latency functions exclude 0 and 1.
        ready = now + self._sample(self._chance.uniform(1e-9, 1 - 1e-9))
        self._last_ready = max(self._last_ready, ready)
        return ready

    def _task_reply(self, task: bytes, now: float) -> Reply:
        ready = self._tasks.get(task)
        if ready is None:
            return Reply("task", 404, b'{"detail":"Task not found"}')
        if isinstance(ready, list):
            done, rows = bisect_right(ready, now), len(ready)
            progress = PROGRESS % (rows, done, rows - done)
        else:
            done, rows, progress = int(ready <= now), 1, b""
        facts: dict[bytes, Any] = {b"task": task, b"progress": progress}
        if done < rows:
            return Reply("task", 200, TASK % {**facts, b"status": b"processing", b"data": b"null", b"spent": 0})
        number = task[:8]
        leads = [number] if isinstance(ready, float) else [b"%s-%d" % (number, row) for row in range(rows)]
        data = b"[%s]" % b",".join([WRAPPER % {b"lead": lead} for lead in leads])
        return Reply("task", 200, TASK % {**facts, b"status": b"completed", b"data": data, b"spent": PRICE * rows})

    def _metadata_reply(self, endpoint: str) -> Reply:
        balance = round(BALANCE - PRICE * self._rows, 2)
        documents: dict[str, Any] = {
            "user": {"email": "ada@engine.example", "balance": balance, "plan": "benchmark", "workspace": "benchmark"},
            "waterfalls": [self._document],
            "waterfall": self._document,
        }
        if endpoint not in documents:
            return Reply(endpoint, 404, b'{"detail":"Not Found"}')
        return Reply(endpoint, 200, msgspec.json.encode(documents[endpoint]))

    def _counts_json(self) -> bytes:
        counts: dict[str, dict[str, int]] = {}
        for (endpoint, status), count in sorted(self.counts.items()):
            counts.setdefault(endpoint, {})[str(status)] = count
        return msgspec.json.encode(counts)


def _route(method: bytes, path: bytes) -> tuple[str, bytes]:
    """Return the endpoint's name, and the task id if there is one."""
    match method, path.partition(b"?")[0].split(b"/")[1:]:
        case b"GET", [b"v1", b"tasks", task]:
            return "task", task
        case b"POST", [b"v1", b"waterfalls", b"email_getter", (b"run" | b"bulk-run") as run]:
            return run.decode(), b""
        case b"GET", [b"v1", b"user", b"me"]:
            return "user", b""
        case b"GET", [b"v1", b"waterfalls", b""]:
            return "waterfalls", b""
        case b"GET", [b"v1", b"waterfalls", b"email_getter"]:
            return "waterfall", b""
    return "unknown", b""


class HttpConnection(asyncio.Protocol):
    """One connection; requests have a content-length or no body, and are answered in order."""

    def __init__(self, api: FakeApi) -> None:
        self._api = api
        self._pending = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are not a subclass

    def data_received(self, data: bytes) -> None:
        """Answer all complete requests."""
        assert self._transport is not None
        pending = self._pending + data
        while (end := pending.find(b"\r\n\r\n")) >= 0:
            head = pending[:end]
            at = head.lower().find(b"\r\ncontent-length:")
            size = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(pending) < end + 4 + size:
                break
            method, path, _ = head.split(b" ", 2)
            self._transport.write(self._response(self._api.answer(method, path, pending[end + 4 : end + 4 + size])))
            pending = pending[end + 4 + size :]
        self._pending = pending

    def _response(self, reply: Reply) -> bytes:
        wait = self._api.bucket.retry_after if reply.status == 429 else None
        return b"HTTP/1.1 %d %s\r\nDate: %s\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n%s" % (
            reply.status,
            STATUS_TEXTS[reply.status],
            formatdate(usegmt=True).encode(),
            b"" if wait is None else b"Retry-After: %g\r\n" % wait,
            len(reply.body),
            reply.body,
        )


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A running server."""

    url: str

    @property
    def base_url(self) -> str:
        """The base URL for clients."""
        return f"{self.url}/v1"

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables that make `enrich` use this server."""
        return {"DATABAR_BASE_URL": self.base_url, "DATABAR_API_KEY": API_KEY}

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of answered requests, by endpoint and status."""
        with urlopen(f"{self.url}/__counts", timeout=10) as answer:  # noqa: S310 - loopback
            counts: dict[str, dict[str, int]] = json.load(answer)
        return counts

    def peak_requests_per_s(self) -> int:
        """Return the largest number of requests in any one second."""
        with urlopen(f"{self.url}/__busiest", timeout=10) as answer:  # noqa: S310 - loopback
            return int(answer.read())

    def idle_s(self) -> float:
        """Return the seconds since the last task was ready."""
        with urlopen(f"{self.url}/__idle", timeout=10) as answer:  # noqa: S310 - loopback
            return float(answer.read())

    def request_count(self) -> int:
        """Return the total number of answered requests."""
        return sum(sum(by_status.values()) for by_status in self.counts().values())


@contextmanager
def start_server(*options: str) -> Iterator[RunningServer]:
    """Start a server process, on a free port unless `options` name one; stop it when the block ends."""
    command = [sys.executable, "-m", "benchmarks.server", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError("the server did not start")
            yield RunningServer(url)
        finally:
            process.terminate()


async def _serve(api: FakeApi, port: int) -> None:
    listening = await asyncio.get_running_loop().create_server(
        lambda: HttpConnection(api), "127.0.0.1", port, backlog=1024
    )
    host, port = listening.sockets[0].getsockname()[:2]
    print(f"http://{host}:{port}", flush=True)
    await listening.serve_forever()


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="benchmarks.server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    help_ = "seconds, or fixed(s), uniform(a,b), lognormal(median,sigma)"
    parser.add_argument("--latency", type=_parse_latency, default="0", help=help_)
    parser.add_argument("--rate", type=float, default=0, help="requests per second that are allowed; 0: all")
    parser.add_argument("--burst", type=float, default=10, help="how many may come at once")
    parser.add_argument("--retry-after", type=float, help="Retry-After of a 429, in seconds; default: none")
    options = parser.parse_args()
    api = FakeApi(options.latency, TokenBucket(options.rate, max(1.0, options.burst), options.retry_after))
    uvloop.run(_serve(api, options.port))


def _parse_latency(text: str) -> Latency:
    return parse_latency(f"fixed({text})" if text.replace(".", "", 1).isdigit() else text)


if __name__ == "__main__":
    main()

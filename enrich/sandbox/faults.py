"""Faults before the routes: an ASGI middleware that applies them, counts requests, and limits their rate."""

import asyncio
import gzip
import json
import re
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from hashlib import blake2b
from ipaddress import ip_address
from math import nan
from typing import Any

from enrich.sandbox.databar import Clock
from enrich.sandbox.settings import Fault, SandboxSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

OK = 200

# Scope key of the connection's transport, for faults that need more than HTTP.
TRANSPORT_KEY = "enrich.transport"
# Scope key that passes a fault of moment "task" to the run endpoints.
FAULT_KEY = "enrich.fault"

_JSON: Headers = [(b"content-type", b"application/json")]
_HTML: Headers = [(b"content-type", b"text/html; charset=utf-8")]
_HTML_PAGE = b"<!doctype html><html><head><title>%d</title></head><body><h1>Something went wrong</h1></body></html>"

_ERROR = b'{"detail":"Internal Server Error"}'
_TOO_MANY = b'{"detail":"Too Many Requests"}'
_UNAVAILABLE = b'{"detail":"Service Unavailable"}'
_NOT_LOCAL = b'{"detail":"The sandbox answers only requests to localhost."}'
_NO_CREDITS = b'{"detail":"Check the number of remaining credits or the tariff plan."}'
_FIXED_REPLIES = {
    "rate-limit-bare": (429, _TOO_MANY),
    "unauthorized": (401, b'{"detail":"Unauthorized"}'),
    "forbidden": (403, b'{"detail":"Forbidden"}'),
    "no-credits": (406, _NO_CREDITS),
}

_ENDPOINTS = (
    ("run", re.compile(r"POST /v1/(waterfalls|enrichments)/[^/]+/run")),
    ("bulk_run", re.compile(r"POST /v1/(waterfalls|enrichments)/[^/]+/bulk-run")),
    ("task", re.compile(r"GET /v1/tasks/[^/]+")),
    ("cancel", re.compile(r"POST /v1/tasks/[^/]+/cancel")),
    ("me", re.compile(r"GET /v1/user/me")),
    ("waterfalls", re.compile(r"GET /v1/waterfalls(/[^/]*)?")),
    ("enrichments", re.compile(r"GET /v1/enrichments(/[^/]*)?")),
    ("flows", re.compile(r"GET /v1/flows(/[^/]*)?")),
    ("health", re.compile(r"GET /health")),
    ("other", re.compile(r".* /v1/.*")),
)


def is_loopback(headers: Headers) -> bool:
    """Return True when the Host header names this machine; stops web pages whose host name resolves to loopback."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    named = re.fullmatch(r"(?:\[([^]]*)\]|([^:\[\]]*))(?::[0-9]*)?", hosts[0]) if len(hosts) == 1 else None
    if named is None:
        return False
    host = named[1] or named[2]
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class TokenBucket:
    """A token bucket: `rate` requests per second, `burst` at once."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = max(1, burst)
        self._tokens = float(self._burst)
        self._updated_at = time.monotonic()

    def try_consume(self) -> bool:
        """Take a token; False when none is left."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._updated_at) * self._rate)
        self._updated_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class PeakRate:
    """The largest number of requests in any one second so far."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.peak = 0
        self._clock = clock
        self._times: deque[float] = deque()

    def count(self) -> None:
        """Count a request that arrives now."""
        now = self._clock()
        self._times.append(now)
        while self._times[0] <= now - 1:
            self._times.popleft()
        self.peak = max(self.peak, len(self._times))


class FaultInjector:
    """Chooses the fault of each request, and counts the faults applied."""

    def __init__(self, faults: Iterable[Fault], seed: int) -> None:
        self.applied_counts: Counter[str] = Counter()
        self._seed = seed
        self._random_faults = list(faults)
        #: The matching requests so far, by the index of the fault.
        self._requests: Counter[int] = Counter()
        self._injected: deque[Fault] = deque()

    def inject(self, fault: Fault, times: int) -> None:
        """Apply a fault to the next `times` matching requests."""
        self._injected.extend([fault] * times)

    def clear(self) -> None:
        """Remove all faults."""
        self._injected.clear()
        self._random_faults.clear()

    def pending(self) -> list[str]:
        """Return the names of the injected faults that have not been applied yet."""
        return [fault.name for fault in self._injected]

    def draw(self, endpoint: str) -> Fault | None:
        """Return the fault of this request, or None; injected faults come before random ones."""
        if not self._injected and not self._random_faults:
            return None
        fault = self._take_injected(endpoint) or self._draw_random(endpoint)
        if fault:
            self.applied_counts[fault.name] += 1
        return fault

    def _take_injected(self, endpoint: str) -> Fault | None:
        for index, fault in enumerate(self._injected):
            if fault.applies_to(endpoint):
                del self._injected[index]
                return fault
        return None

    def _draw_random(self, endpoint: str) -> Fault | None:
        drawn = None
        for index, fault in enumerate(self._random_faults):
            if fault.applies_to(endpoint):
                self._requests[index] += 1
                label = f"{self._seed} {index} {self._requests[index]}"
                number = int.from_bytes(blake2b(label.encode(), digest_size=8).digest()) / 2**64
                if number < fault.probability:
                    drawn = drawn or fault
        return drawn


class FaultMiddleware:
    """The outermost ASGI application; `requests` counts requests by endpoint, and failures by status."""

    def __init__(self, app: App, settings: SandboxSettings, clock: Clock) -> None:
        self.requests: Counter[str] = Counter()
        self.peak_rate = PeakRate()
        self.unavailable_until = 0.0
        self._app = app
        self._settings = settings
        self._clock = clock
        self.faults = FaultInjector(settings.faults, settings.fault_seed)
        self._bucket = TokenBucket(settings.rate, settings.burst) if settings.rate else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a limit or a fault."""

        async def send_with_date(message: Message) -> None:
            if message["type"] == "http.response.start":
                if all(name != b"date" for name, _ in message["headers"]):  # a fault may have set another date
                    message["headers"] = [*message["headers"], (b"date", self._clock.date().encode())]
                if endpoint and message["status"] != OK:
                    self.requests[str(message["status"])] += 1
            await send(message)

        target = f"{scope['method']} {scope['path']}"
        endpoint = next((name for name, pattern in _ENDPOINTS if pattern.fullmatch(target)), "")
        if not is_loopback(scope["headers"]):
            await _drain(receive)
            await _reply(send_with_date, 403, _NOT_LOCAL)
            return
        if not endpoint:
            await self._app(scope, receive, send_with_date)
            return
        self.requests[endpoint] += 1
        self.peak_rate.count()
        if self._clock.now() < self.unavailable_until:
            await _drain(receive)
            await _reply(send_with_date, 503, _UNAVAILABLE)
        elif endpoint != "health" and self._bucket and not self._bucket.try_consume():
            await _drain(receive)
            await _reply(send_with_date, 429, _TOO_MANY, _retry_after(self._settings.retry_after))
        elif fault := self.faults.draw(endpoint):
            await self._apply_fault(fault, scope, receive, send_with_date)
        else:
            await self._app(scope, receive, send_with_date)

    async def _apply_fault(self, fault: Fault, scope: Message, receive: Receive, send: Send) -> None:
        if fault.moment == "task":
            await self._app({**scope, FAULT_KEY: fault}, receive, send)
        elif fault.moment == "after":
            answer = _BufferedResponse()
            await self._app(scope, receive, answer)
            if answer.status == OK:
                await self._fail_after(fault, answer.body, scope, receive, send)
            else:
                for message in answer.messages:
                    await send(message)
        elif fault.name == "slow":
            # Read the body first: it is lost if the client disconnects during the delay.
            read = await _buffer_request(receive)
            await asyncio.sleep(fault.seconds())
            await self._app(scope, read, send)
        else:
            await _drain(receive)
            await self._fail_before(fault, scope, receive, send)

    async def _fail_before(self, fault: Fault, scope: Message, receive: Receive, send: Send) -> None:
        match fault.name:
            case name if name in _FIXED_REPLIES:
                await _reply(send, *_FIXED_REPLIES[name])
            case "rate-limit":
                await _reply(send, 429, _TOO_MANY, _retry_after(fault.params["retry_after"]))
            case "rate-limit-date":
                moment = self._clock.date(float(fault.params["retry_after"]))
                await _reply(send, 429, _TOO_MANY, _retry_after(moment))
            case "error-before":
                await _reply(send, int(fault.params["status"]), _ERROR)
            case "html":
                await _reply_html(send, int(fault.params["status"]))
            case "redirect":
                location = str(fault.params["location"]) or f"http://elsewhere.example{scope['path']}"
                await _reply(send, 307, b"", [(b"location", location.encode())])
            case "unavailable":
                self.unavailable_until = self._clock.now() + fault.seconds()
                await _reply(send, 503, _UNAVAILABLE)
            case _:
                await _break_connection(fault, scope, receive)

    async def _fail_after(self, fault: Fault, body: bytes, scope: Message, receive: Receive, send: Send) -> None:
        match fault.name:
            case "error-after":
                await _reply(send, int(fault.params["status"]), _ERROR)
            case "html-200":
                await _reply_html(send, OK)
            case "other-success":
                await _reply(send, int(fault.params["status"]), body)
            case "wrong-date":
                headers = [(b"date", self._clock.date(fault.seconds()).encode())]
                age = [(b"age", str(fault.params["age"]).encode())] if fault.params["age"] else []
                await _reply(send, OK, body, headers + age)
            case "gzip-bomb":
                larger = body + b" " * (int(fault.params["mebibytes"]) * _MEBIBYTE)
                bomb = await asyncio.to_thread(gzip.compress, larger, 1)
                await _reply(send, OK, bomb, [(b"content-encoding", b"gzip")])
            case "reset-after" | "silence-after":
                await _break_connection(fault, scope, receive)
            case _:
                await _reply(send, OK, _changed_body(fault, body))


class _BufferedResponse:
    """Buffers the response of the routes instead of sending it."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.messages: list[Message] = []

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")


async def _break_connection(fault: Fault, scope: Message, receive: Receive) -> None:
    """Reset the connection without an answer: at once, or after a silence, unless the client disconnects first."""
    if fault.name.startswith("silence"):
        try:
            async with asyncio.timeout(fault.seconds()):
                await _wait_for_disconnect(receive)
        except TimeoutError:
            pass
        else:
            return
    transport: asyncio.Transport = scope[TRANSPORT_KEY]
    connection = transport.get_extra_info("socket")
    # With a linger time of 0, the kernel sends RST instead of FIN.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    # The server would answer 500 if this returned before it noticed the disconnect.
    await _wait_for_disconnect(receive)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drain(receive: Receive) -> None:
    """Read the request to its end, so that the connection can be reused."""
    while (await receive()).get("more_body"):
        pass


async def _buffer_request(receive: Receive) -> Receive:
    """Read the request to its end; return a `receive` that replays it."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    messages.reverse()

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _reply(
    send: Send, status: int, body: bytes, headers: Headers | None = None, content_type: Headers = _JSON
) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*(headers or []), *content_type, length]})
    await send({"type": "http.response.body", "body": body})


async def _reply_html(send: Send, status: int) -> None:
    await _reply(send, status, _HTML_PAGE % status, content_type=_HTML)


def _retry_after(value: float | str | None) -> Headers:
    return [] if value is None else [(b"retry-after", str(value).encode())]


_STEP = {"action": "search", "provider": "Spare", "result": "not_found", "details": None, "cost": "0"}
_MEBIBYTE = 2**20


def _changed_body(fault: Fault, body: bytes) -> bytes:
    """Return the body that the client gets in place of the right one."""
    match fault.name:
        case "broken-json":
            return body[: len(body) // 2]
        case "wrong-json":
            return b"[" + body + b"]"
        case "no-task-id":
            return b'{"status":"created"}'
        case "invalid-utf8":
            return body.replace(b"{", b'{"note":"\xff\xc3\x28\xed\xa0\x80",', 1)
        case "deep-json":
            depth = int(fault.params["depth"])
            return body.replace(b"{", b'{"deep":' + b"[" * depth + b"]" * depth + b",", 1)
    task = json.loads(body)
    match fault.name:
        case "odd-credits":
            spent = fault.params["credits"]
            task["credits_spent"] = nan if spent == "NaN" else spent
        case "long-id":
            task |= dict.fromkeys(task.keys() & {"task_id", "request_id"}, "x" * int(fault.params["length"]))
        case "many-steps":
            data = task.get("data")
            single = data[0] if isinstance(data, list) and len(data) == 1 else data
            holder = single if isinstance(single, dict) and isinstance(single.get("steps"), list) else task
            holder["steps"] = [*[_STEP] * int(fault.params["steps"]), *holder.get("steps", [])]
    return json.dumps(task, ensure_ascii=False, separators=(",", ":")).encode()

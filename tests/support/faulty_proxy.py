"""A proxy on loopback that misdelivers responses: repeated, late, swapped, truncated or unsolicited."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4


class ProxyFaultKind(StrEnum):
    """How a response is changed."""

    #: The response comes again on the same connection after `after_s`; with 0, in the same write.
    REPEAT = "repeat"
    #: A response with `status` follows on the idle connection after `after_s`.
    UNSOLICITED = "unsolicited"
    #: Exchanged with the response of another waiting request of the same kind.
    SWAP = "swap"
    #: A POST gets the response of an earlier POST whose task was polled since; a GET gets another finished task.
    OTHER_TASK = "another"
    #: A POST gets the response of the first POST, once that one's task was polled.
    FIRST_AFTER_POLL = "first"
    #: A POST gets the response of the first POST as soon as there is one: nothing in it shows which request it answers.
    FIRST_AT_ONCE = "shared"
    #: The response is of a task that does not exist: a new id, or `task_id`.
    UNKNOWN_TASK = "nowhere"
    #: Half of the response comes, then the connection ends.
    TRUNCATED = "cut"
    #: The response has `status`.
    STATUS = "status"
    #: The response has `body`.
    BODY = "body"


FIRST_ID_FAULTS = {ProxyFaultKind.FIRST_AFTER_POLL, ProxyFaultKind.FIRST_AT_ONCE}


@dataclass(frozen=True)
class ProxyFault:
    """One response's fault and its settings."""

    kind: ProxyFaultKind
    after_s: float = 0.03
    status: int = 408
    task_id: str = ""
    body: bytes = b""


@dataclass(frozen=True)
class Exchange:
    """A request: `number` counts those of its kind, `connection` all connections, from 1; `lead`: params of a run.

    `kind` is `POST` for a run, `GET` for the poll of a task, `OTHER` for other reads under `/v1`.
    """

    kind: str
    number: int
    connection: int
    path: str
    lead: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_post(self) -> bool:
        """Whether it submits a run."""
        return self.kind == "POST"

    @property
    def is_poll(self) -> bool:
        """Whether it polls a task."""
        return self.kind == "GET"

    @property
    def task_id(self) -> str:
        """The id of the polled task."""
        return self.path.rpartition("/")[2].partition("?")[0]


ChooseFault = Callable[[Exchange], ProxyFault | None]

#: Seconds that a response waits for another to be swapped with.
SWAP_WAIT_S = 0.3
#: Seconds that a POST waits for the first one.
FIRST_POST_WAIT_S = 5.0
_RUN = re.compile(r"/(?:waterfalls|enrichments)/[^/]+/(bulk-)?run$")
_TASK = re.compile(r"/tasks/[^/]+$")
_OTHER = re.compile(r"^/v1/")
#: The result of a task that does not exist.
_UNKNOWN_RESULT = {"email": "somebody@elsewhere.example"}


@dataclass(frozen=True)
class _Message:
    """An HTTP message as received."""

    head: bytes
    body: bytes

    @property
    def data(self) -> bytes:
        return self.head + self.body

    @property
    def status(self) -> int:
        return int(self.head.split(None, 2)[1])

    def json(self) -> dict[str, Any]:
        """Parse the body; return {} for anything but an object."""
        try:
            read = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return read if isinstance(read, dict) else {}

    def with_status(self, status: int) -> _Message:
        return _message(status, self.body)

    def with_json(self, **changes: Any) -> _Message:
        return _message(self.status, json.dumps(self.json() | changes).encode())


def _message(status: int, body: bytes) -> _Message:
    head = f"HTTP/1.1 {status} Reason\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return _Message(head.encode(), body)


@dataclass
class FaultyProxy:
    """A running proxy; `fault_counts` counts the injected faults by request kind and fault."""

    base_url: str = ""
    fault_counts: Counter[str] = field(default_factory=Counter)
    choose_fault: ChooseFault = lambda _: None
    _upstream: tuple[str, int] = ("", 0)
    _counts: Counter[str] = field(default_factory=Counter)
    _connections: int = 0
    #: Responses to POSTs by task id, in order; then the ids of polled tasks.
    _accepted: dict[str, _Message] = field(default_factory=dict)
    _polled: list[str] = field(default_factory=list)
    #: Set when the first POST was answered; set when its task was polled.
    _first_post_answered: asyncio.Event = field(default_factory=asyncio.Event)
    _first_task_polled: asyncio.Event = field(default_factory=asyncio.Event)
    #: Responses of finished tasks by id.
    _finished: dict[str, _Message] = field(default_factory=dict)
    #: Responses that wait to be swapped, by kind.
    _waiting: dict[str, tuple[_Message, asyncio.Future[_Message]]] = field(default_factory=dict)

    def clear_faults(self) -> None:
        """Inject no more faults."""
        self.choose_fault = lambda _: None

    async def serve(self, client: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection until either side closes it."""
        self._connections += 1
        session = _Session(self, self._connections, client, writer)
        try:
            with suppress(OSError, EOFError, asyncio.LimitOverrunError):
                await session.run(self._upstream)
        finally:
            writer.close()

    def number_request(self, connection: int, method: str, path: str, body: bytes) -> Exchange | None:
        """Number a request; return None for one that is always forwarded unchanged."""
        bare = path.partition("?")[0]
        if method == "POST":
            kind = "POST" if _RUN.search(bare) else ""
        else:
            kind = "GET" if _TASK.search(bare) else "OTHER" if _OTHER.search(bare) else ""
        if not kind:
            return None
        self._counts[kind] += 1
        params = _Message(b"", body).json().get("params")
        lead = params if isinstance(params, dict) else {}
        made = Exchange(kind, self._counts[kind], connection, path, lead)
        if made.is_poll and made.task_id in self._accepted and made.task_id not in self._polled:
            self._polled.append(made.task_id)
            if made.task_id == next(iter(self._accepted)):
                self._first_task_polled.set()
        return made

    def store_answer(self, exchange: Exchange, answer: _Message) -> None:
        """Store a response that may be delivered to another request."""
        if answer.status >= 300:
            return
        read = answer.json()
        if exchange.is_post:
            self._accepted.setdefault(str(read.get("task_id")), answer)
            self._first_post_answered.set()
        elif exchange.is_poll and read.get("status") in ("completed", "success") and read.get("data"):
            self._finished[exchange.task_id] = answer

    async def substitute(self, fault: ProxyFault, exchange: Exchange, answer: _Message) -> _Message:
        """Return the response to deliver in place of `answer`."""
        if fault.kind is ProxyFaultKind.STATUS:
            return answer.with_status(fault.status) if answer.status < 300 else answer
        if fault.kind is ProxyFaultKind.BODY:
            return _message(200, fault.body)
        if fault.kind is ProxyFaultKind.UNKNOWN_TASK:
            task_id = fault.task_id or str(uuid4())
            ids = {"task_id": task_id, "request_id": task_id}
            if exchange.is_post:
                return answer.with_json(**ids) if answer.status < 300 else answer
            unknown_task = {"status": "completed", "data": [_UNKNOWN_RESULT], "error": None, "credits_spent": 1.0}
            return _message(200, json.dumps(ids | unknown_task).encode())
        if fault.kind is ProxyFaultKind.SWAP:
            return await self._swap(exchange, answer)
        if fault.kind in FIRST_ID_FAULTS and exchange.is_post:
            ready = (
                self._first_task_polled if fault.kind is ProxyFaultKind.FIRST_AFTER_POLL else self._first_post_answered
            )
            with suppress(TimeoutError):
                await asyncio.wait_for(ready.wait(), FIRST_POST_WAIT_S)
            return next(iter(self._accepted.values()), answer)
        if fault.kind is ProxyFaultKind.OTHER_TASK:
            return self._other_answer(exchange) or answer
        return answer

    def _other_answer(self, exchange: Exchange) -> _Message | None:
        if exchange.is_post:
            return self._accepted[self._polled[-1]] if self._polled else None
        others = [task_id for task_id in self._finished if task_id != exchange.task_id]
        return self._finished[others[-1]] if others else None

    async def _swap(self, exchange: Exchange, answer: _Message) -> _Message:
        partner = self._waiting.pop(exchange.kind, None)
        if partner and not partner[1].done():
            partner[1].set_result(answer)
            return partner[0]
        future = asyncio.get_running_loop().create_future()
        self._waiting[exchange.kind] = (answer, future)
        try:
            return await asyncio.wait_for(future, SWAP_WAIT_S)
        except TimeoutError:
            if self._waiting.get(exchange.kind) == (answer, future):
                del self._waiting[exchange.kind]
            return answer


class _Session:
    """One connection of a client, with its connection to the API."""

    def __init__(
        self, proxy: FaultyProxy, number: int, client: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._number = number
        self._client = client
        self._writer = writer
        self._delayed_writes: set[asyncio.Task[None]] = set()

    async def run(self, upstream: tuple[str, int]) -> None:
        """Forward requests and responses."""
        reader, writer = await asyncio.open_connection(*upstream)
        requests: asyncio.Queue[tuple[Exchange | None, bytes, bytes]] = asyncio.Queue()
        forwarding = asyncio.create_task(self._forward_answers(requests, reader, writer))
        reading = asyncio.create_task(self._read_requests(requests))
        try:
            await asyncio.wait({forwarding, reading}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (forwarding, reading, *self._delayed_writes):
                task.cancel()
            writer.close()
            self._writer.close()
            await asyncio.gather(forwarding, reading, *self._delayed_writes, return_exceptions=True)

    async def _read_requests(self, requests: asyncio.Queue[tuple[Exchange | None, bytes, bytes]]) -> None:
        while True:
            head = await self._client.readuntil(b"\r\n\r\n")
            body = await _body(head, self._client, answer=False)
            method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
            requests.put_nowait((self._proxy.number_request(self._number, method, path, body), head, body))

    async def _forward_answers(
        self,
        requests: asyncio.Queue[tuple[Exchange | None, bytes, bytes]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        while True:
            exchange, head, body = await requests.get()
            writer.write(head + body)
            try:
                answer_head = await reader.readuntil(b"\r\n\r\n")
                answer = _Message(answer_head, await _body(answer_head, reader, answer=True))
            except (ConnectionError, asyncio.IncompleteReadError):
                self._reset()
                return
            if exchange is None or not await self._deliver(exchange, answer):
                self._writer.write(answer.data)
            await self._writer.drain()

    async def _deliver(self, exchange: Exchange, answer: _Message) -> bool:
        """Apply a fault to a response; return whether something was delivered."""
        proxy = self._proxy
        fault = proxy.choose_fault(exchange)
        if fault is None or fault.kind not in FIRST_ID_FAULTS:
            proxy.store_answer(exchange, answer)  # the first id is that of a POST which keeps its own
        if fault is None:
            return False
        delivered = await proxy.substitute(fault, exchange, answer)
        keeps_answer = fault.kind in (ProxyFaultKind.REPEAT, ProxyFaultKind.UNSOLICITED, ProxyFaultKind.TRUNCATED)
        if not keeps_answer and delivered is answer:  # there was nothing to deliver instead
            return False
        proxy.fault_counts[f"{exchange.kind} {fault.kind}"] += 1
        if fault.kind is ProxyFaultKind.TRUNCATED:
            self._writer.write(answer.data[: len(answer.data) // 2])
            await self._writer.drain()
            raise EOFError
        self._writer.write(delivered.data)
        if fault.kind is ProxyFaultKind.REPEAT:
            self._write_later(answer.data, fault.after_s)
        elif fault.kind is ProxyFaultKind.UNSOLICITED:
            self._write_later(_message(fault.status, b'{"detail":"Unasked"}').data, fault.after_s)
        return True

    def _write_later(self, data: bytes, seconds: float) -> None:
        if not seconds:
            self._writer.write(data)
            return

        async def write() -> None:
            await asyncio.sleep(seconds)
            if not self._writer.is_closing():
                self._writer.write(data)

        self._delayed_writes.add(asyncio.create_task(write()))

    def _reset(self) -> None:
        """Reset the connection, as the API did."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


async def _body(head: bytes, reader: asyncio.StreamReader, *, answer: bool) -> bytes:
    """Read a body unchanged, including its chunk headers."""
    headers = {
        name.strip().lower(): value.strip().lower()
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
    }
    if headers.get(b"transfer-encoding") == b"chunked":
        read = b""
        while True:
            size = await reader.readuntil(b"\r\n")
            count = int(size.split(b";")[0], 16)
            read += size + await reader.readexactly(count + 2)
            if not count:
                return read
    if b"content-length" in headers:
        return await reader.readexactly(int(headers[b"content-length"]))
    has_no_body = not answer or head.split(None, 2)[1] in (b"204", b"304") or head.split(None, 2)[1].startswith(b"1")
    return b"" if has_no_body else await reader.read()


@contextmanager
def faulty_proxy(base_url: str, choose_fault: ChooseFault = lambda _: None) -> Iterator[FaultyProxy]:
    """Run a proxy before the API at a base URL; calls `choose_fault` for each run, poll and other read under `/v1`."""
    parts = urlsplit(base_url)
    ready, proxy = Event(), FaultyProxy(choose_fault=choose_fault)
    loop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        proxy._upstream = (parts.hostname or "", parts.port or 80)
        stopping = asyncio.Event()
        sessions: set[asyncio.Task[None]] = set()

        async def session(client: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            sessions.add(task)
            try:
                await proxy.serve(client, writer)
            except asyncio.CancelledError:
                pass  # the proxy is closing
            finally:
                sessions.discard(task)

        server = await asyncio.start_server(session, "127.0.0.1", 0, limit=2**26)
        proxy.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{parts.path}"
        loop.append((asyncio.get_running_loop(), stopping))
        ready.set()
        await stopping.wait()
        server.close()
        for task in list(sessions):
            task.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)
        await asyncio.sleep(0.01)  # lets the event loop close the connections

    thread = Thread(target=asyncio.run, args=[serve()], name="out of step", daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy
    finally:
        running, stopping = loop[0]
        running.call_soon_threadsafe(stopping.set)
        thread.join(10)


def random_faults(probabilities: Mapping[ProxyFaultKind, tuple[float, float]], seed: int) -> ChooseFault:
    """Choose each fault with its probability for a POST and for a GET."""
    rng = random.Random(seed)

    def choose_fault(exchange: Exchange) -> ProxyFault | None:
        if not (exchange.is_post or exchange.is_poll):
            return None
        for kind, (post, get) in probabilities.items():
            if rng.random() < (post if exchange.is_post else get):
                fault = ProxyFault(kind, rng.choice((0.0, rng.uniform(0.0, 0.05))))
                if kind is ProxyFaultKind.UNSOLICITED:
                    return replace(fault, status=rng.choice((408, 429, 503)))
                return replace(fault, status=rng.choice((201, 202, 203)))
        return None

    return choose_fault

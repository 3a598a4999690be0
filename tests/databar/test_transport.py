"""Requests and connections: whether bytes may have left, and which bytes answer them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import pytest

from enrich.databar.client import Client
from enrich.databar.transport import AnswerLost, ConnectionFailed, Origin, Transport, serialize_headers
from enrich.errors import ApiCallFailed, RequestNotAccepted, SubmissionUnconfirmed
from enrich.run.pipeline import run_in_event_loop
from enrich.sandbox import Fault
from tests.databar.test_client import CREATED, KEY, call_api, expect_failure, get_task, submit_run
from tests.support import transport_client
from tests.support.cases import in_turn
from tests.support.raw_server import ConnectionAction, RawServer, ReceivedRequest, Reply, http_reply, serve_replies
from tests.support.transport_client import Sender
from tests.support.workspace import serve_api, wait_until

# The transport: which connection is used, and what its failures prove


def test_posts_use_new_connections() -> None:
    """A POST uses a new connection: it reads no earlier bytes and meets no server that closes an idle one."""

    async def three(client: Client) -> list[str]:
        return [await submit_run(client) for _ in range(3)]

    again = Reply(CREATED.data, stray_bytes=http_reply(200, {"task_id": "another"}).data)
    with serve_replies(again) as server:
        assert call_api(server.base_url, three) == ["t-1"] * 3
        assert [seen.connection for seen in server.requests] == [1, 2, 3]


@pytest.mark.long
def test_polls_reuse_idle_connections() -> None:
    """Polls reuse idle connections, because repeating a poll costs nothing."""

    async def two(client: Client) -> None:
        await get_task(client)
        await asyncio.sleep(1.1)
        await get_task(client)

    with serve_replies(http_reply(200, {"task_id": "t-1", "status": "processing"})) as server:
        call_api(server.base_url, two)
        assert [seen.connection for seen in server.requests] == [1, 1]


def test_connection_lost_during_post_is_in_doubt() -> None:
    """A connection lost during a POST leaves it in doubt: bytes were sent, and nothing is resent."""
    replies = iter([CREATED, Reply(action=ConnectionAction.CLOSE), CREATED])

    async def two(client: Client) -> None:
        await submit_run(client)
        with pytest.raises(ApiCallFailed) as caught:
            await submit_run(client)
        assert type(caught.value) is SubmissionUnconfirmed

    with serve_replies(lambda _: next(replies)) as server:
        call_api(server.base_url, two)
        assert [seen.connection for seen in server.requests] == [1, 2]


@pytest.mark.long
def test_broken_responses_release_connections() -> None:
    """A broken response releases its connection; otherwise the 32 connections would run out during the run."""

    async def many(client: Client) -> None:
        for _ in range(40):
            with pytest.raises(ApiCallFailed):
                await submit_run(client)

    half = Reply(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", ConnectionAction.HANG)
    with serve_replies(half) as server:
        call_api(server.base_url, many, seconds=0.01)
        wait_until(lambda: len(server.requests) == 40)


@pytest.mark.long
def test_posts_and_polls_use_separate_pools() -> None:
    """Posts and polls use separate connection pools: 32 silent polls block no POST."""

    async def both(client: Client) -> str:
        polls = [asyncio.create_task(client.poll_task(f"t-{number}")) for number in range(32)]
        while len(server.requests) < 32:  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.01)
        task_id = await submit_run(client)
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        return task_id

    with serve_replies(
        lambda seen: CREATED if seen.line.startswith("POST") else Reply(action=ConnectionAction.HANG)
    ) as server:
        assert call_api(server.base_url, both) == "t-1"


def test_server_without_tls_is_not_accepted() -> None:
    """A server without TLS did not accept the request: the handshake comes before it."""
    with serve_replies(http_reply(400)) as server:
        assert type(expect_failure(f"https://127.0.0.1:{server.port}/v1", submit_run)) is RequestNotAccepted
        assert not any(KEY in seen.head for seen in server.requests)


@pytest.mark.parametrize("end", [ConnectionAction.CLOSE, ConnectionAction.RESET])
def test_connection_closed_in_handshake_is_not_accepted(end: ConnectionAction) -> None:
    """A connection closed during the handshake never carried a request, so it was not accepted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with serve_replies(Reply(action=end), tls=context) as server:
        assert type(expect_failure(f"https://127.0.0.1:{server.port}/v1", submit_run)) is RequestNotAccepted
        assert not server.requests


def test_connect_timeout_message() -> None:
    """A connect timeout names its own limit, not the longer one for answers."""

    async def connect_once(port: int) -> None:
        origin = Origin("127.0.0.1", port, is_tls=False)
        transport = Transport(origin, 1, 0.2, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        with pytest.raises(ConnectionFailed, match="Connection timeout"):
            await transport.exchange(b"", 5.0)
        await transport.aclose()

    with socket.create_server(("127.0.0.1", 0), backlog=0) as full_listener, contextlib.ExitStack() as waiting_sockets:
        # Once its queue is full, the kernel accepts no more connections.
        for _ in range(4):
            caller = waiting_sockets.enter_context(socket.socket())
            caller.setblocking(False)  # noqa: FBT003 - its only argument
            caller.connect_ex(full_listener.getsockname())
        asyncio.run(connect_once(full_listener.getsockname()[1]))


@pytest.mark.parametrize("dead_first", [True, False])
def test_next_address_is_tried(monkeypatch: pytest.MonkeyPatch, dead_first: bool) -> None:  # noqa: FBT001 - a case
    """A host with several addresses is reached while one of them is, and its addresses are looked up once."""
    lookups = 0

    async def find(*_: object, **__: object) -> Sequence[object]:
        nonlocal lookups
        lookups += 1
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (server.port, dead_port)]
        return found[::-1] if dead_first else found

    async def three(client: Client) -> list[str]:
        return [await submit_run(client) for _ in range(3)]

    with socket.create_server(("127.0.0.1", 0)) as dead:
        dead_port = dead.getsockname()[1]
    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", find)
    with serve_replies(CREATED) as server:
        assert call_api(f"http://localhost:{server.port}/v1", three) == ["t-1"] * 3
    assert lookups == 1


def test_header_with_line_break_is_refused() -> None:
    """A header cannot begin another one."""
    for value in ("a\r\nx-other: b", "a\nb", "a\rb"):
        with pytest.raises(ValueError, match="line break"):
            serialize_headers({"x-apikey": value})


@pytest.mark.parametrize("is_installed", [True, False])
def test_event_loop_of_a_run(monkeypatch: pytest.MonkeyPatch, is_installed: bool) -> None:  # noqa: FBT001 - a case
    """A run uses uvloop where it is installed."""
    if not is_installed:
        monkeypatch.setitem(sys.modules, "uvloop", None)

    async def name_of_loop() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run_in_event_loop(name_of_loop()).startswith("uvloop" if is_installed else "asyncio")


@pytest.mark.long
def test_response_received_while_suspended_counts(tmp_path: Path) -> None:
    """A response that arrived while the machine slept counts, although the timeout is over; nothing is in doubt."""

    async def stopped(client: Client) -> None:
        posting = asyncio.create_task(submit_run(client))
        await asyncio.sleep(0.3)
        # Our code does not run meanwhile, as under SIGSTOP; the API's thread answers.
        time.sleep(2.5)  # noqa: ASYNC251
        assert await posting

    with serve_api(tmp_path / "api.db", faults=(Fault.parse("post:slow=1,seconds=0.6"),)) as api:
        call_api(api.base_url, stopped, key=api.api_key, seconds=2.0)


# Which bytes count as the response to which request, when an API or a proxy sends more than was requested

STRAY_REPLY = http_reply(200, {"task_id": "another"}).data
#: Unsolicited bytes that an API, a proxy or a load balancer may send.
STRAY_REPLIES = {
    "an answer again": STRAY_REPLY,
    "an answer of another kind": http_reply(500, {"task_id": "another"}).data,
    "an answer without a body": b"HTTP/1.1 204 No Content\r\n\r\n",
    "a 408 with its end": b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
    "an interim answer": b"HTTP/1.1 103 Early Hints\r\n\r\n",
    "a chunked answer": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "half a body": b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{",
    "the first byte of an answer": b"H",
    "garbage": b"\x00\xff garbage",
    "text": b"Service Unavailable\r\n\r\n",
    "an empty line": b"\r\n",
}
T = TypeVar("T")
LOOPS = {"asyncio": asyncio.run, "uvloop": run_in_event_loop}
WithTransport = Callable[..., Any]
each_stray = in_turn("stray", STRAY_REPLIES.values(), ids=STRAY_REPLIES)


@pytest.fixture(params=["uvloop", pytest.param("asyncio", marks=pytest.mark.long)])
def with_transport(request: pytest.FixtureRequest) -> WithTransport:
    """Open a transport in each kind of event loop: they differ in when they read received bytes."""

    def use_transport(base_url: str, use: Callable[[Sender], Awaitable[T]], **settings: Any) -> T:
        return transport_client.with_transport(base_url, use, run=LOOPS[request.param], **settings)

    return use_transport


def requested_path(request: ReceivedRequest) -> str:
    """Return the path that was requested."""
    return request.line.split()[1].rpartition("/")[2]


def echo(request: ReceivedRequest) -> bytes:
    """Respond with the requested path."""
    return http_reply(200, {"task_id": requested_path(request)}).data


async def wait_until_closed(server: RawServer, number: int) -> None:
    """Wait until a connection is closed."""
    await asyncio.to_thread(wait_until, lambda: number in server.closed_connections)


@each_stray
def test_stray_bytes_between_requests_close_connection(with_transport: WithTransport, stray: bytes) -> None:
    """Bytes that come after a response was read, between requests, close the connection at once."""
    was_read = Event()

    async def two(send: Sender) -> list[object]:
        first = await send("/a")
        was_read.set()
        await wait_until_closed(server, 1)
        return [json.loads(first.content), json.loads((await send("/b")).content)]

    def reply(seen: ReceivedRequest) -> Reply:
        return Reply(echo(seen), stray_bytes=stray if seen.connection == 1 else b"", stray_after=was_read)

    with serve_replies(reply) as server:
        assert with_transport(server.base_url, two) == [{"task_id": "a"}, {"task_id": "b"}]
        assert [(seen.connection, requested_path(seen)) for seen in server.requests] == [(1, "a"), (2, "b")]


@in_turn("apart", ["in one piece", "the end apart"])
@in_turn("body", [b"", b'{"task_id": "a"}'])
@each_stray
def test_stray_bytes_after_response_are_discarded(
    with_transport: WithTransport, stray: bytes, body: bytes, apart: str
) -> None:
    """Stray bytes in one piece with a response, or with its last byte, close the connection.

    Garbage right behind a response may spoil that response, which is then requested again.
    """
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    whole = head + body + stray
    cut = len(whole) - len(stray) - 1
    first = Reply(whole[:cut], stray_bytes=whole[cut:]) if apart == "the end apart" else Reply(whole)

    async def several(send: Sender) -> list[bytes]:
        try:
            contents = [(await send("/a")).content]
        except AnswerLost:
            contents = [body]
        return contents + [(await send("/b")).content for _ in range(3)]

    with serve_replies(lambda seen: first if requested_path(seen) == "a" else Reply(echo(seen))) as server:
        assert with_transport(server.base_url, several) == [body] + [b'{"task_id": "b"}'] * 3
        if stray != b"\r\n":  # some servers end a body with it
            assert {seen.connection for seen in server.requests if requested_path(seen) == "b"}.isdisjoint({1})


@in_turn("stray", [STRAY_REPLY, b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"220 mail.example"])
def test_stray_bytes_before_request_prove_not_sent(with_transport: WithTransport, stray: bytes) -> None:
    """Bytes that are there when the connection opens are no response: the request is not sent on it."""

    async def slow_down() -> None:
        for _ in range(100):
            await asyncio.sleep(0)
            if server.greeting_sent.wait(0.2):  # blocks the loop, as a busy machine would
                return

    async def one(send: Sender) -> None:
        slow = asyncio.create_task(slow_down())
        with pytest.raises(ConnectionFailed, match="before the request"):
            await send("/a", method="POST")
        await slow

    with serve_replies(lambda seen: Reply(echo(seen)), greeting=stray) as server:
        with_transport(server.base_url, one)
        assert not server.requests


def test_no_reuse_uses_new_connections(with_transport: WithTransport) -> None:
    """A POST uses a new connection: it reads no stray bytes and meets no server that closes an idle one."""

    async def three(send: Sender) -> list[tuple[object, object]]:
        answers = [await send(f"/{name}", method="POST") for name in "abc"]
        return [(json.loads(answer.content)["task_id"], answer.is_fresh) for answer in answers]

    with serve_replies(lambda seen: Reply(echo(seen), stray_bytes=STRAY_REPLY)) as server:
        assert with_transport(server.base_url, three) == [("a", True), ("b", True), ("c", True)]
        assert [seen.connection for seen in server.requests] == [1, 2, 3]


def test_fresh_connection_on_demand(with_transport: WithTransport) -> None:
    """Each response shows whether its connection carried another request before."""

    async def several(send: Sender) -> list[object]:
        answers = [await send("/a"), await send("/a"), await send("/a", fresh=True), await send("/a")]
        return [answer.is_fresh for answer in answers]

    with serve_replies(lambda seen: Reply(echo(seen))) as server:
        assert with_transport(server.base_url, several) == [True, False, True, False]
        assert [seen.connection for seen in server.requests] == [1, 1, 2, 1]


@pytest.mark.long
def test_fresh_requests_do_not_queue(with_transport: WithTransport) -> None:
    """Fresh requests have their own connections: 32 silent polls block none of them."""

    async def both(send: Sender) -> object:
        silent = [asyncio.create_task(send("/silent")) for _ in range(32)]
        await asyncio.to_thread(wait_until, lambda: len(server.requests) == 32)
        answer = await send("/a", fresh=True)
        for task in silent:
            task.cancel()
        await asyncio.gather(*silent, return_exceptions=True)
        return json.loads(answer.content)["task_id"]

    def answer(request: ReceivedRequest) -> Reply:
        return Reply(action=ConnectionAction.HANG) if requested_path(request) == "silent" else Reply(echo(request))

    with serve_replies(answer) as server:
        assert with_transport(server.base_url, both) == "a"


@in_turn("times", [1, 2])
def test_close_connection_of_response(with_transport: WithTransport, times: int) -> None:
    """The connection of a response can be closed, as for one with another task's id; closing twice does no harm."""

    async def two(send: Sender) -> object:
        answer = await send("/a")
        for _ in range(times):
            answer.close()
        await wait_until_closed(server, 1)
        return json.loads((await send("/b")).content)["task_id"]

    with serve_replies(lambda seen: Reply(echo(seen))) as server:
        assert with_transport(server.base_url, two) == "b"
        assert [seen.connection for seen in server.requests] == [1, 2]


def test_closed_connection_fails_its_request(with_transport: WithTransport) -> None:
    """Closing a connection fails its current request, whose response might be another's; it is repeated elsewhere."""

    async def two(send: Sender) -> object:
        first = await send("/a")
        second = asyncio.create_task(send("/b"))
        await asyncio.to_thread(wait_until, lambda: len(server.requests) == 2)
        first.close()
        return json.loads((await second).content)["task_id"]

    def answer(request: ReceivedRequest) -> Reply:
        silent = requested_path(request) == "b" and request.connection == 1
        return Reply(action=ConnectionAction.HANG) if silent else Reply(echo(request))

    with serve_replies(answer) as server:
        assert with_transport(server.base_url, two) == "b"
        assert [(seen.connection, requested_path(seen)) for seen in server.requests] == [(1, "a"), (1, "b"), (2, "b")]


def test_interim_responses_are_skipped(with_transport: WithTransport) -> None:
    """Any number of interim responses (1xx) may come before the response."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + b"HTTP/1.1 103 Early Hints\r\nlink: <x>\r\n\r\n"

    async def two(send: Sender) -> list[object]:
        return [json.loads((await send(f"/{name}")).content)["task_id"] for name in "ab"]

    with serve_replies(lambda seen: Reply(interim + echo(seen))) as server:
        assert with_transport(server.base_url, two) == ["a", "b"]
        assert [seen.connection for seen in server.requests] == [1, 1]

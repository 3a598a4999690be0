"""The transport: which connection is used, and what its failures prove."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from enrich.databar.client import Client
from enrich.databar.transport import ConnectionFailed, Origin, Transport, serialize_headers
from enrich.errors import ApiCallFailed, RequestNotAccepted, SubmissionUnconfirmed
from enrich.run.pipeline import run_in_event_loop
from enrich.sandbox import Fault
from tests.databar.test_client import CREATED, KEY, call_api, expect_failure, get_task, submit_run
from tests.support.raw_server import ConnectionAction, Reply, http_reply, serve_replies
from tests.support.workspace import serve_api, wait_until


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

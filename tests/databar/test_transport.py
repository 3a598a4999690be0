"""The transport: which connection is used, and what its failures prove."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from pathlib import Path

import httpx
import pytest

from enrich.databar.client import Client
from enrich.databar.transport import Transport
from enrich.errors import ApiCallFailed, RequestNotAccepted, SubmissionUnconfirmed
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
        transport = Transport(1, 0.2, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        request = httpx.Request("POST", f"http://127.0.0.1:{port}/", extensions={"timeout": {"read": 5.0}})
        with pytest.raises(httpx.ConnectError, match="Connection timeout"):
            await transport.handle_async_request(request)
        await transport.aclose()

    with socket.create_server(("127.0.0.1", 0), backlog=0) as full_listener, contextlib.ExitStack() as waiting_sockets:
        # Once its queue is full, the kernel accepts no more connections.
        for _ in range(4):
            caller = waiting_sockets.enter_context(socket.socket())
            caller.setblocking(False)  # noqa: FBT003 - its only argument
            caller.connect_ex(full_listener.getsockname())
        asyncio.run(connect_once(full_listener.getsockname()[1]))


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

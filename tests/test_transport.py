"""The transport: which connection is used, and what is proved when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from pathlib import Path

import httpx
import pytest

from enrich.api.client import Client
from enrich.api.transport import Transport
from enrich.errors import Ambiguous, CallFailed, NotAccepted
from enrich.sandbox import Fault
from tests.harness import serving, until
from tests.test_client import CREATED, KEY, ask, refused, run, task
from tests.wire import Act, Reply, answering, http


def test_each_post_has_a_connection_of_its_own() -> None:
    """So it neither reads what an earlier exchange left, nor meets a server that closes an idle connection."""

    async def three(client: Client) -> list[str]:
        return [await run(client) for _ in range(3)]

    again = Reply(CREATED.data, later=http(200, {"task_id": "another"}).data)
    with answering(again) as wire:
        assert ask(wire.base_url, three) == ["t-1"] * 3
        assert [seen.connection for seen in wire.requests] == [1, 2, 3]


def test_a_poll_may_ride_a_connection_that_was_idle() -> None:
    """Asking twice costs nothing, so connections are kept longer."""

    async def two(client: Client) -> None:
        await task(client)
        await asyncio.sleep(1.1)
        await task(client)

    with answering(http(200, {"task_id": "t-1", "status": "processing"})) as wire:
        ask(wire.base_url, two)
        assert [seen.connection for seen in wire.requests] == [1, 1]


def test_a_connection_that_dies_under_a_post_leaves_a_doubt() -> None:
    """The bytes left on it, and nothing is sent again."""
    replies = iter([CREATED, Reply(then=Act.CLOSE), CREATED])

    async def two(client: Client) -> None:
        await run(client)
        with pytest.raises(CallFailed) as caught:
            await run(client)
        assert type(caught.value) is Ambiguous

    with answering(lambda _: next(replies)) as wire:
        ask(wire.base_url, two)
        assert [seen.connection for seen in wire.requests] == [1, 2]


@pytest.mark.long
def test_broken_answers_do_not_use_up_the_connections() -> None:
    """There are 32: each that an unread answer kept would be missing for the rest of the night."""

    async def many(client: Client) -> None:
        for _ in range(40):
            with pytest.raises(CallFailed):
                await run(client)

    half = Reply(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", Act.SILENCE)
    with answering(half) as wire:
        ask(wire.base_url, many, seconds=0.01)
        until(lambda: len(wire.requests) == 40)


def test_posts_and_polls_do_not_wait_for_each_other() -> None:
    """They have connections of their own: 32 silent polls hold up no POST."""

    async def both(client: Client) -> str:
        polls = [asyncio.create_task(client.task(f"t-{number}")) for number in range(32)]
        while len(wire.requests) < 32:  # noqa: ASYNC110 - the wire tells nobody
            await asyncio.sleep(0.01)
        task_id = await run(client)
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        return task_id

    with answering(lambda seen: CREATED if seen.line.startswith("POST") else Reply(then=Act.SILENCE)) as wire:
        assert ask(wire.base_url, both) == "t-1"


def test_a_server_that_speaks_no_tls_accepted_nothing() -> None:
    """The handshake comes before the request, so the request never left."""
    with answering(http(400)) as wire:
        assert type(refused(f"https://127.0.0.1:{wire.port}/v1", run)) is NotAccepted
        assert not any(KEY in seen.head for seen in wire.requests)


@pytest.mark.parametrize("end", [Act.CLOSE, Act.RESET])
def test_a_connection_that_ends_in_the_handshake_accepted_nothing(end: Act) -> None:
    """A connection that was opened and closed again at once never carried a request."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with answering(Reply(then=end), tls=context) as wire:
        assert type(refused(f"https://127.0.0.1:{wire.port}/v1", run)) is NotAccepted
        assert not wire.requests


def test_a_connection_that_does_not_stand_in_time_is_told_as_such() -> None:
    """Its time-out is its own: nobody reads that no answer came in a time that was not waited."""

    async def knock(port: int) -> None:
        transport = Transport(1, 0.2, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        request = httpx.Request("POST", f"http://127.0.0.1:{port}/", extensions={"timeout": {"read": 5.0}})
        with pytest.raises(httpx.ConnectError, match="Connection timeout"):
            await transport.handle_async_request(request)
        await transport.aclose()

    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, contextlib.ExitStack() as crowd:
        # Once its queue is full, the kernel lets nobody else in.
        for _ in range(4):
            caller = crowd.enter_context(socket.socket())
            caller.setblocking(False)  # noqa: FBT003 - its only argument
            caller.connect_ex(deaf.getsockname())
        asyncio.run(knock(deaf.getsockname()[1]))


def test_an_answer_that_came_while_we_were_stopped_counts(tmp_path: Path) -> None:
    """A laptop that slept finds the time-out over and the answer there: nothing is in doubt."""

    async def stopped(client: Client) -> None:
        posting = asyncio.create_task(run(client))
        await asyncio.sleep(0.3)
        # Nothing of ours runs meanwhile, as under SIGSTOP; the API's thread answers.
        time.sleep(2.5)  # noqa: ASYNC251
        assert await posting

    with serving(tmp_path / "api.db", faults=(Fault.parse("post:slow=1,seconds=0.6"),)) as api:
        ask(api.base_url, stopped, key=api.api_key, seconds=2.0)

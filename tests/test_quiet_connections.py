"""Which bytes count as the answer of which request, when an API or a proxy sends more than was asked for."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.cases import in_turn
from tests.harness import until
from tests.sending import Sender, sending
from tests.wire import Act, Reply, Seen, Wire, answering, http

STRAY = http(200, {"task_id": "another"}).data
#: What an API, a proxy or a load balancer may send without being asked.
STRAYS = {
    "an answer again": STRAY,
    "an answer of another kind": http(500, {"task_id": "another"}).data,
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
each_stray = pytest.mark.parametrize("stray", STRAYS.values(), ids=STRAYS.keys())


def path(seen: Seen) -> str:
    """Name what was asked for."""
    return seen.line.split()[1].rpartition("/")[2]


def echo(seen: Seen) -> bytes:
    """Answer with what was asked for."""
    return http(200, {"task_id": path(seen)}).data


async def gone(wire: Wire, number: int) -> None:
    """Wait until a connection is over."""
    await asyncio.to_thread(until, lambda: number in wire.ended)


@each_stray
def test_bytes_between_two_requests_end_the_connection(stray: bytes) -> None:
    """They come 30 ms after the answer, while nothing is asked: the connection is closed at once."""

    async def two(send: Sender) -> list[object]:
        first = await send("/a")
        await gone(wire, 1)
        return [first.json(), (await send("/b")).json()]

    with answering(lambda seen: Reply(echo(seen), later=stray if seen.connection == 1 else b"")) as wire:
        assert sending(wire.base_url, two) == [{"task_id": "a"}, {"task_id": "b"}]
        assert [(seen.connection, path(seen)) for seen in wire.requests] == [(1, "a"), (2, "b")]


@each_stray
@pytest.mark.parametrize("body", [b"", b'{"task_id": "a"}'])
@pytest.mark.parametrize("apart", ["in one piece", "the end apart"])
def test_bytes_behind_an_answer_are_not_the_next_answer(stray: bytes, body: bytes, apart: str) -> None:
    """Head, body and stray bytes come in one piece, or the body's last byte with them: all kinds end the connection.

    Garbage right behind an answer may spoil that answer, which is asked for again.
    """
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    whole = head + body + stray
    cut = len(whole) - len(stray) - 1
    first = Reply(whole[:cut], later=whole[cut:]) if apart == "the end apart" else Reply(whole)

    async def several(send: Sender) -> list[bytes]:
        try:
            contents = [(await send("/a")).content]
        except httpx.ReadError:
            contents = [body]
        return contents + [(await send("/b")).content for _ in range(3)]

    with answering(lambda seen: first if path(seen) == "a" else Reply(echo(seen))) as wire:
        assert sending(wire.base_url, several) == [body] + [b'{"task_id": "b"}'] * 3
        if stray != b"\r\n":  # some servers end a body with it
            assert {seen.connection for seen in wire.requests if path(seen) == "b"}.isdisjoint({1})


@in_turn("stray", [STRAY, b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"220 mail.example"])
def test_bytes_before_the_first_request_prove_that_nothing_was_sent(stray: bytes) -> None:
    """What is there when the connection stands is no answer: the request is not sent on it."""

    async def slow_down() -> None:
        for _ in range(100):
            await asyncio.sleep(0)
            if wire.greeted.wait(0.2):  # blocks the loop, as a busy machine would
                return

    async def one(send: Sender) -> None:
        slow = asyncio.create_task(slow_down())
        with pytest.raises(httpx.ConnectError, match="before the request"):
            await send("/a", method="POST")
        await slow

    with answering(lambda seen: Reply(echo(seen)), greeting=stray) as wire:
        sending(wire.base_url, one, reuse=False)
        assert not wire.requests


def test_without_reuse_no_connection_carries_two_requests() -> None:
    """So a POST never reads what an earlier exchange left, nor meets a server that closes an idle connection."""

    async def three(send: Sender) -> list[tuple[object, object]]:
        answers = [await send(f"/{name}", method="POST") for name in "abc"]
        return [(answer.json()["task_id"], answer.extensions["fresh"]) for answer in answers]

    with answering(lambda seen: Reply(echo(seen), later=STRAY)) as wire:
        assert sending(wire.base_url, three, reuse=False) == [("a", True), ("b", True), ("c", True)]
        assert [seen.connection for seen in wire.requests] == [1, 2, 3]


def test_a_request_may_demand_a_fresh_connection() -> None:
    """It is told of each answer whether its connection carried another request before."""

    async def several(send: Sender) -> list[object]:
        answers = [await send("/a"), await send("/a"), await send("/a", fresh=True), await send("/a")]
        return [answer.extensions["fresh"] for answer in answers]

    with answering(lambda seen: Reply(echo(seen))) as wire:
        assert sending(wire.base_url, several) == [True, False, True, False]
        assert [seen.connection for seen in wire.requests] == [1, 1, 2, 1]


def test_fresh_requests_do_not_wait_for_others() -> None:
    """They have connections of their own: 32 silent polls hold up none."""

    async def both(send: Sender) -> object:
        silent = [asyncio.create_task(send("/silent")) for _ in range(32)]
        await asyncio.to_thread(until, lambda: len(wire.requests) == 32)
        answer = await send("/a", fresh=True)
        for task in silent:
            task.cancel()
        await asyncio.gather(*silent, return_exceptions=True)
        return answer.json()["task_id"]

    def answer(seen: Seen) -> Reply:
        return Reply(then=Act.SILENCE) if path(seen) == "silent" else Reply(echo(seen))

    with answering(answer) as wire:
        assert sending(wire.base_url, both) == "a"


@pytest.mark.parametrize("times", [1, 2])
def test_the_connection_of_an_answer_can_be_closed(times: int) -> None:
    """As for an answer that has another's task id; once more does no harm."""

    async def two(send: Sender) -> object:
        answer = await send("/a")
        for _ in range(times):
            answer.extensions["close"]()
        await gone(wire, 1)
        return (await send("/b")).json()["task_id"]

    with answering(lambda seen: Reply(echo(seen))) as wire:
        assert sending(wire.base_url, two) == "b"
        assert [seen.connection for seen in wire.requests] == [1, 2]


def test_a_connection_that_is_closed_fails_the_request_that_it_carries_meanwhile() -> None:
    """That request's answer would come from a connection that mixes them up; it is asked again on another."""

    async def two(send: Sender) -> object:
        first = await send("/a")
        second = asyncio.create_task(send("/b"))
        await asyncio.to_thread(until, lambda: len(wire.requests) == 2)
        first.extensions["close"]()
        return (await second).json()["task_id"]

    def answer(seen: Seen) -> Reply:
        silent = path(seen) == "b" and seen.connection == 1
        return Reply(then=Act.SILENCE) if silent else Reply(echo(seen))

    with answering(answer) as wire:
        assert sending(wire.base_url, two) == "b"
        assert [(seen.connection, path(seen)) for seen in wire.requests] == [(1, "a"), (1, "b"), (2, "b")]


def test_interim_answers_do_not_count_as_the_answer() -> None:
    """1xx may come before it, any number of them."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + b"HTTP/1.1 103 Early Hints\r\nlink: <x>\r\n\r\n"

    async def two(send: Sender) -> list[object]:
        return [(await send(f"/{name}")).json()["task_id"] for name in "ab"]

    with answering(lambda seen: Reply(interim + echo(seen))) as wire:
        assert sending(wire.base_url, two) == ["a", "b"]
        assert [seen.connection for seen in wire.requests] == [1, 1]

"""How much of a response is read and in which encodings: a response can't use unlimited memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zlib
from typing import Any

import pytest

from enrich.databar.http_connection import MAX_MEMBERS
from enrich.databar.transport import KEPT_START_BYTES, AnswerLost, AnswerTooLarge, HttpAnswer
from tests.support.cases import in_turn
from tests.support.raw_server import ConnectionAction, Reply, http_reply, serve_replies
from tests.support.transport_client import Sender, send_get, with_transport

MIB = 1024 * 1024
SMALL = 256 * 1024
BODY = json.dumps({"task_id": "a", "data": [{"email": f"lead-{number}@engine.example"} for number in range(5000)]})
TEXT = BODY.encode()
GZIP = gzip.compress(TEXT)


def chunked(data: bytes, size: int) -> bytes:
    """Split a body into HTTP chunks."""
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def compressed_zeros(times: int, level: int = 9) -> bytes:
    """Return `times` MiB of zeros compressed with a wrong checksum, quickly."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + block * times + packer.flush() + bytes(8)


COMPRESSED = {
    "gzip": ("gzip", GZIP),
    "gzip by its old name": ("x-gzip", GZIP),
    "gzip in other letters, with blanks": (" GZip , identity ", GZIP),
    "gzip members": ("gzip", gzip.compress(TEXT[:100]) + gzip.compress(b"") + gzip.compress(TEXT[100:])),
    "gzip, not compressed": ("gzip", gzip.compress(TEXT, 0)),
    "identity": ("identity", TEXT),
    "an empty name": ("", TEXT),
}


@pytest.mark.long
@in_turn(("encoding", "data"), COMPRESSED.values(), ids=COMPRESSED.keys())
@in_turn("chunk", [0, 1, 1000])
def test_compressed_responses_are_decompressed(encoding: str, data: bytes, chunk: int) -> None:
    """A compressed response is decompressed once, whole or in chunks of any size."""
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: %b\r\n" % encoding.encode()
    if chunk:
        reply = head + b"transfer-encoding: chunked\r\n\r\n" + chunked(data, chunk)
    else:
        reply = head + b"content-length: %d\r\n\r\n" % len(data) + data
    with serve_replies(Reply(reply)) as server:
        assert send_get(server.base_url).content == TEXT


def test_highly_compressed_body_is_complete() -> None:
    """A highly compressed body is complete, even when much of it comes out after the last byte was read."""
    for size in (0, 1, 64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, MIB + 7):
        with serve_replies(http_reply(200, gzip.compress(bytes(size)), content_encoding="gzip")) as server:
            assert send_get(server.base_url).content == bytes(size)


def test_empty_compressed_body() -> None:
    """A 429 without a body may be declared as compressed."""
    with serve_replies(http_reply(429, b"", content_encoding="gzip")) as server:
        response = send_get(server.base_url)
        assert (response.status, response.content) == (429, b"")


CORRUPT = {
    "gzip cut": ("gzip", GZIP[:-9]),
    "gzip without its checksum": ("gzip", GZIP[:-1]),
    "gzip header alone": ("gzip", GZIP[:5]),
    "one byte of gzip": ("gzip", b"\x1f"),
    "second member cut": ("gzip", GZIP + GZIP[:-20]),
    "a wrong checksum": ("gzip", GZIP[:-8] + bytes(8)),
    "bytes behind gzip": ("gzip", GZIP + b"more"),
    "no gzip": ("gzip", TEXT),
    "too many members": ("gzip", gzip.compress(b"") * (MAX_MEMBERS + 1)),
    "deflate": ("deflate", zlib.compress(TEXT)),
    "brotli": ("br", b"\x0b\x02\x80{}\x03"),
    "zstd": ("zstd", b"\x28\xb5\x2f\xfd"),
    "packed twice": ("gzip, gzip", gzip.compress(GZIP)),
    "a name that nobody has heard of": ("enrich", TEXT),
}


@in_turn(("encoding", "data"), CORRUPT.values(), ids=CORRUPT.keys())
@in_turn("status", [200, 500])
def test_corrupt_compression_is_an_error(encoding: str, data: bytes, status: int) -> None:
    """Corrupt compression is an error that does not show the body; the next request uses another connection."""

    async def two(send: Sender) -> str:
        with pytest.raises(AnswerLost) as caught:
            await send("/a")
        assert type(caught.value) is AnswerLost
        await send("/b")
        return str(caught.value)

    with serve_replies(
        lambda seen: http_reply(status, data, content_encoding=encoding) if "/a" in seen.line else http_reply(200, {})
    ) as server:
        words = with_transport(server.base_url, two)
        assert words in {
            "the compressed response is damaged",
            "the compressed response is truncated",
            "the compressed response has extra data",
            "the response has an encoding that was not requested",
        }


@in_turn("over", [-1, 0, 1, 1000])
@in_turn("packed", [True, False])
def test_response_size_limit_is_exact(over: int, packed: bool) -> None:  # noqa: FBT001 - a case
    """A response of exactly the limit is read; one byte more is an error that keeps the start."""
    data = (TEXT * 2)[: SMALL - 200 + over] if not packed else bytes(SMALL + over)
    if packed:
        reply = http_reply(200, gzip.compress(data), content_encoding="gzip")
        bound = SMALL
    else:
        reply = http_reply(200, data)
        bound = len(reply.data) - over
    with serve_replies(reply) as server:
        if over <= 0:
            assert send_get(server.base_url, max_bytes=bound).content == data
            return
        with pytest.raises(AnswerTooLarge, match="larger than") as caught:
            send_get(server.base_url, max_bytes=bound)
        assert data.startswith(caught.value.start)


ENDLESS = {
    "a body": b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\n" + TEXT * 9,
    "a body without length": b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + TEXT * 9,
    "chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + (b"3e8\r\n" + TEXT[:1000] + b"\r\n") * 900,
    "chunks of a byte": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\n{\r\n" * 100_000,
    "what a chunk says of itself": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;" + b"x" * 900_000,
    "trailers": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 100_000,
    "interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 40_000,
    "empty lines": b"\r\n" * 400_000,
    "packed": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 999999\r\n\r\n"
    + compressed_zeros(99)[:-16],
    "a header": b"HTTP/1.1 200 OK\r\nx: " + b"x" * 4_000_000,
    "a header's name": b"HTTP/1.1 200 OK\r\n" + b"x" * 4_000_000,
    "headers": b"HTTP/1.1 200 OK\r\n" + b"x-some: thing\r\n" * 100_000,
    "a reason": b"HTTP/1.1 200 " + b"x" * 4_000_000,
    "digits of a length": b"HTTP/1.1 200 OK\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n",
    "digits of a chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"0" * 900_000,
}


@in_turn("data", ENDLESS.values(), ids=ENDLESS.keys())
def test_endless_response_is_cut_at_limit(data: bytes) -> None:
    """An endless response is cut at the limit, well before its timeout, and its connection is not used again."""

    async def two(send: Sender) -> HttpAnswer:
        with pytest.raises(AnswerLost) as caught:
            await send("/a", seconds=60)
        assert "no response in" not in str(caught.value)
        return await send("/b")

    with serve_replies(
        lambda seen: Reply(data, ConnectionAction.HANG) if "/a" in seen.line else http_reply(200, {"b": 1})
    ) as server:
        assert with_transport(server.base_url, two, max_bytes=SMALL).content == b'{"b": 1}'


@pytest.mark.parametrize("packed", [True, False])
def test_start_of_oversized_response_is_kept(packed: bool) -> None:  # noqa: FBT001 - a case
    """The first 64 KiB of an oversized response are kept uncompressed, to show what came."""
    data = TEXT * 20
    reply = http_reply(200, gzip.compress(data), content_encoding="gzip") if packed else http_reply(200, data)
    with serve_replies(reply) as server:
        with pytest.raises(AnswerTooLarge) as caught:
            send_get(server.base_url, max_bytes=SMALL)
        assert caught.value.start == data[:KEPT_START_BYTES]


@in_turn("length", [b"-1", b"+5", b"5, 6", b"5x", b"0x5", b"", b"5\r\ncontent-length: 6"])
def test_invalid_content_length_is_an_error(length: bytes) -> None:
    """An invalid content length, or two different ones, is an error: the end of the response is unknown."""
    reply = Reply(b"HTTP/1.1 200 OK\r\ncontent-length: " + length + b"\r\n\r\n{}   ", ConnectionAction.CLOSE)
    with serve_replies(reply) as server, pytest.raises(AnswerLost):
        send_get(server.base_url)


def test_truncated_body_is_an_error() -> None:
    """A truncated body is an error."""
    reply = Reply(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{}", ConnectionAction.CLOSE)
    with serve_replies(reply) as server, pytest.raises(AnswerLost, match="too early"):
        send_get(server.base_url)


#: Sends requests concurrently in its own process; prints how many failed and the peak memory in KiB.
MEASURE_SCRIPT = """
import asyncio, json, resource, sys
from tests.support.transport_client import Sender, with_transport

async def ask(send: Sender) -> list[object]:
    return await asyncio.gather(*(send("/a", seconds=60) for _ in range(int(sys.argv[2]))), return_exceptions=True)

answers = with_transport(sys.argv[1], ask)
failed = [type(answer).__name__ for answer in answers if isinstance(answer, Exception)]
del answers
print(json.dumps([failed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def measure(reply: Reply, times: int) -> tuple[list[str], float]:
    """Return how many of `times` concurrent responses fail, and how much memory they take, in MiB."""
    with serve_replies(reply) as server:
        process = subprocess.run(
            [sys.executable, "-c", MEASURE_SCRIPT, server.base_url, str(times)],
            check=True,
            capture_output=True,
            text=True,
        )
    failed: list[str]
    failed, kib = json.loads(process.stdout)
    return failed, kib / 1024


def compressed_reply(data: bytes, **headers: Any) -> Reply:
    """Return a response with a body that is already compressed."""
    return http_reply(200, data, content_encoding="gzip", **headers)


@pytest.mark.long
def test_decompression_bomb_memory_limit() -> None:
    """10 GiB of zeros in 10 MiB stay within the memory limit, eight times at once, and so do slower ones."""
    times = 8
    rows = json.dumps([{"email": f"lead-{number}@engine.example"} for number in range(60_000)]).encode()
    slow = gzip.compress(rows) * 30
    _, without = measure(http_reply(200, {"task_id": "a"}), times)
    for reply in (compressed_reply(compressed_zeros(10_240)), compressed_reply(slow), http_reply(200, bytes(40 * MIB))):
        failed, memory = measure(reply, times)
        assert failed == ["AnswerTooLarge"] * times
        assert memory - without < 100

"""The wire: which connection is used, what is proved when it fails, proxies and certificates of the environment."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from enrich.api.client import Client
from enrich.api.transport import Transport
from enrich.errors import Ambiguous, CallFailed, NotAccepted
from enrich.sandbox import Fault
from tests.harness import serving, until
from tests.test_client import BODY, CREATED, KEY, ask, refused, run, task
from tests.wire import Act, Reply, answering, http


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def test_a_post_never_rides_a_connection_that_was_idle_for_long() -> None:
    """A server closes idle connections, and a POST that meets that moment would be in doubt."""

    async def three(client: Client) -> None:
        await run(client)
        await run(client)
        await asyncio.sleep(1.1)
        await run(client)

    with answering(CREATED) as wire:
        ask(wire.base_url, three)
        assert [seen.connection for seen in wire.requests] == [1, 1, 2]


def test_a_poll_may_ride_a_connection_that_was_idle() -> None:
    """Asking twice costs nothing, so connections are kept longer."""

    async def two(client: Client) -> None:
        await task(client)
        await asyncio.sleep(1.1)
        await task(client)

    with answering(http(200, {"status": "processing"})) as wire:
        ask(wire.base_url, two)
        assert [seen.connection for seen in wire.requests] == [1, 1]


def test_a_kept_connection_that_dies_under_a_post_leaves_a_doubt() -> None:
    """The bytes left on it: that it was an old connection proves nothing, and nothing is sent again."""
    replies = iter([CREATED, Reply(then=Act.CLOSE), CREATED])

    async def two(client: Client) -> None:
        await run(client)
        with pytest.raises(CallFailed) as caught:
            await run(client)
        assert type(caught.value) is Ambiguous

    with answering(lambda _: next(replies)) as wire:
        ask(wire.base_url, two)
        assert [seen.connection for seen in wire.requests] == [1, 1]


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
        await asyncio.sleep(0.1)
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


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_the_certificates_of_the_environment_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown certificate ends the connection before the key is sent; `SSL_CERT_FILE` makes it known."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=loopback"
    name = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", *options.split(), *name, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with answering(CREATED, tls=context) as wire:
        base_url = f"https://127.0.0.1:{wire.port}/v1"
        assert type(refused(base_url, run)) is NotAccepted
        assert not wire.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert ask(base_url, run) == "t-1"


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """Some companies let nothing out but through one; `NO_PROXY` names what needs none."""
    with answering(CREATED) as proxy, answering(CREATED) as wire:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        assert ask(wire.base_url, run) == "t-1"
        assert [seen.line for seen in proxy.requests] == [f"POST {wire.base_url}/waterfalls/email_getter/run HTTP/1.1"]
        assert proxy.requests[0].body == BODY
        assert not wire.requests
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert ask(wire.base_url, run) == "t-1"
        assert (len(proxy.requests), len(wire.requests)) == (1, 1)


@pytest.mark.parametrize("status", [403, 407, 502])
def test_a_proxy_that_opens_no_tunnel_accepted_nothing(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """It is asked for the way only: neither the request nor the key is shown to it."""
    with answering(http(status)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        assert type(refused("https://api.example/v1", run)) is NotAccepted
        assert [seen.line for seen in proxy.requests] == ["CONNECT api.example:443 HTTP/1.1"]
        assert KEY not in proxy.requests[0].head


def test_a_proxy_that_is_not_there_accepted_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection to the proxy is no connection."""
    with answering(CREATED) as wire:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        assert type(refused(wire.base_url, run)) is NotAccepted
        assert not wire.requests


def test_a_connection_that_does_not_stand_in_time_is_told_as_such() -> None:
    """Its time-out is its own: nobody reads that no answer came in a time that was not waited."""

    async def knock(port: int) -> None:
        transport = Transport(1, 1.0, 0.2, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
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
        await asyncio.sleep(0.15)
        # Nothing of ours runs meanwhile, as under SIGSTOP; the API's thread answers.
        time.sleep(1.2)  # noqa: ASYNC251
        assert await posting

    with serving(tmp_path / "api.db", faults=(Fault.parse("post:slow=1,seconds=0.4"),)) as api:
        ask(api.base_url, stopped, key=api.api_key, seconds=0.8)

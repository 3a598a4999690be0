"""A minimal server that sends exact bytes at chosen times, or breaks the connection."""

from __future__ import annotations

import json
import socket
import socketserver
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from threading import Event, Thread
from typing import Any


class ConnectionAction(Enum):
    """What the server does with the connection after a reply, which may be empty."""

    KEEP = "keep"
    CLOSE = "close"
    RESET = "reset"
    HANG = "silence"


@dataclass(frozen=True)
class ReceivedRequest:
    """A request as received; `connection` counts from 1."""

    connection: int
    head: str
    body: bytes

    @property
    def line(self) -> str:
        """The request line."""
        return self.head.partition("\r\n")[0]


@dataclass(frozen=True)
class Reply:
    """The bytes of a reply; `stray_bytes` follow without a request, after the event `stray_after` or 30 ms."""

    data: bytes = b""
    action: ConnectionAction = ConnectionAction.KEEP
    stray_bytes: bytes = b""
    stray_after: Event | None = None


@dataclass
class RawServer:
    """A running server; `greeting_sent`: it sent its greeting; `closed_connections`: numbers of ended connections."""

    port: int
    requests: list[ReceivedRequest] = field(default_factory=list)
    connections: int = 0
    closed_connections: list[int] = field(default_factory=list)
    greeting_sent: Event = field(default_factory=Event)

    @property
    def base_url(self) -> str:
        """The base URL of the API."""
        return f"http://127.0.0.1:{self.port}/v1"


def http_reply(status: int, body: object = None, **headers: str) -> Reply:
    """Make an HTTP reply; a body other than bytes is written as JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Reason", f"content-length: {len(data)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return Reply("\r\n".join([*lines, "", ""]).encode() + data)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, answer: Reply | Callable[[ReceivedRequest], Reply], tls: ssl.SSLContext | None, greeting: bytes = b""
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.greeting = greeting
        self.tls = tls
        self.stopping = Event()
        self.raw_server = RawServer(self.server_address[1])

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self.greeting:
            connection.sendall(self.greeting)
            self.raw_server.greeting_sent.set()
        return (self.tls.wrap_socket(connection, server_side=True) if self.tls else connection), address

    def handle_error(self, *_: Any) -> None:
        """Print nothing: the other side may close the connection at any time."""


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        server = self.server.raw_server
        server.connections += 1
        number = server.connections
        with suppress(OSError):
            self._serve(server, number)
        server.closed_connections.append(number)

    def _serve(self, server: RawServer, number: int) -> None:
        while head := self._read_head():
            seen = ReceivedRequest(number, head, self.rfile.read(_content_length(head)))
            server.requests.append(seen)
            answer = self.server.answer
            reply = answer if isinstance(answer, Reply) else answer(seen)
            self.wfile.write(reply.data)
            if reply.stray_bytes:
                if reply.stray_after:
                    reply.stray_after.wait(30)
                else:
                    time.sleep(0.03)
                self.wfile.write(reply.stray_bytes)
            if reply.action is ConnectionAction.HANG:
                self.server.stopping.wait()
            if reply.action is ConnectionAction.RESET:
                # A linger time of zero makes the kernel send RST instead of FIN.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if reply.action is not ConnectionAction.KEEP:
                return

    def _read_head(self) -> str:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            try:
                line = self.rfile.readline()
            except OSError:
                return ""
            if not head and not line[:1].isalpha():
                self.wfile.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" if line else b"")
                return ""
            if not line:
                return ""
            head += line
        return head.decode("latin-1")


@contextmanager
def serve_replies(
    answer: Reply | Callable[[ReceivedRequest], Reply], tls: ssl.SSLContext | None = None, greeting: bytes = b""
) -> Iterator[RawServer]:
    """Serve on loopback, in threads, until the block ends; `greeting` is sent before any request."""
    with _Server(answer, tls, greeting) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server.raw_server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()


def _content_length(head: str) -> int:
    for line in head.splitlines():
        name, _, value = line.partition(":")
        if name.lower() == "content-length":
            return int(value)
    return 0


def unused_port() -> int:
    """Return a port without a listener."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port

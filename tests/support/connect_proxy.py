"""A CONNECT proxy on loopback, and certificates for the servers behind it."""

from __future__ import annotations

import socket
import socketserver
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import trustme


@dataclass(frozen=True)
class Certificate:
    """A server's certificate: the file that a client trusts, and the server's key."""

    file: Path
    key: Path
    leaf: trustme.LeafCert

    def server(self) -> ssl.SSLContext:
        """Return the TLS context of a server with this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.leaf.configure_cert(context)
        return context


def make_certificate(folder: Path, name: str, *, expired: bool = False) -> Certificate:
    """Make a certificate for a host name or an IP address."""
    authority = trustme.CA()
    leaf = authority.issue_cert(name, not_after=datetime.now(UTC) - timedelta(days=1) if expired else None)
    made = Certificate(folder / "certificate.pem", folder / "key.pem", leaf)
    authority.cert_pem.write_to_path(made.file)
    leaf.private_key_pem.write_to_path(made.key)
    return made


@dataclass
class ConnectProxy:
    """A running proxy; `request_heads` are the request heads as received."""

    port: int
    request_heads: list[str] = field(default_factory=list)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, target: int, tls: ssl.SSLContext | None, refusal: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.tls, self.refusal = target, tls, refusal
        self.proxy = ConnectProxy(self.server_address[1])

    def handle_error(self, *_: Any) -> None:
        """Print nothing: the other side may close the connection at any time."""


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        if self.server.tls is None:
            self._tunnel(self.request)
        else:
            with self.server.tls.wrap_socket(self.request, server_side=True) as tls_client:
                self._tunnel(tls_client)

    def _tunnel(self, client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            if not (byte := client.recv(1)):
                return
            head += byte
        self.server.proxy.request_heads.append(head.decode("latin-1"))
        if self.server.refusal:
            client.sendall(self.server.refusal)
            return
        with socket.create_connection(("127.0.0.1", self.server.target)) as upstream:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = Thread(target=_pump, args=(upstream, client), daemon=True)
            back.start()
            _pump(client, upstream)
            back.join(10)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


@contextmanager
def serve_connect_proxy(target: int, tls: ssl.SSLContext | None = None, refusal: bytes = b"") -> Iterator[ConnectProxy]:
    """Connect every tunnel to a port on loopback whatever host was requested, or refuse with these bytes."""
    with _Server(target, tls, refusal) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server.proxy
        finally:
            server.shutdown()
            thread.join()

"""A CONNECT proxy on loopback, and certificates for the servers behind it."""

from __future__ import annotations

import secrets
import socket
import socketserver
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate and its key."""

    file: Path
    key: Path

    def server(self) -> ssl.SSLContext:
        """Return the TLS context of a server with this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file, self.key)
        return context


def make_certificate(folder: Path, name: str, days: int = 1) -> Certificate:
    """Make a certificate for `DNS:…` or `IP:…`; a negative number of days makes it expired."""
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    request, extensions = folder / "request.pem", folder / "extensions"
    extensions.write_text(f"subjectAltName={name}\n")
    # Each has its own subject, because trusted certificates are looked up by subject.
    kind = f"-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={secrets.token_hex(8)}"
    _openssl(f"req -new {kind}", "-keyout", str(made.key), "-out", str(request))
    sign = ["-in", str(request), "-signkey", str(made.key), "-extfile", str(extensions), "-out", str(made.file)]
    _openssl(f"x509 -req -days {days}", *sign)
    return made


def _openssl(command: str, *files: str) -> None:
    subprocess.run(["openssl", *command.split(), *files], check=True, capture_output=True)


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

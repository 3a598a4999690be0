"""A connection pooler before a PostgreSQL server, which behaves like PgBouncer in transaction or in session mode."""

from __future__ import annotations

import secrets
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

#: Requests for TLS and for GSSAPI, sent before the startup message. The pooler has neither.
ENCRYPTION_REQUESTS = (80_877_103, 80_877_104)
#: Messages after which the server answers up to `ReadyForQuery`.
QUERY, SYNC, TERMINATE, READY, BACKEND_KEY = b"Q", b"S", b"X", b"Z", b"K"
IDLE = b"I"
AUTHENTICATION = b"R"
#: Messages about the login that the client does not answer: the login is complete; the last one of SCRAM.
NO_ANSWER_EXPECTED = (struct.pack("!i", 0), struct.pack("!i", 12))


def _read(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        if not (more := connection.recv(size - len(found))):
            raise EOFError
        found += more
    return found


def _read_message(connection: socket.socket) -> tuple[bytes, bytes]:
    kind = _read(connection, 1)
    (size,) = struct.unpack("!i", _read(connection, 4))
    return kind, _read(connection, size - 4)


def _send_message(connection: socket.socket, kind: bytes, body: bytes) -> None:
    connection.sendall(kind + struct.pack("!i", len(body) + 4) + body)


@dataclass
class _Pooler:
    server_port: int
    per_transaction: bool
    #: Idle connections to the server; the one used last is used next.
    idle: list[socket.socket] = field(default_factory=list)

    def serve(self, client: socket.socket) -> None:
        """Serve one client until it leaves."""
        with client, suppress(OSError, EOFError), ExitStack() as stack:
            server: socket.socket | None = (first := self._log_in(client))
            if not self.per_transaction:
                stack.enter_context(first)
            while True:
                if server is not None and self.per_transaction:
                    self.idle.append(server)
                    server = None
                status = b""
                while status != IDLE:
                    kind, body = _read_message(client)
                    if kind == TERMINATE:
                        return
                    server = server or self.idle.pop()
                    _send_message(server, kind, body)
                    if kind in {QUERY, SYNC}:
                        status = self._relay_answer(server, client)

    def _log_in(self, client: socket.socket) -> socket.socket:
        """Let the client log in to a new connection to the server."""
        while True:
            (size,) = struct.unpack("!i", _read(client, 4))
            body = _read(client, size - 4)
            if struct.unpack("!i", body[:4])[0] not in ENCRYPTION_REQUESTS:
                break
            client.sendall(b"N")
        server = socket.create_connection(("127.0.0.1", self.server_port))
        for connection in (client, server):  # a message that is not sent at once waits 40 ms for the other end's ACK
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.sendall(struct.pack("!i", size) + body)
        self._relay_answer(server, client)
        return server

    @staticmethod
    def _relay_answer(server: socket.socket, client: socket.socket) -> bytes:
        """Relay what the server sends up to `ReadyForQuery`, and the client's part of a login. Return the status.

        The server's process id is not passed on.
        """
        while True:
            kind, body = _read_message(server)
            if kind == BACKEND_KEY:
                body = secrets.token_bytes(3).rjust(4, b"\0") + body[4:]
            _send_message(client, kind, body)
            if kind == AUTHENTICATION and body[:4] not in NO_ANSWER_EXPECTED:
                _send_message(server, *_read_message(client))
            if kind == READY:
                return body


@contextmanager
def postgres_pooler(server_port: int, *, per_transaction: bool) -> Iterator[int]:
    """Run a pooler before the server at a port of this machine; yield the pooler's port."""
    pooler = _Pooler(server_port, per_transaction)
    clients: list[socket.socket] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                clients.append(client)
                threading.Thread(target=pooler.serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in (*clients, *pooler.idle):
                connection.close()

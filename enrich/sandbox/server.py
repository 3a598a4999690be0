"""Serves the sandbox on loopback: in a background thread, for tests, or in the foreground."""

import asyncio
import signal
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from enrich.sandbox.app import build_app
from enrich.sandbox.catalogue import to_micros
from enrich.sandbox.faults import TRANSPORT_KEY, App, Message, Receive, Send
from enrich.sandbox.settings import DEFAULTS, SandboxSettings
from enrich.sandbox.store import SandboxStore

_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class SandboxEndpoint:
    """The sandbox's base URL, and the API key it accepts."""

    base_url: str
    api_key: str = field(repr=False)


@contextmanager
def serve_in_thread(state: Path, settings: SandboxSettings = DEFAULTS, port: int = 0) -> Iterator[SandboxEndpoint]:
    """Serve in a background thread until the block ends; the state file remains."""
    with _bind(port) as listener, closing(SandboxStore(state, to_micros(settings.balance))) as store:
        server = _Server(store, settings)
        thread = Thread(target=server.run, args=([listener],), name="sandbox", daemon=True)
        thread.start()
        server.ready.wait()
        try:
            yield SandboxEndpoint(_url(listener), settings.api_key)
        finally:
            server.stop()
            thread.join()


def serve(state: Path, settings: SandboxSettings, port: int) -> None:
    """Serve in the foreground until SIGTERM, SIGINT or SIGHUP; prints URL and key on stdout once it listens."""
    with _bind(port) as listener, closing(SandboxStore(state, to_micros(settings.balance))) as store:

        def announce() -> None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup, or a shell's `&`
                    asyncio.get_running_loop().add_signal_handler(number, server.stop)
            lines = f"DATABAR_BASE_URL={_url(listener)}\nDATABAR_API_KEY={settings.api_key}\n"
            print(lines, end="", flush=True)  # noqa: T201  # the command's output

        server = _Server(store, settings, announce)
        server.run([listener])


def _bind(port: int) -> socket.socket:
    # Name the protocol: only then does asyncio turn off Nagle's algorithm, which delays each answer by 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, f"port {port}") from None
    return listener


def _url(listener: socket.socket) -> str:
    return f"http://{_HOST}:{listener.getsockname()[1]}/v1"


#: Turns of the event loop until a connection that was just accepted is listed, plus one in which its end is handled.
_TURNS_TO_CLOSE = 4


class _Protocol(HttpToolsProtocol):
    """Passes the connection to the application, which breaks it for some faults."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app: App = self.app

        async def with_transport(scope: Message, receive: Receive, send: Send) -> None:
            scope[TRANSPORT_KEY] = transport
            await app(scope, receive, send)

        self.app = with_transport


class _Server(uvicorn.Server):
    """A uvicorn server that starts and stops at once, and leaves signals to its caller."""

    def __init__(
        self, store: SandboxStore, settings: SandboxSettings, announce: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(store, settings),
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,  # uvicorn would close the handlers of the whole program
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                date_header=False,
                server_header=False,
            )
        )
        self.ready = Event()
        self._announce = announce

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        finally:
            # Also after a failed start: the thread that waits for it must continue.
            self.ready.set()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    def stop(self) -> None:
        """Request the stop; callable from any thread."""
        self._loop.call_soon_threadsafe(self._stopping.set)

    async def main_loop(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._announce()
        self.ready.set()
        await self._stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002  # uvicorn's signature
        """Drop every connection: a client that waits during a silence must not delay the stop."""
        for server in self.servers:
            server.close()
        for _ in range(_TURNS_TO_CLOSE):
            await asyncio.sleep(0)
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

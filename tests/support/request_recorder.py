"""Records HTTP requests, reads the log, and checks both for personal data."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.workspace import Workspace

MIN_WORD_LENGTH = 4


@dataclass(frozen=True)
class RecordedRequest:
    """One request."""

    path: str
    query: dict[str, list[str]]
    body: str


@dataclass
class RequestRecorder:
    """A server on loopback that records all POSTs; `statuses` are the next status codes, then 200."""

    port: int = 0
    requests: list[RecordedRequest] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    #: Responses wait for this event.
    release: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """A secret URL, as healthcheck services use."""
        return f"http://127.0.0.1:{self.port}/secret-path"

    @property
    def paths(self) -> list[str]:
        """The requested paths, in order."""
        return [request.path for request in self.requests]


@contextmanager
def record_requests() -> Iterator[RequestRecorder]:
    """Record requests on loopback."""
    recorder = RequestRecorder()
    recorder.release.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
            recorder.requests.append(RecordedRequest(parts.path, parse_qs(parts.query), body))
            status = recorder.statuses.pop(0) if recorder.statuses else 200
            recorder.release.wait(30)
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client has disconnected
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    recorder.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield recorder
    finally:
        recorder.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


def log_lines(workspace: Workspace, name: str = "run.log") -> list[dict[str, Any]]:
    """Read the log; every line is complete JSON."""
    return [json.loads(line) for line in (workspace.folder / name).read_text(encoding="utf-8").splitlines()]


def log_events(workspace: Workspace, name: str = "run.log") -> list[str]:
    """Return the events of the log, in order."""
    return [line["event"] for line in log_lines(workspace, name)]


def personal_data(workspace: Workspace) -> set[str]:
    """Return every input cell, every answer and their parts, except words too short to be distinctive."""
    found: set[str] = set()
    with (workspace.folder / "leads.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in list(csv.reader(file))[1:] for cell in row]
    if (workspace.folder / "out.csv").exists():
        cells += [row["work_email"] for row in workspace.read_output()]
    for cell in cells:
        found |= {cell, *cell.replace("@", " ").replace("/", " ").split()}
    return {word for word in found if len(word) >= MIN_WORD_LENGTH}


def assert_no_personal_data(text: str, workspace: Workspace) -> None:
    """Assert that the text has no cell, no answer and no email address."""
    assert [word for word in personal_data(workspace) if word in text] == []
    assert "@" not in text


def searchable_leads(count: int, start: int = 0) -> list[list[str]]:
    """Make leads whose every cell is distinctive enough to search for."""
    return [
        [f"Adalbert{n}", f"Byronsson{n}", f"https://enginesmith{n}.example/about", "", f"private{n}"]
        for n in range(start, start + count)
    ]

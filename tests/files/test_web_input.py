"""Input from web addresses: redirects, login pages, secrets, limits, and changes during a run."""

from __future__ import annotations

import gzip
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread

import pytest

from enrich.errors import CommandRefused
from enrich.files import web_download
from enrich.files.reader import InputTable
from enrich.job.job import load_job
from enrich.job.locations import WebUrl, parse_input_location
from enrich.job.spec import Input
from tests.support.cases import first_quick
from tests.support.workspace import SandboxApi, Workspace

LEADS = "First Name,Last Name,Website,Email,Note\nAda,Lovelace,engine.example,,\nAlan,Turing,machine.example,,\n"
LOGIN_PAGE = "\ufeff \n<!DOCTYPE html><html><body><form>Sign in</form></body></html>"
SECRET = "secret-token-1234567890"


@dataclass(frozen=True)
class Answer:
    """What the server answers to a GET. Without a length the end of the connection ends the body."""

    body: bytes = LEADS.encode()
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    has_length: bool = False
    cut_after: int | None = None


@dataclass
class WebServer:
    """A server on loopback. `answers` maps a path to what it answers, in turn; the last one stays."""

    port: int = 0
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    on_request: Callable[[str], None] = lambda _: None

    def url(self, path: str) -> str:
        """Return the address of a path."""
        return f"http://127.0.0.1:{self.port}{path}"

    def gets(self, path: str) -> int:
        """Count the requests for a path."""
        return sum(target == path for _, target, _ in self.requests)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """Serve on loopback. Tries follow each other at once."""
    monkeypatch.setattr(web_download, "RETRY_PAUSE_S", 0)
    server = WebServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append(
                (self.command, self.path, {name.lower(): text for name, text in self.headers.items()})
            )
            server.on_request(self.path)
            answers = server.answers[self.path]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            if answer.has_length or answer.cut_after is not None:
                self.send_header("content-length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body[: answer.cut_after])

        def log_message(self, *_: object) -> None:
            pass

        do_HEAD = do_POST = do_GET  # noqa: N815 - the names of the library

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.port = http.server_port
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        http.shutdown()
        thread.join()


def redirect(target: str, status: int = 302, *cookies: str) -> Answer:
    """Return a redirect that sets cookies."""
    return Answer(b"moved", status, (("location", target), *(("set-cookie", cookie) for cookie in cookies)))


def read(url: str, **settings: str) -> list[list[str]]:
    """Read all cells of an input."""
    location = parse_input_location(Path("/"), url)
    table = InputTable(location, Input.model_validate({"path": url, **settings}))
    return [list(row) for frame in table.batches() for row in frame.rows()]


def test_a_table_is_read_without_length_etag_and_head(web: WebServer) -> None:
    """One GET is enough, and the path's ending gives the format, whatever the query is."""
    web.answers["/export?format=csv&gid=0"] = [Answer()]
    web.answers["/leads.jsonl?v=1.csv"] = [Answer(b'{"a": "1"}\n')]
    web.answers["/leads.tsv?x"] = [Answer(b"a\tb\n1\t2\n", has_length=True)]
    assert [row[0] for row in read(web.url("/export?format=csv&gid=0"))] == ["Ada", "Alan"]
    assert read(web.url("/leads.jsonl?v=1.csv")) == [["1"]]
    assert read(web.url("/leads.tsv?x")) == [["1", "2"]]
    assert [method for method, _, _ in web.requests] == ["GET"] * 3


@pytest.mark.parametrize("encoded", [True, False])
def test_compressed_tables_are_unpacked(web: WebServer, encoded: bool) -> None:  # noqa: FBT001 - a case
    """Both a compressed file and a compressed transfer, whatever the name is."""
    headers = (("content-encoding", "gzip"),) if encoded else (("content-type", "application/gzip"),)
    web.answers["/leads"] = [Answer(gzip.compress(LEADS.encode()), headers=headers)]
    web.answers["/leads.csv.gz"] = web.answers["/leads"]
    assert [row[0] for row in read(web.url("/leads"))] == ["Ada", "Alan"]
    assert [row[0] for row in read(web.url("/leads.csv.gz"))] == ["Ada", "Alan"]


def test_redirects_are_followed_without_key_and_cookies(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request has the key, a cookie, a password from the address or a referrer."""
    monkeypatch.setenv("DATABAR_API_KEY", SECRET)
    web.answers["/a"] = [redirect("/b", 302, f"session={SECRET}; Path=/")]
    web.answers["/b"] = [redirect(f"http://user:{SECRET}@127.0.0.1:{web.port}/c", 307, "other=1")]
    web.answers["/c"] = [redirect(web.url("/d").replace("127.0.0.1", "localhost"), 308)]
    web.answers["/d"] = [Answer()]
    assert len(read(web.url("/a"))) == 2
    assert [path for _, path, _ in web.requests] == ["/a", "/b", "/c", "/d"]
    for _, _, headers in web.requests:
        assert headers.keys() <= {"host", "accept", "accept-encoding", "connection", "user-agent"}
        assert SECRET not in str(headers)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([Answer(LOGIN_PAGE.encode())], "is a web page"),
        ([Answer(LOGIN_PAGE.encode("utf-16"), headers=(("content-type", "text/csv"),))], "is a web page"),
        ([Answer(b"<?xml version='1.0'?><Error/>")], "is a web page"),
        ([Answer(status=401)], "needs a login: HTTP 401"),
        ([Answer(status=403)], "needs a login: HTTP 403"),
        ([Answer(status=404)], "does not exist"),
        ([Answer(status=418)], "HTTP 418"),
        ([Answer(status=206)], "HTTP 206"),
        ([Answer(status=503)], "HTTP 503"),
        ([Answer(cut_after=20)], "the connection failed"),
        ([Answer(b"no gzip", headers=(("content-encoding", "gzip"),))], "the connection failed"),
        ([redirect("/x")], "redirects more than"),
        ([redirect("http://crm.example/leads.csv")], "not https://: crm.example"),
        ([redirect("ftp://127.0.0.1/x")], "cannot be read"),
    ],
)
def test_what_is_no_table_is_refused(web: WebServer, answers: list[Answer], message: str) -> None:
    """A login page, an error and an endless redirect are refused, and no text quotes the secret of the address."""
    web.answers[f"/x?key={SECRET}"] = web.answers["/x"] = answers
    with pytest.raises(CommandRefused, match=message) as refused:
        read(web.url(f"/x?key={SECRET}"))
    assert refused.value.exit_code == 5
    assert SECRET not in f"{refused.value.message} {refused.value.hint}"


def test_a_passing_failure_is_tried_again(web: WebServer) -> None:
    """A 503 and a broken connection are followed by another try, which begins anew."""
    web.answers["/x.csv"] = [Answer(status=503), Answer(cut_after=60), Answer()]
    assert [row[0] for row in read(web.url("/x.csv"))] == ["Ada", "Alan"]
    web.answers["/x.csv"] = [Answer(status=503)]
    with pytest.raises(CommandRefused):
        read(web.url("/x.csv"))
    assert web.gets("/x.csv") == 3 + web_download.TRIES


def test_downloads_are_bounded(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many bytes, also once unpacked, and too much time end a download."""
    packed = gzip.compress(b"a\n" * 100_000)
    web.answers["/x.csv"] = [Answer(packed, headers=(("content-encoding", "gzip"),))]
    monkeypatch.setattr(web_download, "MAX_BYTES", 100_000)
    with pytest.raises(CommandRefused, match="more than 100,000 bytes"):
        read(web.url("/x.csv"))
    monkeypatch.undo()
    monkeypatch.setattr(web_download, "MAX_SECONDS", -1)
    with pytest.raises(CommandRefused, match="takes longer"):
        web_download.download(WebUrl(web.url("/x.csv")), BytesIO())


def test_a_server_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few tries the message says that the server cannot be reached."""
    monkeypatch.setattr(web_download, "RETRY_PAUSE_S", 0)
    with pytest.raises(CommandRefused, match="cannot be reached"):
        read("http://127.0.0.1:9/leads.csv")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://crm.example/leads.csv", "must be an https:// address"),
        ("https://user:pass@crm.example/leads.csv", "have no user"),
        ("https:///leads.csv", "must be an address"),
        ("https://crm.example/a b.csv", "must be an address"),
        ("https://crm.example:99999/leads.csv", "[Pp]ort"),
        ('"https://[::1/leads.csv"', "input: "),
    ],
)
def test_unusable_addresses_are_errors_of_the_job(workspace: Workspace, url: str, message: str) -> None:
    """They are exit 2 when the job is loaded, before anything is asked."""
    workspace.write_job(input=url)
    result = workspace.run_in_process("check", "job.yaml")
    assert (result.exit_code, "job.yaml:2: input: " in result.stderr) == (2, True)
    assert re.search(message, result.stderr)
    result = workspace.run_in_process("run", "job.yaml", "--input", url.strip('"'), "--sandbox")
    assert (result.exit_code, "pass" in result.stderr.replace("password", "")) == (2, False)


def test_outputs_are_not_sent_to_the_web(workspace: Workspace) -> None:
    """An https output is refused with the reason."""
    workspace.write_job(output="https://crm.example/out.csv")
    result = workspace.run_in_process("check", "job.yaml")
    assert (result.exit_code, "is for input only" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("url", "shown", "stem"),
    [
        (f"https://docs.example/d/{SECRET}/export?format=csv", "https://docs.example/…", "job"),
        (
            f"https://crm.example:8443/x/{SECRET}/leads.csv.gz?k={SECRET}",
            "https://crm.example:8443/…/leads.csv.gz",
            "leads",
        ),
    ],
)
def test_addresses_are_shown_without_secrets(workspace: Workspace, url: str, shown: str, stem: str) -> None:
    """As text an address has only its host and, if it is that of a table, its file."""
    text = workspace.write_job(input=f'"{url}"').read_text(encoding="utf-8").replace("output: out.csv\n", "")
    workspace.job_file.write_text(text, encoding="utf-8")
    job = load_job(workspace.job_file)
    assert (str(job.input_path), job.output.path) == (shown, f"{stem}_enriched.csv")


def test_a_run_reads_one_private_copy(
    web: WebServer, workspace: Workspace, api: SandboxApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run downloads the input, looks at it once more at its end, removes its copies, and shows no secret."""
    monkeypatch.setattr(tempfile, "tempdir", str(workspace.folder))
    path = f"/leads.csv?key={SECRET}"
    web.answers[path] = [Answer()]
    modes: list[int] = []
    web.on_request = lambda _: modes.extend(
        file.stat().st_mode & 0o777 for file in workspace.folder.glob("enrich-copies-*/*")
    )
    result = workspace.run_in_process(
        "run", "job.yaml", "--input", web.url(path), "--log-file", "run.log", "--summary", api=api
    )
    assert (result.exit_code, web.gets(path)) == (0, 2)
    assert [row["First Name"] for row in workspace.read_output()] == ["Ada", "Alan"]
    assert set(modes) == {0o600}
    assert not list(workspace.folder.glob("enrich-copies-*"))
    log = (workspace.folder / "run.log").read_text(encoding="utf-8")
    assert SECRET not in result.stderr + result.stdout + log
    assert SECRET.encode() not in workspace.ledger_path.read_bytes()
    again = workspace.run_in_process("run", "job.yaml", "--input", web.url(path), "--json", api=api).json_output
    assert (again["submitted"], again["reused"]) == (0, 2)


def test_a_login_page_is_exit_5(web: WebServer, workspace: Workspace, api: SandboxApi) -> None:
    """`run` and `plan` refuse a login page, and nothing is sent."""
    web.answers["/leads.csv"] = [redirect("/login")]
    web.answers["/login"] = [Answer(LOGIN_PAGE.encode())]
    workspace.write_job(input=web.url("/leads.csv"))
    for command in ("run", "plan"):
        result = workspace.run_in_process(command, "job.yaml", api=api)
        assert (result.exit_code, "is a web page" in result.stderr) == (5, True)
    assert api.audit()["accepted"] == 0
    assert workspace.run_in_process("check", "job.yaml").exit_code == 0


def test_other_cells_at_the_end_are_a_changed_input(web: WebServer, workspace: Workspace, api: SandboxApi) -> None:
    """New rows while the run was at work are in the output, but not sent: exit 4. The next run sends them."""
    grown = Answer((LEADS + "Grace,Hopper,compiler.example,,\n").encode())
    web.answers["/leads.csv"] = [Answer(), grown]
    workspace.write_job(input=web.url("/leads.csv"))
    first = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    assert (first.exit_code, first.json_output["submitted"], first.json_output["pending"]) == (4, 2, 1)
    assert [row["First Name"] for row in workspace.read_output()] == ["Ada", "Alan", "Grace"]
    second = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    assert (second.exit_code, second.json_output["submitted"]) == (0, 1)


@pytest.mark.parametrize(
    "at_the_end",
    first_quick(1, [Answer(LEADS.replace("Ada", '"Ada"').encode()), Answer(status=500), Answer(LOGIN_PAGE.encode())]),
    ids=["other bytes", "failing", "login"],
)
def test_equal_cells_and_failures_at_the_end_are_no_change(
    web: WebServer, workspace: Workspace, api: SandboxApi, at_the_end: Answer
) -> None:
    """What counts are the cells. An address that fails at the end of a run does not fail the run."""
    web.answers["/leads.csv"] = [Answer(), at_the_end]
    workspace.write_job(input=web.url("/leads.csv"))
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    assert len(workspace.read_output()) == 2

"""The server starts and stops quickly and keeps everything that it has accepted."""

import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

import httpx
import pytest
from click.testing import CliRunner

from enrich.cli import run_command
from enrich.commands.sandbox import sandbox
from enrich.errors import install_hint
from enrich.sandbox.server import serve_in_thread
from enrich.sandbox.settings import SandboxSettings
from tests.sandbox.conftest import SandboxClient, make_leads
from tests.support.cases import in_turn
from tests.support.program import reset_signals

INSTANT = SandboxSettings(latency="fixed(0)")


@contextmanager
def start_process(*options: str) -> Iterator[tuple[subprocess.Popen[str], SandboxClient]]:
    """Run `enrich sandbox`; return the process and a client."""
    command = [sys.executable, "-m", "enrich", "sandbox", "--latency", "fixed(0)", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=reset_signals
    ) as running:
        assert running.stdout
        try:
            lines = dict(running.stdout.readline().strip().split("=", 1) for _ in range(2))
            assert [*lines] == ["DATABAR_BASE_URL", "DATABAR_API_KEY"]
            api = SandboxClient(*lines.values())
            with api.http:
                yield running, api
        finally:
            running.kill()


def open_client(stack: ExitStack, state: Path, settings: SandboxSettings = INSTANT) -> SandboxClient:
    """Serve a state file in this process."""
    running = stack.enter_context(serve_in_thread(state, settings))
    api = SandboxClient(running.base_url, running.api_key)
    stack.callback(api.http.close)
    return api


def test_restart_keeps_state(tmp_path: Path) -> None:
    """Tasks, credits and the clock survive a restart."""
    state = tmp_path / "state.db"
    with ExitStack() as stack:
        api = open_client(stack, state)
        before = [api.submit_and_get(params) for params in make_leads(5)]
        api.advance(1_000)
        totals, now = api.audit(), api.advance(0)["now"]
    with ExitStack() as stack:
        api = open_client(stack, state, SandboxSettings(latency="fixed(0)", balance=5))
        assert [api.task_body(task["task_id"]) for task in before] == before
        after = api.audit()
        since_the_start = {"requests": {}, "busiest_second": 0}
        assert after | since_the_start == totals | since_the_start
        assert api.advance(0)["now"] >= now


@pytest.mark.long
def test_kill_keeps_accepted_tasks(tmp_path: Path) -> None:
    """Accepted tasks survive a kill -9."""
    state = tmp_path / "state.db"
    with start_process("--state", str(state)) as (running, api):
        tasks = [api.submit(params) for params in make_leads(20)]
        running.kill()
        running.wait()
    with ExitStack() as stack:
        api = open_client(stack, state)
        assert all(api.get_task(task_id).status_code == 200 for task_id in tasks)
        assert api.audit()["accepted"] == 20


def test_state_is_private(tmp_path: Path) -> None:
    """The state file is made readable for its owner only, even if it was not before."""
    state = tmp_path / "state.db"
    state.touch(0o644)
    with serve_in_thread(state):
        modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o600}


def test_second_sandbox_on_same_state_is_refused(tmp_path: Path) -> None:
    """A second sandbox on the same state is refused."""
    with serve_in_thread(tmp_path / "state.db"):
        result = CliRunner().invoke(sandbox, ["--state", str(tmp_path / "state.db")])
    assert "state.db: the sandbox cannot use it: database is locked" in str(result.exception)


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    """A file that is no sandbox state is refused."""
    (tmp_path / "leads.csv").write_text("First Name,Last Name\n" * 100)
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE leads (name TEXT)")
    other.close()
    for path in tmp_path.iterdir():
        before, mode = path.read_bytes(), path.stat().st_mode
        result = CliRunner().invoke(sandbox, ["--state", str(path)])
        assert f"{path.name}: the sandbox cannot use it" in str(result.exception)
        assert (path.read_bytes(), path.stat().st_mode) == (before, mode)


def test_port_can_be_chosen(tmp_path: Path) -> None:
    """The server listens on the chosen port and prints it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serve_in_thread(tmp_path / "state.db", port=port) as running:
        assert running.base_url == f"http://127.0.0.1:{port}/v1"
        assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200


def test_stops_with_requests_in_flight(tmp_path: Path) -> None:
    """A client that waits for a response does not delay the server's exit."""
    failures: list[Exception] = []

    def wait() -> None:
        try:
            api.post_run()
        except httpx.HTTPError as error:
            failures.append(error)

    with ExitStack() as stack:
        api = open_client(stack, tmp_path / "state.db")
        api.inject_fault("silence-after")
        waiting = Thread(target=wait)
        waiting.start()
        while not api.audit(runs=False)["accepted"]:
            time.sleep(0.01)
        start = time.monotonic()
        stack.close()
        waiting.join()
    assert time.monotonic() - start < 30
    assert len(failures) == 1


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_stop_the_server(number: signal.Signals) -> None:
    """SIGTERM, SIGINT and SIGHUP end it with exit 0, after exactly two lines on stdout."""
    with start_process() as (running, api):
        api.submit()
        os.kill(running.pid, number)
        remaining_output, errors = running.communicate(timeout=60)
    assert (running.returncode, remaining_output, errors) == (0, "", "")


@pytest.mark.long
def test_temporary_state_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `--state` no file is left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with start_process() as (running, _):
        assert [path.name for path in tmp_path.glob("*/*.db")] == ["state.db"]
        running.terminate()
        running.wait()
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_options_reach_settings(tmp_path: Path) -> None:
    """Options set the settings; those for faults and misses can be repeated."""
    options = ["--balance", "7.5", "--api-key", "k-1", "--wrong-key", "401", "--aliases", "--hit-rate", "0"]
    options += ["--miss-kind", "empty_list", "--miss-kind", "empty_object", "--no-data-seconds", "none"]
    options += ["--fault", "me:html=1", "--fault", "get:slow=0", "--state", str(tmp_path / "state.db")]
    with start_process(*options) as (_, api):
        assert api.http.get("/user/me").status_code == 502
        assert api.audit()["balance"] == 7.5
        task = api.submit_and_get()
        assert (task["status"], task["data"]) in [("success", []), ("success", {})]


@in_turn(
    ("options", "words"),
    [
        (["--fault", "quake=1"], "no fault is called 'quake'"),
        (["--latency", "soon"], "none of lognormal"),
        (["--hit-rate", "2"], "between 0 and 1"),
        (["--rate", "0"], "above 0"),
        (["--rate", "nan"], "must be a finite number"),
        (["--balance", "inf"], "must be a finite number"),
        (["--retry-after", "soon"], "'--retry-after': `soon` is not a whole number"),
        (["--seed", "1.5"], "'--seed': `1.5` is not a whole number"),
        (["--balance", "much"], "'--balance': `much` is not a number"),
        (["--fault", "slow=often"], "'slow=often' is not of the form"),
        (["--shape", "round"], "not one of"),
    ],
)
def test_wrong_options(options: list[str], words: str) -> None:
    """A wrong option is a usage error with its reason."""
    result = CliRunner().invoke(sandbox, options)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without FastAPI, the error shows how to install it."""
    monkeypatch.delitem(sys.modules, "enrich.sandbox.server")
    monkeypatch.delitem(sys.modules, "enrich.sandbox.app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run_command(["sandbox"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: the sandbox is not installed",
        f"hint: {install_hint('sandbox')}",
    ]


def test_imports_without_server_extra() -> None:
    """The command and the settings can be imported without FastAPI and uvicorn."""
    code = "import sys; sys.modules.update(fastapi=None, uvicorn=None); import enrich.commands.sandbox"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_names_every_fault() -> None:
    """The help lists the options with their defaults, and all faults."""
    words = " ".join(CliRunner().invoke(sandbox, ["--help"]).output.split())
    assert all(text in words for text in ("--no-data-seconds", "lognormal(1.2,0.6)", "reset-after", "unavailable"))


@pytest.mark.long
@in_turn(
    ("host", "answers"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:80", True),
        ("127.1.2.3:1", True),
        ("localhost", True),
        ("LOCALHOST:8080", True),
        ("[::1]:1", True),
        ("evil.example", False),
        ("evil.example:80", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("10.0.0.1", False),
        ("[::]", False),
        ("127.0.0.1@evil.example", False),
        ("", False),
    ],
)
def test_non_loopback_host_header_is_rejected(tmp_path: Path, host: str, answers: bool) -> None:  # noqa: FBT001
    """A web page whose host name leads to loopback (DNS rebinding) can't use the API or the control endpoints."""
    with ExitStack() as stack:
        api = open_client(stack, tmp_path / "state.db")
        for path in ("/health", "/v1/user/me", "/__audit", "/nowhere"):
            answer = api.http.get(api.base_url.removesuffix("/v1") + path, headers={"host": host})
            assert (answer.status_code == 403) == (not answers)

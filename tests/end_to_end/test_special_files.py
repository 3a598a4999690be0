"""Pipes without a peer, devices and folders in place of files: refused immediately with a message, never blocking."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from enrich.job.local_files import MAX_BYTES
from tests.support.cases import first_quick
from tests.support.workspace import ProgramResult, SandboxApi, Workspace, make_leads

KEY = "sandbox-key"


def run_job(
    workspace: Workspace,
    api: SandboxApi,
    *options: str,
    stdin: int = subprocess.DEVNULL,
    environ: Mapping[str, Any] = MappingProxyType({}),
) -> ProgramResult:
    """Run the job as a process, so that one that hangs can be ended."""
    arguments = options or ("run", "job.yaml")
    result = workspace.run_subprocess(*arguments, api=api, stdin=stdin, **environ)
    assert "Traceback" not in result.stderr
    return result


def make_special_file(workspace: Workspace, kind: str) -> str:
    """Make a file of a special kind; return its name."""
    if kind.startswith("/dev/"):
        return kind
    path = workspace.folder / f"{kind}.prom"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(MAX_BYTES + 1)
    return str(path)


KINDS = ["fifo", "/dev/zero", "/dev/urandom", "folder"]


@pytest.mark.parametrize("kind", first_quick(1, [*KINDS, "huge"]))
@pytest.mark.parametrize(
    ("use", "code"),
    first_quick(
        1,
        [("key", 3), ("suppress", 5), ("log", 5), ("plan", 5), ("job", 2), ("metrics", 2), ("input", 5), ("ledger", 5)],
    ),
)
def test_special_files_are_refused(api: SandboxApi, workspace: Workspace, use: str, code: int, kind: str) -> None:
    """Names the file in the message, and sends nothing."""
    if kind == "huge" and use not in ("key", "plan", "job"):
        pytest.skip("a file may be large")
    workspace.write_leads(make_leads(2))
    name = make_special_file(workspace, kind)
    environ: dict[str, str] = {}
    options = ["run", "job.yaml"]
    match use:
        case "key":
            environ = {"DATABAR_API_KEY": "", "DATABAR_API_KEY_FILE": name}
        case "log" | "plan":
            options += [f"--{use.replace('log', 'log-file')}", name]
        case "ledger" if kind == "folder":
            pytest.skip("the message is of SQLite")
        case "ledger":
            options += ["--ledger", name]
        case "job":
            options = ["run", name]
        case "input":
            options += ["--input", name]
            if kind == "folder":
                pytest.skip("a folder of files is an input")
        case "metrics" if kind.startswith("/dev/"):
            pytest.skip("its name has no .prom")
        case _:
            workspace.write_job(**{use: name})

    result = run_job(workspace, api, *options, environ=environ)

    # click refuses folders as options before the program sees them.
    assert result.exit_code == (2 if kind == "folder" and use in ("log", "plan", "job") else code), result.stderr
    assert Path(name).name in result.stderr
    assert api.audit()["accepted"] == 0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero"])
def test_unreadable_notifications_file_is_a_note(api: SandboxApi, workspace: Workspace, kind: str) -> None:
    """An unreadable notifications file does not stop the run."""
    workspace.write_leads(make_leads(2))
    workspace.write_job(notify=make_special_file(workspace, kind))
    result = run_job(workspace, api)
    assert result.exit_code == 0
    assert "notifications cannot be sent: it " in result.stderr


@pytest.mark.long
@pytest.mark.parametrize("stdin", ["/dev/zero", "/dev/urandom"])
def test_device_as_stdin(api: SandboxApi, workspace: Workspace, stdin: str) -> None:
    """Refuses a device as stdin; only pipes and files are accepted."""
    workspace.write_leads(make_leads(1))
    with open(stdin, "rb") as device:  # noqa: PTH123 - opened for its descriptor
        result = run_job(workspace, api, "run", "job.yaml", "--input", "-", stdin=device.fileno())
    assert result.exit_code == 5
    assert "standard input is a device" in result.stderr


@pytest.mark.parametrize("command", ["plan", "check", "explain --row 1", "status", "doctor --offline"])
@pytest.mark.parametrize("use", ["suppress", "metrics", "notify", "input", "output"])
@pytest.mark.long
def test_other_commands_do_not_block_on_pipes(api: SandboxApi, workspace: Workspace, use: str, command: str) -> None:
    """Other commands end, whatever their result."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(**{use: make_special_file(workspace, "fifo")})
    name, *options = command.split()
    assert run_job(workspace, api, name, "job.yaml", *options).exit_code in (0, 1, 2, 3, 5)


@pytest.mark.long
def test_key_file_from_pipe(api: SandboxApi, workspace: Workspace) -> None:
    """`DATABAR_API_KEY_FILE=<(pass show databar)` works, however late the key is written."""
    workspace.write_leads(make_leads(1))
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "enrich", "run", "job.yaml"],
        cwd=workspace.folder,
        env=workspace.environment(api) | {"DATABAR_API_KEY": "", "DATABAR_API_KEY_FILE": f"/dev/fd/{reader}"},
        pass_fds=[reader],
    )
    os.close(reader)
    os.write(writer, KEY[:4].encode())
    os.write(writer, KEY[4:].encode() + b"\n")
    os.close(writer)
    assert process.wait(timeout=90) == 0


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--sandbox",)])
def test_log_to_pipe(api: SandboxApi, workspace: Workspace, options: Sequence[str]) -> None:
    """Another program may read the log while it is written."""
    workspace.write_leads(make_leads(1))
    fifo = make_special_file(workspace, "fifo")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with ThreadPoolExecutor() as pool:
        log = pool.submit(read_until_closed, reader)
        assert run_job(workspace, api, "run", "job.yaml", "--log-file", fifo, *options).exit_code == 0
    assert b'"event": "end"' in log.result()
    os.close(reader)


def read_until_closed(reader: int) -> bytes:
    """Read a pipe until its writer has closed it, as `cat` does."""
    poll, content = select.poll(), b""
    poll.register(reader, select.POLLIN)
    while poll.poll()[0][1] & select.POLLIN:
        content += os.read(reader, 1 << 16)
    return content


@pytest.mark.long
@pytest.mark.parametrize("name", ["/dev/null", "/dev/stderr"])
def test_log_to_null_or_stderr(api: SandboxApi, workspace: Workspace, name: str) -> None:
    """Accepts these devices for the log, because they accept lines."""
    workspace.write_leads(make_leads(1))
    assert run_job(workspace, api, "run", "job.yaml", "--log-file", name).exit_code == 0


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "dangling link"])
def test_sandbox_ledger_beside_no_file_is_refused(workspace: Workspace, kind: str, command: str) -> None:
    """A ledger that is no regular file is refused with --sandbox, too, and nothing is created beside it."""
    workspace.write_leads(make_leads(1))
    path = workspace.folder / "special"
    if kind == "device":
        path.symlink_to("/dev/full")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("missing.db")
    before = sorted(workspace.folder.rglob("*"))

    result = workspace.run_in_process(command, "job.yaml", "--ledger", "special", "--sandbox")

    assert result.exit_code == 5, result.stderr
    assert f"{path}: the ledger " in result.stderr
    assert sorted(workspace.folder.rglob("*")) == before

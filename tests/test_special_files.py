"""Pipes without a peer, devices and folders in the place of files: refused in words at once, never waited for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from enrich.bounded_read import MOST_BYTES
from tests.cases import first_quick
from tests.harness import Api, Done, Office, people

KEY = "sandbox-key"


def run(
    office: Office,
    api: Api,
    *options: str,
    stdin: int = subprocess.DEVNULL,
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Done:
    """Run the job as a process, so that one that hangs can be ended."""
    process = subprocess.run(
        [sys.executable, "-m", "enrich", *(options or ("run", "job.yaml"))],
        cwd=office.folder,
        env=office.variables(api) | dict(environ),
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=45,
        check=False,
    )
    assert "Traceback" not in process.stderr
    return Done(process.returncode, process.stdout, process.stderr)


def make(office: Office, kind: str) -> str:
    """Make what is no file; return its name."""
    if kind.startswith("/dev/"):
        return kind
    path = office.folder / f"{kind}.prom"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(MOST_BYTES + 1)
    return str(path)


KINDS = ["fifo", "/dev/zero", "/dev/urandom", "folder"]


@pytest.mark.parametrize("kind", first_quick(1, [*KINDS, "huge"]))
@pytest.mark.parametrize(
    ("use", "code"),
    first_quick(
        2,
        [("key", 3), ("suppress", 5), ("log", 5), ("plan", 5), ("job", 2), ("metrics", 2), ("input", 5), ("ledger", 5)],
    ),
)
def test_what_is_no_file_is_refused(api: Api, office: Office, use: str, code: int, kind: str) -> None:
    """With words that name it, and nothing is bought."""
    if kind == "huge" and use not in ("key", "plan", "job"):
        pytest.skip("a file may be large")
    office.write_leads(people(2))
    name = make(office, kind)
    environ: dict[str, str] = {}
    options = ["run", "job.yaml"]
    match use:
        case "key":
            environ = {"DATABAR_API_KEY": "", "DATABAR_API_KEY_FILE": name}
        case "log" | "plan":
            options += [f"--{use.replace('log', 'log-file')}", name]
        case "ledger" if kind == "folder":
            pytest.skip("told by SQLite")
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
            office.write_job(**{use: name})

    done = run(office, api, *options, environ=environ)

    # click refuses folders as options before we see them.
    assert done.code == (2 if kind == "folder" and use in ("log", "plan", "job") else code), done.stderr
    assert Path(name).name in done.stderr
    assert api.audit()["accepted"] == 0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero"])
def test_notifications_without_a_file_are_a_note(api: Api, office: Office, kind: str) -> None:
    """They are no reason not to run."""
    office.write_leads(people(2))
    office.write_job(notify=make(office, kind))
    done = run(office, api)
    assert done.code == 0
    assert "nobody can be notified: it " in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("stdin", ["/dev/zero", "/dev/urandom"])
def test_a_device_as_standard_input_is_not_read_for_ever(api: Api, office: Office, stdin: str) -> None:
    """Only pipes and files are."""
    office.write_leads(people(1))
    with open(stdin, "rb") as device:  # noqa: PTH123 - for its descriptor
        done = run(office, api, "run", "job.yaml", "--input", "-", stdin=device.fileno())
    assert done.code == 5
    assert "standard input is a device" in done.stderr


@pytest.mark.parametrize("command", ["plan", "check", "explain --row 1", "status", "doctor --offline"])
@pytest.mark.parametrize("use", ["suppress", "metrics", "notify", "input", "output"])
@pytest.mark.long
def test_other_commands_wait_for_no_pipe_either(api: Api, office: Office, use: str, command: str) -> None:
    """Whatever they say, they end."""
    office.write_leads(people(1))
    office.write_job(**{use: make(office, "fifo")})
    name, *options = command.split()
    assert run(office, api, name, "job.yaml", *options).code in (0, 1, 2, 3, 5)


@pytest.mark.long
def test_a_pipe_with_a_writer_is_a_key_file(api: Api, office: Office) -> None:
    """`DATABAR_API_KEY_FILE=<(pass show databar)` works, however late its writer is."""
    office.write_leads(people(1))
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "enrich", "run", "job.yaml"],
        cwd=office.folder,
        env=office.variables(api) | {"DATABAR_API_KEY": "", "DATABAR_API_KEY_FILE": f"/dev/fd/{ours}"},
        pass_fds=[ours],
    )
    os.close(ours)
    os.write(theirs, KEY[:4].encode())
    os.write(theirs, KEY[4:].encode() + b"\n")
    os.close(theirs)
    assert process.wait(45) == 0


@pytest.mark.long
def test_a_pipe_with_a_reader_is_a_log(api: Api, office: Office) -> None:
    """A log may be read by another program while it is written."""
    office.write_leads(people(1))
    fifo = make(office, "fifo")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert run(office, api, "run", "job.yaml", "--log-file", fifo).code == 0
    assert b'"event": "end"' in os.read(reader, 1 << 16)
    os.close(reader)


@pytest.mark.long
@pytest.mark.parametrize("name", ["/dev/null", "/dev/stderr"])
def test_logs_that_go_nowhere_or_to_stderr_still_do(api: Api, office: Office, name: str) -> None:
    """They are devices, too, but take lines."""
    office.write_leads(people(1))
    assert run(office, api, "run", "job.yaml", "--log-file", name).code == 0

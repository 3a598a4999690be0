"""Standard streams that are closed, full or left by their reader: the run still does its work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.program import ProgramStart
from tests.support.workspace import ProgramResult, SandboxApi, Workspace, make_leads

NO_SPACE = "note: stdout cannot be written: No space left on device\n"
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@pytest.fixture
def stream_workspace(workspace: Workspace) -> Iterator[Workspace]:
    """Make a job with leads, and rejects beside the output."""
    workspace.write_leads(make_leads(5))
    workspace.write_job(rejects="rejects.csv")
    yield workspace
    for descriptor in (0, 1, 2):
        os.fstat(descriptor)


def run_with_streams(
    workspace: Workspace,
    api: SandboxApi,
    *arguments: str,
    closed: tuple[int, ...] = (),
    full: tuple[int, ...] = (),
    execute: bool = False,
) -> ProgramResult:
    """Run the program with closed descriptors, or with some on a full disk; capture the others."""
    start = ProgramStart(arguments, str(workspace.folder), workspace.environment(api), closed=closed, full=full)
    process = start.start(execute=execute)
    stdout, stderr = process.communicate(timeout=60)
    return ProgramResult(process.returncode, stdout, stderr)


STREAMS: list[dict[str, Any]] = [
    {"closed": (1,)},
    {"closed": (2,)},
    {"closed": (1, 2)},
    {"closed": (0, 1, 2)},
    {"full": (1,)},
    {"full": (2,)},
    {"full": (1, 2)},
    {"closed": (1,), "full": (2,)},
    {"closed": (0,)},
]
EXECUTED: list[dict[str, Any]] = [{"closed": (0, 1, 2)}, {"full": (1, 2)}]


@pytest.mark.long
@pytest.mark.parametrize("streams", STREAMS, ids=str)
def test_run_without_standard_streams(api: SandboxApi, stream_workspace: Workspace, streams: dict[str, Any]) -> None:
    """The exit code depends on the leads only, and every file is complete and free of other output.

    Where all streams are closed, or all outputs full, the program is executed, as the interpreter has its part in it,
    and draws its report, which takes a second.
    """
    executed = streams in EXECUTED
    if executed:
        stream_workspace.write_job(rejects="rejects.csv", report="report.html")
    result = run_with_streams(
        stream_workspace,
        api,
        *("run", "job.yaml", "--json", "--summary", "--log-file", "log"),
        execute=executed,
        **streams,
    )

    assert result.exit_code == 0
    assert [row["enrich_status"] for row in stream_workspace.read_output()].count("found") > 0
    assert all((stream_workspace.folder / name).stat().st_size for name in ("log", "rejects.csv"))
    assert (stream_workspace.ledger_path).read_bytes().startswith(b"SQLite format 3\0")
    if executed:
        page = (stream_workspace.folder / "report.html").read_text(encoding="utf-8").lower()
        assert page.startswith("<!doctype html>")
        assert page.rstrip().endswith("</html>\n<!-- a report of enrich -->")
    assert "Traceback" not in result.stderr
    unusable = streams.get("closed", ()) + streams.get("full", ())
    assert bool(result.stdout) == (1 not in unusable)
    assert ("5 of 5 leads enriched" in result.stderr) == (2 not in unusable)
    assert result.stderr.endswith(NO_SPACE) == (streams == {"full": (1,)})


@pytest.mark.long
@pytest.mark.parametrize("streams", STREAMS[:4], ids=str)
def test_exit_codes_without_streams(api: SandboxApi, stream_workspace: Workspace, streams: dict[str, Any]) -> None:
    """A lead in doubt exits with 14, a wrong job with 2, even if the messages cannot be printed."""
    api.inject_fault("no-task-id")
    assert run_with_streams(stream_workspace, api, "run", "job.yaml", "--json", **streams).exit_code == 14
    stream_workspace.write_job(where="no sql")
    assert run_with_streams(stream_workspace, api, "run", "job.yaml", "--json", **streams).exit_code == 2


COMMANDS = [["--help"], ["--version"], [], ["schema"], ["run", "--help"], ["status", "job.yaml"], ["plan", "job.yaml"]]
COMMANDS += [["runs", "job.yaml", "--json"], ["explain", "job.yaml", "--row", "1"], ["waterfalls"], ["nonsense"]]


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_other_commands_without_streams(api: SandboxApi, stream_workspace: Workspace, command: list[str]) -> None:
    """Reports a full disk in one line, a closed stream not at all; neither changes the exit code."""
    plain = run_with_streams(stream_workspace, api, *command)
    for streams in STREAMS[:7]:
        result = run_with_streams(stream_workspace, api, *command, **streams)
        assert result.exit_code == plain.exit_code
        assert result.stderr.removesuffix(NO_SPACE) == ("" if 2 in sum(streams.values(), ()) else plain.stderr)


@pytest.mark.long
@pytest.mark.parametrize("arguments", [["run", "job.yaml", "--json", "--summary"], ["schema"]], ids=" ".join)
@pytest.mark.parametrize("left", ["stdout", "stderr"])
def test_closed_reader_does_not_stop_run(
    api: SandboxApi, stream_workspace: Workspace, arguments: list[str], left: str
) -> None:
    """`… | head -1` ends the reading, not the run."""
    process = stream_workspace.start_subprocess(*arguments, api=api)
    streams = {"stdout": process.stdout, "stderr": process.stderr}
    stream = streams.pop(left)
    assert stream is not None
    stream.close()
    (other,) = streams.values()
    assert other is not None
    message = other.read()
    other.close()

    assert process.wait(timeout=90) == 0
    assert "Traceback" not in message
    assert "cannot be written" not in message
    if arguments[0] == "run":
        assert len(stream_workspace.read_output()) == 5
        assert (stream_workspace.folder / "rejects.csv").exists()


@pytest.mark.long
def test_watch_ends_when_reader_closes(api: SandboxApi, stream_workspace: Workspace) -> None:
    """`status --watch | head -1` does not watch forever."""
    assert stream_workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    process = stream_workspace.start_subprocess("status", "job.yaml", "--watch", "--every", "1s")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=90) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


def test_nonblocking_stdout() -> None:
    """Loses nothing on a non-blocking pipe that is full for a moment."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = "from enrich.commands.streams import *; guard_streams(); import sys; [print('x' * 99) for _ in range(9999)]"
    with subprocess.Popen([sys.executable, "-c", code], stdout=writer) as process:
        os.close(writer)
        with open(reader, "rb") as stream:  # noqa: PTH123 - opened for its descriptor
            assert stream.read() == (b"x" * 99 + b"\n") * 9999
    assert process.returncode == 0

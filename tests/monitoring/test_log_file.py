"""The log file: what it contains however a run ends, and what it never contains."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from enrich import __version__
from enrich.exit_codes import JobArguments
from enrich.job.job import load_job
from enrich.ledger.lock import lock_ledger
from enrich.monitoring import log_file
from enrich.monitoring.log_file import RunLog, open_log, redact_message
from enrich.monitoring.observers import RunObservers
from enrich.run.context import ClusterOptions, RunOptions
from enrich.run.progress import Progress
from enrich.sandbox.databar import Databar
from enrich.sandbox.lookups import Refused as ApiRefusal
from tests.support import short_waits
from tests.support.cases import in_turn
from tests.support.request_recorder import assert_no_personal_data, log_events, log_lines, searchable_leads
from tests.support.workspace import (
    SHORT_STARTUP_TIMEOUT,
    SandboxApi,
    Workspace,
    kill_process,
    make_leads,
    serve_api,
    wait_until,
)

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
LOG_OPTIONS = ("--log-file", "run.log")


def test_start_and_end_events(api: SandboxApi, workspace: Workspace) -> None:
    """Each line has the common fields; the start event has the run's inputs, the end event its result."""
    workspace.write_leads(searchable_leads(3))

    result = workspace.run_in_process(
        "run", "job.yaml", "--json", "--limit", "2", "--retry", "failed", *LOG_OPTIONS, api=api
    )

    start, end = log_lines(workspace)
    for line in (start, end):
        assert (line["v"], line["job"]) == (1, "job")
        assert isinstance(line["pid"], int)
        assert TIMESTAMP.fullmatch(line["at"])
    assert (start["event"], start["version"], start["sandbox"]) == ("start", __version__, False)
    assert (start["options"]["limit"], start["options"]["retry"]) == (2, ["failed"])
    assert start["options"]["max_credits"] is None
    for name, path in (("job_file", "job.yaml"), ("input", "leads.csv"), ("output", "out.csv")):
        assert start[name] == str(workspace.folder / path)
    assert start["ledger"] == str(workspace.ledger_path)
    assert (end["event"], end["execution"], end["exit_code"]) == ("end", 1, 0)
    assert end["receipt"] == result.json_output


def test_start_event_has_options_as_json(workspace: Workspace) -> None:
    """The start event has the cluster as an object, and no callbacks: not the text of a Python object."""
    options = RunOptions(cluster=ClusterOptions(workers=2), confirm_new_ledger=lambda _: True)
    with open_log(workspace.folder / "run.log", "job", lambda _: None) as log:
        observers = RunObservers(log, lambda _: None, JobArguments("job.yaml", "job.yaml"))
        observers.start(load_job(workspace.job_file), options)

    logged_options = log_lines(workspace)[0]["options"]
    assert logged_options["spread"] == {"address": None, "workers": 2}
    assert "confirm_new_ledger" not in logged_options


def _no_key(_: Workspace, __: SandboxApi) -> dict[str, str]:
    return {}


def _no_api(_: Workspace, api: SandboxApi) -> dict[str, str]:
    return api.environ | {"DATABAR_BASE_URL": "http://127.0.0.1:9/v1"}


def _no_job(workspace: Workspace, api: SandboxApi) -> dict[str, str]:
    workspace.write_job(colour="red")
    return api.environ


def _no_input(workspace: Workspace, api: SandboxApi) -> dict[str, str]:
    (workspace.folder / "leads.csv").unlink()
    return api.environ


@pytest.mark.parametrize(
    ("break_start", "expected"),
    [
        (_no_job, (2, "unknown key", ["error"])),
        (_no_key, (3, "DATABAR_API_KEY", ["start", "error"])),
        (_no_api, (4, "unreachable", ["start", "error"])),
        (_no_input, (5, "leads.csv", ["start", "error"])),
    ],
)
def test_failed_start_is_logged(
    api: SandboxApi,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    break_start: Callable[[Workspace, SandboxApi], dict[str, str]],
    expected: tuple[int, str, list[str]],
) -> None:
    """A start that fails before the execution, also for an invalid job file, is an error with its exit code."""
    monkeypatch.setattr(short_waits, "TIMEOUTS", SHORT_STARTUP_TIMEOUT)
    code, word, seen = expected
    workspace.write_leads(searchable_leads(1))
    environ = break_start(workspace, api)

    result = workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=None, **environ)

    assert result.exit_code == code
    assert log_events(workspace) == seen
    error = log_lines(workspace)[-1]
    assert (error["exit_code"], error["job"]) == (code, "job")
    assert word in error["error"]


def test_locked_out_run_is_logged(api: SandboxApi, workspace: Workspace) -> None:
    """Exit 11 is logged as an error, a skipped run as an end without a summary."""
    workspace.write_leads(searchable_leads(1))
    with lock_ledger(workspace.ledger_path, 0):
        refused = workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)
        skipped = workspace.run_in_process("run", "job.yaml", "--if-locked", "skip", *LOG_OPTIONS, api=api)

    assert (refused.exit_code, skipped.exit_code) == (11, 0)
    assert log_events(workspace) == ["start", "error", "start", "end"]
    lines = log_lines(workspace)
    assert lines[1]["exit_code"] == 11
    assert (lines[3]["exit_code"], "receipt" in lines[3]) == (0, False)
    assert "another run" in lines[3]["skipped"]


@pytest.mark.long
def test_two_processes_share_log(tmp_path: Path, workspace: Workspace) -> None:
    """Two processes share a log: the refused one and the running one both write whole lines."""
    workspace.write_leads(searchable_leads(2))
    with serve_api(tmp_path / "api.db", latency="fixed(3600)") as api:
        first = workspace.start_subprocess("run", "job.yaml", *LOG_OPTIONS, api=api)
        wait_until(lambda: api.audit()["accepted"] == 2)
        second = workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=90)

    assert (second.exit_code, first.returncode) == (11, 143)
    lines = log_lines(workspace)
    assert [line["event"] for line in lines] == ["start", "start", "error", "end"]
    assert lines[0]["pid"] == lines[3]["pid"] == first.pid
    assert lines[3]["exit_code"] == 143


@pytest.mark.long
def test_killed_run_has_no_end_event(tmp_path: Path, workspace: Workspace) -> None:
    """After a kill, the next start event follows the start; its notes have the number of the execution."""
    workspace.write_leads(searchable_leads(3))
    with serve_api(tmp_path / "api.db", latency="fixed(600)") as api:
        first = workspace.start_subprocess("run", "job.yaml", *LOG_OPTIONS, api=api)
        wait_until(lambda: api.audit()["accepted"] == 3)
        wait_until(lambda: workspace.sql("SELECT count(*) FROM requests WHERE state = 'submitted'") == [(3,)])
        kill_process(first)
        api.advance(601)
        result = workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)

    assert result.exit_code == 0
    assert log_events(workspace) == ["start", "start", "note", "end"]
    note, end = log_lines(workspace)[2:]
    assert (note["execution"], end["execution"]) == (2, 2)
    assert "3 tasks of an earlier run" in note["text"]


# What the log never contains


def test_log_has_no_personal_data(tmp_path: Path, workspace: Workspace) -> None:
    """Unconfirmed, failed and refused requests are logged without input cells and answers."""
    workspace.write_leads(searchable_leads(12))
    with serve_api(tmp_path / "api.db", failure_rate=0.3) as api:
        api.inject_fault("no-task-id", count=2)
        in_doubt = workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)
        workspace.run_in_process("run", "job.yaml", "--retry", "failed,in_doubt", *LOG_OPTIONS, api=api)

    assert in_doubt.exit_code == 14
    assert_no_personal_data((workspace.folder / "run.log").read_text(encoding="utf-8"), workspace)


def test_quoted_params_are_removed(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted params are shown on stderr but removed from the log, which keeps the status."""

    def submit(_: Databar, __: Any, rows: Any, **___: Any) -> str:
        raise ApiRefusal({"detail": f"there is no {rows[0]['first_name']}"})

    workspace.write_leads(searchable_leads(1))
    monkeypatch.setattr(Databar, "submit", submit)

    result = workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)

    assert result.exit_code == 2
    assert "Adalbert0" in result.stderr
    assert "HTTP 4" in log_lines(workspace)[-1]["error"]
    assert_no_personal_data((workspace.folder / "run.log").read_text(encoding="utf-8"), workspace)


@pytest.mark.parametrize(
    ("header", "code"), [(["Ada", "Ada", "Lovelace", "x", "y"], 5), (["Lovelace", "First name", "Ada", "x", "y"], 2)]
)
def test_lead_as_header_is_not_logged(api: SandboxApi, workspace: Workspace, header: list[str], code: int) -> None:
    """With a missing header the first lead takes its place, so no column name is logged."""
    workspace.write_leads(searchable_leads(1), header)

    result = workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)

    assert result.exit_code == code
    logged = (workspace.folder / "run.log").read_text(encoding="utf-8")
    assert "Ada" not in logged
    assert "Lovelace" not in logged


def test_where_error_hides_cell(api: SandboxApi, workspace: Workspace) -> None:
    """A cell that polars quotes in an error of `where` is not logged."""
    workspace.write_job(where="CAST(Note AS INT) > 1")
    workspace.write_leads(searchable_leads(1))

    result = workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)

    assert result.exit_code == 2
    assert_no_personal_data((workspace.folder / "run.log").read_text(encoding="utf-8"), workspace)


def test_unexpected_error_logs_type_only(
    api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an unexpected exception only the type is logged, because its text may contain anything."""
    workspace.write_leads(searchable_leads(1))

    def broken(*_: object) -> None:
        raise RuntimeError("Adalbert0 is strange")

    monkeypatch.setattr("enrich.run.pipeline.run", broken)

    result = workspace.run_in_process("run", "job.yaml", *LOG_OPTIONS, api=api)

    assert result.exit_code == 1
    assert log_lines(workspace)[-1]["error"] == "this is a bug: RuntimeError"
    assert log_lines(workspace)[-1]["exit_code"] == 1


def test_other_messages_are_kept() -> None:
    """Messages are cut only after a word that introduces a quotation."""
    assert redact_message("job.yaml:3: colour: unknown key") == "job.yaml:3: colour: unknown key"
    assert (
        redact_message("the API refuses the key: HTTP 401: for ada@x.example\nand")
        == "the API refuses the key: HTTP 401"
    )


# The file


@pytest.fixture
def _small_log_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotate about every 20 lines."""
    monkeypatch.setattr(log_file, "MAX_BYTES", 2_000)


@pytest.fixture
def log_warnings() -> list[str]:
    """Return the warnings that the log raised."""
    return []


def log_texts(folder: Path) -> Iterator[str]:
    """Return the texts of all lines in all files of a log."""
    for path in folder.glob("run.log*"):
        if path.is_file():
            yield from (json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.usefixtures("_small_log_files")
def test_log_rotation(tmp_path: Path, log_warnings: list[str]) -> None:
    """Two writers rotate one log without losing or doubling a line, and each file is for its owner only."""
    old = os.umask(0)
    try:
        with ExitStack() as stack:
            logs = [stack.enter_context(open_log(tmp_path / "run.log", "job", log_warnings.append)) for _ in range(2)]
            for number in range(60):
                logs[number % 2].write_event("note", text=str(number))
    finally:
        os.umask(old)

    assert sorted(map(int, log_texts(tmp_path))) == list(range(60))
    files = list(tmp_path.glob("run.log*"))
    assert len(files) > 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert log_warnings == []


@pytest.mark.usefixtures("_small_log_files")
def test_rotation_keeps_five_files(tmp_path: Path, log_warnings: list[str]) -> None:
    """Rotation keeps five files and drops the oldest lines."""
    with open_log(tmp_path / "run.log", "job", log_warnings.append) as log:
        for number in range(400):
            log.write_event("note", text=str(number))

    assert len(list(tmp_path.iterdir())) == 6
    assert max(map(int, log_texts(tmp_path))) == 399


WRITER_SCRIPT = """
import sys
from pathlib import Path
from enrich.monitoring import log_file
log_file.MAX_BYTES = 8_000
with log_file.open_log(Path("run.log"), "job", print) as log:
    for number in range(100):
        log.write_event("note", text=f"{sys.argv[1]}-{number}")
"""


@pytest.mark.long
def test_concurrent_rotation(tmp_path: Path) -> None:
    """Three processes write and rotate one file at full speed without losing a line."""
    root = str(Path(__file__).parents[2])
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER_SCRIPT, name], cwd=tmp_path, env={"PYTHONPATH": root})
        for name in "abc"
    ]
    assert [writer.wait(30) for writer in writers] == [0, 0, 0]

    assert sorted(log_texts(tmp_path)) == sorted(f"{name}-{number}" for name in "abc" for number in range(100))
    assert len(list(tmp_path.glob("run.log*"))) > 2


def test_external_rotation(tmp_path: Path, log_warnings: list[str]) -> None:
    """After a rotation from outside, the next line goes to the file that now has the name."""
    with open_log(tmp_path / "run.log", "job", log_warnings.append) as log:
        log.write_event("note", text="old")
        (tmp_path / "run.log").rename(tmp_path / "old.log")
        log.write_event("note", text="new")
        log.write_event("note", text="newer")

    assert "old" in (tmp_path / "old.log").read_text()
    assert list(log_texts(tmp_path)) == ["new", "newer"]


@pytest.mark.usefixtures("_small_log_files")
def test_failed_rotation_keeps_logging(tmp_path: Path, log_warnings: list[str]) -> None:
    """When rotation fails, the log keeps growing, and one warning reports it."""
    (tmp_path / "run.log.4").write_text("{}")
    (tmp_path / "run.log.5").mkdir()
    with open_log(tmp_path / "run.log", "job", log_warnings.append) as log:
        for number in range(60):
            log.write_event("note", text=str(number))

    written = (tmp_path / "run.log").read_text().splitlines()
    assert [json.loads(line)["text"] for line in written] == [str(number) for number in range(60)]
    assert len(log_warnings) == 1
    assert "rotated" in log_warnings[0]


@pytest.mark.usefixtures("_small_log_files")
def test_symlinked_log_is_rotated(tmp_path: Path, log_warnings: list[str]) -> None:
    """For a symbolic link, the file it points to is rotated in its own folder."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "run.log").touch()
    (tmp_path / "here.log").symlink_to(tmp_path / "far" / "run.log")
    with open_log(tmp_path / "here.log", "job", log_warnings.append) as log:
        for number in range(60):
            log.write_event("note", text=str(number))

    assert (tmp_path / "here.log").is_symlink()
    assert sorted(map(int, log_texts(tmp_path / "far"))) == list(range(60))


@pytest.mark.long
def test_disk_full_log_is_a_note(api: SandboxApi, workspace: Workspace) -> None:
    """On a full disk logging stops with one note on stderr, and the leads are enriched."""
    workspace.write_leads(searchable_leads(2))
    room = 3_000_000
    (workspace.folder / "run.log").write_text('{"v": 1}\n' * (room // 9))

    result = workspace.run_subprocess("run", "job.yaml", *LOG_OPTIONS, api=api, max_file_bytes=room)

    assert result.exit_code == 0
    assert result.stderr.count("\n") == 1
    assert "run.log: the log can no longer be written" in result.stderr
    assert len(workspace.read_output()) == 2


def test_unwritable_log_is_exit_5(api: SandboxApi, workspace: Workspace) -> None:
    """An unwritable log is exit 5 before anything is spent."""
    workspace.write_leads(searchable_leads(1))

    result = workspace.run_in_process("run", "job.yaml", "--log-file", "leads.csv/run.log", api=api)

    assert result.exit_code == 5
    assert "log" in result.stderr
    assert api.audit()["accepted"] == 0


def test_progress_event_per_minute(tmp_path: Path, log_warnings: list[str]) -> None:
    """After an hour of suspension there is one progress event, not sixty."""
    now = 0.0
    progress = Progress(total=9, done=3, found=2, spent=1.5, in_flight=4)
    with open_log(tmp_path / "run.log", "job", log_warnings.append) as opened:
        log = RunLog(opened._handler, "job", lambda: now)
        for moment in (0, 59, 60, 61, 119, 120, 3720, 3721, 3722):
            now = float(moment)
            log.write_progress(progress, lambda: 7)

    lines = [json.loads(line) for line in (tmp_path / "run.log").read_text().splitlines()]
    assert len(lines) == 3
    assert {"event": "progress", "execution": 7, "done": 3, "total": 9, "found": 2, "credits": 1.5}.items() <= (
        lines[0].items()
    )


@pytest.mark.long
@in_turn("name", ["leads.csv", ".enrich/job.db", "leads.jsonl"])
def test_foreign_file_is_not_appended(tmp_path: Path, name: str) -> None:
    """A log path that names a foreign file is refused: a typo must not append to leads or rotate a ledger."""
    workspace = Workspace(tmp_path)
    workspace.write_job()
    workspace.write_leads(make_leads(1))
    (tmp_path / "leads.jsonl").write_text('{"First Name": "Ada"}\n')
    with serve_api(tmp_path / "api.db") as api:
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
        before = (tmp_path / name).read_bytes()
        result = workspace.run_in_process("run", "job.yaml", "--log-file", name, api=api)
    assert (result.exit_code, "is not a log" in result.stderr) == (5, True)
    assert (tmp_path / name).read_bytes() == before

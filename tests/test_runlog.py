"""The run log: what is in it, whatever ends the run, and what never is."""

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
from enrich.execution import Timing
from enrich.model import State
from enrich.sandbox.databar import Databar
from enrich.sandbox.questions import Refused as ApiRefusal
from enrich.store.lock import hold
from enrich.surroundings import Progress
from enrich.watch import runlog
from enrich.watch.runlog import Log, log_to, without_data
from tests.cases import in_turn
from tests.harness import AWAY, Api, Office, kill, people, serving, until
from tests.watch import assert_nobody_in, events, log_lines, somebody

AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
LOG = ("--log-file", "run.log")


def test_a_run_has_a_start_and_an_end(api: Api, office: Office) -> None:
    """Every line has its envelope; the start says what the run was given, the end what came of it."""
    office.write_leads(somebody(3))

    done = office.command("run", "job.yaml", "--json", "--limit", "2", "--retry", "failed", *LOG, api=api)

    start, end = log_lines(office)
    for line in (start, end):
        assert (line["v"], line["job"]) == (1, "job")
        assert isinstance(line["pid"], int)
        assert AT.fullmatch(line["at"])
    assert (start["event"], start["version"], start["sandbox"]) == ("start", __version__, False)
    assert (start["options"]["limit"], start["options"]["retry"]) == (2, ["failed"])
    assert start["options"]["max_credits"] is None
    for name, path in (("job_file", "job.yaml"), ("input", "leads.csv"), ("output", "out.csv")):
        assert start[name] == str(office.folder / path)
    assert start["ledger"] == str(office.ledger_path)
    assert (end["event"], end["execution"], end["exit_code"]) == ("end", 1, 0)
    assert end["receipt"] == done.receipt


def _no_key(_: Office, __: Api) -> dict[str, str]:
    return {}


def _nobody_there(_: Office, api: Api) -> dict[str, str]:
    return api.environ | {"DATABAR_BASE_URL": "http://127.0.0.1:9/v1"}


def _no_job(office: Office, api: Api) -> dict[str, str]:
    office.write_job(colour="red")
    return api.environ


def _no_input(office: Office, api: Api) -> dict[str, str]:
    (office.folder / "leads.csv").unlink()
    return api.environ


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_no_job, (2, "unknown key", ["error"])),
        (_no_key, (3, "DATABAR_API_KEY", ["start", "error"])),
        (_nobody_there, (4, "unreachable", ["start", "error"])),
        (_no_input, (5, "leads.csv", ["start", "error"])),
    ],
)
def test_a_start_that_fails_leaves_a_line(
    api: Api,
    office: Office,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Office, Api], dict[str, str]],
    told: tuple[int, str, list[str]],
) -> None:
    """Before an execution exists there is an error with its exit code, also for a job file that is wrong."""
    away = tuple(getattr(AWAY, name) for name in Timing.__dataclass_fields__)
    monkeypatch.setattr(Timing.__init__, "__defaults__", away)
    code, word, seen = told
    office.write_leads(somebody(1))
    environ = spoil(office, api)

    done = office.command("run", "job.yaml", *LOG, api=None, **environ)

    assert done.code == code
    assert events(office) == seen
    error = log_lines(office)[-1]
    assert (error["exit_code"], error["job"]) == (code, "job")
    assert word in error["error"]


def test_who_is_locked_out_writes_too(api: Api, office: Office) -> None:
    """Exit 11 is an error, a turn that was skipped an end without a receipt."""
    office.write_leads(somebody(1))
    with hold(office.ledger_path, 0):
        refused = office.command("run", "job.yaml", *LOG, api=api)
        skipped = office.command("run", "job.yaml", "--if-locked", "skip", *LOG, api=api)

    assert (refused.code, skipped.code) == (11, 0)
    assert events(office) == ["start", "error", "start", "end"]
    lines = log_lines(office)
    assert lines[1]["exit_code"] == 11
    assert (lines[3]["exit_code"], "receipt" in lines[3]) == (0, False)
    assert "another execution" in lines[3]["skipped"]


@pytest.mark.long
def test_two_processes_share_a_log(tmp_path: Path, office: Office) -> None:
    """While one is at work the other is refused; both are in the log, line by line."""
    office.write_leads(somebody(2))
    with serving(tmp_path / "api.db", latency="fixed(3600)") as api:
        first = office.start("run", "job.yaml", *LOG, api=api)
        until(lambda: api.audit()["accepted"] == 2)
        second = office.command("run", "job.yaml", *LOG, api=api)
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=20)

    assert (second.code, first.returncode) == (11, 143)
    lines = log_lines(office)
    assert [line["event"] for line in lines] == ["start", "start", "error", "end"]
    assert lines[0]["pid"] == lines[3]["pid"] == first.pid
    assert lines[3]["exit_code"] == 143


@pytest.mark.long
def test_a_killed_run_has_no_end_and_the_next_one_tells_of_it(tmp_path: Path, office: Office) -> None:
    """The next start follows a start; its notes carry the number of the execution."""
    office.write_leads(somebody(3))
    with serving(tmp_path / "api.db", latency="fixed(600)") as api:
        first = office.start("run", "job.yaml", *LOG, api=api)
        until(lambda: api.audit()["accepted"] == 3)
        until(lambda: office.ledger().counts().get(State.SUBMITTED) == 3)
        kill(first)
        api.advance(601)
        done = office.command("run", "job.yaml", *LOG, api=api)

    assert done.code == 0
    assert events(office) == ["start", "start", "note", "end"]
    note, end = log_lines(office)[2:]
    assert (note["execution"], end["execution"]) == (2, 2)
    assert "3 tasks of an earlier execution" in note["text"]


# What never is in it


def test_no_line_has_personal_data(tmp_path: Path, office: Office) -> None:
    """Doubts, failures and refusals are logged without a cell of the input and without an answer."""
    office.write_leads(somebody(12))
    with serving(tmp_path / "api.db", failure_rate=0.3) as api:
        api.fault("no-task-id", count=2)
        doubtful = office.command("run", "job.yaml", *LOG, api=api)
        office.command("run", "job.yaml", "--retry", "failed,in_doubt", *LOG, api=api)

    assert doubtful.code == 14
    assert_nobody_in((office.folder / "run.log").read_text(encoding="utf-8"), office)


def test_an_api_that_quotes_what_was_sent_is_not_quoted(
    api: Api, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words are on stderr for the person; the log has the status."""

    def submit(_: Databar, order: Any, __: Any = None) -> str:
        raise ApiRefusal({"detail": f"there is no {order.rows[0]['first_name']}"})

    office.write_leads(somebody(1))
    monkeypatch.setattr(Databar, "submit", submit)

    done = office.command("run", "job.yaml", *LOG, api=api)

    assert done.code == 2
    assert "Adalbert0" in done.stderr
    assert "HTTP 4" in log_lines(office)[-1]["error"]
    assert_nobody_in((office.folder / "run.log").read_text(encoding="utf-8"), office)


@pytest.mark.parametrize(
    ("header", "code"), [(["Ada", "Ada", "Lovelace", "x", "y"], 5), (["Lovelace", "First name", "Ada", "x", "y"], 2)]
)
def test_a_lead_in_the_headers_place_is_not_quoted(api: Api, office: Office, header: list[str], code: int) -> None:
    """Where the header is missing the first lead stands in its place: no column's name is logged."""
    office.write_leads(somebody(1), header)

    done = office.command("run", "job.yaml", *LOG, api=api)

    assert done.code == code
    logged = (office.folder / "run.log").read_text(encoding="utf-8")
    assert "Ada" not in logged
    assert "Lovelace" not in logged


def test_a_where_that_fails_on_a_cell_does_not_quote_it(api: Api, office: Office) -> None:
    """What polars says of a cell stays out of the log."""
    office.write_job(where="CAST(Note AS INT) > 1")
    office.write_leads(somebody(1))

    done = office.command("run", "job.yaml", *LOG, api=api)

    assert done.code == 2
    assert_nobody_in((office.folder / "run.log").read_text(encoding="utf-8"), office)


def test_a_bug_is_logged_by_its_kind_alone(api: Api, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of an unexpected exception may hold anything."""
    office.write_leads(somebody(1))

    def broken(*_: object) -> None:
        raise RuntimeError("Adalbert0 is strange")

    monkeypatch.setattr("enrich.pipeline.run", broken)

    done = office.command("run", "job.yaml", *LOG, api=api)

    assert done.code == 1
    assert log_lines(office)[-1]["error"] == "this is a bug: RuntimeError"
    assert log_lines(office)[-1]["exit_code"] == 1


def test_what_quotes_nothing_is_kept_whole() -> None:
    """Only what follows a quoting word is cut off."""
    assert without_data("job.yaml:3: colour: unknown key") == "job.yaml:3: colour: unknown key"
    assert (
        without_data("the API refuses the key: HTTP 401: for ada@x.example\nand") == "the API refuses the key: HTTP 401"
    )


# The file


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotate every 20 lines or so."""
    monkeypatch.setattr(runlog, "LARGEST", 2_000)


@pytest.fixture
def complaints() -> list[str]:
    """What the log complains of."""
    return []


def texts(folder: Path) -> Iterator[str]:
    """The texts of all lines of all files of a log."""
    for path in folder.glob("run.log*"):
        if path.is_file():
            yield from (json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.usefixtures("small")
def test_a_large_log_is_rotated(tmp_path: Path, complaints: list[str]) -> None:
    """Two writers take turns: no line is lost or doubled, and every file is for its owner only."""
    old = os.umask(0)
    try:
        with ExitStack() as stack:
            logs = [stack.enter_context(log_to(tmp_path / "run.log", "job", complaints.append)) for _ in range(2)]
            for number in range(60):
                logs[number % 2].line("note", text=str(number))
    finally:
        os.umask(old)

    assert sorted(map(int, texts(tmp_path))) == list(range(60))
    files = list(tmp_path.glob("run.log*"))
    assert len(files) > 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert complaints == []


@pytest.mark.usefixtures("small")
def test_no_more_than_five_old_files_are_kept(tmp_path: Path, complaints: list[str]) -> None:
    """The oldest lines go."""
    with log_to(tmp_path / "run.log", "job", complaints.append) as log:
        for number in range(400):
            log.line("note", text=str(number))

    assert len(list(tmp_path.iterdir())) == 6
    assert max(map(int, texts(tmp_path))) == 399


WRITER = """
import sys
from pathlib import Path
from enrich.watch import runlog
runlog.LARGEST = 8_000
with runlog.log_to(Path("run.log"), "job", print) as log:
    for number in range(100):
        log.line("note", text=f"{sys.argv[1]}-{number}")
"""


@pytest.mark.long
def test_processes_that_rotate_at_once_lose_no_line(tmp_path: Path) -> None:
    """Three processes write and rotate one file as fast as they can."""
    root = str(Path(__file__).parents[1])
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, name], cwd=tmp_path, env={"PYTHONPATH": root}) for name in "abc"
    ]
    assert [writer.wait(30) for writer in writers] == [0, 0, 0]

    assert sorted(texts(tmp_path)) == sorted(f"{name}-{number}" for name in "abc" for number in range(100))
    assert len(list(tmp_path.glob("run.log*"))) > 2


def test_logrotate_may_take_the_file_away(tmp_path: Path, complaints: list[str]) -> None:
    """The next line goes to the file that has the name then."""
    with log_to(tmp_path / "run.log", "job", complaints.append) as log:
        log.line("note", text="old")
        (tmp_path / "run.log").rename(tmp_path / "old.log")
        log.line("note", text="new")
        log.line("note", text="newer")

    assert "old" in (tmp_path / "old.log").read_text()
    assert list(texts(tmp_path)) == ["new", "newer"]


@pytest.mark.usefixtures("small")
def test_a_log_that_cannot_be_rotated_goes_on(tmp_path: Path, complaints: list[str]) -> None:
    """Where something is in the way the file grows, and that is told once."""
    (tmp_path / "run.log.4").write_text("{}")
    (tmp_path / "run.log.5").mkdir()
    with log_to(tmp_path / "run.log", "job", complaints.append) as log:
        for number in range(60):
            log.line("note", text=str(number))

    written = (tmp_path / "run.log").read_text().splitlines()
    assert [json.loads(line)["text"] for line in written] == [str(number) for number in range(60)]
    assert len(complaints) == 1
    assert "rotated" in complaints[0]


@pytest.mark.usefixtures("small")
def test_a_link_is_followed(tmp_path: Path, complaints: list[str]) -> None:
    """The file that it leads to is rotated, where it lies."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "run.log").touch()
    (tmp_path / "here.log").symlink_to(tmp_path / "far" / "run.log")
    with log_to(tmp_path / "here.log", "job", complaints.append) as log:
        for number in range(60):
            log.line("note", text=str(number))

    assert (tmp_path / "here.log").is_symlink()
    assert sorted(map(int, texts(tmp_path / "far"))) == list(range(60))


@pytest.mark.long
def test_a_disk_that_fills_up_does_not_break_the_run(api: Api, office: Office) -> None:
    """The log stays behind, is told of once on stderr, and the leads are enriched."""
    office.write_leads(somebody(2))
    room = 3_000_000
    (office.folder / "run.log").write_text('{"v": 1}\n' * (room // 9))

    done = office.enrich("run", "job.yaml", *LOG, api=api, room=room)

    assert done.code == 0
    assert done.stderr.count("\n") == 1
    assert "run.log: the log cannot be written" in done.stderr
    assert len(office.output()) == 2


def test_a_log_that_cannot_be_opened_is_exit_5(api: Api, office: Office) -> None:
    """Told before anything is spent."""
    office.write_leads(somebody(1))

    done = office.command("run", "job.yaml", "--log-file", "leads.csv/run.log", api=api)

    assert done.code == 5
    assert "log" in done.stderr
    assert api.audit()["accepted"] == 0


def test_progress_is_a_line_a_minute(tmp_path: Path, complaints: list[str]) -> None:
    """Also after the process was stopped for an hour: one line, not sixty."""
    now = 0.0
    progress = Progress(total=9, done=3, found=2, spent=1.5, in_flight=4)
    with log_to(tmp_path / "run.log", "job", complaints.append) as opened:
        log = Log(opened._handler, "job", lambda: now)
        for moment in (0, 59, 60, 61, 119, 120, 3720, 3721, 3722):
            now = float(moment)
            log.progress(progress, lambda: 7)

    lines = [json.loads(line) for line in (tmp_path / "run.log").read_text().splitlines()]
    assert len(lines) == 3
    assert {"event": "progress", "execution": 7, "done": 3, "total": 9, "found": 2, "credits": 1.5}.items() <= (
        lines[0].items()
    )


@in_turn("name", ["leads.csv", ".enrich/job.db", "leads.jsonl"])
def test_what_is_no_log_is_not_written_into(tmp_path: Path, name: str) -> None:
    """A slip of the pen must not append to the leads, or rotate a ledger away."""
    office = Office(tmp_path)
    office.write_job()
    office.write_leads(people(1))
    (tmp_path / "leads.jsonl").write_text('{"First Name": "Ada"}\n')
    with serving(tmp_path / "api.db") as api:
        assert office.command("run", "job.yaml", api=api).code == 0
        before = (tmp_path / name).read_bytes()
        done = office.command("run", "job.yaml", "--log-file", name, api=api)
    assert (done.code, "no log" in done.stderr) == (5, True)
    assert (tmp_path / name).read_bytes() == before

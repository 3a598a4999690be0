"""A new ledger is compared with those beside it: a copied, renamed or re-pointed job does not buy in silence."""

from __future__ import annotations

import os
import pty
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from enrich.errors import LedgerMoved, RunDeclined
from enrich.ledger.database import Database
from enrich.ledger.rescue_file import RescueFile
from enrich.ledger.rescue_recorder import RescueRecorder
from enrich.run.context import RunOptions
from tests.support.cases import first_quick
from tests.support.ledger import run_sql
from tests.support.workspace import (
    JOB,
    SandboxApi,
    Workspace,
    kill_process,
    make_leads,
    read_terminal,
    serve_api,
)

RUN = ("run", "job.yaml", "--json")


@pytest.fixture
def workspace(workspace: Workspace, api: SandboxApi) -> Workspace:
    """Make a job that has paid for twelve leads."""
    workspace.write_leads(make_leads(12))
    assert workspace.run_job(api).submitted == 12
    return workspace


def write_other_job(workspace: Workspace, stem: str = "copy", **replaced: str) -> str:
    """Write another job file beside the first, with an output of its own. Return its name."""
    text = JOB
    for key, value in ({"output": f"{stem}_out.csv"} | replaced).items():
        text = re.sub(rf"^{key}:.*\n(?: .*\n)*", "", text, flags=re.MULTILINE) + f"{key}: {value}\n"
    (workspace.folder / f"{stem}.yaml").write_text(text)
    return f"{stem}.yaml"


@pytest.mark.parametrize(
    "cause", first_quick(1, ["renamed", "copied", "linked", "re-pointed", "other columns", "--ledger", "backup"])
)
def test_run_is_refused(api: SandboxApi, workspace: Workspace, cause: str) -> None:
    """Refuses however the new ledger came about, again and again, and `--yes` changes nothing; `ledger:` shares."""
    job, more = "copy.yaml", list[str]()
    match cause:
        case "copied":
            write_other_job(workspace)
        case "linked":
            write_other_job(workspace)
            (workspace.folder / "snapshot").hardlink_to(workspace.ledger_path)
        case "renamed":
            job = write_other_job(workspace, "job", name="renamed", output="renamed.csv")
        case "re-pointed":
            workspace.write_leads(make_leads(10), name="new.csv")
            write_other_job(workspace, input="new.csv")
        case "other columns":
            write_other_job(workspace, columns="{mail: email}")
        case "--ledger":
            job, more = write_other_job(workspace), ["--ledger", ".enrich/fresh.db"]
        case _:
            workspace.ledger_path.rename(workspace.ledger_path.with_name("saturday.backup"))
            (workspace.folder / "out.csv").unlink()
            job = "job.yaml"

    for _ in range(2):
        result = workspace.run_in_process("run", job, "--json", "--yes", *more, api=api)
        assert result.exit_code == 5, result.stderr
        assert result.json_output.keys() == {"exit_code", "error"}
        assert "are already paid for in " in result.stderr
        assert "pay again with --new-ledger" in result.stderr
    assert api.audit()["accepted"] == 12
    assert not list(workspace.folder.glob("copy_out*"))
    assert workspace.run_in_process("status", job, *more, "--json").json_output["executions"] == []

    if cause == "copied":
        shared = workspace.run_in_process(*("run", job, "--json"), "--ledger", ".enrich/job.db", api=api)
        assert (shared.exit_code, shared.json_output["submitted"], shared.json_output["reused"]) == (0, 0, 12)
    if cause == "backup":
        return  # the output is gone, and the ledger has another name
    paid = workspace.run_in_process("run", job, "--json", "--new-ledger", *more, api=api)
    assert (paid.exit_code, paid.json_output["submitted"] >= 10) == (0, True)
    again = workspace.run_in_process("run", job, "--json", *more, api=api)
    assert (again.exit_code, again.json_output["submitted"]) == (0, 0)


def test_hint_names_a_ledger_with_signs_of_yaml(api: SandboxApi, workspace: Workspace) -> None:
    """The line for the job file is quoted where YAML needs it, so that it can be pasted."""
    workspace.ledger_path.rename(workspace.ledger_path.with_name("old: #1, {a}.db"))
    refused = workspace.run_in_process(*RUN, api=api)
    assert refused.exit_code == 5
    key, _, value = refused.stderr.split("`")[1].partition(": ")

    workspace.write_job(**{key: value})
    shared = workspace.run_in_process(*RUN, api=api)

    assert (shared.exit_code, shared.json_output["submitted"], shared.json_output["reused"]) == (0, 0, 12), shared


def test_answers_from_a_rescue_file_are_not_paid_again(api: SandboxApi, workspace: Workspace) -> None:
    """A ledger that was renamed during a run is no reason to refuse: the rescue file has what it has paid for."""
    with closing(Database(workspace.ledger_path)) as ledger:
        recorder = RescueRecorder(ledger, RescueFile(workspace.ledger_path), LedgerMoved("", ""), database_missing=True)
        recorder.begin()
        recorder.close()
    workspace.ledger_path.rename(workspace.ledger_path.with_name("moved.db"))
    workspace.write_leads(make_leads(13))

    result = workspace.run_in_process(*RUN, api=api)

    assert (result.exit_code, result.json_output["submitted"], result.json_output["reused"]) == (0, 1, 12), (
        result.stderr
    )
    assert not any("paid again" in note for note in result.json_output["notes"])


@pytest.mark.long
def test_hint_shares_the_answers(api: SandboxApi, workspace: Workspace) -> None:
    """The `ledger:` of the hint, put into the job file, is the one that paid."""
    job = write_other_job(workspace)
    refused = workspace.run_in_process("run", job, api=api)
    assert "`ledger: .enrich/job.db`" in refused.stderr
    write_other_job(workspace, ledger=".enrich/job.db")
    assert workspace.run_in_process("run", job, "--json", api=api).json_output["submitted"] == 0


@pytest.mark.parametrize(
    ("wanted", "shared", "refused"),
    first_quick(0, [(30, 9, False), (30, 10, True), (1001, 10, False), (1000, 10, True)]),
)
def test_bounds(api: SandboxApi, workspace: Workspace, wanted: int, shared: int, *, refused: bool) -> None:
    """From 10 requests and 1 % of the wanted ones on; below that a line in summary, text and log."""
    job = write_other_job(workspace, input="new.csv")
    workspace.write_leads([*make_leads(shared), *make_leads(wanted - shared, start=100)], name="new.csv")

    result = workspace.run_in_process(
        "run", job, "--json", "--summary", "--limit", "3", "--log-file", "run.log", api=api
    )

    assert result.exit_code == (5 if refused else 0), result.stderr
    if not refused:
        summary = result.json_output
        assert summary["paid_in_other_ledgers"] == shared
        (note,) = summary["notes"]
        assert note.startswith(f"{shared} of the {wanted:,} requests were already paid for in job.db")
        assert "also paid in another ledger of this folder" in result.stderr
        assert note in (workspace.folder / "run.log").read_text()


@pytest.mark.long
def test_nothing_shared_is_silent(api: SandboxApi, workspace: Workspace) -> None:
    """Another job beside it is not refused and has no note."""
    job = write_other_job(workspace, input="new.csv")
    workspace.write_leads(make_leads(20, start=100), name="new.csv")
    summary = workspace.run_in_process("run", job, "--json", api=api).json_output
    assert (summary["exit_code"], summary["notes"], summary["paid_in_other_ledgers"]) == (0, [], 0)


@pytest.mark.long
def test_shares_of_several_ledgers_are_added(api: SandboxApi, workspace: Workspace) -> None:
    """Counts a request once, and those of different ledgers together."""
    first = write_other_job(workspace, "first", input="first.csv")
    workspace.write_leads(make_leads(6, start=100), name="first.csv")
    assert workspace.run_in_process("run", first, api=api).exit_code == 0
    job = write_other_job(workspace, input="new.csv")
    workspace.write_leads([*make_leads(6, start=100), *make_leads(6)], name="new.csv")

    result = workspace.run_in_process("run", job, api=api)

    assert (result.exit_code, "12 of the 12 requests" in result.stderr) == (5, True)


@pytest.mark.long
def test_unreadable_neighbours_do_not_matter(api: SandboxApi, workspace: Workspace) -> None:
    """Reads what can be read: bad neighbours fail no run, and hide no good one, which is read after them."""
    content = workspace.ledger_path.read_bytes()

    def bad(name: str, content: bytes = content) -> Path:
        path = workspace.ledger_path.with_name(f"bad {name}.db")
        path.write_bytes(content)
        return path

    bad("garbage", content[:100] + b"\xff" * 20_000)
    bad("cut", content[:5000])
    bad("empty", b"")
    bad("no rights", content[:5000]).chmod(0)  # cut, too: the superuser needs no rights
    run_sql_plain(bad("newer"), "PRAGMA user_version = 99")
    run_sql_plain(bad("another program", b""), "CREATE TABLE requests (id INTEGER)")
    os.mkfifo(workspace.ledger_path.with_name("bad pipe.db"))
    job = write_other_job(workspace, input="new.csv")
    workspace.write_leads(make_leads(20, start=100), name="new.csv")
    assert workspace.run_in_process("run", job, "--json", api=api).exit_code == 0
    second = write_other_job(workspace, "second")
    assert workspace.run_in_process("run", second, api=api).exit_code == 5


def run_sql_plain(path: Path, sql: str) -> None:
    """Run SQL on a file without any check."""
    with closing(sqlite3.connect(path)) as database:
        database.execute(sql)


@pytest.mark.long
def test_other_workspace_is_no_neighbour(workspace: Workspace, tmp_path: Path) -> None:
    """A ledger of another workspace has answers of another account: nothing is compared."""
    job = write_other_job(workspace)
    run_sql(workspace.ledger_path, "UPDATE facts SET value = 'another' WHERE name = 'workspace'")
    with serve_api(tmp_path / "second.db") as api:
        assert workspace.run_in_process("run", job, "--json", api=api).json_output["submitted"] == 12


@pytest.mark.long
def test_running_neighbour_counts(tmp_path: Path, workspace: Workspace) -> None:
    """What a killed run has bought and not yet collected counts as paid for, too."""
    workspace.write_leads(make_leads(20, start=100), name="slow.csv")
    slow = write_other_job(workspace, "slow", input="slow.csv")
    with serve_api(tmp_path / "slow.db", latency="fixed(60)") as api:
        process = workspace.start_subprocess("run", slow, api=api)
        while api.audit()["accepted"] < 20:
            assert process.poll() is None
        kill_process(process)
        job = write_other_job(workspace, input="slow.csv")
        result = workspace.run_in_process("run", job, api=api)
        assert (result.exit_code, api.audit()["accepted"]) == (5, 20), result.stderr


@pytest.mark.long
def test_plan_says_so(api: SandboxApi, workspace: Workspace) -> None:
    """The plan tells that a run would be refused, and `--limit 0` asks nothing of anyone."""
    job = write_other_job(workspace)
    planned = workspace.run_in_process("plan", job, api=api)
    assert (planned.exit_code, "a run would be refused: 12 of the 12 requests" in planned.stdout) == (0, True)
    assert workspace.run_in_process("run", job, "--limit", "0", api=api).exit_code == 0


@pytest.mark.long
def test_question_on_a_terminal(api: SandboxApi, workspace: Workspace) -> None:
    """Asks once, `--yes` or not. No: one line, exit 5, no execution. Yes: pays again."""
    job = write_other_job(workspace)

    declined, code = answer_on_terminal(workspace, api, "n", "run", job, "--yes")
    assert code == 5
    assert declined.count("Pay again? [y/N]") == 1
    assert "hint: share its results with `ledger: .enrich/job.db` in the job file" in declined
    assert declined.rstrip().splitlines()[-1] == "Cancelled. Nothing sent."
    assert "to send" not in declined
    assert api.audit()["accepted"] == 12
    assert workspace.run_in_process("status", job, "--json").json_output["executions"] == []

    agreed, code = answer_on_terminal(workspace, api, "y", "run", job, "--yes")
    assert (code, agreed.count("Pay again?"), api.audit()["accepted"]) == (0, 1, 24)


@pytest.mark.long
def test_answer_no_to_the_cost(api: SandboxApi, workspace: Workspace) -> None:
    """No to the plan of a first run: one line, exit 5, no receipt, no execution, no output, no report."""
    job = write_other_job(workspace, input="new.csv", report="report.html")
    workspace.write_leads(make_leads(5, start=100), name="new.csv")

    declined, code = answer_on_terminal(workspace, api, "n", "run", job)

    assert code == 5
    assert "5 requests to send" in declined
    last, question = declined.rstrip().splitlines()[-1], declined.index("Spend up to 17.55 credits on 5 leads? [y/N]")
    assert last == "Cancelled. Nothing sent."
    assert declined[question:].count("\n") == 2
    assert api.audit()["accepted"] == 12
    assert workspace.run_in_process("status", job, "--json").json_output["executions"] == []
    assert not list(workspace.folder.glob("copy_out*")) + list(workspace.folder.glob("report*"))
    write_other_job(workspace, input="new.csv")  # without a report, which takes seconds to draw
    agreed, code = answer_on_terminal(workspace, api, "y", "run", job)
    assert (code, "leads enriched" in agreed) == (0, True)


@pytest.mark.long
def test_no_keeps_what_was_collected(tmp_path: Path, workspace: Workspace) -> None:
    """A run that has collected open tasks before the answer "no" stays on record."""
    one = Workspace(workspace.folder / "one")
    one.folder.mkdir()
    one.write_leads(make_leads(4))
    one.write_job(name="first")
    with serve_api(tmp_path / "slow.db", latency="fixed(600)") as api:
        one.submit_without_collecting(api)
        api.advance(3600)
        one.write_job(name="second", ledger=".enrich/first.db", input="more.csv", output="second.csv")
        one.write_leads(make_leads(4, start=50), name="more.csv")
        summary = one.run_job(api, RunOptions(confirm=lambda _: False))
        assert (summary.exit_code, summary.execution, summary.answers) == (5, 2, 4)
        with pytest.raises(RunDeclined):
            one.run_job(api, RunOptions(confirm=lambda _: False))


def answer_on_terminal(workspace: Workspace, api: SandboxApi, answer: str, *command: str) -> tuple[str, int]:
    """Run the program on a pseudo-terminal and answer its question. Return what was shown, and the exit code."""
    ours, theirs = pty.openpty()
    process = workspace.start_subprocess(*command, api=api, terminal=theirs, TERM="xterm")
    os.close(theirs)
    shown = read_terminal(ours, up_to=b"[y/N]")
    os.write(ours, f"{answer}\n".encode())
    shown += read_terminal(ours)
    os.close(ours)
    return shown.decode().replace("\r\n", "\n"), process.wait(timeout=60)

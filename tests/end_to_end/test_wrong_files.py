"""Commands that name a wrong file say which, why, and what else to do, and leave nothing behind."""

from __future__ import annotations

import errno
import gzip
import os
import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest

from enrich.job.job import load_job
from enrich.ledger.lock import lock_ledger
from enrich.sandbox.store import SandboxStore
from tests.support.cases import in_turn
from tests.support.workspace import SandboxApi, Workspace, make_leads


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """A job with one lead."""
    workspace.write_leads(make_leads(1))
    workspace.write_job()
    return workspace


@pytest.fixture
def finished_job(workspace: Workspace, api: SandboxApi) -> Workspace:
    """The same job after a run."""
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    return workspace


@in_turn(
    "content",
    [b"Email\nada@engine.example\n", gzip.compress(b"x", mtime=0), b"PK\x03\x04\0\0"],
    ids=["text", "gzip", "zip"],
)
@in_turn("command", ["run", "status", "check", "collect", "ledger check", "ledger copy"])
def test_ledger_that_was_never_one(finished_job: Workspace, api: SandboxApi, command: str, content: bytes) -> None:
    """A file without the header of a database is not called damaged, and gets no lock."""
    workspace = finished_job
    (workspace.folder / "other.csv").write_bytes(content)
    before = sorted(workspace.folder.iterdir())
    chosen = ["job.yaml", "other.csv"] if command == "ledger copy" else ["job.yaml", "--ledger", "other.csv"]
    result = workspace.run_in_process(*command.split(), *chosen, api=api)
    assert (result.exit_code, "this file is not a ledger" in result.stderr) == (5, True), result.stderr
    assert "damaged" not in result.stderr
    assert sorted(workspace.folder.iterdir()) == before


def test_folder_that_takes_no_files(workspace: Workspace) -> None:
    """Not taken for a ledger that another run uses."""
    result = workspace.run_in_process("run", "job.yaml", "--sandbox", "--ledger", "/proc/x.db")
    assert (result.exit_code, "cannot be made" in result.stderr) == (5, True), result.stderr


@in_turn("command", ["run", "cancel", "collect", "purge", "ledger copy"])
def test_only_a_run_can_wait_for_the_lock(finished_job: Workspace, api: SandboxApi, command: str) -> None:
    """The hint names no option that the command lacks."""
    workspace = finished_job
    options = {"purge": ["--older-than", "1d", "--yes"], "ledger copy": ["copy.db"]}.get(command, [])
    with lock_ledger(load_job(workspace.job_file).ledger, 0):
        result = workspace.run_in_process(*command.split(), "job.yaml", *options, api=api)
    assert (result.exit_code, "--watch" in result.stderr) == (11, True), result.stderr
    assert ("--if-locked" in result.stderr) == (command == "run")


def test_units_that_exist(workspace: Workspace) -> None:
    """`cron` has no `-o`."""
    assert workspace.run_in_process("cron", "job.yaml", "--output-dir", "units").exit_code == 0
    result = workspace.run_in_process("cron", "job.yaml", "--output-dir", "units")
    assert (result.exit_code, "choose another folder, or replace it with --force" in result.stderr) == (2, True)
    result = workspace.run_in_process("cron", "job.yaml", "--output-dir", "s3://units/enrich")
    assert (result.exit_code, "must be a folder on this machine" in result.stderr) == (2, True), result.stderr


WRONG_PLACES = [
    ("cron job.yaml --output-dir leads.csv", 2, "leads.csv is not a folder", "enrich cron --help"),
    ("cron job.yaml --output-dir nowhere", 2, "nowhere is not a folder", "enrich cron --help"),
    ("cron job.yaml --output-dir /dev/full", 2, "/dev/full is not a folder", "enrich cron --help"),
    ("cron job.yaml --output-dir leads.csv/units", 5, "cannot be written: Not a directory", "choose another folder"),
    ("init leads.csv --waterfall email_getter --offline -o /proc/x", 5, "/proc/x: cannot be written", "choose another"),
    ("init leads.csv --waterfall email_getter --offline -o leads.csv/x", 5, "not a folder", "choose another name"),
    ("report job.yaml -o leads.csv/x.html", 5, "is not a folder", "choose another file"),
    ("report job.yaml -o /proc/self/mem", 5, "the report cannot be written", "choose another file"),
    ("report job.yaml --sandbox -o /proc/self/mem", 5, "the report cannot be written", "choose another file"),
    ("plan job.yaml --rows leads.csv/x.csv", 5, "is not a folder", "choose another file"),
    ("run job.yaml --log-file leads.csv/x.log", 5, "is not a folder", "choose another file"),
    ("run job.yaml --ledger leads.csv/x.db", 5, "is not a folder", "choose another file"),
    ("run job.yaml --plan nowhere", 5, "the plan cannot be read: No such file", "create one: enrich plan job.yaml"),
    ("doctor job.yaml --offline --env-file nowhere", 2, "nowhere cannot be read: No such file", "NAME=VALUE per line"),
    ("check /proc/self/mem", 2, "the job file cannot be read: Input/output error", "this user may read it"),
    ("plan job.yaml --input leads.csv/x.csv", 5, "x.csv cannot be read: Not a directory", "this user may read it"),
    ("plan job.yaml --input /proc/self/mem", 5, "/proc/self/mem cannot be read", "this user may read it"),
    ("sandbox --state leads.csv/x.db", 2, "leads.csv/x.db: the sandbox cannot use it: Not", "another with --state"),
    ("sandbox --state /proc/self/mem", 2, "mem: the sandbox cannot use it", "choose another with --state"),
    ("sandbox --state leads.csv", 2, "leads.csv: the sandbox cannot use it", "choose another with --state"),
]


@in_turn(["arguments", "code", "message", "hint"], WRONG_PLACES)
def test_a_file_in_place_of_a_folder(  # noqa: PLR0917 - the columns of the table
    finished_job: Workspace, api: SandboxApi, arguments: str, code: int, message: str, hint: str
) -> None:
    """And devices, dangling links, missing files: the error names the file, the reason and what to do."""
    if not (finished_job.folder / "nowhere").is_symlink():
        (finished_job.folder / "nowhere").symlink_to("missing")
    result = finished_job.run_in_process(*arguments.split(), api=api)
    problem, remedy = result.stderr.rsplit("\nhint: ", 1)
    assert (result.exit_code, message in problem, hint in remedy) == (code, True, True), result.stderr
    assert "Traceback" not in result.stderr


def test_job_file_in_a_closed_folder(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """`init` says what to do. Root may write everywhere."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("enrich.commands.init.replace_file", refuse)
    result = workspace.run_in_process("init", "leads.csv", "--waterfall", "email_getter", "--offline")
    assert (result.exit_code, "permissions of its folder" in result.stderr) == (5, True), result.stderr


def test_port_in_use(workspace: Workspace) -> None:
    """The sandbox names the port, not its state."""
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        result = workspace.run_in_process("sandbox", "--port", str(port))
    assert result.exit_code == 2
    assert f"port {port}: the sandbox cannot use it: Address already in use" in result.stderr
    assert "choose another with --port" in result.stderr


@pytest.mark.parametrize("ledger", ["/", "folder"])
def test_the_sandbox_of_a_folder_as_the_ledger(workspace: Workspace, ledger: str) -> None:
    """A folder is no ledger, and the sandbox makes no file beside it."""
    (workspace.folder / "folder").mkdir()
    result = workspace.run_in_process("plan", "job.yaml", "--sandbox", "--ledger", ledger)
    assert (result.exit_code, "this is a folder" in result.stderr) == (5, True), result.stderr
    assert not list(workspace.folder.glob("*.api.db*"))


@pytest.mark.parametrize("case", ["plan -o", "plan --rows", "run --log-file", "cron --log-file", "ledger backup"])
def test_stdout_where_a_file_is_needed(workspace: Workspace, api: SandboxApi, case: str) -> None:
    """`-` is stdout elsewhere, so no file of that name is written."""
    command, option = case.split()
    words = (command, "job.yaml", option) if option.startswith("-") else (command, option, "job.yaml")
    result = workspace.run_in_process(*words, "-", api=api)
    assert (result.exit_code, "must be a file" in result.stderr) == (2, True), result.stderr
    assert not (workspace.folder / "-").exists()


def test_plan_and_rows_in_one_file(workspace: Workspace, api: SandboxApi) -> None:
    """Compared before either is written."""
    result = workspace.run_in_process("plan", "job.yaml", "-o", "p.csv", "--rows", "./p.csv", api=api)
    assert (result.exit_code, "would be the same file" in result.stderr) == (2, True), result.stderr
    assert not (workspace.folder / "p.csv").exists()


def test_duration_names_its_option(workspace: Workspace) -> None:
    """As all other usage errors do."""
    result = workspace.run_in_process("cron", "job.yaml", "--max-time", "x")
    assert (result.exit_code, "--max-time" in result.stderr) == (2, True)


def test_sandbox_without_its_extra(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says so as every other error."""
    monkeypatch.delitem(sys.modules, "enrich.sandbox.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = workspace.run_in_process("sandbox")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the sandbox is not installed\nhint: pip install")


def test_no_enrichment_matches(workspace: Workspace, api: SandboxApi) -> None:
    """An empty list says so; in JSON it is one. Without a name, all are listed."""
    assert workspace.run_in_process("waterfalls", "", api=api).stdout.startswith("email_getter")
    shown = workspace.run_in_process("enrichments", "nothing like it", api=api)
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, "", "no enrichment matches\n")
    assert workspace.run_in_process("enrichments", "nothing like it", "--json", api=api).stdout == "[]\n"


@pytest.mark.parametrize("exists", [False, True])
def test_ledger_that_is_the_output(workspace: Workspace, *, exists: bool) -> None:
    """One cause is one error."""
    if exists:
        (workspace.folder / "out.csv").write_text("Email\nada@engine.example\n")
    workspace.write_job(ledger="out.csv")
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code in (2, 5)
    assert result.stderr.count("error:") == 1, result.stderr


@in_turn("link", [False, True])
@in_turn(
    "command",
    ["run", "plan", "status", "collect", "reconcile", "forget --match Email=ada@engine.example --yes",
     "purge --older-than 1d --yes"],
)  # fmt: skip
def test_root_folder_as_ledger(workspace: Workspace, api: SandboxApi, command: str, *, link: bool) -> None:
    """The root has no name that a lock or journal beside it could extend, and is refused as any folder is."""
    if link and not (workspace.folder / "root.db").is_symlink():
        (workspace.folder / "root.db").symlink_to("/")
    name, *options = command.split()
    ledger = "root.db" if link else "/"
    result = workspace.run_in_process(name, "job.yaml", *options, "--ledger", ledger, api=api)
    assert (result.exit_code, "this is a folder" in result.stderr) == (5, True), result.stderr
    assert not Path("/.lock").exists()


@in_turn("command", ["plan", "run", "reconcile"])
@in_turn("content", [None, b"no state", b"SQLite format 3\0" + bytes(84)])
def test_sandbox_without_a_usable_state(workspace: Workspace, command: str, content: bytes | None) -> None:
    """A file or folder that the sandbox can't use is named, with what to do."""
    workspace.write_job(ledger=f"{command} {len(content or b'')}.db")
    state = workspace.folder / f"{command} {len(content or b'')}.sandbox.api.db"
    if content is None:
        state.mkdir(exist_ok=True)
    else:
        state.write_bytes(content)
    result = workspace.run_in_process(command, "job.yaml", "--sandbox")
    assert (result.exit_code, f"{state.name}: the sandbox cannot use this file" in result.stderr) == (5, True)


def test_plan_beside_a_sandbox_run(workspace: Workspace) -> None:
    """The state of the sandbox is in use, which passes."""
    (workspace.folder / ".enrich").mkdir()
    with closing(SandboxStore(workspace.folder / ".enrich" / "job.sandbox.api.db", 0)):
        result = workspace.run_in_process("plan", "job.yaml", "--sandbox")
    assert (result.exit_code, "another command is using it" in result.stderr) == (5, True), result.stderr


TITLE = "Leads of December\n"
LEADS = "First Name,Last Name,Website,Email,Note\nAda,Byron,acme.example,,\n"
OTHER_COLUMNS = "Artikel,Menge,Preis\n1,2,3\n"


@in_turn(
    ("content", "code", "words"),
    [
        ("", 5, "is empty"),
        (f"{TITLE}{LEADS}", 5, "the header may be a later row"),
        (f"{TITLE}\n{LEADS}", 5, "the header may be a later row"),
        (f"Leads,of,December,a,b\n{LEADS}", 5, "row 1 under it has the column names"),
        (f"{LEADS}Ada,Byron\n", 5, "row 2 (line 3) has 2 cells"),
        (LEADS.replace("Note", "Email"), 5, "duplicate column names"),
        ("Ada,Byron,acme.example,a\n", 5, "the file has no header"),
        (LEADS.replace("Last Name", "Surname"), 2, "no column `Last Name`"),
        (LEADS.replace(",", ";"), 2, "its header looks separated by"),
        (OTHER_COLUMNS, 2, "the input has none of these columns: First Name, Last Name, Website, Email"),
    ],
)
def test_a_fault_of_the_input_is_the_same_in_every_command(
    finished_job: Workspace, api: SandboxApi, content: str, code: int, words: str
) -> None:
    """Each command that reads the input has the same exit code, sentence and hint for it, in JSON, too."""
    (finished_job.folder / "leads.csv").write_text(content)
    _check_same_in_every_command(finished_job, api, code, words)


@in_turn(
    ("name", "target", "code", "words"),
    [
        ("loop.csv", "loop.csv", 2, "its links lead in a circle"),
        ("link.csv", "no.csv", 5, "it is a link to no.csv, which is missing"),
        ("empty.xlsx", None, 5, "empty.xlsx is empty"),
        ("empty.parquet", None, 5, "empty.parquet is empty"),
        ("empty.csv.gz", None, 5, "empty.csv.gz is empty"),
        ("absent.csv", "", 5, "check the path; it is relative to the job file"),
    ],
)
def test_an_input_that_is_no_table_is_the_same_in_every_command(  # noqa: PLR0917 - the columns of the table
    finished_job: Workspace, api: SandboxApi, name: str, target: str | None, code: int, words: str
) -> None:
    """A link that leads nowhere, or a file without content."""
    finished_job.write_job(input=name)
    if target is None:
        (finished_job.folder / name).touch()
    elif target:
        (finished_job.folder / name).symlink_to(target)
    _check_same_in_every_command(finished_job, api, code, words)


@in_turn(
    ("changed", "words"),
    [
        ({"order_by": "[Size]"}, "known: First Name, Last Name, Website, Email, Note"),
        ({"only_if_empty": "[Size]"}, "known: First Name, Last Name, Website, Email, Note"),
        ({"caps": "{by: Land, max: 1}"}, "known: First Name, Last Name, Website, Email, Note, first_name"),
        ({"report": "{by: Land}"}, "known: First Name, Last Name, Website, Email, Note"),
        ({"where": "Country = 'DE'"}, "names with blanks are put in double quotes"),
    ],
)
def test_a_missing_column_is_the_same_in_every_command(
    finished_job: Workspace, api: SandboxApi, changed: dict[str, str], words: str
) -> None:
    """Of each key that names one, with the known columns in the hint."""
    finished_job.write_job(**changed)
    _check_same_in_every_command(finished_job, api, 2, words)


def _check_same_in_every_command(workspace: Workspace, api: SandboxApi, code: int, words: str) -> None:
    shown = set()
    for command in ("check", "plan", "run", "collect", "explain --row 1"):
        name, *arguments = command.split()
        result = workspace.run_in_process(name, "job.yaml", *arguments, "--json", api=api)
        assert result.exit_code == result.json_output["exit_code"] == code, (command, result.stderr)
        assert f"error: {result.json_output['error']}\n" in result.stderr
        shown.add(result.stderr)
    assert len(shown) == 1, shown
    assert words in shown.pop()

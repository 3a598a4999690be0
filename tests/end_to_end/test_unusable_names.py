"""A name that no file can have is an error of the command with a sentence, and never a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from enrich.cli import run_command
from tests.support.cases import first_quick, in_turn
from tests.support.workspace import SandboxApi, Workspace, make_leads

TOO_LONG = "x" * 300
COMMANDS = [
    "run --output .csv",
    "run --input .csv",
    "run --ledger .db",
    "run --log-file .log",
    "plan --rows .csv",
    "plan -o .json",
    "plan --input .csv",
    "check --input .csv",
    "check --output .csv",
    "status --ledger .db",
    "report -o .html",
]
ENDINGS = {"report": ".html", "metrics": ".prom", "ledger": ".db"}
KEYS = ["input", "output", "rejects", "report", "metrics", "suppress", "notify", "ledger"]


@pytest.fixture(params=["loop", TOO_LONG, "~/x"], ids=["loop", "long", "home"])
def stem(request: pytest.FixtureRequest, workspace: Workspace) -> str:
    """The name of a link to itself, one that is too long, or one that only a shell understands."""
    workspace.write_leads(make_leads(1))
    workspace.write_job()
    if request.param == "loop":
        for ending in (".csv", ".db", ".log", ".json", ".html", ".prom"):
            (workspace.folder / f"loop{ending}").symlink_to(f"loop{ending}")
    return str(request.param)


def _check_refused(code: int, stderr: str) -> None:
    assert code in (2, 5), stderr
    assert any(words in stderr for words in ("in a circle", "too long", "Too many levels", "for a shell")), stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("case", first_quick(5, COMMANDS))
def test_options(workspace: Workspace, api: SandboxApi, stem: str, case: str) -> None:
    """The names on the command line."""
    command, option, ending = case.split()
    result = workspace.run_in_process(command, "job.yaml", option, stem + ending, api=api)
    _check_refused(result.exit_code, result.stderr)


ARGUMENTS = [
    "ledger backup job.yaml NAME",
    "ledger copy out.db NAME.db",
    "init leads.csv --waterfall email_getter --offline --force -o NAME.yaml",
    "doctor job.yaml --offline --env-file NAME",
]


@pytest.mark.parametrize("arguments", first_quick(2, ARGUMENTS))
def test_arguments(workspace: Workspace, arguments: str) -> None:
    """The names of files that only one command has."""
    workspace.write_leads(make_leads(1))
    result = workspace.run_in_process(*(word.replace("NAME", TOO_LONG) for word in arguments.split()))
    _check_refused(result.exit_code, result.stderr)


@pytest.mark.parametrize("name", ["$HOME", "~", "~ada", "~ada.lovelace"])
def test_variable_in_a_path(workspace: Workspace, api: SandboxApi, name: str) -> None:
    """No folder of this name is made. One that exists is used."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(output=f'"{name}/out.csv"')
    for arguments in ([], ["--output", f"{name}/other.csv"]):
        result = workspace.run_in_process("run", "job.yaml", *arguments, api=api)
        assert (result.exit_code, f"`{name}` is for a shell only: write the whole path" in result.stderr) == (2, True)
    assert api.audit()["accepted"] == 0

    (workspace.folder / name).mkdir()
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0


def test_empty_argument(workspace: Workspace) -> None:
    """An empty name is none, and not the folder."""
    result = workspace.run_in_process("ledger", "backup", "job.yaml", "")
    assert (result.exit_code, "cannot be the name of a file: it is empty" in result.stderr) == (2, True)


@pytest.mark.parametrize("key", first_quick(3, KEYS))
@pytest.mark.parametrize("command", ["run", "check"])
def test_keys(workspace: Workspace, api: SandboxApi, stem: str, command: str, key: str) -> None:
    """The names in the job file."""
    workspace.write_job(**{key: stem + ENDINGS.get(key, ".csv")})
    result = workspace.run_in_process(command, "job.yaml", api=api)
    _check_refused(result.exit_code, result.stderr)
    assert api.audit()["accepted"] == 0


#: A URL where only a file of this machine is possible: keys of the job file, and commands.
LOCAL_KEYS = ["suppress", "metrics", "notify"]
LOCAL_COMMANDS = [
    "run job.yaml --log-file",
    "run job.yaml --plan",
    "plan job.yaml --rows",
    "plan job.yaml -o",
    "report job.yaml -o",
    "ledger backup job.yaml",
    "init",
]


@in_turn("case", [*LOCAL_KEYS, *LOCAL_COMMANDS])
def test_url_of_a_local_file(workspace: Workspace, case: str) -> None:
    """A URL is not taken for a path, in which a folder `s3:` would be made."""
    url = "s3://bucket/file.html"
    workspace.write_leads(make_leads(1))
    workspace.write_job(**({case: url} if case in LOCAL_KEYS else {}))
    files = sorted(workspace.folder.iterdir())
    result = workspace.run_in_process(*("run job.yaml --sandbox" if case in LOCAL_KEYS else f"{case} {url}").split())
    assert result.exit_code == 2, result.stderr
    assert "must be a file on this machine, not a URL" in result.stderr
    assert sorted(workspace.folder.iterdir()) == files


def test_job_name(workspace: Workspace) -> None:
    """A name of a job that is too long for the files that are named after it."""
    workspace.write_job(name=TOO_LONG)
    result = workspace.run_in_process("check", "job.yaml")
    assert (result.exit_code, "at most 200 characters" in result.stderr) == (2, True)


@pytest.mark.parametrize("command", ["run", "check", "cron"])
def test_job_file_name_that_is_no_text(workspace: Workspace, command: str) -> None:
    """The ledger records names as text."""
    workspace.write_job()
    name = os.fsdecode(b"j\xff.yaml")
    (workspace.folder / "job.yaml").rename(workspace.folder / name)
    result = workspace.run_in_process(command, name)
    assert (result.exit_code, "j\\xff.yaml: the name of the job file is not UTF-8 text" in result.stderr) == (2, True)


@pytest.mark.parametrize("job", ["job.yaml", "{folder}/job.yaml"])
def test_working_directory_that_is_gone(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, job: str
) -> None:
    """A relative path cannot be resolved."""
    workspace.write_leads(make_leads(1))
    workspace.write_job()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code = run_command(["run", job.format(folder=workspace.folder), "--sandbox", "--output", "x.csv"])
    assert (code, "working directory no longer exists" in capsys.readouterr().err) == (2, True)

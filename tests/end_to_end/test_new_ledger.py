"""A new ledger beside an output that another ledger paid for: refused or confirmed, never paid again silently."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from enrich.errors import CommandRefused
from enrich.run.context import RunOptions
from tests.support.cases import first_quick, in_turn
from tests.support.object_storage import BUCKET
from tests.support.workspace import BOTH_BACKENDS, SandboxApi, Workspace, make_leads

RUN = ("run", "job.yaml", "--json")
JOB_WITH_STEPS = """\
version: 1
input: leads.csv
output: steps.csv
steps:
- name: email
  waterfall: email_getter
  params: {first_name: First Name, last_name: Last Name, company: Website}
"""


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """Make a job with some leads."""
    workspace.write_leads(make_leads(5))
    return workspace


def assert_refused(workspace: Workspace, api: SandboxApi, *more: str) -> None:
    """Assert that runs without a terminal send nothing, however often, and that the message names the options."""
    before = api.audit()["accepted"]
    for _ in range(2):
        result = workspace.run_in_process(*RUN, *more, "--yes", api=api)
        assert (result.exit_code, result.json_output["exit_code"]) == (5, 5), result.stderr
        assert "was paid for from another ledger" in result.stderr
        assert "pay again with --new-ledger" in result.stderr
    assert api.audit()["accepted"] == before


@pytest.mark.long
@pytest.mark.parametrize("name", ["out.csv", "out/%Y-%m.csv", "out/", "out/%Y-%m/"])
def test_output_in_object_storage_is_checked(
    api: SandboxApi, workspace: Workspace, bucket: dict[str, str], name: str
) -> None:
    """The output of an earlier month refuses a new ledger, a first run has no note."""
    workspace = replace(workspace, environ=bucket)
    workspace.write_job(output=f"s3://{BUCKET}/{name.replace('%Y-%m', '2026-01')}")
    first = workspace.run_in_process(*RUN, api=api)
    assert (first.exit_code, first.stderr) == (0, "")
    workspace.write_job(output=f"s3://{BUCKET}/{name}")
    workspace.ledger_path.unlink()
    assert_refused(workspace, api)


@pytest.mark.parametrize(
    ("renamed", "ledger"), [("nightly.yaml", ".enrich/job.db"), ("moved/job.yaml", "../.enrich/job.db")]
)
def test_ledger_of_a_renamed_job_is_named(api: SandboxApi, workspace: Workspace, renamed: str, ledger: str) -> None:
    """The hint for a job file that was renamed or moved has the ledger that paid, as the job file names it."""
    workspace.run_job(api)
    up = "../" * renamed.count("/")
    text = workspace.write_job(input=f"{up}leads.csv", output=f"{up}out.csv").read_text(encoding="utf-8")
    moved = workspace.folder / renamed
    moved.parent.mkdir(exist_ok=True)
    workspace.job_file.rename(moved)

    refused = workspace.run_in_process("run", renamed, "--json", api=api)
    moved.write_text(f"{text}ledger: {ledger}\n", encoding="utf-8")
    shared = workspace.run_in_process("run", renamed, "--json", api=api)

    assert (refused.exit_code, f"`ledger: {ledger}` in the job file, or pay again" in refused.stderr) == (5, True)
    assert (shared.exit_code, shared.json_output["reused"], shared.json_output["submitted"]) == (0, 5, 0)


def test_older_copy_of_the_ledger_is_refused(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses a ledger from before the last run when the output has its tasks and many others."""
    workspace.write_leads(make_leads(22))
    workspace.run_job(api, RunOptions(limit=11))
    restore = copy_ledger(workspace)
    workspace.run_job(api)
    restore()

    for command in RUN, ("plan", "job.yaml"), ("plan", "job.yaml", "--limit", "0"):
        result = workspace.run_in_process(*command, api=api)
        assert f"out.csv has tasks that {workspace.ledger_path} does not have" in result.stdout + result.stderr
    assert workspace.run_in_process(*RUN, "--yes", api=api).exit_code == 5
    assert api.audit()["accepted"] == 22

    result = workspace.run_in_process(*RUN, "--new-ledger", api=api)
    assert (result.exit_code, result.json_output["submitted"]) == (0, 11)
    assert workspace.run_in_process(*RUN, api=api).json_output["reused"] == 22


@pytest.mark.parametrize("case", first_quick(1, ["few", "saved again", "another ledger", "forgotten", "emptied"]))
def test_output_that_refuses_no_ledger(api: SandboxApi, workspace: Workspace, case: str) -> None:
    """A ledger that is not new is used if the output lacks its tasks, or has few others, or those of erased people."""
    workspace.write_leads([*make_leads(20), *make_leads(1) * 9])  # the first lead is there ten times
    first = workspace.run_job(api, RunOptions(limit=11))
    restore = copy_ledger(workspace)
    match case:
        case "few":
            workspace.run_job(api)
            restore()
        case "saved again":
            (workspace.folder / "out.csv").touch()
        case "forgotten":
            erased = workspace.run_in_process("forget", "job.yaml", "--match", "First Name=First0", "--yes")
            assert erased.exit_code == 0, erased.stderr
            (workspace.folder / "out.csv").touch()
        case "emptied":
            (workspace.folder / "out.csv").write_text("")
        case _:
            workspace.run_in_process(*RUN, "--ledger", "other.db", "--new-ledger", api=api)

    result = workspace.run_in_process(*RUN, api=api)
    assert (first.submitted, result.exit_code, result.json_output["submitted"]) == (11, 0, 9), result.stderr
    assert result.json_output["notes"] == []


@BOTH_BACKENDS
def test_tasks_of_the_input_refuse_no_ledger(api: SandboxApi, workspace: Workspace) -> None:
    """The input may be the output of a job with steps: the tasks of these are in the ledger of that job."""
    workspace.write_leads(make_leads(11))
    (workspace.folder / "steps.yaml").write_text(JOB_WITH_STEPS)
    assert workspace.run_in_process("run", "steps.yaml", api=api).exit_code == 0
    workspace.write_job(
        input="steps.csv",
        columns="{address: email}",
        params="{first_name: Last Name, last_name: Last Name, company: Website}",
    )

    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    assert {"enrich_email_task_id", "enrich_task_id"} <= workspace.read_output()[0].keys()
    assert workspace.run_in_process("collect", "job.yaml").exit_code == 0
    result = workspace.run_in_process(*RUN, api=api)
    assert (result.exit_code, result.json_output["reused"]) == (0, 11), result.stderr


@pytest.mark.parametrize("cause", first_quick(1, ["ledger removed", "folder removed", "another ledger", "renamed job"]))
def test_new_ledger_with_paid_output_is_refused(api: SandboxApi, workspace: Workspace, cause: str) -> None:
    """Refuses a new ledger however it came about; with --new-ledger the run pays."""
    workspace.run_job(api)
    more: tuple[str, ...] = ()
    match cause:
        case "ledger removed":
            workspace.ledger_path.unlink()
        case "folder removed":
            shutil.rmtree(workspace.ledger_path.parent)
        case "another ledger":
            more = ("--ledger", "other.db")
        case _:
            workspace.write_job(name="renamed")

    assert_refused(workspace, api, *more)
    assert "a run would be refused" in workspace.run_in_process("plan", "job.yaml", *more, api=api).stdout

    result = workspace.run_in_process(*RUN, *more, "--new-ledger", api=api)
    assert (result.exit_code, result.json_output["submitted"]) == (0, 5)
    assert workspace.run_in_process(*RUN, *more, api=api).json_output["reused"] == 5


def copy_ledger(workspace: Workspace) -> Callable[[], None]:
    """Copy the ledger. Returns what puts the copy in its place."""
    backup = workspace.folder / "backup.db"
    assert workspace.run_in_process("ledger", "backup", "job.yaml", str(backup)).exit_code == 0

    def restore() -> None:
        for path in workspace.ledger_path.parent.iterdir():
            path.unlink()
        backup.rename(workspace.ledger_path)

    return restore


@BOTH_BACKENDS
def test_server_ledger_is_checked(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses when the output was written from a file or another schema."""
    workspace.run_job(api)
    assert_refused(
        workspace, api, "--ledger", f"{workspace.server_url or 'other.db'}".replace("schema=", "schema=other_")
    )


@pytest.mark.parametrize(
    "name",
    first_quick(
        2, ["o.csv.gz", "o.tsv", "o.jsonl", "o.parquet", "o.xlsx", "parts/", "o-%Y-%m-%d.csv", "runs/%Y/%m/o.csv"]
    ),
)
def test_all_output_formats_are_checked(api: SandboxApi, workspace: Workspace, name: str) -> None:
    """Checks every output format, also of another day."""
    workspace.write_job(output=name)
    assert workspace.run_job(api).exit_code == 0
    if "%d" in name:
        (found,) = workspace.folder.glob("o-*.csv")
        found.rename(workspace.folder / "o-2024-02-29.csv")
    shutil.rmtree(workspace.ledger_path.parent)

    assert_refused(workspace, api)


#: What a spreadsheet or an editor makes of the text of an output.
RESAVED: dict[str, Callable[[str], bytes]] = {
    "semicolons": lambda text: text.replace(",", ";").encode(),
    "tabs, UTF-16": lambda text: text.replace(",", "\t").encode("utf-16"),
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "cp1252": lambda text: text.replace("Mail 0", "caf\u00e9").encode("cp1252"),
    "sep=": lambda text: ("sep=;\n" + text.replace(",", ";")).encode(),
    "title": lambda text: ("Leads of December\n\n" + text).encode(),
    "short row": lambda text: (text + "x,y\n").encode(),
    "open quote": lambda text: (text + '"x,y\n').encode(),
    "open quote in the first row": lambda text: text.replace("\n", '\n"', 1).encode(),
    "cut": lambda text: text[:-30].encode(),
}


@pytest.fixture
def paid_output(api: SandboxApi, workspace: Workspace) -> str:
    """Make an output whose ledger is gone, and return its text."""
    workspace.write_leads([[*row[:-1], "Mail 0"] for row in make_leads(2)])
    workspace.run_job(api)
    shutil.rmtree(workspace.ledger_path.parent)
    return (workspace.folder / "out.csv").read_text(encoding="utf-8")


@in_turn("change", RESAVED)
def test_output_that_was_saved_again_is_checked(
    api: SandboxApi, workspace: Workspace, paid_output: str, change: str
) -> None:
    """Finds the task ids in whatever separator, encoding and rows another program has saved the output with."""
    (workspace.folder / "out.csv").write_bytes(RESAVED[change](paid_output))

    result = workspace.run_in_process(*RUN, "--yes", api=api)

    assert (result.exit_code, "was paid for from another ledger" in result.stderr) == (5, True), result.stderr
    assert api.audit()["accepted"] == 2


@pytest.mark.long
@pytest.mark.parametrize("resaved", [False, True])
def test_all_separators_and_encodings_are_checked(api: SandboxApi, workspace: Workspace, *, resaved: bool) -> None:
    """Reads the output with the job's separator and encoding, or with the usual ones."""
    workspace.write_job(output="{path: o.csv, separator: ';', encoding: utf-16}")
    assert workspace.run_job(api).exit_code == 0
    shutil.rmtree(workspace.ledger_path.parent)
    output = workspace.folder / "o.csv"
    if resaved:
        output.write_text(output.read_text(encoding="utf-16").replace(";", ","), encoding="utf-8")

    assert_refused(workspace, api)


@pytest.mark.long
def test_newest_output_is_checked(api: SandboxApi, workspace: Workspace) -> None:
    """Checks the newest output only: an older one may be of any ledger."""
    workspace.write_job(output="o-%Y-%m-%d.csv")
    assert workspace.run_job(api).exit_code == 0
    (paid,) = workspace.folder.glob("o-*.csv")
    paid.rename(workspace.folder / "o-2024-01-01.csv")
    os.utime(workspace.folder / "o-2024-01-01.csv", (1, 1))
    (workspace.folder / "o-2024-01-02.csv").write_text("Name\nAda\n")
    shutil.rmtree(workspace.ledger_path.parent)

    assert workspace.run_in_process(*RUN, api=api).exit_code == 0


@pytest.mark.long
@pytest.mark.parametrize(
    "text",
    [
        "",
        "Name\nAda\n",
        "enrich_task_id\n\n",
        'First Name,enrich_task_id\n"a\nb",\n',
        'First Name,enrich_task_id,enrich_status\n"Ada, Countess",,pending\n',
        'First Name;enrich_task_id;enrich_status\n"Ada; Countess";;pending\n',
    ],
    ids=["empty", "another file", "no ids", "blank", "nothing sent", "nothing sent, saved again"],
)
def test_output_without_tasks_is_ignored(api: SandboxApi, workspace: Workspace, text: str) -> None:
    """Ignores an output without tasks, which was not paid for; replaces an empty or broken one."""
    (workspace.folder / "out.csv").write_text(text)

    assert workspace.run_in_process(*RUN, api=api).exit_code == 0


@pytest.mark.long
def test_unreadable_output_is_a_note(api: SandboxApi, workspace: Workspace) -> None:
    """The run continues, and the summary notes that the output was not checked."""
    (workspace.folder / "out.csv").write_bytes(b"\xff\xfe\x00enrich_task_id\n\x81\n")

    planned = workspace.run_in_process("plan", "job.yaml", api=api)
    result = workspace.run_in_process(*RUN, api=api)

    assert "cannot check whether another ledger paid" in planned.stdout
    assert result.exit_code == 0, result.stderr
    assert any("cannot check whether another ledger paid" in note for note in result.json_output["notes"])
    assert result.stderr.count("cannot check whether another ledger paid") == 1


@pytest.mark.long
def test_sandbox_does_not_hide_a_real_output(api: SandboxApi, workspace: Workspace) -> None:
    """Ignores the sandbox's output. A real output is compared with a new ledger, also after a sandbox run."""
    assert workspace.run_in_process(*RUN, "--sandbox").exit_code == 0
    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    assert workspace.run_in_process(*RUN, "--sandbox").exit_code == 0
    (workspace.ledger_path.parent / "job.db").unlink()
    assert workspace.run_in_process(*RUN, api=api).exit_code == 5
    assert api.audit()["accepted"] == 5


@pytest.mark.long
def test_enriched_input_is_ignored(api: SandboxApi, workspace: Workspace) -> None:
    """Ignores an input that was enriched before; its columns are replaced as usual."""
    workspace.run_job(api)
    (workspace.folder / "out.csv").rename(workspace.folder / "leads.csv")
    workspace.write_job(merge="fill_empty")
    shutil.rmtree(workspace.ledger_path.parent)

    assert workspace.run_in_process(*RUN, api=api).exit_code == 0


@pytest.mark.long
def test_confirmation_on_terminal(api: SandboxApi, workspace: Workspace) -> None:
    """No: one line, exit 5, no run recorded. Yes: the run pays."""
    workspace.run_job(api)
    workspace.write_job(name="other", ledger=".enrich/other.db")
    prompts: list[str] = []

    def confirm(text: str) -> bool:
        prompts.append(text)
        return len(prompts) > 1

    with pytest.raises(CommandRefused) as no:
        workspace.run_job(api, RunOptions(confirm_new_ledger=confirm))
    assert (no.value.message, no.value.hint) == ("Cancelled. Nothing sent.", None)
    summary = workspace.run_job(api, RunOptions(confirm_new_ledger=confirm))

    assert (summary.exit_code, summary.submitted, summary.execution) == (0, 5, 1)
    assert len(prompts) == 2
    assert "out.csv was paid for from another ledger" in prompts[0]

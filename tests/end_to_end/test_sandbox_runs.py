"""A sandbox run writes beside what real runs wrote, is marked as such, and is erased with the job."""

from __future__ import annotations

import gzip
import json
import shutil
import stat
from pathlib import Path

import pytest

from enrich.job.locations import is_sandbox_file_name, sandbox_file_name
from tests.support.cases import first_quick
from tests.support.sample_reports import fake_renderer
from tests.support.workspace import JOB, SandboxApi, Workspace, make_leads

RUN = ("run", "job.yaml", "--json")
REHEARSAL = (*RUN, "--sandbox")
EVERY_FILE = """\
rejects: rejects.csv
changes: changes.jsonl.gz
report: report.html
metrics: enrich.prom
"""


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """Make a job with some leads, one of them invalid."""
    workspace.write_leads([*make_leads(5), ["Ada", "", "", "", ""]])
    return workspace


def read_files(folder: Path) -> dict[str, bytes]:
    """Return all files with their content, except those of ledgers."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".enrich" not in path.parts
    }


@pytest.mark.parametrize(
    ("real", "sandbox_name"),
    [
        ("a.csv", "a.sandbox.csv"),
        ("out/a.csv.gz", "out/a.sandbox.csv.gz"),
        ("A.CSV.GZ", "A.sandbox.CSV.GZ"),
        ("a.b.jsonl.gz", "a.b.sandbox.jsonl.gz"),
        ("leads-%Y-%m-%d.parquet", "leads-%Y-%m-%d.sandbox.parquet"),
        ("out/%Y/leads.v1/", "out/%Y/leads.v1.sandbox/"),
        ("s3://bucket/a.b/leads.xlsx", "s3://bucket/a.b/leads.sandbox.xlsx"),
        ("s3://bucket/leads/", "s3://bucket/leads.sandbox/"),
        ("report.html", "report.sandbox.html"),
        ("a.sandbox.csv", "a.sandbox.sandbox.csv"),
        ("out.d/plain", "out.d/plain.sandbox"),
    ],
)
def test_names(real: str, sandbox_name: str) -> None:
    """`.sandbox` comes before the whole known ending, after a folder's name, and in a URL's last part."""
    assert sandbox_file_name(real) == sandbox_name
    assert is_sandbox_file_name(sandbox_name)
    assert is_sandbox_file_name(real) == (real == "a.sandbox.csv")


def test_nothing_real_is_touched(api: SandboxApi, workspace: Workspace) -> None:
    """Writes output, rejects, changes and report beside the real ones, and no metrics; asks the real API nothing."""
    workspace.write_job(JOB + EVERY_FILE)
    with fake_renderer():
        assert workspace.run_in_process(*RUN, api=api).exit_code == 0
        real, accepted = read_files(workspace.folder), api.audit()["accepted"]

        result = workspace.run_in_process(*REHEARSAL, api=api)

    assert result.exit_code == 0, result.stderr
    after = read_files(workspace.folder)
    assert {name: after[name] for name in real} == real
    assert set(after) - set(real) == {
        "out.sandbox.csv",
        "rejects.sandbox.csv",
        "changes.sandbox.jsonl.gz",
        "report.sandbox.html",
    }
    assert api.audit()["accepted"] == accepted
    summary = result.json_output
    assert summary["sandbox"] is True
    assert [Path(summary[kind]).name for kind in ("output", "rejects", "changes")] == [
        "out.sandbox.csv",
        "rejects.sandbox.csv",
        "changes.sandbox.jsonl.gz",
    ]
    assert gzip.decompress(after["changes.sandbox.jsonl.gz"])


@pytest.mark.parametrize("output", first_quick(0, ["parts/", "o-%Y.csv"]))
def test_folders_and_dates(api: SandboxApi, workspace: Workspace, output: str) -> None:
    """Leaves a real dataset and a dated output alone, and is not taken for the newest output of the job."""
    workspace.write_job(output=output)
    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    real = read_files(workspace.folder)
    assert workspace.run_in_process(*REHEARSAL).exit_code == 0
    assert real.items() <= read_files(workspace.folder).items()

    workspace.ledger_path.unlink()
    assert workspace.run_in_process(*RUN, api=api).exit_code == 5


@pytest.mark.long
def test_default_output(workspace: Workspace) -> None:
    """Renames the default output, too, also of another input."""
    workspace.write_job(JOB.replace("output: out.csv\n", ""))
    (workspace.folder / "leads.csv").rename(workspace.folder / "other.csv")
    assert workspace.run_in_process(*REHEARSAL, "--input", "other.csv").exit_code == 0
    assert (workspace.folder / "other_enriched.sandbox.csv").exists()
    assert not (workspace.folder / "other_enriched.csv").exists()


@pytest.mark.long
def test_given_output(api: SandboxApi, workspace: Workspace) -> None:
    """Takes `--output` as given, again and again, but never over the file of a real run."""
    for _ in range(2):
        assert workspace.run_in_process(*REHEARSAL, "--output", "mine.csv").exit_code == 0
    assert len(workspace.read_output("mine.csv")) == 6

    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    real = (workspace.folder / "out.csv").read_bytes()
    collecting = ("collect", "job.yaml", "--sandbox", "--json")
    for command in [[*REHEARSAL], [*collecting]]:
        result = workspace.run_in_process(*command, "--output", "out.csv")
        assert result.exit_code == 0, result.stderr
        assert "out.csv was written by a real run" in result.stderr
        assert result.json_output["output"].endswith("out.sandbox.csv")
    assert (workspace.folder / "out.csv").read_bytes() == real


@pytest.mark.long
def test_output_without_tasks_is_real(api: SandboxApi, workspace: Workspace) -> None:
    """Knows a real output without any task by the ledger, and one without a ledger by its tasks."""
    assert workspace.run_in_process(*RUN, "--limit", "0", api=api).exit_code == 0
    assert "real run" in workspace.run_in_process(*REHEARSAL, "--output", "out.csv").stderr

    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    workspace.ledger_path.unlink()
    assert "real run" in workspace.run_in_process(*REHEARSAL, "--output", "out.csv").stderr


@pytest.mark.long
def test_real_file_of_that_name(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses to replace a real output that is named as that of the sandbox run."""
    workspace.write_job(output="out.sandbox.csv", name="other")
    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    workspace.write_job(name="job")

    result = workspace.run_in_process(*REHEARSAL)

    assert (result.exit_code, "would replace a file of a real run" in result.stderr) == (5, True)
    assert len(workspace.read_output("out.sandbox.csv")) == 6


@pytest.mark.parametrize("ledger", first_quick(0, [None, "costs.db"]))
def test_own_file_of_another_sandbox_ledger(workspace: Workspace, ledger: str | None) -> None:
    """A sandbox run replaces its own file when the ledger that recorded it is gone, or another is used."""
    workspace.write_job(JOB + EVERY_FILE.replace("report: report.html\n", ""))
    assert workspace.run_in_process(*REHEARSAL).exit_code == 0
    if ledger is None:
        shutil.rmtree(workspace.ledger_path.parent)
    chosen = () if ledger is None else ("--ledger", ledger)
    result = workspace.run_in_process(*REHEARSAL, *chosen)
    assert result.exit_code == 0, result.stderr


@pytest.mark.long
def test_copy_of_the_sandbox_ledger(workspace: Workspace) -> None:
    """A copy of the sandbox's ledger beside it is no ledger of a real run: the sandbox replaces its own output."""
    assert workspace.run_in_process(*REHEARSAL).exit_code == 0
    (ledger,) = workspace.folder.rglob("*.sandbox.db")
    shutil.copy(ledger, ledger.with_name(f"{ledger.name}.backup"))

    result = workspace.run_in_process(*REHEARSAL)

    assert result.exit_code == 0, result.stderr


@pytest.mark.long
def test_real_file_of_that_name_beside_another_ledger(api: SandboxApi, workspace: Workspace) -> None:
    """The real run is found at the default place of ledgers, too."""
    workspace.write_job(output="out.sandbox.csv", name="other")
    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    workspace.write_job(name="job")
    result = workspace.run_in_process(*REHEARSAL, "--ledger", "costs/my.db")
    assert (result.exit_code, "would replace a file of a real run" in result.stderr) == (5, True)


@pytest.mark.long
def test_given_ledger(api: SandboxApi, workspace: Workspace) -> None:
    """A ledger that `--ledger` or the environment names stays real: the sandbox run has another beside it."""
    assert workspace.run_in_process(*REHEARSAL, "--ledger", "my.db").exit_code == 0
    assert workspace.run_in_process(*REHEARSAL, ENRICH_LEDGER=str(workspace.folder / "my.db")).exit_code == 0
    assert not (workspace.folder / "my.db").exists()
    status = workspace.run_in_process("status", "job.yaml", "--ledger", "my.sandbox.db", "--sandbox", "--json")
    assert status.json_output["requests"] == 5
    assert workspace.run_in_process(*RUN, "--ledger", "my.db", api=api).json_output["submitted"] == 5


@pytest.mark.long
def test_everything_says_sandbox(api: SandboxApi, workspace: Workspace) -> None:
    """Receipt, status, runs, plan and report say SANDBOX; those of real runs do not."""
    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    shown = {}
    for mode in ((), ("--sandbox",)):
        for line in (
            "run job.yaml --summary",
            "status job.yaml",
            "runs job.yaml",
            "plan job.yaml",
            "report job.yaml -o -",
        ):
            result = workspace.run_in_process(*line.split(), *mode, api=api)
            assert result.exit_code == 0, result.stderr
            shown[line.split()[0], bool(mode)] = result.stdout + result.stderr
    assert {place for place, text in shown.items() if "SANDBOX" in text} == {place for place in shown if place[1]}
    for command in ("status", "runs", "plan", "report"):
        for mode in ((), ("--sandbox",)):
            output = workspace.run_in_process(command, "job.yaml", *mode, "--json", api=api).json_output
            assert output["sandbox"] is bool(mode), command


@pytest.mark.long
def test_report_and_plan_files(api: SandboxApi, workspace: Workspace) -> None:
    """`-o` is taken as given, but never over the file of a real run; the rows of a plan have a name of their own."""
    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    commands: tuple[tuple[str, ...], ...] = (
        ("report", "job.yaml", "-o", "page.html"),
        ("plan", "job.yaml", "-o", "night.plan", "--rows", "rows.csv"),
    )
    for command in commands:
        assert workspace.run_in_process(*command, api=api).exit_code == 0
    real = read_files(workspace.folder)

    for command in commands:
        for _ in range(2):
            assert workspace.run_in_process(*command, "--sandbox").exit_code == 0
    assert workspace.run_in_process("report", "job.yaml", "-o", "new.html", "--sandbox").exit_code == 0
    after = read_files(workspace.folder)
    assert {name: after[name] for name in real} == real
    assert set(after) - set(real) == {"page.sandbox.html", "night.sandbox.plan", "rows.sandbox.csv", "new.html"}
    assert json.loads(after["night.sandbox.plan"])["sandbox"] is True


@pytest.mark.long
def test_ledger_folder_is_private(api: SandboxApi, workspace: Workspace) -> None:
    """`.enrich` is made with 0700, and tightened where an earlier version made it."""
    folder = workspace.ledger_path.parent
    for _ in range(2):
        assert workspace.run_in_process(*REHEARSAL).exit_code == 0
        assert workspace.run_in_process(*RUN, api=api).exit_code == 0
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o755)


def sandbox_bytes(workspace: Workspace) -> bytes:
    """Return all bytes of the sandbox's ledger and state."""
    return b"".join(path.read_bytes() for path in workspace.ledger_path.parent.glob("job.sandbox*"))


@pytest.mark.parametrize(
    ("with_real_run", "match"),
    first_quick(2, [(True, "First Name=First1"), (False, "Note=note 1"), (False, "First Name=First1")]),
)
def test_forget_reaches_the_sandbox(api: SandboxApi, workspace: Workspace, *, with_real_run: bool, match: str) -> None:
    """Forgets a person in the ledger, in that of the sandbox, and in what the sandbox was asked.

    A column that is not sent finds the person, too. A request in the sandbox counts once.
    """
    if with_real_run:
        assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    assert workspace.run_in_process(*REHEARSAL).exit_code == 0
    assert b"First1" in sandbox_bytes(workspace)

    result = workspace.run_in_process("forget", "job.yaml", "--match", match, "--yes", "--json")

    assert result.exit_code == 0, result.stderr
    assert result.json_output["requests"] == 1 + with_real_run
    assert b"First1" not in sandbox_bytes(workspace)
    assert b"company1.example" not in sandbox_bytes(workspace)
    assert b"First2" in sandbox_bytes(workspace)
    again = workspace.run_in_process(*REHEARSAL).json_output
    assert (again["filtered"], again["submitted"]) == (1, 0)


@pytest.mark.long
def test_purge_reaches_the_sandbox(api: SandboxApi, workspace: Workspace) -> None:
    """Purges old answers in both ledgers, and in what the sandbox was asked."""
    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    assert workspace.run_in_process(*REHEARSAL).exit_code == 0

    assert workspace.run_in_process("purge", "job.yaml", "--older-than", "0s", "--yes").exit_code == 0

    assert b"First1" not in sandbox_bytes(workspace)
    assert workspace.run_in_process("status", "job.yaml", "--json").json_output["requests"] == 5


@pytest.mark.long
def test_sandbox_compares_no_ledgers(api: SandboxApi, workspace: Workspace) -> None:
    """A sandbox run is refused by no ledger beside it, and refuses no real run."""
    workspace.write_leads(make_leads(20))
    assert workspace.run_in_process(*RUN, api=api).exit_code == 0
    workspace.write_job(name="other", output="other.csv")
    assert workspace.run_in_process(*REHEARSAL).exit_code == 0
    workspace.write_job(name="third", output="third.csv")
    (workspace.folder / ".enrich" / "job.db").unlink()
    assert workspace.run_in_process(*RUN, api=api).json_output["submitted"] == 20

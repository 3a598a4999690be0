"""The report file: where it is written, what it never replaces, and that it breaks no run."""

from __future__ import annotations

import stat
from pathlib import Path
from unittest.mock import patch

import pytest
from polars.exceptions import PanicException

from enrich.commands.report import REPORT_MARKER
from enrich.errors import JobError, install_hint
from tests.support.cases import first_quick
from tests.support.sample_reports import fake_renderer
from tests.support.workspace import (
    HEADER,
    INSTANT_API,
    SandboxApi,
    Workspace,
    kill_process,
    make_leads,
    serve_api,
    wait_until,
)

# The file


def test_report_beside_output(finished_run: Workspace) -> None:
    """The report lies beside the output, for its owner only, and is replaced each time; off a terminal it is silent."""
    path = finished_run.folder / "job_report.html"
    for page in ("<html>one</html>", "<html>two</html>"):
        with fake_renderer(page):
            written = finished_run.run_in_process("report", "job.yaml")
        assert (written.exit_code, written.stdout, written.stderr) == (0, "", "")
        assert path.read_text() == page + REPORT_MARKER.decode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not list(finished_run.folder.glob(".job_report*"))


def test_report_destinations(finished_run: Workspace) -> None:
    """A report goes to a file, to stdout or to the job's path."""
    with fake_renderer():
        assert finished_run.run_in_process("report", "job.yaml", "-o", "-").stdout == "<html>drawn</html>\n"
        assert (
            finished_run.run_in_process("report", "job.yaml", "-o", "deep/er/page.html", "--json").json_output["job"]
            == "job"
        )
        finished_run.write_job(report="reports/%Y.html")
        assert finished_run.run_in_process("report", "job.yaml").exit_code == 0
        assert finished_run.run_in_process("report", "job.yaml", "--json", "-o", "-").exit_code == 2
    assert (finished_run.folder / "deep/er/page.html").exists()
    assert len(list((finished_run.folder / "reports").glob("20*.html"))) == 1
    assert not (finished_run.folder / "job_report.html").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["leads.csv", "job.yaml", "out.csv", ".enrich/job.db", ".enrich/job.db.lock", "mine.html", "later.csv"],
)
def test_only_reports_are_replaced(finished_run: Workspace, name: str) -> None:
    """Only a report is replaced, not a file of the job (existing or future), its empty lock file or a foreign page."""
    (finished_run.folder / "mine.html").write_text("<html>mine</html>")
    finished_run.write_job(rejects="later.csv")
    path = finished_run.folder / name
    before = path.read_bytes() if path.exists() else None

    with fake_renderer():
        refused = finished_run.run_in_process("report", "job.yaml", "-o", name)

    assert refused.exit_code == 2
    assert name.rsplit("/", 1)[-1] in refused.stderr
    assert "-o FILE" in refused.stderr
    assert (path.read_bytes() if path.exists() else None) == before


def test_unwritable_report_is_exit_5(finished_run: Workspace) -> None:
    """The error for an unwritable report names the file."""
    with fake_renderer():
        refused = finished_run.run_in_process("report", "job.yaml", "-o", "leads.csv/page.html")
    assert refused.exit_code == 5
    assert "page.html: the report cannot be written" in refused.stderr


@pytest.mark.long
def test_missing_report_extra(api: SandboxApi, finished_run: Workspace) -> None:
    """Without the report extra, the error shows how to install it; with `report:`, check, doctor and run do too."""
    pip = install_hint("report")
    with patch("enrich.commands.report._LIBRARIES", ("no_such_library",)):
        page, facts = (
            finished_run.run_in_process("report", "job.yaml"),
            finished_run.run_in_process("report", "job.yaml", "--json"),
        )
        assert pip not in finished_run.run_in_process("check", "job.yaml", api=api).stderr
        finished_run.write_job(report="page.html")
        checked, doctor = (
            finished_run.run_in_process("check", "job.yaml", api=api),
            finished_run.run_in_process("doctor", "job.yaml", "--json", api=api),
        )
        run = finished_run.run_in_process("run", "job.yaml", api=api)

    assert (page.exit_code, facts.exit_code, checked.exit_code, run.exit_code) == (2, 0, 0, 0)
    assert pip in page.stderr
    assert pip in checked.stderr
    assert pip in run.stderr
    (found,) = (each for each in doctor.json_output["findings"] if each["subject"] == "report")
    assert (found["mark"], found["remedy"]) == ("warn", pip)


# The report of a run


@pytest.mark.long
def test_report_after_every_run(api: SandboxApi, workspace: Workspace) -> None:
    """Every run writes a report: successful, failed, or in the sandbox."""
    workspace.write_leads(make_leads(3))
    workspace.write_job(report="page.html")
    path = workspace.folder / "page.html"
    with fake_renderer():
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
        assert path.exists()
        path.unlink()
        workspace.write_leads(make_leads(30))
        assert workspace.run_in_process("run", "job.yaml", "--max-credits", "3", api=api).exit_code == 12
        assert path.exists()
        path.unlink()
        assert workspace.run_in_process("run", "job.yaml", "--sandbox", "--limit", "0").exit_code == 0
        assert path.with_name("page.sandbox.html").exists()


@pytest.mark.parametrize(
    ("error", "why"),
    first_quick(
        1,
        [
            (ValueError("ada@engine.example"), "this is a bug: ValueError"),
            (PanicException("ada@engine.example"), "this is a bug: PanicException"),
            (KeyboardInterrupt(), "interrupted"),
            (JobError("no"), "no"),
        ],
    ),
)
def test_failing_report_is_a_note(api: SandboxApi, workspace: Workspace, error: BaseException, why: str) -> None:
    """A failing report is one note without quoted data; the exit code is the run's."""
    workspace.write_leads(make_leads(2))
    workspace.write_job(report="page.html")
    with fake_renderer(error=error):
        result = workspace.run_in_process("run", "job.yaml", "--json", "--log-file", "run.log", api=api)

    assert result.exit_code == result.json_output["exit_code"] == 0
    (note,) = result.stderr.splitlines()
    assert note == f"note: the report was not written: {why}"
    assert note.removeprefix("note: ") in (workspace.folder / "run.log").read_text()


@pytest.mark.long
def test_report_over_foreign_file_is_a_note(api: SandboxApi, workspace: Workspace) -> None:
    """A foreign file in the report's place stays and gives one note; `enrich check` warns before."""
    workspace.write_leads(make_leads(2))
    workspace.write_job(report="mine.html")
    mine = workspace.folder / "mine.html"
    mine.write_text("<html>mine</html>")
    checked = workspace.run_in_process("check", "job.yaml")
    with fake_renderer():
        result = workspace.run_in_process("run", "job.yaml", api=api)

    assert checked.exit_code == 2
    assert "not a report of enrich" in checked.stderr
    assert result.exit_code == 0
    assert "mine.html exists" in result.stderr
    assert mine.read_text() == "<html>mine</html>"


@pytest.mark.long
def test_interrupted_run_writes_no_report(tmp_path: Path, workspace: Workspace) -> None:
    """An interrupted run writes no report."""
    workspace.write_leads(make_leads(2))
    workspace.write_job(report="page.html")
    with serve_api(tmp_path / "api.db", INSTANT_API, latency="fixed(600)") as api:
        process = workspace.start_subprocess("run", "job.yaml", api=api)
        try:
            wait_until(lambda: workspace.open_task_count() == 2)
            process.terminate()
            process.communicate(timeout=90)
        finally:
            kill_process(process)
    assert process.returncode == 143
    assert not (workspace.folder / "page.html").exists()


# The `report` key of the job file


@pytest.mark.long
@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("page.txt", "job.yaml:12: report: `page.txt` is not an HTML file"),
        ("s3://bucket/page.html", "not an HTML file on this machine"),
        ("{}", "job.yaml:12: report: needs `path` or `by`"),
        ("{by: []}", "report"),
        ("{bye: Note}", "did you mean `by`?"),
        ("{by: Nota}", "did you mean `Note`?"),
        ("{by: enrich_status}", "job.yaml:12: report.by.0: `enrich_status` is a column of the output"),
        ("{by: [Note, Contry]}", "job.yaml:12: report.by.1: the input has no column `Contry`"),
    ],
)
def test_invalid_report_key(workspace: Workspace, report: str, message: str) -> None:
    """An invalid key is reported with its nearest valid name, by `check` as by `run`."""
    workspace.write_leads([[*make_leads(1)[0], "found"]], [*HEADER, "enrich_status"])
    workspace.write_job(report=report)
    for command in ("check", "run"):
        result = workspace.run_in_process(
            command, "job.yaml", DATABAR_API_KEY="x", DATABAR_BASE_URL="http://127.0.0.1:9/v1"
        )
        assert result.exit_code == 2
        assert message in result.stderr


def test_report_path_clash(api: SandboxApi, workspace: Workspace) -> None:
    """A report path that is another file of the job is refused before anything is spent."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(report="page.html", metrics="m.prom", suppress="page.html")
    (workspace.folder / "page.html").write_text("")
    for command in ("check", "run"):
        result = workspace.run_in_process(command, "job.yaml", api=api)
        assert result.exit_code == 2
        assert "`suppress`" in result.stderr
    assert api.audit()["accepted"] == 0


def test_unwritable_path_found_by_check(workspace: Workspace) -> None:
    """`enrich check` reports an unwritable path before the run."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(report="leads.csv/page.html")
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code == 5
    assert "`report` cannot be written" in result.stderr


@pytest.mark.long
def test_report_with_only_groups(api: SandboxApi, workspace: Workspace) -> None:
    """`by` alone sets the groups of `enrich report`."""
    workspace.write_leads(make_leads(2))
    workspace.write_job(report="{by: Note}")
    with fake_renderer():
        workspace.run_in_process("run", "job.yaml", api=api)
    assert not list(workspace.folder.glob("*.html"))

"""The file of the report: where it lies, what it never replaces, and that no run is broken by it."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
from polars.exceptions import PanicException

from enrich.errors import Exit, Interrupted, JobError
from enrich.report.facts import Report
from enrich.report.file import MARK
from tests.cases import first_quick
from tests.harness import CALM, HEADER, Api, Office, kill, people, serving, until

# The file


@contextmanager
def drawing(page: str = "<html>drawn</html>", error: BaseException | None = None) -> Iterator[None]:
    """Draw this page, or fail."""
    module = ModuleType("enrich.report.page")

    def render(report: Report) -> str:
        assert isinstance(report, Report)
        if error is not None:
            raise error
        return page

    module.render = render  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {"enrich.report.page": module}):
        yield


def test_the_report_lies_beside_the_output(done: Office) -> None:
    """For its owner only, replaced by the next one; nothing is said off a terminal."""
    path = done.folder / "job_report.html"
    for page in ("<html>one</html>", "<html>two</html>"):
        with drawing(page):
            written = done.command("report", "job.yaml")
        assert (written.code, written.stdout, written.stderr) == (0, "", "")
        assert path.read_text() == page + MARK.decode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not list(done.folder.glob(".job_report*"))


def test_the_report_goes_where_it_is_told(done: Office) -> None:
    """To a file, to stdout, or where the job says."""
    with drawing():
        assert done.command("report", "job.yaml", "-o", "-").stdout == "<html>drawn</html>\n"
        assert done.command("report", "job.yaml", "-o", "deep/er/page.html", "--json").receipt["job"] == "job"
        done.write_job(report="reports/%Y.html")
        assert done.command("report", "job.yaml").code == 0
        assert done.command("report", "job.yaml", "--json", "-o", "-").code == 2
    assert (done.folder / "deep/er/page.html").exists()
    assert len(list((done.folder / "reports").glob("20*.html"))) == 1
    assert not (done.folder / "job_report.html").exists()


@pytest.mark.parametrize(
    "name",
    first_quick(
        2, ["leads.csv", "job.yaml", "out.csv", ".enrich/job.db", ".enrich/job.db.lock", "mine.html", "later.csv"]
    ),
)
def test_nothing_but_a_report_is_replaced(done: Office, name: str) -> None:
    """Neither a file of the job, there or to come, nor the lock of its ledger (which is empty), nor somebody's page."""
    (done.folder / "mine.html").write_text("<html>mine</html>")
    done.write_job(rejects="later.csv")
    path = done.folder / name
    before = path.read_bytes() if path.exists() else None

    with drawing():
        refused = done.command("report", "job.yaml", "-o", name)

    assert refused.code == 2
    assert name.rsplit("/", 1)[-1] in refused.stderr
    assert "-o FILE" in refused.stderr
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_page_that_cannot_be_written_is_exit_5(done: Office) -> None:
    """The message names it."""
    with drawing():
        refused = done.command("report", "job.yaml", "-o", "leads.csv/page.html")
    assert refused.code == 5
    assert "page.html: the report cannot be written" in refused.stderr


def test_without_the_extra_there_are_facts_but_no_page(api: Api, done: Office) -> None:
    """And a hint how to get it; a job that wants a page of every run is told before the night."""
    pip = "pip install 'databar-enrich[report]'"
    with patch("enrich.report.file._LIBRARIES", ("no_such_library",)):
        page, facts = done.command("report", "job.yaml"), done.command("report", "job.yaml", "--json")
        assert pip not in done.command("check", "job.yaml", api=api).stderr
        done.write_job(report="page.html")
        checked, doctor = (
            done.command("check", "job.yaml", api=api),
            done.command("doctor", "job.yaml", "--json", api=api),
        )
        run = done.command("run", "job.yaml", api=api)

    assert (page.code, facts.code, checked.code, run.code) == (2, 0, 0, 0)
    assert pip in page.stderr
    assert pip in checked.stderr
    assert pip in run.stderr
    (found,) = (each for each in doctor.receipt["findings"] if each["subject"] == "report")
    assert (found["mark"], found["remedy"]) == ("warn", pip)


# The run's own report


def test_every_run_leaves_its_report(api: Api, office: Office) -> None:
    """After a good night and after a bad one, and after the sandbox's."""
    office.write_leads(people(3))
    office.write_job(report="page.html")
    path = office.folder / "page.html"
    with drawing():
        assert office.command("run", "job.yaml", api=api).code == 0
        assert path.exists()
        path.unlink()
        office.write_leads(people(30))
        assert office.command("run", "job.yaml", "--max-credits", "3", api=api).code == 12
        assert path.exists()
        path.unlink()
        assert office.command("run", "job.yaml", "--sandbox", "--limit", "0").code == 0
        assert path.exists()


@pytest.mark.parametrize(
    ("error", "why"),
    first_quick(
        1,
        [
            (ValueError("ada@engine.example"), "this is a bug: ValueError"),
            (PanicException("ada@engine.example"), "this is a bug: PanicException"),
            (KeyboardInterrupt(), "interrupted"),
            (Interrupted(Exit.TERMINATED), "interrupted"),
            (JobError("no"), "no"),
        ],
    ),
)
def test_a_report_that_fails_does_not_break_the_run(api: Api, office: Office, error: BaseException, why: str) -> None:
    """One note; the exit code is the run's, and the note quotes nobody."""
    office.write_leads(people(2))
    office.write_job(report="page.html")
    with drawing(error=error):
        done = office.command("run", "job.yaml", "--json", "--log-file", "run.log", api=api)

    assert done.code == done.receipt["exit_code"] == 0
    (note,) = done.stderr.splitlines()
    assert note == f"note: the report was not written: {why}"
    assert note.removeprefix("note: ") in (office.folder / "run.log").read_text()


def test_a_report_over_somebody_elses_file_does_not_break_the_run(api: Api, office: Office) -> None:
    """It stays, and one note says so; the check has told before."""
    office.write_leads(people(2))
    office.write_job(report="mine.html")
    mine = office.folder / "mine.html"
    mine.write_text("<html>mine</html>")
    checked = office.command("check", "job.yaml")
    with drawing():
        done = office.command("run", "job.yaml", api=api)

    assert checked.code == 2
    assert "no report of enrich" in checked.stderr
    assert done.code == 0
    assert "mine.html is there already" in done.stderr
    assert mine.read_text() == "<html>mine</html>"


@pytest.mark.long
def test_an_interrupted_run_leaves_fast(tmp_path: Path, office: Office) -> None:
    """It writes no report."""
    office.write_leads(people(2))
    office.write_job(report="page.html")
    with serving(tmp_path / "api.db", CALM, latency="fixed(600)") as api:
        process = office.start("run", "job.yaml", api=api)
        try:
            until(lambda: office.at_the_api() == 2)
            process.terminate()
            process.communicate(timeout=30)
        finally:
            kill(process)
    assert process.returncode == 143
    assert not (office.folder / "page.html").exists()


# The key in the job file


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ("page.txt", "job.yaml:12: report: `page.txt` is no HTML file"),
        ("s3://bucket/page.html", "no HTML file on this machine"),
        ("{}", "job.yaml:12: report: needs `path` or `by`"),
        ("{by: []}", "report"),
        ("{bye: Note}", "did you mean `by`?"),
        ("{by: Nota}", "did you mean `Note`?"),
        ("{by: enrich_status}", "job.yaml:12: report.by.0: `enrich_status` is a column of the output"),
        ("{by: [Note, Contry]}", "job.yaml:12: report.by.1: the input has no column `Contry`"),
    ],
)
def test_a_wrong_key_names_its_line(office: Office, report: str, said: str) -> None:
    """And the nearest right name; the check says what the run says."""
    office.write_leads([[*people(1)[0], "found"]], [*HEADER, "enrich_status"])
    office.write_job(report=report)
    for command in ("check", "run"):
        done = office.command(command, "job.yaml", DATABAR_API_KEY="x", DATABAR_BASE_URL="http://127.0.0.1:9/v1")
        assert done.code == 2
        assert said in done.stderr


def test_no_two_files_are_one(api: Api, office: Office) -> None:
    """A report that is another file of the job is refused before anything is spent."""
    office.write_leads(people(1))
    office.write_job(report="page.html", metrics="m.prom", suppress="page.html")
    (office.folder / "page.html").write_text("")
    for command in ("check", "run"):
        done = office.command(command, "job.yaml", api=api)
        assert done.code == 2
        assert "`suppress`" in done.stderr
    assert api.audit()["accepted"] == 0


def test_an_unwritable_place_is_noticed_by_the_check(office: Office) -> None:
    """Before the night."""
    office.write_leads(people(1))
    office.write_job(report="leads.csv/page.html")
    done = office.command("check", "job.yaml")
    assert done.code == 5
    assert "`report` cannot be written" in done.stderr


def test_a_report_that_only_groups_is_written_by_no_run(api: Api, office: Office) -> None:
    """`by` alone says how `enrich report` groups."""
    office.write_leads(people(2))
    office.write_job(report="{by: Note}")
    with drawing():
        office.command("run", "job.yaml", api=api)
    assert not list(office.folder.glob("*.html"))

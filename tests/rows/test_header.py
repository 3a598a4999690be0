"""What is said about a column that the input lacks: a hint that leads somewhere, and never a cell of a person."""

from __future__ import annotations

from pathlib import Path

import pytest

from enrich.errors import EnrichError, JobError
from enrich.files.text import looks_like_cell, missing_column_hint
from enrich.job.job import load_job
from enrich.rows.job_input import JobInput
from tests.support.cases import in_turn

JOB = """\
version: 1
input: {path: leads.csv%s}
waterfall: email_getter
params: {first_name: First Name, last_name: Last Name, company: Company}
"""
LEAD = "Adalina,Bironella,secret.person@a.example,+1 555 0100"


def open_error(folder: Path, content: str, settings: str = "") -> EnrichError:
    """Return the error of an input for the job above."""
    (folder / "leads.csv").write_bytes(content.encode())
    (folder / "job.yaml").write_text(JOB % settings)
    with pytest.raises(EnrichError) as caught:
        JobInput(load_job(folder / "job.yaml"))
    return caught.value


@in_turn(
    "content",
    [
        LEAD + "\nBob,C,b@b.example,+1\n",
        "Adalina,Bironella,www.secret.example,x\n",
        "Adalina,Bironella,secret.example,x\n",
        "Adalina,Bironella,(555) 010-0100,x\n",
        "Adalina,Bironella,secret,secret\n",
        "secret.person@a.example,secret.person@a.example\n1,2\n",
        "Adalina,Bironella,secret,x\n1,2,3,4\n",
        "Adalina,Bironella\n1,2,3,4\n",
        "Adalina;Bironella;secret\n",
        "Adalina\n\nBironella\n",
    ],
)
def test_no_header_quotes_no_cell(tmp_path: Path, content: str) -> None:
    """A file without a header is refused without its cells, by its shape or because no column fits."""
    error = open_error(tmp_path, content)
    said = f"{error.message} {error.hint}"
    for cell in ("Adalina", "Bironella", "555", "person"):
        assert cell not in said
    assert "secret" not in said or "`secret` at 3, 4" in said  # a duplicate name is quoted


def test_no_header_is_said(tmp_path: Path) -> None:
    """The error says that the header is missing, and how it looks."""
    error = open_error(tmp_path, LEAD + "\n")
    assert error.exit_code == 5
    assert "the file has no header" in error.message
    assert "First Name,Last Name" in (error.hint or "")


@in_turn(
    ("content", "words"),
    [
        ("Lead report,,,\n,,,\nFirst Name,Last Name,Company,Note\nA,B,C,D\n", "may be a later row"),
        ("Lead report\n\nFirst Name,Last Name,Company,Note\nA,B,C,D\n", "may be a later row"),
        (
            "Lead report,of March,a,b\nFirst Name,Last Name,Company,Note\nA,B,C,D\n",
            "row 1 under it has the column names",
        ),
        ("# a\n# b\nFirst Name,Last Name,Company\nA,B,C\n", "may be a later row"),
    ],
)
def test_title_above_the_header(tmp_path: Path, content: str, words: str) -> None:
    """A title above the header is exit 5, and the hint is to delete it."""
    error = open_error(tmp_path, content)
    assert error.exit_code == 5
    assert words in f"{error.message} {error.hint}"
    assert "delete the lines above it" in (error.hint or "")


def test_columns_without_a_name(tmp_path: Path) -> None:
    """Separators at the end of each line, as of a spreadsheet: the header is the right line."""
    error = open_error(tmp_path, "First Name,Last Name,Company,,\nA,B,C,,\n")
    assert (error.exit_code, error.hint) == (5, "delete the columns without a name")


@in_turn(
    ("name", "shown"),
    [
        ("First\u00a0Name", r"First\u00a0Name"),
        ("\u200bFirst Name", r"\u200bFirst Name"),
        ("First Name ", '"First Name "'),
        ("First  Name", '"First  Name"'),
        ("First\u2060 Name", r"First\u2060 Name"),
        ("First\nName", r"First\nName"),
    ],
)
def test_names_that_look_alike(tmp_path: Path, name: str, shown: str) -> None:
    """The invisible difference is shown as an escape, and the job works when it is copied from the hint."""
    content = f'"{name}",Last Name,Company\nA,B,C\n'
    error = open_error(tmp_path, content)
    assert isinstance(error, JobError)
    assert shown in (error.hint or "")
    escaped = (error.hint or "").split("the input's name is ")[1].split(", the job's")[0]
    (tmp_path / "job.yaml").write_text((JOB % "").replace("first_name: First Name", f"first_name: {escaped}"))
    assert JobInput(load_job(tmp_path / "job.yaml")).columns[0] == name


def test_names_with_dots(tmp_path: Path) -> None:
    """A line with the job's columns in another spelling is the header, although one of them may be a domain."""
    error = open_error(tmp_path, "FIRSTNAME,LASTNAME,ACCOUNT.NAME\nAda,Byron,Acme\n")
    assert isinstance(error, JobError)
    assert "did you mean `FIRSTNAME`" in (error.hint or "")


def test_hint_has_no_line_break() -> None:
    """The name in a hint is on one line; letters stay as they are."""
    assert missing_column_hint("First", ["Fi\nrst", "Last"], ["First", "Last"]) == r"did you mean `Fi\nrst`?"
    assert missing_column_hint("Strase", ["Straße", "Last"], ["Strase", "Last"]) == "did you mean `Straße`?"


def test_composed_and_decomposed() -> None:
    """Both spellings are shown as escapes."""
    hint = missing_column_hint("Prénom", ["Pre\u0301nom", "b"], ["Prénom"])
    assert hint is not None
    assert r"Pre\u0301nom" in hint
    assert r"Pr\u00e9nom" in hint


@in_turn(
    "name",
    ["ada@a.example", "https://a.example/x", "www.a.example", "a.example", "+49 30 1234", "030 / 1234 567", " a.de "],
)
def test_looks_like_cell(name: str) -> None:
    """E-mail addresses, URLs, domains and phone numbers are cells."""
    assert looks_like_cell(name)


@in_turn(
    "name", ["", "First Name", "E-mail", "2024", "2024-01-02", "Q1.2024", "No.", "a.b c", "+/-", "1st", "Phone (1)"]
)
def test_looks_like_name(name: str) -> None:
    """Names of columns are none, years and quarters neither."""
    assert not looks_like_cell(name)

"""Broken input is refused before anything is spent; unusual but valid input is preserved."""

from __future__ import annotations

import csv
import gzip
import io
import os
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enrich.run.summary import RunSummary
from tests.support.cases import examples, first_quick
from tests.support.workspace import HEADER, SandboxApi, Workspace, make_leads, serve_api

OLD_OUTPUT = "the output of an older night\n"
HEADER_LINE = ",".join(HEADER).encode()
VALID_ROW = b"\nAda,Byron,engine.example,,x"

#: The file's content, the exit code and words in the error message.
BROKEN: dict[str, tuple[bytes, int, tuple[str, ...]]] = {
    "empty": (b"", 5, ("is empty", "column names")),
    "only blank lines": (b"\n\n\n", 5, ("is empty",)),
    "missing column": (b"First Name,Last Name,Site\na,b,c\n", 2, ("job.yaml:", "Website", "leads.csv")),
    "another separator": (HEADER_LINE.replace(b",", b";") + b"\na;b;c;d;e\n", 2, ("First Name", '";"')),
    "duplicate header": (HEADER_LINE + b",Note\na,b,c,d,e,f\n", 5, ("header", "line 1", "`Note` at 5, 6")),
    "short row": (HEADER_LINE + VALID_ROW + b"\na,b,c\n", 5, ("row 2", "line 3", "3 cells", "5 columns", "hint")),
    "long row": (HEADER_LINE + VALID_ROW + b"\na,b,c,d,e,f\n", 5, ("row 2", "line 3", "6 cells", "5 columns", "hint")),
    "wrong encoding": (HEADER_LINE + VALID_ROW + b"\nJ\xfcrgen,b,c,d,e\n", 5, ("line 3", "`utf-8`", "cp1252")),
    "unclosed quote": (HEADER_LINE + VALID_ROW + b'\n"Ada,b,c,d,e\n', 5, ("row 2", "line 3", "never closed")),
    "text after a quote": (HEADER_LINE + VALID_ROW + b'\n"Ada"a,b,c,d,e\n', 5, ("row 2", "line 3", "quote")),
    "NUL": (HEADER_LINE + VALID_ROW + b"\nA\0da,b,c,d,e\n", 5, ("row 2", "line 3", "NUL")),
    "a workbook": (b"PK\x03\x04" + os.urandom(400), 5, ("Excel", "end in `.xlsx`, or set `format: xlsx`")),
    "an old workbook": (b"\xd0\xcf\x11\xe0" + os.urandom(400), 5, ("Excel",)),
    "gzip named csv": (gzip.compress(HEADER_LINE + VALID_ROW), 5, ("gzip", ".gz")),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, 5, ("leads.csv",)),
    "utf-16": ((HEADER_LINE + VALID_ROW).decode().encode("utf-16"), 5, ("utf-16",)),
}


def assert_refused(workspace: Workspace, api: SandboxApi, code: int, expected: tuple[str, ...]) -> None:
    """Assert that the run refuses the input: the error names it, nothing is sent, and the old output is kept."""
    old = workspace.folder / "out.csv"
    old.write_text(OLD_OUTPUT)

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert result.exit_code == result.json_output["exit_code"] == code, result.stderr
    assert result.json_output["error"] in result.stderr
    for word in ("leads.csv", *expected):
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert old.read_text() == OLD_OUTPUT
    assert api.audit()["accepted"] == 0


@pytest.mark.parametrize("name", first_quick(5, BROKEN, single=True))
def test_broken_file_refused_before_spending(api: SandboxApi, workspace: Workspace, name: str) -> None:
    """Names the file, the place and the fix, and sends nothing, not even the valid rows before the error."""
    data, code, expected = BROKEN[name]
    (workspace.folder / "leads.csv").write_bytes(data)

    assert_refused(workspace, api, code, expected)


@pytest.mark.long
def test_error_at_end_found_before_spending(api: SandboxApi, workspace: Workspace) -> None:
    """Reads the whole file before the first POST, however long it is."""
    path = workspace.write_leads(make_leads(10) * 4_500)
    path.write_text(path.read_text() + "First1,Last1\n")

    assert_refused(workspace, api, 5, ("row 45001", "line 45002"))


def test_folder_as_input_file(api: SandboxApi, workspace: Workspace) -> None:
    """Reports that the input is a directory."""
    (workspace.folder / "leads.csv").mkdir()

    assert_refused(workspace, api, 5, ("folder",))


def test_pipe_as_input_file(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses a named pipe, which could block forever and can't be read twice."""
    os.mkfifo(workspace.folder / "leads.csv")

    assert_refused(workspace, api, 5, ("not a file",))


def test_truncated_gzip_is_refused(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses a `.gz` file whose end is missing."""
    workspace.write_job(input="leads.csv.gz")
    (workspace.folder / "leads.csv.gz").write_bytes(gzip.compress(HEADER_LINE + VALID_ROW * 1000)[:-20])

    assert_refused(workspace, api, 5, ("gzip",))


def test_plain_text_named_gz_is_refused(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses a `.gz` file that is not compressed."""
    workspace.write_job(input="leads.csv.gz")
    (workspace.folder / "leads.csv.gz").write_bytes(HEADER_LINE + VALID_ROW)

    assert_refused(workspace, api, 5, ("gzip",))


@pytest.mark.parametrize("data", [HEADER_LINE, HEADER_LINE + b"\n", HEADER_LINE + b"\n\n\n"])
def test_header_without_rows(api: SandboxApi, workspace: Workspace, data: bytes) -> None:
    """Without leads: exit 0, and an output with the header only."""
    (workspace.folder / "leads.csv").write_bytes(data)

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.rows, summary.requests, summary.submitted) == (0, 0, 0, 0)
    assert (
        (workspace.folder / "out.csv").read_text().split("\n")[0].startswith("First Name,Last Name,Website,Email,Note,")
    )
    assert workspace.read_output() == []


@pytest.mark.long
@pytest.mark.parametrize("broken", [b"", HEADER_LINE + VALID_ROW + b"\na,b\n", b"Name\nx\n", None])
def test_open_tasks_collected_despite_bad_input(tmp_path: Path, workspace: Workspace, broken: bytes | None) -> None:
    """With broken input, collects the open tasks of the last run before they expire, and sends nothing new."""
    workspace.write_leads(make_leads(4))
    with serve_api(tmp_path / "api.db", latency="fixed(30)") as api:
        workspace.submit_without_collecting(api)
        api.advance(60)
        path = workspace.folder / "leads.csv"
        path.unlink() if broken is None else path.write_bytes(broken)

        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
        api.advance(200_000)
        workspace.write_leads(make_leads(4))
        summary = workspace.run_job(api)
        audit = api.audit()

    assert result.exit_code == result.json_output["exit_code"] == (2 if broken and broken.startswith(b"Name") else 5)
    assert result.json_output["credits_spent"] == audit["credits_charged"]
    assert "leads.csv" in result.json_output["error"]
    assert (summary.exit_code, summary.reused, summary.submitted) == (0, 4, 0)
    assert audit["accepted"] == 4


# Unusual but valid


def assert_rows_preserved(workspace: Workspace, summary: RunSummary, rows: list[list[str]], header: list[str]) -> None:
    """Assert that every row is in its place with the exact text of every cell."""
    with (workspace.folder / "out.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.reader(file))
    assert summary.exit_code == 0, summary.error
    assert written[0][: len(header)] == header
    assert [row[: len(header)] for row in written[1:]] == rows


@pytest.mark.long
@pytest.mark.parametrize(
    "dialect",
    [
        ("utf-8", "\ufeff", ",", "\r\n"),
        ("utf-8", "", ";", "\n"),
        ("utf-8", "", "\t", "\n"),
        ("utf-8", "", "|", "\n"),
        ("utf-8", "", ",", "\r"),
        ("cp1252", "", ";", "\r\n"),
        ("utf-16", "", "\t", "\r\n"),
        ("utf-16-le", "\ufeff", ",", "\n"),
        ("latin-1", "", ",", "\n"),
    ],
    ids=repr,
)
def test_spreadsheet_dialects(api: SandboxApi, workspace: Workspace, dialect: tuple[str, str, str, str]) -> None:
    """Reads all common byte order marks, line ends, separators and encodings; writes UTF-8 with commas."""
    encoding, mark, separator, end = dialect
    rows = [
        ["Jürgen", "Groß", "engine.example", "", "a,b;c\td|e"],
        ["Ada", "Byron", "lovelace.example", "", 'say "no"'],
    ]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=end).writerows([HEADER, *rows])
    (workspace.folder / "leads.csv").write_bytes((mark + text.getvalue()).encode(encoding))
    shown = '"\\t"' if separator == "\t" else f'"{separator}"'
    workspace.write_job(input=f"{{path: leads.csv, separator: {shown}, encoding: {encoding}}}")

    summary = workspace.run_job(api)

    assert_rows_preserved(workspace, summary, rows, HEADER)
    assert {run["params"]["first_name"] for run in api.audit()["runs"]} == {"Jürgen", "Ada"}


@pytest.mark.long
def test_unusual_cells_are_preserved(api: SandboxApi, workspace: Workspace) -> None:
    """Preserves leading zeros, phones, spaces, quotes, line ends in cells, formulas and very long texts."""
    notes = [
        *("00123", "+49 170 1234567", "  outer blanks ", 'a "quoted" word', "two\nlines", "two\r\nDOS lines", ""),
        *("=1+1", "@me", "-5", "null", "NaN", "1e5", "TRUE", "ﬁ ligature", "e\u0301 in two", "x" * 10_000, "'", '"'),
        *("a,b", "\u200bzero width", "\x07bell", "🧾", "\\N", "NULL", "#N/A", "2026-11-23", " ", "\t"),
    ]
    rows = [[*lead[:4], note] for lead, note in zip(make_leads(len(notes)), notes, strict=True)]
    workspace.write_leads(rows)

    summary = workspace.run_job(api)

    assert_rows_preserved(workspace, summary, rows, HEADER)


def test_unusual_headers_are_preserved(api: SandboxApi, workspace: Workspace) -> None:
    """Preserves any header, also those with a meaning for polars, SQL or YAML."""
    header = ["^First.*$", "Last\nName", "", " padded ", "*", "index", "enrich_note", "a.b", '"', "NO", "名前"]
    workspace.write_job(
        params='{first_name: "^First.*$", last_name: "Last\\nName", company: {column: ["*"], transform: [domain]}}'
    )
    rows = [["Ada", "Byron", "", " x ", "engine.example", "1", "2", "3", "4", "5", "6"]]
    workspace.write_leads(rows, header=header)

    summary = workspace.run_job(api)

    assert_rows_preserved(workspace, summary, rows, header)
    assert api.audit()["runs"][0]["params"] == {"first_name": "Ada", "last_name": "Byron", "company": "engine.example"}


@pytest.mark.long
def test_unusual_new_column_names(api: SandboxApi, workspace: Workspace) -> None:
    """Accepts new column names that polars would read as patterns."""
    workspace.write_job(columns='{"^new.*$": email, "*": email, new: email}')
    workspace.write_leads(make_leads(5))

    workspace.run_job(api)

    result = [{row["^new.*$"], row["*"], row["new"]} for row in workspace.read_output()]
    assert all(len(cells) == 1 for cells in result)
    assert any("@" in cell for cells in result for cell in cells)


@pytest.mark.long
def test_blank_lines_are_ignored(api: SandboxApi, workspace: Workspace) -> None:
    """Ignores blank lines, which spreadsheets leave at the end: they are neither sent nor written."""
    path = workspace.write_leads(make_leads(3))
    path.write_text(path.read_text().replace("\n", "\n\n") + "\n\n")

    summary = workspace.run_job(api)

    assert (summary.rows, summary.submitted) == (3, 3)
    assert_rows_preserved(workspace, summary, make_leads(3), HEADER)


@pytest.mark.long
def test_invalid_rows_are_free(api: SandboxApi, workspace: Workspace) -> None:
    """A row with a missing or unusable required param has a reason in the output and is never sent."""
    workspace.write_leads(
        [
            ["", "Byron", "engine.example", "", "no first name"],
            ["Ada", "   ", "engine.example", "", "blank last name"],
            ["Ada", "Byron", "not a domain", "neither@", "no company"],
            ["", "", "", "", ""],
            ["Ada", "Byron", "engine.example", "", "fine"],
        ]
    )

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.invalid, summary.submitted) == (0, 4, 1)
    assert [row["enrich_error"] for row in workspace.read_output()] == [
        "first_name blank (First Name)",
        "last_name blank (Last Name)",
        "company: no public host (Website, Email)",
        "first_name blank (First Name)",
        "",
    ]
    assert api.audit()["accepted"] == 1


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NAMES = st.text(string.ascii_letters + "äöüßłİ- '\"\n\t", max_size=8)


@pytest.fixture(scope="module")
def shared_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxApi]:
    """Serve one API for many examples."""
    with serve_api(tmp_path_factory.mktemp("api") / "api.db") as served:
        yield served


@pytest.mark.long
@settings(max_examples=examples(8), deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.tuples(NAMES, NAMES, CELLS, CELLS, CELLS), max_size=8))
def test_any_cell_text_is_preserved(shared_api: SandboxApi, rows: list[tuple[str, ...]]) -> None:
    """Preserves order and text of any cells without a crash; a second run is free."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        workspace.write_job()
        with (workspace.folder / "leads.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([HEADER, *rows])

        summary = workspace.run_job(shared_api)
        second = workspace.run_job(shared_api)

        assert_rows_preserved(workspace, summary, [list(row) for row in rows], HEADER)
        assert second.submitted == 0
        assert summary.submitted == summary.requests

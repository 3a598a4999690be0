"""The CSV from hell: what is broken is refused before anything is spent, what is merely odd comes through unharmed."""

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

from enrich.receipt import Receipt
from tests.cases import examples, first_quick
from tests.harness import HEADER, Api, Office, people, serving

OLD = "the output of an older night\n"
HEAD = ",".join(HEADER).encode()
GOOD = b"\nAda,Byron,engine.example,,x"

#: What the file holds, the exit code and words that the error must have.
BROKEN: dict[str, tuple[bytes, int, tuple[str, ...]]] = {
    "empty": (b"", 5, ("is empty", "column names")),
    "only blank lines": (b"\n\n\n", 5, ("is empty",)),
    "missing column": (b"First Name,Last Name,Site\na,b,c\n", 2, ("job.yaml:", "Website", "leads.csv")),
    "another separator": (HEAD.replace(b",", b";") + b"\na;b;c;d;e\n", 2, ("First Name", '";"')),
    "duplicate header": (HEAD + b",Note\na,b,c,d,e,f\n", 5, ("header", "line 1", "`Note` at 5, 6")),
    "short row": (HEAD + GOOD + b"\na,b,c\n", 5, ("row 2", "line 3", "3 cells", "5 columns", "hint")),
    "long row": (HEAD + GOOD + b"\na,b,c,d,e,f\n", 5, ("row 2", "line 3", "6 cells", "5 columns", "hint")),
    "wrong encoding": (HEAD + GOOD + b"\nJ\xfcrgen,b,c,d,e\n", 5, ("line 3", "`utf-8`", "cp1252")),
    "unclosed quote": (HEAD + GOOD + b'\n"Ada,b,c,d,e\n', 5, ("row 2", "line 3", "never closed")),
    "text after a quote": (HEAD + GOOD + b'\n"Ada"a,b,c,d,e\n', 5, ("row 2", "line 3", "quote")),
    "NUL": (HEAD + GOOD + b"\nA\0da,b,c,d,e\n", 5, ("row 2", "line 3", "NUL")),
    "a workbook": (b"PK\x03\x04" + os.urandom(400), 5, ("Excel", "let its name end in `.xlsx`")),
    "an old workbook": (b"\xd0\xcf\x11\xe0" + os.urandom(400), 5, ("Excel",)),
    "gzip named csv": (gzip.compress(HEAD + GOOD), 5, ("gzip", ".gz")),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, 5, ("leads.csv",)),
    "utf-16": ((HEAD + GOOD).decode().encode("utf-16"), 5, ("utf-16",)),
}


def refused(office: Office, api: Api, code: int, words: tuple[str, ...]) -> None:
    """Expect the program to refuse tonight's file: the error names it, nothing was sent, the old output stays."""
    old = office.folder / "out.csv"
    old.write_text(OLD)

    done = office.command("run", "job.yaml", "--json", api=api)

    assert done.code == done.receipt["exit_code"] == code, done.stderr
    assert done.receipt["error"] in done.stderr
    for word in ("leads.csv", *words):
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert old.read_text() == OLD
    assert api.audit()["accepted"] == 0


@pytest.mark.parametrize("name", first_quick(5, BROKEN, single=True))
def test_a_broken_file_is_refused_before_spending(api: Api, office: Office, name: str) -> None:
    """The error names the file, the place and the remedy; not even the sound rows before it are paid for."""
    data, code, words = BROKEN[name]
    (office.folder / "leads.csv").write_bytes(data)

    refused(office, api, code, words)


def test_a_flaw_at_the_very_end_is_seen_before_spending(api: Api, office: Office) -> None:
    """The whole file is read before the first POST, however long it is."""
    path = office.write_leads(people(10) * 4_500)
    path.write_text(path.read_text() + "First1,Last1\n")

    refused(office, api, 5, ("row 45001", "line 45002"))


def test_a_folder_is_no_input(api: Api, office: Office) -> None:
    """A directory in the file's place is named as one."""
    (office.folder / "leads.csv").mkdir()

    refused(office, api, 5, ("folder",))


def test_a_pipe_is_no_input(api: Api, office: Office) -> None:
    """A named pipe would wait for ever, and can't be read twice."""
    os.mkfifo(office.folder / "leads.csv")

    refused(office, api, 5, ("not a file",))


def test_a_file_that_is_cut_off_is_refused(api: Api, office: Office) -> None:
    """A `.gz` of which the end is missing."""
    office.write_job(input="leads.csv.gz")
    (office.folder / "leads.csv.gz").write_bytes(gzip.compress(HEAD + GOOD * 1000)[:-20])

    refused(office, api, 5, ("gzip",))


def test_plain_text_named_gz_is_refused(api: Api, office: Office) -> None:
    """A `.gz` that is none."""
    office.write_job(input="leads.csv.gz")
    (office.folder / "leads.csv.gz").write_bytes(HEAD + GOOD)

    refused(office, api, 5, ("gzip",))


@pytest.mark.parametrize("data", [HEAD, HEAD + b"\n", HEAD + b"\n\n\n"])
def test_a_header_without_rows_is_a_quiet_night(api: Api, office: Office, data: bytes) -> None:
    """No leads: exit 0, and an output that has the columns and nothing else."""
    (office.folder / "leads.csv").write_bytes(data)

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.rows, receipt.requests, receipt.submitted) == (0, 0, 0, 0)
    assert (office.folder / "out.csv").read_text().split("\n")[0].startswith("First Name,Last Name,Website,Email,Note,")
    assert office.output() == []


@pytest.mark.parametrize("broken", first_quick(1, [b"", HEAD + GOOD + b"\na,b\n", b"Name\nx\n", None]))
def test_what_was_paid_for_is_rescued_from_a_broken_night(tmp_path: Path, office: Office, broken: bytes | None) -> None:
    """Tonight's file is broken, but yesterday's tasks would expire: they are fetched, and nothing new is bought."""
    office.write_leads(people(4))
    with serving(tmp_path / "api.db", latency="fixed(30)") as api:
        office.leave_at_the_api(api)
        api.advance(60)
        path = office.folder / "leads.csv"
        path.unlink() if broken is None else path.write_bytes(broken)

        done = office.command("run", "job.yaml", "--json", api=api)
        api.advance(200_000)
        office.write_leads(people(4))
        receipt = office.run(api)
        audit = api.audit()

    assert done.code == done.receipt["exit_code"] == (2 if broken and broken.startswith(b"Name") else 5)
    assert done.receipt["credits_spent"] == audit["credits_charged"]
    assert "leads.csv" in done.receipt["error"]
    assert (receipt.exit_code, receipt.reused, receipt.submitted) == (0, 4, 0)
    assert audit["accepted"] == 4


# Odd, but sound


def came_back(office: Office, receipt: Receipt, rows: list[list[str]], header: list[str]) -> None:
    """Expect every row in its place with the very text of every cell."""
    with (office.folder / "out.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.reader(file))
    assert receipt.exit_code == 0, receipt.error
    assert written[0][: len(header)] == header
    assert [row[: len(header)] for row in written[1:]] == rows


@pytest.mark.parametrize(
    "dialect",
    first_quick(
        3,
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
        single=True,
    ),
    ids=repr,
)
def test_the_dialects_of_spreadsheets_are_read(api: Api, office: Office, dialect: tuple[str, str, str, str]) -> None:
    """Byte order marks, line ends, separators and encodings of all kinds come out as UTF-8 with commas."""
    encoding, mark, separator, end = dialect
    rows = [
        ["Jürgen", "Groß", "engine.example", "", "a,b;c\td|e"],
        ["Ada", "Byron", "lovelace.example", "", 'say "no"'],
    ]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=end).writerows([HEADER, *rows])
    (office.folder / "leads.csv").write_bytes((mark + text.getvalue()).encode(encoding))
    shown = '"\\t"' if separator == "\t" else f'"{separator}"'
    office.write_job(input=f"{{path: leads.csv, separator: {shown}, encoding: {encoding}}}")

    receipt = office.run(api)

    came_back(office, receipt, rows, HEADER)
    assert {run["params"]["first_name"] for run in api.audit()["runs"]} == {"Jürgen", "Ada"}


def test_odd_cells_come_back_as_they_were(api: Api, office: Office) -> None:
    """Leading zeros, phones, blanks, quotes, line ends in cells, formulas and very long texts."""
    notes = [
        *("00123", "+49 170 1234567", "  outer blanks ", 'a "quoted" word', "two\nlines", "two\r\nDOS lines", ""),
        *("=1+1", "@me", "-5", "null", "NaN", "1e5", "TRUE", "ﬁ ligature", "e\u0301 in two", "x" * 10_000, "'", '"'),
        *("a,b", "\u200bzero width", "\x07bell", "🧾", "\\N", "NULL", "#N/A", "2026-11-23", " ", "\t"),
    ]
    rows = [[*lead[:4], note] for lead, note in zip(people(len(notes)), notes, strict=True)]
    office.write_leads(rows)

    receipt = office.run(api)

    came_back(office, receipt, rows, HEADER)


def test_odd_headers_are_only_names(api: Api, office: Office) -> None:
    """A column may be called anything, even what polars or SQL or YAML would take for something else."""
    header = ["^First.*$", "Last\nName", "", " padded ", "*", "index", "enrich_note", "a.b", '"', "NO", "名前"]
    office.write_job(
        params='{first_name: "^First.*$", last_name: "Last\\nName", company: {column: ["*"], transform: [domain]}}'
    )
    rows = [["Ada", "Byron", "", " x ", "engine.example", "1", "2", "3", "4", "5", "6"]]
    office.write_leads(rows, header=header)

    receipt = office.run(api)

    came_back(office, receipt, rows, header)
    assert api.audit()["runs"][0]["params"] == {"first_name": "Ada", "last_name": "Byron", "company": "engine.example"}


def test_new_columns_may_be_called_anything(api: Api, office: Office) -> None:
    """Even what polars would take for a pattern."""
    office.write_job(columns='{"^new.*$": email, "*": email, new: email}')
    office.write_leads(people(5))

    office.run(api)

    told = [{row["^new.*$"], row["*"], row["new"]} for row in office.output()]
    assert all(len(cells) == 1 for cells in told)
    assert any("@" in cell for cells in told for cell in cells)


def test_blank_lines_between_rows_are_no_rows(api: Api, office: Office) -> None:
    """Spreadsheets leave empty lines at the end; they are neither asked nor written."""
    path = office.write_leads(people(3))
    path.write_text(path.read_text().replace("\n", "\n\n") + "\n\n")

    receipt = office.run(api)

    assert (receipt.rows, receipt.submitted) == (3, 3)
    came_back(office, receipt, people(3), HEADER)


def test_rows_that_cannot_be_asked_are_invalid_and_free(api: Api, office: Office) -> None:
    """A required param without a value, or none that is one: the row says why and is never sent."""
    office.write_leads(
        [
            ["", "Byron", "engine.example", "", "no first name"],
            ["Ada", "   ", "engine.example", "", "blank last name"],
            ["Ada", "Byron", "not a domain", "neither@", "no company"],
            ["", "", "", "", ""],
            ["Ada", "Byron", "engine.example", "", "fine"],
        ]
    )

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.invalid, receipt.submitted) == (0, 4, 1)
    assert [row["enrich_error"] for row in office.output()] == [
        "first_name is empty (First Name)",
        "last_name is empty (Last Name)",
        "company is empty (Website, Email)",
        "first_name is empty (First Name)",
        "",
    ]
    assert api.audit()["accepted"] == 1


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NAMES = st.text(string.ascii_letters + "äöüßłİ- '\"\n\t", max_size=8)


@pytest.fixture(scope="module")
def shared_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Serve one API for many examples."""
    with serving(tmp_path_factory.mktemp("api") / "api.db") as served:
        yield served


@settings(max_examples=examples(15), deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.tuples(NAMES, NAMES, CELLS, CELLS, CELLS), max_size=8))
def test_whatever_a_cell_holds_comes_back(shared_api: Api, rows: list[tuple[str, ...]]) -> None:
    """Any text in any cell: same rows, same order, same text; never a bug, and a second run pays nothing."""
    with tempfile.TemporaryDirectory() as folder:
        office = Office(Path(folder))
        office.write_job()
        with (office.folder / "leads.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([HEADER, *rows])

        receipt = office.run(shared_api)
        again = office.run(shared_api)

        came_back(office, receipt, [list(row) for row in rows], HEADER)
        assert again.submitted == 0
        assert receipt.submitted == receipt.requests

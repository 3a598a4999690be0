"""How input rows become requests: transforms, params, filters and fingerprints."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.errors import CommandRefused, JobError
from enrich.job.cell_text import clean
from enrich.job.job import load_job
from enrich.job.target import Target, TargetKind
from enrich.models import RowStatus
from enrich.rows.batches import RowBatch
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from tests.support.cases import in_turn

CALL = Target(TargetKind.WATERFALL, "email_getter", (833, 966), 10)


def open_rows(folder: Path, job: str, header: Sequence[str], leads: Sequence[Sequence[str]] = ()) -> JobInput:
    """Write a job and its leads, and open them."""
    with (folder / "leads.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *leads])
    path = folder / "job.yaml"
    path.write_text(f"version: 1\ninput: leads.csv\nwaterfall: email_getter\n{job}", encoding="utf-8")
    return JobInput(load_job(path))


def as_yaml(**keys: Any) -> str:
    """Write keys of a job file."""
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in keys.items())


def read_requests(
    rows: JobInput, call: Target = CALL, required: Sequence[str] = (), emails: Sequence[str] = ()
) -> RowBatch:
    """Read the rows of a small input."""
    template = RequestTemplate(call, tuple(required), tuple(emails), {"new": "email"}, None)
    rows.check_new_columns(template)
    (batch,) = list(rows.batches(template))
    return batch


def sent_params(batch: RowBatch) -> list[dict[str, str] | None]:
    """Return the params that each row sends."""
    return [None if params is None else json.loads(params) for params in batch.params]


def job_error(
    folder: Path, job: str, header: Sequence[str], leads: Sequence[Sequence[str]] = (("x",) * 9,)
) -> JobError:
    """Return the error of a job that does not fit its input."""
    with pytest.raises(JobError) as caught:
        read_requests(open_rows(folder, job, header, [row[: len(header)] for row in leads]))
    assert caught.value.message.startswith(f"{folder / 'job.yaml'}:")
    return caught.value


@in_turn(
    ("cell", "transform", "sent"),
    [
        ("https://www.Mail.Example.co.uk/about?x=1#top", "domain", "example.co.uk"),
        ("https://www.Mail.Example.co.uk/about?x=1#top", "host", "www.mail.example.co.uk"),
        ("Ada <ada@MAIL.example.com>", "domain", "example.com"),
        ("ada@gmail.com", "domain", None),
        ("ada@gmail.com", "host", None),
        ("N/A", "domain", None),
        ("", "domain", None),
    ],
)
def test_domain_transforms(tmp_path: Path, cell: str, transform: str, sent: str | None) -> None:
    """`domain` sends the company's domain, `host` the host as it stands; without one, the row sends nothing."""
    job = f"params: {{company: {{column: A, transform: [{transform}]}}, b: B}}\n"
    rows = open_rows(tmp_path, job, ["A", "B"], [[cell, "x"]])
    assert sent_params(read_requests(rows)) == [{"b": "x"} | ({"company": sent} if sent else {})]


@in_turn(
    ("transform", "cell", "sent"),
    [
        ("", " Ada  Byron\t", "Ada Byron"),
        ("", "\u00a0\u3000ADA\n", "ADA"),
        ("", "Zoe\u0308", "Zoë"),
        ("trim", " Ada ", "Ada"),
        ("lower", "ÄDA Straße", "äda straße"),
        ("trim, lower", " ADA ", "ada"),
        ("lower, domain", "HTTPS://ACME.COM/", "acme.com"),
        ("", "007", "007"),
        ("", "Null", "Null"),
        ("lower", "Null", "null"),
        ("lower", "N.A.", "n.a."),
        ("", "'quoted'", "'quoted'"),
        ("", "a\nb", "a b"),
        ("", '{"a":1}', '{"a":1}'),
    ],
)
def test_param_normalization(tmp_path: Path, transform: str, cell: str, sent: str) -> None:
    """Params are NFC without outer blanks, with their case; transforms are applied first, in order."""
    rows = open_rows(tmp_path, f"params: {{a: {{column: A, transform: [{transform}]}}}}\n", ["A"], [[cell]])
    assert sent_params(read_requests(rows)) == [{"a": sent}]


def test_first_non_blank_column(tmp_path: Path) -> None:
    """The first column with a usable value counts: a website that is no URL gives way to the email address."""
    job = "params: {company: {column: [Website, Email, Firm], transform: [domain]}, name: [Nick, Name], k: K}\n"
    leads = [
        ["https://a.example", "x@b.example", "c.example", "Ada", "Augusta", "k"],
        ["N/A", "x@b.example", "c.example", " ", "Augusta", "k"],
        ["", "", "c.example", "", "", "k"],
        ["Acme Inc.", "none", "-", "\t", " ", "k"],
    ]
    rows = open_rows(tmp_path, job, ["Website", "Email", "Firm", "Nick", "Name", "K"], leads)
    assert sent_params(read_requests(rows)) == [
        {"company": "a.example", "name": "Ada", "k": "k"},
        {"company": "b.example", "name": "Augusta", "k": "k"},
        {"company": "c.example", "k": "k"},
        {"k": "k"},
    ]


def test_constant_param(tmp_path: Path) -> None:
    """A constant param is normalized like a cell, and is a request even when it is the only param."""
    rows = open_rows(tmp_path, "params: {country: {value: ' US '}, a: A}\n", ["A"], [["1"], ["2"]])
    assert sent_params(read_requests(rows)) == [{"a": "1", "country": "US"}, {"a": "2", "country": "US"}]
    rows = open_rows(tmp_path, "params: {country: {value: US}}\n", ["A"], [["1"], ["2"]])
    assert sent_params(read_requests(rows)) == [{"country": "US"}] * 2


def test_blank_required_param_is_invalid(tmp_path: Path) -> None:
    """A row with a blank required param is not sent; the reason names param and columns, but no cell."""
    job = "params: {first: First, company: {column: [Site, Mail], transform: [domain]}, opt: Opt}\n"
    leads = [["Ada", "x.example", "", ""], ["Ada", "Secret Inc.", "none", "o"], [" ", "x.example", "", ""]]
    batch = read_requests(
        open_rows(tmp_path, job, ["First", "Site", "Mail", "Opt"], leads), required=["first", "company"]
    )
    assert sent_params(batch) == [{"first": "Ada", "company": "x.example"}, None, None]
    assert batch.statuses == [None, RowStatus.INVALID, RowStatus.INVALID]
    assert batch.errors == [None, "company: no public host (Site, Mail)", "first blank (First)"]
    assert [fingerprint is None for fingerprint in batch.fingerprints] == [False, True, True]
    assert batch.requests().positions == [0]
    assert batch.missing == {"first": 1, "company": 1}


def test_row_without_params_is_invalid(tmp_path: Path) -> None:
    """A row without any params is invalid, even when none is required."""
    batch = read_requests(
        open_rows(tmp_path, "params: {a: A, b: B}\n", ["A", "B", "C"], [["", "", "x"], ["", "b", ""]])
    )
    assert (batch.statuses, batch.errors) == ([RowStatus.INVALID, None], ["all params blank", None])
    assert batch.missing == {"a": 1, "b": 1}


@in_turn(
    ("cell", "sent"),
    [
        ("ada@x.example", "ada@x.example"),
        (" Ada.Byron+crm@Mail.X.Example. ", "ada.byron+crm@mail.x.example"),
        ("Ada Byron <mailto:ada@x.example>", "ada@x.example"),
        ("\u00e4.b@\u00f6.example", "\u00e4.b@xn--nda.example"),
    ],
)
def test_email_param(tmp_path: Path, cell: str, sent: str) -> None:
    """An email param is one address in lower case, its host in one spelling."""
    batch = read_requests(open_rows(tmp_path, "params: {email: E}\n", ["E"], [[cell]]), emails=["email"])
    assert sent_params(batch) == [{"email": sent}]


@in_turn(
    ("cell", "kind"),
    [
        ("ada", "no e-mail address"),
        ("ada byron@x.example", "no e-mail address"),
        ("ada@x.example, bob@x.example", "two addresses"),
        ("N/A", "placeholder"),
    ],
)
def test_malformed_email_is_left_out(tmp_path: Path, cell: str, kind: str) -> None:
    """A malformed email is not sent. When it is required, the row is invalid, and the reason does not quote it."""
    rows = open_rows(tmp_path, "params: {email: E, name: N}\n", ["E", "N"], [[cell, "Ada"]])
    assert sent_params(read_requests(rows, emails=["email"])) == [{"name": "Ada"}]
    batch = read_requests(rows, required=["email"], emails=["email"])
    assert (batch.statuses, batch.errors) == ([RowStatus.INVALID], [f"email: {kind} (E)"])
    assert batch.left_out == {("email", kind): 1}


HEADER = ["Name", "Country", "Team Size", 'q"t', "a.b", "leads", "over"]
LEADS = [
    ["Ada", "DE", "5", "1", "x", "l", "o"],
    ["Bob", "de", "", "2", "", "l", "o"],
    ["Cyd", "", "70", "1", "x", "l", ""],
    ["Dan", "AT", "n/a", "", "x", "l", ""],
]


@in_turn(
    ("where", "kept"),
    [
        ("Country = 'DE'", "Ada"),
        ("Country <> ''", "Ada Bob Dan"),
        ("Country IN ('DE', 'AT')", "Ada Dan"),
        ("Country NOT IN ('DE')", "Bob Cyd Dan"),
        ("UPPER(Country) = 'DE' AND \"Team Size\" = ''", "Bob"),
        ("Name LIKE 'A%' OR Name ILIKE 'b%'", "Ada Bob"),
        ('TRY_CAST("Team Size" AS INT) > 4', "Ada Cyd"),
        ('NOT TRY_CAST("Team Size" AS INT) > 5', "Ada"),
        ("CASE WHEN Country = 'DE' THEN TRUE END", "Ada"),
        ("Country = NULL", ""),
        ("TRUE", "Ada Bob Cyd Dan"),
        ("1 = 2", ""),
        ('"q""t" = \'1\' AND "a.b" = \'x\'', "Ada Cyd"),
        ("leads = 'l' AND \"over\" = 'o'", "Ada Bob"),
        ("Country = 'it''s over' OR Name = 'Select'", ""),
        ("Country = 'DE' -- the home market", "Ada"),
        ("LENGTH(Name) BETWEEN 1 AND 3", "Ada Bob Cyd Dan"),
    ],
)
def test_where_filters_rows(tmp_path: Path, where: str, kept: str) -> None:
    """`where` is SQL over text: blanks are '', and a row for which it is null is left out."""
    job = f"params: {{name: Name}}\nwhere: {json.dumps(where)}\n"
    batch = read_requests(open_rows(tmp_path, job, HEADER, LEADS))
    assert " ".join(params["name"] for params in sent_params(batch) if params) == kept
    assert set(batch.statuses) <= {None, RowStatus.FILTERED}
    assert batch.errors == [None] * 4


@in_turn(
    ("where", "message", "hint"),
    [
        ("Contry = 'DE'", "the input has no column `Contry`", "did you mean `Country`?"),
        ("country = 'DE'", "the input has no column `country`", "did you mean `Country`?"),
        ("Name = 'x' AND \"Team size\" = ''", "the input has no column `Team size`", "did you mean `Team Size`?"),
        ('Country = "DE"', "the input has no column `DE`", "texts in single quotes"),
        ("Country = 'DE' AND", "not a polars SQL expression over the columns", ""),
        ("Country =", "not a polars SQL expression over the columns", ""),
        ("NO_SUCH(Country)", "not a polars SQL expression over the columns: unsupported function", ""),
        ("Country > 5", "not a polars SQL expression over the columns: cannot compare string", "TRY_CAST"),
        ("Country + 1 = 6", "not a polars SQL expression over the columns: arithmetic", "TRY_CAST"),
        ("Country; DROP TABLE leads", "not a polars SQL expression over the columns", ""),
        ("x.Country = 'DE'", "not a polars SQL expression over the columns", ""),
        ("Name", "must be true or false for each row alone", "Country = 'DE'"),
        ("LENGTH(Name)", "must be true or false for each row alone", ""),
        ("NULL", "must be true or false for each row alone", ""),
        ("COUNT(*) > 1", "must be true or false for each row alone", ""),
        ("MAX(Name) = 'Dan'", "must be true or false for each row alone", ""),
        ("MAX(Name) = Name", "must be true or false for each row alone", ""),
        ("Name = 'Ada' OR COUNT(*) > 1", "must be true or false for each row alone", ""),
        ("ROW_NUMBER() OVER (ORDER BY Name) = 1", "must be true or false for each row alone", ""),
        ("Name IN (SELECT Name FROM leads)", "must be true or false for each row alone", ""),
        ("Name = 'a') AS x, (Name = 'b'", "must be true or false for each row alone", ""),
    ],
)
def test_invalid_where(tmp_path: Path, where: str, message: str, hint: str) -> None:
    """An invalid `where` is an error with its line before anything is spent; using other rows is invalid, too."""
    error = job_error(tmp_path, f"params: {{name: Name}}\nwhere: {json.dumps(where)}\n", HEADER, LEADS)
    assert error.message.startswith(f"{tmp_path / 'job.yaml'}:5: where: {message}")
    assert "\n" not in error.message
    assert hint in (error.hint or "")


@in_turn(
    "where",
    ['CAST("Team Size" AS INT) > 4', "CAST(Name AS DATE) > '2024-01-01'", "STRPTIME(Name, '%Y') IS NULL"],
)
def test_where_error_hides_cell(tmp_path: Path, where: str) -> None:
    """An error in `where` quotes no cell (personal data); the hint shows how to cast blank values."""
    error = job_error(tmp_path, f"params: {{name: Name}}\nwhere: {json.dumps(where)}\n", HEADER, LEADS)
    assert "where: cannot be computed" in error.message
    assert "TRY_CAST" in (error.hint or "")
    result = error.message.replace(str(tmp_path), "")  # its numbers could be those of a cell
    assert not any(cell in result for row in LEADS for cell in (row[0], row[2]) if len(cell) > 1)


@pytest.mark.parametrize("blanks", ["", "blanks: [unknown]\n", "blanks: []\n"])
def test_empty_lists_and_objects_are_always_blank(tmp_path: Path, blanks: str) -> None:
    """`[]` and `{}` of a JSON input are blank, also with a job's own list of blanks."""
    job = f"{blanks}params: {{n: N, p: P}}\nonly_if_empty: [E]\n"
    leads = [["a", "[]", "{}"], ["b", "x", "[]"], ["c", "[1]", "[1]"]]
    batch = read_requests(open_rows(tmp_path, job, ["N", "P", "E"], leads))
    assert sent_params(batch) == [{"n": "a"}, {"n": "b", "p": "x"}, None]


def test_only_if_empty(tmp_path: Path) -> None:
    """A row is sent only if all listed columns are blank; with `where`, both conditions must hold."""
    leads = [["a", "", ""], ["b", " \t", ""], ["c", "x", ""], ["d", "", "y"], ["e", "", ""]]
    job = "params: {n: N}\nonly_if_empty: [E, P]\n"
    batch = read_requests(open_rows(tmp_path, job, ["N", "E", "P"], leads))
    assert [params and params["n"] for params in sent_params(batch)] == ["a", "b", None, None, "e"]
    batch = read_requests(open_rows(tmp_path, job + "where: N <> 'a'\n", ["N", "E", "P"], leads))
    assert [params and params["n"] for params in sent_params(batch)] == [None, "b", None, None, "e"]


def test_filtered_rows_have_no_reason(tmp_path: Path) -> None:
    """Rows that the job filters out have no reason."""
    batch = read_requests(
        open_rows(tmp_path, "params: {a: A}\nonly_if_empty: [B]\n", ["A", "B"], [["", "x"]]), required=["a"]
    )
    assert (batch.statuses, batch.errors) == ([RowStatus.FILTERED], [None])


@in_turn(
    ("job", "where", "hint"),
    [
        ("params: {a: Firt Name}\n", "4: params.a", "did you mean `First Name`?"),
        (
            "params:\n  a: First Name\n  b: {column: [Email, e-mail], transform: [trim]}\n",
            "6: params.b",
            "did you mean `Email`?",
        ),
        (
            "params: {a: First Name}\nonly_if_empty:\n  - Email\n  - Phone\n",
            "7: only_if_empty.1",
            "known: First Name, Email",
        ),
    ],
)
def test_unknown_column(tmp_path: Path, job: str, where: str, hint: str) -> None:
    """An unknown column is reported with the job file's line, the input file and the nearest column."""
    error = job_error(tmp_path, job, ["First Name", "Email"])
    assert error.message.startswith(f"{tmp_path / 'job.yaml'}:{where}: the input has no column")
    assert str(tmp_path / "leads.csv") in error.message
    assert error.hint == hint


@in_turn(("separator", "shown"), [(";", '";"'), ("\t", '"\\t"'), ("|", '"|"')])
def test_separator_hint(tmp_path: Path, separator: str, shown: str) -> None:
    """A wrong separator, the most common mistake, gives a hint that can be copied and works."""
    (tmp_path / "leads.csv").write_text(separator.join(["Name", "Email"]) + "\n" + separator.join(["Ada", "x"]) + "\n")
    path = tmp_path / "job.yaml"
    text = "version: 1\ninput: leads.csv\nwaterfall: w\nparams: {a: Name}\n"
    path.write_text(text)
    with pytest.raises(JobError) as caught:
        JobInput(load_job(path))
    assert caught.value.hint == f"its header looks separated by {shown}: input: {{path: …, separator: {shown}}}"
    path.write_text(text.replace("leads.csv", f"{{path: leads.csv, separator: {shown}}}"))
    assert sent_params(read_requests(JobInput(load_job(path)))) == [{"a": "Ada"}]


def test_unreadable_input(tmp_path: Path) -> None:
    """An unreadable input is not reported as a mistake of the job file, and nothing is spent."""
    path = tmp_path / "job.yaml"
    path.write_text("version: 1\ninput: leads.csv\nwaterfall: w\nparams: {a: A}\n")
    with pytest.raises(CommandRefused, match="does not exist"):
        JobInput(load_job(path))
    (tmp_path / "leads.csv").write_text("A,B\n1,2\n3\n")
    rows = JobInput(load_job(path))
    with pytest.raises(CommandRefused, match=r"row 2 \(line 3\) has 1 cell"):
        read_requests(rows)


def test_new_column_clash(tmp_path: Path) -> None:
    """A new column that exists in the input, or has a status column's name, is reported with its line."""
    rows = open_rows(tmp_path, "params: {a: A}\ncolumns:\n  A: email\n  enrich_at: x\n", ["A"])
    for name, message in [
        ("A", "6: columns.A: the input already has a column"),
        ("enrich_at", "7: columns.enrich_at: this name belongs"),
    ]:
        with pytest.raises(JobError) as caught:
            rows.check_new_columns(RequestTemplate(CALL, (), (), {name: "email"}, None))
        assert f"job.yaml:{message}" in caught.value.message


def test_default_column_clash(tmp_path: Path) -> None:
    """When a job has no `columns`, the hint has the key as it can be added to the file."""
    rows = open_rows(tmp_path, "params: {a: A}\n", ["A", "email"])
    template = RequestTemplate(CALL, (), (), {"email": "email", "phone": "phone"}, None)
    with pytest.raises(JobError, match=r"columns\.email: the input already has a column") as caught:
        rows.check_new_columns(template)
    addition = str(caught.value.hint).split("`")[1]
    assert addition == "columns: {new_email: email, phone: phone}"

    renamed = open_rows(tmp_path, f"params: {{a: A}}\n{addition}\n", ["A", "email"])
    renamed.check_new_columns(replace(template, columns=renamed.job.model.columns or {}))


def test_default_column_clash_with_signs_of_yaml(tmp_path: Path) -> None:
    """Names of the API that are no plain text in YAML are quoted in the hint."""
    rows = open_rows(tmp_path, "params: {a: A}\n", ["A", "email"])
    names = ("email", "revenue: last, in {USD}", "yes", "#rank")
    with pytest.raises(JobError) as caught:
        rows.check_new_columns(RequestTemplate(CALL, (), (), dict(zip(names, names, strict=True)), None))
    addition = str(caught.value.hint).split("`")[1]

    renamed = open_rows(tmp_path, f"params: {{a: A}}\n{addition}\n", ["A", "email"])
    assert renamed.job.model.columns == {"new_email": "email", **{name: name for name in names[1:]}}


def test_status_columns_are_replaced(tmp_path: Path) -> None:
    """In an output used as input the status columns are not added twice, and can be read."""
    header = ["enrich_status", "A", "enrich_credits", "enrich_at"]
    job = "params: {a: A, status: enrich_status}\nwhere: enrich_status <> 'found'\n"
    rows = open_rows(tmp_path, job, header, [["failed", "x", "1", "t"], ["found", "y", "1", "t"]])
    batch = read_requests(rows)
    assert rows.columns == batch.frame.columns == ["A"]
    assert batch.frame.rows() == [("x",), ("y",)]
    assert sent_params(batch) == [{"a": "x", "status": "failed"}, None]


@in_turn(
    "header",
    [
        ["^x$", "x", "xx"],
        ["^.*$", "*", "."],
        ["", "column_0", "column_1"],
        ["selected", "literal", "params"],
        ["0", "1", "2"],
        ['a"b', "a.b", " a "],
        ["a\nb", "a,b", "a;b"],
        ["Größe", "📧", "\u200b"],
        ["a", "A", "\uff21"],
        ["len", "index", "count"],
    ],
)
def test_any_column_name(tmp_path: Path, header: list[str]) -> None:
    """Column names are never patterns, and none clashes with internal names."""
    job = as_yaml(params={"a": header[1], "selected": header[2], "literal": {"value": "c"}}, only_if_empty=[header[2]])
    leads = [["1", "2", ""], ["4", "5", "6"]]
    batch = read_requests(open_rows(tmp_path, job, header, leads))
    assert batch.frame.columns == header
    assert batch.frame.rows() == [tuple(row) for row in leads]
    assert sent_params(batch) == [{"a": "2", "literal": "c"}, None]


@pytest.mark.long
def test_positions_count_over_batches(tmp_path: Path) -> None:
    """Positions count over the whole file, whatever the batch size."""
    rows = open_rows(tmp_path, "params: {a: A}\n", ["A"], [[str(number)] for number in range(20_001)])
    batches = list(rows.batches(RequestTemplate(CALL, (), (), {"new": "x"}, None)))
    assert [(batch.first_position, batch.frame.height) for batch in batches] == [(0, 20_000), (20_000, 1)]
    assert [position for batch in batches for position in batch.requests().positions] == list(range(20_001))


def test_changed_input_changes_stamp(tmp_path: Path) -> None:
    """A replaced, extended or missing input changes the stamp: answers must not be joined to other rows."""
    rows = open_rows(tmp_path, "params: {a: A}\n", ["A"], [["1"]])
    before = rows.full_table.file_versions()
    assert before == rows.full_table.file_versions()
    with (tmp_path / "leads.csv").open("a") as file:
        file.write("2\n")
    assert rows.full_table.file_versions() != before
    (tmp_path / "leads.csv").unlink()
    assert rows.full_table.file_versions() is None


# Fingerprints


def fingerprints_of(
    folder: Path, leads: Sequence[Sequence[str]], job: str = "params: {first: F, company: C}\n", call: Target = CALL
) -> list[str]:
    """Return the fingerprints of rows with the columns F, C and N."""
    batch = read_requests(open_rows(folder, job, ["F", "C", "N"], leads), call)
    return [fingerprint.hex() for fingerprint in batch.fingerprints if fingerprint]


def test_fingerprints_never_change(tmp_path: Path) -> None:
    """Fingerprints never change: with other bytes, every existing ledger would pay for all its leads again."""
    assert fingerprints_of(tmp_path, [["Ada", "engine.example", ""]]) == ["37c59888aa0eceaf87ca4b2b1a21c4ae"]
    assert fingerprints_of(
        tmp_path, [["Zoë", "größe.example", ""]], call=Target(TargetKind.WATERFALL, "email_getter", (833,))
    ) == ["adbd247be50ba2c082164f3f3b8d33f1"]


def test_fingerprint_depends_only_on_request(tmp_path: Path) -> None:
    """The fingerprint does not depend on the row's position, other columns, the order of params or cell spelling."""
    first, second, third = fingerprints_of(
        tmp_path, [["Ada", "x.example", "1"], ["Bob", "x.example", "2"], [" Ada", "x.example ", "3"]]
    )
    assert first == third != second
    assert fingerprints_of(
        tmp_path, [["Ada", "x.example", "4"]], "params:\n  company: C\n  first: [N, F]\nwhere: N <> ''\n"
    ) != [first]
    assert fingerprints_of(
        tmp_path, [["Ada", "x.example", "4"]], "params:\n  company: C\n  first: F\nwhere: N <> ''\n"
    ) == [first]
    assert fingerprints_of(tmp_path, [["Ada", "-", ""]], "params: {first: F, company: {value: x.example}}\n") == [first]
    composed, decomposed = fingerprints_of(tmp_path, [["Zoë", "x", ""], ["Zoe\u0308", "x", ""]])
    assert composed == decomposed


def test_blank_param_not_in_fingerprint(tmp_path: Path) -> None:
    """A blank param is not sent, so it is not part of the fingerprint."""
    (without,) = fingerprints_of(tmp_path, [["Ada", "x", ""]], "params: {first: F, company: C, note: N}\n")
    assert fingerprints_of(tmp_path, [["Ada", "x", ""]]) == [without]


@in_turn(
    "call",
    [
        Target(TargetKind.WATERFALL, "email_getter", (966, 833), 10),
        Target(TargetKind.WATERFALL, "email_getter", (833,), 10),
        Target(TargetKind.WATERFALL, "email_getter", (833, 966), 11),
        Target(TargetKind.WATERFALL, "email_getter", (833, 966)),
        Target(TargetKind.WATERFALL, "person_getter", (833, 966), 10),
    ],
)
def test_fingerprint_depends_on_call(tmp_path: Path, call: Target) -> None:
    """The waterfall, the order of providers and the verifier change the fingerprint, because they change the result."""
    lead = ["Ada", "x.example", ""]
    assert fingerprints_of(tmp_path, [lead], call=call) != fingerprints_of(tmp_path, [lead])


def test_fingerprints_without_dedupe(tmp_path: Path) -> None:
    """Without dedupe, equal rows differ by their count; the first has the shared fingerprint."""
    job = "params: {first: F, company: C}\ndedupe: false\n"
    ada, bob = ["Ada", "x", ""], ["Bob", "x", ""]
    (shared_ada, shared_bob) = fingerprints_of(tmp_path, [ada, bob])
    found = fingerprints_of(tmp_path, [ada, bob, ada, ada, bob], job)
    assert (found[0], found[1]) == (shared_ada, shared_bob)
    assert len(set(found)) == 5
    again = fingerprints_of(tmp_path, [bob, ada, ada, ["Cyd", "x", ""], bob, ada], job)
    assert [again[0], again[1], again[2], again[4], again[5]] == [found[1], found[0], found[2], found[4], found[3]]
    rows = open_rows(tmp_path, job, ["F", "C", "N"], [ada, ada])
    assert read_requests(rows).fingerprints == read_requests(rows).fingerprints


CELL = st.text(alphabet="aA bB\u00e9e\u0301\u00a0\"\\{},:'\n", max_size=4) | st.text(
    # Without characters that Python and Rust treat differently: four separators, and new ones that one does not know.
    st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0\x1c\x1d\x1e\x1f"),
    max_size=6,
)


def expected_params(cells: Mapping[str, str]) -> dict[str, str]:
    """Return the params that the documentation promises."""
    return {name: value for name, cell in cells.items() if (value := clean(cell)) not in {"", "[]", "{}"}}


@pytest.mark.long
@given(leads=st.lists(st.lists(CELL, min_size=3, max_size=3), min_size=2, max_size=8))
@settings(deadline=None)
def test_fingerprint_equality(tmp_path_factory: pytest.TempPathFactory, leads: list[list[str]]) -> None:
    """No cell makes two different requests share an answer, or one request be paid twice."""
    rows = open_rows(
        tmp_path_factory.getbasetemp(), "blanks: []\nparams: {a: A, ab: B, b: C}\n", ["A", "B", "C"], leads
    )
    batch = read_requests(rows)
    named = list(zip(sent_params(batch), batch.fingerprints, strict=True))
    for params, fingerprint in named:
        for other, other_fingerprint in named:
            assert (params == other) == (fingerprint == other_fingerprint)
    expected = [expected_params(dict(zip(["a", "ab", "b"], lead, strict=True))) for lead in leads]
    assert [params or {} for params in sent_params(batch)] == expected


def test_column_pattern_in_where(tmp_path: Path) -> None:
    """A column pattern in `where`, which polars' SQL does not support, is reported."""
    job = as_yaml(params={"a": "x"}, where="\"^x.*$\" = 'p'")
    with pytest.raises(JobError, match="where: not a polars SQL expression over the columns"):
        open_rows(tmp_path, job, ["^x.*$", "x", "xy"], [["p", "q", "r"]])

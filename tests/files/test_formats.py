"""Leads in every format: values survive reading and writing, and problems name their place and cause."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import openpyxl
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.errors import CommandRefused
from enrich.files import excel_format
from enrich.files.reader import InputTable
from enrich.files.values import as_text, text_or_null
from enrich.files.writer import write_file
from enrich.job.locations import Format
from enrich.job.spec import Input, Output
from tests.support.cases import examples, in_turn
from tests.support.table_files import INPUTS, OUTPUTS, read_table, write_table

HOSTILE_CELLS = [
    "007",
    "+49 30 1234",
    "=1+1",
    " a ",
    '"',
    ",",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "'",
    "NULL",
    "true",
    "1e5",
    "1.0",
]
HOSTILE_CELLS += [
    "12345678901234567890",
    "0.1000",
    "_x0041_",
    "\u2028",
    "\ufeffa",
    "日本😀",
    "\x01",
    "null",
    "{}",
    "a" * 9000,
]
TEXT = st.sampled_from(HOSTILE_CELLS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufffe\uffff"), max_size=8
)


@st.composite
def hostile_tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    """Draw a header and rows of its width, none of them all blank."""
    name = TEXT.map("h".__add__) | st.sampled_from(["", "^h.*$", "*", "column_0"])
    header = draw(st.lists(name, min_size=1, max_size=3, unique=True).filter(any))
    cells = st.tuples(TEXT.map("x".__add__), *[TEXT | st.just("")] * (len(header) - 1)).map(list)
    return header, draw(st.lists(cells, min_size=1, max_size=5))


def read_rows(source: InputTable) -> list[list[Any]]:
    """Read a source's rows as they are."""
    return [list(row) for frame in source.batches() for row in frame.rows()]


def copy_table(source: Path, target: Path, **options: Any) -> Path:
    """Read a file and write its rows to another one with a new column."""
    table = InputTable(source, Input(path=str(source), **options))
    frames = (frame.with_columns(new=pl.lit("=new")) for frame in table.batches())
    schema = {**table.schema, "new": pl.String()}
    write_file(target, Output(path=str(target)), job="job", schema=schema, frames=frames, new_columns=1)
    return target


def read_error(path: Path, **options: Any) -> str:
    """Return the error of a file that can't be read, without its path."""
    with pytest.raises(CommandRefused) as caught:
        read_rows(InputTable(path, Input(path=str(path), **options)))
    return f"{caught.value.message} / {caught.value.hint}".replace(str(path), "FILE")


@pytest.mark.long
@pytest.mark.parametrize("given_as", INPUTS)
@given(table=hostile_tables())
@settings(max_examples=examples(12), deadline=None)
def test_values_survive_every_format_pair(
    tmp_path_factory: pytest.TempPathFactory, given_as: str, table: tuple[list[str], list[list[str]]]
) -> None:
    """Cells keep their exact text through every pair of formats; only CSV escapes the new value against formulas."""
    folder = tmp_path_factory.mktemp("pairs")
    header, rows = table
    leads = write_table(folder / f"leads.{given_as}", header, rows)
    for wanted_as in OUTPUTS:
        found = read_table(copy_table(leads, folder / f"out.{wanted_as}"))
        new = "'=new" if wanted_as[:3] in ("csv", "tsv") else "=new"
        assert found == [[*header, "new"], *([*row, new] for row in rows)], wanted_as


@in_turn("wanted_as", [*OUTPUTS, "jsonl.gz", "tsv.gz"])
def test_outputs_are_deterministic(tmp_path: Path, wanted_as: str) -> None:
    """Writing twice gives the same bytes: the file holds no time and no name."""
    leads = write_table(tmp_path / "leads.csv", ["A"], [["1"], [""], ["2"]])
    one, other = copy_table(leads, tmp_path / f"one.{wanted_as}"), copy_table(leads, tmp_path / f"other.{wanted_as}")
    assert one.read_bytes() == other.read_bytes()


@in_turn("given_as", ["csv", "jsonl", "parquet", "xlsx"])
def test_explicit_format_ignores_extension(tmp_path: Path, given_as: Format) -> None:
    """An explicit format is used whatever the extension is."""
    leads = write_table(tmp_path / f"leads.{given_as}", ["A"], [["007"], ["8"]]).rename(tmp_path / "export.dat")
    assert read_rows(InputTable(leads, Input(path="export.dat", format=given_as))) == [["007"], ["8"]]


# Parquet

NOON = datetime.fromisoformat("2026-01-02T12:00")
TYPED = {
    "text": pl.Series(["007", None], dtype=pl.String),
    "^x.*$": pl.Series([1, None], dtype=pl.Int64),
    "big": pl.Series([2**64 - 1, 0], dtype=pl.UInt64),
    "float": pl.Series([12.0, float("nan")], dtype=pl.Float64),
    "short": pl.Series([0.1, 1e15], dtype=pl.Float32),
    "yes": pl.Series([True, None], dtype=pl.Boolean),
    "day": pl.Series([date(2026, 1, 2), None], dtype=pl.Date),
    "stamp": pl.Series([NOON.replace(microsecond=60), None], dtype=pl.Datetime("ns")),
    "zoned": pl.Series([datetime(2026, 1, 2, 3, tzinfo=UTC), None], dtype=pl.Datetime("us", "Europe/Berlin")),
    "time": pl.Series([time(3, 4), None], dtype=pl.Time),
    "span": pl.Series([timedelta(hours=30), None], dtype=pl.Duration("us")),
    "money": pl.Series([Decimal("1.50"), None], dtype=pl.Decimal(10, 2)),
    "kind": pl.Series(["a", None], dtype=pl.Enum(["a", "b"])),
    "bytes": pl.Series([b"caf\xc3\xa9", b"\xff"], dtype=pl.Binary),
    "list": pl.Series([["a", "é"], None], dtype=pl.List(pl.String)),
    "nested": pl.Series([{"n": 1, "on": date(2026, 1, 2)}, None], dtype=pl.Struct({"n": pl.Int8, "on": pl.Date})),
}
AS_TEXT = [
    ["007", "1", "18446744073709551615", "12", "0.1", "true", "2026-01-02", "2026-01-02T12:00:00.000060"],
    ["", "", "0", "", "1000000000000000", "", "", ""],
]
AS_TEXT[0] += ["2026-01-02T04:00:00+01:00", "03:04:00", "P1DT6H", "1.50", "a", "café", '["a","é"]']
AS_TEXT[0] += ['{"n":1,"on":"2026-01-02"}']
AS_TEXT[1] += ["", "", "", "", "", "ff", "", ""]


def test_parquet_types_are_kept(tmp_path: Path) -> None:
    """Parquet types are kept, nested ones too, under names that polars could take for patterns; nulls stay null."""
    frame = pl.DataFrame(TYPED)
    frame.write_parquet(tmp_path / "leads.parquet")
    found = pl.read_parquet(copy_table(tmp_path / "leads.parquet", tmp_path / "out.parquet"))
    assert found.drop("new").schema == frame.schema
    assert found.drop("new").equals(frame)


@in_turn("wanted_as", ["csv", "tsv", "xlsx"])
def test_parquet_values_as_text(tmp_path: Path, wanted_as: str) -> None:
    """As text, whole numbers have no point, dates are ISO 8601, nested values are JSON, and nulls are blank."""
    pl.DataFrame(TYPED).write_parquet(tmp_path / "leads.parquet")
    found = read_table(copy_table(tmp_path / "leads.parquet", tmp_path / f"out.{wanted_as}"))
    assert [row[:-1] for row in found] == [list(TYPED), *AS_TEXT]


@in_turn("column", list(TYPED))
def test_column_without_rows_is_text(column: str) -> None:
    """As text, a column of any type is text without rows, too."""
    cells = TYPED[column].clear()
    assert [text.dtype for text in (as_text(cells), text_or_null(cells))] == [pl.String(), pl.String()]


@in_turn(
    ("number", "text"),
    [
        (100012345678901232.0, "100012345678901230"),
        (100012345678901248.0, "100012345678901250"),
        (2.0**53 + 2, "9007199254740994"),
        (0.1 + 0.2, "0.30000000000000004"),
        (-0.0, "0"),
        (1e-7, "0.0000001"),
        (1e23, "1" + "0" * 23),
        (float("inf"), "inf"),
    ],
)
def test_parquet_floats_as_text(tmp_path: Path, number: float, text: str) -> None:
    """A float has the fewest digits that are this float alone, without an exponent: no two numbers become one."""
    frame = pl.DataFrame({"n": [number, 0.5], "in": [[number], []]})
    frame.write_parquet(tmp_path / "leads.parquet")
    found = read_table(copy_table(tmp_path / "leads.parquet", tmp_path / "out.csv"))
    assert [row[0] for row in found] == ["n", text, "0.5"]
    line = copy_table(tmp_path / "leads.parquet", tmp_path / "out.jsonl").read_text().splitlines()[0]
    cell = None if number == float("inf") else number
    assert json.loads(line) == {"n": cell, "in": [cell], "new": "=new"}


def test_parquet_values_as_json(tmp_path: Path) -> None:
    """As JSON, numbers and booleans keep their type; types that JSON lacks become the same text as above."""
    pl.DataFrame(TYPED).write_parquet(tmp_path / "leads.parquet")
    first, second = copy_table(tmp_path / "leads.parquet", tmp_path / "out.jsonl").read_text().splitlines()
    typed: dict[str, Any] = {"^x.*$": 1, "big": 2**64 - 1, "float": 12.0, "short": 0.1, "yes": True, "money": 1.5}
    typed |= {"list": ["a", "é"], "nested": {"n": 1, "on": "2026-01-02"}}
    assert json.loads(first) == dict(zip(TYPED, AS_TEXT[0], strict=True)) | typed | {"new": "=new"}
    blank = dict.fromkeys(TYPED) | {"big": 0, "short": 1e15, "bytes": "ff", "new": "=new"}
    assert json.loads(second) == blank


def test_parquet_is_read_in_batches(tmp_path: Path) -> None:
    """Parquet is read in batches in the order of the file."""
    pl.DataFrame({"n": range(50_000)}).write_parquet(tmp_path / "leads.parquet", row_group_size=7_000)
    source = InputTable(tmp_path / "leads.parquet", Input(path="leads.parquet"))
    heights = [frame.height for frame in source.batches()]
    assert (sum(heights), max(heights)) == (50_000, 20_000)
    assert [row[0] for row in read_rows(source)] == list(range(50_000))


@in_turn("content", [b"PAR1", b"A,B\n1,2\n", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_damaged_parquet(tmp_path: Path, content: bytes) -> None:
    """A damaged Parquet file is refused, whatever is wrong with it."""
    (tmp_path / "leads.parquet").write_bytes(content)
    assert read_error(tmp_path / "leads.parquet").startswith("FILE is a damaged Parquet file")


# JSON Lines

LINES = r"""
{"Email": "ada@lovelace.example", "n": 1.0}

{"n": 1e23, "Email": null, "more": {"k": [1, 2.50, "\u00e9"]}}
{"Email": "", "n": "text", "flag": false, "😀": "\ud83d\ude00"}
"""


def test_jsonl_values_as_text(tmp_path: Path) -> None:
    """Keys are columns in order of appearance, numbers keep their spelling, and null is blank."""
    (tmp_path / "leads.ndjson").write_text(LINES)
    assert read_table(copy_table(tmp_path / "leads.ndjson", tmp_path / "out.csv")) == [
        ["Email", "n", "more", "flag", "😀", "new"],
        ["ada@lovelace.example", "1.0", "", "", "", "'=new"],
        ["", "1e23", '{"k":[1,2.50,"é"]}', "", "", "'=new"],
        ["", "text", "", "false", "😀", "'=new"],
    ]


def test_jsonl_roundtrip(tmp_path: Path) -> None:
    """Numbers keep all digits, booleans and null stay what they are, and a key missing in a line is null."""
    (tmp_path / "leads.jsonl").write_text(LINES)
    assert copy_table(tmp_path / "leads.jsonl", tmp_path / "out.jsonl").read_text().splitlines() == [
        '{"Email": "ada@lovelace.example", "n": 1.0, "more": null, "flag": null, "😀": null, "new": "=new"}',
        '{"Email": null, "n": 1e23, "more": {"k":[1,2.50,"é"]}, "flag": null, "😀": null, "new": "=new"}',
        '{"Email": "", "n": "text", "more": null, "flag": false, "😀": "😀", "new": "=new"}',
    ]


@in_turn(
    ("content", "message_start"),
    [
        ("", "FILE is empty"),
        ("\n \n", "FILE is empty"),
        ("{}\n{}\n", "FILE is empty"),
        ('{"a": 1}\n\n{"a": 1,}\n', "FILE: row 2 (line 3) is not JSON: "),
        ('{"a": 1} {"a": 2}\n', "FILE: row 1 (line 1) is not JSON: Extra data (character 10)"),
        ('"a"\n', "FILE: row 1 (line 1) is not a JSON object / Write one object per line"),
        ('[{"a": 1}]\n', "FILE: row 1 (line 1) is not a JSON object / it looks like a JSON array"),
        ('{"a": NaN}\n', "FILE: row 1 (line 1) is not JSON: NaN is not a JSON number"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}\n', "FILE: row 1 (line 1) has a key twice: `c`"),
        (r'{"a": "\u0000"}', "FILE: row 1 (line 1) has a NUL character"),
        (r'{"a": "\ud83d"}', "FILE: row 1 (line 1) has half a character"),
        (r'{"a": ["\udc00"]}', "FILE: row 1 (line 1) has half a character"),
        ('{"a": ' + "[" * 9999 + "]" * 9999 + "}", "FILE: row 1 (line 1) is nested too deeply"),
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", "FILE: row 1 (line 1) is nested too deeply"),
        (b'{"a": "\xe9"}\n', "FILE is not `utf-8` text: byte 8 (line 1)"),
        (b"PK\x03\x04", "FILE is not JSON Lines but a zip archive"),
    ],
)
def test_invalid_jsonl_line(tmp_path: Path, content: str | bytes, message_start: str) -> None:
    """The error names file, row, line and cause, and quotes no value."""
    (tmp_path / "leads.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    assert read_error(tmp_path / "leads.jsonl").startswith(message_start)


def test_jsonl_changed_between_reads(tmp_path: Path) -> None:
    """A file that changes after its keys were collected is refused."""
    path = tmp_path / "leads.jsonl"
    path.write_text('{"a": "1"}\n')
    source = InputTable(path, Input(path="leads.jsonl"))
    for line in ('{"a": 1}\n', '{"b": "1"}\n'):
        path.write_text(line)
        with pytest.raises(CommandRefused, match="changed while it was read"):
            read_rows(source)


# Excel


def write_workbook(path: Path, rows: list[list[Any]], title: str = "Sheet") -> Path:
    """Write a workbook with another library."""
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.title = title
    for row in rows:
        sheet.append(row)
    book.save(path)
    return path


def test_excel_cell_text(tmp_path: Path) -> None:
    """Numbers have no trailing `.0`, dates are ISO 8601, and short rows are padded; only trailing empty rows drop."""
    rows: list[list[Any]] = [
        ["n", "when", "x"],
        [12, date(2026, 1, 2), "007"],
        [12.5, NOON, True],
    ]
    rows += [
        [0.1 + 0.2, time(3, 4, 5)],
        [],
        [1234567890123456, timedelta(hours=30), False],
        [1e20],
        [100012345678901232],
        [None, " a "],
        [""],
    ]
    path = write_workbook(tmp_path / "leads.xlsx", rows)
    assert read_rows(InputTable(path, Input(path="leads.xlsx"))) == [
        ["12", "2026-01-02", "007"],
        ["12.5", "2026-01-02T12:00:00", "TRUE"],
        ["0.3", "03:04:05", ""],
        ["", "", ""],
        ["1234567890123456", "30:00:00", "FALSE"],
        ["100000000000000000000", "", ""],
        ["100012345678901000", "", ""],
        ["", " a ", ""],
    ]


def test_negative_numbers_formatted_as_dates(tmp_path: Path) -> None:
    """A negative number is no date and no time of day: it stays a number. A duration can be negative."""
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    values = [
        ("yyyy-mm-dd", -1),
        ("yyyy-mm-dd", -0.5),
        ("hh:mm:ss", -2.25),
        ("hh:mm:ss", 0.00001),
        ("[h]:mm:ss", -0.51),
    ]
    sheet["C3"], sheet["D3"] = "A", "B"
    for row, (number_format, value) in enumerate(values, 4):
        sheet[f"C{row}"] = value
        sheet[f"D{row}"] = time(3, 4)
        sheet[f"C{row}"].number_format = number_format
    book.save(tmp_path / "leads.xlsx")
    found = read_rows(InputTable(tmp_path / "leads.xlsx", Input(path="leads.xlsx")))
    assert [row[0] for row in found] == ["-1", "-0.5", "-2.25", "00:00:00.864000", "-12:14:24"]
    assert {row[1] for row in found} == {"03:04:00"}


def test_excel_sheet_selection(tmp_path: Path) -> None:
    """Without a name the first sheet is read; the error for a wrong name lists the existing ones."""
    book = openpyxl.Workbook()
    for name in ("One", "Two"):
        sheet = book.create_sheet(name)
        sheet["C3"], sheet["C4"] = "A", name  # empty rows above and empty columns beside are ignored
    del book["Sheet"]
    book.save(tmp_path / "leads.xlsx")
    path = tmp_path / "leads.xlsx"
    assert read_rows(InputTable(path, Input(path="leads.xlsx"))) == [["One"]]
    assert read_rows(InputTable(path, Input(path="leads.xlsx", sheet="Two"))) == [["Two"]]
    assert read_error(path, sheet="Three") == "FILE has no sheet `Three` / its sheets: One, Two"


@in_turn(
    ("rows", "message_start"),
    [
        ([], "FILE: sheet `Sheet` is empty"),
        ([["A", "B", "A"]], "FILE: the header (row 1 of sheet `Sheet`) has duplicate column names: `A` at A, C"),
        (
            [[], ["A", None, None], [1, 2, 3]],
            "FILE: the header (row 2 of sheet `Sheet`) has duplicate column names: the blank",
        ),
    ],
)
def test_excel_invalid_header(tmp_path: Path, rows: list[list[Any]], message_start: str) -> None:
    """A header error names row and column in spreadsheet notation."""
    assert read_error(write_workbook(tmp_path / "leads.xlsx", rows)).startswith(message_start)


@in_turn("content", [b"A,B\n1,2\n", b"PK\x03\x04" + b"x" * 50])
def test_damaged_workbook(tmp_path: Path, content: bytes) -> None:
    """A damaged workbook is refused, whatever is wrong with it."""
    (tmp_path / "leads.xlsx").write_bytes(content)
    assert read_error(tmp_path / "leads.xlsx").startswith("FILE is a damaged Excel workbook")


def test_excel_output_formatting(tmp_path: Path) -> None:
    """All cells are text and none is a formula; the header is bold, frozen and has filters."""
    leads = write_table(
        tmp_path / "leads.csv", ["A", "B"], [["=1+1", "00123456789012345678"], ["https://a.example", ""]]
    )
    sheet = openpyxl.load_workbook(copy_table(leads, tmp_path / "out.xlsx")).active
    assert sheet is not None
    assert (sheet.freeze_panes, sheet.auto_filter.ref) == ("A2", "A1:C3")
    assert all(cell.font.b for cell in sheet[1])
    assert [[cell.data_type for cell in row] for row in sheet["A2:B2"]] == [["s", "s"]]
    assert [cell.value for cell in sheet[2]] == ["=1+1", "00123456789012345678", "=new"]
    assert sheet["A3"].hyperlink is None


def test_excel_limits_keep_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell too long, or too many rows or columns, is an error that keeps the old file; the row limit is lowered."""
    target = tmp_path / "out.xlsx"
    target.write_text("the old one")
    longest = "x" * 32_767
    leads = write_table(tmp_path / "leads.csv", ["A"], [[longest], ["x" + longest]])
    with pytest.raises(CommandRefused, match="row 2, column `A`: a cell of a sheet has at most 32,767 characters"):
        copy_table(leads, target)
    leads = write_table(tmp_path / "leads.csv", ["A"], [["😀" * 16_384]])  # two UTF-16 units each, as Excel counts
    with pytest.raises(CommandRefused, match="row 1, column `A`"):
        copy_table(leads, target)
    write_table(leads, [str(number) for number in range(16_384)], [])
    with pytest.raises(CommandRefused, match="at most 16,384 columns"):
        copy_table(leads, target)
    monkeypatch.setattr(excel_format, "MAX_ROWS", 3)
    write_table(leads, ["A"], [["1"], ["2"], ["3"]])
    with pytest.raises(CommandRefused, match="at most 2 rows under its header"):
        copy_table(leads, target)
    assert target.read_text() == "the old one"
    write_table(leads, ["A"], [["1"], ["2"]])
    assert len(read_table(copy_table(leads, target))) == 3

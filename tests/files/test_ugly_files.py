"""Ugly files: sound ones are read, the others are refused with file, row and column, in bounded memory."""

from __future__ import annotations

import codecs
import csv
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import openpyxl
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl.utils.escape import unescape
from python_calamine import CalamineWorkbook

from enrich.errors import CommandRefused
from enrich.files import csv_format, excel_format
from enrich.files.reader import InputTable
from enrich.files.values import text_frame
from enrich.files.writer import write_file
from enrich.job.spec import Input, Output
from tests.support.cases import examples, in_turn
from tests.support.table_files import write_table

NAMESPACE = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
STYLES = (
    f'<styleSheet {NAMESPACE}><numFmts><numFmt numFmtId="164" formatCode="[h]:mm:ss"/></numFmts>'
    '<cellXfs><xf numFmtId="0"/><xf numFmtId="164" applyNumberFormat="1"/></cellXfs>'
    "</styleSheet>"
)
PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"
RELATION = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def write_sheet(path: Path, cells: str, prefix: str = "") -> Path:
    """Write a workbook whose sheet has these cells, as XML."""
    names = '<c r="A1" t="inlineStr"><is><t>Name</t></is></c><c r="B1" t="inlineStr"><is><t>X</t></is></c>'
    rows = f'<row r="1">{names}</row>{cells}'
    sheet = f"<worksheet {NAMESPACE}><sheetData>{rows}</sheetData></worksheet>"
    if prefix:
        sheet = (
            sheet.replace("</", f"</{prefix}:")
            .replace("<", f"<{prefix}:")
            .replace(f"<{prefix}:/{prefix}:", f"</{prefix}:")
        )
        sheet = sheet.replace("xmlns=", f"xmlns:{prefix}=")
    parts = {
        "[Content_Types].xml": "<Types/>",
        "xl/workbook.xml": f'<workbook {NAMESPACE} xmlns:r="{RELATION}">'
        '<sheets><sheet name="Leads" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{PACKAGE}">'
        f'<Relationship Id="rId1" Type="{RELATION}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "_rels/.rels": f'<Relationships xmlns="{PACKAGE}">'
        f'<Relationship Id="rId1" Type="{RELATION}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/styles.xml": STYLES,
        "xl/worksheets/sheet1.xml": sheet,
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    return path


def read_rows(path: Path, **options: Any) -> list[tuple[str, ...]]:
    """Read a file as text."""
    table = InputTable(path, Input(path=str(path), **options))
    return [row for frame in table.batches() for row in text_frame(frame).rows()]


def refusal(path: Path, **options: Any) -> str:
    """Return the error of a file that is refused, with its hint."""
    with pytest.raises(CommandRefused) as caught:
        read_rows(path, **options)
    assert path.name in caught.value.message
    return f"{caught.value.message} / {caught.value.hint}"


# Excel


@in_turn(
    ("cells", "words"),
    [
        ('<row r="2"><c r="B2"><f>A1</f></c></row>', "a formula without a value: B2"),
        ('<row r="2"><c r="B2"><f>A1</f><v></v></c></row>', "a formula without a value: B2"),
        ('<row r="2"><c r="A2" t="s"><f/><v/></c></row>', "a formula without a value: A2"),
        ('<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>', "far beyond its table: XFD1048576"),
        ('<row r="1048576"><c r="A2"><v>1</v></c><c r="XFD1048576"><v>1</v></c></row>', "XFD1048576"),
        ('<row r="2"><c r="B2" s="1"><v>1e9</v></c></row>', "cell B2"),
        ('<row r="2"><c r="A2"><v>5</v></c><c r="B2" s="1"><v>-1e300</v></c></row>', "cell B2"),
        ('<row r="2"><c r="A2" t="inlineStr"><is><t>a_x0000_b</t></is></c></row>', "cell A2 has a NUL character"),
        ('<row r="2"><c r="A2" t="e"><v>#GETTING_DATA</v></c></row>', "an error that cannot be read"),
    ],
)
def test_workbooks_that_are_refused(tmp_path: Path, cells: str, words: str) -> None:
    """The cell is named, and its content is not."""
    said = refusal(write_sheet(tmp_path / "leads.xlsx", cells))
    assert words in said
    assert "1e9" not in said


@in_turn(
    ("cells", "rows"),
    [
        ('<row r="2"><c r="B2" t="str"><f>""</f><v></v></c><c r="A2"><v>1</v></c></row>', [("1", "")]),
        ('<row r="2"><c r="B2"><f>1+1</f><v>2</v></c></row>', [("", "2")]),
        ('<row r="2"><c r="A2"><v>1</v></c></row><row r="1048576"><c r="XFD1048576" s="1"/></row>', [("1", "")]),
        ('<row r="2"><c r="B2" s="1"><v>1.25</v></c></row>', [("", "30:00:00")]),
    ],
)
def test_workbooks_that_are_read(tmp_path: Path, cells: str, rows: list[tuple[str, ...]]) -> None:
    """A formula with a value, also an empty text, and a formatted but empty cell far away are no problem."""
    assert read_rows(write_sheet(tmp_path / "leads.xlsx", cells)) == rows


def test_sheet_with_prefixed_elements(tmp_path: Path) -> None:
    """Elements with a namespace prefix are recognised, too."""
    cells = '<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>'
    assert "XFD1048576" in refusal(write_sheet(tmp_path / "leads.xlsx", cells, prefix="x"))


def test_texts_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library holds the shared strings, so their size is checked before it opens the workbook."""
    write_table(tmp_path / "leads.xlsx", ["Name"], [["text" * 100]])
    monkeypatch.setattr(excel_format, "_MAX_SHARED_STRINGS_BYTES", 100)
    assert "a damaged Excel workbook: its texts are larger" in refusal(tmp_path / "leads.xlsx")


@in_turn("state", ["hidden", "veryHidden"])
def test_hidden_sheets(tmp_path: Path, state: Literal["hidden", "veryHidden"]) -> None:
    """The first visible sheet is read; a workbook with hidden ones alone names them, and a name chooses one."""
    book = openpyxl.Workbook()
    first = book.active
    assert first is not None
    first.title, first.sheet_state = "_lists", state
    first.append(["a"])
    first.append(["hidden"])
    second = book.create_sheet("Leads")
    second.append(["a"])
    second.append(["seen"])
    book.save(tmp_path / "leads.xlsx")
    assert read_rows(tmp_path / "leads.xlsx") == [("seen",)]
    assert read_rows(tmp_path / "leads.xlsx", sheet="_lists") == [("hidden",)]
    assert "its sheets: _lists, Leads" in refusal(tmp_path / "leads.xlsx", sheet="Other")


def test_empty_sheet_before_the_leads(tmp_path: Path) -> None:
    """A visible sheet without cells, such as the one of a new workbook, is no table; a formula is a cell."""
    book = openpyxl.Workbook()
    empty, leads = book.active, book.create_sheet("Leads")
    assert empty is not None
    leads.append(["a"])
    leads.append(["1"])
    book.save(tmp_path / "leads.xlsx")
    assert read_rows(tmp_path / "leads.xlsx") == [("1",)]
    assert "sheet `Sheet` is empty" in refusal(tmp_path / "leads.xlsx", sheet="Sheet")
    empty.append(["=1+1"])
    book.save(tmp_path / "leads.xlsx")
    assert "sheet `Sheet` has a formula without a value: A1" in refusal(tmp_path / "leads.xlsx")


def test_other_sheets_are_not_scanned(tmp_path: Path) -> None:
    """A formula without a value is a problem only in the sheet that is read."""
    book = openpyxl.Workbook()
    first = book.active
    assert first is not None
    first.append(["a"])
    first.append(["1"])
    sums = book.create_sheet("Sums")
    sums.append(["total"])
    sums.append(["=1+1"])
    book.save(tmp_path / "leads.xlsx")
    assert read_rows(tmp_path / "leads.xlsx") == [("1",)]
    assert "sheet `Sums` has a formula without a value: A2" in refusal(tmp_path / "leads.xlsx", sheet="Sums")


# Parquet

MOST = 2**63 - 1
#: Columns that Python's types cannot hold, and a text of their first cell.
BEYOND_PYTHON = {
    "date": (pl.Series([3_650_000]).cast(pl.Int32).cast(pl.Date), "+11963-05-13"),
    "duration": (pl.Series([MOST]).cast(pl.Duration("ms")), "P106751991167DT7H12M55.807S"),
    "time": (pl.Series([MOST]).cast(pl.Datetime("ns")), "2262-04-11T23:47:16.854775807"),
}
#: Columns whose second cell is refused.
REFUSED = {
    "milliseconds": pl.Series([0, MOST]).cast(pl.Datetime("ms")),
    "zoned": pl.Series([0, -MOST]).cast(pl.Datetime("us", "UTC")),
    "date": pl.Series([0, 2**31 - 1]).cast(pl.Int32).cast(pl.Date),
    "NUL": pl.Series(["a", "b\0"]),
    "NUL in a category": pl.Series(["a", "b\0"]).cast(pl.Categorical),
    "NUL after a backslash": pl.Series(["\\u0000", "\\\0"]),
}


def nested(column: pl.Series) -> list[pl.Series]:
    """Return a column as it is, in a list, in a struct, and in a list of structs with a `//` key."""
    frame = pl.DataFrame({"x": column})
    return [
        column,
        frame.select(pl.concat_list("x")).to_series(),
        frame.select(pl.struct("x").alias("s")).to_series(),
        frame.select(pl.concat_list(pl.struct(pl.col("x").alias("//"))).alias("s")).to_series(),
    ]


@pytest.mark.long
@in_turn("kind", list(BEYOND_PYTHON))
def test_parquet_beyond_python(tmp_path: Path, kind: str) -> None:
    """Dates and durations that Python lacks are read at any depth, into every format."""
    column, text = BEYOND_PYTHON[kind]
    for number, series in enumerate(nested(column)):
        path = tmp_path / f"{number}.parquet"
        pl.DataFrame({"c": series}).write_parquet(path)
        assert text in read_rows(path)[0][0]
        for target in (tmp_path / "o.jsonl", tmp_path / "o.xlsx", tmp_path / "o.csv", tmp_path / "o.parquet"):
            table = InputTable(path, Input(path=str(path)))
            write_file(
                target, Output(path=str(target)), job="j", schema=table.schema, frames=table.batches(), new_columns=1
            )
            assert text in str(read_rows(target)[0][0]).replace("\\", "")


@in_turn("kind", list(REFUSED))
def test_parquet_cells_that_are_refused(tmp_path: Path, kind: str) -> None:
    """A date that no calendar has and a NUL are refused with row and column, at any depth."""
    for number, series in enumerate(nested(REFUSED[kind])):
        path = tmp_path / f"{number}.parquet"
        pl.DataFrame({"c": series}).write_parquet(path)
        assert "row 2, column `c`" in refusal(path)


# CSV


@in_turn(
    ("content", "rows"),
    [
        ("sep=;\na;b\n1,5;2\n", [("1,5", "2")]),
        ('"sep=;"\r\na;b\r\n1;2\r\n', [("1", "2")]),
        ("\ufeffsep=\t\r\na\tb\r\n1\t2\r\n", [("1", "2")]),
        ("SEP=,\na,b\n1,2\n", [("1", "2")]),
        ("a\n\n", [("",)]),
        ("a\n1", [("1",)]),
        ('a\n""\n\n"\n"\n', [("",), ("",), ("\n",)]),
    ],
)
def test_lines_of_csv(tmp_path: Path, content: str, rows: list[tuple[str, ...]]) -> None:
    """`sep=` lines are read as Excel reads them, and an empty line of one column is a row."""
    (tmp_path / "leads.csv").write_bytes(content.encode())
    assert read_rows(tmp_path / "leads.csv") == rows


def test_error_under_a_separator_line(tmp_path: Path) -> None:
    """The line number counts the separator line."""
    (tmp_path / "leads.csv").write_text("sep=;\na;b\n1;2\n1\n")
    assert "row 2 (line 4) has 1 cell" in refusal(tmp_path / "leads.csv")


def test_line_of_any_length_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is refused before it is parsed, and long rows end a batch early."""
    monkeypatch.setattr(csv_format, "MAX_LINE_CHARACTERS", 100)
    (tmp_path / "leads.csv").write_text("a,b\n" + "1," * 60)
    assert "a line of more than 100 characters" in refusal(tmp_path / "leads.csv")
    monkeypatch.setattr(csv_format, "_MAX_BATCH_CHARACTERS", 50)
    monkeypatch.setattr(csv_format, "_BLOCK_CHARACTERS", 1)
    (tmp_path / "leads.csv").write_text("a,b\n" + "1,2222222222222222\n" * 20)
    table = InputTable(tmp_path / "leads.csv", Input(path="leads.csv"))
    assert [frame.height for frame in table.batches()] == [3, 3, 3, 3, 3, 3, 2]


# Other formats under a wrong name

OPEN_DOCUMENT = b"PK\x03\x04" + bytes(26) + b"mimetypeapplication/vnd.oasis.opendocument.spreadsheet"


@in_turn("name", ["leads.csv", "leads.xlsx", "leads.parquet", "leads.jsonl"])
@in_turn(
    ("content", "kind"),
    [
        (OPEN_DOCUMENT, "an OpenDocument file"),
        (b"\xd0\xcf\x11\xe0" + bytes(600), "an old Excel workbook"),
        (b"\x28\xb5\x2f\xfd" + bytes(60), "Zstandard"),
        (b"\xfd7zXZ\0" + bytes(60), "xz"),
        (b"BZh91AY" + bytes(60), "bzip2"),
        (b"%PDF-1.7", "PDF"),
    ],
)
def test_other_formats(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    """The format is recognized by the content of a file, not by its name."""
    (tmp_path / name).write_bytes(content)
    assert kind in refusal(tmp_path / name)


@in_turn("name", ["leads.csv", "leads.json", "leads.txt"])
@in_turn(
    ("content", "words"),
    [
        (b'[{"a": 1}]', "jq -c"),
        (b'\xef\xbb\xbf[\n  {\n    "a": 1}]', "jq -c"),
        (b'{"a": 1}\n', ".jsonl"),
        (b"<!DOCTYPE html>\n<html><body>", "an HTML page"),
        (b"\n<HTML lang=en>", "an HTML page"),
        (b"<?xml version='1.0'?>", "an XML document"),
    ],
)
def test_text_that_is_no_table(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    """The same for text: it is not read as a table with one strange column."""
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name)


def test_long_column_name_is_cut(tmp_path: Path) -> None:
    """A message shows the beginning of a name, and its length."""
    (tmp_path / "leads.csv").write_text(f"{'é' * 100_000},{'é' * 100_000}\n1,2\n")
    message = refusal(tmp_path / "leads.csv")
    assert "100,000 characters" in message
    assert len(message) < 500


# Random ugly files

CELLS = st.text(
    st.sampled_from(list("aé李😀 \t\n\r\"',;|<>&=+-@_x0041/\\{}[]#\u200b\u00a0\u2028\ufeff\u0301\x01\x1f\x7f\x85"))
    | st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufffe\uffff"),
    max_size=12,
) | st.sampled_from(["<r><t>x</t></r>", "_x0041_x0041_", "#N/A", "007", "1e5", "sep=;", "NULL", "\ufeff", '"', "]]>"])
DIALECTS = st.tuples(
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le"]),
)


@st.composite
def ugly_tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    """Draw a header and rows. The first column has no blank, because a sheet has no blank rows at its end."""
    width = draw(st.integers(1, 4))
    header = [f"h{number}{draw(CELLS)}" for number in range(width)]
    cells = st.tuples(CELLS.map("x".__add__), *[CELLS] * (width - 1)).map(list)
    return header, draw(st.lists(cells, min_size=1, max_size=6))


def write_csv(path: Path, table: list[list[str]], dialect: tuple[str, str, str]) -> dict[str, Any]:
    """Write a table in a dialect. Returns the settings to read it with."""
    separator, line_end, encoding = dialect
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=line_end, quoting=csv.QUOTE_ALL).writerows(table)
    mark = codecs.BOM_UTF16_LE if encoding == "utf-16-le" else b""
    path.write_bytes(mark + text.getvalue().encode(encoding))
    return {"separator": separator, "encoding": encoding}


def read_by_polars(path: Path) -> list[list[str]]:
    """Read a Parquet file with polars."""
    frame = pl.read_parquet(path)
    return [frame.columns, *map(list, frame.rows())]


def read_by_json(path: Path) -> list[list[str]]:
    """Read JSON Lines with Python's parser."""
    objects = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return [list(objects[0]), *(list(found.values()) for found in objects)]


def read_by_csv(path: Path) -> list[list[str]]:
    """Read a CSV with Python's parser."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file, strict=True))


def read_by_calamine(path: Path) -> list[list[str]]:
    """Read a workbook with calamine."""
    return [list(map(str, row)) for row in CalamineWorkbook.from_path(path).get_sheet_by_index(0).iter_rows()]


def read_by_openpyxl(path: Path) -> list[list[str]]:
    """Read a workbook with openpyxl."""
    sheet = openpyxl.load_workbook(path).active
    assert sheet is not None
    return [[unescape(str(cell or "")) for cell in row] for row in sheet.iter_rows(values_only=True)]


READERS: list[tuple[str, Callable[[Path], list[list[str]]]]] = [
    ("csv", read_by_csv),
    ("jsonl", read_by_json),
    ("parquet", read_by_polars),
    ("xlsx", read_by_calamine),
    ("xlsx", read_by_openpyxl),
]


@given(table=ugly_tables(), dialect=DIALECTS)
@settings(max_examples=examples(30), deadline=None)
def test_ugly_columns_come_back_true(
    tmp_path_factory: pytest.TempPathFactory, table: tuple[list[str], list[list[str]]], dialect: tuple[str, str, str]
) -> None:
    """Every cell and name of any dialect comes back as it was, from every format, by readers that are not ours."""
    folder = tmp_path_factory.mktemp("ugly")
    header, rows = table
    options = write_csv(folder / "leads.csv", [header, *rows], dialect)
    for ending, reader in READERS:
        source = InputTable(folder / "leads.csv", Input(path="leads.csv", **options))
        target = folder / f"out.{ending}"
        frames = (frame.with_columns(new=pl.lit("1")) for frame in source.batches())
        schema = {**source.schema, "new": pl.String()}
        write_file(target, Output(path=str(target)), job="j", schema=schema, frames=frames, new_columns=1)
        found = reader(target)
        assert found == [[*header, "new"], *([*row, "1"] for row in rows)], reader.__name__
        assert read_rows(target) == [(*row, "1") for row in rows], f"{reader.__name__}: our own reader"

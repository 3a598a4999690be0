"""Workbooks that are written: every cell is text for every reader, and one that reads back otherwise is refused."""

from __future__ import annotations

import io
import zipfile
from hashlib import blake2b
from pathlib import Path

import openpyxl
import polars as pl
import pytest
from openpyxl.utils.escape import unescape
from python_calamine import CalamineWorkbook

from enrich.errors import CommandRefused
from enrich.files import excel_writer
from enrich.files.atomic import WriteProblem
from enrich.files.excel_writer import SHEET, add_cell, check_workbook
from enrich.files.writer import write_file
from enrich.job.spec import Output

#: Text that a careless writer takes for markup, for an escape, or loses.
MARKUP = [
    "<r><t>x</t></r>",
    '<r><t>x</t></r></is></c><c r="Z2"><f>HYPERLINK("http://evil.example")</f><v>0</v></c><c r="AA2"><is><r></r>',
    "<r></r>",
    "<r>",
    "</r>",
    "<r>a & b</r>",
    "<is><t>x</t></is>",
    "]]>",
    "&lt;",
    "_x0041_",
    "_x0041_x0041_",
    "_x005F_x0041_",
    "_x005f_x0041_x",
    "a\rb\r\nc",
    " x ",
    "\n",
    "\t",
    "\x01\x1f\x7f\x85\u2028",
    "=1+1",
    "{=1+1}",
    "http://a.example",
    "#N/A",
]


def write_workbook(header: list[str], rows: list[list[str]]) -> bytes:
    """Write a workbook and return its bytes."""
    raw = io.BytesIO()
    excel_writer.write(raw, header, [pl.DataFrame(rows, dict.fromkeys(header, pl.String), orient="row")])
    return raw.getvalue()


def test_markup_is_text_for_two_readers(tmp_path: Path) -> None:
    """Both readers return the very text of every cell and every column name, and there is no formula and no link."""
    rows = [[text, f"x{text}"] for text in MARKUP]
    path = tmp_path / "out.xlsx"
    path.write_bytes(write_workbook(["<r><t>A</t></r>", "B"], rows))

    by_calamine = CalamineWorkbook.from_path(path).get_sheet_by_index(0).to_python()
    sheet = openpyxl.load_workbook(path).active
    assert sheet is not None
    by_openpyxl = [[unescape(str(cell.value)) for cell in row] for row in sheet.iter_rows()]

    assert by_calamine == by_openpyxl == [["<r><t>A</t></r>", "B"], *rows]
    assert {cell.data_type for row in sheet.iter_rows() for cell in row} <= {"s", "inlineStr"}
    assert not any(cell.hyperlink for row in sheet.iter_rows() for cell in row)
    with zipfile.ZipFile(path) as archive:
        assert b"<f>" not in archive.read(SHEET)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b">one<", b">two<"),
        (b"<t>one</t>", b"<r><t>one</t></r>"),
        (b'<c r="A2" t="inlineStr"><is><t>one</t></is></c>', b""),
        (b"<is><t>one</t></is>", b"<f>1+1</f><is><t>one</t></is>"),
        (b"</sheetData>", b""),
    ],
)
def test_workbook_that_reads_back_otherwise(old: bytes, new: bytes) -> None:
    """A cell that is changed, rich, missing or a formula, and broken XML, are noticed."""
    source = io.BytesIO(write_workbook(["A"], [["one"]]))
    expected = blake2b()
    add_cell(expected, "A1", "A")
    add_cell(expected, "A2", "one")
    check_workbook(source, expected)

    changed = io.BytesIO()
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(changed, "w") as copy:
        for name in archive.namelist():
            data = archive.read(name)
            assert name != SHEET or old in data
            copy.writestr(name, data.replace(old, new) if name == SHEET else data)
    with pytest.raises(WriteProblem, match="cannot be read back"):
        check_workbook(changed, expected)


def test_unsound_workbook_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the library writes something else than it was given, the old file stays and the remedy is named."""
    target = tmp_path / "out.xlsx"
    target.write_bytes(b"the old one")
    monkeypatch.setattr(excel_writer._TextSheet, "_escape_data", lambda _self, data: data)
    frame = pl.DataFrame({"A": ["<b>"]})
    with pytest.raises(CommandRefused, match="cannot be read back") as caught:
        write_file(
            target, Output(path=str(target)), job="job", schema=dict(frame.schema), frames=[frame], new_columns=1
        )
    assert "enrich collect" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["out.xlsx"]
    assert target.read_bytes() == b"the old one"

"""CSV files are read and written unchanged cell by cell; broken ones are refused with row and line."""

import csv
import gzip
import io
import os
import traceback
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.files import csv_format
from enrich.files.csv_format import MAX_CELL_CHARACTERS, likely_separator, read_batches, read_header
from enrich.files.text import FileProblem, TableFile
from tests.support.cases import examples, first_quick, in_turn

UTF8_BOM = b"\xef\xbb\xbf"


def write_csv(folder: Path, content: bytes | str, name: str = "leads.csv", **options: Any) -> TableFile:
    """Save a file and return its format."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return TableFile(path, **options)


def read_rows(source: TableFile, rows_per_batch: int = 20_000) -> list[tuple[str, ...]]:
    """Return the header and all rows."""
    frames = list(read_batches(source, rows_per_batch))
    return [tuple(read_header(source)), *(row for frame in frames for row in frame.rows())]


def read_problem(source: TableFile) -> FileProblem:
    """Return the problem that reading the whole file meets."""
    with pytest.raises(FileProblem) as caught:
        read_rows(source)
    return caught.value


def written_bytes(
    header: list[str], rows: list[list[str | None]], separator: str = ",", encoding: str = "utf-8"
) -> bytes:
    """Return the bytes of a file of these rows, written as two frames."""
    raw, schema = io.BytesIO(), dict.fromkeys(header, pl.String)
    frames = (pl.DataFrame(part, schema, orient="row") for part in (rows[:1], rows[1:]))
    csv_format.write(raw, header, frames, separator, encoding)
    return raw.getvalue()


@in_turn(
    ("content", "rows"),
    [
        pytest.param("a,b\n1,2\n", [("a", "b"), ("1", "2")], id="plain"),
        pytest.param("a,b\n1,2", [("a", "b"), ("1", "2")], id="no last line end"),
        pytest.param("a,b\r\n1,2\r\n", [("a", "b"), ("1", "2")], id="CRLF"),
        pytest.param("a,b\r1,2\r", [("a", "b"), ("1", "2")], id="CR"),
        pytest.param("a,b\r\n1,2\n3,4\r5,6", [("a", "b"), ("1", "2"), ("3", "4"), ("5", "6")], id="mixed line ends"),
        pytest.param(UTF8_BOM + b"a,b\n1,2\n", [("a", "b"), ("1", "2")], id="byte order mark"),
        pytest.param(UTF8_BOM + b'"a",b\n1,2\n', [("a", "b"), ("1", "2")], id="byte order mark before a quote"),
        pytest.param("\n\na,b\n\n1,2\n\n\r\n3,4\n\n", [("a", "b"), ("1", "2"), ("3", "4")], id="empty lines"),
        pytest.param(
            "\na\n\n1\n\n2\n\n", [("a",), ("",), ("1",), ("",), ("2",), ("",)], id="empty lines of one column"
        ),
        pytest.param('a\n""\n\n \n', [("a",), ("",), ("",), (" ",)], id="blank cells of one column"),
        pytest.param("a,b\n,\n", [("a", "b"), ("", "")], id="blank cells"),
        pytest.param("a,b\n", [("a", "b")], id="no rows"),
        pytest.param("a,,c\n1,2,3\n", [("a", "", "c"), ("1", "2", "3")], id="one blank column name"),
        pytest.param(" a ,A,a\n1,2,3\n", [(" a ", "A", "a"), ("1", "2", "3")], id="nearly the same names"),
        pytest.param('"a\nb",c\n1,2\n', [("a\nb", "c"), ("1", "2")], id="line break in a column name"),
        pytest.param('a,b\n"1\r\n\n2\r",3\n', [("a", "b"), ("1\r\n\n2\r", "3")], id="line breaks in a cell"),
        pytest.param('a,b\n"say ""hi"", you","\n"\n', [("a", "b"), ('say "hi", you', "\n")], id="doubled quotes"),
        pytest.param('a,b\n5" disk, "x"\n', [("a", "b"), ('5" disk', ' "x"')], id="quotes inside unquoted cells"),
        pytest.param("a,b\n 01067 ,=1+1\n", [("a", "b"), (" 01067 ", "=1+1")], id="nothing stripped or understood"),
        pytest.param("a,b\nnull,NaN\n", [("a", "b"), ("null", "NaN")], id="nothing is null"),
        pytest.param("a,b\nJosé,田中\u2028\x85\x0b\n", [("a", "b"), ("José", "田中\u2028\x85\x0b")], id="other breaks"),
        pytest.param("^a.*$,*\n1,2\n", [("^a.*$", "*"), ("1", "2")], id="column names that are patterns"),
    ],
)
def test_valid_unusual_csv(tmp_path: Path, content: bytes | str, rows: list[tuple[str, ...]]) -> None:
    """Unusual but valid CSV keeps each cell as written, and no row is added or lost."""
    assert read_rows(write_csv(tmp_path, content)) == rows


@in_turn("rows_per_batch", [1, 2, 3, 100])
def test_batches_keep_order(tmp_path: Path, rows_per_batch: int) -> None:
    """Batches of any size keep the file's order, and all but the last are full."""
    source = write_csv(tmp_path, "n,m\n" + "".join(f"{number},\n\n" for number in range(7)))
    frames = list(read_batches(source, rows_per_batch))
    assert [cell for frame in frames for cell in frame["n"]] == [str(number) for number in range(7)]
    assert all(frame.height == rows_per_batch for frame in frames[:-1])
    assert all(frame.schema == {"n": pl.String, "m": pl.String} for frame in frames)


def test_header_only_file_has_no_batches(tmp_path: Path) -> None:
    """A file with only a header gives the header and no batch."""
    assert list(read_batches(write_csv(tmp_path, "a,b\n"))) == []


@in_turn("padding", range(8180, 8196))
def test_crlf_across_read_buffers(tmp_path: Path, padding: int) -> None:
    """A CRLF split by the read buffer ends one line, not two."""
    source = write_csv(tmp_path, f'a\r\n"{"x" * padding}\r\n"\r\n2\r\n3')
    assert read_problem(write_csv(tmp_path, f"a\r\n{'x' * padding}\r\n2\r\n3,", "bad.csv")).message.endswith(
        "row 3 (line 4) has 2 cells, but the header has 1 column"
    )
    assert read_rows(source)[1:] == [("x" * padding + "\r\n",), ("2",), ("3",)]


@in_turn("encoding", ["utf-8", "UTF8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7"])
def test_unicode_encodings(tmp_path: Path, encoding: str) -> None:
    """Unicode encodings are read as named, and a byte order mark is never part of a column name."""
    text = "名前,b\nЩёлк,Ωμέγα 🚀\n"
    expected = [("名前", "b"), ("Щёлк", "Ωμέγα 🚀")]
    assert read_rows(write_csv(tmp_path, text.encode(encoding), encoding=encoding)) == expected
    assert read_rows(write_csv(tmp_path, ("\ufeff" + text).encode("utf-16-le"), encoding="utf-16-le")) == expected


@in_turn("separator", [";", "\t", "|", " ", "¦"])
def test_separators(tmp_path: Path, separator: str) -> None:
    """Only the chosen separator splits cells; a comma is then text."""
    assert read_rows(write_csv(tmp_path, f"a{separator}b\n1,5{separator}2\n", separator=separator))[1] == ("1,5", "2")


def test_gzip_by_extension(tmp_path: Path) -> None:
    """The extension `.gz`, in either case, decides whether a file is compressed."""
    assert read_rows(write_csv(tmp_path, gzip.compress(b"a\n1\n"), "leads.csv.GZ")) == [("a",), ("1",)]


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    first_quick(
        6,
        [
            pytest.param("", "{path} is empty", "column names", id="0 bytes"),
            pytest.param("\n\r\n\n", "{path} is empty", "column names", id="empty lines only"),
            pytest.param(UTF8_BOM, "{path} is empty", "column names", id="byte order mark only"),
            pytest.param(
                "a,b,c\n1,2,3\n\n1,2\n",
                "{path}: row 2 (line 4) has 2 cells, but the header has 3 columns",
                "if a total or a footer starts here, delete it",
                id="short row",
            ),
            pytest.param(
                "a,b\n1,2,\n", "{path}: row 1 (line 2) has 3 cells, but the header has 2 columns", "", id="long"
            ),
            pytest.param(
                "a,b\n \n", "{path}: row 1 (line 2) has 1 cell, but the header has 2 columns", "", id="spaces"
            ),
            pytest.param(
                "a;b\nx;1,5\n", "{path}: row 1 (line 2) has 2 cells", "separator may be ';'", id="wrong separator"
            ),
            pytest.param(
                'a,b\n"1\n2",3\n4,"5\n\n6",7\n',
                "{path}: row 2 (line 4) has 3 cells, but the header has 2 columns",
                "the row runs on to line 6",
                id="long row of many lines",
            ),
            pytest.param(
                'a,b\n1,2\n\n3,"4\n5,6\n',
                "{path}: row 2 (line 4) has a quote that is never closed",
                "close the quote, or double it if it is text; the row runs on to line 5",
                id="unclosed quote",
            ),
            pytest.param('"a,b\n1,2\n', "{path}: the header (line 1) has a quote that is", "", id="unclosed in header"),
            pytest.param(
                'a\n"1"2\n', "{path}: row 1 (line 2) has characters after a closing quote", "double", id="after"
            ),
            pytest.param(
                'a,b\n1,"2\n3,"4"\n',
                "{path}: row 1 (line 2) has characters after a closing quote",
                "the row runs on to line 3",
                id="closed by the next quote",
            ),
            pytest.param("a,b\n1,2\n3,\0\n", "{path}: row 2 (line 3) has a NUL character", "binary file", id="NUL"),
            pytest.param(
                "a,\0\n1,2\n", "{path}: the header (line 1) has a NUL character", "binary file", id="NUL in header"
            ),
            pytest.param(
                "a,b\n1,2\n".encode("utf-16-le"), "{path}: the header (line 1) has a NUL", "utf-16-le", id="no mark"
            ),
            pytest.param(
                "Email,b,Email,,c,\n",
                "{path}: the header (line 1) has duplicate column names: `Email` at 1, 3; the blank name at 4, 6",
                "its own name",
                id="duplicate names",
            ),
            pytest.param(
                "a,b\n\n1,2\n3,Jos\u00e9\n".encode("cp1252"),
                "{path} is not `utf-8` text: byte 15 (line 4) is invalid in it",
                "`encoding: cp1252`",
                id="cp1252",
            ),
            pytest.param(b"a\r1\r\xe9", "{path} is not `utf-8` text: byte 5 (line 3)", "cp1252", id="cut at the end"),
            pytest.param(
                b"a\n" + b"x\r\n" * 349_525 + b"\xc3" + b"x",
                "{path} is not `utf-8` text: byte 1048578 (line 349527)",
                "cp1252",
                id="far down",
            ),
            pytest.param(
                b"a\n" + b"\n" * ((1 << 20) - 3) + b"\xe9\n",
                "{path} is not `utf-8` text: byte 1048576 (line 1048575)",
                "cp1252",
                id="across two reads",
            ),
            pytest.param(
                "a,b\n".encode("utf-16"),
                "{path} is not `utf-8` text: byte 1 (line 1)",
                "`encoding: utf-16`",
                id="utf-16",
            ),
            pytest.param(
                "a,b\n".encode("utf-32"),
                "{path} is not `utf-8` text: byte 1 (line 1)",
                "`encoding: utf-32`",
                id="utf-32",
            ),
            pytest.param(
                b"PK\x03\x04\x14\0", "{path} is not CSV text but a zip archive or an Excel", "`.xlsx`", id="xlsx"
            ),
            pytest.param(gzip.compress(b"a\n"), "{path} is not CSV text but compressed with gzip", "`.gz`", id="gzip"),
            pytest.param(
                b"\x89PNG\r\n\x1a\n\0\0", "{path} is not `utf-8` text: byte 1", "may be a binary file", id="picture"
            ),
            pytest.param(
                "a\n" + "x" * (MAX_CELL_CHARACTERS + 1),
                "{path}: row 1 (line 2) has a cell of more than 10,000,000 characters",
                "never closed",
                id="endless cell",
            ),
        ],
    ),
)
def test_error_names_row_and_line(tmp_path: Path, content: bytes | str, message: str, hint: str) -> None:
    """The message shows where the error is, and the hint what to do."""
    source = write_csv(tmp_path, content)
    problem = read_problem(source)
    assert problem.message.startswith(message.format(path=source.path))
    assert str(problem) == problem.message
    assert hint in (problem.hint or "")


@in_turn("at", [0, 1, 2, 3, 4])
def test_error_in_later_batch(tmp_path: Path, at: int) -> None:
    """Rows are counted over the whole file, and the batches before the error are returned."""
    lines = [f"{number},x" for number in range(5)]
    lines[at] += ",y"
    source = write_csv(tmp_path, "a,b\n" + "\n".join(lines))
    batches = read_batches(source, 2)
    before = [next(batches) for _ in range(at // 2)]
    assert sum(frame.height for frame in before) == at // 2 * 2
    with pytest.raises(FileProblem, match=rf"row {at + 1} \(line {at + 2}\)"):
        next(batches)


@in_turn("row", ["Jane", 'Jane,"Jane"Jane', 'Jane,"Jane', "Jane,Jane\0", "Jane,\ud8ff"])
def test_errors_do_not_quote_cells(tmp_path: Path, row: str) -> None:
    """Errors don't quote cells: messages may be logged, and cells are personal data."""
    source = write_csv(tmp_path, f"a,b\n{row}\n".encode(errors="surrogatepass"))
    problem = read_problem(source)
    result = "".join([*traceback.format_exception_only(problem), problem.hint or ""])
    assert "Jane" not in result.replace(str(source.path), "")
    assert problem.__context__ is None or problem.__suppress_context__


@in_turn(
    ("content", "encoding", "hint"),
    [
        (b"a\n\x81\n", "cp1252", "`encoding: utf-8`"),
        (UTF8_BOM + b"a\n", "cp1252", "`encoding: utf-8`"),
        (b"abcd\n1\n", "utf-16", "`encoding: utf-8`"),
        ("a\n1\n".encode("utf-16-le"), "utf-16", "`encoding: utf-16-le`"),
        ("a\n1\n".encode("utf-16-be"), "utf-16", "`encoding: utf-16-be`"),
        ("a\n1\n".encode("utf-16")[:-1], "utf-16", "encoding"),
        (b"a\n+2AA-\n", "utf-7", "`encoding: utf-8`"),
    ],
)
def test_wrong_encoding_hint(tmp_path: Path, content: bytes, encoding: str, hint: str) -> None:
    """Where the bytes show it, the hint names an encoding that fits better."""
    problem = read_problem(write_csv(tmp_path, content, encoding=encoding))
    assert f"is not `{encoding}` text" in problem.message
    assert hint in (problem.hint or "")


@in_turn(
    "content", [b"a\n1\n", gzip.compress(b"a\n1\n", mtime=0)[:-9], gzip.compress(b"a\n" * 99, mtime=0)[:12] + b"?" * 9]
)
def test_corrupt_gzip(tmp_path: Path, content: bytes) -> None:
    """Plain text, a truncated file and a damaged file are all reported as invalid gzip."""
    source = write_csv(tmp_path, content, "leads.csv.gz")
    assert read_problem(source).message == f"{source.path} is a damaged gzip file"


def test_missing_file(tmp_path: Path) -> None:
    """The error for a missing file shows the path as it was given."""
    assert read_problem(TableFile(tmp_path / "none.csv")).message == f"{tmp_path / 'none.csv'} does not exist"
    file = write_csv(tmp_path, "a\n").path
    assert read_problem(TableFile(file / "below")).message == f"{file / 'below'} cannot be read: Not a directory"


def test_not_a_regular_file(tmp_path: Path) -> None:
    """A folder or a named pipe is refused: the first can't be read, the second never ends."""
    assert read_problem(TableFile(tmp_path)).message == f"{tmp_path} is a folder"
    os.mkfifo(tmp_path / "pipe.csv")
    assert read_problem(TableFile(tmp_path / "pipe.csv")).message.endswith("pipe.csv is not a file")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing read permission is reported. The test raises the error, because root may read everything."""

    def refuse(*_: object) -> None:
        raise PermissionError

    source = write_csv(tmp_path, "a\n")
    monkeypatch.setattr(Path, "open", refuse)
    assert read_problem(source).message == f"{source.path} cannot be read by this user"


def test_field_size_limit_is_restored(tmp_path: Path) -> None:
    """The csv module's process-wide field limit is restored after reading, also between two batches."""
    source = write_csv(tmp_path, f"a\n{'x' * 200_000}\n2\n")
    before = csv.field_size_limit()
    batches = read_batches(source, 1)
    assert next(batches)["a"].str.len_chars().item() == 200_000
    assert csv.field_size_limit() == before
    assert next(batches)["a"].item() == "2"
    read_problem(write_csv(tmp_path, 'a\n"', "bad.csv"))
    assert csv.field_size_limit() == before


@in_turn(
    ("header", "separator", "likely"),
    [
        (["a;b;c,d"], ",", ";"),
        (["a\tb"], ",", "\t"),
        (["a|b"], ",", "|"),
        (["a,b"], ";", ","),
        (["a;b"], ";", None),
        (["a"], ",", None),
        (["a;b", "c"], ",", None),
    ],
)
def test_separator_suggestion(header: list[str], separator: str, likely: str | None) -> None:
    """Another separator is suggested only when the header is a single column."""
    assert likely_separator(header, separator) == likely


def test_minimal_quoting() -> None:
    """Cells are quoted only where needed; lines end with a line feed, and null is a blank cell."""
    rows: list[list[str | None]] = [[None, "x y"], ["1,5", 'a "b"'], [" ", "c\rd"], ["", "e\nf\r\n"]]
    assert written_bytes(["a", "ü"], rows) == 'a,ü\n,x y\n"1,5","a ""b"""\n ,"c\rd"\n,"e\nf\r\n"\n'.encode()


def test_single_blank_cell_is_quoted(tmp_path: Path) -> None:
    """A single blank cell is written in quotes, because an empty line is no row."""
    content = written_bytes(["a"], [[""], [None], ["x"]])
    assert content == b'a\n""\n""\nx\n'
    assert read_rows(write_csv(tmp_path, content)) == [("a",), ("",), ("",), ("x",)]


def test_bom_character_in_first_header(tmp_path: Path) -> None:
    """A U+FEFF inside the first column name is kept: it is not the file's byte order mark."""
    assert read_header(write_csv(tmp_path, written_bytes(["\ufeffa", "b"], []))) == ["\ufeffa", "b"]


def test_bom_is_written_once(tmp_path: Path) -> None:
    """The byte order mark is written once, even when the file is written as several frames."""
    content = written_bytes(["a"], [["1"], ["2"]], encoding="utf-16")
    assert content.decode("utf-16") == "a\n1\n2\n"
    assert read_rows(write_csv(tmp_path, content, encoding="utf-16")) == [("a",), ("1",), ("2",)]


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.text(
    " a,;\t\"'\r\n\ufeff|", max_size=5
)


@st.composite
def csv_tables(draw: st.DrawFn) -> tuple[list[str], list[list[str | None]]]:
    """Draw a header of distinct names and rows of any text."""
    header = draw(st.lists(CELL, min_size=1, max_size=4, unique=True))
    return header, draw(st.lists(st.lists(CELL, min_size=len(header), max_size=len(header)), max_size=5))


@given(
    table=csv_tables(),
    separator=st.sampled_from([",", ";", "\t", "|", " ", "a", "¦"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le"]),
    rows_per_batch=st.integers(1, 6),
)
@settings(max_examples=examples(150), deadline=None)
def test_csv_roundtrip(
    tmp_path_factory: pytest.TempPathFactory,
    table: tuple[list[str], list[list[str | None]]],
    separator: str,
    encoding: str,
    rows_per_batch: int,
) -> None:
    """Any text in any cell survives writing and reading with any separator and Unicode encoding."""
    header, rows = table
    content = written_bytes(header, rows, separator, encoding)
    source = write_csv(tmp_path_factory.mktemp("round"), content, separator=separator, encoding=encoding)
    assert read_rows(source, rows_per_batch) == [tuple(header), *map(tuple, rows)]
    frames = read_batches(source)
    again = [[*row] for frame in frames for row in frame.rows()]
    assert written_bytes(read_header(source), again, separator, encoding) == content


@given(
    content=st.binary(max_size=40) | st.text('a,"\r\n \0é', max_size=40).map(str.encode),
    name=st.sampled_from(["leads.csv", "leads.csv.gz"]),
    encoding=st.sampled_from(["utf-8", "ascii", "cp1252", "utf-16", "utf-7", "shift_jis"]),
)
@settings(max_examples=examples(200), deadline=None)
def test_any_bytes_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str, encoding: str
) -> None:
    """Any bytes, also as gzip, give rows of one width or a file problem, never another exception."""
    packed = gzip.compress(content) if name.endswith(".gz") else content
    source = write_csv(tmp_path_factory.mktemp("any"), packed, name, encoding=encoding)
    with suppress(FileProblem):
        rows = read_rows(source, 2)
        assert {len(row) for row in rows} == {len(rows[0])}


@given(content=st.text('a,"\r\n\v\u2028é', max_size=40), block=st.integers(1, 9))
@settings(max_examples=examples(200), deadline=None)
def test_lines_in_blocks(tmp_path_factory: pytest.TempPathFactory, content: str, block: int) -> None:
    """However the file is divided into blocks, its lines are those that Python's files have."""
    source = write_csv(tmp_path_factory.mktemp("lines"), content)
    with source.path.open(newline="", encoding="utf-8") as file:
        expected = list(file)
    with patch.object(csv_format, "_BLOCK_CHARACTERS", block), csv_format._open_csv(source) as lines:
        assert list(chain.from_iterable(lines._blocks())) == (expected or [""])


@pytest.mark.parametrize("width", [1, 2])
def test_many_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Blank lines for longer than a batch are not the end of the file."""
    monkeypatch.setattr(csv_format, "_MAX_BATCH_CHARACTERS", 1_000)
    monkeypatch.setattr(csv_format, "_BLOCK_CHARACTERS", 100)
    first, last = ",".join("ab"[:width]), ",".join("34"[:width])
    blank_lines = 5_000

    rows = read_rows(write_csv(tmp_path, f"{first}\n{last}\n" + "\n" * blank_lines + f"{last}\n"))

    assert rows[-1] == tuple("34"[:width])
    assert len(rows) == 3 + (blank_lines if width == 1 else 0)

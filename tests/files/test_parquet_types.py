"""Types that a Parquet file can have and polars cannot: sound files are read, or refused with the column."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import polars as pl
import pytest

from enrich.errors import CommandRefused
from enrich.files import parquet_format
from enrich.files.reader import InputTable
from enrich.files.text import FileProblem, TableFile
from enrich.files.values import as_text, json_cells, text_frame
from enrich.job.spec import Input
from tests.support.cases import in_turn

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
#: A file with the column `D` of type decimal256(76, 2) and one row, written by Arrow.
LONG_DECIMAL = (
    "UEFSMRUAFUwVTCwVAhUAFQYVBhwAAAACAAAAAgEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAlhUEGSw1ABgGc2NoZW1h"
    "FQIAFQ4VQBUCGAFEJQoVBBWYASxcFQQVmAEAAAAWAhkcGRwmABwVDhklBgAZGAFEFQAWAhZyFnImCEkcFQAVABUCADwpBhkmAAIA"
    "AAAWchYCJggWcgAZHBgMQVJST1c6c2NoZW1hGLgBLy8vLy80QUFBQUFRQUFBQUFBQUtBQXdBQmdBRkFBZ0FDZ0FBQUFBQkJBQU1B"
    "QUFBQ0FBSUFBQUFCQUFJQUFBQUJBQUFBQUVBQUFBVUFBQUFFQUFVQUFnQUJnQUhBQXdBQUFBUUFCQUFBQUFBQUFFSEVBQUFBQndB"
    "QUFBRUFBQUFBQUFBQUFFQUFBQkVBQW9BRUFBRUFBZ0FEQUFLQUFBQVRBQUFBQUlBQUFBQUFRQUFBQUFBQUE9PQAYIHBhcnF1ZXQt"
    "Y3BwLWFycm93IHZlcnNpb24gMjYuMC4xGRwcAAAAWAEAAFBBUjE="
)


def write_with_zone(path: Path, zone: str) -> None:
    """Write times with a zone that polars has none of. The Arrow schema in the file names it, in base64."""
    known = {6: "Turkey", 12: "Asia/Jakarta"}[len(zone)]
    kind = pl.Datetime("us", known)
    columns = {
        "^x.*$": pl.Series([NOON, None], dtype=kind),
        "list": pl.Series([[NOON], None], dtype=pl.List(kind)),
        "array": pl.Series([[NOON], None], dtype=pl.Array(kind, 1)),
        "struct": pl.Series([{"t": NOON}, None], dtype=pl.Struct({"t": kind})),
    }
    pl.DataFrame(columns).write_parquet(path)
    raw = path.read_bytes()
    schema = max(re.findall(rb"[A-Za-z0-9+/=]{200,}", raw), key=len)
    changed = base64.b64encode(base64.b64decode(schema).replace(known.encode(), zone.encode()))
    assert changed != schema
    path.write_bytes(raw.replace(schema, changed))


def test_struct_fields_named_like_patterns(tmp_path: Path) -> None:
    """Polars takes a name such as `^a$` for a pattern: a date was that of another field, or the file was damaged."""
    first, second = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    pair = {"a": first.date(), "^a$": second.date()}
    columns = {
        "pair": [pair, None],
        "list": [[pair, None], None],
        "inner": [{"^.*$": pair}, None],
        "x": [{"^y": first}] * 2,
    }
    pl.DataFrame(columns).write_parquet(tmp_path / "leads.parquet")
    (frame,) = InputTable(tmp_path / "leads.parquet", Input(path="leads.parquet")).batches()
    shown = '{"a":"2026-01-01","^a$":"2027-01-01"}'
    time = '{"^y":"2026-01-01T00:00:00+00:00"}'
    assert text_frame(frame).rows() == [(shown, f"[{shown},null]", f'{{"^.*$":{shown}}}', time), ("", "", "", time)]


@in_turn("zone", ["+03:30", "-05:45", "Nowhere/City"])
def test_zones_that_polars_lacks_are_utc(tmp_path: Path, capfd: pytest.CaptureFixture[str], zone: str) -> None:
    """Times keep their instant, in lists and structs, too, and nothing is written to stderr."""
    write_with_zone(tmp_path / "leads.parquet", zone)
    table = InputTable(tmp_path / "leads.parquet", Input(path="leads.parquet"))
    (frame,) = table.batches()
    assert frame.schema == table.schema
    assert frame.schema["^x.*$"] == pl.Datetime("us", "UTC")
    assert frame.rows() == [(NOON, [NOON], [NOON], {"t": NOON}), (None, None, None, None)]
    assert as_text(frame.to_series(0)).to_list() == ["2026-01-02T12:00:00+00:00", ""]
    assert json_cells(frame.to_series(1)) == ['["2026-01-02T12:00:00+00:00"]', "null"]
    assert capfd.readouterr().err == ""


def test_decimal_that_is_too_long(tmp_path: Path) -> None:
    """The column and its type are named: the file is not damaged."""
    (tmp_path / "leads.parquet").write_bytes(base64.b64decode(LONG_DECIMAL))
    with pytest.raises(CommandRefused) as caught:
        InputTable(tmp_path / "leads.parquet", Input(path="leads.parquet"))
    assert str(caught.value.message).endswith(
        "column `D` has the type Decimal(precision=76, scale=2), which is not supported"
    )


def test_panic_of_polars(tmp_path: Path) -> None:
    """A panic of polars, which is no Exception, is a problem of the file."""
    pl.DataFrame({"A": ["1"]}).write_parquet(tmp_path / "leads.parquet")
    panic = pl.exceptions.PanicException("unwrap")
    source = TableFile(tmp_path / "leads.parquet", format="parquet")
    with (
        patch.object(parquet_format, "_scan", side_effect=panic),
        pytest.raises(FileProblem, match="type that cannot be read"),
    ):
        parquet_format.read_schema(source)

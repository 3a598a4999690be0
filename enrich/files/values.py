"""Converts cells of any type to readable text and to JSON."""

from __future__ import annotations

import json.encoder
import math
from collections.abc import Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal

import polars as pl

#: Column type for raw JSON text from a JSON file with values other than strings. A missing value is null.
JSON_TYPE = pl.Struct({"enrich:json": pl.String})
#: Integers below this are exact as floats.
_MAX_EXACT_INTEGER = 2**53
_DATETIME_FORMAT = "%Y-%m-%dT%H:%M:%S%.f"

#: Writes text as a JSON string without escaping non-ASCII letters.
quote_json = json.encoder.encode_basestring


class RawJson(str):
    """Raw JSON text of a value that is not a string, such as a number, exactly as in the file."""

    __slots__ = ()


def as_text(column: pl.Series) -> pl.Series:
    """Convert every cell of a column to text. A null becomes a blank."""
    # Remove the name, because polars reads a name such as `^a.*$` as a pattern.
    name, column = column.name, column.alias("")
    kind = column.dtype
    if kind == pl.String:
        text = column
    elif kind == JSON_TYPE:
        text = _text_series([None if cell is None else _json_to_text(cell) for cell in raw_json_cells(column)])
    elif isinstance(kind, pl.Datetime):
        text = column.dt.strftime(_DATETIME_FORMAT + ("%:z" if kind.time_zone else ""))
    elif kind == pl.Duration:
        text = column.dt.to_string("iso")
    elif kind == pl.Time:
        text = column.dt.to_string("%H:%M:%S%.f")
    elif kind.is_integer() or kind.is_decimal() or kind in (pl.Boolean, pl.Categorical, pl.Enum, pl.Date):
        text = column.cast(pl.String)
    elif kind.is_float():
        # Convert each distinct number once: prices, for example, repeat often.
        numbers = _shorten_floats(column).to_list()
        texts = {number: to_text(number) for number in set(numbers)}
        text = _text_series(map(texts.__getitem__, numbers))
    else:
        text = _text_series(map(to_text, column.to_list()))
    return text.fill_null("").alias(name)


def text_frame(frame: pl.DataFrame) -> pl.DataFrame:
    """Convert every cell of a frame to text. A frame with only text and no nulls is returned unchanged."""
    if all(column.dtype == pl.String and not column.null_count() for column in frame.get_columns()):
        return frame
    return pl.DataFrame({column.name: as_text(column) for column in frame.get_columns()})


def json_cells(column: pl.Series) -> list[str]:
    """Convert every cell of a column to JSON text."""
    if column.dtype == JSON_TYPE:
        return [cell or "null" for cell in raw_json_cells(column)]
    if column.dtype.is_temporal() or column.dtype == pl.Binary:
        is_null = column.alias("").is_null()
        return ["null" if nothing else quote_json(cell) for cell, nothing in zip(as_text(column), is_null, strict=True)]
    return list(map(to_json, _shorten_floats(column).to_list()))


def json_column(cells: list[str | None]) -> pl.Series:
    """Create a column of type JSON_TYPE from raw JSON texts."""
    return pl.DataFrame({"enrich:json": pl.Series(cells, dtype=pl.String)}).to_struct()


def raw_json_cells(column: pl.Series) -> list[str | None]:
    """Return the raw JSON text of each cell in a column of type JSON_TYPE."""
    return column.alias("").struct.field("enrich:json").to_list()


def to_json(value: object) -> str:
    """Convert a value to JSON without spaces. Types unknown to JSON become text, NaN and infinity become null."""
    if isinstance(value, RawJson):
        return value
    if isinstance(value, str):
        return quote_json(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{quote_json(key)}:{to_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(to_json, value)) + "]"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = to_text(value)
    return text if isinstance(value, Decimal) else quote_json(text)


def to_text(value: object) -> str:  # noqa: C901 - a table of types
    """Convert a value to readable text: no trailing `.0`, no exponent, dates in ISO 8601, None as blank."""
    match value:
        case None:
            return ""
        case str():
            return value
        case bool():
            return "TRUE" if value else "FALSE"
        case int():
            return str(value)
        case float():
            return _float_text(value)
        case Decimal():
            return f"{value:f}"
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            minutes, seconds = divmod(round(value.total_seconds()), 60)
            return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value.hex()
        case _:
            return to_json(value)


def _shorten_floats(column: pl.Series) -> pl.Series:
    """Convert Float32 to Float64 through text, so that the numbers keep their few digits."""
    return column.alias("").cast(pl.String).cast(pl.Float64) if column.dtype == pl.Float32 else column


def _float_text(value: float) -> str:
    if math.isnan(value):
        return ""
    if not math.isfinite(value):
        return str(value)
    if value.is_integer() and abs(value) < _MAX_EXACT_INTEGER:
        return str(int(value))
    return f"{Decimal(f'{value:.15g}'):f}"


def _json_to_text(cell: str) -> str:
    """Convert JSON to text. A string becomes its content. Other values stay as written."""
    return str(json.loads(cell)) if cell.startswith('"') else cell


def _text_series(cells: Iterable[str | None]) -> pl.Series:
    return pl.Series("", list(cells), pl.String)

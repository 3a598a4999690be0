"""Converts cells of any type to readable text and to JSON."""

from __future__ import annotations

import json.encoder
import math
from collections.abc import Iterable
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import cast

import msgspec
import polars as pl

#: Column type for raw JSON text from a JSON file with values other than strings. A missing value is null.
JSON_TYPE = pl.Struct({"enrich:json": pl.String})
_DATETIME_FORMAT = "%Y-%m-%dT%H:%M:%S%.f"
#: Dates up to this many days from 1970 (about 260,000 years) can be written as text.
_MAX_DAYS = 95_000_000
_SECONDS_PER_DAY = 86_400
_UNITS_PER_SECOND = {"ms": 10**3, "us": 10**6, "ns": 10**9}

#: The beginning of the text of a list or an object, or a boolean.
_MAYBE_NO_TEXT = r"^(?:\[|\{|true$|false$)"
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
        # A string becomes its content. Other values stay as written.
        text = _text_series(json.loads(cell) if cell and cell[0] == '"' else cell for cell in raw_json_cells(column))
    elif kind.is_temporal():
        text = column.to_frame().select(_temporal_text(pl.nth(0), kind)).to_series()
    elif kind.is_integer() or kind.is_decimal() or kind in (pl.Boolean, pl.Categorical, pl.Enum):
        text = column.cast(pl.String)
    elif kind.is_float():
        # Convert each distinct number once: prices, for example, repeat often.
        numbers = _shorten_floats(column)
        distinct = numbers.unique()
        text = numbers.replace_strict(distinct, _text_series(map(to_text, distinct)))
        text = text.cast(pl.String)  # without rows nothing was replaced
    else:
        text = _text_series(map(to_text, plain_values(column)))
    return (text.fill_null("") if text.null_count() else text).alias(name)


def text_or_null(column: pl.Series) -> pl.Series:
    """Convert every cell of a column to text. A null stays null."""
    cells = column.alias("")
    is_null = (cells.struct.field("enrich:json") if cells.dtype == JSON_TYPE else cells).is_null()
    return as_text(cells).set(is_null, None).alias(column.name)


def has_no_text(column: pl.Series) -> pl.Series | None:
    """Return which cells are lists, objects or booleans. None: the column's type has none of them."""
    kind = column.dtype
    if kind == JSON_TYPE:
        return pl.Series("", [cell is not None and cell[0] in "[{tf" for cell in raw_json_cells(column)], pl.Boolean)
    return column.alias("").is_not_null() if kind.is_nested() or kind == pl.Boolean else None


def json_where_no_text(cells: pl.Series) -> pl.Series:
    """Convert a column of text to raw JSON if one of its cells is a JSON list, object or boolean."""
    if cells.dtype != pl.String:
        return cells
    no_text = [False] * len(cells)
    for index in cells.alias("").str.contains(_MAYBE_NO_TEXT).fill_null(value=False).arg_true():
        with suppress(msgspec.DecodeError, RecursionError):
            no_text[index] = isinstance(msgspec.json.decode(cells[index]), list | dict | bool)
    if not any(no_text):
        return cells
    texts = (
        None if cell is None else cell if raw else quote_json(cell) for cell, raw in zip(cells, no_text, strict=True)
    )
    return json_column(list(texts)).alias(cells.name)


def text_frame(frame: pl.DataFrame) -> pl.DataFrame:
    """Convert every cell of a frame to text. A frame with only text and no nulls is returned unchanged."""
    if all(column.dtype == pl.String and not column.null_count() for column in frame.get_columns()):
        return frame
    return pl.DataFrame({column.name: as_text(column) for column in frame.get_columns()})


def numbered_frame(columns: Iterable[pl.Series]) -> pl.DataFrame:
    """Return columns named by their number: polars would take a name such as `^a.*$` for a pattern."""
    return pl.DataFrame([column.alias(str(number)) for number, column in enumerate(columns)])


def json_cells(column: pl.Series) -> list[str]:
    """Convert every cell of a column to JSON text."""
    if column.dtype == JSON_TYPE:
        return [cell or "null" for cell in raw_json_cells(column)]
    if column.dtype.is_temporal() or column.dtype == pl.Binary:
        is_null = column.alias("").is_null()
        return ["null" if nothing else quote_json(cell) for cell, nothing in zip(as_text(column), is_null, strict=True)]
    return list(map(to_json, plain_values(_shorten_floats(column))))


def plain_values(column: pl.Series) -> list[object]:
    """Return the values of a column. Dates and times inside lists and structs are text: Python's end with year 9999."""
    name_free = column.alias("")
    if column.dtype.is_nested() and _has_temporal(column.dtype):
        name_free = name_free.to_frame().select(_plain(pl.nth(0), column.dtype).alias("")).to_series()
    return name_free.to_list()


def first_without_text(column: pl.Series) -> int | None:
    """Return the index of the first cell with a date or time that cannot be written. None: there is none."""
    if not _has_temporal(column.dtype):
        return None
    has_text = column.alias("").to_frame().select(_has_text(pl.nth(0), column.dtype).alias("")).to_series()
    return (~has_text).arg_max() if not has_text.all() else None


def _has_temporal(kind: pl.DataType) -> bool:
    if isinstance(kind, pl.Struct):
        return any(_has_temporal(cast("pl.DataType", field.dtype)) for field in kind.fields)
    return _has_temporal(_inner(kind)) if isinstance(kind, pl.List | pl.Array) else kind.is_temporal()


def _fields(kind: pl.Struct, value: pl.Expr) -> list[tuple[str, pl.DataType, pl.Expr]]:
    """Return name, type and value of each field of a struct. They are read by number: see `numbered_frame`."""
    numbered = value.struct.rename_fields([str(number) for number in range(len(kind.fields))])
    return [
        (field.name, cast("pl.DataType", field.dtype), numbered.struct.field(str(number)))
        for number, field in enumerate(kind.fields)
    ]


def _inner(kind: pl.List | pl.Array) -> pl.DataType:
    return cast("pl.DataType", kind.inner)


def _temporal_text(value: pl.Expr, kind: pl.DataType) -> pl.Expr:
    if isinstance(kind, pl.Datetime):
        return value.dt.strftime(_DATETIME_FORMAT + ("%:z" if kind.time_zone else ""))
    if kind == pl.Duration:
        return value.dt.to_string("iso")
    return value.dt.to_string("%H:%M:%S%.f") if kind == pl.Time else value.cast(pl.String)


def _plain(value: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """Replace the dates and times in a nested value by their text."""
    if not _has_temporal(kind):
        return value
    if isinstance(kind, pl.Struct):
        fields = [_plain(field, inner).alias(name) for name, inner, field in _fields(kind, value)]
        return pl.when(value.is_not_null()).then(pl.struct(fields))
    if isinstance(kind, pl.Array):
        value = value.arr.to_list()
    return (
        value.list.eval(_plain(pl.element(), _inner(kind)))
        if isinstance(kind, pl.List | pl.Array)
        else _temporal_text(value, kind)
    )


def _has_text(value: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """Return whether all dates and times in a value can be written."""
    if isinstance(kind, pl.Struct):
        fields = [_has_text(field, inner) for _, inner, field in _fields(kind, value)]
        return pl.all_horizontal(fields) if fields else pl.lit(value=True)
    if isinstance(kind, pl.Array):
        value = value.arr.to_list()
    if isinstance(kind, pl.List | pl.Array):
        return value.list.eval(_has_text(pl.element(), _inner(kind))).list.all().fill_null(value=True)
    if isinstance(kind, pl.Datetime):
        limit = _MAX_DAYS * _SECONDS_PER_DAY * _UNITS_PER_SECOND[kind.time_unit]
    elif kind == pl.Date:
        limit = _MAX_DAYS
    elif kind == pl.Time:
        return value.to_physical().is_between(0, _SECONDS_PER_DAY * 10**9, closed="left").fill_null(value=True)
    else:
        return value.is_null() | value.is_not_null()  # true for each row
    return value.to_physical().is_between(-limit, limit).fill_null(value=True)


def json_column(cells: list[str | None]) -> pl.Series:
    """Create a column of type JSON_TYPE from raw JSON texts."""
    return pl.DataFrame({"enrich:json": pl.Series(cells, dtype=pl.String)}).to_struct()


def raw_json_cells(column: pl.Series) -> list[str | None]:
    """Return the raw JSON text of each cell in a column of type JSON_TYPE."""
    return column.alias("").struct.field("enrich:json").to_list()


def to_json(value: object, comma: str = ",", colon: str = ":") -> str:
    """Convert a value to JSON. Types unknown to JSON become text, NaN and infinity become null."""
    if isinstance(value, RawJson):
        return value
    if isinstance(value, str):
        return quote_json(value)
    if isinstance(value, dict):
        pairs = (f"{quote_json(key)}{colon}{to_json(item, comma, colon)}" for key, item in value.items())
        return f"{{{comma.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return "[" + comma.join(to_json(item, comma, colon) for item in value) + "]"
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
            total = round(value.total_seconds())
            minutes, seconds = divmod(abs(total), 60)
            return f"{'-' if total < 0 else ''}{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        case bytes():
            try:
                text = value.decode()
            except UnicodeDecodeError:
                return value.hex()
            return value.hex() if "\0" in text else text
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
    # The shortest text that is read back as the same float. Adding 0.0 makes 0.0 of -0.0.
    return f"{Decimal(repr(value + 0.0)):f}".removesuffix(".0")


def _text_series(cells: Iterable[str | None]) -> pl.Series:
    return pl.Series("", list(cells), pl.String)

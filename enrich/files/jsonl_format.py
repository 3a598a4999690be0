"""Reads and writes JSON Lines: one object per line, whose keys are the columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, NoReturn

import polars as pl

from enrich.files.text import JSON_ARRAY_HINT, ROWS_PER_BATCH, FileProblem, TableFile, open_text, quote_column
from enrich.files.values import JSON_TYPE, RawJson, json_cells, json_column, quote_json, to_json

MAX_LINE_CHARACTERS = 50_000_000
_EXAMPLE = 'Write one object per line: {"Email": "ada@lovelace.example"}'


def read_schema(source: TableFile) -> dict[str, pl.DataType]:
    """Read the whole file and return its keys in order of appearance. A key with only strings and nulls is text."""
    schema: dict[str, pl.DataType] = {}
    for row in _read_rows(source):
        for key, value in row.items():
            if isinstance(value, RawJson):
                schema[key] = JSON_TYPE
            else:
                schema.setdefault(key, pl.String())
    if not schema:
        raise FileProblem(f"{source} is empty", _EXAMPLE)
    return schema


def read_batches(source: TableFile, schema: dict[str, pl.DataType]) -> Iterator[pl.DataFrame]:
    """Yield the rows in order. A missing key becomes null."""
    rows = _read_rows(source)
    while batch := list(islice(rows, ROWS_PER_BATCH)):
        changed = any(row.keys() - schema.keys() for row in batch)
        columns = {}
        for name, kind in schema.items():
            cells = [row.get(name) for row in batch]
            if kind == JSON_TYPE:
                columns[name] = json_column([None if cell is None else to_json(cell) for cell in cells])
            else:
                changed = changed or any(isinstance(cell, RawJson) for cell in cells)
                columns[name] = pl.Series(values=[] if changed else cells, dtype=pl.String)
        if changed:
            raise FileProblem(f"{source} changed while it was read", "start again when the file is complete")
        yield pl.DataFrame(columns)


def write(raw: BinaryIO, columns: list[str], frames: Iterable[pl.DataFrame]) -> None:
    """Write one object per line. Every object has all keys."""
    keys = [f"{quote_json(name)}: " for name in columns]
    for frame in frames:
        for cells in zip(*map(json_cells, frame.get_columns()), strict=True):
            pairs = ", ".join(map(str.__add__, keys, cells))
            raw.write(f"{{{pairs}}}\n".encode())


class _LineProblem(ValueError):
    """A line is invalid. The message is the reason."""


def _read_rows(source: TableFile) -> Iterator[dict[str, str | None]]:
    row = 0
    with open_text(source, newline="\n") as text:
        for line, text_line in enumerate(iter(partial(text.readline, MAX_LINE_CHARACTERS + 1), ""), 1):
            if not text_line.strip():
                continue
            row += 1
            try:
                found = _parse_object(text_line)
            except _LineProblem as flaw:
                hint = _EXAMPLE
                if row == 1 and text_line.lstrip().startswith("["):
                    hint = JSON_ARRAY_HINT
                raise FileProblem(f"{source}: row {row} (line {line}) {flaw}", hint) from None
            yield found


def _parse_object(line: str) -> dict[str, str | None]:
    """Parse a line. Values other than strings stay as written. Raises _LineProblem, which quotes no value."""
    if len(line) > MAX_LINE_CHARACTERS:
        raise _LineProblem(f"has more than {MAX_LINE_CHARACTERS:,} characters")
    try:
        found = _DECODER.decode(line)
        if not isinstance(found, dict):
            raise _LineProblem("is not a JSON object")
        cells = {
            key: value if value is None or isinstance(value, str) else RawJson(to_json(value))
            for key, value in found.items()
        }
    except json.JSONDecodeError as error:
        raise _LineProblem(f"is not JSON: {error.msg} (character {error.pos + 1})") from None
    except RecursionError:
        raise _LineProblem("is nested too deeply") from None
    if "\\u" in line:  # NUL and lone surrogates only occur as escapes in JSON
        text = "".join([*cells, *filter(None, cells.values())])
        if "\0" in text:
            raise _LineProblem("has a NUL character")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _LineProblem("has half a character: one of two \\ud… that belong together")
    return cells


def _refuse_constant(name: str) -> NoReturn:
    raise _LineProblem(f"is not JSON: {name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _LineProblem(f"has a key twice: {quote_column(next(key for key in keys if keys.count(key) > 1))}")
    return found


_DECODER = json.JSONDecoder(
    parse_int=RawJson, parse_float=RawJson, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
)

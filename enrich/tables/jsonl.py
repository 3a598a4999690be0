"""Turns JSON Lines into rows and rows into JSON Lines: one object a line, its keys are the columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, NoReturn

import polars as pl

from enrich.tables.cells import JSON, Raw, as_json, compact, json_column, quoted
from enrich.tables.textfile import TableFile, TableProblem, named, opened

LINE_LIMIT = 50_000_000  # characters
_EXAMPLE = 'Write one object a line: {"Email": "ada@lovelace.example"}'


def read_schema(source: TableFile) -> dict[str, pl.DataType]:
    """Read the file to its end for its keys, in order of appearance; those that hold strings only are text."""
    schema: dict[str, pl.DataType] = {}
    for row in _rows(source):
        for key, value in row.items():
            if isinstance(value, Raw):
                schema[key] = JSON
            else:
                schema.setdefault(key, pl.String())
    if not schema:
        raise TableProblem(f"{source} is empty", _EXAMPLE)
    return schema


def read_batches(
    source: TableFile, schema: dict[str, pl.DataType], rows_per_batch: int = 20_000
) -> Iterator[pl.DataFrame]:
    """Yield the rows in order; what is not there or null is null."""
    rows = _rows(source)
    while batch := list(islice(rows, rows_per_batch)):
        changed = any(row.keys() - schema.keys() for row in batch)
        columns = {}
        for name, kind in schema.items():
            cells = [row.get(name) for row in batch]
            if kind == JSON:
                columns[name] = json_column([None if cell is None else compact(cell) for cell in cells])
            else:
                changed = changed or any(isinstance(cell, Raw) for cell in cells)
                columns[name] = pl.Series(values=[] if changed else cells, dtype=pl.String)
        if changed:
            raise TableProblem(f"{source} changed while it was read", "Start again when the file is complete")
        yield pl.DataFrame(columns)


def write(raw: BinaryIO, columns: list[str], frames: Iterable[pl.DataFrame]) -> None:
    """Write one object a line; every object has all keys."""
    keys = [f"{quoted(name)}: " for name in columns]
    for frame in frames:
        for cells in zip(*map(as_json, frame.get_columns()), strict=True):
            pairs = ", ".join(map(str.__add__, keys, cells))
            raw.write(f"{{{pairs}}}\n".encode())


class _Flaw(ValueError):
    """What is wrong with a line."""


def _rows(source: TableFile) -> Iterator[dict[str, str | None]]:
    row = 0
    with opened(source, newline="\n") as text:
        for line, words in enumerate(iter(partial(text.readline, LINE_LIMIT + 1), ""), 1):
            if not words.strip():
                continue
            row += 1
            try:
                found = _object(words)
            except _Flaw as flaw:
                hint = _EXAMPLE
                if row == 1 and words.lstrip().startswith("["):
                    hint = "It looks like one JSON array; `jq -c '.[]'` makes lines of it"
                raise TableProblem(f"{source}: row {row} (line {line}) {flaw}", hint) from None
            yield found


def _object(line: str) -> dict[str, str | None]:
    """Parse a line; what is not a string stays as it is written. Raises _Flaw, which quotes no value."""
    if len(line) > LINE_LIMIT:
        raise _Flaw(f"has more than {LINE_LIMIT:,} characters")
    try:
        found = _DECODER.decode(line)
        if not isinstance(found, dict):
            raise _Flaw("is no JSON object")
        cells = {key: _cell(value) for key, value in found.items()}
    except json.JSONDecodeError as error:
        raise _Flaw(f"is not JSON: {error.msg} (character {error.pos + 1})") from None
    except RecursionError:
        raise _Flaw("is nested too deeply") from None
    if "\\u" in line:  # the only way for these two into JSON
        text = "".join([*cells, *filter(None, cells.values())])
        if "\0" in text:
            raise _Flaw("has a NUL character")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _Flaw("has half a character: one of two \\ud… that belong together")
    return cells


def _cell(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else Raw(compact(value))


def _no_number(name: str) -> NoReturn:
    raise _Flaw(f"is not JSON: {name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Flaw(f"has a key twice: {named(next(key for key in keys if keys.count(key) > 1))}")
    return found


_DECODER = json.JSONDecoder(parse_int=Raw, parse_float=Raw, parse_constant=_no_number, object_pairs_hook=_unique)

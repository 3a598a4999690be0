"""Reads the cells of the job's columns from an answer. Numbers stay as they are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import orjson
import polars as pl

from enrich.databar.task_results import BESIDE, column_values, is_blank
from enrich.files.values import RawJson, to_json
from enrich.job.cell_text import blank_cells

_NUMBERS_AS_WRITTEN = json.JSONDecoder(parse_int=RawJson, parse_float=RawJson, parse_constant=lambda _: None)
#: The result of the usual answer is an object without others in it, in a wrapper, after fields that are no objects. The
#: wrapper is in a list unless it is the row of a bulk task.
_WRAPPER, _END = '{"result":', "}"
_USUAL_PARTS = (
    r'^\{(?:"[^"\\]*":(?:"[^"\\]*"|[^"\\{}\[\],]*),)*"data":\[?$',
    r"^\{[^{}\[\]\\]*$",
    r'^,"(?:steps|enrichment_data|result_field)":(?s:.*)\}$',
)


def answer_columns(answers: Iterable[str | None], paths: Sequence[str]) -> list[pl.Series]:
    """Read values of many answers (JSON) as columns of cells. None: there is no answer."""
    texts = list(answers)
    results = _usual_results(texts, paths)
    columns: list[list[Any]] = [[result and result.get(path) for result in results] for path in paths]
    # Other answers, other values than text, and what may be nested are read one by one.
    unusual = {index for index, result in enumerate(results) if result is None}
    for path, cells in zip(paths, columns, strict=True):
        usual = {str} if "." in path else {str, type(None)}
        if not usual.issuperset(map(type, cells)):
            unusual |= {index for index, cell in enumerate(cells) if type(cell) not in usual}
    for index in unusual:
        if (text := texts[index]) is not None:
            for cells, cell in zip(columns, answer_cells(text, paths), strict=True):
                cells[index] = cell
    series = [pl.Series("", cells, pl.String) for cells in columns]
    return [cells.set(blank_cells(cells).fill_null(value=False), None) for cells in series]


def _usual_results(texts: Sequence[str | None], paths: Sequence[str]) -> list[dict[str, Any] | None]:
    """Return the result of each usual answer. To find it in the text is faster than to parse all as JSON."""
    other: list[dict[str, Any] | None] = [None] * len(texts)
    if any(path.startswith(BESIDE) or path[:1].isdecimal() for path in paths):
        return other
    before, rest = pl.Series("", texts, pl.String).str.splitn(_WRAPPER, 2).struct.unnest()
    result, after = rest.str.splitn(_END, 2).struct.unnest()
    found = result + _END
    for part, pattern in zip((before, result, after), _USUAL_PARTS, strict=True):
        found = found.set(~part.str.contains(pattern), None)
    try:
        results: list[dict[str, Any] | None] = orjson.loads(f"[{found.fill_null('null').str.join(',').item()}]")
    except orjson.JSONDecodeError:  # in one of them
        return other
    return results if len(results) == len(texts) else other


def answer_cells(answer: str, paths: Sequence[str]) -> list[str | None]:
    """Read values of an answer (JSON) as cells. Raises JSONDecodeError if it is not a JSON object."""
    try:
        task = orjson.loads(answer)
    except orjson.JSONDecodeError:
        try:
            task = _NUMBERS_AS_WRITTEN.decode(answer)
        except RecursionError:
            task = None
    if not isinstance(task, dict):
        raise json.JSONDecodeError("not an object", "", 0)
    values = column_values(task.get("data"), paths)
    if not all(value is None or isinstance(value, str) for value in values):
        # The slower parser keeps numbers as they are written. NaN and Infinity, which JSON does not have, are no value.
        values = column_values(_NUMBERS_AS_WRITTEN.decode(answer).get("data"), paths)
    return list(map(to_cell, values))


def to_cell(value: object) -> str | None:
    """Write a value of the result as a cell: text unchanged, anything else as JSON, a blank as null."""
    if is_blank(value):
        return None
    return str(value) if isinstance(value, str) else to_json(value, ", ", ": ")

"""Reads the cells of the job's columns from an answer. Numbers stay as they are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import orjson
import polars as pl

from enrich.databar.task_results import BESIDE, column_values, is_blank
from enrich.files.values import RawJson, to_json
from enrich.job.cell_text import blank_cells

#: The types of the values in most answers.
_TEXT_OR_NULL = frozenset((str, type(None)))
_NUMBERS_AS_WRITTEN = json.JSONDecoder(parse_int=RawJson, parse_float=RawJson, parse_constant=lambda _: None)


def answer_columns(answers: Iterable[str | None], paths: Sequence[str]) -> list[pl.Series]:
    """Read values of many answers (JSON) as columns of cells. None: there is no answer."""
    nothing = (None,) * len(paths)
    may_be_usual = not any(path.startswith(BESIDE) for path in paths)
    has_dots = any("." in path for path in paths)
    rows: list[Sequence[str | None]] = []
    for answer in answers:
        if answer is None:
            rows.append(nothing)
            continue
        # The usual answer is one wrapper whose fields are text or null, in a list unless it is the row of a bulk task.
        # Others are read by `answer_cells`.
        try:
            item = orjson.loads(answer)["data"]
            if isinstance(item, list):
                (item,) = item
            values = tuple(map(item["result"].get, paths))
            is_usual = may_be_usual and "steps" in item and _TEXT_OR_NULL.issuperset(map(type, values))
        except (ValueError, LookupError, TypeError, AttributeError):
            is_usual = False
        rows.append(values if is_usual and not (has_dots and None in values) else answer_cells(answer, paths))
    columns = [pl.Series("", cells, pl.String) for cells in (zip(*rows, strict=True) if rows else nothing)]
    return [cells.set(blank_cells(cells).fill_null(value=False), None) for cells in columns]


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

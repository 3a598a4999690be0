"""Reads columns of a CSV file that another program, such as a spreadsheet, may have saved again."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import product
from typing import Literal

from enrich.files.csv_format import SEPARATORS, raised_cell_limit, read_header
from enrich.files.text import BYTE_ORDER_MARK, TableFile, as_file_problem, byte_order_encoding, open_binary

_ROWS_PER_BATCH = 10_000
_QUOTINGS: tuple[Literal[0, 3], ...] = (csv.QUOTE_MINIMAL, csv.QUOTE_NONE)


def read_cells(source: TableFile, name: re.Pattern[str]) -> Iterator[list[str]]:
    """Yield the cells of the columns with such a name, in batches; nothing if there is no such column.

    The separator and the encoding may differ from those of `source`: characters other than ASCII may be wrong. There
    may be lines above the header, rows that are too short or too long, and a quote that is never closed. Raises
    FileProblem.
    """
    with as_file_problem(source):
        with open_binary(source) as raw:
            marked = byte_order_encoding(raw.read(4))
        for encoding in (marked,) if marked else dict.fromkeys((source.encoding, "utf-8")):
            separators = dict.fromkeys((source.separator, *SEPARATORS))
            # A quote that is never closed would make one cell of the rest.
            for separator, quoting in product(separators, _QUOTINGS):
                with open_binary(source) as raw, io.TextIOWrapper(raw, encoding, "replace", newline="") as text:
                    batches = _read_cells(csv.reader(text, delimiter=separator, quoting=quoting), name)
                    if (first := next(batches, None)) is not None:
                        yield first
                        yield from batches
                        return
    read_header(source)  # raises FileProblem if this is no CSV file


def _read_cells(reader: Iterator[list[str]], name: re.Pattern[str]) -> Iterator[list[str]]:
    """Yield the cells below the header, which is one of the first rows."""
    rows = iter(_next_rows(reader))
    columns = next(filter(None, (_find_columns(row, name) for row in rows)), [])
    while columns:
        if cells := [row[column] for row in rows for column in columns if column < len(row) and row[column]]:
            yield cells
        if not (more := _next_rows(reader)):
            return
        rows = iter(more)


def _next_rows(reader: Iterator[list[str]]) -> list[list[str]]:
    """Return the next rows that can be read."""
    rows: list[list[str]] = []
    with raised_cell_limit():
        while len(rows) < _ROWS_PER_BATCH:
            try:
                rows.append(next(reader))
            except csv.Error:
                continue
            except (StopIteration, UnicodeError):  # no byte order mark, which the encoding needs
                break
    return rows


def _find_columns(header: list[str], name: re.Pattern[str]) -> list[int]:
    return [column for column, text in enumerate(header) if name.fullmatch(text.strip(f"{BYTE_ORDER_MARK} "))]

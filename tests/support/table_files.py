"""Writes and reads tables in every file format, where possible with libraries that the program does not use."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openpyxl
import polars as pl
import xlsxwriter
from openpyxl.utils.escape import unescape

from enrich.files.input_files import LocalCopies
from enrich.files.reader import InputPart, count_file_rows
from enrich.rows.job_input import JobInput

INPUTS = ("csv", "csv.gz", "tsv", "jsonl", "jsonl.gz", "parquet", "xlsx")
OUTPUTS = ("csv", "csv.gz", "tsv", "jsonl", "parquet", "xlsx")

Rows = Sequence[Sequence[str]]


def write_table(path: Path, header: Sequence[str], rows: Rows) -> Path:
    """Write a table of text in the format of the path's suffix."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pl.DataFrame([list(row) for row in rows], dict.fromkeys(header, pl.String), orient="row").write_parquet(path)
        return path
    if kind == "xlsx":
        with xlsxwriter.Workbook(path) as book:
            sheet = book.add_worksheet()
            for number, cells in enumerate([header, *rows]):
                for column, value in enumerate(cells):
                    sheet.write_string(number, column, value)
        return path
    text = io.StringIO(newline="")
    if kind == "jsonl":
        text.writelines(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows)
    else:
        csv.writer(text, delimiter="\t" if kind == "tsv" else ",").writerows([header, *rows])
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_table(path: Path) -> list[list[Any]]:
    """Read a file: the header, then the rows; a blank cell is ''."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        frame = pl.read_parquet(path)
        return [frame.columns, *([_blank(cell) for cell in row] for row in frame.rows())]
    if kind == "xlsx":
        sheet = openpyxl.load_workbook(path).active
        assert sheet is not None
        return [[unescape(_blank(cell)) for cell in row] for row in sheet.iter_rows(values_only=True)]
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    if kind == "jsonl":
        objects = [json.loads(line) for line in text.split("\n")[:-1]]
        header = list(objects[0]) if objects else []
        return [header, *([_blank(found[name]) for name in header] for found in objects)]
    return list(csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind == "tsv" else ",", strict=True))


def _blank(cell: Any) -> Any:
    return "" if cell is None else cell


def input_parts(rows: JobInput) -> list[InputPart]:
    """Divide the rows of an input into parts."""
    table = rows.full_table
    return table.parts(lambda files: [count_file_rows(file, table.input_schema, LocalCopies()) for file in files])

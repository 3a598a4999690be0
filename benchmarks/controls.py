"""What the commands are compared with, each run as a process that imports nothing else.

`python -m benchmarks.controls copy_with_csv leads.csv copy.csv`
"""

from __future__ import annotations

import csv
import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path


def copy_with_csv(source: Path, target: Path) -> None:
    """Read and write the file with Python's `csv`, cell by cell."""
    with source.open(newline="", encoding="utf-8") as file, target.open("w", newline="", encoding="utf-8") as into:
        csv.writer(into).writerows(csv.reader(file))


def copy_with_polars(source: Path, target: Path) -> None:
    """Read and write the file with polars, streaming."""
    import polars as pl  # noqa: PLC0415 - runs in a separate process

    pl.scan_csv(source, infer_schema=False).sink_csv(target)


def read_answers(ledger: Path) -> None:
    """Read all answers of a ledger once, and parse each as JSON."""
    with closing(sqlite3.connect(ledger)) as file:
        file.execute("SELECT sum(length(answer)) FROM attempts").fetchall()
        for (answer,) in file.execute("SELECT answer FROM attempts"):
            json.loads(answer)


if __name__ == "__main__":
    controls: dict[str, Callable[..., None]] = {
        "copy_with_csv": copy_with_csv,
        "copy_with_polars": copy_with_polars,
        "read_answers": read_answers,
    }
    controls[sys.argv[1]](*map(Path, sys.argv[2:]))

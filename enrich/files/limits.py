"""The limits of the files that a run writes. Input beyond them is refused when it is read, answers are shortened."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import polars as pl
from msgspec import Struct

from enrich.files import csv_format, excel_format
from enrich.files.text import FileProblem, quote_column
from enrich.job.locations import format_of
from enrich.job.spec import Output

_OTHER_FORMAT_HINT = "use an output that ends in .csv or .parquet"
_ENCODING_HINT = "set `encoding: utf-8` for the file to write"


class FileLimits(Struct, frozen=True):
    """The limits of one file. None: no limit. `name` is the file's key and path, for messages.

    `max_rows` does not count the header. `cell_length` counts a cell as the format does.
    """

    name: str
    encoding: str | None = None
    max_rows: int | None = None
    max_columns: int | None = None
    max_cell: int | None = None
    cell_length: Callable[[str], int] = len
    #: Whether a spreadsheet would run text in this file as a formula.
    runs_formulas: bool = False

    def check_columns(self, columns: Sequence[str], source: object) -> None:
        """Raise FileProblem, about the input `source`, if the file cannot have these columns."""
        if self.max_columns is not None and len(columns) > self.max_columns:
            message = f"{source}: {self.name} would have {len(columns):,} columns; a sheet has at most"
            raise FileProblem(f"{message} {self.max_columns:,}", _OTHER_FORMAT_HINT)
        for name in columns:
            if problem := self._cell_problem(name):
                self._refuse(f"{source}: the header", name, problem)

    def check_rows(self, frame: pl.DataFrame, first_position: int, source: object) -> None:
        """Raise FileProblem, about the input `source`, for the first cell of a frame of text that cannot be written."""
        if self.max_rows is not None and first_position + frame.height > self.max_rows:
            message = f"{source}: row {self.max_rows + 1:,}: {self.name} is a sheet, which has at most"
            raise FileProblem(f"{message} {self.max_rows:,} rows under its header", _OTHER_FORMAT_HINT)
        suspected = frame[:, self._columns_to_check(frame)]
        for row, cells in enumerate(suspected.iter_rows(), first_position + 1):
            for name, cell in zip(suspected.columns, cells, strict=True):
                if problem := self._cell_problem(cell):
                    self._refuse(f"{source}: row {row}", name, problem)

    def fit(self, cells: pl.Series) -> tuple[pl.Series, dict[int, str]]:
        """Cut text that is too long, and write `?` for what the encoding lacks. Also returns why, by changed cell."""
        if not self._columns_to_check(cells.to_frame()):
            return cells, {}
        texts, reasons = cells.to_list(), {}
        for index, text in enumerate(texts):
            if text is not None and self._cell_problem(text):
                texts[index], reasons[index] = self._fit_text(text)
        return pl.Series(cells.name, texts, pl.String), reasons

    def fit_answers(self, cells: Mapping[str, pl.Series]) -> dict[str, pl.Series]:
        """Make the new cells of some rows fit into the file, and add the reasons to the column `enrich_error`."""
        fitted, notes = dict(cells), dict[int, list[str]]()
        for name in self._columns_to_check(pl.DataFrame(cells)):
            fitted[name], reasons = self.fit(cells[name])
            for index, reason in reasons.items() if name != "enrich_error" else ():
                notes.setdefault(index, []).append(f"{name}: {reason}")
        if notes:
            errors = fitted["enrich_error"].to_list()
            for index, reasons_of_row in notes.items():
                errors[index] = "; ".join([*filter(None, [errors[index]]), *reasons_of_row])
            fitted["enrich_error"], _ = self.fit(pl.Series("enrich_error", errors, pl.String))
        return fitted

    def _columns_to_check(self, frame: pl.DataFrame) -> list[str]:
        """Return the columns of text that may have a cell that does not fit."""
        return [
            longest.name
            for longest in frame.select_seq(pl.col(pl.String).str.len_bytes().max())
            if (self.max_cell is not None and (longest.item() or 0) > self.max_cell)
            or (self.encoding is not None and not self._can_encode("".join(filter(None, frame[longest.name]))))
        ]

    def _can_encode(self, text: str) -> bool:
        """Check whether a text can be written and read back. Some encodings write two characters as the same bytes."""
        if self.encoding is None or (text.isascii() and _has_ascii(self.encoding)):
            return True
        try:
            return text.encode(self.encoding).decode(self.encoding) == text
        except UnicodeError:
            return False

    def _cell_problem(self, text: str) -> tuple[str, str] | None:
        """Return why a text cannot be a cell, and a hint. None: it can."""
        if self.max_cell is not None and len(text) * 2 > self.max_cell and self.cell_length(text) > self.max_cell:
            return f"a cell of {self.name} has at most {self.max_cell:,} characters", _OTHER_FORMAT_HINT
        if not self._can_encode(text):
            return (
                f"`{self.encoding}`, the encoding of {self.name}, cannot encode a character of this cell",
                _ENCODING_HINT,
            )
        return None

    def _fit_text(self, text: str) -> tuple[str, str]:
        reasons = []
        if not self._can_encode(text):
            text = "".join(letter if self._can_encode(letter) else "?" for letter in text)
            reasons.append(f"characters that {self.encoding} lacks are `?`")
        if self.max_cell is not None and self.cell_length(text) > self.max_cell:
            excess = self.cell_length(text) - self.max_cell
            text = text[: self.max_cell]
            while self.cell_length(text) > self.max_cell:
                text = text[: -max(1, (self.cell_length(text) - self.max_cell) // 2)]
            reasons.append(f"cut by {excess:,} to {self.max_cell:,} characters")
        return text, ", ".join(reasons)

    def _refuse(self, position: str, column: str, problem: tuple[str, str]) -> None:
        message, hint = problem
        raise FileProblem(f"{position}, column {quote_column(column)}: {message}", hint)


#: For a file that holds everything.
NO_LIMITS = FileLimits("")


def limits_of(kind: str, output: Output) -> FileLimits:
    """Return the limits of a file of the run. `kind` is its key in the job file."""
    name = f"the {kind} ({output.path})"
    match format_of(output.path):
        case "xlsx":
            return FileLimits(
                name,
                max_rows=excel_format.MAX_ROWS - 1,
                max_columns=excel_format.MAX_COLUMNS,
                max_cell=excel_format.MAX_CELL_CHARACTERS,
                cell_length=excel_format.cell_length,
            )
        case "csv":
            # Every Unicode encoding has all characters.
            encoding = None if codecs.lookup(output.encoding).name.startswith("utf") else output.encoding
            return FileLimits(name, encoding, max_cell=csv_format.MAX_CELL_CHARACTERS, runs_formulas=True)
        case _:
            return FileLimits(name)


@cache
def _has_ascii(encoding: str) -> bool:
    """Check whether an encoding has all of ASCII, so that such text needs no test."""
    try:
        return all(sign.encode(encoding).decode(encoding) == sign for sign in map(chr, range(128)))
    except UnicodeError:
        return False

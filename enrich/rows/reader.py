"""The input as batches of rows, each with its request. Sending and joining read it the same way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import polars as pl

from enrich.errors import CommandRefused
from enrich.files.csv_format import likely_separator
from enrich.files.reader import InMemoryRows, InputPart, InputSchema, InputTable, PartReader, RowCounter
from enrich.files.values import text_frame
from enrich.job.bounded_read import read_bounded
from enrich.job.job import Job, suggest_name
from enrich.ledger.forgotten import ForgottenRequests
from enrich.rows.requests import CHANGE_COLUMNS, ENRICH_COLUMNS, RequestBuilder, RowBatch
from enrich.rows.suppression import MAX_LIST_BYTES, read_suppression
from enrich.rows.template import RequestTemplate
from enrich.rows.where import (
    PER_ROW_MESSAGE,
    WHERE_EXAMPLE,
    depends_on_other_rows,
    evaluate_expression,
    expression_problem,
)

#: A number at the start of a cell, in common notations: `1,200`, `-5`, `$ 5.50`, `51-200` (its 51).
_SIGN, _SYMBOL = r"(-?)", r"[\p{Sc}<>~≈=≥≤\s]{0,3}"
_NUMBER = rf"^{_SIGN}{_SYMBOL}(-?)(\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d+(?:\.\d+)?)"


def sort_keys(frame: pl.DataFrame, column_indexes: list[int]) -> pl.DataFrame:
    """Return the sort keys of the rows: for each column its number, then its text.

    A cell that is a number and nothing else has no text: `1,200` and `1200` are equal.
    """
    keys = []
    for number, column_index in enumerate(column_indexes):
        text = pl.nth(column_index).str.strip_chars()
        signs = pl.concat_str(text.str.extract(_NUMBER, 1), text.str.extract(_NUMBER, 2))
        digits = text.str.extract(_NUMBER, 3).str.replace_all(",", "", literal=True).cast(pl.Float64, strict=False)
        value = pl.when(signs == "-").then(-digits).otherwise(digits)
        has_text = (text != "") & ~(text.str.contains(_NUMBER + "$") & value.is_not_null())
        keys += [value.alias(f"{number}n"), pl.when(has_text).then(text).alias(f"{number}t")]
    return frame.select(keys)


def rank_rows(keys: pl.DataFrame) -> pl.Series:
    """Return each row's place in the send order: largest first, blanks last, equal ones in input order."""
    sorted_rows = keys.with_row_index("row").sort(keys.columns, descending=True, nulls_last=True, maintain_order=True)
    return sorted_rows.select("row").with_row_index("place").sort("row").get_column("place")


_MISSING_COLUMN = re.compile(r'unable to find column "(.*)"; valid columns')


class JobInput:
    """The rows of a job's input."""

    def __init__(self, job: Job, forgotten: ForgottenRequests | None = None) -> None:
        """Read the header and check the job against it.

        Raises CommandRefused when the input cannot be read, JobError when the job names a column that it does not have.
        """
        self._job = job
        self._forgotten = forgotten or ForgottenRequests(b"")
        suppress = job.model.suppress
        self._suppression = None if suppress is None else read_suppression(job.resolve_path(suppress))
        self._table: InputTable | PartReader | InMemoryRows = InputTable(job.input_path, job.input)
        #: All columns that a job can name, with their types.
        self.all_columns = self._table.schema
        self._header = list(self.all_columns)
        #: The columns that are written to the output. A blank text cell is `""` or null.
        self.schema = {name: kind for name, kind in self.all_columns.items() if name not in ENRICH_COLUMNS}
        self.columns = list(self.schema)
        self._check_columns()
        self._check_where()

    def why_not_parallel(self) -> str | None:
        """Return why requests depend on all rows, so that parts cannot be enrolled separately; None: they do not.

        `dedupe: false` matters for collecting, too; the order only for sending.
        """
        if not self._job.model.dedupe:
            return "`dedupe: false` counts equal rows from the first to the last"
        if self._job.model.order_by is not None:
            return "`order_by` compares all rows"
        return None

    def parts(self, row_counter: RowCounter | None = None) -> list[InputPart]:
        """Divide the rows. `row_counter` counts files that do not store their row count. Raises CommandRefused."""
        return self._full_table.parts(row_counter)

    def for_part(self, part: InputPart) -> JobInput:
        """Return the rows of one part, with their positions in the whole input. Reads only the part's file."""
        return self._with_table(PartReader(part, self.input_schema))

    def for_frame(self, first_position: int, frame: pl.DataFrame) -> JobInput:
        """Return an input of rows in memory, the first of which has this position in the whole input."""
        return self._with_table(InMemoryRows(first_position, frame))

    @property
    def input_schema(self) -> InputSchema:
        """The schema that the files are read with."""
        return self._full_table.input_schema

    @property
    def _full_table(self) -> InputTable:
        assert isinstance(self._table, InputTable)  # noqa: S101 - calling this on a part is a bug
        return self._table

    @property
    def first_position(self) -> int:
        """The position of the first row in the whole input."""
        return self._table.first_position

    def without_rows(self) -> JobInput:
        """Return this input without rows, to be sent to where blocks are read."""
        return self.for_frame(0, pl.DataFrame(schema=self.all_columns))

    def _with_table(self, table: PartReader | InMemoryRows) -> JobInput:
        job_input = copy(self)
        job_input._table = table  # noqa: SLF001 - of our own copy
        return job_input

    def file_versions(self) -> object:
        """Identity of the input's files: it differs when a file was replaced, changed, added or removed."""
        return self._full_table.file_versions()

    def digest(self) -> str:
        """Hash the bytes of the input's files (SHA-256, hex)."""
        return self._full_table.digest()

    def suppression_digest(self) -> str | None:
        """Hash the bytes of the list of `suppress` (SHA-256, hex); None: there is none."""
        suppress = self._job.model.suppress
        return None if suppress is None else _hash_file(self._job.resolve_path(suppress))

    def check_new_columns(self, template: RequestTemplate) -> None:
        """Raise JobError for new columns that the input already has."""
        for name in template.columns:
            if name in ENRICH_COLUMNS:
                raise self._job.error(["columns", name], "this name is taken by the status columns", "choose another")
            if name in self.columns and self._job.model.merge is None:
                raise self._job.error(
                    ["columns", name],
                    f"the input has a column of this name already ({self._job.input_path})",
                    "choose another name for the new column, or complete the old one: merge: fill_empty",
                )

    def queue_order(self) -> pl.Series | None:
        """Read the input once and return each row's place in the send order; None: the order of the input."""
        if self._job.model.order_by is None:
            return None
        column_indexes = list(map(self._header.index, self._job.model.order_by))
        keys = [sort_keys(text_frame(frame), column_indexes) for frame in self._table.batches()]
        return rank_rows(pl.concat(keys)) if keys else None

    def batches(self, template: RequestTemplate, queue_order: pl.Series | None = None) -> Iterator[RowBatch]:
        """Read the whole input once. Raises CommandRefused with file, row and remedy."""
        builder = RequestBuilder(self._job, template, self._header, self._forgotten)
        kept_columns = [place for place, name in enumerate(self._header) if name in self.schema]
        first_position = self._table.first_position
        for frame in self._table.batches():
            text = text_frame(frame)
            batch_order = None
            if queue_order is not None:
                known_order = queue_order.slice(first_position, frame.height).to_list()
                # The file may have grown since its order was read.
                batch_order = [*known_order, *range(first_position + len(known_order), first_position + frame.height)]
            batch = builder.build_batch(
                first_position, text, self._selected_rows(text), self._suppressed_rows(text), batch_order
            )
            yield batch if text is frame else replace(batch, frame=frame.select(pl.nth(kept_columns)))
            first_position += frame.height

    @property
    def change_key(self) -> list[str]:
        """The columns that identify a lead in the change feed. Default: the columns that the params read."""
        model = self._job.model
        if model.changes is not None and model.changes.key is not None:
            return model.changes.key
        return list(dict.fromkeys(column for param in model.params.values() for column in param.columns))

    def _check_columns(self) -> None:
        model = self._job.model
        for name, param in model.params.items():
            for column in param.columns:
                self._check_column(column, ["params", name])
        for index, column in enumerate(model.only_if_empty):
            self._check_column(column, ["only_if_empty", index])
        for index, column in enumerate(model.order_by or ()):
            self._check_column(column, ["order_by", index])
        for index, column in enumerate(self.change_key if model.changes is not None else ()):
            self._check_column(column, ["changes", "key", index])
            if column in CHANGE_COLUMNS:
                hint = "choose other columns as its `key`, or rename it"
                raise self._job.error(["changes"], f"the feed has a column `{column}` of its own", hint)
        for index, column in enumerate(model.report.by if model.report is not None else ()):
            self._check_column(column, ["report", "by", index])
            if column in ENRICH_COLUMNS:
                message = f"`{column}` is a column of the output, and every run writes it anew"
                raise self._job.error(["report", "by", index], message, "group by a column of your own")
        if model.caps is not None and model.caps.by not in model.params:
            self._check_column(model.caps.by, ["caps", "by"], other_names=model.params)

    def _check_column(self, column: str, key_path: list[str | int], other_names: Iterable[str] = ()) -> None:
        if column in self._header:
            return
        hint = suggest_name(column, [*self._header, *other_names])
        settings = self._job.input
        if settings.format == "csv" and (other := likely_separator(self._header, settings.separator)):
            shown = {"\t": '"\\t"'}.get(other, f'"{other}"')
            hint = f"its header looks separated by {shown}: input: {{path: …, separator: {shown}}}"
        raise self._job.error(key_path, f"the input has no column `{column}` ({self._job.input_path})", hint)

    def _check_where(self) -> None:
        """Try `where` on no rows. It must look at one row at a time, because rows come in batches."""
        expression = self._job.model.where
        if expression is None:
            return
        if (problem := expression_problem(expression)) is not None:
            raise self._job.error(["where"], problem, WHERE_EXAMPLE)
        try:
            result = evaluate_expression(expression, pl.DataFrame(schema=dict.fromkeys(self._header, pl.String)))
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            if missing := _MISSING_COLUMN.match(reason):
                self._check_column(missing[1], ["where"])
            raise self._job.error(["where"], f"not a polars SQL expression over the columns: {reason}") from error
        if result.schema != {"wanted": pl.Boolean} or result.height or depends_on_other_rows(expression, self._header):
            raise self._job.error(["where"], PER_ROW_MESSAGE, WHERE_EXAMPLE)

    def _suppressed_rows(self, frame: pl.DataFrame) -> pl.Series | None:
        if self._suppression is None:
            return None
        params = self._job.model.params.values()
        if any(param.value is not None and self._suppression.contains(param.value) for param in params):
            return pl.repeat(value=True, n=frame.height, eager=True)
        return self._suppression.suppressed_rows(
            frame, {self._header.index(name) for param in params for name in param.columns}
        )

    def _selected_rows(self, frame: pl.DataFrame) -> pl.Series:
        """Return which rows `where` and `only_if_empty` keep."""
        column_indexes = map(self._header.index, self._job.model.only_if_empty)
        blank = [pl.nth(place).str.strip_chars() == "" for place in column_indexes]
        selected = frame.select(
            pl.all_horizontal(pl.repeat(value=True, n=pl.len()), *blank).alias("wanted")
        ).to_series()
        if self._job.model.where is None:
            return selected
        try:
            return selected & evaluate_expression(self._job.model.where, frame).to_series().fill_null(value=False)
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0].split(" for ")[0]
            hint = "cells are text and may be blank: TRY_CAST(… AS INT) gives null where CAST fails"
            raise self._job.error(["where"], f"cannot be computed: {reason}", hint) from error


def _hash_file(path: Path) -> str:
    try:
        return sha256(read_bounded(path, MAX_LIST_BYTES)).hexdigest()
    except OSError as error:
        raise CommandRefused(f"{path} cannot be read: {error.strerror}") from error

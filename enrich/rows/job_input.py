"""The input as batches of rows, each with its request. Sending and joining read it the same way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path

import polars as pl

from enrich.errors import CommandRefused, EnrichError, closest_name
from enrich.files.csv_format import likely_separator
from enrich.files.reader import InMemoryRows, InputTable
from enrich.files.text import (
    LATER_HEADER_HINT,
    NO_HEADER,
    NO_HEADER_HINT,
    ROWS_PER_BATCH,
    is_headerless,
    missing_column_hint,
)
from enrich.files.values import text_frame
from enrich.files.writer import FileLimits, is_formula, limits_of
from enrich.job.cell_text import blank_cells
from enrich.job.document import yaml_mapping, yaml_scalar
from enrich.job.job import Job
from enrich.job.local_files import is_missing, missing_file_hint
from enrich.job.locations import format_of, has_wildcards
from enrich.job.spec import step_column, steps_in_header
from enrich.ledger.database import Database
from enrich.ledger.erasure import ForgottenRequests
from enrich.models import RowStatus
from enrich.rows.batches import CHANGE_COLUMNS, InputRows, KnownBatches, RowBatch, own_columns, status_columns
from enrich.rows.requests import RequestBuilder
from enrich.rows.row_selection import (
    PER_ROW_MESSAGE,
    QUOTES_HINT,
    WHERE_EXAMPLE,
    depends_on_other_rows,
    evaluate_expression,
    explain_error,
    expression_problem,
    order_of_rows,
    rank_rows,
    read_suppression,
    sort_keys,
    unknown_columns,
)
from enrich.rows.template import RequestTemplate

#: A title above the header has at most this many lines.
_MAX_TITLE_ROWS = 50
#: If the input lacks all columns of the params, and they are at least this many, that is one error.
_MANY_COLUMNS = 2
#: The cells of `enrich_status` in a file that we wrote.
_OWN_STATUSES = [*(status.value for status in RowStatus), ""]


class JobInput:
    """The rows of a job's input."""

    def __init__(self, job: Job, forgotten: ForgottenRequests | None = None) -> None:
        """Read the header and check the job against it. Raises CommandRefused (unreadable), JobError (no column)."""
        #: The job, or that of a step.
        self.job = job
        self._forgotten = forgotten or ForgottenRequests(b"")
        suppress = job.model.suppress
        #: The list of `suppress`; None: there is none.
        self.suppression = None if suppress is None else read_suppression(job.resolve_path(suppress))
        try:
            self._table: InputTable | InMemoryRows = InputTable(job.input_path, job.input)
        except CommandRefused as error:
            raise _input_path_error(job) or error from error
        #: All columns that a job can name, with their types.
        self.all_columns = self._table.schema
        #: The names of the columns that params and conditions can read.
        self.header = list(self.all_columns)
        self._former_steps = _former_steps(job, self.header)
        self._own_columns = own_columns(job, self._former_steps)
        #: The columns of steps that this step, or the job itself, cannot read, each with the step that gives it.
        self._later_columns: Mapping[str, str] = {
            column: step.step
            for step in reversed(job.step_jobs)
            for column in (*(step.model.columns or ()), step_column(step.step, "status"))
        }
        self._params = [param for step in job.steps for param in step.model.params.values()]
        sent_columns = dict.fromkeys(name for param in self._params for name in param.columns)
        self.sent_columns = set(sent_columns)
        #: The columns of the params that no step gives: the input must have them.
        self._required = [name for name in sent_columns if name not in self._later_columns]
        #: The columns that are written to the output. A blank text cell is `""` or null.
        self.schema = {name: kind for name, kind in self.all_columns.items() if name not in self._own_columns}
        self.columns = list(self.schema)
        #: The files that the batches are written to, with their columns, once `check_new_columns` was called.
        self._limits: list[tuple[FileLimits, list[str]]] = []
        # Columns of our names in an input that we did not write would be replaced.
        taken = [name for name in self.header if name in self._own_columns]
        if taken and "enrich_status" not in self.header:
            raise self._foreign_column(taken[0])
        for problem in self.column_problems():
            raise problem

    def notes(self) -> list[str]:
        """Return the notes about the input for the user."""
        return [
            f"the input has columns of a step `{step}`, which the job does not have: the output leaves them out "
            f"({step_column(step, 'status')} and others; rename them to keep them)"
            for step in self._former_steps
        ]

    @property
    def identifying_columns(self) -> list[str]:
        """The columns of the input that are sent, by name: their order in the input and in the job may change."""
        return sorted(self.sent_columns.intersection(self.schema))

    @property
    def can_be_enrolled_in_parts(self) -> bool:
        """Whether no request depends on other rows. `dedupe: false` counts equal rows, `order_by` compares all rows."""
        return self.job.model.dedupe and self.job.model.order_by is None

    def for_frame(self, first_position: int, frame: pl.DataFrame) -> JobInput:
        """Return an input of rows in memory, the first of which has this position in the whole input."""
        job_input = copy(self)
        job_input._table = InMemoryRows(first_position, frame)  # noqa: SLF001 - of our own copy
        return job_input

    @property
    def full_table(self) -> InputTable:
        """The table that the files of the input make up."""
        assert isinstance(self._table, InputTable)  # noqa: S101 - calling this on a part is a bug
        return self._table

    @property
    def first_position(self) -> int:
        """The position of the first row in the whole input."""
        return self._table.first_position

    def without_rows(self) -> JobInput:
        """Return this input without rows, to be sent to the processes that read its blocks."""
        return self.for_frame(0, pl.DataFrame(schema=self.all_columns))

    def check_new_columns(self, template: RequestTemplate) -> None:
        """Check the columns of the files that a run writes. From then on `batches` checks the cells, too.

        Raises JobError for new columns that the input already has, CommandRefused for columns that cannot be written.
        """
        for name in template.columns:
            self._check_new_column(name, template)
        model = self.job.model
        new = [name for name in template.columns if name not in self.columns]
        feed_columns = dict.fromkeys([*self.change_key, *(name for name in template.columns if name in self.columns)])
        files = [
            ("output", self.job.output, self.columns, [*new, *status_columns(self.job)]),
            ("rejects", model.rejects, self.columns, []),
            ("changes", model.changes, list(feed_columns), new),  # the feed has these names as cells
        ]
        written = [(limits_of(kind, file), columns, names) for kind, file, columns, names in files if file is not None]
        self._limits = [(limits, columns) for limits, columns, _ in written]
        for limits, columns, names in written:
            limits.check_columns([*columns, *names], self.job.input_path)

    def _check_new_column(self, name: str, template: RequestTemplate) -> None:
        job = next((step for step in self.job.steps if name in (step.model.columns or {})), self.job)
        if name in self._own_columns:
            raise job.error(["columns", name], "this name belongs to the status columns", "choose another")
        if format_of(self.job.output.path) == "csv" and is_formula(name):
            message = "a spreadsheet would run this name as a formula"
            raise job.error(["columns", name], message, "choose a name that begins with a letter")
        if name not in self.columns or self.job.model.merge is not None:
            return
        hint = "choose another name for the new column"
        if not (self.job.model.columns or self.job.step_jobs):  # the names are those of the API
            paths = template.columns.items()
            renamed = {f"new_{each}" if each in self.columns else each: path for each, path in paths}
            hint = f"name the new columns: `columns: {yaml_mapping(renamed)}`"
        message = f"the input already has a column with this name ({self.job.input_path})"
        raise job.error(["columns", name], message, f"{hint}, or fill the existing one: merge: fill_empty")

    def queue_order(self, check_stopped: Callable[[], None] = lambda: None) -> pl.Series | None:
        """Read the input once and return each row's place in the send order; None: the order of the input.

        `check_stopped` is called before each batch. It may raise to stop.
        """
        if self.job.model.order_by is None:
            return None
        column_indexes = list(map(self.header.index, self.job.model.order_by))
        keys = []
        for frame in self._table.batches():
            check_stopped()
            keys.append(sort_keys(text_frame(frame), column_indexes))
        return rank_rows(pl.concat(keys)) if keys else None

    def batches(
        self, template: RequestTemplate, queue_order: pl.Series | None = None, ledger: Database | None = None
    ) -> Iterator[RowBatch]:
        """Read the whole input once. With a ledger, known batches have only ids. Raises CommandRefused with the row."""
        builder = self.request_builder(template)
        known = None if ledger is None else KnownBatches.of(ledger, self.job, template, self._forgotten)
        for first_position, frame, text in self.frames():
            batch_order = None if queue_order is None else order_of_rows(queue_order, first_position, frame.height)
            selected, suppressed = self.selected_rows(text), self.suppressed_rows(text)
            rows = InputRows(first_position, frame, text, selected, suppressed, batch_order)
            yield builder.build_batch(rows) if known is None else known.recall(builder.build_batch, rows)

    def frames(self, max_rows: int = ROWS_PER_BATCH) -> Iterator[tuple[int, pl.DataFrame, pl.DataFrame]]:
        """Read the whole input once. Yield the position of the first row of each batch, its rows, and these as text."""
        first_position = self._table.first_position
        for frame in (part for batch in self._table.batches() for part in batch.iter_slices(max_rows)):
            text = text_frame(frame)
            self._check_statuses(text)
            for limits, columns in self._limits:
                limits.check_rows(text[:, columns], first_position, self.job.input_path)
            yield first_position, frame, text
            first_position += frame.height

    def request_builder(self, template: RequestTemplate) -> RequestBuilder:
        """Return what turns the rows into requests."""
        return RequestBuilder(self.job, template, self.header, self._forgotten)

    def for_step(self, step: Job, earlier_columns: Collection[str], later_columns: Mapping[str, str]) -> JobInput:
        """Return the input as a step sees it: without the columns that enrich adds, with those of earlier steps.

        `later_columns`: the steps that give the columns of this step and later ones. `column_problems` checks the step.
        """
        step_input = copy(self)
        step_input.job = step
        step_input.header = list(dict.fromkeys([*self.columns, *earlier_columns]))
        step_input._later_columns = later_columns  # noqa: SLF001 - of our own copy
        step_input._required = [name for name in self._required if name not in {*earlier_columns, *later_columns}]  # noqa: SLF001
        return step_input

    @property
    def change_key(self) -> list[str]:
        """The columns that identify a lead in the change feed. Default: the columns that the params read."""
        model = self.job.model
        if model.changes is not None and model.changes.key is not None:
            return model.changes.key
        return list(dict.fromkeys(column for param in model.params.values() for column in param.columns))

    def _check_statuses(self, frame: pl.DataFrame) -> None:
        if "enrich_status" in self.header:
            statuses = frame.to_series(self.header.index("enrich_status")).unique()
            if not statuses.is_in(_OWN_STATUSES).all():
                raise self._foreign_column("enrich_status")

    def _foreign_column(self, name: str) -> EnrichError:
        message = f"the input has a column `{name}` that another program wrote ({self.job.input_path})"
        return self.job.error(["input"], message, "rename it: each run writes a column with this name")

    def _named_columns(self) -> Iterator[tuple[list[str | int], str]]:
        """Yield the columns that the job, or the step, names, each with its place in the job file."""
        model = self.job.model
        for name, param in model.params.items():
            for column in param.columns:
                yield ["params", name], column
        lists: dict[tuple[str, ...], Sequence[str]] = {
            ("only_if_empty",): model.only_if_empty,
            ("order_by",): model.order_by or (),
            ("changes", "key"): self.change_key if model.changes is not None else (),
            ("report", "by"): model.report.by if model.report is not None else (),
        }
        for keys, columns in lists.items():
            for index, column in enumerate(columns):
                yield [*keys, index], column

    def column_problems(self) -> Iterator[EnrichError]:
        """Yield an error for each column that the job, or the step, names and cannot use there, and for its `where`."""
        model = self.job.model
        for key_path, column in self._named_columns():
            yield from self._missing(column, key_path)
            if key_path[0] == "changes" and column in CHANGE_COLUMNS:
                hint = "choose other columns as its `key`, or rename it"
                yield self.job.error(["changes"], f"the change feed already has a column `{column}`", hint)
            if key_path[0] == "report" and column in self._own_columns:
                message = f"`{column}` is a column of the output that each run writes"
                yield self.job.error(key_path, message, "group by a column of your own")
        if model.caps is not None and model.caps.by not in model.params:
            yield from self._missing(model.caps.by, ["caps", "by"], other_names=model.params)
        if model.where is not None:
            yield from self._where_problems(model.where)

    def _missing(
        self, column: str, key_path: list[str | int], other_names: Iterable[str] = (), hint_if_unlike: str | None = None
    ) -> Iterator[EnrichError]:
        """Yield an error if the input lacks a column. `hint_if_unlike`: it has no similar one either."""
        if column in self.header:
            return
        if (giver := self._later_columns.get(column)) is not None:
            can_move = self.job.step not in {"", giver}
            to_do = f"move `{self.job.step}` after `{giver}`" if can_move else "only later steps can read it"
            yield self.job.error(key_path, f"`{column}` comes from the step `{giver}`", to_do)
            return
        if (foreign := self.foreign_input_error(self._required)) is not None:
            yield foreign
            return
        if (hint := self._separator_hint()) is None:
            hint = hint_if_unlike
            if hint is None or closest_name(column, self.header) is not None:
                hint = missing_column_hint(column, [*self.header, *other_names], [*self._required, *other_names])
        yield self.job.error(key_path, f"the input has no column `{column}` ({self.job.input_path})", hint)

    def foreign_input_error(self, named: Collection[str]) -> EnrichError | None:
        """Return an error if the input has no column that the params name.

        Then it has no header, a title above its header, or it is another file. Raises FileProblem if the rows cannot be
        read, for example below a title.
        """
        path, header = self.job.input_path, list(self.all_columns)
        if is_headerless(header, named):
            return CommandRefused(f"{path}: the first line {NO_HEADER}", NO_HEADER_HINT)
        separator_hint = self._separator_hint()
        if separator_hint is None and (row := self._row_with_names(named)) is not None:
            message = f"{path}: the first line is not the header: row {row} under it has the column names"
            return CommandRefused(message, LATER_HEADER_HINT)
        if len(set(named)) < _MANY_COLUMNS or any(
            column in header or missing_column_hint(column, header, named) for column in named
        ):
            return None
        message = f"the input has none of these columns: {', '.join(dict.fromkeys(named))} ({path})"
        place = "file and `sheet`" if self.job.input.format == "xlsx" else "file"
        hint = f"check that it is the right {place}, and that its first line is the header"
        return self.job.error(["input"], message, separator_hint or hint)

    def _row_with_names(self, job_columns: Collection[str]) -> int | None:
        """Return which of the first rows (from 1) has names of the job's columns as cells. None: there is none."""
        if not job_columns or set(job_columns) & set(self.all_columns):
            return None
        frame = next(self._table.batches(), None)
        rows = [] if frame is None else text_frame(frame.head(_MAX_TITLE_ROWS)).rows()
        return next((number for number, cells in enumerate(rows, 1) if set(job_columns) & set(cells)), None)

    def _separator_hint(self) -> str | None:
        """Return a hint when the header looks as if its columns were separated by another character."""
        settings = self.job.input
        if settings.format != "csv" or not (other := likely_separator(list(self.all_columns), settings.separator)):
            return None
        shown = yaml_scalar(other)
        return f"its header looks separated by {shown}: input: {{path: …, separator: {shown}}}"

    def _where_problems(self, expression: str) -> Iterator[EnrichError]:
        """Try `where` on no rows. It must look at one row at a time, because rows come in batches."""
        if (problem := expression_problem(expression)) is not None:
            yield self.job.error(["where"], problem, WHERE_EXAMPLE)
            return
        unknown = unknown_columns(expression, self.header)
        for column in unknown:
            yield from self._missing(column, ["where"], hint_if_unlike=QUOTES_HINT)
        columns = [*self.header, *unknown]
        try:
            result = evaluate_expression(expression, pl.DataFrame(schema=dict.fromkeys(columns, pl.String)))
        except pl.exceptions.PolarsError as error:
            reason, hint = explain_error(error)
            yield self.job.error(["where"], f"not a polars SQL expression over the columns: {reason}", hint)
            return
        is_per_row = result.schema == {"selected": pl.Boolean} and not result.height
        if not is_per_row or depends_on_other_rows(expression, columns):
            yield self.job.error(["where"], PER_ROW_MESSAGE, WHERE_EXAMPLE)

    def suppressed_rows(self, frame: pl.DataFrame) -> pl.Series | None:
        """Return which rows have an address or a domain that is never sent by any step; None: there is no list."""
        if self.suppression is None:
            return None
        constants = [param.value for param in self._params if param.value is not None]
        if any(map(self.suppression.contains, constants)):
            return pl.repeat(value=True, n=frame.height, eager=True)
        sent = {index for index, name in enumerate(self.header) if name in self.sent_columns}
        return self.suppression.suppressed_rows(frame, sent)

    def selected_rows(self, frame: pl.DataFrame, *, unknown: bool = False) -> pl.Series:
        """Return which rows `where` and `only_if_empty` keep; `unknown` where a cell that they read is null."""
        selected = pl.Series([True]).new_from_index(0, frame.height)
        for column in self.job.model.only_if_empty:
            blank = blank_cells(frame.to_series(self.header.index(column)), self.job.model.placeholders)
            selected &= blank.fill_null(value=unknown)
        if self.job.model.where is None:
            return selected
        try:
            return selected & evaluate_expression(self.job.model.where, frame).to_series().fill_null(value=unknown)
        except pl.exceptions.PolarsError as error:
            reason, hint = explain_error(error, in_cells=True)
            raise self.job.error(["where"], f"cannot be computed: {reason.split(' for ')[0]}", hint) from error


def _former_steps(job: Job, header: Collection[str]) -> list[str]:
    """Return the steps whose columns the input has from an earlier output, and that the job no longer has."""
    if not job.step_jobs or "enrich_status" not in header:
        return []
    return [step for step in steps_in_header(header) if step not in {known.step for known in job.step_jobs}]


def _input_path_error(job: Job) -> EnrichError | None:
    """Return an error that names the job file if no file can be at the input's path, or if it is missing there."""
    path, written = job.input_path, job.input.path
    if (error := job.name_error("input", path)) is not None:
        return error
    is_given = "input" in job.document.replaced_keys
    if is_given or not isinstance(path, Path) or has_wildcards(written) or not is_missing(path):
        return None
    hint = missing_file_hint(path, written, job.document.folder)
    return CommandRefused(f"{job.document.place_of(['input'])}: {path} does not exist", hint)

"""Joins rows and results into the output file, batch by batch. Never uses the API."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import polars as pl
from msgspec import Struct, field
from msgspec.structs import replace

from enrich.errors import CommandRefused
from enrich.files.values import JSON_TYPE
from enrich.files.writer import NO_LIMITS, FileLimits, escape_formulas, limits_of, write_file
from enrich.job.job import Job
from enrich.job.locations import Location, is_dataset
from enrich.ledger import enroll, queries
from enrich.ledger.database import Database
from enrich.models import RequestSelection, RowStatus, pluralize, to_micros
from enrich.rows.batches import INDEX_COLUMN, RowBatch, status_columns
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.output_cells import ANSWERED_STATES, JoinedBatch, JoinedStep, merge_cells, new_cells
from enrich.run.step_rows import StepRows


def count_statuses(cells: Mapping[str, pl.Series]) -> Counter[RowStatus]:
    """Count rows by their status. `cells` are the new cells of the rows, of all steps or of one."""
    return Counter({RowStatus(name): count for name, count in cells["enrich_status"].value_counts().iter_rows()})


class OutputCounts(Struct, frozen=True):
    """Rows by their status in the output, and rows with a value by new column."""

    statuses: Counter[RowStatus] = field(default_factory=Counter)
    filled_by_column: Counter[str] = field(default_factory=Counter)
    #: Rows by their status in each step; empty for a job without steps.
    by_step: dict[str, Counter[RowStatus]] = {}
    #: The credits that the rows show for each step, in millionths.
    credits: Counter[str] = field(default_factory=Counter)
    #: Results of each step without a price of their own, such as those of bulk tasks.
    unpriced: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: OutputCounts) -> OutputCounts:
        """Add the counts of several parts."""
        total = OutputCounts(self.statuses.copy(), self.filled_by_column.copy())
        # The sum of two Counters would drop the columns without a value.
        total.statuses.update(other.statuses)
        total.filled_by_column.update(other.filled_by_column)
        return total

    def add(self, joined: JoinedBatch) -> None:
        """Count the rows of a batch."""
        self.statuses.update(count_statuses(joined.cells))
        columns = dict.fromkeys(name for step in joined.steps for name in step.columns)
        self.filled_by_column.update({name: joined.cells[name].count() for name in columns})
        for step in joined.steps:
            if step.name:
                self.by_step.setdefault(step.name, Counter()).update(count_statuses(step.cells))
                self.credits[step.name] += to_micros(step.cells["enrich_credits"].sum()) or 0
                prices = zip(step.request_results["state"], step.request_results["credits"], strict=True)
                self.unpriced[step.name] += sum(state in ANSWERED_STATES and price is None for state, price in prices)


class Collector(Struct, frozen=True):
    """Builds the output. `check_stopped` is called before every batch and may raise to stop.

    `selection` decides about requests that the pass has not seen; see `enroll.request_results`.
    """

    ledger: Database
    template: RequestTemplate
    job_input: JobInput
    check_stopped: Callable[[], None] = lambda: None
    selection: RequestSelection | None = None
    #: Joins the rows of a job with steps; None: the job has none.
    step_rows: StepRows | None = None

    @property
    def job(self) -> Job:
        """The job of the input."""
        return self.job_input.job

    def write(self, target: Location, *, partial: bool = True) -> OutputCounts:
        """Write the output from the input and the ledger alone. Returns its counts.

        Raises CommandRefused when the input cannot be read, the output cannot be written, or rows are pending and
        `partial` is false.
        """
        counts = OutputCounts()
        with_index = is_dataset(target)
        schema = output_schema(self.job_input, self.template, with_index=with_index)

        def checked_frames() -> Iterator[pl.DataFrame]:
            yield from self.frames(counts, with_index=with_index, limits=limits_of("output", self.job.output))
            self.ledger.check_files()  # before the old output is replaced
            pending = counts.statuses[RowStatus.PENDING]
            if pending and not partial:
                raise CommandRefused(
                    f"{pluralize(pending, 'row')} pending: the output would be incomplete",
                    "finish them with `enrich run JOB`, or write the current results with --partial",
                )

        write_file(
            target,
            self.job.output,
            job=self.job.temporary_name,
            schema=schema,
            frames=checked_frames(),
            new_columns=len(schema) - len(self.job_input.schema),
        )
        return counts

    def frames(
        self, counts: OutputCounts, *, with_index: bool, limits: FileLimits = NO_LIMITS
    ) -> Iterator[pl.DataFrame]:
        """Yield the rows of the output, and add them to `counts`. New cells are made to fit into the `limits`."""
        merged_columns = self.merged_columns
        new_columns = [name for name in new_column_types(self.job, self.template) if name not in merged_columns]
        for answered in self.joined_batches():
            counts.add(answered)
            joined = replace(answered, cells=limits.fit_answers(answered.cells))
            batch = joined.batch
            frame = batch.frame.with_columns(
                self.merge_column(joined, name, formula_safe=limits.runs_formulas) for name in merged_columns
            )
            frame = frame.hstack([joined.cells[name] for name in new_columns])
            if with_index:
                index = pl.int_range(batch.first_position, batch.first_position + frame.height, eager=True)
                frame = frame.with_columns(index.alias(INDEX_COLUMN))
            yield frame
            del answered, joined, batch, frame  # not kept while the next batch is read

    def count_rows(self) -> OutputCounts:
        """Count the rows that the output would have."""
        counts = OutputCounts()
        for joined in self.joined_batches():
            counts.add(joined)
        return counts

    @property
    def merged_columns(self) -> list[str]:
        """The job's columns that the input already has."""
        return [name for name in self.template.columns if name in self.job_input.columns]

    def joined_batches(self) -> Iterator[JoinedBatch]:
        """Yield each batch of the input with its new cells."""
        if self.step_rows is not None:
            yield from replace(self.step_rows, check_stopped=self.check_stopped).joined_batches()
            return
        # The change feed records rows by their fingerprints.
        known = self.ledger if self.job.model.changes is None else None
        max_rows = queries.max_rows_per_batch(self.ledger)
        batches = self.job_input.batches(self.template, ledger=known)
        for batch in (part for whole in batches for part in whole.parts(max_rows)):
            self.check_stopped()
            yield self._join(batch)

    def _join(self, batch: RowBatch) -> JoinedBatch:
        results = enroll.request_results(self.ledger, batch.requests(), self.selection)
        places: list[int | None] = list(range(batch.frame.height))
        if results["position"] != list(range(batch.first_position, batch.first_position + batch.frame.height)):
            first_rows = enumerate(results["position"])
            place_of = {batch.request_keys[position - batch.first_position]: place for place, position in first_rows}
            places = [place_of.get(name) for name in batch.request_keys]
        cells = new_cells(batch, results, pl.Series(places, dtype=pl.UInt32), self.template)
        step = JoinedStep("", self.template.columns, batch.fingerprints, results, places, cells)
        return JoinedBatch(batch, [step], cells)

    def merge_column(self, joined: JoinedBatch, name: str, *, formula_safe: bool = False) -> pl.Series:
        """Fill in a column of the input. A missing result never blanks an existing cell."""
        new = joined.cells[name]
        new = escape_formulas(new.to_frame()).to_series() if formula_safe else new
        return merge_cells(self.job, joined.batch.frame.get_column(name), new)


def output_schema(job_input: JobInput, template: RequestTemplate, *, with_index: bool) -> dict[str, pl.DataType]:
    """Return the columns of the output with their types. `with_index` adds the row's position in the input."""
    new = new_column_types(job_input.job, template)
    # The types of `merge_cells`.
    new |= {name: kind for name, kind in job_input.schema.items() if kind == JSON_TYPE}
    old: dict[str, pl.DataType] = {name: new.get(name, kind) for name, kind in job_input.schema.items()}
    return old | new | ({INDEX_COLUMN: pl.Int64()} if with_index else {})


def new_column_types(job: Job, template: RequestTemplate) -> dict[str, pl.DataType]:
    """Return the new columns with their types."""
    return {name: pl.String() for name in template.columns} | status_columns(job)

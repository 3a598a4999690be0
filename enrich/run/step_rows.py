"""The table that a step of a job reads, and the cells that each step adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl
from msgspec import Struct
from msgspec.structs import replace

from enrich.files.values import as_text, json_where_no_text, numbered_frame
from enrich.job.cell_text import blank_cells
from enrich.job.job import Job
from enrich.job.spec import STEP_FIELDS, step_column
from enrich.ledger import queries, step_results
from enrich.ledger.database import Database
from enrich.ledger.step_results import StepResult
from enrich.models import CAPPED_REASON, RowStatus, result_columns
from enrich.rows.batches import InputRows, RowBatch
from enrich.rows.job_input import JobInput
from enrich.rows.job_steps import RowFacts, Step, StepDecision, decide, row_status
from enrich.rows.requests import FORGOTTEN_REASON, RequestBuilder
from enrich.rows.row_selection import order_of_rows
from enrich.run.output_cells import JoinedBatch, JoinedStep, merge_cells, new_cells
from enrich.run.step_batch import Identities, LeadSelection, StepBatch, capped_rows, find_recorded_rows, identities


@dataclass(slots=True)
class StepTables:
    """A batch of rows on its way through the steps, with the table that each of them reads.

    `frame` is the input. `selected`: the job's own conditions hold. `capped` rows take part in no step, `forgotten`
    ones send nothing new. `table`, and the same as `text`, is what the next step reads. `values` has what was found for
    each column so far.
    """

    first_position: int
    frame: pl.DataFrame
    selected: pl.Series
    capped: list[int]
    identities: Identities
    table: pl.DataFrame
    text: pl.DataFrame
    values: dict[str, pl.Series] = field(default_factory=dict)
    #: Of each step so far: its decisions with the table that it has read, as text, and its results.
    steps: list[tuple[StepBatch, pl.DataFrame]] = field(default_factory=list)
    joined: list[JoinedStep] = field(default_factory=list)
    forgotten: set[int] = field(default_factory=set)

    def is_known(self, job: Job, column: str) -> list[bool]:
        """Return which rows have a value in a column that steps give: one that was found, or that of the input."""
        known = self.values[column].is_not_null()
        if job.model.merge == "fill_empty" and column in self.frame.columns:
            known |= ~blank_cells(as_text(self.frame.get_column(column)), job.model.placeholders)
        return known.to_list()


class StepRows(Struct):
    """The rows of a job with steps.

    `leads`: those that a limited run may send requests for; None: the run is not limited.
    """

    job_input: JobInput
    ledger: Database
    steps: Sequence[Step]
    leads: LeadSelection | None = None
    #: Called before each batch. It may raise to stop.
    check_stopped: Callable[[], None] = lambda: None
    #: Which rows `caps` leaves out, one byte for each; None: no `caps`, or not known before `begin`.
    _capped: bytearray | None = None
    #: The steps of which the ledger has the rows that need their request.
    _prepared: set[int] = set()

    def begin(self) -> None:
        """Find out which leads `caps` leaves out, and which ones of a limited run were begun before.

        Raises JobError if a condition of any step cannot be computed for the first rows.
        """
        caps = self.job_input.job.model.caps
        next(self._tables_after(len(self.steps)), None)
        if caps is None and self.leads is None:
            return
        begun = self._begun_leads()
        if caps is not None:
            self._capped = capped_rows(self.job_input, caps, begun, self.check_stopped)
        if self.leads is not None:
            self.leads.begun = begun

    def _begun_leads(self) -> bytearray:
        """Return for which rows a step has sent a request, one byte for each."""
        begun = bytearray()
        for tables in self._tables_after(len(self.steps)):
            begun.extend(bytes(tables.frame.height))
            for step, (step_batch, _) in zip(self.steps, tables.steps, strict=True):
                names = step_batch.batch.fingerprints
                sent = [row for row, result in enumerate(step_batch.results) if result is not None and result.was_sent]
                for row in find_recorded_rows(self.ledger, step.job, names, sent, step_batch.identities):
                    begun[tables.first_position + row] = 1
        return begun

    def joined_batches(self) -> Iterator[JoinedBatch]:
        """Yield each batch with the cells of all steps. A price is shown once."""
        self._prepare()
        step_results.begin_bill(self.ledger)
        for tables in self._tables_after(len(self.steps), bill=True):
            batch = replace(tables.steps[0][0].batch, frame=tables.frame)
            cells = row_cells(self.job_input.job, tables.values, tables.text, tables.joined)
            yield JoinedBatch(batch, tables.joined, cells)

    def step_batches(
        self, number: int, queue_order: pl.Series | None = None, *, limited: bool = True
    ) -> Iterator[StepBatch]:
        """Read the input once. Yield each batch as it is in a step, `limited` to the leads of the run."""
        step = self.steps[number]
        builder = step.job_input.request_builder(step.template)
        for tables in self._tables_after(number):
            order = None
            if queue_order is not None:
                order = order_of_rows(queue_order, tables.first_position, tables.text.height)
            yield self._decide(tables, step, builder, order, limited=limited)

    def step_tables(self) -> Iterator[StepTables]:
        """Yield each batch as it is in every step."""
        self._prepare()
        return self._tables_after(len(self.steps))

    def status_column(self, number: int) -> str:
        """Return the column with the status of a step."""
        return step_column(self.steps[number].job.step, "status")

    def _tables_after(self, steps: int, *, bill: bool = False) -> Iterator[StepTables]:
        """Read the input once. Yield each batch after the first `steps`."""
        builders = [(step, step.job_input.request_builder(step.template)) for step in self.steps[:steps]]
        for tables in self._first_tables():
            self.check_stopped()
            for step, builder in builders:
                self._advance(tables, step, builder, bill=bill)
            yield tables

    def _first_tables(self) -> Iterator[StepTables]:
        """Read the input once. Yield each batch before the first step."""
        own = [place for place, name in enumerate(self.job_input.header) if name in self.job_input.schema]
        sent = self.job_input.identifying_columns
        max_rows = queries.max_rows_per_batch(self.ledger, len(self.steps))
        for first_position, frame, text in self.job_input.frames(max_rows):
            input_frame = frame.select(pl.nth(own))
            selected = self.job_input.selected_rows(text)
            left_out = self._capped_rows(first_position, text.height)
            own_text = text.select(pl.nth(own))
            names = identities(own_text, sent)
            yield StepTables(first_position, input_frame, selected, left_out, names, input_frame, own_text)

    def _capped_rows(self, first_position: int, height: int) -> list[int]:
        """Return which rows of a batch `caps` leaves out, also those that were added after the rows were counted."""
        if self._capped is None:
            return []
        capped = self._capped[first_position : first_position + height].ljust(height, b"\1")
        return [row for row, is_capped in enumerate(capped) if is_capped]

    def _advance(self, tables: StepTables, step: Step, builder: RequestBuilder, *, bill: bool) -> None:
        """Add a step's columns to the table that the next step reads."""
        step_batch = self._decide(tables, step, builder)
        joined = join_step(self.ledger, step, step_batch, bill=bill)
        new = []
        for name in step.template.columns:
            # The first value found stays.
            # Unnamed: polars would take a name such as `^a.*$` for a pattern.
            found = joined.cells[name].alias("")
            if (values := tables.values.get(name)) is not None:
                before = values.alias("")
                joined.cells[name] = found.set(before.is_not_null(), None).alias(name)
                found = before.fill_null(found)
            tables.values[name] = found.alias(name)
            if name in self.job_input.schema:
                new.append(merge_cells(self.job_input.job, tables.frame.get_column(name), found))
            else:
                new.append(found.fill_null("").alias(name))
        new.append(joined.cells["enrich_status"].alias(step_column(step.job.step, "status")))
        text = list(map(as_text, new))
        # A list, object or boolean that a step found is left out of params, as one in the input is.
        tables.steps.append((step_batch, tables.text))
        tables.table = tables.table.with_columns(map(json_where_no_text, text))
        tables.text = tables.text.with_columns(text)
        tables.joined.append(joined)

    def _decide(
        self,
        tables: StepTables,
        step: Step,
        builder: RequestBuilder,
        order: list[int] | None = None,
        *,
        limited: bool = True,
    ) -> StepBatch:
        """Map the rows to the requests of a step, and decide what the run does with each of them."""
        text, height = tables.text, tables.text.height
        unsent = self._rows_needing_purged(tables, step) | dict.fromkeys(tables.forgotten, FORGOTTEN_REASON)
        selected = step.job_input.selected_rows(text) & ~_rows_as_mask(unsent, height)
        ready = pl.repeat(value=True, n=height, eager=True)
        for number in step.depends_on:
            ready &= pl.Series(tables.steps[number][0].final, dtype=pl.Boolean)
        taking_part = tables.selected & ~_rows_as_mask(tables.capped, height)
        suppressed = step.job_input.suppressed_rows(text)
        rows = InputRows(tables.first_position, tables.table, text, taking_part, suppressed, order)
        batch = builder.build_batch(rows, counted=selected & ready)
        for row in tables.capped:
            batch.errors[row] = CAPPED_REASON
        # No later step sends a request about a forgotten person.
        tables.forgotten |= {row for row, reason in enumerate(batch.errors) if reason == FORGOTTEN_REASON}
        known = step_results.find_results(self.ledger, [name for name in batch.fingerprints if name is not None])
        results = [None if name is None else known.get(name) for name in batch.fingerprints]
        is_ready = ready.to_list()
        # Rows that send nothing new. They keep a request that was sent for them.
        sends_new = zip((selected & ready).to_list(), results, strict=True)
        idle = [
            row for row, (new, result) in enumerate(sends_new) if not new and result is not None and result.was_sent
        ]
        recorded = find_recorded_rows(self.ledger, step.job, batch.fingerprints, idle, tables.identities)
        kept = {
            row
            for row, found in recorded.items()
            # Where the step's condition does not hold, a request of another step, job or row does not count.
            if not is_ready[row] or (found.is_sent_by_step and not found.is_requested_by_other)
        }
        facts = zip(
            [status is RowStatus.FILTERED for status in batch.statuses],
            [status is RowStatus.INVALID for status in batch.statuses],
            _blank_from_step(step, batch),
            selected.to_list(),
            [row in kept for row in range(height)],
            is_ready,
            strict=True,
        )
        decisions = [decide(RowFacts._make(of_row)) for of_row in facts]
        requesting_rows = [row for row, decision in enumerate(decisions) if decision is StepDecision.SEND]
        if self.leads is not None and limited:
            may_send = self.leads.may_send(tables.first_position, results)
            for row in requesting_rows:
                if not may_send[row]:  # the row waits, or keeps the result that the ledger has
                    decisions[row] = StepDecision.WAIT if results[row] is None else StepDecision.KEEP
        unsent = {row: why for row, why in unsent.items() if decisions[row] is StepDecision.FILTER}
        return StepBatch(batch, results, decisions, requesting_rows, unsent, tables.identities)

    def _rows_needing_purged(self, tables: StepTables, step: Step) -> dict[int, str]:
        """Return the rows for which the step may need a result that was purged, each with the reason.

        What was found is not known then. Nor is what a step would have found that sent nothing for this reason.
        """
        # By column that the step reads: the rows whose cell is not known.
        unknown: dict[str, dict[int, str]] = {}
        for number in sorted(step.depends_on):
            earlier, name = tables.steps[number][0], self.steps[number].job.step
            lost = dict.fromkeys(earlier.purged_rows(), f"the result of `{name}` was purged") | earlier.unsent
            columns = [name for name in self.steps[number].template.columns if name in step.earlier_columns]
            for column in columns if lost else ():
                known = tables.is_known(self.job_input.job, column)
                unknown.setdefault(column, {}).update({row: why for row, why in lost.items() if not known[row]})
            if self.status_column(number) in step.earlier_columns:
                unknown[self.status_column(number)] = earlier.unsent
        if not any(unknown.values()):
            return {}
        height = tables.text.height
        text = tables.text.with_columns(
            tables.text.get_column(name).set(_rows_as_mask(rows, height), None) for name, rows in unknown.items()
        )
        may_be_selected = step.job_input.selected_rows(text, unknown=True)
        return {row: why for rows in unknown.values() for row, why in rows.items() if may_be_selected[row]}

    def _prepare(self) -> None:
        """Find out which rows need their request in each step that the run has not enrolled.

        That matters only where rows are recorded with requests, so not before the first run.
        """
        if not step_results.has_recorded_rows(self.ledger):
            return
        for number in range(len(self.steps)):
            if number not in self._prepared:
                for _ in self.requesting_batches(number):
                    pass

    def requesting_batches(self, number: int, queue_order: pl.Series | None = None) -> Iterator[StepBatch]:
        """Yield the same as `step_batches`. After the last one, the ledger has the rows that need their request."""
        step = self.steps[number].job.step
        step_results.begin_requesting_rows(self.ledger, step)
        for step_batch in self.step_batches(number, queue_order):
            self._add_requesting_rows(number, step_batch)
            yield step_batch
        self._prepared.add(number)

    def _add_requesting_rows(self, number: int, step_batch: StepBatch) -> None:
        """Add the rows of a batch that need their request in a step, whether the run sends it for them or not."""
        job = self.steps[number].job
        for sends in (False, True):
            rows = [
                row for row in step_batch.requesting_rows if (step_batch.decisions[row] is StepDecision.SEND) == sends
            ]
            pairs = [
                (name, row_hash)
                for index, row_hash in step_batch.identities.hashes(job, rows)
                if (name := step_batch.batch.fingerprints[rows[index]]) is not None
            ]
            if pairs:
                step_results.add_requesting_rows(self.ledger, job.step, pairs, sends=sends)


def _rows_as_mask(rows: Iterable[int], height: int) -> pl.Series:
    return pl.int_range(height, eager=True).is_in(list(rows))


def _blank_from_step(step: Step, batch: RowBatch) -> list[bool]:
    """Return which rows lack nothing but what an earlier step could have found."""
    if RowStatus.INVALID not in batch.statuses:
        return [False] * len(batch.statuses)
    of_steps = step.earlier_columns
    required = [
        batch.values[name] == ""
        for name in step.template.required_params
        if of_steps.isdisjoint(step.job.model.params[name].columns)
    ]
    if not any(of_steps.intersection(param.columns) for param in step.job.model.params.values()):
        return [False] * len(batch.statuses)
    if not required:
        return [True] * len(batch.statuses)
    return (~numbered_frame(required).select(pl.any_horizontal(pl.all())).to_series()).to_list()


def join_step(ledger: Database, step: Step, step_batch: StepBatch, *, bill: bool) -> JoinedStep:
    """Join the rows of a batch with the answers of a step."""
    batch = step_batch.batch
    first_rows: dict[bytes, tuple[int, StepResult]] = {}
    rows = zip(batch.fingerprints, step_batch.results, strict=True)
    for position, (name, found) in enumerate(rows, batch.first_position):
        if name is not None and found is not None:
            first_rows.setdefault(name, (position, found))
    known = {found.request_id for _, found in first_rows.values()}
    billed = step_results.add_to_bill(ledger, known) if bill and known else set()
    results = [
        found.result._replace(position=position, first=int(found.request_id in billed))
        for position, found in first_rows.values()
    ]
    places = {name: place for place, name in enumerate(first_rows)}
    columns = result_columns(results)
    indexes = [None if name is None else places.get(name) for name in batch.fingerprints]
    cells = new_cells(batch, columns, pl.Series(indexes, dtype=pl.UInt32), step.template)
    return JoinedStep(step.job.step, step.template.columns, batch.fingerprints, columns, indexes, cells)


def row_cells(
    job: Job, values: Mapping[str, pl.Series], text: pl.DataFrame, joined: Sequence[JoinedStep]
) -> dict[str, pl.Series]:
    """Return the new cells of a batch: the columns, those of each step, those of the row.

    `values` has what was found for each column, and `text` is the table behind the last step.
    """
    cells = dict(values)
    for step in joined:
        of_step = {step_column(step.name, name): step.cells[f"enrich_{name}"] for name in STEP_FIELDS}
        cells |= {name: column.alias(name) for name, column in of_step.items()}
    complete = job.complete or tuple(joined[-1].columns)
    blank = numbered_frame(blank_cells(text.get_column(name), job.model.placeholders) for name in complete)
    is_complete = (~blank.select(pl.any_horizontal(pl.all())).to_series()).to_list()
    statuses = zip(*(step.cells["enrich_status"] for step in joined), strict=True)
    rows = zip(statuses, is_complete, strict=True)
    row_statuses = [row_status(row, is_complete=done).value for row, done in rows]
    is_any_known = pl.any_horizontal(pl.all().is_not_null())
    errors = numbered_frame(step.name + ": " + step.cells["enrich_error"] for step in joined)
    prices = numbered_frame(step.cells["enrich_credits"] for step in joined)
    reason = pl.when(is_any_known).then(pl.concat_str(pl.all(), separator="; ", ignore_nulls=True))
    total = pl.when(is_any_known).then(pl.sum_horizontal(pl.all()).round(6))
    return cells | {
        "enrich_status": pl.Series("enrich_status", row_statuses, pl.String),
        "enrich_error": errors.select(reason.alias("enrich_error")).to_series(),
        "enrich_credits": prices.select(total.alias("enrich_credits")).to_series(),
    }

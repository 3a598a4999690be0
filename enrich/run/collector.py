"""Joins rows and results into the output file, batch by batch. Never uses the API."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import orjson
import polars as pl

from enrich.databar.answers import is_blank, result_fields, value_at
from enrich.errors import CommandRefused
from enrich.files.values import as_text
from enrich.files.writer import escape_formulas, needs_formula_escape, write_file
from enrich.job.job import Job
from enrich.job.locations import Location, is_dataset
from enrich.job.spec import Changes, Output
from enrich.ledger.ledger import Ledger
from enrich.models import MICROS_PER_CREDIT, OPEN_STATES, RequestResult, RowStatus, State, iso_time
from enrich.rows.reader import JobInput
from enrich.rows.requests import CHANGE_COLUMNS, INDEX_COLUMN, STATUS_COLUMNS, RowBatch
from enrich.rows.template import RequestTemplate


@dataclass(frozen=True, slots=True)
class JoinedBatch:
    """A batch with the results of its rows' requests, None where there is none, and its new cells, by column."""

    batch: RowBatch
    results: Sequence[RequestResult | None]
    cells: Mapping[str, pl.Series]

    def count_statuses(self) -> Counter[RowStatus]:
        """Count the rows by their status."""
        names, counts = self.cells["enrich_status"].value_counts()
        return Counter({RowStatus(name): count for name, count in zip(names, counts, strict=True)})


@dataclass(frozen=True, slots=True)
class OutputCounts:
    """Rows by their status in the output, and rows with a value by new column."""

    statuses: Counter[RowStatus] = field(default_factory=Counter)
    filled_by_column: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: OutputCounts) -> OutputCounts:
        """Add the counts of several parts."""
        total = OutputCounts(self.statuses.copy(), self.filled_by_column.copy())
        # The sum of two Counters would drop the columns without a value.
        total.statuses.update(other.statuses)
        total.filled_by_column.update(other.filled_by_column)
        return total

    def add(self, joined: JoinedBatch) -> None:
        """Count the rows of a batch."""
        self.statuses.update(joined.count_statuses())
        self.filled_by_column.update(
            {name: cells.count() for name, cells in joined.cells.items() if name not in STATUS_COLUMNS}
        )


@dataclass(frozen=True, slots=True)
class Collector:
    """Builds the output. `check_stopped` is called before every batch and may raise to stop."""

    ledger: Ledger
    job: Job
    template: RequestTemplate
    job_input: JobInput
    check_stopped: Callable[[], None] = lambda: None

    def write(self, target: Location, *, partial: bool = True) -> OutputCounts:
        """Write the output from the input and the ledger alone. Returns its counts.

        Raises CommandRefused when the input cannot be read, the output cannot be written, or rows are pending and
        `partial` is false.
        """
        counts = OutputCounts()
        with_index = is_dataset(target)
        schema = output_schema(self.job_input, self.template, with_index=with_index)
        write_file(
            target,
            self.job.output,
            job=self.job.name,
            schema=schema,
            frames=self._checked_frames(
                counts, with_index=with_index, partial=partial, formula_safe=needs_formula_escape(target)
            ),
            new_columns=len(schema) - len(self.job_input.schema),
        )
        return counts

    def frames(self, counts: OutputCounts, *, with_index: bool, formula_safe: bool = False) -> Iterator[pl.DataFrame]:
        """Yield the rows of the output, and add them to `counts`."""
        merged_columns = self.merged_columns
        new_columns = [name for name in new_column_types(self.template) if name not in merged_columns]
        for joined in self.joined_batches():
            counts.add(joined)
            batch = joined.batch
            frame = batch.frame.with_columns(
                self.merge_column(joined, name, formula_safe=formula_safe) for name in merged_columns
            )
            first_position, height = batch.first_position, batch.frame.height
            index = (
                [pl.int_range(first_position, first_position + height, eager=True).alias(INDEX_COLUMN)]
                if with_index
                else []
            )
            yield frame.hstack([joined.cells[name] for name in new_columns] + index)

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
        """Read the input once. Yield each batch with its new cells."""
        for batch in self.job_input.batches(self.template):
            self.check_stopped()
            results = self.ledger.request_results(batch.requests())
            index_of = {
                batch.fingerprints[row.position - batch.first_position]: number for number, row in enumerate(results)
            }
            result_indexes = [index_of.get(fingerprint) for fingerprint in batch.fingerprints]
            cells = _new_cells(batch, results, pl.Series(result_indexes, dtype=pl.UInt32), self.template)
            yield JoinedBatch(batch, [None if place is None else results[place] for place in result_indexes], cells)

    def _checked_frames(
        self, counts: OutputCounts, *, with_index: bool, partial: bool, formula_safe: bool
    ) -> Iterator[pl.DataFrame]:
        yield from self.frames(counts, with_index=with_index, formula_safe=formula_safe)
        self.ledger.check_files()  # before the old output is replaced
        pending = counts.statuses[RowStatus.PENDING]
        if pending and not partial:
            raise CommandRefused(
                f"{pending:,} rows are pending: the output would not be complete",
                "enrich run goes on with them; --partial writes what is there",
            )

    def merge_column(self, joined: JoinedBatch, name: str, *, formula_safe: bool = False) -> pl.Series:
        """Fill in a column of the input. A missing result never blanks an existing cell."""
        # Unnamed: polars would take a name such as `^a.*$` for a pattern.
        old = as_text(joined.batch.frame.get_column(name)).alias("")
        new = joined.cells[name].alias("")
        if formula_safe:
            new = escape_formulas(new)
        if self.job.model.merge == "fill_empty":
            new = new.set(old.str.strip_chars() != "", None)
        return new.fill_null(old).alias(name)


def output_schema(job_input: JobInput, template: RequestTemplate, *, with_index: bool) -> dict[str, pl.DataType]:
    """Return the columns of the output with their types. `with_index` adds the row's position in the input."""
    new = new_column_types(template)
    # Merged columns are text.
    old: dict[str, pl.DataType] = {name: new.get(name, kind) for name, kind in job_input.schema.items()}
    return old | new | ({INDEX_COLUMN: pl.Int64()} if with_index else {})


def new_column_types(template: RequestTemplate) -> dict[str, pl.DataType]:
    """Return the new columns with their types."""
    return {name: pl.String() for name in template.columns} | STATUS_COLUMNS


#: The fields of a RequestResult that are used unchanged.
_RESULT_COLUMNS = {
    "position": pl.Int64,
    "first": pl.Int8,
    "state": pl.String,
    "error": pl.String,
    "provider": pl.String,
    "credits": pl.Int64,
    "task_id": pl.String,
    "settled_ms": pl.Int64,
    "capped": pl.Int8,
    "erased_ms": pl.Int64,
}
_IS_PENDING = pl.col("state").is_in([State.PENDING.value, *(state.value for state in OPEN_STATES)])
_IS_CAPPED = _IS_PENDING & (pl.col("capped") == 1)


def _iso_time(column: str) -> pl.Expr:
    return pl.from_epoch(column, "ms").dt.strftime("%Y-%m-%dT%H:%M:%SZ")


def _new_cells(
    batch: RowBatch, results: Sequence[RequestResult], result_indexes: pl.Series, template: RequestTemplate
) -> dict[str, pl.Series]:
    """Build the new cells of a batch. `result_indexes` has the index of each row's result; null: it has none."""
    paths = list(template.columns.values())
    values = [_answer_values(row, paths) for row in results]
    # Another job with other columns may have sent the request. This job's columns decide whether it counts as found.
    found = pl.Series("found", [None if row is None else any(row) for row in values], pl.Boolean)
    is_first_row = pl.col("position") == pl.int_range(batch.first_position, batch.first_position + len(result_indexes))
    status_cells = (
        _status_frame(results, found)
        .select(pl.all().gather(result_indexes))
        .with_columns(
            result_indexes.alias("place"),
            pl.Series("row_status", batch.statuses, pl.String),
            pl.Series("row_error", batch.errors, pl.String),
        )
        .with_columns(
            pl.coalesce("enrich_status", "row_status", pl.lit(RowStatus.PENDING.value)),
            pl.when(pl.col("place").is_null()).then("row_error").otherwise("enrich_error").alias("enrich_error"),
            # The cost of a request is shown once.
            pl.when(is_first_row).then("enrich_credits").alias("enrich_credits"),
        )
    )
    nothing = [None] * len(paths)
    cells = zip(*(row or nothing for row in values), strict=True) if values else ((),) * len(paths)
    new = {
        # Unnamed: polars would take a name such as `^a.*$` for a pattern.
        name: pl.Series("", column, pl.String).gather(result_indexes).alias(name)
        for name, column in zip(template.columns, cells, strict=True)
    }
    return new | {name: status_cells.get_column(name) for name in STATUS_COLUMNS}


def _status_frame(results: Sequence[RequestResult], found: pl.Series) -> pl.DataFrame:
    """Build the status columns of each request, with its position. `found` is null where there is no answer."""
    columns = dict(zip(RequestResult._fields, zip(*results, strict=True), strict=True)) if results else {}
    frame = pl.DataFrame({name: pl.Series(columns.get(name, ()), dtype=kind) for name, kind in _RESULT_COLUMNS.items()})
    return frame.with_columns(found).select(
        "position",
        pl.when(_IS_CAPPED)
        .then(pl.lit(RowStatus.FILTERED.value))
        .when(_IS_PENDING)
        .then(pl.lit(RowStatus.PENDING.value))
        .when("found")
        .then(pl.lit(RowStatus.FOUND.value))
        .when(~pl.col("found"))
        .then(pl.lit(RowStatus.NOT_FOUND.value))
        .otherwise("state")
        .alias("enrich_status"),
        pl.when(_IS_CAPPED)
        .then(pl.lit("capped: enough leads of its group are asked"))
        .when(~_IS_PENDING & pl.col("erased_ms").is_not_null())
        .then("the answer was purged at " + _iso_time("erased_ms"))
        .otherwise("error")
        .alias("enrich_error"),
        # A pending request has no answer yet, so it has no provider, credits or time. Its last attempt may be running.
        pl.when(~_IS_PENDING).then("provider").alias("enrich_provider"),
        pl.when(~_IS_PENDING & (pl.col("first") == 1))
        .then(pl.col("credits") / MICROS_PER_CREDIT)
        .alias("enrich_credits"),
        pl.when(~_IS_CAPPED).then("task_id").alias("enrich_task_id"),
        pl.when(~_IS_PENDING).then(_iso_time("settled_ms")).alias("enrich_at"),
    )


def _answer_values(result: RequestResult, paths: Sequence[str]) -> list[str | None] | None:
    """Read the job's columns from an answer; None when there is no answer to judge."""
    if result.answer is None or result.state not in (State.FOUND, State.NOT_FOUND):
        return None
    return answer_cells(result.answer, paths)


def answer_cells(answer: str, paths: Sequence[str]) -> list[str | None]:
    """Read values of an answer (JSON) as cells."""
    try:
        values = _values_at(orjson.loads(answer), paths)
    except orjson.JSONDecodeError:
        values = None
    if values is None or not all(value is None or isinstance(value, str) for value in values):
        # The slower parser keeps every digit of a number, and reads values that JSON does not have (NaN, Infinity).
        values = _values_at(json.loads(answer), paths)
    return list(map(to_cell, values))


def _values_at(task: Mapping[str, object], paths: Iterable[str]) -> list[object]:
    fields = result_fields(task.get("data"))
    return [fields[path] if path in fields else value_at(fields, path) for path in paths]


def to_cell(value: object) -> str | None:
    """Write a value of the result as a cell: text unchanged, anything else as JSON, a blank as null."""
    if is_blank(value):
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


#: Rows with these statuses can be corrected or sent again.
REJECTED_STATUSES = (RowStatus.INVALID, RowStatus.FAILED, RowStatus.EXPIRED)
#: The columns of a rejects file after those of the input. They are replaced when the file is used as input.
REJECT_COLUMNS = ("enrich_status", "enrich_error")


def write_rejects(collector: Collector, target: Location, output: Output) -> int:
    """Write the invalid, failed and expired rows unchanged, with the reason. Returns how many."""
    count = 0

    def frames() -> Iterator[pl.DataFrame]:
        nonlocal count
        for joined in collector.joined_batches():
            reason_cells = [joined.cells[name] for name in REJECT_COLUMNS]
            frame = joined.batch.frame.hstack(reason_cells).filter(pl.col("enrich_status").is_in(REJECTED_STATUSES))
            count += frame.height
            yield frame

    schema = collector.job_input.schema | dict.fromkeys(REJECT_COLUMNS, pl.String())
    write_file(
        target,
        output,
        job=collector.job.name,
        schema=schema,
        frames=frames(),
        new_columns=len(REJECT_COLUMNS),
        kind="rejects",
    )
    return count


def write_changes(collector: Collector, target: Location, changes: Changes) -> int:
    """Write what is new since the last change feed, one line per field. Returns the number of lines.

    Delivery is recorded in the caller's transaction: if that fails, the same changes are written again.
    """
    key = collector.job_input.change_key
    schema = dict.fromkeys([*key, *CHANGE_COLUMNS], pl.String())
    count = 0

    def frames() -> Iterator[pl.DataFrame]:
        nonlocal count
        for joined in collector.joined_batches():
            lines = list(_changed_cells(collector, joined, key))
            count += len(lines)
            yield pl.DataFrame(lines, schema=schema, orient="row")

    write_file(
        target,
        changes,
        job=collector.job.name,
        schema=schema,
        frames=frames(),
        new_columns=len(CHANGE_COLUMNS),
        kind="changes",
    )
    return count


def _changed_cells(collector: Collector, joined: JoinedBatch, key: list[str]) -> Iterator[list[str | None]]:
    """Yield the changes of a batch, and record them as delivered."""
    job, columns = collector.job.name, collector.template.columns
    keys = joined.batch.frame.select(as_text(joined.batch.frame.get_column(name)) for name in key).rows()
    delivered: list[tuple[int, bytes, int]] = []
    statuses = joined.cells["enrich_status"]
    for index, (result, fingerprint, status) in enumerate(
        zip(joined.results, joined.batch.fingerprints, statuses, strict=True)
    ):
        if result is None or fingerprint is None or result.attempt_id is None:
            continue
        if status == RowStatus.FOUND and result.erased_ms is None:
            delivered.append((index, _delivery_key(keys[index], fingerprint), result.attempt_id))
    merged_columns = {name: collector.merge_column(joined, name) for name in collector.merged_columns}
    for index, previous_answer in collector.ledger.undelivered_rows(job, delivered):
        result, previous_fields = joined.results[index], _answer_fields(previous_answer)
        for name, path in columns.items():
            if name in merged_columns:
                old, new = as_text(joined.batch.frame.get_column(name))[index], merged_columns[name][index]
            else:
                old, new = to_cell(value_at(previous_fields, path)) or "", joined.cells[name][index] or ""
            if result is not None and new and new != old:
                at = None if result.settled_ms is None else iso_time(result.settled_ms)
                yield [*keys[index], name, old, new, result.provider, at]
    collector.ledger.mark_delivered(job, delivered)


def _delivery_key(cells: tuple[str, ...], fingerprint: bytes) -> bytes:
    return blake2b(json.dumps(cells).encode() + fingerprint, digest_size=16, person=b"enrich-delivered").digest()


def _answer_fields(answer: str | None) -> Mapping[str, Any]:
    return {} if answer is None else result_fields(json.loads(answer).get("data"))

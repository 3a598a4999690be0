"""Joins rows and answers into the output file, batch by batch; never talks to the API."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import orjson
import polars as pl

from enrich.api.answer import fields_of, is_blank, pick
from enrich.asking import INDEX_COLUMN, STATUS_COLUMNS, Batch
from enrich.errors import Refused
from enrich.job import Job
from enrich.model import MICROS, OPEN, RowStatus, Standing, State
from enrich.place import Place, is_dataset
from enrich.question import Question
from enrich.rows import Rows
from enrich.store.ledger import Ledger
from enrich.tables.cells import as_text
from enrich.tables.writing import guarded, runs_formulas, write


@dataclass(frozen=True, slots=True)
class Page:
    """A batch with what is known of the requests of its rows, None where nothing is, and its new cells, by column."""

    batch: Batch
    known: Sequence[Standing | None]
    cells: Mapping[str, pl.Series]

    def statuses(self) -> Counter[RowStatus]:
        """Count the rows by their status."""
        names, counts = self.cells["enrich_status"].value_counts()
        return Counter({RowStatus(name): count for name, count in zip(names, counts, strict=True)})


@dataclass(frozen=True, slots=True)
class Counted:
    """Rows by the status that they have in the output, and by each new column in which a value was found."""

    statuses: Counter[RowStatus] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Counted) -> Counted:
        """Add up what was counted of several parts."""
        total = Counted(self.statuses.copy(), self.hits.copy())
        # A sum of counters would forget the columns in which nothing was found.
        total.statuses.update(other.statuses)
        total.hits.update(other.hits)
        return total

    def add(self, page: Page) -> None:
        """Count the rows of a batch."""
        self.statuses.update(page.statuses())
        self.hits.update({name: cells.count() for name, cells in page.cells.items() if name not in STATUS_COLUMNS})


@dataclass(frozen=True, slots=True)
class Collector:
    """What the output is made of. `check` is called before every batch and may raise to give up."""

    ledger: Ledger
    job: Job
    question: Question
    rows: Rows
    check: Callable[[], None] = lambda: None

    def write(self, target: Place, *, partial: bool = True) -> Counted:
        """Write the output from the input and the ledger alone; return what is in it.

        Raises Refused when the input can't be read, the output can't be written, or rows are pending that is not to be
        `partial`.
        """
        counted = Counted()
        indexed = is_dataset(target)
        schema = output_schema(self.rows, self.question, indexed=indexed)
        write(
            target,
            self.job.output,
            job=self.job.name,
            schema=schema,
            frames=self._checked(counted, indexed=indexed, partial=partial, safely=runs_formulas(target)),
            new=len(schema) - len(self.rows.schema),
        )
        return counted

    def frames(self, counted: Counted, *, indexed: bool, safely: bool = False) -> Iterator[pl.DataFrame]:
        """Yield the rows of the output, and count them."""
        merged = self.merged
        added = [name for name in new_schema(self.question) if name not in merged]
        for page in self.pages():
            counted.add(page)
            batch = page.batch
            frame = batch.frame.with_columns(self.merge(page, name, safely=safely) for name in merged)
            first, height = batch.first, batch.frame.height
            index = [pl.int_range(first, first + height, eager=True).alias(INDEX_COLUMN)] if indexed else []
            yield frame.hstack([page.cells[name] for name in added] + index)

    def count(self) -> Counted:
        """Count what would be in the output."""
        counted = Counted()
        for page in self.pages():
            counted.add(page)
        return counted

    @property
    def merged(self) -> list[str]:
        """The job's columns that the input has already."""
        return [name for name in self.question.columns if name in self.rows.columns]

    def pages(self) -> Iterator[Page]:
        """Read the input once, each batch with its new cells."""
        for batch in self.rows.batches(self.question):
            self.check()
            known = self.ledger.standing(batch.asked())
            numbers = {batch.fingerprints[row.position - batch.first]: number for number, row in enumerate(known)}
            places = [numbers.get(fingerprint) for fingerprint in batch.fingerprints]
            cells = _new_cells(batch, known, pl.Series(places, dtype=pl.UInt32), self.question)
            yield Page(batch, [None if place is None else known[place] for place in places], cells)

    def _checked(self, counted: Counted, *, indexed: bool, partial: bool, safely: bool) -> Iterator[pl.DataFrame]:
        yield from self.frames(counted, indexed=indexed, safely=safely)
        self.ledger.check_files()  # before the old output is replaced
        pending = counted.statuses[RowStatus.PENDING]
        if pending and not partial:
            raise Refused(
                f"{pending:,} rows are pending: the output would not be complete",
                "enrich run goes on with them; --partial writes what is there",
            )

    def merge(self, page: Page, name: str, *, safely: bool = False) -> pl.Series:
        """Complete a column of the input; what was not found never blanks what is there."""
        # Without a name: polars would take one like `^a.*$` for a pattern.
        old = as_text(page.batch.frame.get_column(name)).alias("")
        new = page.cells[name].alias("")
        if safely:
            new = guarded(new)
        if self.job.model.merge == "fill_empty":
            new = new.set(old.str.strip_chars() != "", None)
        return new.fill_null(old).alias(name)


def output_schema(rows: Rows, question: Question, *, indexed: bool) -> dict[str, pl.DataType]:
    """Name the columns of the output, with their types; `indexed` adds the row's place in the input."""
    new = new_schema(question)
    # What is merged is text.
    old: dict[str, pl.DataType] = {name: new.get(name, kind) for name, kind in rows.schema.items()}
    return old | new | ({INDEX_COLUMN: pl.Int64()} if indexed else {})


def new_schema(question: Question) -> dict[str, pl.DataType]:
    """Name the new columns, with their types."""
    return {name: pl.String() for name in question.columns} | STATUS_COLUMNS


#: What is used of a standing as it is.
_STANDING = {
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
_WAITS = pl.col("state").is_in([State.PENDING.value, *(state.value for state in OPEN)])
_CAPPED = _WAITS & (pl.col("capped") == 1)


def _iso(column: str) -> pl.Expr:
    return pl.from_epoch(column, "ms").dt.strftime("%Y-%m-%dT%H:%M:%SZ")


def _new_cells(batch: Batch, known: Sequence[Standing], places: pl.Series, question: Question) -> dict[str, pl.Series]:
    """Make the new cells of a batch; `places` tells for each row which of what is known is its own."""
    paths = list(question.columns.values())
    values = [_values(row, paths) for row in known]
    # Another job with other columns may have asked: this job's columns decide here what is found.
    found = pl.Series("found", [None if row is None else any(row) for row in values], pl.Boolean)
    is_own = pl.col("position") == pl.int_range(batch.first, batch.first + len(places))
    of_rows = (
        _facts(known, found)
        .select(pl.all().gather(places))
        .with_columns(
            places.alias("place"),
            pl.Series("row_status", batch.statuses, pl.String),
            pl.Series("row_error", batch.errors, pl.String),
        )
        .with_columns(
            pl.coalesce("enrich_status", "row_status", pl.lit(RowStatus.PENDING.value)),
            pl.when(pl.col("place").is_null()).then("row_error").otherwise("enrich_error").alias("enrich_error"),
            # What an answer cost is shown once.
            pl.when(is_own).then("enrich_credits").alias("enrich_credits"),
        )
    )
    nothing = [None] * len(paths)
    cells = zip(*(row or nothing for row in values), strict=True) if values else ((),) * len(paths)
    new = {
        # Without its name: polars would take one like `^a.*$` for a pattern.
        name: pl.Series("", column, pl.String).gather(places).alias(name)
        for name, column in zip(question.columns, cells, strict=True)
    }
    return new | {name: of_rows.get_column(name) for name in STATUS_COLUMNS}


def _facts(known: Sequence[Standing], found: pl.Series) -> pl.DataFrame:
    """Make the status columns of each request, beside its position; `found` is null where there is no answer."""
    told = dict(zip(Standing._fields, zip(*known, strict=True), strict=True)) if known else {}
    facts = pl.DataFrame({name: pl.Series(told.get(name, ()), dtype=kind) for name, kind in _STANDING.items()})
    return facts.with_columns(found).select(
        "position",
        pl.when(_CAPPED)
        .then(pl.lit(RowStatus.FILTERED.value))
        .when(_WAITS)
        .then(pl.lit(RowStatus.PENDING.value))
        .when("found")
        .then(pl.lit(RowStatus.FOUND.value))
        .when(~pl.col("found"))
        .then(pl.lit(RowStatus.NOT_FOUND.value))
        .otherwise("state")
        .alias("enrich_status"),
        pl.when(_CAPPED)
        .then(pl.lit("capped: enough leads of its group are asked"))
        .when(~_WAITS & pl.col("erased_ms").is_not_null())
        .then("the answer was purged at " + _iso("erased_ms"))
        .otherwise("error")
        .alias("enrich_error"),
        # What waits has no answer yet, so none of its marks; the last attempt may be at the API.
        pl.when(~_WAITS).then("provider").alias("enrich_provider"),
        pl.when(~_WAITS & (pl.col("first") == 1)).then(pl.col("credits") / MICROS).alias("enrich_credits"),
        pl.when(~_CAPPED).then("task_id").alias("enrich_task_id"),
        pl.when(~_WAITS).then(_iso("settled_ms")).alias("enrich_at"),
    )


def _values(standing: Standing, paths: Sequence[str]) -> list[str | None] | None:
    """Take the job's columns out of an answer; None where there is none to judge."""
    if standing.answer is None or standing.state not in (State.FOUND, State.NOT_FOUND):
        return None
    return cell_texts(standing.answer, paths)


def cell_texts(answer: str, paths: Sequence[str]) -> list[str | None]:
    """Read values of an answer (JSON) as cells."""
    try:
        values = _picked(orjson.loads(answer), paths)
    except orjson.JSONDecodeError:
        values = None
    if values is None or not all(value is None or isinstance(value, str) for value in values):
        # More slowly, for every digit of a number counts, and what JSON has no word for.
        values = _picked(json.loads(answer), paths)
    return list(map(cell, values))


def _picked(task: Mapping[str, object], paths: Iterable[str]) -> list[object]:
    fields = fields_of(task.get("data"))
    return [fields[path] if path in fields else pick(fields, path) for path in paths]


def cell(value: object) -> str | None:
    """Write a value of the result as a cell: text as it is, anything else as JSON, nothing as null."""
    if is_blank(value):
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

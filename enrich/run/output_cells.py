"""The new cells of rows: those of the job's columns, read from answers, and those of the status."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import polars as pl

from enrich.databar.task_results import column_values, is_beside, is_blank, makes_match
from enrich.files.values import (
    JSON_TYPE,
    RawJson,
    as_text,
    json_column,
    quote_json,
    raw_json_cells,
    text_or_null,
    to_json,
)
from enrich.job.cell_text import blank_cells
from enrich.job.job import Job
from enrich.json_text import parse_json
from enrich.models import CAPPED_REASON, MICROS_PER_CREDIT, OPEN_STATES, RequestResult, ResultColumns, RowStatus, State
from enrich.rows.batches import STATUS_COLUMNS, RowBatch
from enrich.rows.template import RequestTemplate


class JoinedStep(msgspec.Struct, frozen=True):
    """A batch in one step: the results of its requests, and its new cells, by column.

    `name` is '' for a job without steps. `columns` maps the step's new columns to dotted paths. `places` has for each
    row the place of its result among the `request_results`; None: it has none.
    """

    name: str
    columns: Mapping[str, str]
    fingerprints: Sequence[bytes | None]
    request_results: ResultColumns
    places: Sequence[int | None]
    cells: dict[str, pl.Series]

    def results(self) -> list[RequestResult | None]:
        """Return the result of each row's request; None where there is none."""
        results = list(map(RequestResult._make, zip(*self.request_results.values(), strict=True)))
        return [None if place is None else results[place] for place in self.places]


class JoinedBatch(msgspec.Struct, frozen=True):
    """A batch with its new cells, by column, and what each step has found for it."""

    batch: RowBatch
    steps: Sequence[JoinedStep]
    cells: Mapping[str, pl.Series]


_NUMBERS_AS_WRITTEN = json.JSONDecoder(parse_int=RawJson, parse_float=RawJson, parse_constant=lambda _: None)


# Not tracked by the garbage collector: that would take as long as parsing.
class _UsualRow(msgspec.Struct, gc=False):
    result: dict[str, str | None]
    steps: msgspec.Raw


class _UsualAnswer(msgspec.Struct, gc=False):
    """The usual answer: one wrapper, whose result has only text. Other fields are checked, but not kept."""

    data: tuple[_UsualRow] | _UsualRow


_USUAL_ANSWERS = msgspec.json.Decoder(_UsualAnswer)


def answer_columns(answers: Iterable[str | None], paths: Sequence[str]) -> list[pl.Series]:
    """Read values of many answers (JSON) as columns of cells. None: there is no answer."""
    texts = list(answers)
    reads_beside = any(map(is_beside, paths))
    results = [None] * len(texts) if reads_beside else list(map(_usual_result, texts))
    columns = [[None if result is None else result.get(path) for result in results] for path in paths]
    for place in (place for place, result in enumerate(results) if result is None):
        if (text := texts[place]) is not None:
            for cells, cell in zip(columns, answer_cells(text, paths), strict=True):
                cells[place] = cell
    series = [pl.Series("", cells, pl.String) for cells in columns]
    return [cells.set(blank_cells(cells), None) for cells in series]


def _usual_result(answer: str | None) -> dict[str, str | None] | None:
    """Return the result of a usual answer, in a fifth of the time that it takes to parse all of it."""
    try:
        data = _USUAL_ANSWERS.decode(answer or "").data
    except (msgspec.DecodeError, RecursionError):
        return None
    return data.result if isinstance(data, _UsualRow) else data[0].result


def answer_cells(answer: str, paths: Sequence[str]) -> list[str | None]:
    """Read values of an answer (JSON) as cells. Raises JSONDecodeError if it is not a JSON object."""
    try:
        task = parse_json(answer)
    except RecursionError:
        task = None
    if not isinstance(task, dict):
        raise json.JSONDecodeError("not an object", "", 0)
    values = column_values(task.get("data"), paths)
    if not all(value is None or isinstance(value, str) for value in values):
        # The slower parser keeps numbers as they are written. NaN and Infinity, which JSON does not have, are no value.
        values = column_values(_NUMBERS_AS_WRITTEN.decode(answer).get("data"), paths)
    return list(map(to_cell, values))


def to_cell(value: object) -> str | None:
    """Write a value of the result as a cell: text unchanged, anything else as JSON, a blank as null."""
    if is_blank(value):
        return None
    return str(value) if isinstance(value, str) else to_json(value, ", ", ": ")


#: States in which the columns decide whether the answer is a match.
ANSWERED_STATES = (State.FOUND.value, State.NOT_FOUND.value)
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


def new_cells(
    batch: RowBatch, results: ResultColumns, result_indexes: pl.Series, template: RequestTemplate
) -> dict[str, pl.Series]:
    """Build the new cells of a batch. `result_indexes` has the index of each row's result; null: it has none."""
    names, paths = list(template.columns), list(template.columns.values())
    given = zip(results["answer"], results["state"], strict=True)
    answers = [answer if state in ANSWERED_STATES else None for answer, state in given]
    cells = answer_columns(answers, paths)
    # Another job with other columns may have sent the request. This job's columns decide whether it counts as found.
    matches = [pl.lit(column).is_not_null() for column, path in zip(cells, paths, strict=True) if makes_match(path)]
    has_answer = pl.Series([answer is not None for answer in answers], dtype=pl.Boolean)
    found = pl.when(has_answer).then(pl.any_horizontal(pl.lit(value=False), *matches)).alias("found")
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
        .with_columns(_provider(template))
    )
    # The cells have no name: polars would take one such as `^a.*$` for a pattern.
    new = {name: column.gather(result_indexes).alias(name) for name, column in zip(names, cells, strict=True)}
    return new | {name: status_cells.get_column(name) for name in STATUS_COLUMNS}


def _status_frame(results: ResultColumns, found: pl.Expr) -> pl.DataFrame:
    """Build the status columns of each request, with its position. `found` is null where there is no answer."""
    frame = pl.DataFrame({name: pl.Series(results[name], dtype=kind) for name, kind in _RESULT_COLUMNS.items()})
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
        .then(pl.lit(CAPPED_REASON))
        .when(~_IS_PENDING & pl.col("erased_ms").is_not_null())
        .then("the result was purged at " + _iso_time("erased_ms"))
        .otherwise("error")
        .alias("enrich_error"),
        # A pending request has no answer yet, so it has no provider, credits or time. Its last attempt may be running.
        pl.when(~_IS_PENDING).then("provider").alias("enrich_provider"),
        pl.when(~_IS_PENDING & (pl.col("first") == 1))
        .then((pl.col("credits") / MICROS_PER_CREDIT).round(6))  # polars' quotient alone is not the nearest number
        .alias("enrich_credits"),
        pl.when(~_IS_CAPPED).then("task_id").alias("enrich_task_id"),
        pl.when(~_IS_PENDING).then(_iso_time("settled_ms")).alias("enrich_at"),
    )


def _provider(template: RequestTemplate) -> pl.Expr:
    """Return the provider of each row: that of its answer, or for the matches of an enrichment its source."""
    provider, source = pl.col("enrich_provider"), template.source
    if source is None:
        return provider
    is_match = pl.col("enrich_status") == RowStatus.FOUND.value
    return pl.when(is_match).then(pl.lit(source)).otherwise(provider).alias("enrich_provider")


def merge_cells(job: Job, old: pl.Series, new: pl.Series) -> pl.Series:
    """Return a column of the input with the results filled in by the job's `merge`. Other cells keep their value.

    A JSON column stays JSON; any other becomes text.
    """
    # Unnamed: polars would take a name such as `^a.*$` for a pattern.
    name, old, new = old.name, old.alias(""), new.alias("")
    if job.model.merge == "fill_empty":
        new = new.set(~blank_cells(as_text(old), job.model.placeholders), None)
    if old.dtype != JSON_TYPE:
        return new.fill_null(text_or_null(old)).alias(name)
    pairs = zip(raw_json_cells(old), new, strict=True)
    return json_column([cell if found is None else quote_json(found) for cell, found in pairs]).alias(name)

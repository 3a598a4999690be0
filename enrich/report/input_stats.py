"""Statistics of the current input, joined with the answers as in the output."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import polars as pl

from enrich.files.values import as_text, text_frame
from enrich.job.cell_text import clean_cells
from enrich.models import RowStatus
from enrich.report.data import AnswerAge, GroupedHits, HitCounts, OutputRows, SkippedRows
from enrich.report.formatting import BLANK_LABEL
from enrich.run.collector import Collector, count_statuses
from enrich.run.output_cells import JoinedBatch, JoinedStep

#: Ages of answers: upper limits in full days (7.9 days are "1-7 days"), and the labels.
AGE_LIMITS = (0, 7, 30, 90, 365)
AGE_LABELS = ("today", "1-7 days", "8-30 days", "31-90 days", "91-365 days", "older")
DAY_MS = 86_400_000
#: Limit of the values of a column that are named, and the rows that must share one: a unique value may be a person.
MAX_NAMED_GROUPS, MIN_GROUP_ROWS = 15, 2
REST_LABEL = "all others"
#: A column with more different values than this is not grouped.
MAX_GROUP_VALUES = 100_000
#: Limit of the rows listed with `--with-rows`.
MAX_LEAD_ROWS = 1_000
ANSWERED_STATUSES = (RowStatus.FOUND.value, RowStatus.NOT_FOUND.value)
SKIPPED_STATUSES = (RowStatus.INVALID.value, RowStatus.FILTERED.value)
#: Limit of the reasons listed for skipped rows, and the reason where a row has none of its own.
MAX_SKIP_REASONS, CONDITION_REASON, OTHER_REASONS = 30, "left out by where or only_if_empty", "other reasons"


@dataclass(slots=True)
class InputStats:
    """Totals of the current input.

    `by_step` has the rows by status in each step ('' for a job without steps). `purged` counts rows whose answer was
    purged. `ungrouped` lists the columns with too many values for groups.
    """

    rows: int = 0
    statuses: Counter[RowStatus] = field(default_factory=Counter)
    by_step: defaultdict[str, Counter[RowStatus]] = field(default_factory=lambda: defaultdict(Counter))
    skipped: list[SkippedRows] = field(default_factory=list)
    columns: list[HitCounts] = field(default_factory=list)
    groups: list[GroupedHits] = field(default_factory=list)
    ages: list[AnswerAge] = field(default_factory=list)
    purged: int = 0
    ungrouped: list[str] = field(default_factory=list)
    leads: OutputRows | None = None

    def by_status(self) -> dict[str, int]:
        """Count the rows by every status."""
        return {status.value: self.statuses[status] for status in RowStatus}


def read_input_stats(collector: Collector, by: Sequence[str], now_ms: int, *, with_rows: bool) -> InputStats:
    """Read the input once. Raises EnrichError when it can't be read."""
    stats = InputStats()
    answered_rows, filled = (dict.fromkeys(collector.template.columns, 0) for _ in range(2))
    ages: Counter[tuple[str, str]] = Counter()
    grouped = {column: _GroupCounter(column) for column in by}
    skipped: Counter[tuple[str, str, str]] = Counter()
    leads: list[tuple[str, ...]] = []
    for joined in collector.joined_batches():
        status = joined.cells["enrich_status"]
        stats.rows += len(status)
        stats.statuses += count_statuses(joined.cells)
        for step in joined.steps:
            skipped.update(_skip_reasons(step))
            stats.by_step[step.name].update(count_statuses(step.cells))
        answered = status.is_in(ANSWERED_STATUSES)
        is_purged = pl.repeat(value=False, n=len(status), eager=True)
        for step in joined.steps:
            is_purged |= _purged_rows(step)
            ages.update(_answers_by_age(step, joined.batch.first_position, now_ms))
        stats.purged += int((answered & is_purged).sum())
        for name, rows in _rows_with_result(joined).items():
            answered_rows[name] += int(rows.sum())
            filled[name] += int((joined.cells[name].is_not_null() & rows).sum())
        for column, groups in grouped.items():
            groups.add(joined.batch.frame.get_column(column), status)
        if with_rows and len(leads) < MAX_LEAD_ROWS:
            leads += _output_cells(collector, joined).head(MAX_LEAD_ROWS - len(leads)).rows()
    stats.skipped = list(_most_frequent(skipped))
    stats.columns = [HitCounts(name, stats.rows, answered_rows[name], found) for name, found in filled.items()]
    for column, groups in grouped.items():
        grouped_hits = groups.result()
        if grouped_hits is None:
            stats.ungrouped.append(column)
        else:
            stats.groups.append(grouped_hits)
    stats.ages = [AnswerAge(label, ages[label, "found"], ages[label, "not_found"]) for label in AGE_LABELS]
    if with_rows:
        stats.leads = OutputRows(_output_columns(collector), leads, stats.rows - len(leads))
    return stats


def _purged_rows(step: JoinedStep) -> pl.Series:
    """Return which rows have a result that was purged."""
    erased = pl.Series(step.request_results["erased_ms"], dtype=pl.Int64).is_not_null()
    return erased.gather(pl.Series(step.places, dtype=pl.UInt32)).fill_null(value=False)


def _rows_with_result(joined: JoinedBatch) -> dict[str, pl.Series]:
    """Return, for each column, which rows have a result of a step that gives it, also while another step is pending."""
    rows: dict[str, pl.Series] = {}
    for step in joined.steps:
        has_result = step.cells["enrich_status"].is_in(ANSWERED_STATUSES) & ~_purged_rows(step)
        for name in step.columns:
            rows[name] = rows[name] | has_result if name in rows else has_result
    return rows


def _answers_by_age(step: JoinedStep, first_position: int, now_ms: int) -> dict[tuple[str, str], int]:
    """Count each answer in use once, by its age and its status (found or not_found)."""
    columns = {
        name: pl.Series(step.request_results[name], dtype=pl.Int64) for name in ("position", "first", "settled_ms")
    }
    status = step.cells["enrich_status"].gather(columns["position"] - first_position)
    answers = pl.DataFrame([*(column.alias(name) for name, column in columns.items()), status.alias("status")])
    counts = (
        answers.filter(
            pl.col("settled_ms").is_not_null() & (pl.col("first") == 1) & pl.col("status").is_in(ANSWERED_STATUSES)
        )
        .group_by((now_ms - pl.col("settled_ms")) // DAY_MS, "status")
        .len()
    )
    ages: Counter[tuple[str, str]] = Counter()
    for days, name, number in counts.rows():
        ages[AGE_LABELS[bisect_left(AGE_LIMITS, days)], name] += number
    return ages


def _skip_reasons(step: JoinedStep) -> dict[tuple[str, str, str], int]:
    """Count the rows of a batch for which a step sends no request, by step, status and reason."""
    rows = pl.DataFrame([step.cells[name].alias(name) for name in ("enrich_status", "enrich_error")])
    counts = rows.filter(pl.col("enrich_status").is_in(SKIPPED_STATUSES)).group_by(pl.all()).len()
    return {(step.name, status, reason or CONDITION_REASON): count for status, reason, count in counts.rows()}


def _most_frequent(skipped: Counter[tuple[str, str, str]]) -> Iterator[SkippedRows]:
    """Yield the most frequent reasons, and the others as one."""
    ranked = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    yield from (SkippedRows(*names, rows) for names, rows in ranked[:MAX_SKIP_REASONS])
    if rest := sum(rows for _, rows in ranked[MAX_SKIP_REASONS:]):
        yield SkippedRows("", "", OTHER_REASONS, rest)


@dataclass(slots=True)
class _GroupCounter:
    """Counts rows by the values of a column; stops when there are more than MAX_GROUP_VALUES."""

    column: str
    _parts: list[pl.DataFrame] | None = field(default_factory=list)

    def add(self, cells: pl.Series, status: pl.Series) -> None:
        if self._parts is None:
            return
        frame = pl.DataFrame({"value": clean_cells(as_text(cells)), "status": status})
        self._parts.append(
            frame.group_by("value").agg(
                pl.len().alias("rows"),
                pl.col("status").is_in(ANSWERED_STATUSES).sum().alias("answered"),
                (pl.col("status") == RowStatus.FOUND.value).sum().alias("found"),
            )
        )
        if sum(part.height for part in self._parts) > 2 * MAX_GROUP_VALUES:
            whole = self._merge_parts()
            self._parts = None if whole is None else [whole]

    def _merge_parts(self) -> pl.DataFrame | None:
        if not self._parts:
            return None
        whole = pl.concat(self._parts).group_by("value").agg(pl.exclude("value").sum())
        return whole if whole.height <= MAX_GROUP_VALUES else None

    def result(self) -> GroupedHits | None:
        """Return the largest groups by name and the others as one; None when there are too many values."""
        whole = self._merge_parts()
        if whole is None:
            return GroupedHits(self.column, ()) if self._parts == [] else None
        shared = whole.filter((pl.col("rows") >= MIN_GROUP_ROWS) | (pl.col("value") == ""))
        named = shared.sort(["rows", "value"], descending=[True, False]).head(MAX_NAMED_GROUPS)
        groups = [HitCounts(value or BLANK_LABEL, *counts) for value, *counts in named.rows()]
        if rest := whole.height - named.height:
            counts = ("rows", "answered", "found")
            groups.append(HitCounts(REST_LABEL, *(int(whole[name].sum()) - int(named[name].sum()) for name in counts)))
        return GroupedHits(self.column, groups, rest)


def _output_columns(collector: Collector) -> list[str]:
    merged = collector.merged_columns
    new = [name for name in collector.template.columns if name not in merged]
    return [*collector.job_input.columns, *new, "enrich_status"]


def _output_cells(collector: Collector, joined: JoinedBatch) -> pl.DataFrame:
    frame = joined.batch.frame.with_columns(collector.merge_column(joined, name) for name in collector.merged_columns)
    new = [joined.cells[name] for name in _output_columns(collector)[len(frame.columns) :]]
    return text_frame(frame.hstack(new))

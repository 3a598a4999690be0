"""Statistics of the current input, joined with the answers as in the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import polars as pl

from enrich.files.values import as_text, text_frame
from enrich.models import RowStatus
from enrich.report.data import AnswerAge, GroupedHits, HitCounts, OutputRows
from enrich.run.collector import Collector, JoinedBatch

#: Ages of answers: upper limit in days, and the label.
AGE_LABELS = ((1, "today"), (7, "1-7 days"), (30, "8-30 days"), (90, "31-90 days"), (365, "91-365 days"))
OLDER_LABEL = "older"
DAY_MS = 86_400_000
#: Limit of the values of a column that are named, and the rows that must share one: a unique value may be a person.
MAX_NAMED_GROUPS, MIN_GROUP_ROWS = 15, 2
BLANK_LABEL, REST_LABEL = "(blank)", "all others"
#: A column with more different values than this is not grouped.
MAX_GROUP_VALUES = 100_000
#: Limit of the rows listed with `--with-rows`.
MAX_LEAD_ROWS = 1_000
ANSWERED_STATUSES = (RowStatus.FOUND.value, RowStatus.NOT_FOUND.value)


@dataclass(slots=True)
class InputStats:
    """Totals of the current input.

    `purged` counts rows whose answer was purged. `ungrouped` lists the columns with too many values for groups.
    """

    rows: int = 0
    statuses: Counter[RowStatus] = field(default_factory=Counter)
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
    filled = dict.fromkeys(collector.template.columns, 0)
    ages: dict[str, Counter[str]] = {label: Counter() for label in (*(label for _, label in AGE_LABELS), OLDER_LABEL)}
    grouped = {column: _GroupCounter(column) for column in by}
    leads: list[tuple[str, ...]] = []
    for joined in collector.joined_batches():
        status = joined.cells["enrich_status"]
        stats.rows += len(status)
        stats.statuses += joined.count_statuses()
        answered = status.is_in(ANSWERED_STATUSES)
        purged = answered & pl.Series(
            [row is not None and row.erased_ms is not None for row in joined.results], dtype=pl.Boolean
        )
        stats.purged += int(purged.sum())
        for name in filled:
            filled[name] += int((joined.cells[name].is_not_null() & answered).sum())
        for settled_ms, what in _answers_in_use(joined):
            ages[_age_label(now_ms - settled_ms)][what] += 1
        for column, groups in grouped.items():
            groups.add(joined.batch.frame.get_column(column), status)
        if with_rows and len(leads) < MAX_LEAD_ROWS:
            leads += _output_cells(collector, joined).head(MAX_LEAD_ROWS - len(leads)).rows()
    answered_rows = sum(stats.statuses[RowStatus(name)] for name in ANSWERED_STATUSES) - stats.purged
    stats.columns = [HitCounts(name, stats.rows, answered_rows, found) for name, found in filled.items()]
    for column, groups in grouped.items():
        grouped_hits = groups.result()
        if grouped_hits is None:
            stats.ungrouped.append(column)
        else:
            stats.groups.append(grouped_hits)
    stats.ages = [AnswerAge(label, count["found"], count["not_found"]) for label, count in ages.items()]
    if with_rows:
        stats.leads = OutputRows(_output_columns(collector), leads, stats.rows - len(leads))
    return stats


def _answers_in_use(joined: JoinedBatch) -> Iterator[tuple[int, str]]:
    """Yield each answer in use once: when it was settled (ms), and its status (found or not_found)."""
    first = joined.batch.first_position
    for offset, (result, status) in enumerate(zip(joined.results, joined.cells["enrich_status"], strict=True)):
        if result is None or not result.first or result.position != first + offset:
            continue
        if status in ANSWERED_STATUSES and result.settled_ms is not None:
            yield result.settled_ms, status


def _age_label(age_ms: int) -> str:
    # Only full days count: 7.9 days are "1-7 days".
    days = age_ms // DAY_MS
    return "today" if days < 1 else next((label for max_days, label in AGE_LABELS[1:] if days <= max_days), OLDER_LABEL)


@dataclass(slots=True)
class _GroupCounter:
    """Counts rows by the values of a column; stops when there are more than MAX_GROUP_VALUES."""

    column: str
    _parts: list[pl.DataFrame] | None = field(default_factory=list)

    def add(self, cells: pl.Series, status: pl.Series) -> None:
        if self._parts is None:
            return
        frame = pl.DataFrame({"value": as_text(cells).alias("value").str.strip_chars(), "status": status})
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

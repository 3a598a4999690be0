"""The rows of the present input, joined with the answers, as the output would have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import polars as pl

from enrich.collector import Collector, Page
from enrich.model import RowStatus
from enrich.report.facts import Age, Groups, Hits, Rows
from enrich.tables.cells import as_text, text_frame

#: Ages of answers: at most so many days, and what is said then.
AGES = ((1, "today"), (7, "1-7 days"), (30, "8-30 days"), (90, "31-90 days"), (365, "91-365 days"))
OLDER = "older"
DAY_MS = 86_400_000
#: So many values of a column are told by name, and only those that so many rows share: a single one may be a person.
NAMED, SHARED = 15, 2
BLANK, REST = "(blank)", "all others"
#: A column of more different values than these makes no groups.
MOST_VALUES = 100_000
#: So many rows are told at most, when they are asked for.
MOST_ROWS = 1_000
ANSWERED = (RowStatus.FOUND.value, RowStatus.NOT_FOUND.value)


@dataclass(slots=True)
class Present:
    """What the present input comes to.

    Of `purged` rows nobody knows any more what the answer was; `ungrouped` columns have too many values for groups.
    """

    rows: int = 0
    statuses: Counter[RowStatus] = field(default_factory=Counter)
    columns: list[Hits] = field(default_factory=list)
    groups: list[Groups] = field(default_factory=list)
    ages: list[Age] = field(default_factory=list)
    purged: int = 0
    ungrouped: list[str] = field(default_factory=list)
    leads: Rows | None = None

    def by_status(self) -> dict[str, int]:
        """Count the rows by every status."""
        return {status.value: self.statuses[status] for status in RowStatus}


def read_present(collector: Collector, by: Sequence[str], now_ms: int, *, with_rows: bool) -> Present:
    """Read the input once. Raises EnrichError when it can't be read."""
    present = Present()
    known = dict.fromkeys(collector.question.columns, 0)
    ages: dict[str, Counter[str]] = {label: Counter() for label in (*(label for _, label in AGES), OLDER)}
    grouped = {column: _Grouped(column) for column in by}
    leads: list[tuple[str, ...]] = []
    for page in collector.pages():
        status = page.cells["enrich_status"]
        present.rows += len(status)
        present.statuses += page.statuses()
        answered = status.is_in(ANSWERED)
        purged = answered & pl.Series(
            [row is not None and row.erased_ms is not None for row in page.known], dtype=pl.Boolean
        )
        present.purged += int(purged.sum())
        for name in known:
            known[name] += int((page.cells[name].is_not_null() & answered).sum())
        for settled_ms, what in _in_use(page):
            ages[_age(now_ms - settled_ms)][what] += 1
        for column, groups in grouped.items():
            groups.add(page.batch.frame.get_column(column), status)
        if with_rows and len(leads) < MOST_ROWS:
            leads += _cells(collector, page).head(MOST_ROWS - len(leads)).rows()
    told = sum(present.statuses[RowStatus(name)] for name in ANSWERED) - present.purged
    present.columns = [Hits(name, present.rows, told, found) for name, found in known.items()]
    for column, groups in grouped.items():
        told_groups = groups.told()
        if told_groups is None:
            present.ungrouped.append(column)
        else:
            present.groups.append(told_groups)
    present.ages = [Age(label, count["found"], count["not_found"]) for label, count in ages.items()]
    if with_rows:
        present.leads = Rows(_shown(collector), leads, present.rows - len(leads))
    return present


def _in_use(page: Page) -> Iterator[tuple[int, str]]:
    """Yield when each answer that the rows show came (ms), once, and whether it found something."""
    first = page.batch.first
    for place, (standing, status) in enumerate(zip(page.known, page.cells["enrich_status"], strict=True)):
        if standing is None or not standing.first or standing.position != first + place:
            continue
        if status in ANSWERED and standing.settled_ms is not None:
            yield standing.settled_ms, status


def _age(age_ms: int) -> str:
    # 7.9 days are "1-7 days": a day counts when it is over.
    days = age_ms // DAY_MS
    return "today" if days < 1 else next((label for most, label in AGES[1:] if days <= most), OLDER)


@dataclass(slots=True)
class _Grouped:
    """Rows by the values of a column, as long as these are not too many."""

    column: str
    _parts: list[pl.DataFrame] | None = field(default_factory=list)

    def add(self, cells: pl.Series, status: pl.Series) -> None:
        if self._parts is None:
            return
        frame = pl.DataFrame({"value": as_text(cells).alias("value").str.strip_chars(), "status": status})
        self._parts.append(
            frame.group_by("value").agg(
                pl.len().alias("rows"),
                pl.col("status").is_in(ANSWERED).sum().alias("answered"),
                (pl.col("status") == RowStatus.FOUND.value).sum().alias("found"),
            )
        )
        if sum(part.height for part in self._parts) > 2 * MOST_VALUES:
            whole = self._merged()
            self._parts = None if whole is None else [whole]

    def _merged(self) -> pl.DataFrame | None:
        if not self._parts:
            return None
        whole = pl.concat(self._parts).group_by("value").agg(pl.exclude("value").sum())
        return whole if whole.height <= MOST_VALUES else None

    def told(self) -> Groups | None:
        """Tell the largest groups by their names, and the others as one; None when there are too many values."""
        whole = self._merged()
        if whole is None:
            return Groups(self.column, ()) if self._parts == [] else None
        shared = whole.filter((pl.col("rows") >= SHARED) | (pl.col("value") == ""))
        named = shared.sort(["rows", "value"], descending=[True, False]).head(NAMED)
        groups = [Hits(value or BLANK, *counts) for value, *counts in named.rows()]
        if rest := whole.height - named.height:
            counts = ("rows", "answered", "found")
            groups.append(Hits(REST, *(int(whole[name].sum()) - int(named[name].sum()) for name in counts)))
        return Groups(self.column, groups, rest)


def _shown(collector: Collector) -> list[str]:
    merged = collector.merged
    new = [name for name in collector.question.columns if name not in merged]
    return [*collector.rows.columns, *new, "enrich_status"]


def _cells(collector: Collector, page: Page) -> pl.DataFrame:
    frame = page.batch.frame.with_columns(collector.merge(page, name) for name in collector.merged)
    new = [page.cells[name] for name in _shown(collector)[len(frame.columns) :]]
    return text_frame(frame.hstack(new))

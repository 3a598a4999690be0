"""Counts how the input fills the params of a job, and which param leaves rows out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import polars as pl

from enrich.job.job import Job
from enrich.models import RowStatus
from enrich.rows.requests import RowBatch

#: A transform that leaves the name of a company's host, which is no person's data and may be shown.
_DOMAIN = "domain"
#: Below this share of sendable rows the user is warned.
MIN_SENDABLE_SHARE = 0.8


@dataclass(slots=True)
class ParamFill:
    """What the params have in the rows that were read.

    `rows` are those that the job does not leave out. `filled` counts the rows in which a param has a value, `missing`
    those that cannot be sent without it: a row that lacks two params counts for both. `examples` are domains.
    """

    job: Job
    rows: int = 0
    sendable: int = 0
    filled: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, batch: RowBatch) -> None:
        """Count the rows of a batch."""
        statuses = pl.Series(batch.statuses, dtype=pl.String)
        kept = statuses.is_null() | (statuses != RowStatus.FILTERED.value)
        self.rows += int(kept.sum())
        self.sendable += int(statuses.is_null().sum())
        self.missing.update(batch.missing)
        for name in self.job.model.params:
            value = batch.values[name].filter(kept)
            blank = value == ""
            self.filled[name] += int((~blank).sum())
            if _DOMAIN in self._transforms(name) and name not in self.examples and not blank.all():
                self.examples[name] = next(text for text in value if text)

    def _transforms(self, name: str) -> set[str]:
        """Return the transforms of all sources of a param."""
        return {transform for _, transforms in self.job.model.params[name].sources for transform in transforms}

    def mapping_lines(self) -> Iterator[str]:
        """Yield a line for each param: where its value comes from, and in how many rows it has one."""
        params = self.job.model.params
        for name, param in params.items():
            if param.value is not None:
                yield f"  {name} ← {param.value!r} (constant)"
                continue
            source = ", ".join(
                f"{column} ({', '.join(transforms)})" if transforms else column for column, transforms in param.sources
            )
            example = f"   e.g. {self.examples[name]}" if name in self.examples else ""
            yield f"  {name} ← {source}   {self.filled[name]:,} of {self.rows:,} filled{example}"

    def warning(self) -> str | None:
        """Return a warning when few rows can be sent; None: enough can."""
        if not self.rows or self.sendable >= MIN_SENDABLE_SHARE * self.rows:
            return None
        share = f"{self.sendable:,} of {self.rows:,} leads ({self.sendable / self.rows:.0%})"
        missing = [f"{name} is missing in {count:,}" for name, count in self.missing.most_common() if count]
        return f"only {share} can be sent: {', '.join(missing)}"

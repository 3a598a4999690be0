"""The part of the run summary about the steps of a job: the objects that `--json` prints, and their table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from enrich.job.job import Job
from enrich.ledger.step_results import StepTotals
from enrich.models import RowStatus, format_credits, to_credits
from enrich.run.collector import OutputCounts
from enrich.run.enrolled import EnrolledSteps

#: The statuses that have a column of their own in the table.
_SHOWN_STATUSES = (RowStatus.FOUND, RowStatus.NOT_FOUND, RowStatus.FILTERED)
_NAME_WIDTH = 12


def summarize_steps(
    job: Job, enrolled: EnrolledSteps, totals: Mapping[str, StepTotals], counts: OutputCounts | None
) -> list[dict[str, Any]]:
    """Return an object for each step of a job with steps. Rows are null where they were not counted."""
    steps = []
    for step in job.step_jobs:
        known, total = enrolled.by_step.get(step.step), totals.get(step.step, StepTotals())
        rows = None if counts is None else counts.by_step.get(step.step, Counter())
        steps.append(
            {
                "name": step.step,
                step.model.target.kind.value: step.model.target.id,
                "requests": None if known is None else sum(known.requests.values()),
                "submitted": total.submitted,
                "reused": None if known is None else known.reused,
                **{status.value: None if rows is None else rows.get(status, 0) for status in RowStatus},
                "credits_spent": to_credits(total.spent),
                "credits_unknown": total.unknown,
                "cost_per_hit": to_credits(round(total.spent / total.found)) if total.found else None,
                "max_credits": step.step_max_credits,
            }
        )
    return steps


def cost_per_lead(counts: OutputCounts | None, unknown: int) -> float | None:
    """Return all credits that the output shows, divided by its found rows. None: no row is found, or no steps.

    With `unknown` answers without a price in the ledger it is None, too.
    """
    if unknown or counts is None or not counts.by_step or not (found := counts.statuses[RowStatus.FOUND]):
        return None
    return to_credits(round(counts.credits.total() / found))


def format_steps(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of the steps: rows by status, requests sent, credits. At most 80 columns wide."""
    if not steps:
        return
    yield f"  {'step':<{_NAME_WIDTH}}{'found':>9}{'no match':>9}{'filtered':>9}{'other':>9}{'sent':>9}{'credits':>12}"
    for step in steps:
        name = step["name"] if len(step["name"]) < _NAME_WIDTH else step["name"][: _NAME_WIDTH - 2] + "…"
        shown = [step[status.value] for status in _SHOWN_STATUSES]
        others = [step[status.value] for status in RowStatus if status not in _SHOWN_STATUSES]
        cells = ["-" if number is None else f"{number:,}" for number in shown]
        cells.append("-" if None in others else f"{sum(others):,}")
        numbers = "".join(f"{cell:>9}" for cell in [*cells, f"{step['submitted']:,}"])
        yield f"  {name:<{_NAME_WIDTH}}{numbers}{format_credits(step['credits_spent']):>12}"

"""The run summary: the object that `--json` prints, and its text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict, replace

from enrich.exit_codes import ExitCode
from enrich.job.job import Job
from enrich.ledger.step_results import StepTotals
from enrich.models import RowStatus, format_credits, format_elapsed, pluralize, to_credits
from enrich.run.balance import PART_LABELS, ROUNDING_CREDITS
from enrich.run.collector import OutputCounts
from enrich.run.run_state import Enrolled
from enrich.run.terminal_text import Styler, display_width, pad, top_reasons, unstyled, wrap_parts

#: The keys in JSON, where they differ from our names.
JSON_KEYS = {"providers_not_reported": "providers_untold", "credits_unattributed": "credits_elsewhere"}


class RunSummary(Struct, frozen=True):
    """Counts and credits of a run; None: unknown. Rows are counted by their status in the output.

    `skipped` counts the `invalid` rows by reason. `paid_in_other_ledgers` counts the requests of a new ledger that
    another ledger in its folder has paid for. `credits_over_cap` is what was spent beyond the cap because prices rose
    while requests were running. `planned` is the expected cost when the input had been read (`min`, `likely`, `max`).
    `answers` counts the requests that the run settled, `columns` the rows that have a value, and `left_out` the rows
    that lack a param although a cell is not empty, by param and reason. `cost_per_hit` is the cost of what the run
    settled, divided by its matches. `providers` are those of its answers, in the order of their calls.
    `providers_not_reported` answers do not report their providers, and `credits_unattributed` belong to no provider.
    `difference` explains the change of the balance where it differs from what was spent. `steps` has the same counts
    for each step of a job with steps, and `cost_per_lead` is all credits that the output shows, divided by its found
    rows. It is None where the price of an answer is unknown.
    """

    job: str
    exit_code: int
    execution: int | None = None
    rows: int | None = None
    requests: int | None = None
    submitted: int = 0
    reused: int | None = None
    paid_in_other_ledgers: int = 0
    found: int | None = None
    not_found: int | None = None
    failed: int | None = None
    expired: int | None = None
    in_doubt: int | None = None
    invalid: int | None = None
    filtered: int | None = None
    pending: int | None = None
    skipped: Mapping[str, int] | None = None
    left_out: Mapping[str, Mapping[str, int]] | None = None
    credits_spent: float = 0.0
    credits_unknown: int = 0
    unconfirmed: int = 0
    credits_over_cap: float | None = None
    planned: Mapping[str, float | None] | None = None
    cost_per_hit: float | None = None
    answers: int | None = None
    columns: Mapping[str, int] | None = None
    steps: Sequence[Mapping[str, Any]] = ()
    cost_per_lead: float | None = None
    providers: Sequence[Mapping[str, Any]] = ()
    providers_not_reported: int | None = None
    credits_unattributed: float | None = None
    difference: Mapping[str, Any] | None = None
    balance_before: float | None = None
    balance_after: float | None = None
    polls: int = 0
    rate_limited: int = 0
    elapsed_s: float = 0.0
    output: str | None = None
    rejects: str | None = None
    rejected: int | None = None
    changes: str | None = None
    changed: int | None = None
    sandbox: bool = False
    notes: list[str] = []
    error: str | None = None
    hint: str | None = None

    def with_row_counts(self, counts: Mapping[RowStatus, int], columns: Mapping[str, int]) -> RunSummary:
        """Add the rows by status, and the rows that have a value in each new column."""
        by_status: dict[str, Any] = {status.value: counts.get(status, 0) for status in RowStatus}
        return replace(self, rows=sum(counts.values()), **by_status, columns=dict(columns))

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        values = asdict(self)
        if not self.steps:
            del values["steps"], values["cost_per_lead"]
        shown = {name: value for name, value in values.items() if name not in ("error", "hint") or value is not None}
        return {JSON_KEYS.get(name, name): value for name, value in shown.items()}


#: The statuses in the short summary, in this order: the word for their rows, and their color.
STATUS_WORDS = {
    RowStatus.NOT_FOUND: ("no match", ""),
    RowStatus.INVALID: ("skipped", ""),
    RowStatus.FILTERED: ("filtered", ""),
    RowStatus.FAILED: ("failed", "red"),
    RowStatus.EXPIRED: ("expired", "red"),
    RowStatus.IN_DOUBT: ("unconfirmed", "red"),
    RowStatus.PENDING: ("pending", "yellow"),
}
#: Exit codes of a run that did what it was started for.
COMPLETED_CODES = (ExitCode.OK, ExitCode.SOME_FAILED)
#: Smallest and largest width of the first column of the details.
MIN_LABEL_WIDTH, MAX_LABEL_WIDTH = 12, 14
#: Width of the last column in 80 columns.
MAX_REMARK_WIDTH = 44


def format_summary(summary: RunSummary, style: Styler = unstyled) -> list[str]:
    """Return the lines of the summary. Only paths can make a line longer than 80 columns."""
    return [
        *wrap_parts(_headline_parts(summary, style), "  "),
        *wrap_parts(_count_parts(summary, style), " · ", indent="  "),
        *_notable_lines(summary),
        *format_steps(summary.steps),
        *_file_lines(summary),
    ]


def format_details(summary: RunSummary, style: Styler = unstyled) -> list[str]:
    """Return the lines about columns, requests, balance, polls and providers, each part after an empty line."""
    longest = max(map(display_width, summary.columns or ()), default=0)
    formatter = _DetailsFormatter(summary, style, min(max(longest + 1, MIN_LABEL_WIDTH), MAX_LABEL_WIDTH))
    parts = [list(part) for part in (formatter.column_lines(), formatter.cost_lines(), formatter.provider_lines())]
    return [line for part in parts if part for line in ("", *part)]


def _headline_parts(summary: RunSummary, style: Styler) -> Iterator[str]:
    """Yield the parts of the first line: leads, credits, cost of a match, time."""
    completed = summary.exit_code in COMPLETED_CODES
    mark = style("✓", "green") if completed else style("!", "yellow")
    sandbox = "SANDBOX " if summary.sandbox else ""
    if summary.found is None:
        leads = f"stopped after {pluralize(summary.answers or 0, 'result')}"
    elif not summary.rows:
        leads = "the input has no leads"
    else:
        share = f" ({summary.found / summary.rows:.0%})"
        leads = f"{summary.found:,} of {pluralize(summary.rows, 'lead')} enriched{share}"
    yield f"{mark} {style(sandbox + leads, 'bold')}"
    if summary.execution is None:  # written from the ledger, without a run
        return
    if not (summary.submitted or summary.unconfirmed or summary.answers):
        yield "nothing sent"
    else:
        at_least = "at least " if summary.credits_unknown or summary.unconfirmed else ""
        yield f"{at_least}{format_credits(summary.credits_spent)} credits"
        if summary.cost_per_lead is not None:
            yield f"{format_credits(summary.cost_per_lead)} per lead"
        elif summary.cost_per_hit is not None:
            yield f"{format_credits(summary.cost_per_hit)} per match"
    yield format_elapsed(summary.elapsed_s)


def _count_parts(summary: RunSummary, style: Styler) -> Iterator[str]:
    """Yield the number of leads in each status but `found`."""
    for status, (word, color) in STATUS_WORDS.items():
        if count := getattr(summary, status.value):
            reasons = f" ({top_reasons(summary.skipped)})" if status is RowStatus.INVALID and summary.skipped else ""
            yield style(f"{count:,} {word}{reasons}", color)


def _notable_lines(summary: RunSummary) -> Iterator[str]:
    """Yield what rarely happens and concerns the bill."""
    if summary.credits_unknown:
        yield f"  {pluralize(summary.credits_unknown, 'result')} of unknown price"
    if summary.credits_over_cap:
        yield f"  {format_credits(summary.credits_over_cap)} credits over the cap: a price rose during the run"
    if summary.paid_in_other_ledgers:
        yield f"  {pluralize(summary.paid_in_other_ledgers, 'request')} also paid in another ledger of this folder"


def _file_lines(summary: RunSummary) -> Iterator[str]:
    entries = (
        (summary.output, ""),
        (summary.rejects, f" ({pluralize(summary.rejected or 0, 'rejected lead')})"),
        (summary.changes, f" ({pluralize(summary.changed or 0, 'change')})"),
    )
    yield from (f"  → {path}{count}" for path, count in entries if path is not None)
    if summary.output is None:
        yield "  No output written. An earlier output file is unchanged."


class _DetailsFormatter(Struct, frozen=True):
    """Formats the details of a summary. `label_width` is the width of the first column."""

    summary: RunSummary
    style: Styler
    label_width: int

    def column_lines(self) -> Iterator[str]:
        answered = (self.summary.found or 0) + (self.summary.not_found or 0)
        remark = f"of {pluralize(answered, 'lead')} with a result"
        if self.summary.steps:  # a row may be pending in one step and answered in another
            answered = self.summary.rows or 0
            remark = f"of {pluralize(answered, 'lead')}"
        for name, count in (self.summary.columns or {}).items() if answered else ():
            yield self._format_line(name, f"{count:,}", _percentage(count, answered), remark)
            remark = ""
        rows = self.summary.rows or 0
        for param, counts in (self.summary.left_out or {}).items():
            for kind, count in counts.items():
                remark = pad(f"{param} not used: {kind}", MAX_REMARK_WIDTH).rstrip()
                yield self._format_line("", f"{count:,}", _percentage(count, rows), remark)

    def cost_lines(self) -> Iterator[str]:
        summary = self.summary
        if summary.requests is not None:
            remark = f"run {summary.execution}" if summary.execution is not None else ""
            yield self._format_line("requests", f"{summary.requests:,}", "", remark)
        yield self._format_line("sent", f"{summary.submitted:,}", "", f"{summary.reused or 0:,} already enriched")
        yield self._format_line("credits", format_credits(summary.credits_spent), "", _planned_remark(summary.planned))
        if summary.balance_before is not None and summary.balance_after is not None:
            was = f"was {format_credits(summary.balance_before)}"
            yield self._format_line("balance", format_credits(summary.balance_after), "", was)
            for amount, label in _difference_parts(summary.difference) if summary.difference else ():
                yield self._format_line("", amount, "", label)
        polls = f"{summary.polls / summary.answers:.1f} per request" if summary.answers else ""
        yield self._format_line("polls", f"{summary.polls:,}", "", polls)
        if summary.rate_limited:
            yield self._format_line("rate-limited", f"{summary.rate_limited:,}", "", "responses 429")

    def provider_lines(self) -> Iterator[str]:
        summary, width = self.summary, self.label_width + 4
        if not summary.providers:
            return
        head = f"{'requests':>9}{'matches':>9}{'rate':>8}{'credits':>12}{'/ match':>9}"
        yield self.style(f"  {'provider':<{width}}{head}", "bold")
        for each in summary.providers:
            requests, name = each["asked"] + each["presumed"], f"  {pad(each['name'], width)}"
            paid = f"{format_credits(each['credits']):>12}"
            if each["verifies"]:
                yield f"{name}{requests:>9,}{'':>9}{'checks':>8}{paid}"
            else:
                cost = "-" if each["cost_per_hit"] is None else format_credits(each["cost_per_hit"])
                yield f"{name}{requests:>9,}{each['found']:>9,}{_percentage(each['found'], requests):>8}{paid}{cost:>9}"
        if summary.credits_unattributed:
            yield f"  {'unattributed':<{width}}{'':>26}{format_credits(summary.credits_unattributed):>12}"
        if inferred := max(each["presumed"] for each in summary.providers):
            yield f"  {pluralize(inferred, 'result')} without steps: every provider is inferred to be called"
        if summary.providers_not_reported:
            yield f"  {pluralize(summary.providers_not_reported, 'result')} without providers: not reported by the API"

    def _format_line(self, name: str, number: str, share: str, remark: str) -> str:
        return f"  {pad(name, self.label_width)}{number:>11} {share:>6}  {remark}".rstrip()


def _planned_remark(planned: Mapping[str, float | None] | None) -> str:
    """Return the remark on the credits: the planned cost."""
    if planned is None or planned["max"] == 0:
        return "spent in this run"
    most = "at an unknown price" if planned["max"] is None else f"at most {format_credits(planned['max'])}"
    likely = "" if planned["likely"] is None else f"{format_credits(planned['likely'])}, "
    return f"planned {likely}{most}"


def _difference_parts(difference: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the parts of the balance's difference: amount and label."""
    for name, (noun, words) in PART_LABELS.items():
        part = difference[name]
        if part["number"]:
            exact = abs(part["most"] - part["least"]) < ROUNDING_CREDITS
            up_to = "" if exact else f", or {format_credits(part['least'])}"
            yield format_credits(part["most"]), f"{pluralize(part['number'], noun)}{words}{up_to}"
    if unexplained := difference["unexplained"]:
        direction = "missing" if unexplained > 0 else "added"
        yield format_credits(abs(unexplained)), f"{direction}, not explained: enrich reconcile JOB"


def _percentage(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


#: The statuses that have a column of their own in the table.
_SHOWN_STATUSES = (RowStatus.FOUND, RowStatus.NOT_FOUND, RowStatus.FILTERED)
_NAME_WIDTH = 12


def summarize_steps(
    job: Job, enrolled: Mapping[str, Enrolled], totals: Mapping[str, StepTotals], counts: OutputCounts | None
) -> list[dict[str, Any]]:
    """Return an object for each step of a job with steps. Rows are null where they were not counted."""
    steps = []
    for step in job.step_jobs:
        known, total = enrolled.get(step.step), totals.get(step.step, StepTotals())
        rows = None if counts is None else counts.by_step.get(step.step, Counter())
        steps.append(
            {
                "name": step.step,
                step.model.target.kind.value: step.model.target.id,
                "requests": None if known is None else known.requests.total(),
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

    With `unknown` answers without a price in the ledger, or answers of bulk tasks, it is None, too.
    """
    if counts is None or not counts.by_step or unknown or counts.unpriced.total():
        return None
    found = counts.statuses[RowStatus.FOUND]
    return to_credits(round(counts.credits.total() / found)) if found else None


def format_steps(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of the steps, at most 80 columns wide: rows by status, requests sent, credits. Then failures."""
    if not steps:
        return
    yield f"  {'step':<{_NAME_WIDTH}}{'found':>9}{'no match':>9}{'filtered':>9}{'other':>9}{'sent':>9}{'credits':>12}"
    for step in steps:
        shown = [step[status.value] for status in _SHOWN_STATUSES]
        others = [step[status.value] for status in RowStatus if status not in _SHOWN_STATUSES]
        cells = ["-" if number is None else f"{number:,}" for number in shown]
        cells.append("-" if None in others else f"{sum(others):,}")
        numbers = "".join(f"{cell:>9}" for cell in [*cells, f"{step['submitted']:,}"])
        yield f"  {pad(step['name'], _NAME_WIDTH)}{numbers}{format_credits(step['credits_spent']):>12}"
    for step in steps:
        if counts := [f"{step[name]:,} {name}" for name in (RowStatus.FAILED, RowStatus.EXPIRED) if step[name]]:
            yield f"  {step['name']}: {', '.join(counts)}"

"""The run summary: the object that `--json` prints, and its text."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from enrich.databar.client import Client
from enrich.errors import ApiCallFailed
from enrich.ledger.ledger import Ledger
from enrich.ledger.writer import LedgerWriter
from enrich.models import RowStatus, State, format_credits, format_duration, pluralize, read_balance, to_credits
from enrich.run.balance import PART_LABELS, ROUNDING_CREDITS, explain_balance
from enrich.run.preflight import Preflight
from enrich.run.provider_stats import ProviderStats, ProviderTotals, load_waterfalls
from enrich.run.signals import SignalHandler
from enrich.run.state import RunState


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Counts and credits of a run; None: unknown. Rows are counted by their status in the output.

    `credits_over_cap` is what was spent beyond the cap because prices rose while requests were running. `planned` is
    the expected cost when the input had been read (`min`, `likely`, `max`). `answers` counts the requests that the run
    settled, `columns` the rows that have a value. `cost_per_hit` is the cost of what the run settled, divided by its
    matches. `providers` are those of its answers, in the order of their calls. `providers_untold` answers do not report
    their providers, and `credits_elsewhere` were paid to no provider that an answer names. `difference` explains the
    change of the balance where it differs from what was spent.
    """

    job: str
    exit_code: int
    execution: int | None = None
    rows: int | None = None
    requests: int | None = None
    submitted: int = 0
    reused: int | None = None
    found: int | None = None
    not_found: int | None = None
    failed: int | None = None
    expired: int | None = None
    in_doubt: int | None = None
    invalid: int | None = None
    filtered: int | None = None
    pending: int | None = None
    credits_spent: float = 0.0
    credits_unknown: int = 0
    credits_over_cap: float | None = None
    planned: Mapping[str, float | None] | None = None
    cost_per_hit: float | None = None
    answers: int | None = None
    columns: Mapping[str, int] | None = None
    providers: Sequence[Mapping[str, Any]] = ()
    providers_untold: int | None = None
    credits_elsewhere: float | None = None
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
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    hint: str | None = None

    def with_row_counts(self, counts: Mapping[RowStatus, int], columns: Mapping[str, int]) -> RunSummary:
        """Add the rows by status, and the rows that have a value in each new column."""
        return replace(
            self,
            found=counts.get(RowStatus.FOUND, 0),
            not_found=counts.get(RowStatus.NOT_FOUND, 0),
            failed=counts.get(RowStatus.FAILED, 0),
            expired=counts.get(RowStatus.EXPIRED, 0),
            in_doubt=counts.get(RowStatus.IN_DOUBT, 0),
            invalid=counts.get(RowStatus.INVALID, 0),
            filtered=counts.get(RowStatus.FILTERED, 0),
            pending=counts.get(RowStatus.PENDING, 0),
            columns=dict(columns),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in ("error", "hint") or value is not None}


#: After a signal, the answers of a run are read again only up to this many, so that the exit is quick.
MAX_READ_WHEN_INTERRUPTED = 100_000
#: Seconds to wait for the balance. After that it is left out.
BALANCE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RunFinisher:
    """Completes the summary of a run, and ends the run in the ledger."""

    run_state: RunState
    preflight: Preflight
    client: Client
    ledger_writer: LedgerWriter
    signals: SignalHandler

    async def finish_run(self, summary: RunSummary) -> RunSummary:
        """Complete a summary that has the row counts, and record the end of the run."""
        run_state, clock = self.run_state, self.run_state.clock
        counters = run_state.counters
        await self.ledger_writer.submit(Ledger.recover, clock.now_ms())
        totals = await self.ledger_writer.submit(Ledger.execution, run_state.execution_id)
        before = self.preflight.balance
        after = await self._balance() if counters.settled or counters.submitted else before
        spent, matches = totals["spent"], counters.settled.get(State.FOUND, 0)
        summary = replace(
            summary,
            execution=run_state.execution_id,
            submitted=totals["submitted"],
            answers=sum(counters.settled.values()),
            credits_spent=to_credits(spent),
            credits_unknown=totals["unknown"],
            cost_per_hit=to_credits(round(spent / matches)) if matches else None,
            balance_before=to_credits(before),
            balance_after=to_credits(after),
            polls=counters.polls,
            rate_limited=counters.rate_limited,
        )
        summary = replace(
            summary, **await self._provider_fields(summary), difference=await self._balance_change(before, after, spent)
        )
        summary = await self._with_overrun(summary, totals["cap"], spent)
        await self.ledger_writer.submit(
            Ledger.end_execution, run_state.execution_id, summary.exit_code, summary.as_json(), clock.now_ms(), after
        )
        return summary

    async def _with_overrun(self, summary: RunSummary, cap: int | None, spent: int) -> RunSummary:
        """Add by how much the cap was exceeded, if prices that rose while requests were running are the reason."""
        if cap is None or spent <= cap:
            return summary
        number, price_rise = await self.ledger_writer.submit(Ledger.cost_overruns, self.run_state.execution_id)
        if not number:
            return summary
        overrun = min(spent - cap, price_rise)
        note = (
            f"the credits cap was overrun by {format_credits(to_credits(overrun))}: {pluralize(number, 'task')} cost "
            f"{format_credits(to_credits(price_rise))} more than the highest price when they were sent"
        )
        return replace(summary, credits_over_cap=to_credits(overrun), notes=[*summary.notes, note])

    async def _balance(self) -> int | None:
        """Fetch the balance after the run. Returns None without a request when the run was stopped, or on failure."""
        if self.run_state.stop_polling.is_set() or self.signals.received is not None:
            return None
        try:
            async with asyncio.timeout(BALANCE_TIMEOUT_S):
                return read_balance((await self.client.get_user()).balance)
        except (ApiCallFailed, TimeoutError):
            return None

    async def _provider_fields(self, summary: RunSummary) -> dict[str, Any]:
        """Return calls, matches and credits per provider, by the answers of this run."""
        totals = await self.ledger_writer.submit(self._read_provider_totals, summary) if summary.answers else None
        if totals is None:
            return {}
        return {
            "providers": [each.as_json() for each in totals.providers],
            "providers_untold": totals.not_reported,
            "credits_elsewhere": to_credits(totals.unattributed),
        }

    def _read_provider_totals(self, ledger: Ledger, summary: RunSummary) -> ProviderTotals | None:
        """Read the answers of this run; None when a signal came and there are too many."""
        stats = ProviderStats(load_waterfalls(ledger.waterfalls()))
        for settled in ledger.settled_attempts(summary.job, summary.execution):
            if self.signals.received is not None and (summary.answers or 0) > MAX_READ_WHEN_INTERRUPTED:
                return None
            stats.add(settled)
        return stats.totals()

    async def _balance_change(self, before: int | None, after: int | None, spent: int) -> dict[str, Any] | None:
        """Explain the change of the balance. When it equals what was spent, returns None and reads nothing."""
        if before is None or after is None:
            return None
        if abs(to_credits(before - after - spent)) < ROUNDING_CREDITS:
            return None
        movements = await self.ledger_writer.submit(Ledger.credit_movements, self.run_state.execution_id)
        return asdict(explain_balance(self.run_state.execution_id, before, after, movements))


#: Remarks on rows of a status.
STATUS_REMARKS = {
    RowStatus.FAILED: "the API says why: see enrich_error",
    RowStatus.EXPIRED: "gone before they were fetched",
    RowStatus.IN_DOUBT: "perhaps charged",
    RowStatus.INVALID: "never sent: see enrich_error",
    RowStatus.PENDING: "the next run goes on",
}
#: Terminal colors of the statuses.
STATUS_COLORS = {
    RowStatus.FOUND: "green",
    RowStatus.FAILED: "red",
    RowStatus.EXPIRED: "red",
    RowStatus.IN_DOUBT: "red",
    RowStatus.PENDING: "yellow",
}
#: Smallest and largest width of the first column.
MIN_LABEL_WIDTH, MAX_LABEL_WIDTH = 12, 14

#: Formats a text in a color, or in `bold`.
Styler = Callable[[str, str], str]


def _unstyled(text: str, _: str) -> str:
    return text


def format_summary(summary: RunSummary, style: Styler = _unstyled) -> list[str]:
    """Return the lines of the summary. Only paths can make a line longer than 80 columns."""
    longest = max(map(_display_width, summary.columns or ()), default=0)
    formatter = _SummaryFormatter(summary, style, min(max(longest + 1, MIN_LABEL_WIDTH), MAX_LABEL_WIDTH))
    parts = [
        list(part)
        for part in (
            formatter.row_lines(),
            formatter.column_lines(),
            formatter.cost_lines(),
            formatter.provider_lines(),
            formatter.file_lines(),
        )
    ]
    return [formatter.title_line(), *(line for part in parts if part for line in ("", *part))]


@dataclass(frozen=True, slots=True)
class _SummaryFormatter:
    """Formats the parts of a summary. `label_width` is the width of the first column."""

    summary: RunSummary
    style: Styler
    label_width: int

    def title_line(self) -> str:
        summary = self.summary
        requests = "" if summary.requests is None else f", {pluralize(summary.requests, 'distinct request')}"
        execution = "" if summary.execution is None else f" (execution {summary.execution})"
        return self.style(f"{summary.job}: {pluralize(summary.rows or 0, 'row')}{requests}", "bold") + execution

    def row_lines(self) -> Iterator[str]:
        for status in RowStatus:
            if count := getattr(self.summary, status.value):
                share = _percentage(count, self.summary.rows or 0)
                yield self._format_line(
                    status.value, f"{count:,}", share, STATUS_REMARKS.get(status, ""), STATUS_COLORS.get(status, "")
                )

    def column_lines(self) -> Iterator[str]:
        answered = (self.summary.found or 0) + (self.summary.not_found or 0)
        remark = f"of {pluralize(answered, 'answered row')}"
        for name, count in (self.summary.columns or {}).items() if answered else ():
            yield self._format_line(name, f"{count:,}", _percentage(count, answered), remark)
            remark = ""

    def cost_lines(self) -> Iterator[str]:
        summary = self.summary
        yield self._format_line(
            "submitted", f"{summary.submitted:,}", "", f"{summary.reused or 0:,} reused from the ledger"
        )
        yield self._format_line("credits", format_credits(summary.credits_spent), "", _planned_remark(summary.planned))
        if summary.cost_per_hit is not None:
            yield self._format_line("per hit", format_credits(summary.cost_per_hit))
        if summary.credits_over_cap:
            yield self._format_line("over cap", format_credits(summary.credits_over_cap), "", "a price rose in flight")
        if summary.credits_unknown:
            yield self._format_line("unpriced", f"{summary.credits_unknown:,}", "", "answers of unknown price")
        if summary.balance_before is not None and summary.balance_after is not None:
            was = f"was {format_credits(summary.balance_before)}"
            yield self._format_line("balance", format_credits(summary.balance_after), "", was)
            for amount, label in _difference_parts(summary.difference) if summary.difference else ():
                yield self._format_line("", amount, "", label)
        polls_per_request = f"{summary.polls / summary.answers:.1f} a request; " if summary.answers else ""
        yield self._format_line(
            "polls", f"{summary.polls:,}", "", f"{polls_per_request}{pluralize(summary.rate_limited, 'answer')} 429"
        )
        yield self._format_line("time", format_duration(summary.elapsed_s))

    def provider_lines(self) -> Iterator[str]:
        summary, width = self.summary, self.label_width + 4
        if not summary.providers:
            return
        head = f"{'asked':>9}{'found':>9}{'rate':>8}{'credits':>12}{'a hit':>9}"
        yield self.style(f"  {'provider':<{width}}{head}", "bold")
        for each in summary.providers:
            asked, name = each["asked"] + each["presumed"], f"  {_pad(each['name'], width)}"
            paid = f"{format_credits(each['credits']):>12}"
            if each["verifies"]:
                yield f"{name}{asked:>9,}{'':>9}{'checks':>8}{paid}"
            else:
                hit = "-" if each["cost_per_hit"] is None else format_credits(each["cost_per_hit"])
                yield f"{name}{asked:>9,}{each['found']:>9,}{_percentage(each['found'], asked):>8}{paid}{hit:>9}"
        if summary.credits_elsewhere:
            yield f"  {'of no provider':<{width}}{'':>26}{format_credits(summary.credits_elsewhere):>12}"
        if inferred := max(each["presumed"] for each in summary.providers):
            yield f"  {pluralize(inferred, 'answer')} without steps: all of the waterfall were asked, presumably"
        if summary.providers_untold:
            says = "more does not say" if summary.providers_untold == 1 else "more do not say"
            yield f"  {pluralize(summary.providers_untold, 'answer')} {says} who was asked"

    def file_lines(self) -> Iterator[str]:
        summary = self.summary
        entries = (
            ("output", summary.output, ""),
            ("rejects", summary.rejects, f" ({pluralize(summary.rejected or 0, 'row')})"),
            ("changes", summary.changes, f" ({pluralize(summary.changed or 0, 'change')})"),
        )
        yield from (f"  {kind:<{self.label_width}}  {path}{count}" for kind, path, count in entries if path is not None)

    def _format_line(self, name: str, number: str, share: str = "", remark: str = "", color: str = "") -> str:
        label = self.style(_pad(name, self.label_width), color)
        return f"  {label}{number:>11} {share:>6}  {remark}".rstrip()


def _planned_remark(planned: Mapping[str, float | None] | None) -> str:
    """Return the remark on the credits: the planned cost."""
    if planned is None or planned["max"] == 0:
        return "spent in this execution"
    most = "at an unknown price" if planned["max"] is None else f"at most {format_credits(planned['max'])}"
    likely = "" if planned["likely"] is None else f"{format_credits(planned['likely'])}, "
    return f"planned {likely}{most}"


def _difference_parts(difference: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the parts of the balance's difference: amount and label."""
    for name, label in PART_LABELS.items():
        part = difference[name]
        if part["number"]:
            exact = abs(part["most"] - part["least"]) < ROUNDING_CREDITS
            up_to = "" if exact else f", or {format_credits(part['least'])}"
            yield format_credits(part["most"]), f"{part['number']:,} {label}{up_to}"
    if unexplained := difference["unexplained"]:
        direction = "went elsewhere" if unexplained > 0 else "came in"
        yield format_credits(abs(unexplained)), f"{direction}, not explained: enrich reconcile"


def _pad(name: str, width: int) -> str:
    """Fit a name into its column of a terminal. Characters that would move the cursor are replaced."""
    # Combining accents take no width, so the number of characters is limited, too.
    clean = "".join(letter if letter.isprintable() else " " for letter in name[: 4 * width])
    if _display_width(clean) >= width or len(name) > len(clean):
        while _display_width(clean) > width - 2:
            clean = clean[:-1]
        clean += "…"
    return clean + " " * (width - _display_width(clean))


def _display_width(name: str) -> int:
    """Return how many terminal columns a name takes: ideographs and emoji two, accents on their own none."""
    return sum(map(_character_width, name))


def _character_width(letter: str) -> int:
    if unicodedata.category(letter) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _percentage(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"

"""The receipt as a person reads it, on a terminal or in a message: aligned, in lines of at most 80 columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from enrich.difference import PART_LABELS, ROUNDING_CREDITS
from enrich.model import RowStatus, format_credits, format_duration, pluralize
from enrich.receipt import RunSummary

#: What is to be said of rows of a status.
STATUS_REMARKS = {
    RowStatus.FAILED: "the API says why: see enrich_error",
    RowStatus.EXPIRED: "gone before they were fetched",
    RowStatus.IN_DOUBT: "perhaps charged",
    RowStatus.INVALID: "never sent: see enrich_error",
    RowStatus.PENDING: "the next run goes on",
}
#: The colours of a terminal that say how good a status is.
STATUS_COLORS = {
    RowStatus.FOUND: "green",
    RowStatus.FAILED: "red",
    RowStatus.EXPIRED: "red",
    RowStatus.IN_DOUBT: "red",
    RowStatus.PENDING: "yellow",
}
#: The narrowest and the widest first column.
MIN_LABEL_WIDTH, MAX_LABEL_WIDTH = 12, 14

#: Puts a text into a colour, or into `bold`.
Styler = Callable[[str, str], str]


def _unstyled(text: str, _: str) -> str:
    return text


def format_summary(summary: RunSummary, style: Styler = _unstyled) -> list[str]:
    """Write the receipt; only paths may make a line longer than 80 columns."""
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
    """The parts of a receipt; `width` is that of the first column."""

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
    """Say what the credits are to be held against."""
    if planned is None or planned["max"] == 0:
        return "spent in this execution"
    most = "at an unknown price" if planned["max"] is None else f"at most {format_credits(planned['max'])}"
    likely = "" if planned["likely"] is None else f"{format_credits(planned['likely'])}, "
    return f"planned {likely}{most}"


def _difference_parts(difference: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Take the difference of the balance apart."""
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
    """Fit a name into its column of a terminal; what would move the cursor is left out."""
    # Any number of accents takes no room.
    clean = "".join(letter if letter.isprintable() else " " for letter in name[: 4 * width])
    if _display_width(clean) >= width or len(name) > len(clean):
        while _display_width(clean) > width - 2:
            clean = clean[:-1]
        clean += "…"
    return clean + " " * (width - _display_width(clean))


def _display_width(name: str) -> int:
    """Count the columns of a terminal that a name takes: ideographs and emoji two, accents on their own none."""
    return sum(map(_character_width, name))


def _character_width(letter: str) -> int:
    if unicodedata.category(letter) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _percentage(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"

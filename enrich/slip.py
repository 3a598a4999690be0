"""The receipt as a person reads it, on a terminal or in a message: aligned, in lines of at most 80 columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from enrich.difference import CENT, WORDS
from enrich.model import RowStatus, duration, many, write_credits
from enrich.receipt import Receipt

#: What is to be said of rows of a status.
REMARKS = {
    RowStatus.FAILED: "the API says why: see enrich_error",
    RowStatus.EXPIRED: "gone before they were fetched",
    RowStatus.IN_DOUBT: "perhaps charged",
    RowStatus.INVALID: "never sent: see enrich_error",
    RowStatus.PENDING: "the next run goes on",
}
#: The colours of a terminal that say how good a status is.
COLOURS = {
    RowStatus.FOUND: "green",
    RowStatus.FAILED: "red",
    RowStatus.EXPIRED: "red",
    RowStatus.IN_DOUBT: "red",
    RowStatus.PENDING: "yellow",
}
#: The narrowest and the widest first column.
NARROW, WIDE = 12, 14

#: Puts a text into a colour, or into `bold`.
Paint = Callable[[str, str], str]


def _plain(text: str, _: str) -> str:
    return text


def lines(receipt: Receipt, paint: Paint = _plain) -> list[str]:
    """Write the receipt; only paths may make a line longer than 80 columns."""
    longest = max(map(_room, receipt.columns or ()), default=0)
    slip = _Slip(receipt, paint, min(max(longest + 1, NARROW), WIDE))
    parts = [list(part) for part in (slip.rows(), slip.columns(), slip.account(), slip.providers(), slip.files())]
    return [slip.title(), *(line for part in parts if part for line in ("", *part))]


@dataclass(frozen=True, slots=True)
class _Slip:
    """The parts of a receipt; `width` is that of the first column."""

    receipt: Receipt
    paint: Paint
    width: int

    def title(self) -> str:
        receipt = self.receipt
        requests = "" if receipt.requests is None else f", {many(receipt.requests, 'distinct request')}"
        execution = "" if receipt.execution is None else f" (execution {receipt.execution})"
        return self.paint(f"{receipt.job}: {many(receipt.rows or 0, 'row')}{requests}", "bold") + execution

    def rows(self) -> Iterator[str]:
        for status in RowStatus:
            if count := getattr(self.receipt, status.value):
                share = _share(count, self.receipt.rows or 0)
                yield self._line(status.value, f"{count:,}", share, REMARKS.get(status, ""), COLOURS.get(status, ""))

    def columns(self) -> Iterator[str]:
        answered = (self.receipt.found or 0) + (self.receipt.not_found or 0)
        remark = f"of {many(answered, 'answered row')}"
        for name, count in (self.receipt.columns or {}).items() if answered else ():
            yield self._line(name, f"{count:,}", _share(count, answered), remark)
            remark = ""

    def account(self) -> Iterator[str]:
        receipt = self.receipt
        yield self._line("submitted", f"{receipt.submitted:,}", "", f"{receipt.reused or 0:,} reused from the ledger")
        yield self._line("credits", write_credits(receipt.credits_spent), "", _planned(receipt.planned))
        if receipt.cost_per_hit is not None:
            yield self._line("per hit", write_credits(receipt.cost_per_hit))
        if receipt.credits_over_cap:
            yield self._line("over cap", write_credits(receipt.credits_over_cap), "", "a price rose in flight")
        if receipt.credits_unknown:
            yield self._line("unpriced", f"{receipt.credits_unknown:,}", "", "answers of unknown price")
        if receipt.balance_before is not None and receipt.balance_after is not None:
            was = f"was {write_credits(receipt.balance_before)}"
            yield self._line("balance", write_credits(receipt.balance_after), "", was)
            for amount, words in _parts(receipt.difference) if receipt.difference else ():
                yield self._line("", amount, "", words)
        each = f"{receipt.polls / receipt.answers:.1f} a request; " if receipt.answers else ""
        yield self._line("polls", f"{receipt.polls:,}", "", f"{each}{many(receipt.rate_limited, 'answer')} 429")
        yield self._line("time", duration(receipt.elapsed_s))

    def providers(self) -> Iterator[str]:
        receipt, width = self.receipt, self.width + 4
        if not receipt.providers:
            return
        head = f"{'asked':>9}{'found':>9}{'rate':>8}{'credits':>12}{'a hit':>9}"
        yield self.paint(f"  {'provider':<{width}}{head}", "bold")
        for each in receipt.providers:
            asked, name = each["asked"] + each["presumed"], f"  {_padded(each['name'], width)}"
            paid = f"{write_credits(each['credits']):>12}"
            if each["verifies"]:
                yield f"{name}{asked:>9,}{'':>9}{'checks':>8}{paid}"
            else:
                hit = "-" if each["cost_per_hit"] is None else write_credits(each["cost_per_hit"])
                yield f"{name}{asked:>9,}{each['found']:>9,}{_share(each['found'], asked):>8}{paid}{hit:>9}"
        if receipt.credits_elsewhere:
            yield f"  {'of no provider':<{width}}{'':>26}{write_credits(receipt.credits_elsewhere):>12}"
        if presumed := max(each["presumed"] for each in receipt.providers):
            yield f"  {many(presumed, 'answer')} without steps: all of the waterfall were asked, presumably"
        if receipt.providers_untold:
            says = "more does not say" if receipt.providers_untold == 1 else "more do not say"
            yield f"  {many(receipt.providers_untold, 'answer')} {says} who was asked"

    def files(self) -> Iterator[str]:
        receipt = self.receipt
        told = (
            ("output", receipt.output, ""),
            ("rejects", receipt.rejects, f" ({many(receipt.rejected or 0, 'row')})"),
            ("changes", receipt.changes, f" ({many(receipt.changed or 0, 'change')})"),
        )
        yield from (f"  {kind:<{self.width}}  {path}{count}" for kind, path, count in told if path is not None)

    def _line(self, name: str, number: str, share: str = "", remark: str = "", colour: str = "") -> str:
        label = self.paint(_padded(name, self.width), colour)
        return f"  {label}{number:>11} {share:>6}  {remark}".rstrip()


def _planned(planned: Mapping[str, float | None] | None) -> str:
    """Say what the credits are to be held against."""
    if planned is None or planned["max"] == 0:
        return "spent in this execution"
    most = "at an unknown price" if planned["max"] is None else f"at most {write_credits(planned['max'])}"
    likely = "" if planned["likely"] is None else f"{write_credits(planned['likely'])}, "
    return f"planned {likely}{most}"


def _parts(difference: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Take the difference of the balance apart."""
    for name, words in WORDS.items():
        part = difference[name]
        if part["number"]:
            exact = abs(part["most"] - part["least"]) < CENT
            up_to = "" if exact else f", or {write_credits(part['least'])}"
            yield write_credits(part["most"]), f"{part['number']:,} {words}{up_to}"
    if unexplained := difference["unexplained"]:
        whither = "went elsewhere" if unexplained > 0 else "came in"
        yield write_credits(abs(unexplained)), f"{whither}, not explained: enrich reconcile"


def _padded(name: str, width: int) -> str:
    """Fit a name into its column of a terminal; what would move the cursor is left out."""
    # Any number of accents takes no room.
    clean = "".join(letter if letter.isprintable() else " " for letter in name[: 4 * width])
    if _room(clean) >= width or len(name) > len(clean):
        while _room(clean) > width - 2:
            clean = clean[:-1]
        clean += "…"
    return clean + " " * (width - _room(clean))


def _room(name: str) -> int:
    """Count the columns of a terminal that a name takes: ideographs and emoji two, accents on their own none."""
    return sum(map(_columns, name))


def _columns(letter: str) -> int:
    if unicodedata.category(letter) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"

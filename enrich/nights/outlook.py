"""What the facts of a job mean for tonight: each judgement a pure function that yields findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from enrich.errors import EnrichError, Exit
from enrich.model import CLOCK_TOLERANCE_MS, iso, to_credits
from enrich.place import Place

DAY_S = 86_400.0
#: An export that did not change for this long is asked after.
OLD_S = 2 * DAY_S
#: Names of outputs are tried for so many nights.
NIGHTS = 366


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor. `code` is the exit code that a run would have because of a `fail`."""

    mark: Literal["ok", "warn", "fail"]
    subject: str
    message: str
    remedy: str | None = None
    code: Exit = Exit.OK

    def __str__(self) -> str:
        """Write it on one line."""
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.mark:<6}{self.subject:<10}{' '.join(f'{self.message}{remedy}'.split())}"


def failed(subject: str, error: EnrichError) -> Finding:
    """Make a finding of what a run would fail with."""
    return Finding("fail", subject, error.message, error.hint, error.exit_code)


def clock(ahead_s: float | None) -> Finding:
    """Judge by how much the API's clock is ahead of ours."""
    if ahead_s is None:
        return Finding("ok", "clock", "the API tells no time to compare with")
    if abs(ahead_s) * 1000 <= CLOCK_TOLERANCE_MS:
        return Finding("ok", "clock", "agrees with the API's")
    way = "behind" if ahead_s > 0 else "ahead of"
    told = f"this machine's clock is {timedelta(seconds=abs(round(ahead_s)))} {way} the API's"
    return Finding("warn", "clock", told, "set it (NTP): cron starts by it; ages are counted by the API's")


def money(balance: int | None, min_balance: int | None, worst: int | None, last: Sequence[int]) -> Iterator[Finding]:
    """Judge the balance; `last` is what the last runs spent. All in millionths of a credit."""
    if balance is None:
        yield Finding("ok", "balance", "the API does not tell it")
        return
    told = f"{to_credits(balance):,.2f} credits"
    if balance < 0:
        yield Finding("fail", "balance", f"{told}: runs are refused", "top up", Exit.REFUSED)
    elif min_balance is not None and balance < min_balance:
        least = f"limits.min_balance wants {to_credits(min_balance):,.2f} to stay"
        yield Finding("fail", "balance", f"{told}, but {least}", "top up, or lower min_balance", Exit.REFUSED)
    elif worst is not None and balance - (min_balance or 0) < worst:
        price = f"one request may cost {to_credits(worst):,.2f}"
        yield Finding("fail", "balance", f"{told}, but {price}", "top up", Exit.REFUSED)
    elif balance - (min_balance or 0) < max(last, default=0):
        yield Finding("warn", "balance", f"{told}, less than the {to_credits(max(last)):,.2f} of a past run", "top up")
    else:
        yield Finding("ok", "balance", told)


def cap(max_credits: int | None, worst: int | None, executions: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Judge the cap (millionths) by the last executions, as the ledger's rows."""
    if max_credits is None:
        yield Finding("warn", "cap", "limits.max_credits is not set: a run may spend the whole balance", "set it")
        return
    told = f"limits.max_credits is {to_credits(max_credits):,.2f}"
    stopped = sum(row["exit_code"] == Exit.CREDITS for row in executions)
    most = max((row["spent"] for row in executions), default=0)
    if worst is not None and max_credits < worst:
        message = f"{told}, but one request may cost {to_credits(worst):,.2f}: nothing would be asked"
        yield Finding("fail", "cap", message, "raise it, or choose cheaper `enrichments`", Exit.CREDITS)
    elif stopped:
        message = f"{told}: {stopped} of the last {len(executions)} runs stopped for credits, with rows left pending"
        yield Finding("warn", "cap", message, "raise it if the backlog grows")
    elif max_credits < most:
        yield Finding("warn", "cap", f"{told}, but one of the last runs needed {to_credits(most):,.2f}", "raise it")
    else:
        yield Finding("ok", "cap", told)


def expiring(submitted_ms: Sequence[int], ttl_ms: int, now_ms: int, night_ms: int) -> Finding:
    """Judge what waits at the API and expires before the next run; times in milliseconds since 1970."""
    if not submitted_ms:
        return Finding("ok", "results", "nothing waits at the API")
    count = sum(at + ttl_ms <= night_ms for at in submitted_ms)
    waiting = f"{len(submitted_ms):,} paid requests wait at the API"
    if not count:
        return Finding("ok", "results", f"{waiting}; the first expires at {iso(min(submitted_ms) + ttl_ms)}")
    gone = sum(at + ttl_ms <= now_ms for at in submitted_ms)
    past = f" ({gone:,} of them should be gone already)" if gone else ""
    message = f"{waiting}, {count:,} expire before the next run at {iso(night_ms)}{past}"
    return Finding("warn", "results", message, "enrich run now: it collects them first")


def doubts(count: int) -> Finding:
    """Judge what waits for a person's word."""
    if not count:
        return Finding("ok", "doubts", "no request is in doubt")
    remedy = "enrich reconcile, then run --retry in_doubt (may pay twice) or --accept in_doubt"
    return Finding("warn", "doubts", f"{count:,} requests are in doubt: each run ends with 14 until you decide", remedy)


def input_age(changed_s: float, now_s: float) -> Finding:
    """Judge how old the input is; times in seconds since 1970."""
    days = (now_s - changed_s) / DAY_S
    if now_s - changed_s > OLD_S:
        return Finding("warn", "input", f"did not change for {days:.0f} days", "is the export still running?")
    return Finding("ok", "input", "changed within the last two days")


def output_names(path_of: Callable[[datetime], Place], start: datetime, reserved: Mapping[Path, str]) -> Finding:
    """Judge the names that the output will have at the same time of the coming nights."""
    nights = [path_of(start + timedelta(days=day)) for day in range(NIGHTS)]
    for day, path in enumerate(nights):
        if isinstance(path, Path) and path in reserved:
            message = f"in {day} nights the output would be {path}, which is {reserved[path]}"
            return Finding("fail", "output", message, "choose another `output`", Exit.USAGE)
    later = next((day for day in range(1, NIGHTS) if nights[day] == nights[0]), None)
    if later is None:
        return Finding("ok", "output", f"tonight {nights[0]}; each night has a file of its own")
    if later == 1 and len(set(nights)) == 1:
        return Finding("ok", "output", f"{nights[0]}; each run replaces the last one's")
    message = f"its name comes again after {later} nights, and the older file is replaced"
    return Finding("warn", "output", message, "use %Y-%m-%d, or no codes at all")


def room(folder: Path, free: int, certain: int, possible: int) -> Finding:
    """Judge the free space (bytes): `certain` is needed by the output, up to `possible` by the ledger."""
    told = f"{_size(free)} free in {folder}"
    if free < certain:
        message = f"{told}, the output needs {_size(certain)}"
        return Finding("fail", "disk", message, "make room", Exit.REFUSED)
    if free < certain + possible:
        return Finding("warn", "disk", f"{told}, a run may need {_size(certain + possible)}", "make room")
    return Finding("ok", "disk", f"{told}, a run needs at most {_size(certain + possible)}")


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:  # noqa: PLR2004 - as disks are sold
            return f"{count:,.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def next_night(now: datetime, hour: int, minute: int) -> datetime:
    """Tell when the clock shows that time next."""
    tonight = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return tonight if tonight > now else tonight + timedelta(days=1)

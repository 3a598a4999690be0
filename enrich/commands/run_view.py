"""The view of a run for a terminal, as one log line and as JSON. Pure functions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from msgspec import Struct

from enrich.exit_codes import exit_label
from enrich.job.locations import LedgerLocation
from enrich.ledger.records import ExecutionRow
from enrich.models import format_elapsed, iso_time, job_title, pluralize, to_credits
from enrich.run.progress import Progress, ProgressSnapshot, TrafficCounts

#: Minimum width of the view in columns, for readability. A narrower terminal cuts the lines off.
MIN_COLUMNS = 20
STATE_WORDS = {
    "found": "found",
    "not_found": "no match",
    "failed": "failed",
    "expired": "expired",
    "in_doubt": "unconfirmed",
    "pending": "pending",
}


class RunStatus(StrEnum):
    """Status of the newest run of a job, as far as it is visible from another process."""

    NO_LEDGER = "no ledger"
    NEVER_RUN = "never run"
    RUNNING = "running"
    NO_HEARTBEAT = "no heartbeat"
    KILLED = "killed"
    ENDED = "ended"


#: The counts of such a run are those of its last heartbeat.
STOPPED = (RunStatus.NO_HEARTBEAT, RunStatus.KILLED)


def run_status(
    run: ExecutionRow,
    snapshot: ProgressSnapshot | None,
    heartbeat_age_s: float,
    heartbeat_timeout_s: float,
    *,
    lock_held: bool,
) -> RunStatus:
    """Return the status of a run from the age of its heartbeat. `lock_held`: a process holds the lock for this run."""
    if run.ended_ms is not None:
        return RunStatus.ENDED
    if not lock_held:
        return RunStatus.KILLED
    pauses_heartbeat = snapshot is not None and snapshot.doing.blocks_snapshots
    return RunStatus.RUNNING if heartbeat_age_s <= heartbeat_timeout_s or pauses_heartbeat else RunStatus.NO_HEARTBEAT


class RunView(Struct, frozen=True):
    """State of a job's newest run at the time `now_ms` (milliseconds since 1970, UTC).

    `next_expiry_ms` is when the API deletes the first uncollected result. Each of `run`, `snapshot` and
    `next_expiry_ms` may be None.
    """

    job: str
    ledger: LedgerLocation
    now_ms: int
    status: RunStatus
    run: ExecutionRow | None = None
    snapshot: ProgressSnapshot | None = None
    next_expiry_ms: int | None = None
    sandbox: bool = False

    @property
    def last_heartbeat_ms(self) -> int | None:
        """Time of the last heartbeat, or the start of the run (milliseconds since 1970, UTC). None without a run."""
        if self.snapshot is not None:
            return self.snapshot.at_ms
        return None if self.run is None else self.run.started_ms

    @property
    def recent_traffic(self) -> tuple[TrafficCounts, float]:
        """Recent traffic, and the number of seconds that it covers."""
        if self.snapshot is None or self.status is not RunStatus.RUNNING:
            return TrafficCounts(), 0.0
        return self.snapshot.traffic.recent(self.snapshot.elapsed_s)

    @property
    def remaining_s(self) -> float | None:
        """Estimated remaining time in seconds at the recent speed. None if unknown."""
        recent, over_s = self.recent_traffic
        if self.snapshot is None or self.snapshot.total is None or not recent.answered:
            return None
        return max(0, self.snapshot.total - self.snapshot.done) / recent.answered * over_s

    def as_json(self) -> dict[str, Any]:
        """Return the object that `enrich status --watch --json` prints. None means unknown."""
        run, snapshot = self.run, self.snapshot
        result: dict[str, Any] = {
            "at": iso_time(self.now_ms),
            "job": self.job,
            "sandbox": self.sandbox,
            "sign": self.status.value,
        }
        if run is None:
            return result
        recent, over_s = self.recent_traffic
        totals = snapshot.traffic.totals() if snapshot else None
        return result | {
            "execution": run.id,
            "started_at": iso_time(run.started_ms),
            "last_sign_at": iso_time(self.last_heartbeat_ms),
            "ended_at": iso_time(run.ended_ms),
            "exit_code": run.exit_code,
            "outcome": None if run.exit_code is None else exit_label(run.exit_code),
            "doing": snapshot.doing.key if snapshot and self.status is not RunStatus.ENDED else None,
            "elapsed_s": snapshot.elapsed_s if snapshot else None,
            "total": snapshot.total if snapshot else None,
            "done": snapshot.done if snapshot else None,
            "states": dict(snapshot.states) if snapshot else None,
            "in_flight": snapshot.in_flight if snapshot else None,
            "submitted": run.submitted,
            "credits_spent": to_credits(run.spent),
            "credits_unknown": run.unknown,
            "credits_reserved": to_credits(run.reserved),
            "max_credits": to_credits(run.cap),
            "polls": totals.polls if totals else None,
            "rate_limited": totals.rate_limited if totals else None,
            "submitted_per_s": round(recent.submitted / over_s, 2) if over_s else None,
            "answered_per_s": round(recent.answered / over_s, 2) if over_s else None,
            "to_go_s": None if self.remaining_s is None else round(self.remaining_s),
            "next_expiry": iso_time(self.next_expiry_ms),
        }


def format_headline(view: RunView) -> str:
    """Describe the status of the newest run in one line."""
    job, run, last_heartbeat_ms = job_title(view.job, sandbox=view.sandbox), view.run, view.last_heartbeat_ms
    if view.status is RunStatus.NO_LEDGER:
        return f"{job}: no ledger yet ({view.ledger})"
    if run is None or last_heartbeat_ms is None:
        return f"{job} has never run ({view.ledger})"
    if run.ended_ms is not None:
        how = "" if run.exit_code is None else f": exit {run.exit_code} ({exit_label(run.exit_code)})"
        lasted = format_elapsed((run.ended_ms - run.started_ms) / 1000)
        return f"{job}: run {run.id} ended at {iso_time(run.ended_ms)} after {lasted}{how}"
    phase = "" if view.snapshot is None else view.snapshot.doing.value
    while_ = f" while {phase}" if phase else ""
    heartbeat_at = iso_time(last_heartbeat_ms)
    if view.status is RunStatus.KILLED:
        return f"{job}: run {run.id} was killed{while_}; its last heartbeat was at {heartbeat_at}"
    if view.status is RunStatus.NO_HEARTBEAT:
        return f"{job}: run {run.id}, no heartbeat since {heartbeat_at}: suspended or stopped{while_}"
    since = f"since {iso_time(run.started_ms)} ({format_elapsed((view.now_ms - run.started_ms) / 1000)})"
    return f"{job}: run {run.id}, running {since}{f': {phase}' if phase else ''}"


def format_bar(view: RunView, columns: int, *, ascii_only: bool) -> str | None:
    """Draw the progress bar of the run, with `ascii_only` without block characters. None if the total is unknown."""
    from enrich.monitoring.progress_bar import choose_layout, render_bar  # `status` alone draws no bar

    run, snapshot = view.run, view.snapshot
    if run is None or snapshot is None or not snapshot.total:
        return None
    recent, over_s = view.recent_traffic
    progress = Progress(snapshot.total, snapshot.done, snapshot.found, to_credits(run.spent), snapshot.in_flight)
    rate = recent.answered / over_s if over_s else None
    layout = choose_layout(progress, snapshot.elapsed_s, columns)
    return render_bar(progress, snapshot.elapsed_s, layout, columns=columns, rate=rate, ascii_only=ascii_only)


def run_facts(view: RunView) -> Iterator[tuple[str, str]]:
    """Yield the facts about the newest run as (name, text)."""
    run, snapshot = view.run, view.snapshot
    if run is None:
        return
    # After the last heartbeat the counts are out of date. Newer ones would have to be counted in the ledger.
    then = " at the last heartbeat" if snapshot is not None and view.status in STOPPED else ""
    yield "results", _answer_counts(run, snapshot) + then
    cap = "" if run.cap is None else f" of at most {to_credits(run.cap):,.2f}"
    unknown = f" and {pluralize(run.unknown, 'result')} of unknown price" if run.unknown else ""
    reserved = f"; {to_credits(run.reserved):,.2f} more reserved" if run.reserved else ""
    yield "credits", f"{to_credits(run.spent):,.2f}{cap} spent{unknown}{reserved}"
    if run.balance_after is not None:
        yield "balance", f"{to_credits(run.balance_after):,.2f} after the run"
    if snapshot is None:
        return
    totals, (recent, over_s) = snapshot.traffic.totals(), view.recent_traffic
    if over_s:
        sent, answered = recent.submitted / over_s, recent.answered / over_s
        yield "speed", f"{sent:,.1f} sent/s, {answered:,.1f} results/s in the last {over_s:.0f} s"
    yield "sent", f"{run.submitted:,} requests, {totals.polls:,} polls, {totals.rate_limited:,} rate-limited (429)"
    if view.next_expiry_ms is not None:
        at = iso_time(view.next_expiry_ms)
        if view.status is RunStatus.RUNNING:
            yield "running", f"{snapshot.in_flight:,} at Databar; the first result expires at {at}"
        else:
            yield "expires", f"uncollected results, from {at} on"
    if view.status is RunStatus.RUNNING:
        yield "heartbeat", f"{max(0, view.now_ms - snapshot.at_ms) / 1000:.0f} s ago"


def _answer_counts(run: ExecutionRow, snapshot: ProgressSnapshot | None) -> str:
    """Format the number of answers by state. It is unknown for an execution without a snapshot."""
    if snapshot is None:
        return f"unknown; {run.submitted:,} sent"
    states = ", ".join(
        f"{count:,} {STATE_WORDS.get(state, state)}"
        for state, count in sorted(snapshot.states.items(), key=lambda each: -each[1])
    )
    total = "" if snapshot.total is None else f" of {snapshot.total:,}"
    return f"{snapshot.done:,}{total}{': ' if states else ''}{states}"


def format_view(view: RunView, columns: int, *, ascii_only: bool = False) -> Iterator[str]:
    """Format the view for a terminal with `columns` columns."""
    columns = max(columns, MIN_COLUMNS)
    yield from textwrap.wrap(format_headline(view), columns, subsequent_indent="  ")
    bar_line = format_bar(view, columns, ascii_only=ascii_only)
    if bar_line is not None:
        yield bar_line
    for name, text in run_facts(view):
        yield from textwrap.wrap(f"  {name:<9} {text}", columns, subsequent_indent="    ")


def format_view_line(view: RunView) -> str:
    """Format the view as one line."""
    parts = [f"{iso_time(view.now_ms)} {format_headline(view)}"]
    parts += [f"{name} {fact}" for name, fact in run_facts(view) if name != "heartbeat"]
    if view.remaining_s is not None:
        parts.append(f"{format_elapsed(view.remaining_s)} left")
    return "; ".join(parts)

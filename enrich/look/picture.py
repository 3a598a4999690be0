"""What a look at a run shows: the same picture for a terminal, for a line of a log, and as JSON. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from enrich.model import duration, iso, to_credits
from enrich.place import LedgerPlace
from enrich.pulse import Counts, Pulse
from enrich.store.history import Latest
from enrich.surroundings import Progress
from enrich.watch.outcome import word
from enrich.watch.progress import draw, look

#: Narrower than this nothing can be read; what is wider is cut off by the terminal.
NARROWEST = 20


class Sign(StrEnum):
    """How the newest run of a job stands, as far as can be told from outside."""

    NO_LEDGER = "no ledger"
    NEVER = "never run"
    AT_WORK = "at work"
    SILENT = "no sign of life"
    ENDED = "ended"


def sign_of(run: Latest, pulse: Pulse | None, quiet_s: float, patience_s: float, *, held: bool | None) -> Sign:
    """Tell how a run stands whose last sign of life is `quiet_s` old; `held`: the system says it has its ledger."""
    if run.ended_ms is not None:
        return Sign.ENDED
    holds_its_breath = pulse is not None and pulse.doing.holds_its_breath and held is True
    return Sign.AT_WORK if quiet_s <= patience_s or holds_its_breath else Sign.SILENT


@dataclass(frozen=True, slots=True)
class Picture:
    """One look. `ttl_ms` is how long the API keeps results; `run` and `pulse` None: there is none."""

    job: str
    ledger: LedgerPlace
    ttl_ms: int
    now_ms: int
    sign: Sign
    run: Latest | None = None
    pulse: Pulse | None = None

    @property
    def last_sign_ms(self) -> int | None:
        """When the run was last known to live."""
        if self.pulse is not None:
            return self.pulse.at_ms
        return None if self.run is None else self.run.started_ms

    @property
    def speed(self) -> tuple[Counts, float]:
        """What happened lately, and in how many seconds."""
        if self.pulse is None or self.sign is not Sign.AT_WORK:
            return Counts(), 0.0
        return self.pulse.traffic.lately(self.pulse.elapsed_s)

    @property
    def to_go_s(self) -> float | None:
        """How long it takes yet if it goes on like this; None: nobody knows."""
        lately, over_s = self.speed
        if self.pulse is None or self.pulse.total is None or not lately.answered:
            return None
        return max(0, self.pulse.total - self.pulse.done) / lately.answered * over_s

    @property
    def next_expiry_ms(self) -> int | None:
        """When the API forgets the first of what waits there."""
        return None if self.run is None or self.run.oldest_ms is None else self.run.oldest_ms + self.ttl_ms

    def as_json(self) -> dict[str, Any]:
        """Return the object that `enrich status --watch --json` prints; null: not known."""
        run, pulse = self.run, self.pulse
        told: dict[str, Any] = {"at": iso(self.now_ms), "job": self.job, "sign": self.sign.value}
        if run is None:
            return told
        lately, over_s = self.speed
        totals = pulse.traffic.totals() if pulse else None
        return told | {
            "execution": run.id,
            "started_at": iso(run.started_ms),
            "last_sign_at": _iso(self.last_sign_ms),
            "ended_at": _iso(run.ended_ms),
            "exit_code": run.exit_code,
            "outcome": None if run.exit_code is None else word(run.exit_code),
            "doing": pulse.doing.name.lower() if pulse and self.sign is not Sign.ENDED else None,
            "elapsed_s": pulse.elapsed_s if pulse else None,
            "total": pulse.total if pulse else None,
            "done": pulse.done if pulse else None,
            "states": dict(pulse.states) if pulse else None,
            "in_flight": pulse.in_flight if pulse else None,
            "submitted": run.submitted,
            "credits_spent": to_credits(run.spent),
            "credits_unknown": run.unknown,
            "credits_reserved": to_credits(run.reserved),
            "max_credits": to_credits(run.cap),
            "polls": totals.polls if totals else None,
            "rate_limited": totals.rate_limited if totals else None,
            "submitted_per_s": round(lately.submitted / over_s, 2) if over_s else None,
            "answered_per_s": round(lately.answered / over_s, 2) if over_s else None,
            "to_go_s": None if self.to_go_s is None else round(self.to_go_s),
            "next_expiry": _iso(self.next_expiry_ms),
        }


def headline(picture: Picture) -> str:
    """Say how the newest run stands."""
    job, run, ago = picture.job, picture.run, picture.last_sign_ms
    if picture.sign is Sign.NO_LEDGER:
        return f"{job}: there is no ledger yet ({picture.ledger})"
    if run is None or ago is None:
        return f"{job} has never run: {picture.ledger} knows of no execution of it"
    if run.ended_ms is not None:
        how = "" if run.exit_code is None else f": exit {run.exit_code} ({word(run.exit_code)})"
        lasted = duration((run.ended_ms - run.started_ms) / 1000)
        return f"{job}: execution {run.id} ended at {iso(run.ended_ms)} after {lasted}{how}"
    doing = "" if picture.pulse is None else picture.pulse.doing.value
    if picture.sign is Sign.SILENT:
        while_ = f" while {doing}" if doing else ""
        return f"{job}: execution {run.id}, no sign of life since {iso(ago)}: killed, asleep or stopped{while_}"
    since = f"at work since {iso(run.started_ms)} ({duration((picture.now_ms - run.started_ms) / 1000)})"
    return f"{job}: execution {run.id}, {since}{f': {doing}' if doing else ''}"


def bar(picture: Picture, columns: int, *, plain: bool) -> str | None:
    """Draw the run's own bar, `plain` without block letters; None where it is not known how much there is to do."""
    run, pulse = picture.run, picture.pulse
    if run is None or pulse is None or not pulse.total:
        return None
    lately, over_s = picture.speed
    progress = Progress(pulse.total, pulse.done, pulse.found, to_credits(run.spent), pulse.in_flight)
    rate = lately.answered / over_s if over_s else None
    chosen = look(progress, pulse.elapsed_s, columns)
    return draw(progress, pulse.elapsed_s, chosen, columns=columns, rate=rate, plain=plain)


def facts(picture: Picture) -> Iterator[tuple[str, str]]:
    """Tell what a person wants to know of the newest run, by name."""
    run, pulse = picture.run, picture.pulse
    if run is None:
        return
    # What a silent run has done since its last word is in the ledger, and would have to be counted.
    then = ", when it last told" if pulse is not None and picture.sign is Sign.SILENT else ""
    yield "answers", _answers(run, pulse) + then
    cap = "" if run.cap is None else f" of {to_credits(run.cap):,.2f} at most"
    unknown = f" and {run.unknown:,} answers of unknown price" if run.unknown else ""
    reserved = f"; {to_credits(run.reserved):,.2f} more are reserved" if run.reserved else ""
    yield "credits", f"{to_credits(run.spent):,.2f}{cap} spent{unknown}{reserved}"
    if run.balance_after is not None:
        yield "balance", f"{to_credits(run.balance_after):,.2f} after it"
    if pulse is None:
        return
    totals, (lately, over_s) = pulse.traffic.totals(), picture.speed
    if over_s:
        sent, heard = lately.submitted / over_s, lately.answered / over_s
        yield "speed", f"{sent:,.1f} submitted/s, {heard:,.1f} answered/s in the last {over_s:.0f} s"
    yield "asked", f"{run.submitted:,} submitted, {totals.polls:,} polls, {totals.rate_limited:,} answers 429"
    if picture.next_expiry_ms is not None:
        at = iso(picture.next_expiry_ms)
        if picture.sign is Sign.AT_WORK:
            yield "waiting", f"{pulse.in_flight:,} at the API; the first result expires at {at}"
        else:
            yield "expires", f"what is left at the API, from {at} on"
    if picture.sign is Sign.AT_WORK:
        yield "breathes", f"{max(0, picture.now_ms - pulse.at_ms) / 1000:.0f} s ago"


def _answers(run: Latest, pulse: Pulse | None) -> str:
    """Count what came of the requests; what an execution without a pulse has heard is not known."""
    if pulse is None:
        return f"not known; {run.submitted:,} submitted"
    states = ", ".join(f"{count:,} {state}" for state, count in sorted(pulse.states.items(), key=lambda each: -each[1]))
    total = "" if pulse.total is None else f" of {pulse.total:,}"
    return f"{pulse.done:,}{total}{': ' if states else ''}{states}"


def lines(picture: Picture, columns: int, *, plain: bool = False) -> Iterator[str]:
    """Write the picture for a terminal so wide."""
    columns = max(columns, NARROWEST)
    yield from textwrap.wrap(headline(picture), columns, subsequent_indent="  ")
    drawn = bar(picture, columns, plain=plain)
    if drawn is not None:
        yield drawn
    for name, said in facts(picture):
        yield from textwrap.wrap(f"  {name:<9} {said}", columns, subsequent_indent="    ")


def line(picture: Picture) -> str:
    """Write the picture in one line."""
    said = [f"{iso(picture.now_ms)} {headline(picture)}"]
    said += [f"{name} {fact}" for name, fact in facts(picture) if name != "breathes"]
    if picture.to_go_s is not None:
        said.append(f"{duration(picture.to_go_s)} to go")
    return "; ".join(said)


def _iso(at_ms: int | None) -> str | None:
    return None if at_ms is None else iso(at_ms)

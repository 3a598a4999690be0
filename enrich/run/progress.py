"""The progress of a run: as it is shown, and as snapshots that are stored in the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

#: With more bins than this, bins are merged, so that a run of hours stores no more than a short one.
MAX_BINS = 240
#: Speeds are measured over at least this many seconds, if the run is that old.
SPEED_WINDOW_S = 10.0


class Phase(StrEnum):
    """The phase of a run."""

    RESCUE = "collecting earlier results"
    ENROLL = "reading the input"
    CANARY = "checking the canary"
    SEND = "sending"
    COLLECT = "writing the output"

    @property
    def key(self) -> str:
        """The name in the JSON of `enrich status`."""
        return "ask" if self is Phase.SEND else self.name.lower()

    @property
    def blocks_snapshots(self) -> bool:
        """Whether one long transaction keeps the ledger busy, so that no snapshot can be stored."""
        return self in (Phase.ENROLL, Phase.COLLECT)


class Progress(Struct, frozen=True):
    """Progress of a run, in requests. `spent` is in credits; `total` None: not known yet."""

    total: int | None
    done: int
    found: int
    spent: float
    in_flight: int
    submitted: int = 0
    polls: int = 0
    rate_limited: int = 0


class TrafficCounts(NamedTuple):
    """Counts since the start of the run."""

    submitted: int = 0
    answered: int = 0
    polls: int = 0
    rate_limited: int = 0


class Traffic(Struct, frozen=True):
    """What was sent and answered: counts for each `width_s` seconds from the start."""

    width_s: Annotated[float, Meta(gt=0)]
    submitted: tuple[int, ...]
    answered: tuple[int, ...]
    polls: tuple[int, ...]
    rate_limited: tuple[int, ...]

    def totals(self) -> TrafficCounts:
        """Add up all bins."""
        return TrafficCounts(sum(self.submitted), sum(self.answered), sum(self.polls), sum(self.rate_limited))

    def recent(self, elapsed_s: float) -> tuple[TrafficCounts, float]:
        """Add up the last bins. Also returns how many seconds of the `elapsed_s` since the start they cover."""
        # The last bin is not complete, so enough bins before it are added.
        first = max(0, int((elapsed_s - SPEED_WINDOW_S) // self.width_s))
        series = (self.submitted, self.answered, self.polls, self.rate_limited)
        return TrafficCounts(*(sum(bins[first:]) for bins in series)), elapsed_s - first * self.width_s


class ProgressSnapshot(Struct, frozen=True):
    """Progress of a run at one moment, in requests; `spent` in millionths of a credit.

    `at_ms` is from the machine's own clock (UTC), not corrected by the API's: a watching process has the same clock.
    `elapsed_s` and the bins are from the monotonic clock, which never jumps and stands still while the machine sleeps.
    """

    at_ms: int
    elapsed_s: float
    doing: Phase
    #: How many requests the run completes if nothing intervenes; None: not known yet.
    total: int | None
    done: int
    found: int
    spent: int
    in_flight: int
    #: Completed requests by state.
    states: Mapping[str, int]
    traffic: Traffic

    def as_text(self) -> str:
        """Return the snapshot as it is stored."""
        return msgspec.json.encode(self).decode()


def read_snapshot(text: str | None) -> ProgressSnapshot | None:
    """Read a stored snapshot; None when there is none, or when this version cannot read it."""
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=ProgressSnapshot)
    except msgspec.DecodeError:
        return None


@dataclass(slots=True)
class TrafficRecorder:
    """Sorts events into time bins. `record` is called now and then with the counts since the start."""

    width_s: float = 1.0
    _bins: tuple[list[int], ...] = field(default_factory=lambda: tuple([] for _ in TrafficCounts._fields))
    _last_counts: TrafficCounts = field(default_factory=TrafficCounts)
    _latest_s: float = 0.0

    def record(self, elapsed_s: float, counts: TrafficCounts) -> None:
        """Record the counts `elapsed_s` seconds after the start. New events go into the current bin."""
        self._latest_s = max(self._latest_s, elapsed_s)
        while self._latest_s // self.width_s >= MAX_BINS:
            self._merge()
        now = int(self._latest_s // self.width_s)
        for bins, before, after in zip(self._bins, self._last_counts, counts, strict=True):
            bins.extend([0] * (now + 1 - len(bins)))
            bins[now] += max(0, after - before)
        self._last_counts = TrafficCounts(*map(max, self._last_counts, counts))

    def traffic(self) -> Traffic:
        """Return all counts."""
        return Traffic(self.width_s, *map(tuple, self._bins))

    def _merge(self) -> None:
        self.width_s *= 2
        for bins in self._bins:
            bins[:] = [sum(bins[at : at + 2]) for at in range(0, len(bins), 2)]

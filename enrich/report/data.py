"""What the report tells, as plain facts. Credits are in credits, times in UTC; None: not known.

No lead is in them, unless its rows were asked for (`--with-rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from enrich.exit_codes import RequiredAction


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """One execution of the job. `found` … `failed` count the requests that it settled; `rows` is what its input had.

    `ended_at` and `exit_code` are None while it is at work, and for good when it was killed.
    """

    execution: int
    started_at: str
    ended_at: str | None
    exit_code: int | None
    outcome: str
    rows: int | None
    submitted: int
    found: int
    not_found: int
    failed: int
    expired: int
    credits_spent: float
    credits_unknown: int
    balance_before: float | None
    balance_after: float | None
    #: What of the balance's difference neither the ledger nor the API explains.
    unexplained: float | None
    polls: int | None
    rate_limited: int | None
    elapsed_s: float | None

    @property
    def answered(self) -> int:
        """How many requests came to a hit or a clean miss."""
        return self.found + self.not_found

    @property
    def hit_rate(self) -> float | None:
        """The share of hits in what was answered."""
        return self.found / self.answered if self.answered else None

    @property
    def cost_per_hit(self) -> float | None:
        """What a hit cost."""
        return self.credits_spent / self.found if self.found else None


@dataclass(frozen=True, slots=True)
class ReportedProvider:
    """A provider, or a verifier, over all answers of the job.

    `asked` is told by the answers, `presumed` is added where a miss does not say whom it asked (enrich.run.provider_stats).
    """

    name: str
    verifies: bool
    asked: int
    presumed: int
    found: int
    rejected: int
    passed_on: int
    credits: float
    cost_per_hit: float | None


@dataclass(frozen=True, slots=True)
class ReportedWaterfall:
    """Who was asked in turn: of `answers`, `found` found something, and of `untold` nobody knows whom they asked.

    `spent` is the whole price of these answers, of which `elsewhere` is in nobody's steps.
    """

    name: str
    providers: Sequence[ReportedProvider]
    answers: int
    found: int
    untold: int
    spent: float
    elsewhere: float


@dataclass(frozen=True, slots=True)
class HitCounts:
    """How many of the answered rows (found or not found) have a value, for a column or a group of rows."""

    name: str
    rows: int
    answered: int
    found: int


@dataclass(frozen=True, slots=True)
class GroupedHits:
    """The rows by a column of the input; `rest` says how many further values the last group stands for."""

    column: str
    groups: Sequence[HitCounts]
    rest: int = 0


@dataclass(frozen=True, slots=True)
class HistogramBar:
    """A bar of a histogram: so many from `start` up to `end`."""

    start: float
    end: float
    count: int


@dataclass(frozen=True, slots=True)
class LatencyHistogram:
    """How long tasks took from the POST to the answer, in seconds.

    The bars are equally wide; one more, wider, may hold the slowest.
    """

    bars: Sequence[HistogramBar]
    count: int
    median: float
    p90: float
    longest: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one execution sent and heard: counts for each `width_s` seconds from its start."""

    execution: int
    width_s: float
    submitted: Sequence[int]
    answered: Sequence[int]
    polls: Sequence[int]
    rate_limited: Sequence[int]


@dataclass(frozen=True, slots=True)
class AnswerAge:
    """Answers that are in use, by their age."""

    label: str
    found: int
    not_found: int


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Something that was not so before; `text` is a sentence without any lead in it."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class ComparedSide:
    """One side of a comparison."""

    label: str
    providers: Sequence[str]
    asked: int
    found: int
    not_found: int
    credits: float
    cost_per_hit: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sides. `common` leads were answered on both: their hits and credits are compared like with like.

    `verdict` says in a sentence who found more for less, or that this can't be told.
    """

    left: ComparedSide
    right: ComparedSide
    left_providers: Sequence[ReportedProvider]
    right_providers: Sequence[ReportedProvider]
    common: int
    both: int
    only_left: int
    only_right: int
    neither: int
    common_left_credits: float
    common_right_credits: float
    verdict: str


@dataclass(frozen=True, slots=True)
class OutputRows:
    """The rows of the output with their cells: only when they were asked for."""

    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    left_out: int


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page tells. `statuses` counts rows of the present input, `requests` those of the ledger by state.

    `nights` are oldest first; the last one is what the page begins with. `credits_spent` is of all nights of the job.
    """

    job: str
    made_at: str
    ledger: str
    input: str
    output: str
    waterfall: ReportedWaterfall
    nights: Sequence[ReportedRun]
    rows: int | None
    statuses: Mapping[str, int]
    requests: Mapping[str, int]
    credits_spent: float
    credits_unknown: int
    planned: Mapping[str, float | None] | None
    columns: Sequence[HitCounts]
    groups: Sequence[GroupedHits]
    latencies: LatencyHistogram | None
    traffic: Traffic | None
    ages: Sequence[AnswerAge]
    anomalies: Sequence[Anomaly]
    needs: Sequence[RequiredAction]
    notes: Sequence[str]
    comparison: Comparison | None = None
    leads: OutputRows | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {"exit_code": 0, **asdict(self)}

"""The data of the report. Amounts are in credits, times in UTC; None: not known.

The data holds no leads, except with `--with-rows`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, to_builtins

from enrich.exit_codes import RequiredAction
from enrich.run.provider_stats import PROVIDER_KEYS

#: The keys in JSON, where they differ from our names.
_JSON_KEYS = PROVIDER_KEYS | {
    "compared": "asked",
    "not_reported": "untold",
    "unattributed": "elsewhere",
    "runs": "nights",
    "actions": "needs",
}


def ratio(part: float, whole: float) -> float | None:
    """Return a part as a share of the whole, or a price for each of `whole` matches; None: there are none."""
    return part / whole if whole else None


class ReportValue(Struct, frozen=True, rename=_JSON_KEYS):
    """A part of the report."""


class ReportedRun(ReportValue, frozen=True):
    """One execution of the job. `found` … `expired` count the requests that it settled; `rows` are its input's rows.

    `ended_at` and `exit_code` are None while it runs, and stay None when it was killed.
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
    #: The part of the balance's change that neither the ledger nor the API explains.
    unexplained: float | None
    polls: int | None
    rate_limited: int | None
    elapsed_s: float | None

    @property
    def answered(self) -> int:
        """Number of requests with a match or with no match."""
        return self.found + self.not_found

    @property
    def hit_rate(self) -> float | None:
        """Matches as a share of the answered requests; None without any."""
        return ratio(self.found, self.answered)

    @property
    def cost_per_hit(self) -> float | None:
        """Credits per match; None without a match."""
        return ratio(self.credits_spent, self.found)


class ReportedProvider(ReportValue, frozen=True):
    """A provider or verifier, over all answers of the job.

    `reported` counts requests that the answers report, `inferred` those that are inferred for answers with no match and
    no steps (enrich.run.provider_stats).
    """

    name: str
    verifies: bool
    reported: int
    inferred: int
    found: int
    rejected: int
    passed_on: int
    credits: float
    cost_per_hit: float | None


class ReportedWaterfall(ReportValue, frozen=True):
    """A waterfall's providers in their order, or an enrichment.

    Of `answers`, `found` have a match, `failed` are failures, and `not_reported` report no provider. `retried` failures
    were free, and their requests were queued again. `spent` is the total price of the answers; `unattributed` is the
    part that no provider's step accounts for.
    """

    name: str
    providers: Sequence[ReportedProvider]
    answers: int
    found: int
    not_reported: int
    spent: float
    unattributed: float
    kind: str = "waterfall"
    #: The step of the job; '' for a job without steps.
    step: str = ""
    failed: int = 0
    retried: int = 0

    @property
    def answered(self) -> int:
        """Number of requests with a match or with no match."""
        return self.answers - self.failed


class HitCounts(ReportValue, frozen=True):
    """For a column or a group of rows: how many of the answered rows (found or not found) have a value."""

    name: str
    rows: int
    answered: int
    found: int


class GroupedHits(ReportValue, frozen=True):
    """Rows grouped by an input column. `rest` is the number of further values combined in the last group."""

    column: str
    groups: Sequence[HitCounts]
    rest: int = 0


class SkippedRows(ReportValue, frozen=True):
    """Rows for which no request is sent, for one reason. `step` is '' for a job without steps."""

    step: str
    status: str
    reason: str
    rows: int


class HistogramBar(ReportValue, frozen=True):
    """A bar of a histogram: `count` values from `start` up to `end`."""

    start: float
    end: float
    count: int


class LatencyHistogram(ReportValue, frozen=True):
    """Seconds from the POST to the answer. The bars have equal widths; one last, wider bar may hold the slowest."""

    bars: Sequence[HistogramBar]
    count: int
    median: float
    p90: float
    longest: float


TRAFFIC_KINDS = ("submitted", "answered", "polls", "rate_limited")


class Traffic(ReportValue, frozen=True):
    """Requests and responses of one execution: counts for each `width_s` seconds from its start."""

    execution: int
    width_s: float
    submitted: Sequence[int]
    answered: Sequence[int]
    polls: Sequence[int]
    rate_limited: Sequence[int]

    def series(self) -> tuple[Sequence[int], ...]:
        """Return the counts of each of TRAFFIC_KINDS."""
        return self.submitted, self.answered, self.polls, self.rate_limited

    def merged(self, most: int) -> Traffic:
        """Add up neighboring counts, so that there are at most `most` of each kind."""
        length = max(map(len, self.series()))
        step = max(1, -(-length // most))
        sums = ([sum(counts[at : at + step]) for at in range(0, length, step)] for counts in self.series())
        return Traffic(self.execution, self.width_s * step, *sums)


class AnswerAge(ReportValue, frozen=True):
    """Answers in use, by age."""

    label: str
    found: int
    not_found: int


class Anomaly(ReportValue, frozen=True):
    """A difference from earlier runs; `text` is a sentence without any lead data."""

    kind: str
    text: str


class ComparedSide(ReportValue, frozen=True):
    """One side of a comparison. `compared` counts its requests."""

    label: str
    providers: Sequence[str]
    compared: int
    found: int
    not_found: int
    credits: float
    cost_per_hit: float | None


class Comparison(ReportValue, frozen=True):
    """Two sides. `common` leads were answered on both; the comparison of matches and credits uses only these.

    `verdict` is one sentence: which side found more and at what cost, or why that is unknown.
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


class OutputRows(ReportValue, frozen=True):
    """Rows of the output with their cells (`--with-rows`). `left_out` counts the rows beyond the limit."""

    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    left_out: int


class Report(ReportValue, frozen=True, kw_only=True):
    """The data of the page. `statuses` counts rows of the current input, `requests` those of the ledger by state.

    `runs` are the job's runs, oldest first; the page begins with the last one. `credits_spent` covers all of them.
    """

    job: str
    sandbox: bool
    made_at: str
    ledger: str
    input: str
    output: str
    waterfall: ReportedWaterfall
    runs: Sequence[ReportedRun] = ()
    rows: int | None = None
    statuses: Mapping[str, int] = {}
    requests: Mapping[str, int]
    credits_spent: float = 0.0
    credits_unknown: int = 0
    planned: Mapping[str, float | None] | None = None
    columns: Sequence[HitCounts] = ()
    groups: Sequence[GroupedHits] = ()
    latencies: LatencyHistogram | None = None
    traffic: Traffic | None = None
    ages: Sequence[AnswerAge] = ()
    anomalies: Sequence[Anomaly] = ()
    actions: Sequence[RequiredAction] = ()
    notes: Sequence[str] = ()
    comparison: Comparison | None = None
    leads: OutputRows | None = None
    #: The waterfall or enrichment of each step; () for a job without steps.
    step_waterfalls: Sequence[ReportedWaterfall] = ()
    #: Rows of the current input for which no request is sent, the most frequent reasons first.
    skipped: Sequence[SkippedRows] = ()
    job_file: str = ""

    @property
    def cost_per_lead(self) -> float | None:
        """All credits divided by the found rows, for a job with steps. None: no steps, no found row, unknown prices."""
        is_known = self.step_waterfalls and not self.credits_unknown
        return ratio(self.credits_spent, self.statuses.get("found", 0)) if is_known else None

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        values = to_builtins(self)
        if not self.step_waterfalls:
            del values["step_waterfalls"], values["waterfall"]["step"]
            return {"exit_code": 0, **values}
        return {"exit_code": 0, **values, "cost_per_lead": self.cost_per_lead}

"""Compares two executions or two jobs: matches and cost, above all for the leads that both requested."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from math import comb, erfc, sqrt

import polars as pl
from msgspec import Struct
from msgspec.structs import replace

from enrich.errors import CommandRefused, JobError
from enrich.job.job import Job
from enrich.ledger import queries, records
from enrich.ledger.database import Database, ledger_exists
from enrich.models import MICROS_PER_CREDIT, State, format_credits, pluralize, to_credits
from enrich.report.build import reported_providers
from enrich.report.data import ComparedSide, Comparison, ReportedProvider, ratio
from enrich.run.provider_stats import ProviderStats, count_kinds, read_descriptions

#: A difference with a p-value of at least SIGNIFICANT_P may be chance; one with less than CERTAIN_P is not chance.
SIGNIFICANT_P, CERTAIN_P = 0.05, 0.001
#: Costs per match count as equal within this difference: in credits, and as a share of the cost.
SAME_COST_CREDITS, SAME_COST_SHARE = 0.005, 0.01
#: Rows held as Python objects at a time.
CHUNK_ROWS = 50_000


class _SideData(Struct, frozen=True):
    """One side of a comparison. Columns of `leads`: hash of the params, found, credits in millionths or null."""

    side: ComparedSide
    providers: list[ReportedProvider]
    leads: pl.DataFrame


def compare_executions(job: Job, execution: int) -> Comparison:
    """Compare the newest run with results to another one. Raises JobError or CommandRefused if there is none."""
    with closing(_open_ledger(job)) as ledger, ledger.snapshot():
        known = [row.id for row in records.list_executions(ledger, job.name)]
        if execution not in known:
            raise JobError(
                f"--compare {execution}: {job.name} has no run {execution}", "`enrich runs JOB` lists the runs"
            )
        settled = {number for number, _, _ in queries.outcome_counts(ledger, job.name)}
        newest = max(settled - {execution}, default=None)
        if newest is None:
            message = f"--compare {execution}: no other run of {job.name} has results"
            raise CommandRefused(message, "compare it after the next run")
        left, right = (_read_side(ledger, job, f"run {number}", number) for number in (newest, execution))
    return _compare(left, right)


def compare_jobs(job: Job, other: Job) -> Comparison:
    """Compare two jobs. Raises JobError when both are the same, CommandRefused when one has no ledger."""
    if (job.name, job.ledger) == (other.name, other.ledger):
        raise JobError(f"--compare {other.document.path}: this is the same job", "name another job, or a run")
    labels = [each.document.path.name for each in (job, other)]
    if labels[0] == labels[1]:
        paths = [each.document.path.resolve() for each in (job, other)]
        labels = [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    sides = []
    for each, label in zip((job, other), labels, strict=True):
        with closing(_open_ledger(each)) as ledger, ledger.snapshot():
            sides.append(_read_side(ledger, each, label, None))
    return _compare(*sides)


def _open_ledger(job: Job) -> Database:
    if not ledger_exists(job.ledger):
        command = shlex.join(["enrich", "run", str(job.document.path)])
        raise CommandRefused(f"{job.ledger}: no ledger, because {job.name} has no runs yet", f"run it first: {command}")
    return Database(job.ledger, read_only=True)


def _read_side(ledger: Database, job: Job, label: str, execution: int | None) -> _SideData:
    stats = ProviderStats(read_descriptions(ledger))
    states: Counter[str] = Counter()
    paid = 0
    for kind, number in count_kinds(queries.settled_attempts(ledger, job.name, execution)):
        stats.add(kind, number)
        states[kind.state] += number
        paid += (kind.paid or 0) * number
    side_providers = reported_providers(stats.totals())
    names = [each.name for each in side_providers if not each.verifies]
    found, spent = states[State.FOUND], to_credits(paid)
    side = ComparedSide(label, names, states.total(), found, states[State.NOT_FOUND], spent, ratio(spent, found))
    return _SideData(side, side_providers, _lead_frame(queries.answered_params(ledger, job.name, execution)))


def _lead_frame(answered: Iterator[tuple[str, bool, float | None]]) -> pl.DataFrame:
    """Keep an 8-byte hash of each lead's params; of several answers, keep the last."""
    schema = {"lead": pl.String(), "found": pl.Boolean(), "credits": pl.Float64()}
    parts: list[pl.DataFrame] = []
    while not parts or parts[-1].height == CHUNK_ROWS:
        chunk = pl.DataFrame(list(islice(answered, CHUNK_ROWS)), schema, orient="row")
        parts.append(chunk.with_columns(pl.col("lead").hash()))
    return pl.concat(parts).unique("lead", keep="last")


def _compare(left: _SideData, right: _SideData) -> Comparison:
    common = left.leads.join(right.leads, on="lead", suffix="_right")
    here, there = pl.col("found"), pl.col("found_right")
    both, only_left, only_right, neither = common.select(
        (here & there).sum().alias("both"),
        (here & ~there).sum().alias("left"),
        (~here & there).sum().alias("right"),
        (~here & ~there).sum().alias("neither"),
    ).row(0)
    costs = [float(common[name].sum()) / MICROS_PER_CREDIT for name in ("credits", "credits_right")]
    unknown = common["credits"].null_count() + common["credits_right"].null_count()
    comparison = Comparison(
        left=left.side,
        right=right.side,
        left_providers=left.providers,
        right_providers=right.providers,
        common=common.height,
        both=both,
        only_left=only_left,
        only_right=only_right,
        neither=neither,
        common_left_credits=costs[0],
        common_right_credits=costs[1],
        verdict="",
    )
    return replace(comparison, verdict=write_verdict(comparison, unknown))


def write_verdict(comparison: Comparison, unknown: int) -> str:
    """Return the verdict in one sentence; `unknown` answers to common leads have no known price."""
    if not comparison.common:
        return "No lead has results on both sides. The sides have different leads, so their rates are hard to compare."
    more, leads = comparison.only_right - comparison.only_left, pluralize(comparison.common, "lead")
    only = f"{comparison.only_right:,} only there, {comparison.only_left:,} only here"
    if more:
        chance = _significance_text(mcnemar_p_value(comparison.only_left, comparison.only_right))
        how = "more" if more > 0 else "fewer"
        matches = f"{pluralize(abs(more), f'{how} match')} for the {leads} of both sides ({only}: {chance})"
    else:
        matches = f"as many matches for the {leads} of both sides ({only})"
    return f"`{comparison.right.label}` has {matches}{_cost_text(comparison, unknown)}."


def _significance_text(p_value: float) -> str:
    if p_value >= SIGNIFICANT_P:
        return "may be chance"
    return f"unlikely to be chance, p = {p_value:.2g}" if p_value >= CERTAIN_P else f"not chance, p < {CERTAIN_P}"


def _cost_text(comparison: Comparison, unknown: int) -> str:
    left_found, right_found = comparison.both + comparison.only_left, comparison.both + comparison.only_right
    if unknown:
        return f". The price of {pluralize(unknown, 'result')} is unknown"
    if not left_found or not right_found:
        credits_ = comparison.common_right_credits - comparison.common_left_credits
        return f" at {format_credits(abs(credits_))} credits {'more' if credits_ > 0 else 'less'}" if credits_ else ""
    price, other = comparison.common_right_credits / right_found, comparison.common_left_credits / left_found
    difference = price - other
    if abs(difference) <= min(SAME_COST_CREDITS, SAME_COST_SHARE * max(price, other)):
        return " at the same cost per match"
    return f" at {format_credits(abs(difference))} credits {'more' if difference > 0 else 'less'} per match"


#: Above this many pairs, the normal distribution is close enough.
_MAX_EXACT = 1_000


def mcnemar_p_value(one: int, other: int) -> float:
    """Return the probability of a split at least as uneven as this, if both sides were equally good.

    `one` and `other` count the leads that only one side found. McNemar's test, exact: two-sided binomial with p = 1/2
    on the discordant pairs.
    """
    both, fewer = one + other, min(one, other)
    if one == other:
        return 1.0
    if both > _MAX_EXACT:
        return erfc((abs(one - other) - 1) / sqrt(2 * both))
    return min(1.0, sum(comb(both, chosen) for chosen in range(fewer + 1)) * 2.0 ** (1 - both))

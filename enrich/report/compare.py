"""Two executions, or two jobs, side by side: who found more for less, above all of the leads that both asked for."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from math import comb, erfc, sqrt

import polars as pl

from enrich.cascade import Cascade, read_offers
from enrich.errors import JobError, Refused
from enrich.job import Job
from enrich.model import MICROS, Settled, State, many, to_credits, write_credits
from enrich.report.earned import providers
from enrich.report.facts import Comparison, Provider, Side
from enrich.store.database import exists
from enrich.store.ledger import Ledger

#: So probable a difference may be chance, and one less probable than that is none.
CHANCE, NO_CHANCE = 0.05, 0.001
#: Costs per hit are the same that differ by so little, in credits and of the cost.
HUNDREDTH, SAME = 0.005, 0.01
#: Rows that are held as Python objects at once.
CHUNK = 50_000


@dataclass(frozen=True, slots=True)
class _Read:
    """One side with all that is compared. `leads`: a hash of the params, found, credits in millionths or null."""

    side: Side
    providers: list[Provider]
    leads: pl.DataFrame


def compare_executions(job: Job, execution: int) -> Comparison:
    """Hold the newest execution that was answered anything against an earlier one.

    Raises JobError when that one is none of the job's, Refused when there are no two.
    """
    with closing(_open(job)) as ledger, ledger.still():
        known = [row.id for row in ledger.lived(job.name)]
        if execution not in known:
            raise JobError(f"--compare {execution}: {job.name} has no execution {execution}", "enrich runs lists them")
        settled = {number for number, _, _ in ledger.fates(job.name)}
        newest = max(settled - {execution}, default=None)
        if newest is None:
            raise Refused(f"--compare {execution}: no other execution of {job.name} was answered anything")
        left, right = (_read(ledger, job, f"execution {number}", number) for number in (newest, execution))
    return _compared(left, right)


def compare_jobs(job: Job, other: Job) -> Comparison:
    """Hold a job against another one. Raises JobError when both are the same, Refused when one has no ledger."""
    if (job.name, job.ledger) == (other.name, other.ledger):
        raise JobError(f"--compare {other.document.path}: that is this very job", "name another one, or an execution")
    labels = [each.document.path.name for each in (job, other)]
    if labels[0] == labels[1]:
        labels = [str(each.document.path) for each in (job, other)]
    sides = []
    for each, label in zip((job, other), labels, strict=True):
        with closing(_open(each)) as ledger, ledger.still():
            sides.append(_read(ledger, each, label, None))
    return _compared(*sides)


def _open(job: Job) -> Ledger:
    if not exists(job.ledger):
        raise Refused(f"{job.ledger}: there is no ledger: {job.name} has never run", "enrich run it first")
    return Ledger(job.ledger, read_only=True)


def _read(ledger: Ledger, job: Job, label: str, execution: int | None) -> _Read:
    cascade, total = Cascade(read_offers(ledger.waterfalls())), _Total()
    for settled in ledger.settled(job.name, execution):
        cascade.add(settled)
        total.add(settled)
    told = providers(cascade.earnings())
    names = [each.name for each in told if not each.verifies]
    spent = to_credits(total.spent)
    cost_per_hit = spent / total.found if total.found else None
    side = Side(label, names, total.asked, total.found, total.not_found, spent, cost_per_hit)
    return _Read(side, told, _leads(ledger.answered(job.name, execution)))


@dataclass(slots=True)
class _Total:
    asked: int = 0
    found: int = 0
    not_found: int = 0
    spent: int = 0

    def add(self, settled: Settled) -> None:
        self.asked += 1
        self.found += settled.state == State.FOUND
        self.not_found += settled.state == State.NOT_FOUND
        self.spent += settled.paid or 0


def _leads(answered: Iterator[tuple[str, bool, float | None]]) -> pl.DataFrame:
    """Keep some bytes of each lead; of several answers the last."""
    schema = {"lead": pl.UInt64(), "found": pl.Boolean(), "credits": pl.Float64()}
    parts = [pl.DataFrame(schema=schema)]
    while chunk := list(islice(answered, CHUNK)):
        leads = array("Q", (int.from_bytes(blake2b(params.encode(), digest_size=8).digest()) for params, _, _ in chunk))
        parts.append(
            pl.DataFrame(
                {"lead": leads, "found": [row[1] for row in chunk], "credits": [row[2] for row in chunk]}, schema
            )
        )
    return pl.concat(parts).unique("lead", keep="last")


def _compared(left: _Read, right: _Read) -> Comparison:
    common = left.leads.join(right.leads, on="lead", suffix="_right")
    here, there = pl.col("found"), pl.col("found_right")
    both, only_left, only_right, neither = common.select(
        (here & there).sum().alias("both"),
        (here & ~there).sum().alias("left"),
        (~here & there).sum().alias("right"),
        (~here & ~there).sum().alias("neither"),
    ).row(0)
    costs = [float(common[name].sum()) / MICROS for name in ("credits", "credits_right")]
    unknown = common["credits"].null_count() + common["credits_right"].null_count()
    told = Comparison(
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
    return replace(told, verdict=verdict(told, unknown))


def verdict(told: Comparison, unknown: int = 0) -> str:
    """Say who found more for less; `unknown` answers of leads that both asked for have no known price."""
    if not told.common:
        return "no lead was answered on both sides: compare the rates with care, the leads differ"
    more, leads = told.only_right - told.only_left, many(told.common, "lead")
    only = f"{told.only_right:,} only there, {told.only_left:,} only here"
    if more:
        chance = _sure(mcnemar(told.only_left, told.only_right))
        how = "more" if more > 0 else "fewer"
        found = f"found {abs(more):,} {how} of the {leads} that both asked for ({only}: {chance})"
    else:
        found = f"found as many of the {leads} that both asked for ({only})"
    return f"`{told.right.label}` {found}{_price(told, unknown)}"


def _sure(chance: float) -> str:
    if chance >= CHANCE:
        return "may be chance"
    return f"hardly chance: p = {chance:.2g}" if chance >= NO_CHANCE else f"no chance: p < {NO_CHANCE}"


def _price(told: Comparison, unknown: int) -> str:
    here, there = told.both + told.only_left, told.both + told.only_right
    if unknown:
        return f"; what that cost is not known of {many(unknown, 'answer')}"
    if not here or not there:
        credits_ = told.common_right_credits - told.common_left_credits
        return f" at {write_credits(abs(credits_))} credits {'more' if credits_ > 0 else 'less'}" if credits_ else ""
    price, other = told.common_right_credits / there, told.common_left_credits / here
    difference = price - other
    if abs(difference) <= min(HUNDREDTH, SAME * max(price, other)):
        return " at the same cost per hit"
    return f" at {write_credits(abs(difference))} credits {'more' if difference > 0 else 'less'} per hit"


#: Beyond so many the normal distribution is near enough.
_EXACT = 1_000


def mcnemar(one: int, other: int) -> float:
    """How likely so uneven a split of the leads that only one side found is, were both sides as good.

    McNemar's test, exact: two-sided binomial with p = 1/2 on the discordant pairs.
    """
    both, fewer = one + other, min(one, other)
    if one == other:
        return 1.0
    if both > _EXACT:
        return erfc((abs(one - other) - 1) / sqrt(2 * both))
    return min(1.0, sum(comb(both, chosen) for chosen in range(fewer + 1)) * 2.0 ** (1 - both))

"""What a run would do and cost: the object that `enrich plan --json` prints and the lines that a person reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from enrich.connect import Connection
from enrich.job import Job
from enrich.model import ASKED, Decision, duration, iso, to_credits, to_micros
from enrich.planfile import Priced, asked
from enrich.store.ledger import Ledger

#: Polls that a request takes, as long as the ledger has no experience.
POLLS_GUESS = 1.5

WHY = {
    Decision.NEW: "never answered",
    Decision.RETRY: "asked again by --retry",
    Decision.REFRESH: "its answer is older than policy.refresh allows",
    Decision.FOUND: "answered before",
    Decision.NOT_FOUND: "answered before: nothing was found",
    Decision.FAILED: "failed before; --retry failed asks again",
    Decision.EXPIRED: "its result was gone; --retry expired asks again",
    Decision.IN_DOUBT: "perhaps charged; decide: --retry in_doubt or --accept in_doubt",
    Decision.WAITING: "waiting at the API; its answer is collected",
    Decision.CAPPED: "beyond caps: enough leads of its group are asked",
    Decision.NOT_SAMPLED: "not in the sample",
    Decision.OVER_LIMIT: "beyond --limit",
    Decision.DUPLICATE: "asks what an earlier row asks",
    Decision.INVALID: "a required param is empty or malformed",
    Decision.FILTERED: "left out by the job",
}

_OF_ROWS = (Decision.DUPLICATE, Decision.INVALID, Decision.FILTERED)


@dataclass(frozen=True, slots=True)
class Cost:
    """What requests are to cost, in credits; `likely` is None before the ledger has any experience.

    `most`: every provider asked, and what each found verified; None where a price is not known.
    """

    likely: float | None
    most: float | None

    @classmethod
    def of(cls, requests: int, likely_price: float | None, worst_price: int | None) -> Cost:
        """Price requests; prices are in millionths."""
        likely = None if likely_price is None else to_credits(round(likely_price * requests))
        most = None if worst_price is None else to_credits(worst_price * requests)
        return cls(likely if requests else 0.0, most if requests else 0.0)

    def __add__(self, other: Cost) -> Cost:
        """Add up what is known."""
        return Cost(_sum(self.likely, other.likely), _sum(self.most, other.most))

    def as_json(self) -> dict[str, float | None]:
        """Return what `--json` prints."""
        return {"min": 0.0, "likely": self.likely, "max": self.most}


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else round(one + other, 6)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do. Credits in millionths; None: not known, or not set.

    `decisions` counts requests, but rows for what is said of rows alone. `likely_price` is what a request
    has cost so far on average, `reserved` what those may cost that are at the API; `providers` and `verifier`
    come with their names.
    """

    job: str
    rows: int
    decisions: dict[Decision, int]
    oldest_ms: int | None
    balance: int | None
    max_credits: int | None
    min_balance: int | None
    cap: int | None
    worst_price: int | None
    likely_price: float | None
    reserved: int
    requests_per_second: float | None
    polls_per_task: float | None
    bulk: int | None
    canary: int | None
    providers: list[tuple[Priced, str]]
    verifier: tuple[Priced, str] | None
    notes: list[str]

    @property
    def to_submit(self) -> int:
        """How many requests would be sent."""
        return sum(self.decisions.get(decision, 0) for decision in ASKED)

    @property
    def requests(self) -> int:
        """How many distinct requests the input wants."""
        return sum(count for decision, count in self.decisions.items() if decision not in _OF_ROWS)

    @property
    def cost(self) -> Cost:
        """What it costs."""
        return Cost.of(self.to_submit, self.likely_price, self.worst_price)

    @property
    def covered(self) -> int | None:
        """How many requests the cap allows even at their worst price; None: there is no cap, or no price."""
        if self.cap is None or not self.worst_price:
            return None
        return min(self.to_submit, max(0, self.cap - self.reserved) // self.worst_price)

    @property
    def seconds(self) -> float | None:
        """How long it takes at the job's rate; None when the job sets none."""
        if self.requests_per_second is None:
            return None
        polls = POLLS_GUESS if self.polls_per_task is None else self.polls_per_task
        tasks = ceil(self.to_submit / (self.bulk or 1))
        return round(tasks * (1 + polls) / self.requests_per_second, 1)

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "job": self.job,
            "exit_code": 0,
            "rows": self.rows,
            "requests": self.requests,
            "to_submit": self.to_submit,
            "decisions": {decision.value: count for decision, count in self.decisions.items()},
            "oldest_answer_at": None if self.oldest_ms is None else iso(self.oldest_ms),
            "balance": to_credits(self.balance),
            "cost": self.cost.as_json(),
            "worst_price": to_credits(self.worst_price),
            "max_credits": to_credits(self.max_credits),
            "min_balance": to_credits(self.min_balance),
            "cap_allows": self.covered,
            "seconds": self.seconds,
            "providers": [_priced(*provider) for provider in self.providers],
            "email_verifier": None if self.verifier is None else _priced(*self.verifier),
            "notes": self.notes,
        }


def foresee(  # noqa: PLR0913, PLR0917 - all of them are needed once
    job: Job, connection: Connection, ledger: Ledger, rows: int, decisions: dict[Decision, int], cap: int | None
) -> Plan:
    """Put together what is known once the whole input was seen in a pass of the ledger."""
    question, waterfall = connection.question, connection.waterfall
    providers, verifier = asked(question, waterfall)
    named = {each.id: each.name for each in waterfall.available_enrichments}
    verifiers = {each.id: each.name for each in waterfall.email_verifiers}
    return Plan(
        job=job.name,
        rows=rows,
        decisions=decisions,
        oldest_ms=ledger.oldest_answer(),
        balance=connection.balance,
        max_credits=to_micros(job.max_credits),
        min_balance=to_micros(job.model.limits.min_balance),
        cap=cap,
        worst_price=question.worst_price,
        reserved=ledger.reserved(),
        likely_price=ledger.experience(question.call)[1],
        requests_per_second=job.model.limits.requests_per_second,
        polls_per_task=ledger.polls_per_task(),
        bulk=job.model.dispatch.bulk,
        canary=job.model.canary.rows if job.model.canary else None,
        providers=[(each, named.get(each.id, "")) for each in providers],
        verifier=None if verifier is None else (verifier, verifiers.get(verifier.id, "")),
        notes=connection.notes,
    )


def _priced(provider: Priced, name: str) -> dict[str, Any]:
    return {"id": provider.id, "name": name, "price": to_credits(provider.price)}


def lines(plan: Plan) -> Iterator[str]:
    """Write the plan for a person."""
    yield f"{plan.job}: {plan.rows:,} rows, {plan.requests:,} distinct requests: {plan.to_submit:,} would be sent"
    for decision, why in WHY.items():
        if count := plan.decisions.get(decision):
            oldest = f"; the oldest at {iso(plan.oldest_ms)}" if decision is Decision.FOUND and plan.oldest_ms else ""
            yield f"  {decision.value:<12}{count:>9,}  {'pay' if decision in ASKED else '   '}  {why}{oldest}"
    yield from _money(plan)
    if plan.seconds is not None:
        polls = "guessed" if plan.polls_per_task is None else "so far"
        per_task = POLLS_GUESS if plan.polls_per_task is None else plan.polls_per_task
        yield (
            f"  time      about {duration(plan.seconds)} at {plan.requests_per_second:g} requests/s, "
            f"{per_task:.1f} polls a {f'task of {plan.bulk:,}' if plan.bulk else 'request'} {polls}"
        )
    if plan.canary is not None and plan.decisions.get(Decision.NEW, 0) > plan.canary:
        yield f"  canary    the first {plan.canary:,} are judged before the others are sent"
    for note in plan.notes:
        yield f"  note      {note}"


def _money(plan: Plan) -> Iterator[str]:
    cost = plan.cost
    most = "an unknown number of" if cost.most is None else f"{cost.most:,.2f}"
    likely = "" if cost.likely is None else f", likely {cost.likely:,.2f} (by this ledger's answers so far)"
    yield f"  cost      0.00 to {most} credits{likely}"
    asked = [f"{name or 'provider'} {each.id} ({_price(each)})" for each, name in plan.providers]
    yield f"  asked     {', '.join(asked)}"
    if plan.verifier is not None:
        each, name = plan.verifier
        yield f"            and what each finds is verified by {name or 'verifier'} {each.id} ({_price(each)})"
    if plan.balance is not None:
        kept = "" if plan.min_balance is None else f", {to_credits(plan.min_balance):,.2f} of it stays (min_balance)"
        yield f"  balance   {to_credits(plan.balance):,.2f}{kept}"
    if plan.covered is not None:
        cap = to_credits(plan.cap or 0)
        enough = "all" if plan.covered == plan.to_submit else f"{plan.covered:,} of {plan.to_submit:,}"
        waiting = f", {to_credits(plan.reserved):,.2f} of them kept for those at the API" if plan.reserved else ""
        yield f"  cap       {cap:,.2f} credits{waiting}: enough for {enough} even at their worst price"


def _price(provider: Priced) -> str:
    return "price unknown" if provider.price is None else f"{to_credits(provider.price):g}"

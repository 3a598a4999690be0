"""Builds the plan: what a run would send and cost, and the decision for each row. Spends and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from enrich.job.job import Job
from enrich.ledger.ledger import Ledger
from enrich.models import (
    DECISIONS_TO_SEND,
    Decision,
    format_duration,
    iso_time,
    to_credits,
    to_micros,
)
from enrich.run.plan_file import ProviderPrice, provider_prices
from enrich.run.preflight import Preflight

#: Polls per task, as long as the ledger has no experience.
DEFAULT_POLLS_PER_TASK = 1.5

DECISION_REASONS = {
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

_ROW_DECISIONS = (Decision.DUPLICATE, Decision.INVALID, Decision.FILTERED)


@dataclass(frozen=True, slots=True)
class Cost:
    """The expected cost of requests, in credits. `likely` is None before the ledger has any experience.

    `maximum`: every provider is called, and what each found is verified. None when a price is unknown.
    """

    likely: float | None
    maximum: float | None

    @classmethod
    def for_requests(cls, requests: int, likely_price: float | None, worst_price: int | None) -> Cost:
        """Return the cost of requests. Prices are in millionths."""
        likely = None if likely_price is None else to_credits(round(likely_price * requests))
        most = None if worst_price is None else to_credits(worst_price * requests)
        return cls(likely if requests else 0.0, most if requests else 0.0)

    def __add__(self, other: Cost) -> Cost:
        """Add two costs. The sum is None where one of them is unknown."""
        return Cost(_add_known(self.likely, other.likely), _add_known(self.maximum, other.maximum))

    def as_json(self) -> dict[str, float | None]:
        """Return what `--json` prints."""
        return {"min": 0.0, "likely": self.likely, "max": self.maximum}


def _add_known(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else round(one + other, 6)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do. Credits in millionths. None: unknown, or not set.

    `decisions` counts requests, but rows for decisions about rows alone. `likely_price` is the average cost of a
    request so far. `reserved` is the highest cost of the running tasks. `providers` and `verifier` come with their
    names.
    """

    job: str
    rows: int
    decisions: dict[Decision, int]
    oldest_answer_ms: int | None
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
    providers: list[tuple[ProviderPrice, str]]
    verifier: tuple[ProviderPrice, str] | None
    notes: list[str]

    @property
    def to_submit(self) -> int:
        """How many requests would be sent."""
        return sum(self.decisions.get(decision, 0) for decision in DECISIONS_TO_SEND)

    @property
    def requests(self) -> int:
        """How many distinct requests the input has."""
        return sum(count for decision, count in self.decisions.items() if decision not in _ROW_DECISIONS)

    @property
    def cost(self) -> Cost:
        """The expected cost."""
        return Cost.for_requests(self.to_submit, self.likely_price, self.worst_price)

    @property
    def cap_allows(self) -> int | None:
        """How many requests the cap allows even at their highest price; None: there is no cap, or no price."""
        if self.cap is None or not self.worst_price:
            return None
        return min(self.to_submit, max(0, self.cap - self.reserved) // self.worst_price)

    @property
    def duration_s(self) -> float | None:
        """How many seconds the run takes at the job's rate; None when the job sets none."""
        if self.requests_per_second is None:
            return None
        polls = DEFAULT_POLLS_PER_TASK if self.polls_per_task is None else self.polls_per_task
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
            "oldest_answer_at": None if self.oldest_answer_ms is None else iso_time(self.oldest_answer_ms),
            "balance": to_credits(self.balance),
            "cost": self.cost.as_json(),
            "worst_price": to_credits(self.worst_price),
            "max_credits": to_credits(self.max_credits),
            "min_balance": to_credits(self.min_balance),
            "cap_allows": self.cap_allows,
            "seconds": self.duration_s,
            "providers": [_provider_json(*provider) for provider in self.providers],
            "email_verifier": None if self.verifier is None else _provider_json(*self.verifier),
            "notes": self.notes,
        }


def build_plan(  # noqa: PLR0913, PLR0917 - every argument is used once
    job: Job, preflight: Preflight, ledger: Ledger, rows: int, decisions: dict[Decision, int], cap: int | None
) -> Plan:
    """Build the plan, after the whole input was read in a pass of the ledger."""
    template, waterfall = preflight.template, preflight.waterfall
    providers, verifier = provider_prices(template, waterfall)
    provider_names = {each.id: each.name for each in waterfall.available_enrichments}
    verifier_names = {each.id: each.name for each in waterfall.email_verifiers}
    return Plan(
        job=job.name,
        rows=rows,
        decisions=decisions,
        oldest_answer_ms=ledger.oldest_answer_ms(),
        balance=preflight.balance,
        max_credits=to_micros(job.max_credits),
        min_balance=to_micros(job.model.limits.min_balance),
        cap=cap,
        worst_price=template.worst_price,
        reserved=ledger.open_reservations(),
        likely_price=ledger.average_price(template.call)[1],
        requests_per_second=job.model.limits.requests_per_second,
        polls_per_task=ledger.polls_per_task(),
        bulk=job.model.dispatch.bulk,
        canary=job.model.canary.rows if job.model.canary else None,
        providers=[(each, provider_names.get(each.id, "")) for each in providers],
        verifier=None if verifier is None else (verifier, verifier_names.get(verifier.id, "")),
        notes=preflight.notes,
    )


def _provider_json(provider: ProviderPrice, name: str) -> dict[str, Any]:
    return {"id": provider.id, "name": name, "price": to_credits(provider.price)}


def format_plan(plan: Plan) -> Iterator[str]:
    """Yield the plan as lines of text."""
    yield f"{plan.job}: {plan.rows:,} rows, {plan.requests:,} distinct requests: {plan.to_submit:,} would be sent"
    for decision, why in DECISION_REASONS.items():
        if count := plan.decisions.get(decision):
            oldest = (
                f"; the oldest at {iso_time(plan.oldest_answer_ms)}"
                if decision is Decision.FOUND and plan.oldest_answer_ms
                else ""
            )
            yield (
                f"  {decision.value:<12}{count:>9,}  {'pay' if decision in DECISIONS_TO_SEND else '   '}  {why}{oldest}"
            )
    yield from _cost_lines(plan)
    if plan.duration_s is not None:
        polls = "guessed" if plan.polls_per_task is None else "so far"
        per_task = DEFAULT_POLLS_PER_TASK if plan.polls_per_task is None else plan.polls_per_task
        yield (
            f"  time      about {format_duration(plan.duration_s)} at {plan.requests_per_second:g} requests/s, "
            f"{per_task:.1f} polls a {f'task of {plan.bulk:,}' if plan.bulk else 'request'} {polls}"
        )
    if plan.canary is not None and plan.decisions.get(Decision.NEW, 0) > plan.canary:
        yield f"  canary    the first {plan.canary:,} are judged before the others are sent"
    for note in plan.notes:
        yield f"  note      {note}"


def _cost_lines(plan: Plan) -> Iterator[str]:
    cost = plan.cost
    maximum = "an unknown number of" if cost.maximum is None else f"{cost.maximum:,.2f}"
    likely = "" if cost.likely is None else f", likely {cost.likely:,.2f} (by this ledger's answers so far)"
    yield f"  cost      0.00 to {maximum} credits{likely}"
    providers = [f"{name or 'provider'} {each.id} ({_format_price(each)})" for each, name in plan.providers]
    yield f"  asked     {', '.join(providers)}"
    if plan.verifier is not None:
        each, name = plan.verifier
        yield f"            and what each finds is verified by {name or 'verifier'} {each.id} ({_format_price(each)})"
    if plan.balance is not None:
        kept = "" if plan.min_balance is None else f", {to_credits(plan.min_balance):,.2f} of it stays (min_balance)"
        yield f"  balance   {to_credits(plan.balance):,.2f}{kept}"
    if plan.cap_allows is not None:
        cap = to_credits(plan.cap or 0)
        enough = "all" if plan.cap_allows == plan.to_submit else f"{plan.cap_allows:,} of {plan.to_submit:,}"
        waiting = f", {to_credits(plan.reserved):,.2f} of them kept for those at the API" if plan.reserved else ""
        yield f"  cap       {cap:,.2f} credits{waiting}: enough for {enough} even at their worst price"


def _format_price(provider: ProviderPrice) -> str:
    return "price unknown" if provider.price is None else f"{to_credits(provider.price):g}"

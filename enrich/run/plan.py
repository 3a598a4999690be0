"""Builds the plan: what a run would send and cost, and the decision for each row. Spends and changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from enrich.databar.description import Provider
from enrich.job.job import Job
from enrich.ledger import enroll, queries
from enrich.ledger.database import Database
from enrich.models import (
    CAPPED_REASON,
    DECISIONS_TO_SEND,
    Decision,
    format_credits,
    format_elapsed,
    iso_time,
    pluralize,
    to_credits,
    to_micros,
)
from enrich.rows.batches import RowCounts
from enrich.rows.requests import format_left_out, left_out_by_param
from enrich.run.budget import Cost
from enrich.run.preflight import Preflight
from enrich.run.terminal_text import top_reasons, wrap_parts

#: Polls per task, as long as the ledger has no finished tasks.
DEFAULT_POLLS_PER_TASK = 1.5

#: Each decision with its reason, and with the words of the first screen if it is one not to send.
_DECISIONS = {
    Decision.NEW: ("not sent yet", ""),
    Decision.RETRY: ("sent again by --retry", ""),
    Decision.REFRESH: ("result is older than policy.refresh allows", ""),
    Decision.FOUND: ("already enriched", "already enriched"),
    Decision.NOT_FOUND: ("no match in an earlier run", "no match"),
    Decision.FAILED: ("failed before; --retry failed sends it again", "failed"),
    Decision.EXPIRED: ("result expired; --retry expired sends it again", "expired"),
    Decision.IN_DOUBT: (
        "unconfirmed, may have been charged; decide: --retry in_doubt or --accept in_doubt",
        "unconfirmed",
    ),
    Decision.WAITING: ("running at Databar; the run collects its result", "running"),
    Decision.CAPPED: (CAPPED_REASON, "over the per-group limit"),
    Decision.NOT_SAMPLED: ("not in the sample", "not in the sample"),
    Decision.OVER_LIMIT: ("over --limit", "over --limit"),
    Decision.DUPLICATE: ("same request as an earlier row", "duplicate"),
    Decision.INVALID: ("missing or unusable input", ""),
    Decision.FILTERED: ("filtered by the job", "filtered"),
}
DECISION_REASONS = {decision: reason for decision, (reason, _) in _DECISIONS.items()}

_ROW_DECISIONS = (Decision.DUPLICATE, Decision.INVALID, Decision.FILTERED)


class PlannedProvider(Struct, frozen=True):
    """A provider or a verifier of a planned run, with its price in credits; None: unknown."""

    id: int
    name: str
    price: float | None

    @classmethod
    def of(cls, provider: Provider) -> PlannedProvider:
        """Return a provider as the API describes it."""
        return cls(provider.id, provider.name, to_credits(to_micros(provider.price)))


class Plan(Struct, frozen=True):
    """What a run would do, with amounts in credits. None: unknown, or not set.

    `decisions` counts requests, but rows for decisions about rows alone. `left_out` counts the rows that lack a param
    although a cell is not empty, by param and reason, and `skipped` the rows that cannot be sent, by reason. `missing`
    counts the latter by the param that they lack. `cap_allows` is how many requests the
    cap allows even at their highest price (`worst_price`); None: there is no cap, or no price. `reserved` is the
    highest cost of the running tasks.
    """

    job: str
    sandbox: bool
    rows: int
    decisions: dict[Decision, int]
    left_out: Mapping[str, Mapping[str, int]]
    oldest_answer_ms: int | None
    balance: float | None
    max_credits: float | None
    min_balance: float | None
    cap: float | None
    cap_allows: int | None
    worst_price: float | None
    cost: Cost
    reserved: float
    requests_per_second: float | None
    polls_per_task: float | None
    bulk: int | None
    canary: int | None
    providers: list[PlannedProvider]
    verifier: PlannedProvider | None
    notes: list[str]
    skipped: Counter[str]
    missing: Mapping[str, int]
    #: The param whose number multiplies the price of a request, and how many pages do.
    priced_by: str | None = None
    pages: int = 1

    @property
    def to_submit(self) -> int:
        """How many requests would be sent."""
        return _count_to_submit(self.decisions)

    @property
    def requests(self) -> int:
        """How many distinct requests the input has."""
        return sum(count for decision, count in self.decisions.items() if decision not in _ROW_DECISIONS)

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
            "left_out": self.left_out,
            "missing": {name: count for name, count in self.missing.items() if count},
            "oldest_answer_at": iso_time(self.oldest_answer_ms),
            "balance": self.balance,
            "cost": self.cost.as_json(),
            "worst_price": self.worst_price,
            "max_credits": self.max_credits,
            "min_balance": self.min_balance,
            "priced_by": self.priced_by,
            "pages": self.pages,
            "cap_allows": self.cap_allows,
            "seconds": self.duration_s,
            "providers": [asdict(provider) for provider in self.providers],
            "email_verifier": None if self.verifier is None else asdict(self.verifier),
            "sandbox": self.sandbox,
            "notes": self.notes,
        }


def build_plan(job: Job, preflight: Preflight, ledger: Database, read: RowCounts, cap: int | None) -> Plan:
    """Build the plan, after the whole input was `read` in a pass of the ledger."""
    template, description = preflight.template, preflight.description
    verifier = description.verifier(template.target)
    decided = enroll.decision_counts(ledger)
    decisions = dict.fromkeys(DECISION_REASONS, 0) | read.row_decisions | decided
    decisions[Decision.DUPLICATE] = read.requests - sum(decided.values())
    to_submit, reserved = _count_to_submit(decisions), queries.open_reservations(ledger)
    cap_allows = None
    if cap is not None and template.worst_price:
        cap_allows = min(to_submit, max(0, cap - reserved) // template.worst_price)
    average_price = queries.average_price(ledger, template.target) if to_submit else None
    cost = Cost.for_requests(to_submit, average_price, template.worst_price)
    return Plan(
        job=job.name,
        sandbox=job.sandbox,
        rows=read.rows,
        decisions=decisions,
        left_out=left_out_by_param(read.left_out),
        skipped=read.skipped,
        missing=read.missing,
        oldest_answer_ms=enroll.oldest_answer_ms(ledger),
        balance=to_credits(preflight.balance),
        max_credits=job.max_credits,
        min_balance=job.model.limits.min_balance,
        cap=to_credits(cap),
        cap_allows=cap_allows,
        worst_price=to_credits(template.worst_price),
        priced_by=template.priced_by,
        pages=template.target.pages,
        cost=cost.within(to_credits(cap), to_credits(reserved)),
        reserved=to_credits(reserved),
        requests_per_second=job.model.limits.requests_per_second,
        polls_per_task=queries.polls_per_task(ledger),
        bulk=job.model.dispatch.bulk,
        canary=job.model.canary.rows if job.model.canary else None,
        providers=list(map(PlannedProvider.of, description.called_providers(template.target))),
        verifier=None if verifier is None else PlannedProvider.of(verifier),
        notes=preflight.notes,
    )


def _count_to_submit(decisions: Mapping[Decision, int]) -> int:
    return sum(decisions.get(decision, 0) for decision in DECISIONS_TO_SEND)


def spend_question(maximum: float | None, leads: int) -> str:
    """Return the question before a run without a cap: what it may cost, and for how many leads."""
    count = pluralize(leads, "lead")
    if maximum is None:
        return f"Send {count} at an unknown price?"
    amount = "1 credit" if maximum == 1 else f"{format_credits(maximum).removesuffix('.00')} credits"
    return f"Spend up to {amount} on {count}?"


def format_plan(plan: Plan, next_lines: Sequence[str] = (), *, details: bool = False) -> Iterator[str]:
    """Yield the plan as lines of text. `details` adds each decision, the providers and the time.

    `next_lines` are the commands that come next.
    """
    yield from wrap_parts(_headline_parts(plan), " · ")
    words = [(plan.decisions.get(decision), word) for decision, (_, word) in _DECISIONS.items()]
    parts = [f"{count:,} {word}" for count, word in words if count and word]
    if parts:
        yield from wrap_parts([f"Not sent: {parts[0]}", *parts[1:]], " · ")
    if number := plan.decisions.get(Decision.INVALID):
        yield f"Skipped: {pluralize(number, 'lead')} ({top_reasons(plan.skipped)})"
    if plan.cap_allows is not None and plan.cap_allows < plan.to_submit:
        running = f", after {plan.reserved:,.2f} for running tasks" if plan.reserved else ""
        enough = f"{plan.cap_allows:,} of {pluralize(plan.to_submit, 'request')}"
        all_cost = f" ({plan.to_submit * plan.worst_price:,.2f} for all)" if plan.worst_price else ""
        yield f"The cap is enough for {enough} at their maximum price{running}{all_cost}"
    if plan.canary is not None and plan.decisions.get(Decision.NEW, 0) > plan.canary:
        yield f"Canary: the first {pluralize(plan.canary, 'request')} are checked before the others are sent"
    yield from (f"Note: {note}" for note in plan.notes)
    if details:
        yield from _detail_lines(plan)
    yield from next_lines


def _headline_parts(plan: Plan) -> Iterator[str]:
    sandbox = "SANDBOX " if plan.sandbox else ""
    if plan.to_submit:
        yield f"{sandbox}{pluralize(plan.to_submit, 'request')} to send"
        yield format_cost(plan.cost)
    else:
        yield f"{sandbox}Nothing to send"
    if plan.balance is not None:
        yield f"balance {plan.balance:,.2f}"
    if plan.min_balance is not None:
        yield f"min_balance {plan.min_balance:,.2f}"
    yield f"cap: {'none' if plan.max_credits is None else format_credits(plan.max_credits)}"


def format_cost(cost: Cost) -> str:
    """Format the expected cost."""
    most = "at an unknown price" if cost.maximum is None else f"at most {cost.maximum:,.2f} credits"
    return most if cost.likely is None else f"likely {cost.likely:,.2f}, {most}"


def _detail_lines(plan: Plan) -> Iterator[str]:
    yield ""
    yield f"{pluralize(plan.rows, 'lead')}, {pluralize(plan.requests, 'distinct request')}"
    for decision, reason in DECISION_REASONS.items():
        if count := plan.decisions.get(decision):
            oldest = decision is Decision.FOUND and plan.oldest_answer_ms
            since = f"; the oldest at {iso_time(plan.oldest_answer_ms)}" if oldest and plan.oldest_answer_ms else ""
            paid = "charged" if decision in DECISIONS_TO_SEND else ""
            yield f"  {decision.value:<12}{count:>9,}  {paid:<7}  {reason}{since}"
    for line in format_left_out(plan.left_out):
        yield f"  not used    {line}"
    providers = [f"{each.name or 'provider'} {each.id} ({_format_price(each)})" for each in plan.providers]
    times = f" times {plan.priced_by}" if plan.priced_by else ""
    times += f" times {plan.pages:,} pages" if plan.pages > 1 else ""
    yield f"  providers   {', '.join(providers)}{times}"
    if plan.verifier is not None:
        yield f"  verifier    {plan.verifier.name or 'verifier'} {plan.verifier.id} ({_format_price(plan.verifier)})"
    if plan.duration_s is not None:
        source = "estimated" if plan.polls_per_task is None else "so far"
        per_task = DEFAULT_POLLS_PER_TASK if plan.polls_per_task is None else plan.polls_per_task
        yield (
            f"  time        about {format_elapsed(plan.duration_s)} at {plan.requests_per_second:.15g} requests/s, "
            f"{per_task:.1f} polls per {f'task of {plan.bulk:,}' if plan.bulk else 'request'} ({source})"
        )


def _format_price(provider: PlannedProvider) -> str:
    return "price unknown" if provider.price is None else f"{provider.price:,.15g}"

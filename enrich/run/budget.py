"""What a run may spend and is expected to: the cap, the highest price of one request, the cost of many."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from msgspec import Struct

from enrich.errors import CanaryStopped, CommandRefused
from enrich.job.job import Job
from enrich.job.spec import Canary
from enrich.job.target import TargetKind
from enrich.models import State, pluralize, to_credits, to_micros
from enrich.rows.template import RequestTemplate


class Budget(Struct, frozen=True):
    """What a run may spend, in millionths of a credit. `cap` None: no cap.

    `stop_reason` is the message where the cap ends the run, `step_stop_reason` where `step_cap` ends a step. The
    highest price of a request is `max_request_price`, times the number in its param `priced_by` if that is set.
    """

    cap: int | None
    max_request_price: int
    stop_reason: str
    hint: str
    priced_by: str | None = None
    #: What one step may spend; None: no cap of its own.
    step_cap: int | None = None
    step_stop_reason: str = ""


#: Nothing may be spent.
NO_BUDGET = Budget(cap=0, max_request_price=0, stop_reason="", hint="")


class Cost(Struct, frozen=True):
    """The expected cost of requests, in credits. `likely` is None while the ledger has no prices of results.

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

    def within(self, cap: float | None, reserved: float = 0.0) -> Cost:
        """Return the cost where open tasks have `reserved` credits of a cap, and these the rest. None: no cap."""
        if cap is None:
            return self
        rest = max(0.0, round(cap - reserved, 6))
        likely = None if self.likely is None else min(self.likely, rest)
        return Cost(likely, rest if self.maximum is None else min(self.maximum, rest))

    def as_json(self) -> dict[str, float | None]:
        """Return what `--json` prints."""
        return {"min": 0.0, "likely": self.likely, "max": self.maximum}


NO_COST = Cost(0.0, 0.0)


def _add_known(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else round(one + other, 6)


def make_budget(job: Job, template: RequestTemplate, balance: int | None, planned_cost: int | None = None) -> Budget:
    """Make the budget: the lowest of `max_credits`, `min_balance` and the plan's highest cost (millionths) is the cap.

    Raises CommandRefused for a cap that cannot be enforced.
    """
    limits = job.model.limits
    max_credits, min_balance = to_micros(limits.max_credits), to_micros(limits.min_balance)
    step_cap = to_micros(job.step_max_credits)
    if template.unit_price is None and (max_credits, min_balance, step_cap) != (None, None, None):
        limit = "min_balance" if max_credits is None and step_cap is None else "max_credits"
        message = f"a provider has no price, so `{limit}` cannot be enforced"
        remedy = "name others in `enrichments`, switch to the current defaults with --update-providers"
        if job.model.enrichments:
            remedy = "remove such providers from `enrichments`"
        hint = f"{remedy}, or run without `{limit}`"
        if template.target.kind is TargetKind.ENRICHMENT:
            message = f"the enrichment `{template.target.id}` has no price, so `{limit}` cannot be enforced"
            hint = f"run without `{limit}`"
        raise CommandRefused(message, hint)
    if min_balance is not None and balance is None:
        raise CommandRefused("the API reports no balance, so `min_balance` cannot be enforced", "run without it")
    spendable = None if min_balance is None or balance is None else max(0, balance - min_balance)
    caps = {
        "the credits cap is reached": (max_credits, "raise `max_credits`"),
        "the balance has reached `min_balance`": (spendable, "top up the account"),
        "the maximum cost of the plan is spent": (planned_cost, "make a new plan"),
    }
    stop_reason, (cap, remedy) = min(caps.items(), key=lambda each: inf if each[1][0] is None else each[1][0])
    hint = f"{remedy}, then run again for the rest"
    max_request_price = template.unit_price or 0
    if cap == max_credits:
        stop_reason = _too_low("`max_credits`", cap, max_request_price) or stop_reason
    step_stop_reason = (
        _too_low(f"`max_credits` of the step `{job.step}`", step_cap, max_request_price)
        or f"the credits cap of the step `{job.step}` is reached"
    )
    return Budget(cap, max_request_price, stop_reason, hint, template.priced_by, step_cap, step_stop_reason)


def _too_low(name: str, cap: int | None, max_request_price: int) -> str | None:
    """Return that a cap does not allow a single request; None: it does."""
    if cap is None or cap >= max_request_price:
        return None
    return f"{name} is {to_credits(cap):,.15g}, and one request may cost {to_credits(max_request_price):,.15g}"


def check_balance(job: Job, template: RequestTemplate, balance: int | None) -> None:
    """Raise CommandRefused when the balance is too low for one request, or for one that leaves `min_balance`."""
    if balance is None:
        return
    balance_text = f"the balance is {pluralize(to_credits(balance), 'credit')}"
    if balance < 0:
        raise CommandRefused(balance_text, "top up the account")
    if (max_request_price := template.worst_price) is None:
        return
    min_balance = to_micros(job.model.limits.min_balance)
    if balance < max_request_price:
        raise CommandRefused(
            f"{balance_text}, one request may cost {to_credits(max_request_price):,.15g}", "top up the account"
        )
    if min_balance is not None and balance - min_balance < max_request_price:
        raise CommandRefused(
            f"{balance_text}, `min_balance` is {to_credits(min_balance):,.15g}, "
            f"and one request may cost {to_credits(max_request_price):,.15g}",
            "top up the account, or lower `min_balance`",
        )


#: Outcomes that count for the canary. Requests that are unconfirmed or still running do not.
_CONCLUSIVE = (State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED)


def check_canary(canary: Canary, outcomes: Mapping[State, int], step: str = "") -> CanaryStopped | None:
    """Return why the rest must not be sent; None when the first results look right. `step`: '' without steps."""
    conclusive = sum(outcomes.get(state, 0) for state in _CONCLUSIVE)
    found = outcomes.get(State.FOUND, 0)
    # Not `found >= rate * conclusive`: as a float, 0.55 * 100 is more than 55.
    if conclusive and found / conclusive >= canary.min_hit_rate:
        return None
    others = ", ".join(f"{count:,} {state.value}" for state, count in outcomes.items() if state is not State.FOUND)
    observed = (
        f"{found:,} of {pluralize(conclusive, 'result')} matched ({found / conclusive:.0%})"
        if conclusive
        else "no result arrived"
    )
    where = f"step `{step}`: " if step else ""
    return CanaryStopped(
        f"{where}the canary stopped the run: {observed}, at least {canary.min_hit_rate:.0%} are required"
        + (f"; {others}" if others else ""),
        "check `params` and a result (`enrich explain JOB --row 1`). The rest is pending, and the output is unchanged",
    )

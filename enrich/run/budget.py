"""What a run may spend: the cap, and the highest price of one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from enrich.errors import CanaryStopped, CommandRefused
from enrich.job.job import Job
from enrich.job.spec import Canary
from enrich.ledger.ledger import Ledger
from enrich.models import State, to_credits, to_micros
from enrich.rows.template import RequestTemplate


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend, in millionths of a credit. `cap` None: no cap. `stop_reason` is the message at its end."""

    cap: int | None
    max_request_price: int
    stop_reason: str
    hint: str


def make_budget(job: Job, template: RequestTemplate, balance: int | None, planned_cost: int | None = None) -> Budget:
    """Make the budget: the lowest of `max_credits`, `min_balance` and the plan's highest cost (millionths) is the cap.

    Raises CommandRefused for a cap that cannot be enforced.
    """
    limits = job.model.limits
    max_credits, min_balance = to_micros(limits.max_credits), to_micros(limits.min_balance)
    if template.worst_price is None and (max_credits is not None or min_balance is not None):
        raise CommandRefused(
            f"the API names no price for a provider, so `{_configured_limit(job)}` cannot be kept",
            f"leave such providers out of `enrichments`, or run without `{_configured_limit(job)}`",
        )
    if min_balance is not None and balance is None:
        raise CommandRefused("the API does not tell the balance, so `min_balance` cannot be kept", "run without it")
    max_request_price = template.worst_price or 0
    spendable = None if min_balance is None or balance is None else max(0, balance - min_balance)
    caps = {
        "the credits cap is reached": (max_credits, "raise `max_credits`"),
        "the balance has come down to `min_balance`": (spendable, "top up the account"),
        "what the plan would cost at most is spent": (planned_cost, "make a new plan"),
    }
    stop_reason, (cap, remedy) = min(caps.items(), key=lambda each: inf if each[1][0] is None else each[1][0])
    full_reason = f"{stop_reason}: nothing in flight could free enough for another request"
    return Budget(cap, max_request_price, full_reason, f"{remedy}; the rest stays pending")


def make_run_budget(
    ledger: Ledger, job: Job, template: RequestTemplate, balance: int | None, plan: tuple[int, int] | None
) -> tuple[Budget, CommandRefused | None]:
    """Make the budget of a run. `plan`: how many requests it sends, and the newest run when it was made.

    A cap that cannot be enforced is raised, or returned when open tasks have to be collected first.
    """
    planned_cost = None
    if plan is not None and template.worst_price is not None:
        to_submit, since = plan
        # Open tasks settle in this run, so their reservations come on top.
        left = max(0, to_submit - ledger.sent_since(since, job.name))
        planned_cost = left * template.worst_price + ledger.open_reservations()
    try:
        return make_budget(job, template, balance, planned_cost), None
    except CommandRefused as error:
        if not ledger.submitted_tasks():
            raise
        return Budget(0, 0, error.message, error.hint or ""), error


def _configured_limit(job: Job) -> str:
    return "max_credits" if job.max_credits is not None else "min_balance"


def check_balance(job: Job, template: RequestTemplate, balance: int | None) -> None:
    """Raise CommandRefused when the balance is too low for one request, or for one that leaves `min_balance`."""
    max_request_price = template.worst_price
    if balance is not None and balance < 0:
        raise CommandRefused(f"the balance is {to_credits(balance):,g} credits", "top up the account")
    if max_request_price is None or balance is None:
        return
    balance_text = f"the balance is {to_credits(balance):,g} credits"
    min_balance = to_micros(job.model.limits.min_balance)
    if balance < max_request_price:
        raise CommandRefused(
            f"{balance_text}, one request may cost {to_credits(max_request_price):g}", "top up the account"
        )
    if min_balance is not None and balance - min_balance < max_request_price:
        raise CommandRefused(
            f"{balance_text}, `min_balance` keeps {to_credits(min_balance):,g} of them "
            f"and one request may cost {to_credits(max_request_price):g}",
            "top up the account, or lower `min_balance`",
        )


#: Outcomes that count for the canary. Requests that are unconfirmed or still running do not.
_CONCLUSIVE = (State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED)


def check_canary(canary: Canary, outcomes: Mapping[State, int]) -> CanaryStopped | None:
    """Return why the rest must not be sent; None when the first results look right."""
    conclusive = sum(outcomes.get(state, 0) for state in _CONCLUSIVE)
    found = outcomes.get(State.FOUND, 0)
    # Not `found >= rate * conclusive`: as a float, 0.55 * 100 is more than 55.
    if conclusive and found / conclusive >= canary.min_hit_rate:
        return None
    others = ", ".join(f"{count:,} {state.value}" for state, count in outcomes.items() if state is not State.FOUND)
    observed = (
        f"{found:,} of {conclusive:,} answers found something ({found / conclusive:.0%})"
        if conclusive
        else "no answer came"
    )
    return CanaryStopped(
        f"the canary stopped the run: {observed}, at least {canary.min_hit_rate:.0%} were wished for"
        + (f"; {others}" if others else ""),
        "look at `params` and at some answers (enrich explain); the rest is pending, the output was left as it was",
    )

"""What an execution may spend: the cap, and the worst price of one request."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from enrich.errors import CommandRefused
from enrich.job.job import Job
from enrich.ledger.ledger import Ledger
from enrich.model import to_micros
from enrich.rows.template import RequestTemplate


@dataclass(frozen=True, slots=True)
class Budget:
    """What an execution may spend, in millionths of a credit; None: no cap. `reason` tells of the cap's end."""

    cap: int | None
    max_request_price: int
    stop_reason: str
    hint: str


def make_budget(job: Job, template: RequestTemplate, balance: int | None, planned_cost: int | None = None) -> Budget:
    """Keep `max_credits`, `min_balance` and what a plan said at most (millionths), whichever leaves least.

    Raises Refused when a cap is wished for that cannot be kept.
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
    """Make the budget of an execution; `plan`: how many it sends, and the newest execution when it was made.

    A cap that can't be kept is raised, or returned when something at the API has to be collected first.
    """
    planned_cost = None
    if plan is not None and template.worst_price is not None:
        to_submit, since = plan
        # What is at the API settles in this execution, so its reservations come on top.
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

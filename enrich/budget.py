"""What an execution may spend: the cap, and the worst price of one request."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from enrich.errors import Refused
from enrich.job import Job
from enrich.model import to_micros
from enrich.question import Question
from enrich.store.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Budget:
    """What an execution may spend, in millionths of a credit; None: no cap. `reason` tells of the cap's end."""

    cap: int | None
    price: int
    reason: str
    hint: str


def make_budget(job: Job, question: Question, balance: int | None, planned: int | None = None) -> Budget:
    """Keep `max_credits`, `min_balance` and what a plan said at most (millionths), whichever leaves least.

    Raises Refused when a cap is wished for that cannot be kept.
    """
    limits = job.model.limits
    capped, kept = to_micros(limits.max_credits), to_micros(limits.min_balance)
    if question.worst_price is None and (capped is not None or kept is not None):
        raise Refused(
            f"the API names no price for a provider, so `{_named(job)}` cannot be kept",
            f"leave such providers out of `enrichments`, or run without `{_named(job)}`",
        )
    if kept is not None and balance is None:
        raise Refused("the API does not tell the balance, so `min_balance` cannot be kept", "run without it")
    price = question.worst_price or 0
    room = None if kept is None or balance is None else max(0, balance - kept)
    caps = {
        "the credits cap is reached": (capped, "raise `max_credits`"),
        "the balance has come down to `min_balance`": (room, "top up the account"),
        "what the plan would cost at most is spent": (planned, "make a new plan"),
    }
    said, (cap, remedy) = min(caps.items(), key=lambda each: inf if each[1][0] is None else each[1][0])
    reason = f"{said}: nothing in flight could free enough for another request"
    return Budget(cap, price, reason, f"{remedy}; the rest stays pending")


def afford(
    ledger: Ledger, job: Job, question: Question, balance: int | None, plan: tuple[int, int] | None
) -> tuple[Budget, Refused | None]:
    """Make the budget of an execution; `plan`: how many it sends, and the newest execution when it was made.

    A cap that can't be kept is raised, or returned when something at the API has to be collected first.
    """
    planned = None
    if plan is not None and question.worst_price is not None:
        to_submit, since = plan
        # What is at the API settles in this execution, so its reservations come on top.
        left = max(0, to_submit - ledger.asked_since(since, job.name))
        planned = left * question.worst_price + ledger.reserved()
    try:
        return make_budget(job, question, balance, planned), None
    except Refused as error:
        if not ledger.tasks():
            raise
        return Budget(0, 0, error.message, error.hint or ""), error


def _named(job: Job) -> str:
    return "max_credits" if job.max_credits is not None else "min_balance"

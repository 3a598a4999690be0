"""What must hold before the first credit of an execution is spent; all of it refuses with exit 5."""

from __future__ import annotations

from enrich.errors import Refused
from enrich.job import Job
from enrich.model import to_credits, to_micros
from enrich.question import Question


def check_balance(job: Job, question: Question, balance: int | None) -> None:
    """Refuse when the balance is too low for one request, or for one that leaves `min_balance`."""
    price = question.worst_price
    if balance is not None and balance < 0:
        raise Refused(f"the balance is {to_credits(balance):,g} credits", "top up the account")
    if price is None or balance is None:
        return
    have = f"the balance is {to_credits(balance):,g} credits"
    kept = to_micros(job.model.limits.min_balance)
    if balance < price:
        raise Refused(f"{have}, one request may cost {to_credits(price):g}", "top up the account")
    if kept is not None and balance - kept < price:
        raise Refused(
            f"{have}, `min_balance` keeps {to_credits(kept):,g} of them and one request may cost {to_credits(price):g}",
            "top up the account, or lower `min_balance`",
        )

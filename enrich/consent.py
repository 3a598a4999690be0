"""What must hold before the first credit of an execution is spent; all of it refuses with exit 5."""

from __future__ import annotations

from enrich.errors import CommandRefused
from enrich.job.job import Job
from enrich.model import to_credits, to_micros
from enrich.rows.template import RequestTemplate


def check_balance(job: Job, template: RequestTemplate, balance: int | None) -> None:
    """Refuse when the balance is too low for one request, or for one that leaves `min_balance`."""
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
            f"{balance_text}, `min_balance` keeps {to_credits(min_balance):,g} of them and one request may cost {to_credits(max_request_price):g}",
            "top up the account, or lower `min_balance`",
        )

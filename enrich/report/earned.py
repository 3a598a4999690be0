"""Who earned it, in credits: the waterfall of the report, out of what the answers add up to."""

from __future__ import annotations

from enrich import cascade
from enrich.model import to_credits
from enrich.report.facts import Provider, Waterfall


def providers(earnings: cascade.Earnings) -> list[Provider]:
    """Tell what each provider and verifier came to."""
    return [Provider(passed_on=each.passed_on, **each.as_json()) for each in earnings.providers]


def as_waterfall(name: str, earnings: cascade.Earnings) -> Waterfall:
    """Tell what the waterfall came to."""
    return Waterfall(
        name=name,
        providers=providers(earnings),
        answers=earnings.answers,
        found=earnings.found,
        untold=earnings.untold,
        spent=to_credits(earnings.spent),
        elsewhere=to_credits(earnings.elsewhere),
    )

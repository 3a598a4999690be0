"""Who earned it, in credits: the waterfall of the report, out of what the answers add up to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from enrich import cascade
from enrich.api import waterfall
from enrich.model import MICROS, to_credits
from enrich.report.facts import Provider, Waterfall
from enrich.store.ledger import Ledger


def offers(ledger: Ledger) -> dict[str, waterfall.Waterfall]:
    """Read the waterfalls as last described; a description that can't be read is as good as none."""
    known = {identifier: _offer(described) for identifier, described in ledger.waterfalls().items()}
    return {identifier: offer for identifier, offer in known.items() if offer is not None}


def _offer(described: Mapping[str, Any]) -> waterfall.Waterfall | None:
    try:
        return waterfall.Waterfall.model_validate(described)
    except ValidationError:
        return None


def providers(earnings: cascade.Earnings) -> list[Provider]:
    """Tell what each provider and verifier came to."""
    return [
        Provider(
            name=each.name,
            verifies=each.verifies,
            asked=each.asked,
            presumed=each.presumed,
            found=each.found,
            rejected=each.rejected,
            passed_on=each.passed_on,
            credits=to_credits(each.credits),
            per_hit=None if each.per_hit is None else each.per_hit / MICROS,
        )
        for each in earnings.providers
    ]


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

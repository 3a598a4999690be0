"""Who earned it, in credits: the waterfall of the report, out of what the answers add up to."""

from __future__ import annotations

from enrich.model import to_credits
from enrich.report.facts import ReportedProvider, ReportedWaterfall
from enrich.run import provider_stats


def reported_providers(earnings: provider_stats.ProviderTotals) -> list[ReportedProvider]:
    """Tell what each provider and verifier came to."""
    return [ReportedProvider(passed_on=each.passed_on, **each.as_json()) for each in earnings.providers]


def reported_waterfall(name: str, earnings: provider_stats.ProviderTotals) -> ReportedWaterfall:
    """Tell what the waterfall came to."""
    return ReportedWaterfall(
        name=name,
        providers=reported_providers(earnings),
        answers=earnings.answers,
        found=earnings.found,
        untold=earnings.not_reported,
        spent=to_credits(earnings.spent),
        elsewhere=to_credits(earnings.unattributed),
    )

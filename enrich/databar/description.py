"""Descriptions of waterfalls and enrichments, and the differences between two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from enrich.databar.enrichment import Enrichment
from enrich.databar.waterfall import Provider, Waterfall
from enrich.job.target import TargetKind
from enrich.models import to_credits, to_micros

Description: TypeAlias = Waterfall | Enrichment

MODELS: Mapping[TargetKind, type[Waterfall | Enrichment]] = {
    TargetKind.WATERFALL: Waterfall,
    TargetKind.ENRICHMENT: Enrichment,
}


def parse_description(kind: TargetKind, description: Mapping[str, Any]) -> Description:
    """Read a description as the ledger stores it. Raises ValidationError."""
    return MODELS[kind].model_validate(description)


def description_changes(before: Description, now: Description) -> Iterator[str]:
    """Yield a line of text for each difference that may affect a job."""
    old = {param.name: param.required for param in before.input_params}
    new = {param.name: param.required for param in now.input_params}
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"param {name}: removed"
        elif name not in old:
            yield f"param {name}: new{', required' if new[name] else ''}"
        elif old[name] != new[name]:
            yield f"param {name}: {'now required' if new[name] else 'no longer required'}"
    fields = [field.name for field in before.output_fields], [field.name for field in now.output_fields]
    yield from (f"field {name}: removed" for name in fields[0] if name not in fields[1])
    yield from (f"field {name}: new" for name in fields[1] if name not in fields[0])
    yield from _provider_changes("provider", before.available_enrichments, now.available_enrichments)
    yield from _provider_changes("verifier", before.email_verifiers, now.email_verifiers)
    defaults = [each.id for each in now.available_enrichments if each.enabled_by_default]
    if defaults != [each.id for each in before.available_enrichments if each.enabled_by_default]:
        yield f"default providers: now {', '.join(map(str, defaults)) or 'none'}; runs keep the old ones"
    if before.priced_by != now.priced_by:
        yield f"price: now {'fixed' if now.priced_by is None else f'for each unit of {now.priced_by}'}"
    if bool(before.is_paginated) != bool(now.is_paginated):
        yield f"pages: now {'each with its price' if now.is_paginated else 'none'}"


def _provider_changes(kind: str, before: list[Provider], now: list[Provider]) -> Iterator[str]:
    old, new = {each.id: each for each in before}, {each.id: each for each in now}
    for number in [*old, *(number for number in new if number not in old)]:
        name = f"{kind} {number} {(new.get(number) or old[number]).name}".rstrip()
        if number not in new:
            yield f"{name}: removed"
        elif number not in old:
            yield f"{name}: new, {_price_text(new[number])}"
        elif to_micros(old[number].price) != to_micros(new[number].price):
            yield (
                f"{name}: {_price_text(old[number])} before, "
                f"{_price_text(new[number])} now{_price_trend(old[number], new[number])}"
            )


def _price_text(provider: Provider) -> str:
    micros = to_micros(provider.price)
    return "price unknown" if micros is None else f"{to_credits(micros):g} credits"


def _price_trend(old: Provider, new: Provider) -> str:
    before, now = to_micros(old.price), to_micros(new.price)
    if before is None or now is None:
        return ""
    return " (dearer)" if now > before else " (cheaper)"

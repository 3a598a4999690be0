"""Validates requests, and gives equal lookups the same key."""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

from enrich.sandbox.catalogue import Enrichment, Provider, Verifier, Waterfall

# Half of a surrogate pair: JSON can encode it, but it is not valid text.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# Param name to its errors.
Mistakes = dict[str, list[str]]


class Refused(Exception):
    """A 400 response with its body."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body)
        self.body = body


@dataclass(frozen=True)
class Cascade:
    """A waterfall's providers to call in turn, and the verifier (None: no verification)."""

    offer: Waterfall
    providers: tuple[Provider, ...]
    verifier: Verifier | None

    @property
    def canonical(self) -> dict[str, Any]:
        """The target, as the audit shows it."""
        return {
            "waterfall": self.offer.identifier,
            "enrichments": [provider.id for provider in self.providers],
            "email_verifier": self.verifier.id if self.verifier else None,
        }

    def worst_case(self, _: Mapping[str, str]) -> int:
        """Return the maximum cost of one run, in millionths."""
        check = self.verifier.cost if self.verifier else 0
        return sum(provider.cost + check for provider in self.providers)


@dataclass(frozen=True)
class EnrichmentCall:
    """An enrichment to run, and how many pages of it (None: it has none)."""

    offer: Enrichment
    pages: int | None

    @property
    def canonical(self) -> dict[str, Any]:
        """The target, as the audit shows it."""
        return {"enrichment": self.offer.id, "pages": self.pages}

    def worst_case(self, params: Mapping[str, str]) -> int:
        """Return the maximum cost of one run, in millionths: for each page, and each unit of the pricing param."""
        return self.offer.cost * self.units(params) * (self.pages or 1)

    def units(self, params: Mapping[str, str]) -> int:
        """Return the number that the price is multiplied by."""
        return 1 if self.offer.priced_by is None else int(params.get(self.offer.priced_by, 1))


@dataclass(frozen=True)
class Lookup:
    """One paid lookup: its target, and its normalized params."""

    target: Cascade | EnrichmentCall
    params: Mapping[str, str]

    @cached_property
    def canonical(self) -> tuple[str, str]:
        """Target and params, both JSON; equal for equal lookups."""
        return (json.dumps(self.target.canonical), json.dumps(self.params, ensure_ascii=False, sort_keys=True))

    @cached_property
    def worst_case(self) -> int:
        """The maximum cost, in millionths."""
        return self.target.worst_case(self.params)

    @property
    def key(self) -> bytes:
        """The lookup's key, 16 bytes."""
        return blake2b(repr(self.canonical).encode(), digest_size=16).digest()

    @property
    def subject(self) -> str:
        """The person or company that the lookup is about, the same for any providers."""
        target = self.target
        name = target.offer.identifier if isinstance(target, Cascade) else str(target.offer.id)
        priced_by = None if isinstance(target, Cascade) else target.offer.priced_by
        named = [self.params[param].casefold() for param in target.offer.required if param != priced_by]
        return "\n".join((name, *named))


def make_cascade(waterfall: Waterfall, enrichments: Sequence[int], verifier: int | None) -> Cascade:
    """Find the providers and the verifier; empty enrichments mean the default cascade. Raises Refused."""
    providers = {provider.id: provider for provider in waterfall.providers}
    provider_ids = enrichments or waterfall.default_providers()
    if unknown := [number for number in provider_ids if number not in providers]:
        raise Refused({"detail": {"enrichments": [f"{number} is not part of this waterfall." for number in unknown]}})
    if verifier is not None and not waterfall.verifiers:
        raise Refused({"detail": {"email_verifier": ["This waterfall does not verify emails."]}})
    verifiers = {candidate.id: candidate for candidate in waterfall.verifiers}
    if verifier is not None and verifier not in verifiers:
        raise Refused({"detail": {"email_verifier": [f"{verifier} is not a verifier of this waterfall."]}})
    chosen = tuple(providers[number] for number in provider_ids)
    return Cascade(waterfall, chosen, None if verifier is None else verifiers[verifier])


def make_enrichment_call(enrichment: Enrichment, pages: int | None) -> EnrichmentCall:
    """Choose the pages of an enrichment; without a number it is one. Raises Refused."""
    if enrichment.per_page is None:
        if pages is not None:
            raise Refused({"detail": "This enrichment does not support pagination."})
        return EnrichmentCall(enrichment, None)
    return EnrichmentCall(enrichment, pages or 1)


def make_lookups(
    target: Cascade | EnrichmentCall, rows: Iterable[Mapping[str, Any]], *, bulk: bool, error_shape: str
) -> list[Lookup]:
    """Turn each row of params into a lookup. Raises Refused for all rows when one of them is invalid."""
    rows = list(rows)
    mistakes = [_mistakes(target, params) for params in rows]
    if any(mistakes):
        raise Refused(_error_body(mistakes, bulk=bulk, error_shape=error_shape))
    return [Lookup(target, _normalized(params)) for params in rows]


def _normalized(params: Mapping[str, str]) -> dict[str, str]:
    texts = {name: unicodedata.normalize("NFC", value).strip() for name, value in sorted(params.items())}
    return {name: value for name, value in texts.items() if value}


def _mistakes(target: Cascade | EnrichmentCall, params: Mapping[str, Any]) -> Mistakes:
    offer = target.offer
    mistakes: Mistakes = {name: ["This field is required."] for name in offer.required if name not in params}
    for name, value in params.items():
        if name not in offer.required and name not in offer.optional:
            mistakes[name] = ["Unknown field."]
        elif not isinstance(value, str) or _LONE_SURROGATE.search(value):
            mistakes[name] = ["Not a valid string."]
        elif name in offer.required and not value.strip():
            mistakes[name] = ["This field may not be blank."]
        elif isinstance(target, EnrichmentCall) and value.strip():
            mistakes |= _value_mistakes(target.offer, name, value.strip())
    return mistakes


def _value_mistakes(enrichment: Enrichment, name: str, value: str) -> Mistakes:
    choices = enrichment.choices(name)
    if choices and value not in choices:
        return {name: [f'"{value}" is not a valid choice.']}
    if name == enrichment.priced_by and (not value.isascii() or not value.isdecimal() or not value.strip("0")):
        return {name: ["A positive integer is required."]}
    return {}


def _error_body(mistakes: list[Mistakes], *, bulk: bool, error_shape: str) -> dict[str, Any]:
    if error_shape == "old_short":
        mistakes = [fields for fields in mistakes if fields]
    if error_shape.startswith("old"):
        return {"detail": mistakes if bulk else mistakes[0]}
    rows = [{"position": position, "fields": fields} for position, fields in enumerate(mistakes, 1) if fields]
    detail = "; ".join(
        f"Row {position}: {name}: {' '.join(texts)}"
        for position, fields in enumerate(mistakes, 1)
        for name, texts in fields.items()
    )
    if error_shape == "fields" and not bulk:
        return {"error": "INVALID_PARAMS", "detail": detail, "fields": mistakes[0]}
    return {"error": "INVALID_PARAMS", "detail": detail, "rows": rows}

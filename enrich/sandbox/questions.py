"""Validates requests, and gives equal lookups the same key."""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

from enrich.sandbox.catalogue import Provider, Verifier, Waterfall

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
    """The providers to ask in turn, and the verifier (None: no verification)."""

    waterfall: Waterfall
    providers: tuple[Provider, ...]
    verifier: Verifier | None

    @cached_property
    def worst_case(self) -> int:
        """The maximum cost of one run, in millionths."""
        check = self.verifier.cost if self.verifier else 0
        return sum(provider.cost + check for provider in self.providers)


@dataclass(frozen=True)
class Lookup:
    """One paid lookup: a cascade and its normalized params."""

    cascade: Cascade
    params: Mapping[str, str]

    @cached_property
    def canonical(self) -> tuple[str, str, str, int | None]:
        """Waterfall, params (JSON), enrichments (JSON) and verifier id; equal for equal lookups."""
        verifier = self.cascade.verifier
        return (
            self.cascade.waterfall.identifier,
            json.dumps(self.params, ensure_ascii=False, sort_keys=True),
            json.dumps([provider.id for provider in self.cascade.providers]),
            verifier.id if verifier else None,
        )

    @property
    def key(self) -> bytes:
        """The lookup's key, 16 bytes."""
        return blake2b(repr(self.canonical).encode(), digest_size=16).digest()

    @property
    def subject(self) -> str:
        """The person or company that the lookup is about, the same for any providers."""
        waterfall = self.cascade.waterfall
        return "\n".join((waterfall.identifier, *(self.params[name].casefold() for name in waterfall.required)))


def make_cascade(waterfall: Waterfall, enrichments: Sequence[int], verifier: int | None) -> Cascade:
    """Find the providers and the verifier; empty enrichments mean the default cascade. Raises Refused."""
    providers = {provider.id: provider for provider in waterfall.providers}
    provider_ids = enrichments or waterfall.default_providers()
    if unknown := [number for number in provider_ids if number not in providers]:
        raise Refused({"detail": {"enrichments": [f"{number} is not part of this waterfall." for number in unknown]}})
    if verifier is None:
        return Cascade(waterfall, tuple(providers[number] for number in provider_ids), None)
    if not waterfall.verifiers:
        raise Refused({"detail": {"email_verifier": ["This waterfall does not verify emails."]}})
    for candidate in waterfall.verifiers:
        if candidate.id == verifier:
            return Cascade(waterfall, tuple(providers[number] for number in provider_ids), candidate)
    raise Refused({"detail": {"email_verifier": [f"{verifier} is not a verifier of this waterfall."]}})


def make_lookups(
    requested_cascade: Cascade, rows: Iterable[Mapping[str, Any]], *, bulk: bool, error_shape: str
) -> list[Lookup]:
    """Turn each row of params into a lookup. Raises Refused for all rows when one of them is invalid."""
    rows = list(rows)
    mistakes = [_mistakes(requested_cascade.waterfall, params) for params in rows]
    if any(mistakes):
        raise Refused(_error_body(mistakes, bulk=bulk, error_shape=error_shape))
    return [Lookup(requested_cascade, _normalized(params)) for params in rows]


def _normalized(params: Mapping[str, str]) -> dict[str, str]:
    texts = {name: unicodedata.normalize("NFC", value).strip() for name, value in sorted(params.items())}
    return {name: value for name, value in texts.items() if value}


def _mistakes(waterfall: Waterfall, params: Mapping[str, Any]) -> Mistakes:
    mistakes: Mistakes = {name: ["This field is required."] for name in waterfall.required if name not in params}
    for name, value in params.items():
        if name not in waterfall.required and name not in waterfall.optional:
            mistakes[name] = ["Unknown field."]
        elif not isinstance(value, str) or _LONE_SURROGATE.search(value):
            mistakes[name] = ["Not a valid string."]
        elif name in waterfall.required and not value.strip():
            mistakes[name] = ["This field may not be blank."]
    return mistakes


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

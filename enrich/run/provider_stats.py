"""Calls, matches and credits per provider, as reported by the answers. Pure, except for reading their JSON.

An answer with `steps` lists the providers that the waterfall called. Many answers without a match have no steps. A
waterfall calls its providers in turn until one has a match, so for such an answer it called every provider whose
inputs were sent. These calls are *inferred* (`presumed`), counted separately, and get no price.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson
from pydantic import ValidationError

from enrich.databar.answers import ParsedData, is_blank, parse_data
from enrich.databar.waterfall import Waterfall
from enrich.models import SettledAttempt, State, to_credits, to_micros


@dataclass(frozen=True, slots=True)
class ProviderStat:
    """One provider, or a verifier, over some answers; `credits` in millionths.

    `asked` is reported by the answers. `presumed` is inferred for answers without a match that do not report their
    providers. `rejected` is how many of its matches the verifier turned down. `passed_on` leads went to the next
    provider.
    """

    name: str
    verifies: bool = False
    asked: int = 0
    presumed: int = 0
    found: int = 0
    rejected: int = 0
    credits: int = 0

    @property
    def passed_on(self) -> int:
        """How many leads it was called for without a match; 0 for a verifier, which searches for none."""
        return 0 if self.verifies else self.asked + self.presumed - self.found

    @property
    def cost_per_hit(self) -> int | None:
        """Average cost of one of its matches, in millionths; None before the first, and for a verifier."""
        return round(self.credits / self.found) if self.found else None

    def as_json(self) -> dict[str, Any]:
        """Return the object of the run summary, in credits."""
        costs = {"credits": to_credits(self.credits), "cost_per_hit": to_credits(self.cost_per_hit)}
        return asdict(self) | costs


@dataclass(frozen=True, slots=True)
class ProviderTotals:
    """All providers in the order of their calls, and what the answers do not report; credits in millionths.

    `answers` were counted; for `not_reported` of them the providers are unknown. `unattributed` was paid and is in no
    step; below 0 the steps report more than was paid. Answers of unknown price are in neither.
    """

    providers: Sequence[ProviderStat] = ()
    answers: int = 0
    found: int = 0
    not_reported: int = 0
    spent: int = 0
    unattributed: int = 0


@dataclass(slots=True)
class _ProviderCounter:
    verifies: bool = False
    asked: int = 0
    presumed: int = 0
    found: int = 0
    rejected: int = 0
    credits: int = 0
    #: Sum of its positions in the waterfalls that the answers report, from 0.
    position_sum: int = 0


@dataclass(slots=True)
class ProviderStats:
    """Adds up answers. `waterfalls` are the waterfalls as last described, by identifier."""

    waterfalls: Mapping[str, Waterfall]
    _counters: dict[str, _ProviderCounter] = field(default_factory=dict)
    _providers_by_call: dict[str, tuple[list[tuple[str, frozenset[str]]], str | None]] = field(default_factory=dict)
    _answers: int = 0
    _found: int = 0
    _not_reported: int = 0
    _spent: int = 0
    _attributed: int = 0

    def add(self, settled: SettledAttempt) -> None:
        """Count one answer. An attempt without one (expired or unconfirmed) adds only its cost."""
        self._spent += settled.paid or 0
        if settled.state not in (State.FOUND, State.NOT_FOUND, State.FAILED):
            return
        self._answers += 1
        self._found += settled.state == State.FOUND
        parsed = parse_data(load_task(settled.answer).get("data"))
        asked = [step for step in parsed.steps if _is_name(step.get("provider"))]
        if asked:
            self._add_steps(asked, settled, parsed)
        elif settled.state == State.FAILED or not self._infer_providers(settled, parsed.provider):
            self._not_reported += 1

    def totals(self) -> ProviderTotals:
        """Return the totals."""
        names = sorted(self._counters, key=self._sort_key)
        providers = [
            ProviderStat(name, count.verifies, count.asked, count.presumed, count.found, count.rejected, count.credits)
            for name in names
            for count in (self._counters[name],)
        ]
        unattributed = self._spent - self._attributed
        return ProviderTotals(providers, self._answers, self._found, self._not_reported, self._spent, unattributed)

    def _add_steps(self, steps: Sequence[Mapping[str, Any]], settled: SettledAttempt, parsed: ParsedData) -> None:
        _, verifier = self._call_providers(settled.call)
        previous: str | None = None
        asked: dict[str, None] = {}
        verified: dict[str, None] = {}
        verifiers = set()
        for step in steps:
            name = str(step["provider"])
            count = self._counters.setdefault(name, _ProviderCounter())
            cost = to_micros(step.get("cost")) or 0
            count.credits += cost
            if settled.paid is not None:
                self._attributed += cost
            if name == verifier or str(step.get("action", "")).lower().startswith("verif"):
                count.verifies = True
                verifiers.add(name)
                if previous is not None:
                    verified[previous] = None
            else:
                asked[name] = None
                previous = name
        # A verifier does not find the answer. The provider before it did.
        winner = previous if parsed.provider in verifiers else parsed.provider
        found = winner if settled.state == State.FOUND else None
        if found is not None and found not in asked:
            self._counters.setdefault(found, _ProviderCounter())
            asked[found] = None
        for position, name in enumerate(asked):
            self._counters[name].asked += 1
            self._counters[name].position_sum += position
        for name in verifiers - asked.keys():
            self._counters[name].asked += 1
        for name in verified:
            self._counters[name].rejected += name != winner
        if found is not None:
            self._counters[found].found += 1

    def _infer_providers(self, settled: SettledAttempt, provider: str | None) -> bool:
        """Infer the providers that a waterfall called for an answer without steps. Returns whether they are known."""
        providers, _ = self._call_providers(settled.call)
        found = settled.state == State.FOUND
        if settled.erased or not providers or (found and provider not in dict(providers)):
            return False
        sent = frozenset(json.loads(settled.params))  # the names of the params
        for position, (name, needed) in enumerate(providers):
            if needed <= sent or name == provider:
                count = self._counters.setdefault(name, _ProviderCounter())
                count.presumed += 1
                count.position_sum += position
            if found and name == provider:
                self._counters[name].found += 1
                break
        return True

    def _call_providers(self, call: str) -> tuple[list[tuple[str, frozenset[str]]], str | None]:
        """Return the providers of a call in their order, each with the inputs it needs, and its verifier."""
        if call not in self._providers_by_call:
            self._providers_by_call[call] = self._find_providers(json.loads(call))
        return self._providers_by_call[call]

    def _find_providers(self, call: Mapping[str, Any]) -> tuple[list[tuple[str, frozenset[str]]], str | None]:
        waterfall = self.waterfalls.get(call["waterfall"])
        if waterfall is None:
            return [], None
        known = {each.id: each for each in waterfall.available_enrichments}
        verifiers = {each.id: each.name for each in waterfall.email_verifiers}
        asked = [known[number] for number in call["enrichments"] if number in known]
        all_known = len(asked) == len(call["enrichments"]) and all(each.name for each in asked)
        providers = [(each.name, frozenset(each.params)) for each in asked] if all_known else []
        return providers, verifiers.get(call.get("email_verifier", 0)) or None

    def _sort_key(self, name: str) -> tuple[bool, float, str]:
        """Sort providers by their average position; verifiers come last."""
        count = self._counters[name]
        return count.verifies, count.position_sum / max(1, count.asked + count.presumed), name


def _is_name(provider: object) -> bool:
    return isinstance(provider, str) and not is_blank(provider)


def load_task(answer: str | None) -> Mapping[str, Any]:
    """Read a task as the ledger stores it; empty when there is none or it cannot be read."""
    try:
        try:
            task = orjson.loads(answer) if answer else {}
        except orjson.JSONDecodeError:  # a number that is too large for orjson, or a lone surrogate
            task = json.loads(answer or "{}")
    except (ValueError, RecursionError):
        return {}
    return task if isinstance(task, dict) else {}


def load_waterfalls(descriptions: Mapping[str, Mapping[str, Any]]) -> dict[str, Waterfall]:
    """Read waterfalls as last described. A description that cannot be read is left out."""
    known = {}
    for identifier, description in descriptions.items():
        with suppress(ValidationError):
            known[identifier] = Waterfall.model_validate(description)
    return known

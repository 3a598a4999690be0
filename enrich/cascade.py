"""Which provider was asked, found, and cost how much, told by the answers; pure, but for reading their JSON.

An answer with `steps` tells whom the waterfall asked. Many misses come without: a waterfall asks in turn until one
knows the answer, so every provider was asked then whose inputs were sent. That is *presumed*, counted apart, and no
price is made up for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson
from pydantic import ValidationError

from enrich.api.answer import Parsed, is_blank, parse_data
from enrich.api.waterfall import Waterfall
from enrich.model import Settled, State, to_credits, to_micros


@dataclass(frozen=True, slots=True)
class Earned:
    """One provider, or a verifier, over some answers; `credits` in millionths.

    `asked` is told by the answers, `presumed` is added where a miss does not say whom it asked. `rejected` of its finds
    were turned down by the verifier. Whom it did not satisfy went on to the next: `passed_on`.
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
        """How many leads it was asked for and did not find; a verifier looks for none."""
        return 0 if self.verifies else self.asked + self.presumed - self.found

    @property
    def cost_per_hit(self) -> int | None:
        """What a find of its own cost on average, in millionths; None before the first, and of a verifier."""
        return round(self.credits / self.found) if self.found else None

    def as_json(self) -> dict[str, Any]:
        """Return it as the receipt has it, in credits."""
        costs = {"credits": to_credits(self.credits), "cost_per_hit": to_credits(self.cost_per_hit)}
        return asdict(self) | costs


@dataclass(frozen=True, slots=True)
class Earnings:
    """All providers in the order they are asked, and what the answers do not tell; credits in millionths.

    `answers` were counted; of `untold` nobody knows whom they asked. `elsewhere` was paid and is in no step; below
    0 the steps tell more than was paid. Answers of unknown price are in neither.
    """

    providers: Sequence[Earned] = ()
    answers: int = 0
    found: int = 0
    untold: int = 0
    spent: int = 0
    elsewhere: int = 0


@dataclass(slots=True)
class _Count:
    verifies: bool = False
    asked: int = 0
    presumed: int = 0
    found: int = 0
    rejected: int = 0
    credits: int = 0
    #: The sum of its places in the cascades that were told, from 0.
    places: int = 0


@dataclass(slots=True)
class Cascade:
    """Adds up answers. `offers` are the waterfalls as last described, by identifier."""

    offers: Mapping[str, Waterfall]
    _counts: dict[str, _Count] = field(default_factory=dict)
    _calls: dict[str, tuple[list[tuple[str, frozenset[str]]], str | None]] = field(default_factory=dict)
    _answers: int = 0
    _found: int = 0
    _untold: int = 0
    _spent: int = 0
    _told: int = 0

    def add(self, settled: Settled) -> None:
        """Count one answer; what has none, as it expired or is in doubt, adds only what it cost."""
        self._spent += settled.paid or 0
        if settled.state not in (State.FOUND, State.NOT_FOUND, State.FAILED):
            return
        self._answers += 1
        self._found += settled.state == State.FOUND
        parsed = parse_data(read_task(settled.answer).get("data"))
        asked = [step for step in parsed.steps if _is_name(step.get("provider"))]
        if asked:
            self._add_steps(asked, settled, parsed)
        elif settled.state == State.FAILED or not self._presume(settled, parsed.provider):
            self._untold += 1

    def earnings(self) -> Earnings:
        """Add it all up."""
        names = sorted(self._counts, key=self._place)
        providers = [
            Earned(name, count.verifies, count.asked, count.presumed, count.found, count.rejected, count.credits)
            for name in names
            for count in (self._counts[name],)
        ]
        elsewhere = self._spent - self._told
        return Earnings(providers, self._answers, self._found, self._untold, self._spent, elsewhere)

    def _add_steps(self, steps: Sequence[Mapping[str, Any]], settled: Settled, parsed: Parsed) -> None:
        _, verifier = self._cascade(settled.call)
        before: str | None = None
        asked: dict[str, None] = {}
        checked: dict[str, None] = {}
        verifiers = set()
        for step in steps:
            name = str(step["provider"])
            count = self._counts.setdefault(name, _Count())
            cost = to_micros(step.get("cost")) or 0
            count.credits += cost
            if settled.paid is not None:
                self._told += cost
            if name == verifier or str(step.get("action", "")).lower().startswith("verif"):
                count.verifies = True
                verifiers.add(name)
                if before is not None:
                    checked[before] = None
            else:
                asked[name] = None
                before = name
        # Who verified an answer has not found it: that was the one before.
        winner = before if parsed.provider in verifiers else parsed.provider
        found = winner if settled.state == State.FOUND else None
        if found is not None and found not in asked:
            self._counts.setdefault(found, _Count())
            asked[found] = None
        for place, name in enumerate(asked):
            self._counts[name].asked += 1
            self._counts[name].places += place
        for name in verifiers - asked.keys():
            self._counts[name].asked += 1
        for name in checked:
            self._counts[name].rejected += name != winner
        if found is not None:
            self._counts[found].found += 1

    def _presume(self, settled: Settled, provider: str | None) -> bool:
        """Count whom a waterfall must have asked for an answer without steps; tell whether that is known."""
        cascade, _ = self._cascade(settled.call)
        found = settled.state == State.FOUND
        if settled.erased or not cascade or (found and provider not in dict(cascade)):
            return False
        sent = frozenset(json.loads(settled.params))  # its keys
        for place, (name, needed) in enumerate(cascade):
            if needed <= sent or name == provider:
                count = self._counts.setdefault(name, _Count())
                count.presumed += 1
                count.places += place
            if found and name == provider:
                self._counts[name].found += 1
                break
        return True

    def _cascade(self, call: str) -> tuple[list[tuple[str, frozenset[str]]], str | None]:
        """Name the providers of a call in their order, each with the inputs it needs, and its verifier."""
        if call not in self._calls:
            self._calls[call] = self._look_up(json.loads(call))
        return self._calls[call]

    def _look_up(self, call: Mapping[str, Any]) -> tuple[list[tuple[str, frozenset[str]]], str | None]:
        offer = self.offers.get(call["waterfall"])
        if offer is None:
            return [], None
        known = {each.id: each for each in offer.available_enrichments}
        verifiers = {each.id: each.name for each in offer.email_verifiers}
        asked = [known[number] for number in call["enrichments"] if number in known]
        whole = len(asked) == len(call["enrichments"]) and all(each.name for each in asked)
        cascade = [(each.name, frozenset(each.params)) for each in asked] if whole else []
        return cascade, verifiers.get(call.get("email_verifier", 0)) or None

    def _place(self, name: str) -> tuple[bool, float, str]:
        """Verifiers stand last, providers where they are asked on average."""
        count = self._counts[name]
        return count.verifies, count.places / max(1, count.asked + count.presumed), name


def _is_name(provider: object) -> bool:
    return isinstance(provider, str) and not is_blank(provider)


def read_task(answer: str | None) -> Mapping[str, Any]:
    """Read a task as the ledger keeps it; empty where there is none or nobody can read it."""
    try:
        try:
            task = orjson.loads(answer) if answer else {}
        except orjson.JSONDecodeError:  # a number that is too large for it, or half a character
            task = json.loads(answer or "{}")
    except (ValueError, RecursionError):
        return {}
    return task if isinstance(task, dict) else {}


def read_offers(described: Mapping[str, Mapping[str, Any]]) -> dict[str, Waterfall]:
    """Read waterfalls as they were last described; a description that can't be read is as good as none."""
    known = {}
    for identifier, told in described.items():
        with suppress(ValidationError):
            known[identifier] = Waterfall.model_validate(told)
    return known

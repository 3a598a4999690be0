"""Calls, matches and credits per provider, as reported by the answers.

Answers are grouped by what is counted of them: a million answers have few kinds.

An answer with `steps` lists the providers that the waterfall called. Many answers without a match have no steps. A
waterfall calls its providers in turn until one has a match, so for such an answer it called every provider whose
inputs were sent. These calls are *inferred*, counted separately, and get no price. An enrichment is one
provider: it was called for every answer, and its price is the answer's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, NamedTuple

import msgspec
from pydantic import ValidationError

from enrich.databar.description import Description, Enrichment, parse_description
from enrich.databar.task_results import MAX_STEPS, ParsedData, parse_data
from enrich.job.cell_text import is_blank
from enrich.job.target import Target, TargetKind
from enrich.json_text import parse_json
from enrich.ledger import records
from enrich.ledger.database import Database
from enrich.models import SettledAttempt, State, to_credits, to_micros

#: Kinds that are held at once. Beyond these, answers of one kind are counted in several parts.
MAX_KINDS = 20_000


# Not tracked by the garbage collector: that would take as long as parsing.
class ProviderCall(msgspec.Struct, frozen=True, gc=False):
    """A provider that a waterfall called, or a verifier. None: the answer has no text or number there."""

    provider: str
    action: str | int | float | None = None
    cost: str | int | float | None = None


class AnswerKind(NamedTuple):
    """The properties of a settled attempt that count."""

    execution: int
    #: The step of the job; None: the job has none.
    step: str | None
    state: str
    call: str
    erased: int
    paid: int | None
    #: The provider of the answer; None for a flat one.
    provider: str | None
    #: Whether the answer is a match and is stored (not purged).
    stored_match: bool
    #: The status of the task.
    status: str | None
    #: What the caller returned for a stored match.
    fields: tuple[str, ...]
    steps: tuple[ProviderCall, ...]
    #: The names of the params, unless the first step has a provider.
    sent: tuple[str, ...]


class _UsualData(msgspec.Struct, gc=False):
    result: dict[str, Any]
    steps: Annotated[tuple[ProviderCall, ...], msgspec.Meta(max_length=MAX_STEPS)]


class _UsualTask(msgspec.Struct, gc=False):
    """The usual answer: one wrapper with steps. Other fields are checked, but not kept."""

    data: tuple[_UsualData] | _UsualData
    status: str | None = None


_USUAL_TASKS = msgspec.json.Decoder(_UsualTask)


def count_kinds(
    attempts: Iterable[SettledAttempt],
    read_match: Callable[[int, ParsedData], tuple[str, ...]] = lambda *_: (),
    *,
    read_whole: bool = False,
) -> Iterator[tuple[AnswerKind, int]]:
    """Group settled attempts by kind, and count them. A kind may come in several parts.

    `read_match` gets the run and the data of each stored match, and returns the `fields` of its kind. The data is only
    its fields, unless `read_whole`.
    """
    kinds: Counter[tuple[object, ...]] = Counter()
    for execution, state, call, params, paid, answer, erased, step, stored_provider in attempts:
        status, parsed, steps = (None if read_whole else _read_usual(answer, stored_provider)) or _read_any(
            answer, stored_provider
        )
        stored_match = answer is not None and state == State.FOUND
        fields = read_match(execution, parsed) if stored_match else ()
        sent = () if steps and not is_blank(steps[0].provider) else tuple(msgspec.json.decode(params))
        kinds[
            execution, step, state, call, erased, paid, parsed.provider, stored_match, status, fields, steps, sent
        ] += 1
        if len(kinds) > MAX_KINDS:
            yield from _named(kinds)
            kinds.clear()
    yield from _named(kinds)


def _named(kinds: Counter[tuple[object, ...]]) -> Iterator[tuple[AnswerKind, int]]:
    return ((AnswerKind._make(values), number) for values, number in kinds.items())


def _read_usual(
    answer: str | None, provider: str | None
) -> tuple[str | None, ParsedData, tuple[ProviderCall, ...]] | None:
    """Return status, fields and steps of a usual answer; None: it is another."""
    try:
        task = _USUAL_TASKS.decode(answer or "")
    except (msgspec.DecodeError, RecursionError):
        return None
    data = task.data if isinstance(task.data, _UsualData) else task.data[0]
    return task.status, ParsedData(data.result, provider), data.steps


def _read_any(answer: str | None, provider: str | None) -> tuple[str | None, ParsedData, tuple[ProviderCall, ...]]:
    task = load_task(answer)
    status, parsed = task.get("status"), parse_data(task.get("data"), provider, find_provider=False)
    steps = tuple(
        ProviderCall(provider, _scalar(step.get("action")), _scalar(step.get("cost")))
        for step in parsed.steps
        if isinstance(provider := step.get("provider"), str)
    )
    return status if isinstance(status, str) else None, parsed, steps


def _scalar(value: Any) -> str | int | float | None:  # noqa: ANN401 - a JSON field can be any type
    """Return a text or number; None for anything else: it is no price, and may have no hash."""
    return value if value.__class__ in {str, int, float} else None


def load_task(answer: str | None) -> Mapping[str, Any]:
    """Read a task as the ledger stores it; empty when there is none or it cannot be read."""
    try:
        task = parse_json(answer or "{}")
    except (ValueError, RecursionError):
        return {}
    return task if isinstance(task, dict) else {}


#: The keys of a provider in JSON, where they differ from our names.
PROVIDER_KEYS = {"reported": "asked", "inferred": "presumed"}


@dataclass(slots=True)
class ProviderStat:
    """One provider, or a verifier, over some answers; `credits` in millionths.

    `reported` calls are in the answers. `inferred` ones are those of answers without a match that do not report their
    providers. `rejected` is how many of its matches the verifier turned down. `passed_on` leads went to the next
    provider.
    """

    name: str
    verifies: bool = False
    reported: int = 0
    inferred: int = 0
    found: int = 0
    rejected: int = 0
    credits: int = 0

    @property
    def passed_on(self) -> int:
        """How many leads it was called for without a match; 0 for a verifier, which searches for none."""
        return 0 if self.verifies else self.reported + self.inferred - self.found

    @property
    def cost_per_hit(self) -> int | None:
        """Average cost of one of its matches, in millionths; None before the first, and for a verifier."""
        return round(self.credits / self.found) if self.found else None

    def in_credits(self) -> dict[str, Any]:
        """Return the fields, with amounts in credits."""
        return asdict(self) | {"credits": to_credits(self.credits), "cost_per_hit": to_credits(self.cost_per_hit)}

    def as_json(self) -> dict[str, Any]:
        """Return the object of the run summary, in credits."""
        return {PROVIDER_KEYS.get(name, name): value for name, value in self.in_credits().items()}


@dataclass(slots=True)
class ProviderTotals:
    """All providers in the order of their calls, and what the answers do not report; credits in millionths.

    `answers` were counted, `failed` of them failures; for `not_reported` the providers are unknown. `unattributed` was
    paid and is in no step; below 0 the steps report more than was paid. Answers of unknown price are in neither.
    """

    providers: Sequence[ProviderStat] = ()
    answers: int = 0
    found: int = 0
    not_reported: int = 0
    spent: int = 0
    unattributed: int = 0
    failed: int = 0


class _Call(NamedTuple):
    """What a call uses, by the descriptions: an enrichment, or the providers of a waterfall and its verifier.

    The providers are in their order, each with the inputs it needs. There are none if any of them is unknown.
    """

    enrichment: str | None = None
    providers: Sequence[tuple[str, frozenset[str]]] = ()
    verifier: str | None = None


@dataclass(slots=True)
class ProviderStats:
    """Adds up answers. `descriptions` are those that the API last gave, by kind and id."""

    descriptions: Mapping[tuple[TargetKind, str], Description]
    _totals: ProviderTotals = field(default_factory=ProviderTotals)
    _providers: dict[str, ProviderStat] = field(default_factory=dict)
    #: The sum of the positions that each provider has in the waterfalls of the answers, from 0.
    _position_sums: Counter[str] = field(default_factory=Counter)
    _calls: dict[str, _Call] = field(default_factory=dict)

    def add(self, kind: AnswerKind, answers: int) -> None:
        """Count answers of one kind. Attempts without one (expired or unconfirmed) add only their cost."""
        totals, paid = self._totals, (kind.paid or 0) * answers
        totals.spent += paid
        totals.unattributed += paid
        if kind.state not in {State.FOUND, State.NOT_FOUND, State.FAILED}:
            return
        totals.answers += answers
        totals.found += answers if kind.state == State.FOUND else 0
        totals.failed += answers if kind.state == State.FAILED else 0
        if (enrichment := self._call(kind.call).enrichment) is not None:
            self._add_enrichment(enrichment, kind, answers)
        elif steps := [step for step in kind.steps if not is_blank(step.provider)]:
            self._add_steps(steps, kind, answers)
        elif kind.state == State.FAILED or not self._infer_providers(kind, answers):
            totals.not_reported += answers

    def totals(self) -> ProviderTotals:
        """Return the totals."""
        providers = [replace(each) for each in sorted(self._providers.values(), key=self._sort_key)]
        return replace(self._totals, providers=providers)

    def _provider(self, name: str) -> ProviderStat:
        return self._providers.setdefault(name, ProviderStat(name))

    def _call(self, call: str) -> _Call:
        if call not in self._calls:
            target = Target.from_json(json.loads(call))
            self._calls[call] = _read_call(target, self.descriptions.get((target.kind, target.id)))
        return self._calls[call]

    def _add_enrichment(self, name: str, kind: AnswerKind, answers: int) -> None:
        provider = self._provider(name)
        # A failure without steps is not counted for the providers of a waterfall either.
        provider.reported += answers if kind.state != State.FAILED else 0
        provider.found += answers if kind.state == State.FOUND else 0
        provider.credits += (kind.paid or 0) * answers
        self._totals.unattributed -= (kind.paid or 0) * answers

    def _add_steps(self, steps: Sequence[ProviderCall], kind: AnswerKind, answers: int) -> None:
        verifier = self._call(kind.call).verifier
        previous: str | None = None
        called: dict[str, None] = {}
        verified: dict[str, None] = {}
        verifiers = set()
        for step in steps:
            name = step.provider
            provider = self._provider(name)
            cost = to_micros(step.cost) or 0
            provider.credits += cost * answers
            self._totals.unattributed -= cost * answers if kind.paid is not None else 0
            if name == verifier or str(step.action).lower().startswith("verif"):
                provider.verifies = True
                verifiers.add(name)
                if previous is not None:
                    verified[previous] = None
            else:
                called[name] = None
                previous = name
        # A verifier does not find the answer. The provider before it did.
        winner = previous if kind.provider in verifiers else kind.provider
        found = winner if kind.state == State.FOUND else None
        if found is not None:
            self._provider(found).found += answers
            called.setdefault(found)
        for position, name in enumerate(called):
            self._providers[name].reported += answers
            self._position_sums[name] += position * answers
        for name in verifiers - called.keys():
            self._providers[name].reported += answers
        for name in verified:
            self._providers[name].rejected += answers if name != winner else 0

    def _infer_providers(self, kind: AnswerKind, answers: int) -> bool:
        """Infer the providers that a waterfall called for answers without steps. Returns whether they are known."""
        providers = self._call(kind.call).providers
        found = kind.state == State.FOUND
        if kind.erased or not providers or (found and kind.provider not in dict(providers)):
            return False
        for position, (name, needed) in enumerate(providers):
            if needed <= frozenset(kind.sent) or name == kind.provider:
                self._provider(name).inferred += answers
                self._position_sums[name] += position * answers
            if found and name == kind.provider:
                self._providers[name].found += answers
                break
        return True

    def _sort_key(self, each: ProviderStat) -> tuple[bool, float, str]:
        """Sort providers by their average position; verifiers come last."""
        position = self._position_sums[each.name] / max(1, each.reported + each.inferred)
        return each.verifies, position, each.name


def _read_call(target: Target, description: Description | None) -> _Call:
    if target.kind is not TargetKind.WATERFALL:
        return _Call(description.source if isinstance(description, Enrichment) else target.id)
    if description is None:
        return _Call()
    called, verifier = description.called_providers(target), description.verifier(target)
    all_known = all(each.name for each in called)
    providers = [(each.name, frozenset(each.params)) for each in called] if all_known else []
    return _Call(None, providers, None if verifier is None else verifier.name or None)


def read_descriptions(ledger: Database) -> dict[tuple[TargetKind, str], Description]:
    """Read the descriptions that the ledger has. One that cannot be read is left out."""
    known = {}
    for key, description in records.load_descriptions(ledger).items():
        with suppress(ValidationError):
            known[key] = parse_description(key[0], description)
    return known

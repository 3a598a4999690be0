"""Decides what a run finds and costs, and formats it as the `data` of a task."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from enrich.sandbox import money
from enrich.sandbox.catalogue import Provider, Verifier
from enrich.sandbox.lookups import Cascade, EnrichmentCall, Lookup
from enrich.sandbox.people import Fields, SeededRandom, invent_fields, invent_rows
from enrich.sandbox.settings import SandboxSettings

# `free`: a failure that costs nothing and ends when sent again. `no_data`: no match, with that status for a while.
Outcome = Literal["found", "missed", "no_data", "failed", "free"]

_VERIFIER_REJECT_SHARE = 0.1  # probability of a wrong find, which the verifier rejects
_FAIL_TWICE_SHARE = 0.3  # share of the free failures that fail twice


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a run: JSON texts for the task's body, and the true cost in millionths.

    `steps` is a JSON list of [provider or verifier, found, millionths], also when the body has no steps.
    """

    outcome: Outcome
    data: str
    error: str
    cost: int
    steps: str = "[]"


@dataclass(slots=True)
class _CascadeTrace:
    """What the providers of a cascade, or an enrichment, returned."""

    cost: int = 0
    result: Fields | list[Fields] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    by_provider: dict[str, Fields] = field(default_factory=dict)
    provider_results: list[tuple[str, bool, int]] = field(default_factory=list)

    def add_step(
        self, action: str, provider: Provider | Verifier, result: str, cost: int, *, verified: bool = False
    ) -> None:
        self.cost += cost
        self.provider_results.append((provider.name, False, cost))
        self.steps.append(
            {
                "action": action,
                "provider": provider.name,
                "result": result,
                "details": None,
                "cost": money.to_text(cost),
                "is_verified": verified,
                "provider_logo": f"https://logos.example/{provider.id}.png",
            }
        )


def make_answer(lookup: Lookup, attempt: int, draw: SeededRandom, settings: SandboxSettings, *, bulk: bool) -> Answer:
    """Return the answer to a lookup; only free failures depend on `attempt` (1 for the first request)."""
    if draw("fails") < settings.failure_rate:
        if draw("fails at a price") >= settings.free_failures:
            return _charged_failure(lookup, draw, settings, bulk=bulk)
        if attempt <= 1 + (draw("fails twice") < _FAIL_TWICE_SHARE):
            return Answer("free", "null", _error_json(draw, "Provider unavailable, please try again later."), 0)
    target = lookup.target
    if isinstance(target, Cascade):
        trace = _run_cascade(target, lookup.params, draw, settings)
    else:
        trace = _run_enrichment(target, lookup.params, draw, settings)
    if trace.result is not None:
        data = _data_json(lookup, trace.result, trace, settings, bulk=bulk)
        return Answer("found", data, "null", trace.cost, json.dumps(trace.provider_results))
    if bulk:
        return Answer("missed", "null", "null", trace.cost, json.dumps(trace.provider_results))
    return _missed_answer(lookup, trace, draw, settings)


def _run_enrichment(
    target: EnrichmentCall, params: Mapping[str, str], draw: SeededRandom, settings: SandboxSettings
) -> _CascadeTrace:
    """Ask the one source. It has no steps; a match costs its whole price."""
    enrichment, trace = target.offer, _CascadeTrace()
    is_found = enrichment.always_answers or draw("known") < settings.hit_rate
    if is_found or settings.charge_misses:
        trace.cost = target.worst_case(params)
    trace.provider_results.append((enrichment.data_source, is_found, trace.cost))
    if is_found and enrichment.priced_by is None and target.pages is None:
        trace.result = invent_fields(str(enrichment.id), params, draw)
    elif is_found:
        count = target.units(params) if target.pages is None else (enrichment.per_page or 1) * target.pages
        trace.result = invent_rows(str(enrichment.id), params, count, draw)
    return trace


def _run_cascade(
    cascade: Cascade, params: Mapping[str, str], draw: SeededRandom, settings: SandboxSettings
) -> _CascadeTrace:
    """Ask the providers in turn. The last one finds all known people, so any cascade has the same hit rate."""
    trace = _CascadeTrace()
    verifier = cascade.verifier
    usable_providers = [provider for provider in cascade.providers if params.keys() >= set(provider.params)]
    is_known = draw("known") < settings.hit_rate
    for provider in usable_providers:
        last = provider is usable_providers[-1]
        is_found = is_known and (last or draw(f"{provider.id} knows") < provider.coverage)
        # With a verifier, some finds are wrong, and the verifier rejects them.
        is_wrong = verifier and not last and draw(f"{provider.id} is wrong") < _VERIFIER_REJECT_SHARE
        if not is_found and not is_wrong:
            trace.add_step("search", provider, "not_found", provider.cost if settings.charge_misses else 0)
            trace.by_provider[provider.name] = {}
            continue
        found = invent_fields(cascade.offer.identifier, params, draw)
        if verifier and is_wrong:
            trace.add_step("search", provider, "found", 0)
            trace.add_step("verify", verifier, "invalid", verifier.cost)
            trace.by_provider[provider.name] = {name: f"old-{value}" for name, value in found.items()}
            continue
        trace.add_step("search", provider, "found", provider.cost, verified=verifier is not None)
        trace.provider_results[-1] = (provider.name, True, provider.cost)
        if verifier:
            trace.add_step("verify", verifier, "valid", verifier.cost, verified=True)
        trace.by_provider[provider.name] = {**found, "score": 60 + int(draw("score") * 40)}
        trace.result = found
        break
    return trace


def _missed_answer(lookup: Lookup, trace: _CascadeTrace, draw: SeededRandom, settings: SandboxSettings) -> Answer:
    kind = draw.pick("miss", settings.miss_kinds)
    outputs = lookup.target.offer.outputs
    match kind:
        case "no_data":
            return Answer("no_data", "null", "null", trace.cost, json.dumps(trace.provider_results))
        case "empty_list":
            data = "[]"
        case "empty_object":
            data = "{}"
        case "null_result":
            data = _data_json(lookup, dict.fromkeys(outputs), trace, settings)
        case "blank_result":
            data = _data_json(lookup, dict.fromkeys(outputs, ""), trace, settings)
        case _:
            data = "null"
    return Answer("missed", data, "null", trace.cost, json.dumps(trace.provider_results))


def _charged_failure(lookup: Lookup, draw: SeededRandom, settings: SandboxSettings, *, bulk: bool) -> Answer:
    target, trace = lookup.target, _CascadeTrace()
    if isinstance(target, Cascade):
        source = target.providers[0].name
        trace.add_step("search", target.providers[0], "error", target.providers[0].cost)
    else:
        source = target.offer.data_source
        trace.cost = lookup.worst_case
        trace.provider_results.append((source, False, trace.cost))
    shows_steps = bool(trace.steps) and not bulk and draw("failure shows steps") < 1 / 2
    data = _data_json(lookup, {}, trace, settings) if shows_steps else "null"
    return Answer(
        "failed",
        data,
        _error_json(draw, f"{source}: unexpected response."),
        trace.cost,
        json.dumps(trace.provider_results),
    )


def _error_json(draw: SeededRandom, text: str) -> str:
    return json.dumps([text, "Task failed."] if draw("error is a list") < 1 / 2 else text)


def _data_json(
    lookup: Lookup,
    result: Fields | list[Fields],
    trace: _CascadeTrace,
    settings: SandboxSettings,
    *,
    bulk: bool = False,
) -> str:
    """Write the result. An enrichment's is flat: there is nothing beside it, and several rows are a list of them."""
    data: Any = result
    if isinstance(lookup.target, Cascade) and settings.shape.startswith("wrap"):
        data = {
            "result": result,
            "result_field": list(result),
            "enrichment_data": trace.by_provider,
            "steps": trace.steps,
        }
    if not bulk and isinstance(data, dict) and settings.shape in ("wrapped", "flat_list"):
        data = [data]
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))

"""Decides what a run finds and costs, and formats it as the `data` of a task."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from enrich.sandbox import money
from enrich.sandbox.catalogue import Provider, Verifier
from enrich.sandbox.people import Fields, SeededRandom, invent_fields
from enrich.sandbox.questions import Lookup
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
    """What the providers of a cascade returned."""

    cost: int = 0
    result: Fields | None = None
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


def make_answer(
    lookup: Lookup, attempt: int, draw: SeededRandom, settings: SandboxSettings, *, bulk: bool = False
) -> Answer:
    """Return the answer to a lookup; only free failures depend on `attempt` (1 for the first request)."""
    if draw("fails") < settings.failure_rate:
        if draw("fails at a price") >= settings.free_failures:
            return _charged_failure(lookup, draw, settings, bulk=bulk)
        if attempt <= 1 + (draw("fails twice") < _FAIL_TWICE_SHARE):
            return Answer("free", "null", _error_json(draw, "Provider unavailable, please try again later."), 0)
    trace = _run_cascade(lookup, draw, settings)
    if trace.result is not None:
        data = _data_json(trace.result, trace, settings, bulk=bulk)
        return Answer("found", data, "null", trace.cost, json.dumps(trace.provider_results))
    if bulk:
        return Answer("missed", "null", "null", trace.cost, json.dumps(trace.provider_results))
    return _missed_answer(lookup, trace, draw, settings)


def _run_cascade(lookup: Lookup, draw: SeededRandom, settings: SandboxSettings) -> _CascadeTrace:
    """Ask the providers in turn. The last one finds all known people, so any cascade has the same hit rate."""
    trace = _CascadeTrace()
    verifier = lookup.cascade.verifier
    usable_providers = [
        provider for provider in lookup.cascade.providers if lookup.params.keys() >= set(provider.params)
    ]
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
        found = invent_fields(lookup.cascade.waterfall.identifier, lookup.params, draw)
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
    outputs = lookup.cascade.waterfall.outputs
    match kind:
        case "no_data":
            return Answer("no_data", "null", "null", trace.cost, json.dumps(trace.provider_results))
        case "empty_list":
            data = "[]"
        case "empty_object":
            data = "{}"
        case "null_result":
            data = _data_json(dict.fromkeys(outputs), trace, settings)
        case "blank_result":
            data = _data_json(dict.fromkeys(outputs, ""), trace, settings)
        case _:
            data = "null"
    return Answer("missed", data, "null", trace.cost, json.dumps(trace.provider_results))


def _charged_failure(lookup: Lookup, draw: SeededRandom, settings: SandboxSettings, *, bulk: bool) -> Answer:
    trace = _CascadeTrace()
    provider = lookup.cascade.providers[0]
    trace.add_step("search", provider, "error", provider.cost)
    shows_steps = not bulk and draw("failure shows steps") < 1 / 2
    data = _data_json({}, trace, settings) if shows_steps else "null"
    return Answer(
        "failed",
        data,
        _error_json(draw, f"{provider.name}: unexpected response."),
        trace.cost,
        json.dumps(trace.provider_results),
    )


def _error_json(draw: SeededRandom, text: str) -> str:
    return json.dumps([text, "Task failed."] if draw("error is a list") < 1 / 2 else text)


def _data_json(result: Fields, trace: _CascadeTrace, settings: SandboxSettings, *, bulk: bool = False) -> str:
    data: Any = result
    if settings.shape.startswith("wrap"):
        data = {
            "result": result,
            "result_field": list(result),
            "enrichment_data": trace.by_provider,
            "steps": trace.steps,
        }
    if not bulk and settings.shape in ("wrapped", "flat_list"):
        data = [data]
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))

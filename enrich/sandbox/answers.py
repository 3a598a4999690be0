"""Works out what a run finds and costs, and shapes it as the `data` of a task."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from enrich.sandbox import money
from enrich.sandbox.catalogue import Provider, Verifier
from enrich.sandbox.people import Draw, Fields, fields
from enrich.sandbox.questions import Question
from enrich.sandbox.settings import SandboxSettings

# `free` is a failure that costs nothing and goes away when asked again; `no_data` a miss that says so for a while.
Outcome = Literal["found", "missed", "no_data", "failed", "free"]

_REJECTED = 0.1  # share of the finds that the verifier turns down
_STUBBORN = 0.3  # share of the free failures that fail a second time


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run comes to: JSON texts for the task's body, and the true cost in millionths.

    `steps` is a JSON list of who was asked, also where the body tells none: name, did it find the answer, millionths.
    """

    outcome: Outcome
    data: str
    error: str
    cost: int
    steps: str = "[]"


@dataclass(slots=True)
class _Trail:
    """What happened on the way down the cascade."""

    cost: int = 0
    result: Fields | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    by_provider: dict[str, Fields] = field(default_factory=dict)
    asked: list[tuple[str, bool, int]] = field(default_factory=list)

    def step(self, action: str, who: Provider | Verifier, result: str, cost: int, *, verified: bool = False) -> None:
        self.cost += cost
        self.asked.append((who.name, False, cost))
        self.steps.append(
            {
                "action": action,
                "provider": who.name,
                "result": result,
                "details": None,
                "cost": money.text(cost),
                "is_verified": verified,
                "provider_logo": f"https://logos.example/{who.id}.png",
            }
        )


def answer(question: Question, attempt: int, draw: Draw, settings: SandboxSettings, *, bulk: bool = False) -> Answer:
    """Answer a question that is asked for the nth time; only free failures depend on n."""
    if draw("fails") < settings.failure_rate:
        if draw("fails at a price") >= settings.free_failures:
            return _charged_failure(question, draw, settings, bulk=bulk)
        if attempt <= 1 + (draw("fails twice") < _STUBBORN):
            return Answer("free", "null", _error(draw, "Provider unavailable, please try again later."), 0)
    trail = _descend(question, draw, settings)
    if trail.result is not None:
        data = _shaped(trail.result, trail, settings, bulk=bulk)
        return Answer("found", data, "null", trail.cost, json.dumps(trail.asked))
    if bulk:
        return Answer("missed", "null", "null", trail.cost, json.dumps(trail.asked))
    return _miss(question, trail, draw, settings)


def _descend(question: Question, draw: Draw, settings: SandboxSettings) -> _Trail:
    """Ask the providers in turn; the last one knows whoever is known, so that the hit rate holds for any cascade."""
    trail = _Trail()
    verifier = question.cascade.verifier
    able = [provider for provider in question.cascade.providers if question.params.keys() >= set(provider.params)]
    known = draw("known") < settings.hit_rate
    for provider in able:
        last = provider is able[-1]
        knows = known and (last or draw(f"{provider.id} knows") < provider.coverage)
        # With a verifier there are also wrong finds, which it turns down.
        wrong = verifier and not last and draw(f"{provider.id} is wrong") < _REJECTED
        if not knows and not wrong:
            trail.step("search", provider, "not_found", provider.cost if settings.charge_misses else 0)
            trail.by_provider[provider.name] = {}
            continue
        found = fields(question.cascade.waterfall.identifier, question.params, draw)
        if verifier and wrong:
            trail.step("search", provider, "found", 0)
            trail.step("verify", verifier, "invalid", verifier.cost)
            trail.by_provider[provider.name] = {name: f"old-{value}" for name, value in found.items()}
            continue
        trail.step("search", provider, "found", provider.cost, verified=verifier is not None)
        trail.asked[-1] = (provider.name, True, provider.cost)
        if verifier:
            trail.step("verify", verifier, "valid", verifier.cost, verified=True)
        trail.by_provider[provider.name] = {**found, "score": 60 + int(draw("score") * 40)}
        trail.result = found
        break
    return trail


def _miss(question: Question, trail: _Trail, draw: Draw, settings: SandboxSettings) -> Answer:
    kind = draw.pick("miss", settings.miss_kinds)
    outputs = question.cascade.waterfall.outputs
    match kind:
        case "no_data":
            return Answer("no_data", "null", "null", trail.cost, json.dumps(trail.asked))
        case "empty_list":
            data = "[]"
        case "empty_object":
            data = "{}"
        case "null_result":
            data = _shaped(dict.fromkeys(outputs), trail, settings)
        case "blank_result":
            data = _shaped(dict.fromkeys(outputs, ""), trail, settings)
        case _:
            data = "null"
    return Answer("missed", data, "null", trail.cost, json.dumps(trail.asked))


def _charged_failure(question: Question, draw: Draw, settings: SandboxSettings, *, bulk: bool) -> Answer:
    trail = _Trail()
    provider = question.cascade.providers[0]
    trail.step("search", provider, "error", provider.cost)
    shows_steps = not bulk and draw("failure shows steps") < 1 / 2
    data = _shaped({}, trail, settings) if shows_steps else "null"
    return Answer(
        "failed", data, _error(draw, f"{provider.name}: unexpected response."), trail.cost, json.dumps(trail.asked)
    )


def _error(draw: Draw, text: str) -> str:
    return json.dumps([text, "Task failed."] if draw("error is a list") < 1 / 2 else text)


def _shaped(result: Fields, trail: _Trail, settings: SandboxSettings, *, bulk: bool = False) -> str:
    data: Any = result
    if settings.shape.startswith("wrap"):
        data = {
            "result": result,
            "result_field": list(result),
            "enrichment_data": trail.by_provider,
            "steps": trail.steps,
        }
    if not bulk and settings.shape in ("wrapped", "flat_list"):
        data = [data]
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))

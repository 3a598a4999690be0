"""Decides what a run finds and costs, and writes it as JSON: the `data` of a task, and its body as of a given time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from enrich.sandbox import money
from enrich.sandbox.catalogue import Service
from enrich.sandbox.lookups import Cascade, EnrichmentCall, Lookup
from enrich.sandbox.people import Fields, SeededRandom, invent_fields, invent_rows
from enrich.sandbox.settings import SandboxSettings
from enrich.sandbox.store import Run, Task

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
class _Search:
    """A search for a lookup: what the providers of its cascade, or its enrichment, returned."""

    lookup: Lookup
    draw: SeededRandom
    settings: SandboxSettings
    bulk: bool
    cost: int = 0
    result: Fields | list[Fields] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    by_provider: dict[str, Fields] = field(default_factory=dict)
    provider_results: list[tuple[str, bool, int]] = field(default_factory=list)

    def run(self) -> Answer:
        """Search, and return the answer."""
        target = self.lookup.target
        if isinstance(target, Cascade):
            self._run_cascade(target)
        else:
            self._run_enrichment(target)
        if self.result is not None:
            return self._answer("found", self._data_json(self.result))
        return self._answer("missed", "null") if self.bulk else self._missed_answer()

    def fail(self) -> Answer:
        """Return the answer of a search that costs something, and fails."""
        target = self.lookup.target
        if isinstance(target, Cascade):
            source = target.providers[0].name
            self._add_step("search", target.providers[0], "error", target.providers[0].cost)
        else:
            source = target.offer.data_source
            self.cost = self.lookup.worst_case
            self.provider_results.append((source, False, self.cost))
        shows_steps = bool(self.steps) and not self.bulk and self.draw("failure shows steps") < 1 / 2
        data = self._data_json({}) if shows_steps else "null"
        return self._answer("failed", data, _error_json(self.draw, f"{source}: unexpected response."))

    def _run_enrichment(self, target: EnrichmentCall) -> None:
        """Run the one source. It has no steps; a match costs its whole price."""
        enrichment, params = target.offer, self.lookup.params
        is_found = enrichment.always_answers or self.draw("known") < self.settings.hit_rate
        if is_found or self.settings.charge_misses:
            self.cost = self.lookup.worst_case
        self.provider_results.append((enrichment.data_source, is_found, self.cost))
        if is_found and enrichment.priced_by is None and target.pages is None:
            self.result = invent_fields(str(enrichment.id), params, self.draw)
        elif is_found:
            count = target.units(params) if target.pages is None else (enrichment.per_page or 1) * target.pages
            self.result = invent_rows(str(enrichment.id), params, count, self.draw)

    def _run_cascade(self, cascade: Cascade) -> None:
        """Call the providers in turn. The last one finds all known people, so any cascade has the same hit rate."""
        verifier, params, draw = cascade.verifier, self.lookup.params, self.draw
        usable_providers = [provider for provider in cascade.providers if params.keys() >= set(provider.params)]
        is_known = draw("known") < self.settings.hit_rate
        for provider in usable_providers:
            last = provider is usable_providers[-1]
            is_found = is_known and (last or draw(f"{provider.id} knows") < provider.coverage)
            # With a verifier, some finds are wrong, and the verifier rejects them.
            is_wrong = verifier and not last and draw(f"{provider.id} is wrong") < _VERIFIER_REJECT_SHARE
            if not is_found and not is_wrong:
                self._add_step("search", provider, "not_found", provider.cost if self.settings.charge_misses else 0)
                self.by_provider[provider.name] = {}
                continue
            found = invent_fields(cascade.offer.identifier, params, draw)
            if verifier and is_wrong:
                self._add_step("search", provider, "found", 0)
                self._add_step("verify", verifier, "invalid", verifier.cost)
                self.by_provider[provider.name] = {name: f"old-{value}" for name, value in found.items()}
                continue
            self._add_step("search", provider, "found", provider.cost, verified=verifier is not None)
            self.provider_results[-1] = (provider.name, True, provider.cost)
            if verifier:
                self._add_step("verify", verifier, "valid", verifier.cost, verified=True)
            self.by_provider[provider.name] = {**found, "score": 60 + int(draw("score") * 40)}
            self.result = found
            break

    def _add_step(self, action: str, provider: Service, result: str, cost: int, *, verified: bool = False) -> None:
        self.cost += cost
        self.provider_results.append((provider.name, False, cost))
        self.steps.append(
            {
                "action": action,
                "provider": provider.name,
                "result": result,
                "details": None,
                "cost": str(money.to_number(cost)),
                "is_verified": verified,
                "provider_logo": f"https://logos.example/{provider.id}.png",
            }
        )

    def _missed_answer(self) -> Answer:
        outputs = self.lookup.target.offer.outputs
        match self.draw.pick("miss", self.settings.miss_kinds):
            case "no_data":
                return self._answer("no_data", "null")
            case "empty_list":
                data = "[]"
            case "empty_object":
                data = "{}"
            case "null_result":
                data = self._data_json(dict.fromkeys(outputs))
            case "blank_result":
                data = self._data_json(dict.fromkeys(outputs, ""))
            case _:
                data = "null"
        return self._answer("missed", data)

    def _data_json(self, result: Fields | list[Fields]) -> str:
        """Write the result. An enrichment's is flat: nothing is beside it, and several rows are a list of them."""
        data: Any = result
        if isinstance(self.lookup.target, Cascade) and self.settings.shape.startswith("wrap"):
            data = {
                "result": result,
                "result_field": list(result),
                "enrichment_data": self.by_provider,
                "steps": self.steps,
            }
        if not self.bulk and isinstance(data, dict) and self.settings.shape in ("wrapped", "flat_list"):
            data = [data]
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"))

    def _answer(self, outcome: Outcome, data: str, error: str = "null") -> Answer:
        """Return the answer with these steps and their cost."""
        return Answer(outcome, data, error, self.cost, json.dumps(self.provider_results))


def make_answer(lookup: Lookup, attempt: int, draw: SeededRandom, settings: SandboxSettings, *, bulk: bool) -> Answer:
    """Return the answer to a lookup; only free failures depend on `attempt` (1 for the first request)."""
    search = _Search(lookup, draw, settings, bulk)
    if draw("fails") < settings.failure_rate:
        if draw("fails at a price") >= settings.free_failures:
            return search.fail()
        if attempt <= 1 + (draw("fails twice") < _FAIL_TWICE_SHARE):
            return Answer("free", "null", _error_json(draw, "Provider unavailable, please try again later."), 0)
    return search.run()


def _error_json(draw: SeededRandom, text: str) -> str:
    return json.dumps([text, "Task failed."] if draw("error is a list") < 1 / 2 else text)


ODD_STATUSES = ("queued", "verifying", "enriching")
_FAILURES = ("failed", "free")
_MISSES = ("missed", "no_data")


class _TaskBody(NamedTuple):
    """The values of a body; `data`, `error` and `progress` are JSON already, `cost` is in millionths."""

    status: str
    data: str = "null"
    error: str = "null"
    progress: str = ""
    cost: int = 0


class TaskRenderer:
    """Renders tasks with the spellings chosen in the settings."""

    def __init__(self, settings: SandboxSettings) -> None:
        self._settings = settings
        self._completed, self._failed = ("success", "error") if settings.aliases else ("completed", "failed")

    def is_expired(self, task: Task, now: float) -> bool:
        """Return True when the result has expired."""
        finished = task.cancelled if task.cancelled is not None else max(run.ready for run in task.runs)
        return now - finished > self._settings.result_ttl

    def expired_body(self, task: Task) -> bytes:
        """Return the body of an expired task, for a 200 response."""
        return self._write_body(task, _TaskBody("gone", error='"Task data has expired"'))

    def odd_status_body(self, task: Task, poll: int) -> bytes:
        """Return a body with a status that the API's documentation does not name."""
        return self._write_body(task, _TaskBody(ODD_STATUSES[poll % len(ODD_STATUSES)]))

    def body(self, task: Task, now: float, *, partial: bool = False) -> bytes:
        """Return the body of a task that has not expired."""
        return self._write_body(
            task, self._bulk_body(task, now, partial=partial) if task.bulk else self._single_body(task, now)
        )

    def _single_body(self, task: Task, now: float) -> _TaskBody:
        run = task.runs[0]
        if task.cancelled is not None:
            return _TaskBody("cancelled")
        if now < run.ready:
            return _TaskBody("processing")
        status = self._failed if run.outcome in _FAILURES else self._completed
        no_data_s = self._settings.no_data_seconds
        if run.outcome == "no_data" and (no_data_s is None or no_data_s < 0 or now < run.ready + no_data_s):
            status = "no_data"
        return _TaskBody(status, run.data, run.error, cost=run.cost)

    def _bulk_body(self, task: Task, now: float, *, partial: bool) -> _TaskBody:
        done = [run for run in task.runs if now >= run.ready and run.state != "refunded"]
        failed = [run for run in done if run.outcome in _FAILURES]
        missed = sum(run.outcome in _MISSES for run in done)
        running = 0 if task.cancelled is not None else len(task.runs) - len(done)
        counts = {
            "total": len(task.runs),
            "completed": len(done) - len(failed) - missed,
            "no_data": missed,
            "failed": len(failed),
            "processing": running,
        }
        # Before July 2026, the API returned only the rows with a match, in no order.
        listed_runs = (
            done if self._settings.bulk_data == "aligned" else [run for run in reversed(done) if run.data != "null"]
        )
        progress, data = json.dumps(counts), f"[{','.join(run.data for run in listed_runs)}]"
        if running:
            # Not aligned: the documentation defines no order for the finished rows of a running task.
            return _TaskBody("processing", data if partial else "null", progress=progress)
        if task.cancelled is not None:
            status = "cancelled"
        elif len(failed) == len(task.runs):
            status = self._failed
        else:
            status = "partially_completed" if failed else self._completed
        return _TaskBody(status, data, _errors_json(failed), progress, sum(run.cost for run in done))

    def _write_body(self, task: Task, shown: _TaskBody) -> bytes:
        progress = f'"progress":{shown.progress},' if shown.progress else ""
        spent = "" if self._settings.hide_credits else f',"credits_spent":{money.to_number(shown.cost)}'
        return (
            f'{{"task_id":"{task.task_id}","request_id":"{task.task_id}","status":"{shown.status}",{progress}'
            f'"data":{shown.data},"error":{shown.error}{spent}}}'
        ).encode()


def _errors_json(failed: Sequence[Run]) -> str:
    if not failed:
        return "null"
    texts: list[str] = []
    for run in failed:
        error = json.loads(run.error)
        texts += error if isinstance(error, list) else [error]
    return json.dumps(texts)

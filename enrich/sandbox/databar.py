"""Implements Databar's service: accepts runs, keeps tasks, counts credits. Independent of HTTP."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import uuid4

from enrich.sandbox.answers import SeededRandom, make_answer
from enrich.sandbox.catalogue import (
    ENRICHMENTS,
    REAL_PRICES,
    WATERFALLS,
    Enrichment,
    Waterfall,
    to_credits,
    to_micros,
)
from enrich.sandbox.lookups import Cascade, EnrichmentCall, Lookup, Refused, make_lookups
from enrich.sandbox.settings import Fault, SandboxSettings, parse_latency
from enrich.sandbox.store import Run, SandboxStore, Task, TaskFault

ODD_STATUSES = ("queued", "verifying", "enriching")
_FAILURES = ("failed", "free")
_MISSES = ("missed", "no_data")


class ApiError(Exception):
    """The request is answered with an error: its status and its detail."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Clock:
    """The wall clock plus the seconds that `/__advance` added."""

    def __init__(self, store: SandboxStore, date_offset: float) -> None:
        self._store = store
        self._date_offset = date_offset

    def now(self) -> float:
        """Return the time in seconds since the epoch."""
        return time.time() + self._store.facts["offset"]

    def date(self, ahead_s: float = 0.0) -> str:
        """Return the `Date` header of now, or of a moment `ahead_s` seconds later."""
        return _http_date(int(self.now() + self._date_offset + ahead_s))


@lru_cache(maxsize=1)
def _http_date(second: int) -> str:
    """Format a time (seconds since the epoch) as an HTTP date. Many responses have the same."""
    return formatdate(second, usegmt=True)


class _TaskBody(NamedTuple):
    """The values of a body; `data`, `error` and `progress` are JSON already, `cost` is in millionths."""

    status: str
    data: str = "null"
    error: str = "null"
    progress: str = ""
    cost: int = 0


class Databar:
    """The service behind the API routes."""

    def __init__(self, store: SandboxStore, settings: SandboxSettings) -> None:
        self.clock = Clock(store, settings.date_offset)
        self._store = store
        self._settings = settings
        self._latency = parse_latency(settings.latency)
        self._completed, self._failed = ("success", "error") if settings.aliases else ("completed", "failed")
        self._polls: Counter[str] = Counter()
        self._first_polls: dict[str, float] = {}

    def waterfall(self, identifier: str) -> Waterfall:
        """Return a waterfall with its current prices. Raises ApiError."""
        if identifier not in WATERFALLS:
            raise ApiError(404, "Waterfall not found")
        return WATERFALLS[identifier].with_prices(self._prices())

    def waterfalls(self) -> list[Waterfall]:
        """Return all waterfalls."""
        return [self.waterfall(identifier) for identifier in WATERFALLS]

    def enrichment(self, number: int) -> Enrichment:
        """Return an enrichment with its current price. Raises ApiError."""
        if number not in ENRICHMENTS:
            raise ApiError(404, "Enrichment not found")
        return ENRICHMENTS[number].with_prices(self._prices())

    def enrichments(self, query: str | None, category: str | None) -> list[Enrichment]:
        """Return the enrichments whose name, description or source has the query in it, of one category if given."""
        text = (query or "").casefold()
        return [
            each
            for each in map(self.enrichment, ENRICHMENTS)
            if text in f"{each.name} {each.description} {each.data_source}".casefold()
            and category in (None, each.category)
        ]

    def _prices(self) -> Mapping[int, float]:
        """Return the prices, by id, that differ from the catalogue's: by the settings, or because they were changed."""
        return {**(REAL_PRICES if self._settings.prices == "real" else {}), **self._store.prices}

    def submit(
        self,
        target: Cascade | EnrichmentCall,
        rows: Sequence[Mapping[str, Any]],
        *,
        bulk: bool,
        fault: Fault | None = None,
    ) -> str:
        """Accept a run for each row, or none of them; they are stored on disk before this returns the task id."""
        limit = self._settings.bulk_limit
        if bulk and limit is not None and len(rows) > limit:
            raise Refused({"error": "BATCH_TOO_LARGE", "detail": f"At most {limit} rows are allowed."})
        lookups = make_lookups(target, rows, bulk=bulk, error_shape=self._settings.error_shape)
        now = self.clock.now()
        self._store.settle(now)
        if self._store.balance < sum(lookup.worst_case for lookup in lookups):
            raise ApiError(406, "Check the number of remaining credits or the tariff plan.")
        task_id = str(uuid4())
        with self._store.transaction():
            self._store.add_task(
                task_id,
                [self._make_run(lookup, now, bulk=bulk) for lookup in lookups],
                TaskFault(fault.name, float(next(iter(fault.params.values()), 0))) if fault else TaskFault("", 0),
                bulk=bulk,
                now=now,
            )
        return task_id

    def _make_run(self, lookup: Lookup, now: float, *, bulk: bool) -> tuple[Run, str]:
        number, count = self._store.count_lookup(lookup.key, lookup.canonical)
        draw = SeededRandom(self._settings.seed, lookup.subject)
        reply = make_answer(lookup, count, draw, self._settings, bulk=bulk)
        run = Run(
            ready=now + self._latency(draw("latency")),
            outcome=reply.outcome,
            data=reply.data,
            error=reply.error,
            reserved=lookup.worst_case,
            cost=reply.cost,
            state="running",
            lookup=number,
        )
        return run, reply.steps

    def poll(self, task_id: str, *, partial: bool) -> bytes:
        """Return the current body of a task."""
        task, now = self._task(task_id), self.clock.now()
        finished = task.cancelled if task.cancelled is not None else max(run.ready for run in task.runs)
        if now - finished > self._settings.result_ttl:
            if self._settings.expired_as == "410":
                raise ApiError(410, "Task data has expired")
            return self._write_body(task, _TaskBody("gone", error='"Task data has expired"'))
        if task.fault.name == "flickering-task" and self._is_hidden(task, now):
            raise ApiError(404, "Task not found")
        if task.fault.name == "odd-status" and self._polls[task_id] < task.fault.param:
            self._polls[task_id] += 1
            return self._write_body(task, _TaskBody(ODD_STATUSES[self._polls[task_id] % len(ODD_STATUSES)]))
        return self._body(task, now, partial=partial)

    def cancel(self, task_id: str) -> bytes:
        """Cancel a task, refund the runs that have not completed, and return its body."""
        task, now = self._task(task_id), self.clock.now()
        if task.cancelled is not None or all(run.ready <= now for run in task.runs):
            raise ApiError(409, "Task has already finished")
        self._store.settle(now)
        self._store.cancel(task, now)
        return self._body(self._task(task_id), now)

    def _task(self, task_id: str) -> Task:
        task = self._store.task(task_id)
        if task is None or task.fault.name == "lost-task":
            raise ApiError(404, "Task not found")
        if task.fault.name == "late-task" and self.clock.now() < task.created + task.fault.param:
            raise ApiError(404, "Task not found")
        return task

    def _is_hidden(self, task: Task, now: float) -> bool:
        if task.task_id not in self._first_polls:
            self._first_polls[task.task_id] = now
            return all(run.ready <= now for run in task.runs)
        return now < self._first_polls[task.task_id] + task.fault.param

    def _body(self, task: Task, now: float, *, partial: bool = False) -> bytes:
        """Return the body of a task that has not expired."""
        shown = self._bulk_body(task, now, partial=partial) if task.bulk else self._single_body(task, now)
        return self._write_body(task, shown)

    def _single_body(self, task: Task, now: float) -> _TaskBody:
        run = task.runs[0]
        if task.cancelled is not None:
            return _TaskBody("cancelled")
        if now < run.ready:
            return _TaskBody("processing")
        status = self._failed if run.outcome in _FAILURES else self._completed
        no_data_s = self._settings.no_data_seconds
        if run.outcome == "no_data" and (no_data_s is None or now < run.ready + no_data_s):
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
        spent = "" if self._settings.hide_credits else f',"credits_spent":{to_credits(shown.cost)}'
        return (
            f'{{"task_id":"{task.task_id}","request_id":"{task.task_id}","status":"{shown.status}",{progress}'
            f'"data":{shown.data},"error":{shown.error}{spent}}}'
        ).encode()

    def user(self) -> dict[str, Any]:
        """Return the account of the API key."""
        self._store.settle(self.clock.now())
        return {
            "first_name": "Sandra",
            "email": "sandra@sandbox.example",
            "balance": to_credits(self._store.balance),
            "plan": "sandbox",
            "workspace": "sandbox",
        }

    def top_up(self, amount: float) -> None:
        """Add an amount of credits."""
        self._store.set_fact("topped_up", self._store.facts["topped_up"] + to_micros(amount))

    def set_prices(self, prices: Mapping[int, float]) -> None:
        """Change prices (credits), by the ids of providers, verifiers and enrichments; accepted runs keep theirs."""
        for seller_id, price in prices.items():
            self._store.set_fact(f"price:{seller_id}", price)

    def advance(self, seconds: float) -> dict[str, float]:
        """Move the clock forward permanently; return the new time, and all seconds that were added so far."""
        offset = self._store.facts["offset"] + seconds
        self._store.set_fact("offset", offset)
        return {"now": self.clock.now(), "offset": offset}

    def audit(self, *, runs: bool) -> dict[str, Any]:
        """Settle the runs that are due, then return what was accepted and charged."""
        self._store.settle(self.clock.now())
        totals: dict[str, Any] = {
            **self._store.totals(),
            "credits_charged": to_credits(self._store.spent),
            "credits_reserved": to_credits(self._store.reserved),
            "balance": to_credits(self._store.balance),
            "balance_at_start": to_credits(self._store.facts["balance_at_start"]),
            "topped_up": to_credits(self._store.facts["topped_up"]),
            "by_provider": {
                name: {"calls": calls, "found": found, "credits": to_credits(cost)}
                for name, calls, found, cost in self._store.provider_totals()
            },
        }
        return totals | {"runs": self._lookup_totals()} if runs else totals

    def _lookup_totals(self) -> list[dict[str, Any]]:
        return [
            {
                **json.loads(target),
                "params": json.loads(params),
                "accepted": accepted,
                "charged": charged,
                "credits": to_credits(cost),
                "task_ids": task_ids.split(),
            }
            for target, params, accepted, charged, cost, task_ids in self._store.lookup_totals()
        ]


def _errors_json(failed: Sequence[Run]) -> str:
    if not failed:
        return "null"
    texts: list[str] = []
    for run in failed:
        error = json.loads(run.error)
        texts += error if isinstance(error, list) else [error]
    return json.dumps(texts)

"""Renders the body of `GET /v1/tasks/{task_id}` from the stored task, as of a given time."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from enrich.sandbox import money
from enrich.sandbox.settings import SandboxSettings
from enrich.sandbox.store import Run, Task

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

"""Replaces a ledger that cannot be written: records paid results in a rescue file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from enrich.errors import LedgerFailed
from enrich.ledger import resume, transitions
from enrich.ledger.database import Database
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.records import read_paths
from enrich.ledger.rescue_file import RescuedAttempt, RescueFile
from enrich.ledger.rescue_import import SETTLED_STATES
from enrich.ledger.transitions import InDoubtUpdate
from enrich.models import DUPLICATE_TASK_ID, Acceptance, Answer, State

#: Lines per write.
_LINES_PER_WRITE = 1000
#: Errors that reading a broken database may raise.
_READ_ERRORS = (*DATABASE_ERRORS, ValueError, TypeError)
#: Attempts that would be charged again if they were lost.
_OPEN = "a.state IN ('submitting', 'submitted') OR (a.state = 'in_doubt' AND a.id = r.attempt_id)"
_ANSWERED = (
    "a.state IN ('found', 'not_found', 'failed', 'expired') AND a.id IN (r.attempt_id, r.answer_id) "
    "AND r.erased_ms IS NULL AND a.task_id IS NOT NULL"
)
_COLUMNS = (
    "a.id AS attempt, r.fingerprint, c.canonical AS call, r.params, e.paths, a.step, a.state, a.task_id, a.claimed_ms, "
    "a.submitted_ms, a.settled_ms, a.reserved, a.acknowledged, "
    # A bulk task has one price. It is stored with its first request.
    "CASE WHEN a.bulk_task_id IS NULL THEN a.credits WHEN a.bulk_index = 0 THEN b.credits ELSE b.credits * 0 END "
    "AS credits, a.provider, a.error, a.answer, a.bulk_task_id AS bulk_task, a.bulk_index, b.size"
)


@dataclass(slots=True)
class RescueRecorder:
    """Records operations that could not be written. One that would start something new fails with `failure`."""

    ledger: Database
    file: RescueFile
    failure: LedgerFailed
    #: The ledger's path no longer leads to the open database.
    database_missing: bool
    _lines: dict[int, RescuedAttempt] = field(default_factory=dict)
    _changed: set[int] = field(default_factory=set)
    #: Task ids that are in no file so far, by attempt.
    _unsaved_task_ids: dict[int, str] = field(default_factory=dict)

    def begin(self) -> None:
        """Record all running and unconfirmed attempts when the whole ledger is gone."""
        if self.database_missing:
            with suppress(*_READ_ERRORS):
                self._lines = {line.attempt: line for line in _read_attempts(self.ledger, _OPEN)}
                self._changed = set(self._lines)
                self._unsaved_task_ids = {
                    attempt: line.task_id for attempt, line in self._lines.items() if line.task_id is not None
                }
        self.flush()

    def record_accepted(
        self, updates: Sequence[tuple[int, str, int]], facts: Mapping[str, str | None]
    ) -> list[Acceptance]:
        """Record task ids. An id that an attempt of another request has is not accepted."""
        line_facts = {name: value for name, value in facts.items() if value is not None}
        acceptances = []
        for attempt, task_id, now_ms in updates:
            if is_conflict := self._is_of_another_request(attempt, task_id):
                self.mark_in_doubt([(attempt, f"{DUPLICATE_TASK_ID}: {task_id}", now_ms, None)])
            else:
                self._update_line(attempt, state="submitted", task_id=task_id, submitted_ms=now_ms, **line_facts)
                self._unsaved_task_ids[attempt] = task_id
            acceptances.append(Acceptance.CONFLICT if is_conflict else Acceptance.NEW)
        return acceptances

    def mark_in_doubt(self, updates: Sequence[InDoubtUpdate]) -> None:
        """Record attempts that may have been charged."""
        for attempt, error, now_ms, task_id in updates:
            self._update_line(attempt, state="in_doubt", error=error, settled_ms=now_ms)
            if task_id is not None and not self._is_of_another_request(attempt, task_id):
                self._update_line(attempt, task_id=task_id)
                self._unsaved_task_ids[attempt] = task_id

    def _is_of_another_request(self, attempt: int, task_id: str) -> bool:
        """Return whether a POST about another request has this task id. The rows of a bulk task are one POST."""
        known = [line for line in self._lines.values() if line.task_id == task_id]
        with suppress(*_READ_ERRORS):
            known += _read_attempts(self.ledger, "a.task_id = ?", task_id)
        others = [line for line in known if line.attempt != attempt]
        if (own := self._find_line(attempt)) is None:
            return bool(others)
        return any(
            line.fingerprint != own.fingerprint and (own.bulk_task is None or line.bulk_task != own.bulk_task)
            for line in others
        )

    def record_refused(self, updates: Sequence[tuple[int, str, int]]) -> None:
        """Record that nothing was accepted, so that these attempts do not become unconfirmed."""
        for attempt, error, now_ms in updates:
            self._update_line(attempt, state="refused", error=error, settled_ms=now_ms)

    def release_unsent(self, attempt_ids: AbstractSet[int], now_ms: int) -> None:
        """Record that these attempts were not sent."""
        self.record_refused([(attempt, "not sent: the run ended", now_ms) for attempt in sorted(attempt_ids)])

    def record_rejected(self, updates: Sequence[tuple[int, str, int]]) -> None:
        """Record that the API refused the params."""
        for attempt, error, now_ms in updates:
            self._update_line(attempt, state="failed", error=error, settled_ms=now_ms, credits=0)

    def mark_acknowledged(self, attempt_ids: Sequence[int]) -> None:
        """Record that the API has acknowledged the tasks."""
        for attempt in attempt_ids:
            if attempt in self._lines:
                self._lines[attempt] = self._lines[attempt].model_copy(update={"acknowledged": True})

    def settle(self, answers: Sequence[tuple[int, Answer, int]], _execution: int, _max_attempts: int) -> list[State]:
        """Record answers."""
        for attempt, answer, now_ms in answers:
            self._record_answer(attempt, answer, answer.credits, now_ms)
        return [answer.state for _, answer, _ in answers]

    def settle_bulk_task(
        self, answers: Sequence[tuple[int, Answer, int]], _execution: int, _max_attempts: int, credits_: int | None
    ) -> list[State]:
        """Record the answers of a bulk task. Its price is stored with the first."""
        for bulk_index, (attempt, answer, now_ms) in enumerate(answers):
            self._record_answer(attempt, answer, credits_ if credits_ is None or not bulk_index else 0, now_ms)
        return [answer.state for _, answer, _ in answers]

    def _record_answer(self, attempt: int, answer: Answer, credits_: int | None, now_ms: int) -> None:
        if not answer.free_failure:  # the task of a free failure is polled again, and its request sent again then
            fields = {
                "state": answer.state.value,
                "error": answer.error,
                "provider": answer.provider,
                "credits": credits_,
            }
            self._update_line(attempt, **fields, answer=answer.raw, settled_ms=now_ms)

    def _find_line(self, attempt: int) -> RescuedAttempt | None:
        """Return the line of an attempt. None: the ledger cannot be read."""
        if attempt not in self._lines:
            with suppress(*_READ_ERRORS):
                self._lines |= {line.attempt: line for line in _read_attempts(self.ledger, "a.id = ?", attempt)}
        return self._lines.get(attempt)

    def _update_line(self, attempt: int, **changes: Any) -> None:  # noqa: ANN401 - fields of a line
        if (line := self._find_line(attempt)) is not None:
            self._lines[attempt] = line.model_copy(update=changes)
            self._changed.add(attempt)

    def flush(self) -> None:
        """Write what changed. Answers may be long, so they are written at the end."""
        self._write_changed(settled=False)

    def _write_changed(self, *, settled: bool) -> None:
        """Write the changed lines that are settled, or those that are not."""
        changed = [self._lines[attempt] for attempt in sorted(self._changed)]
        lines = [line for line in changed if (line.state in SETTLED_STATES) == settled]
        if self.file.append(lines):
            for line in lines:
                self._changed.discard(line.attempt)
                self._unsaved_task_ids.pop(line.attempt, None)

    def close(self) -> LedgerFailed:
        """Write the answers. Return the failure, with the path of the rescue file in its message."""
        self.flush()
        self._write_changed(settled=True)
        if self.database_missing:
            with suppress(*_READ_ERRORS):
                answered = _read_attempts(self.ledger, _ANSWERED)
                rest = (line for line in answered if line.attempt not in self._lines)
                while (lines := list(islice(rest, _LINES_PER_WRITE))) and self.file.append(lines):
                    pass
        self.file.close()
        message, hint = self.failure.message, self.failure.hint
        if self.file.path is not None:
            message += f"; what was paid for is kept in {self.file.path}"
            hint = f"{hint}; it imports {self.file.path.name}"
        if self._unsaved_task_ids:
            fingerprints = {attempt: line.fingerprint for attempt, line in self._lines.items()}
            lost = ", ".join(
                f"{task} (request {fingerprints.get(attempt, '?')})" for attempt, task in self._unsaved_task_ids.items()
            )
            message += f"; these tasks could be written nowhere, so keep their ids: {lost}"
        return type(self.failure)(message, hint)


def _read_attempts(db: Database, condition: str, *values: object) -> Iterator[RescuedAttempt]:
    """Yield the attempts that fulfil an SQL condition, as lines of a rescue file."""
    facts = dict(db.execute("SELECT name, value FROM facts WHERE name IN ('api_host', 'workspace')").fetchall())
    rows = db.rows(
        f"SELECT {_COLUMNS} FROM attempts a JOIN requests r ON r.id = a.request_id JOIN calls c ON c.id = r.call_id "
        "JOIN executions e ON e.id = a.execution_id LEFT JOIN bulk_tasks b ON b.id = a.bulk_task_id "
        f"WHERE {condition} ORDER BY a.id",
        *values,
    )
    for row in rows:
        values_by_field = dict(row) | facts
        values_by_field |= {"fingerprint": row["fingerprint"].hex(), "paths": read_paths(row["paths"], row["step"])}
        yield RescuedAttempt(ledger=str(db.location), **values_by_field | {"acknowledged": bool(row["acknowledged"])})


#: The operations of a run that are recorded when the ledger cannot be written, each with its replacement.
REPLACEMENTS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    transitions.record_accepted: RescueRecorder.record_accepted,
    transitions.mark_in_doubt: RescueRecorder.mark_in_doubt,
    transitions.record_refused: RescueRecorder.record_refused,
    transitions.release_unsent: RescueRecorder.release_unsent,
    transitions.record_rejected: RescueRecorder.record_rejected,
    transitions.mark_acknowledged: RescueRecorder.mark_acknowledged,
    transitions.settle: RescueRecorder.settle,
    transitions.settle_bulk_task: RescueRecorder.settle_bulk_task,
    transitions.has_task: lambda *_: True,  # without the ledger, no task counts as unknown
    # The next run polls these tasks again.
    resume.save_unusable_answer: lambda *_: None,
    resume.mark_result_deleted: lambda *_: None,
}

"""Takes the moves of a ledger that cannot be written, and keeps what was paid for in a rescue file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

from enrich.errors import LedgerFailed
from enrich.model import Acceptance, Answer, State
from enrich.store.dialect import FAILURES
from enrich.store.moves import Doubt
from enrich.store.rescue import SETTLED, Rescue
from enrich.store.rescue_file import Paid, RescueFile

#: Lines that are written at a time.
_AT_ONCE = 1000
#: What reading a database that is broken may raise.
_UNREADABLE = (*FAILURES, ValueError, TypeError)


@dataclass(slots=True)
class UnwrittenMoves:
    """The moves that could not be written. A move that would begin something new fails with `failure`."""

    #: The methods of the ledger that it has, too.
    MOVES: ClassVar = frozenset(
        {
            "accepted",
            "doubt",
            "refused",
            "rejected",
            "alive",
            "settle",
            "settle_bundle",
            "has_task",
            "keep_unread",
            "mark_gone",
        }
    )

    ledger: Rescue
    file: RescueFile
    failure: LedgerFailed
    #: Nothing that is in the open database is at the ledger's path any more.
    gone: bool
    _lines: dict[int, Paid] = field(default_factory=dict)
    _changed: set[int] = field(default_factory=set)
    #: Task ids that could be written nowhere.
    _lost: dict[int, str | None] = field(default_factory=dict)

    def begin(self) -> None:
        """Keep what is at the API when the whole ledger is gone."""
        if self.gone:
            with suppress(*_UNREADABLE):
                self._lines = {line.attempt: line for line in self.ledger.open_attempts()}
                self._changed = set(self._lines)
        self.flush()

    def accepted(self, told: Sequence[tuple[int, str, int]], bound_to: Mapping[str, str | None]) -> list[Acceptance]:
        """Keep task ids; they are compared with others when they are taken in."""
        for attempt, task_id, now_ms in told:
            facts = {name: value for name, value in bound_to.items() if value is not None}
            self._change(attempt, state="submitted", task_id=task_id, submitted_ms=now_ms, **facts)
            if attempt not in self._lines:
                self._lost[attempt] = task_id
        return [Acceptance.NEW] * len(told)

    def doubt(self, told: Sequence[Doubt]) -> None:
        """Keep what may or may not have been charged."""
        for attempt, error, now_ms, task_id in told:
            self._change(attempt, state="in_doubt", error=error, settled_ms=now_ms)
            if task_id is not None:
                self._change(attempt, task_id=task_id)

    def refused(self, told: Sequence[tuple[int, str, int]]) -> None:
        """Keep that nothing was accepted, so that it does not become a doubt."""
        for attempt, error, now_ms in told:
            self._change(attempt, state="refused", error=error, settled_ms=now_ms)

    def rejected(self, told: Sequence[tuple[int, str, int]]) -> None:
        """Keep that the API refused the params."""
        for attempt, error, now_ms in told:
            self._change(attempt, state="failed", error=error, settled_ms=now_ms, credits=0)

    def alive(self, attempts: Sequence[int]) -> None:
        """Keep that the API knows the tasks."""
        for attempt in attempts:
            if attempt in self._lines:
                self._lines[attempt] = self._lines[attempt].model_copy(update={"seen_alive": True})

    def has_task(self, _task_id: str) -> bool:
        """Answer without the ledger: no task is taken for unknown."""
        return True

    def keep_unread(self, _attempts: Sequence[int], _reason: str, _raw: str | None) -> None:
        """Keep nothing: the task is asked for again by the next run."""

    def mark_gone(self, _attempts: Sequence[int]) -> None:
        """Keep nothing: the next run asks once more."""

    def settle(self, told: Sequence[tuple[int, Answer, int]], _execution: int, _max_attempts: int) -> list[State]:
        """Keep answers."""
        for attempt, answer, now_ms in told:
            self._answer(attempt, answer, answer.credits, now_ms)
        return [answer.state for _, answer, _ in told]

    def settle_bundle(
        self, told: Sequence[tuple[int, Answer, int]], _execution: int, _max_attempts: int, credits_: int | None
    ) -> list[State]:
        """Keep the answers of a task of many; its price stands with the first."""
        for place, (attempt, answer, now_ms) in enumerate(told):
            self._answer(attempt, answer, credits_ if credits_ is None or not place else 0, now_ms)
        return [answer.state for _, answer, _ in told]

    def _answer(self, attempt: int, answer: Answer, credits_: int | None, now_ms: int) -> None:
        if not answer.free_failure:  # the task is asked for again, and is sent again then
            told = {
                "state": answer.state.value,
                "error": answer.error,
                "provider": answer.provider,
                "credits": credits_,
            }
            self._change(attempt, **told, answer=answer.raw, settled_ms=now_ms)

    def _change(self, attempt: int, **changes: Any) -> None:  # noqa: ANN401 - fields of a line
        if attempt not in self._lines:
            with suppress(*_UNREADABLE):
                self._lines |= {line.attempt: line for line in self.ledger.paid([attempt])}
        if attempt in self._lines:
            self._lines[attempt] = self._lines[attempt].model_copy(update=changes)
            self._changed.add(attempt)

    def flush(self) -> None:
        """Write down what changed; answers, which may be long, come at the end."""
        short = [line for line in self._waiting() if line.state not in SETTLED]
        if self.file.append(short):
            self._changed.difference_update(line.attempt for line in short)

    def _waiting(self) -> list[Paid]:
        return [self._lines[attempt] for attempt in sorted(self._changed)]

    def close(self) -> LedgerFailed:
        """Write down the answers; return the failure with the place of all this."""
        self.flush()
        self._lost |= {line.attempt: line.task_id for line in self._waiting() if line.state == "submitted"}
        self.file.append(line for line in self._waiting() if line.state in SETTLED)
        if self.gone:
            with suppress(*_UNREADABLE):
                rest = (line for line in self.ledger.answered_attempts() if line.attempt not in self._lines)
                while (lines := list(islice(rest, _AT_ONCE))) and self.file.append(lines):
                    pass
        self.file.close()
        message, hint = self.failure.message, self.failure.hint
        if self.file.path is not None:
            message += f"; what was paid for is kept in {self.file.path}"
            hint = f"{hint}; it takes in {self.file.path.name}"
        if self._lost:
            names = {attempt: line.fingerprint for attempt, line in self._lines.items()}
            lost = ", ".join(f"{task} (request {names.get(attempt, '?')})" for attempt, task in self._lost.items())
            message += f"; these tasks could be written nowhere, so keep their ids: {lost}"
        return type(self.failure)(message, hint)

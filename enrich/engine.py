"""What an execution asks of machines that carry its steps: all of it is done by one process where there are none."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from enrich.asking import Batch
from enrich.collector import Counted
from enrich.job import Job
from enrich.model import Decision, Wish
from enrich.place import Place
from enrich.question import Question
from enrich.rows import Rows
from enrich.worker import Errand, Told, Word


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What was read: rows, how many of them ask something, and why the others don't."""

    rows: int = 0
    asked: int = 0
    of_rows: Counter[Decision] = field(default_factory=Counter)

    @classmethod
    def of(cls, batch: Batch) -> Enrolled:
        """Tell what was read of one batch."""
        asked = sum(fingerprint is not None for fingerprint in batch.fingerprints)
        left_out = Counter(Decision(status.value) for status in batch.statuses if status is not None)
        return cls(batch.frame.height, asked, left_out)

    def __add__(self, other: Enrolled) -> Enrolled:
        """Add up what was read of several blocks."""
        return Enrolled(self.rows + other.rows, self.asked + other.asked, self.of_rows + other.of_rows)


@dataclass(frozen=True, slots=True)
class Boss:
    """Whoever has a step carried: `check` is called often and may raise to give up, `tell` hears what to tell a person.

    When it is `late`, what is at work may come to its end, but nobody is waited for who would have to begin.
    """

    check: Callable[[], None] = lambda: None
    tell: Callable[[str], object] = lambda _: None
    late: Callable[[], bool] = lambda: False


class Hand(Protocol):
    """One worker, seen from the run that started it."""

    @property
    def told(self) -> Told:
        """Its last report."""

    @property
    def gone(self) -> asyncio.Event:
        """Set when it has ended; there is no report after that."""

    @property
    def listening(self) -> bool:
        """Whether it has its errand, and takes words."""

    @property
    def why(self) -> str:
        """Why it ended before its work was done."""

    def say(self, word: Word) -> None:
        """Tell it how to go on, if it is still there."""

    async def end(self) -> None:
        """End it, if it is still there."""


class Engine(Protocol):
    """Machines that carry the three steps, over a ledger that all of them reach."""

    @property
    def workers(self) -> int:
        """How many workers send and poll."""

    def hire(self, errand: Errand, heard: Callable[[Hand], None]) -> Hand:
        """Start a worker; `heard` is called at each of its reports, and when it has ended."""

    def led_by(self, owner: int) -> Engine:
        """Do the same for an execution, until the lease of the process that leads it ends."""

    def enroll(self, job: Job, rows: Rows, question: Question, wish: Wish, boss: Boss) -> Enrolled:
        """Enroll all rows in a pass that was begun."""

    def collect(  # noqa: PLR0913, PLR0917 - all of them travel
        self, job: Job, rows: Rows, question: Question, wish: Wish, target: Place, boss: Boss
    ) -> Counted:
        """Write the output, a dataset."""

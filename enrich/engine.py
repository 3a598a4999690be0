"""What an execution asks of machines that carry its steps: all of it is done by one process where there are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from enrich.asking import Batch
from enrich.collector import Counted
from enrich.crew import Carrier
from enrich.job import Job
from enrich.model import Decision, Wish
from enrich.place import Place
from enrich.question import Question
from enrich.rows import Rows


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What was read: rows, how many of them ask something, why the others don't, and doubts that were given up."""

    rows: int = 0
    asked: int = 0
    of_rows: Counter[Decision] = field(default_factory=Counter)
    given_up: int = 0

    @classmethod
    def of(cls, batch: Batch, given_up: int) -> Enrolled:
        """Tell what was read of one batch."""
        asked = sum(fingerprint is not None for fingerprint in batch.fingerprints)
        left_out = Counter(Decision(status.value) for status in batch.statuses if status is not None)
        return cls(batch.frame.height, asked, left_out, given_up)

    def __add__(self, other: Enrolled) -> Enrolled:
        """Add up what was read of several blocks."""
        return Enrolled(
            self.rows + other.rows,
            self.asked + other.asked,
            self.of_rows + other.of_rows,
            self.given_up + other.given_up,
        )


class Engine(Protocol):
    """Machines that carry the three steps, over a ledger that all of them reach."""

    @property
    def workers(self) -> int:
        """How many workers send and poll."""

    @property
    def carrier(self) -> Carrier:
        """Where they come from."""

    def led_by(self, owner: int) -> Engine:
        """Do the same for an execution, until the lease of the process that leads it ends."""

    def enroll(  # noqa: PLR0913 - all of them travel
        self,
        job: Job,
        rows: Rows,
        question: Question,
        wish: Wish,
        *,
        accept_doubts: bool,
        check: Callable[[], None],
    ) -> Enrolled:
        """Enroll all rows in a pass that was begun; `check` may raise to give up."""

    def collect(  # noqa: PLR0913, PLR0917 - likewise
        self, job: Job, rows: Rows, question: Question, wish: Wish, target: Place, check: Callable[[], None]
    ) -> Counted:
        """Write the output, a dataset."""

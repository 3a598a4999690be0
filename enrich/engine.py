"""What an execution asks of machines that carry its steps: all of it is done by one process where there are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from enrich.collector import Counted
from enrich.crew import Carrier
from enrich.job import Job
from enrich.model import Decision, Wish
from enrich.place import Place
from enrich.question import Question
from enrich.rows import Rows


class Read(Protocol):
    """What was read of the input: rows, how many of them ask something, why the others don't, doubts given up."""

    @property
    def rows(self) -> int: ...  # noqa: D102 - told above
    @property
    def asked(self) -> int: ...  # noqa: D102
    @property
    def of_rows(self) -> Counter[Decision]: ...  # noqa: D102
    @property
    def given_up(self) -> int: ...  # noqa: D102


class Engine(Protocol):
    """Machines that carry the three steps, over a ledger that all of them reach."""

    @property
    def workers(self) -> int:
        """How many workers send and poll."""

    @property
    def carrier(self) -> Carrier:
        """Where they come from."""

    def enroll(
        self, rows: Rows, question: Question, wish: Wish, *, accept_doubts: bool, check: Callable[[], None]
    ) -> Read:
        """Enroll all rows in a pass that was begun; `check` may raise to give up."""

    def collect(
        self, job: Job, rows: Rows, question: Question, wish: Wish, target: Place, check: Callable[[], None]
    ) -> Counted:
        """Write the output, a dataset."""

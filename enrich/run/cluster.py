"""What an execution asks of machines that carry its steps: all of it is done by one process where there are none."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from enrich.cluster.worker import WorkerCommand, WorkerStatus, WorkerTask
from enrich.job.job import Job
from enrich.job.locations import Location
from enrich.models import Decision, RequestSelection
from enrich.rows.reader import JobInput
from enrich.rows.requests import RowBatch
from enrich.rows.template import RequestTemplate
from enrich.run.collector import OutputCounts


@dataclass(frozen=True, slots=True)
class EnrollCounts:
    """What was read: rows, how many of them ask something, and why the others don't."""

    rows: int = 0
    requests: int = 0
    row_decisions: Counter[Decision] = field(default_factory=Counter)

    @classmethod
    def from_batch(cls, batch: RowBatch) -> EnrollCounts:
        """Tell what was read of one batch."""
        requests = sum(fingerprint is not None for fingerprint in batch.fingerprints)
        row_decisions = Counter(Decision(status.value) for status in batch.statuses if status is not None)
        return cls(batch.frame.height, requests, row_decisions)

    def __add__(self, other: EnrollCounts) -> EnrollCounts:
        """Add up what was read of several blocks."""
        return EnrollCounts(
            self.rows + other.rows, self.requests + other.requests, self.row_decisions + other.row_decisions
        )


@dataclass(frozen=True, slots=True)
class ClusterCallbacks:
    """Whoever has a step carried: `check` is called often and may raise to give up, `tell` hears what to tell a person.

    When it is `late`, what is at work may come to its end, but nobody is waited for who would have to begin.
    """

    raise_if_stopped: Callable[[], None] = lambda: None
    on_message: Callable[[str], object] = lambda _: None
    is_aborting: Callable[[], bool] = lambda: False


class WorkerHandle(Protocol):
    """One worker, seen from the run that started it."""

    @property
    def status(self) -> WorkerStatus:
        """Its last report."""

    @property
    def gone(self) -> asyncio.Event:
        """Set when it has ended; there is no report after that."""

    @property
    def is_ready(self) -> bool:
        """Whether it has its errand, and takes words."""

    @property
    def exit_reason(self) -> str:
        """Why it ended before its work was done."""

    def send(self, word: WorkerCommand) -> None:
        """Tell it how to go on, if it is still there."""

    async def end(self) -> None:
        """End it, if it is still there."""


class ClusterEngine(Protocol):
    """Machines that carry the three steps, over a ledger that all of them reach."""

    @property
    def workers(self) -> int:
        """How many workers send and poll."""

    def start_worker(self, worker_task: WorkerTask, on_status: Callable[[WorkerHandle], None]) -> WorkerHandle:
        """Start a worker; `heard` is called at each of its reports, and when it has ended."""

    def for_leader(self, owner_id: int) -> ClusterEngine:
        """Do the same for an execution, until the lease of the process that leads it ends."""

    def enroll(
        self,
        job: Job,
        job_input: JobInput,
        template: RequestTemplate,
        selection: RequestSelection,
        callbacks: ClusterCallbacks,
    ) -> EnrollCounts:
        """Enroll all rows in a pass that was begun."""

    def collect(  # noqa: PLR0913, PLR0917 - all of them travel
        self,
        job: Job,
        job_input: JobInput,
        template: RequestTemplate,
        selection: RequestSelection,
        target: Location,
        callbacks: ClusterCallbacks,
    ) -> OutputCounts:
        """Write the output, a dataset."""

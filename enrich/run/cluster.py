"""Protocol: what a cluster does for a run. Without a cluster, one process does all of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from enrich.cluster.worker import WorkerCommand, WorkerStatus, WorkerTask
from enrich.job.job import Job
from enrich.job.locations import Location
from enrich.model import Decision, RequestSelection
from enrich.rows.reader import JobInput
from enrich.rows.requests import RowBatch
from enrich.rows.template import RequestTemplate
from enrich.run.collector import OutputCounts


@dataclass(frozen=True, slots=True)
class EnrollCounts:
    """What was read: rows, how many of them have a request, and why the others have none."""

    rows: int = 0
    requests: int = 0
    row_decisions: Counter[Decision] = field(default_factory=Counter)

    @classmethod
    def from_batch(cls, batch: RowBatch) -> EnrollCounts:
        """Count the rows of one batch."""
        requests = sum(fingerprint is not None for fingerprint in batch.fingerprints)
        row_decisions = Counter(Decision(status.value) for status in batch.statuses if status is not None)
        return cls(batch.frame.height, requests, row_decisions)

    def __add__(self, other: EnrollCounts) -> EnrollCounts:
        """Add the counts of several blocks."""
        return EnrollCounts(
            self.rows + other.rows, self.requests + other.requests, self.row_decisions + other.row_decisions
        )


@dataclass(frozen=True, slots=True)
class ClusterCallbacks:
    """Callbacks of a run for a phase that a cluster does.

    `raise_if_stopped` is called often and may raise to stop the phase. `on_message` gets messages for the user. When
    `is_aborting` returns true, running work may finish, but work that has not begun is not waited for.
    """

    raise_if_stopped: Callable[[], None] = lambda: None
    on_message: Callable[[str], object] = lambda _: None
    is_aborting: Callable[[], bool] = lambda: False


class WorkerHandle(Protocol):
    """One worker, as seen from the run that started it."""

    @property
    def status(self) -> WorkerStatus:
        """Its last report."""

    @property
    def gone(self) -> asyncio.Event:
        """Set when it has ended; there is no report after that."""

    @property
    def is_ready(self) -> bool:
        """Whether it has its task and accepts commands."""

    @property
    def exit_reason(self) -> str:
        """Why it ended before its work was done."""

    def send(self, word: WorkerCommand) -> None:
        """Send it a command, if it is still running."""

    async def end(self) -> None:
        """End it, if it is still running."""


class ClusterEngine(Protocol):
    """Machines that do the three phases, over a ledger that all of them reach."""

    @property
    def workers(self) -> int:
        """How many workers submit and poll."""

    def start_worker(self, worker_task: WorkerTask, on_status: Callable[[WorkerHandle], None]) -> WorkerHandle:
        """Start a worker. `on_status` is called at each of its reports, and when it has ended."""

    def for_leader(self, owner_id: int) -> ClusterEngine:
        """Return an engine for one run, which works until the lease of the process that leads the run ends."""

    def enroll(
        self,
        job: Job,
        job_input: JobInput,
        template: RequestTemplate,
        selection: RequestSelection,
        callbacks: ClusterCallbacks,
    ) -> EnrollCounts:
        """Enroll all rows in a pass that was begun before."""

    def collect(  # noqa: PLR0913, PLR0917 - every argument is sent to the workers
        self,
        job: Job,
        job_input: JobInput,
        template: RequestTemplate,
        selection: RequestSelection,
        target: Location,
        callbacks: ClusterCallbacks,
    ) -> OutputCounts:
        """Write the output, which is a dataset."""

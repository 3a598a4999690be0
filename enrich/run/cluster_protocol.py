"""Protocol: what a cluster does for a run. Without a cluster, one process does all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from enrich.databar.credentials import ApiAccess
from enrich.job.locations import Location
from enrich.models import RequestSelection
from enrich.rows.job_input import JobInput
from enrich.rows.requests import RowCounts
from enrich.rows.template import RequestTemplate
from enrich.run.collector import OutputCounts
from enrich.run.run_state import RunState, WorkConfig


class ClusterCallbacks(Struct, frozen=True):
    """Callbacks of a run for a phase that a cluster does.

    `raise_if_stopped` is called often and may raise to stop the phase. `on_message` gets messages for the user. When
    `is_aborting` returns true, running work may finish, but work that has not begun is not waited for.
    """

    raise_if_stopped: Callable[[], None] = lambda: None
    on_message: Callable[[str], object] = lambda _: None
    is_aborting: Callable[[], bool] = lambda: False

    @classmethod
    def for_run(cls, run_state: RunState, raise_if_stopped: Callable[[], None]) -> ClusterCallbacks:
        """Return the callbacks for a phase in another thread. Call this in the event loop."""
        loop = asyncio.get_running_loop()
        return cls(
            raise_if_stopped, lambda text: loop.call_soon_threadsafe(run_state.add_note, text), run_state.abort.is_set
        )


class WorkerPool(Protocol):
    """Workers that submit and poll as one run."""

    @property
    def lost_reasons(self) -> Sequence[str]:
        """Why workers ended before their work was done."""

    async def run(self) -> None:
        """Submit and poll to the end. No worker is left when this returns."""

    def finish_early(self) -> None:
        """Poll each open task once more, now."""


class ClusterEngine(Protocol):
    """Machines that do the three phases, over a ledger that all of them reach."""

    def make_worker_pool(
        self, run_state: RunState, work_config: WorkConfig, access: ApiAccess, requests: int
    ) -> WorkerPool | None:
        """Make the workers for `requests` requests. None: no workers are needed."""

    def for_leader(self, lease_id: int) -> ClusterEngine:
        """Return an engine for one run, which works until the lease of the process that leads the run ends."""

    def enroll(
        self, job_input: JobInput, template: RequestTemplate, selection: RequestSelection, callbacks: ClusterCallbacks
    ) -> RowCounts:
        """Enroll all rows in a pass that was begun before."""

    def collect(
        self,
        job_input: JobInput,
        template: RequestTemplate,
        selection: RequestSelection,
        target: Location,
        callbacks: ClusterCallbacks,
    ) -> OutputCounts:
        """Write the output, which is a dataset."""

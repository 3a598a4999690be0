"""Ray as the engine of an execution: its actors send and poll, its datasets read the input and write the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from enrich.cluster.actors import ActorHandle, start_actor
from enrich.cluster.blocks import SharedPass
from enrich.cluster.collect import collect_on_ray
from enrich.cluster.enroll import enroll_on_ray
from enrich.cluster.presence import HeartbeatMonitor, Heartbeats, new_heartbeat_counter
from enrich.job.job import Job
from enrich.job.locations import Location, PostgresLocation
from enrich.ledger.dialect import OUTAGE_TIMEOUT_S
from enrich.ledger.ledger import Ledger
from enrich.ledger.postgres import FencingToken
from enrich.model import RequestSelection
from enrich.rows.reader import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.cluster import ClusterCallbacks, EnrollCounts, WorkerHandle
from enrich.run.collector import OutputCounts
from enrich.worker import WorkerTask


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A cluster that we are connected to; see `enrich.run.cluster.Engine`."""

    ledger: PostgresLocation
    workers: int
    #: The lease of the process that leads the execution; a block that comes after its end changes nothing.
    owner_id: int | None = None
    heartbeat_counter: Any = field(default_factory=new_heartbeat_counter)

    def start_worker(self, worker_task: WorkerTask, on_status: Callable[[WorkerHandle], None]) -> WorkerHandle:
        """Start a worker."""
        return ActorHandle(start_actor(), worker_task, on_status)

    def for_leader(self, owner_id: int) -> RayCluster:
        """Do the same for an execution, until the lease of the process that leads it ends."""
        return replace(self, owner_id=owner_id)

    def enroll(
        self,
        job: Job,
        job_input: JobInput,
        template: RequestTemplate,
        selection: RequestSelection,
        callbacks: ClusterCallbacks,
    ) -> EnrollCounts:
        """Enroll all rows in a pass that was begun."""
        return enroll_on_ray(job_input, self._shared_pass(job, template, selection), self._monitor(callbacks))

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
        return collect_on_ray(job_input, self._shared_pass(job, template, selection), target, self._monitor(callbacks))

    def _monitor(self, callbacks: ClusterCallbacks) -> HeartbeatMonitor:
        return HeartbeatMonitor(Heartbeats(self.heartbeat_counter), callbacks)

    def _shared_pass(self, job: Job, template: RequestTemplate, selection: RequestSelection) -> SharedPass:
        fence = None if self.owner_id is None else FencingToken(self.owner_id, self.ledger.lease_s)
        return SharedPass(
            job, template, selection, partial(Ledger, self.ledger, fencing_token=fence, open_timeout_s=OUTAGE_TIMEOUT_S)
        )

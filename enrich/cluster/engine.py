"""Runs the phases of a run on Ray: actors submit and poll, tasks enroll the input and collect the output."""

from __future__ import annotations

from functools import partial
from typing import Any

import polars as pl
from msgspec import Struct, field
from msgspec.structs import replace
from ray import cloudpickle

from enrich.cluster.blocks import SharedPass, map_blocks, split_input
from enrich.cluster.heartbeats import HeartbeatMonitor, Heartbeats, new_heartbeat_counter
from enrich.cluster.worker import WorkerTask
from enrich.cluster.workers import WorkerPool
from enrich.databar.credentials import ApiAccess
from enrich.errors import CommandRefused
from enrich.files.parquet_dataset import DatasetWriter, PartFile, begin_dataset
from enrich.job.locations import Location, PostgresLocation
from enrich.ledger import enroll
from enrich.ledger.database import Database
from enrich.ledger.dialect import OUTAGE_TIMEOUT_S
from enrich.ledger.postgres import FencingToken
from enrich.models import RequestSelection
from enrich.rows.batches import RowBatch, RowCounts
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.collector import Collector, OutputCounts, output_schema
from enrich.run.context import ClusterCallbacks
from enrich.run.dispatcher import max_posts_in_flight
from enrich.run.run_state import RunState, WorkConfig


def enroll_on_ray(job_input: JobInput, shared_pass: SharedPass, monitor: HeartbeatMonitor) -> RowCounts:
    """Enroll all rows in a pass that the caller has begun; the caller selects which of them are sent.

    Requests must not depend on other rows (`why_not_parallel`). Raises what `monitor` raises, CommandRefused when the
    input cannot be read, LedgerFailed, LeaseLost, ClusterFailed.
    """
    parts = split_input(job_input, monitor)
    total = RowCounts()
    for some in map_blocks(job_input, parts, partial(_enroll, shared_pass), monitor):
        total += some
    if total.rows != (expected := sum(part.rows for part in parts)):
        raise CommandRefused(
            f"{total.rows:,} rows were read, not {expected:,}", "run again when the files are complete"
        )
    return total


def _enroll(shared_pass: SharedPass, block: JobInput) -> RowCounts:
    """Enroll the rows of a block. Idempotent."""
    total = RowCounts()
    for batch in block.batches(shared_pass.template):

        def enroll_batch(ledger: Database, batch: RowBatch = batch) -> None:
            # One commit per batch: requests are locked in their order, so that no two processes wait for each other.
            with ledger.transaction():
                enroll.enroll(ledger, shared_pass.template.target, batch.requests(), shared_pass.selection)

        shared_pass.with_ledger(enroll_batch)
        total += RowCounts.from_batch(batch)
    return total


def collect_on_ray(
    job_input: JobInput, shared_pass: SharedPass, target: Location, monitor: HeartbeatMonitor
) -> OutputCounts:
    """Write the output, a Parquet dataset, from the input and the ledger. The rows must have been enrolled before.

    Raises what `monitor` raises, CommandRefused when the input cannot be read or the output cannot be written,
    LedgerFailed, ClusterFailed.
    """
    parts = split_input(job_input, monitor)
    schema = output_schema(job_input, shared_pass.template, with_index=True)
    draft = begin_dataset(target, job_input.job.temporary_name, schema)
    try:
        files: list[PartFile] = []
        total = OutputCounts()
        collect = partial(_collect, shared_pass, draft)
        for file, counted in map_blocks(job_input, parts, collect, monitor):
            files.append(file)
            total += counted
        if not files:
            files = [draft.write_part(0, [pl.DataFrame(schema=schema)])]
        if sum(file.rows for file in files) != sum(part.rows for part in parts):
            raise CommandRefused("rows of the output are missing", "run again when the files are complete")
        draft.finish(files)
    except BaseException:
        draft.discard()
        raise
    return total


def _collect(shared_pass: SharedPass, draft: DatasetWriter, block: JobInput) -> tuple[PartFile, OutputCounts]:
    """Write the output rows of a block to a file of the dataset. Idempotent."""

    def write(ledger: Database) -> tuple[PartFile, OutputCounts]:
        counted = OutputCounts()
        collector = Collector(ledger, shared_pass.template, block)
        return draft.write_part(block.first_position, collector.frames(counted, with_index=True)), counted

    return shared_pass.with_ledger(write)


class RayCluster(Struct, frozen=True):
    """A connected Ray cluster; see `enrich.run.context.ClusterEngine`."""

    ledger: PostgresLocation
    workers: int
    #: The lease of the process that leads the run. Nothing is written after its end.
    lease_id: int | None = None
    heartbeat_counter: Any = field(default_factory=new_heartbeat_counter)

    def make_worker_pool(
        self, run_state: RunState, work_config: WorkConfig, access: ApiAccess, requests: int
    ) -> WorkerPool | None:
        """Make actors for `requests` requests. None: no workers are needed."""
        in_flight_limit = run_state.in_flight_limit
        workers = min(self.workers, in_flight_limit.start, max_posts_in_flight(work_config.bulk), requests)
        if workers < 1:
            return None
        worker_task = WorkerTask(
            work_config,
            access,
            self.ledger,
            run_state.execution_id,
            run_state.timeouts,
            replace(in_flight_limit, workers=workers),
            run_state.rate_limiter.ceiling,
            run_state.poll_schedule,
            self.lease_id,
        )
        return WorkerPool(run_state, worker_task)

    def enroll(
        self, job_input: JobInput, template: RequestTemplate, selection: RequestSelection, callbacks: ClusterCallbacks
    ) -> RowCounts:
        """Enroll all rows."""
        return enroll_on_ray(job_input, self._shared_pass(template, selection), self._monitor(callbacks))

    def collect(
        self,
        job_input: JobInput,
        template: RequestTemplate,
        selection: RequestSelection,
        target: Location,
        callbacks: ClusterCallbacks,
    ) -> OutputCounts:
        """Write the output, a Parquet dataset."""
        return collect_on_ray(job_input, self._shared_pass(template, selection), target, self._monitor(callbacks))

    def _monitor(self, callbacks: ClusterCallbacks) -> HeartbeatMonitor:
        return HeartbeatMonitor(Heartbeats(self.heartbeat_counter), callbacks)

    def _shared_pass(self, template: RequestTemplate, selection: RequestSelection) -> SharedPass:
        fence = None if self.lease_id is None else FencingToken(self.lease_id, self.ledger.lease_s)
        open_ledger = partial(Database, self.ledger, fencing_token=fence, open_timeout_s=OUTAGE_TIMEOUT_S)
        return SharedPass(template, selection, cloudpickle.dumps(open_ledger))

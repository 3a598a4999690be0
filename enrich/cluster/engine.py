"""Runs the phases of a run on Ray: actors submit and poll; tasks enroll the input and collect the output in blocks."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import ray
from msgspec import Struct, field
from msgspec.structs import replace
from ray import cloudpickle
from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError

from enrich.cluster.heartbeats import CHECK_EVERY_S, RUN_AGAIN_HINT, HeartbeatMonitor, Heartbeats, new_heartbeat_counter
from enrich.cluster.worker import WorkerTask
from enrich.cluster.worker_pool import WorkerPool
from enrich.databar.environment import ApiAccess
from enrich.errors import ClusterFailed, CommandRefused, EnrichError, LedgerFailed
from enrich.files.input_files import InputFile, LocalCopies
from enrich.files.parquet_dataset import DatasetWriter, PartFile, begin_dataset
from enrich.files.reader import ROWS_PER_PART, InputPart, InputSchema, count_file_rows, read_part
from enrich.job.locations import Location, ObjectUrl, PostgresLocation
from enrich.ledger import enroll
from enrich.ledger.database import Database
from enrich.ledger.dialect import DATABASE_ERRORS, OUTAGE_TIMEOUT_S, FencingToken
from enrich.models import RequestSelection, pluralize
from enrich.rows.batches import RowBatch, RowCounts
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.collector import Collector, OutputCounts, output_schema
from enrich.run.context import ClusterCallbacks
from enrich.run.dispatcher import max_posts_in_flight
from enrich.run.run_state import RunState, WorkConfig

#: Small files are grouped up to ROWS_PER_PART rows. An object is downloaded as a whole, so up to this many of its rows
#: are read by one task.
ROWS_OF_AN_OBJECT = 1_000_000
#: A block has at least this many bytes, unless it is the last one of a group. A task holds one at a time.
BLOCK_BYTES = 32 << 20
#: How often Ray starts a task again whose process or machine was lost. See also `RAY_ENVIRONMENT`.
MAX_RETRIES = 3

ReadGroup = tuple[InputPart, ...]
T = TypeVar("T")
U = TypeVar("U")


class SharedPass(Struct, frozen=True):
    """What the tasks of the cluster are sent for a pass over the input.

    `open_ledger` is the pickled function that opens the ledger, once in each process.
    """

    template: RequestTemplate
    selection: RequestSelection
    open_ledger: bytes

    def with_ledger(self, act: Callable[[Database], T]) -> T:
        """Call a function with the ledger. Retry it after a lost connection or a conflict with another process.

        Raises LedgerFailed, and what `act` raises.
        """
        ledger = _cached_ledger(self.open_ledger)
        try:
            return ledger.retry_on_disconnect(lambda: act(ledger))
        except DATABASE_ERRORS as failure:
            _cached_ledger.cache_clear()
            ledger.close()
            raise LedgerFailed(f"the ledger cannot be used: {failure}", RUN_AGAIN_HINT) from failure


@lru_cache(maxsize=1)
def _cached_ledger(packed: bytes) -> Database:
    """Open the ledger once per process, for all its blocks."""
    open_ledger: Callable[[], Database] = cloudpickle.loads(packed)
    return open_ledger()


def split_input(job_input: JobInput, monitor: HeartbeatMonitor) -> list[InputPart]:
    """Split the input into parts. The cluster counts rows of files that must be read to do so. Raises EnrichError."""

    def count_files(files: Sequence[InputFile]) -> list[int]:
        counts = dict(_run_tasks(partial(_count_rows, job_input.full_table.input_schema), files, monitor))
        return [counts[number] for number in range(len(files))]

    return job_input.full_table.parts(count_files)


def _count_rows(input_schema: InputSchema, file: InputFile) -> int:
    return count_file_rows(file, input_schema, LocalCopies())


def map_blocks(
    job_input: JobInput, parts: Sequence[InputPart], work: Callable[[JobInput], T], monitor: HeartbeatMonitor
) -> Iterator[T]:
    """Run a function on every block, a JobInput with some of the rows, and yield the results, in any order.

    A block may be processed again when a machine is lost. Raises what `work` and `monitor` raise, and ClusterFailed.
    """
    process = partial(_process_group, job_input.without_rows(), job_input.full_table.input_schema, work)
    for _, results in _run_tasks(process, group_parts(parts), monitor):
        yield from results


def group_parts(parts: Iterable[InputPart]) -> list[ReadGroup]:
    """Group parts that one task reads one after the other."""
    groups: list[list[InputPart]] = []
    rows = 0
    for part in parts:
        same_object = bool(groups) and isinstance(part.file.location, ObjectUrl) and part.file == groups[-1][-1].file
        if groups and rows + part.rows <= (ROWS_OF_AN_OBJECT if same_object else ROWS_PER_PART):
            groups[-1].append(part)
            rows += part.rows
        else:
            groups.append([part])
            rows = part.rows
    return [tuple(each) for each in groups]


def _process_group(
    without_rows: JobInput, input_schema: InputSchema, work: Callable[[JobInput], T], group: ReadGroup
) -> list[T]:
    return [work(without_rows.for_frame(first, frame)) for first, frame in read_blocks(group, input_schema)]


def read_blocks(group: ReadGroup, input_schema: InputSchema) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield the rows of consecutive parts in blocks, each with the position of its first row."""
    copies, first, frames = LocalCopies(), group[0].first_position, list[pl.DataFrame]()
    for part in group:
        for frame in read_part(part, input_schema, copies):
            frames.append(frame)
            if sum(each.estimated_size() for each in frames) >= BLOCK_BYTES:
                yield first, pl.concat(frames)
                first += sum(each.height for each in frames)
                frames = []
    if any(frame.height for frame in frames):
        yield first, pl.concat(frames)


def _run_tasks(function: Callable[[T], U], inputs: Sequence[T], monitor: HeartbeatMonitor) -> Iterator[tuple[int, U]]:
    """Call a function with each of the inputs in the cluster. Yield number and result, in the order of completion.

    Unfinished tasks are killed when the caller stops iterating, and after an error. Raises what the function and
    `monitor` raise, and ClusterFailed.
    """
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")(_run_task)
    shared_function = ray.put(function)
    numbers = {task.remote(shared_function, item, monitor.heartbeats): number for number, item in enumerate(inputs)}
    waiting = list(numbers)
    try:
        while waiting:
            monitor.check()
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=CHECK_EVERY_S)
            if done:
                monitor.reset()
            for ref in done:
                result = ray.get(ref)
                if isinstance(result, EnrichError):
                    raise result
                yield numbers[ref], result
    except RayError as error:
        raise _cluster_error(error) from error
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)


def _run_task(function: Callable[[T], U], item: T, heartbeats: Heartbeats) -> U | EnrichError:
    """Run in the cluster. An error is returned: if it were raised, Ray would write it and its cells to its logs."""
    try:
        with heartbeats.sending():
            return function(item)
    except Exception as error:  # noqa: BLE001 - raised in the run's process
        return as_enrich_error(error)


def as_enrich_error(error: Exception) -> EnrichError:
    """Return unexpected errors as EnrichError with type and source line only: the message may hold cells."""
    if isinstance(error, EnrichError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
    return EnrichError(f"a task of the cluster failed: {type(error).__name__} at {where}", "this is a bug of enrich")


def _cluster_error(error: RayError) -> ClusterFailed:
    """Shorten Ray's error to one line."""
    if isinstance(error, WorkerCrashedError | OutOfMemoryError):
        return ClusterFailed(
            f"a task of the cluster was lost {1 + MAX_RETRIES} times: its process ended",
            "has each machine memory enough?",
        )
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return ClusterFailed(f"the cluster could not do its work: {type(error).__name__}: {reason[:200]}", RUN_AGAIN_HINT)


def enroll_on_ray(job_input: JobInput, shared_pass: SharedPass, monitor: HeartbeatMonitor) -> RowCounts:
    """Enroll all rows in a pass that the caller has begun; the caller selects which of them are sent.

    The input must be one that `can_be_enrolled_in_parts`. Raises what `monitor` raises, CommandRefused when the input
    cannot be read, LedgerFailed, LeaseLost, ClusterFailed.
    """
    parts = split_input(job_input, monitor)
    total = RowCounts()
    for some in map_blocks(job_input, parts, partial(_enroll, shared_pass), monitor):
        total += some
    if total.rows != (expected := sum(part.rows for part in parts)):
        raise CommandRefused(
            f"{pluralize(total.rows, 'row')} read, not {expected:,}", "run again when the files are complete"
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

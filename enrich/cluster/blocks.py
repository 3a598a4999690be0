"""Runs functions in tasks of the Ray cluster: over all rows of the input block by block, or over its files."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import polars as pl
import ray
from msgspec import Struct
from ray import cloudpickle
from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError

from enrich.cluster.heartbeats import CHECK_EVERY_S, RUN_AGAIN_HINT, HeartbeatMonitor, Heartbeats
from enrich.errors import ClusterFailed, EnrichError, LedgerFailed
from enrich.files.input_files import InputFile, LocalCopies
from enrich.files.reader import ROWS_PER_PART, InputPart, InputSchema, count_file_rows, read_part
from enrich.job.locations import ObjectUrl
from enrich.ledger.database import Database
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.models import RequestSelection
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate

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

"""Does some work on all rows of the input, block by block, wherever there is room in the cluster."""

from __future__ import annotations

import logging
import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar

import ray
from ray import cloudpickle

from enrich.cluster.presence import CHECK_EVERY_S, RUN_AGAIN_HINT, HeartbeatMonitor, Heartbeats
from enrich.cluster.source import ArrowTable, PartSource, as_enrich_error, from_block, single_cell_block
from enrich.errors import ClusterFailed, EnrichError, LedgerFailed
from enrich.files.discovery import InputFile
from enrich.files.downloads import LocalCopies
from enrich.files.reader import InputPart, InputSchema, count_file_rows
from enrich.files.text import as_refused
from enrich.job.job import Job
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.ledger import Ledger
from enrich.model import RequestSelection
from enrich.rows.reader import JobInput
from enrich.rows.template import RequestTemplate

T = TypeVar("T")

#: Blocks are cut when they have so many bytes: a task holds a few of them.
BLOCK_BYTES = 32 << 20
RESULT_COLUMN = "enrich:done"


@dataclass(frozen=True, slots=True)
class SharedPass:
    """A pass over the input in which others take part; all of it is sent to them.

    `opening` opens the ledger in a process, which keeps it for the blocks that follow.
    """

    job: Job
    template: RequestTemplate
    selection: RequestSelection
    open_ledger: Callable[[], Ledger]
    #: By these bytes a process knows it again.
    pickled_open_ledger: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "packed", cloudpickle.dumps(self.open_ledger))

    def with_ledger(self, act: Callable[[Ledger], T]) -> T:
        """Do something with the ledger, again when its server was away or others were in the way.

        Raises LedgerFailed, and what `act` raises.
        """
        ledger = _cached_ledger(self.pickled_open_ledger)
        while True:
            try:
                ledger.join_pass(self.selection)
                return act(ledger)
            except DATABASE_ERRORS as failure:
                if _reconnected(ledger, failure):
                    continue
                _cached_ledger.cache_clear()
                ledger.close()
                raise LedgerFailed(f"the ledger cannot be used: {failure}", RUN_AGAIN_HINT) from failure


def split_input(rows: JobInput, watch: HeartbeatMonitor) -> list[InputPart]:
    """Divide the input; files that have to be read to be counted are counted in the cluster. Raises EnrichError."""
    return rows.parts(partial(_count_in_cluster, rows.input_schema, watch))


def map_blocks(
    rows: JobInput, parts: Sequence[InputPart], work: Callable[[JobInput], T], watch: HeartbeatMonitor
) -> Iterator[T]:
    """Do some work on the rows of every block, and yield what comes of it, in any order.

    A block may be worked on again when a machine is lost. Raises what the work and the watch raise, and ClusterFailed.
    """
    _configure_ray_data()
    source = PartSource(parts, rows.input_schema, watch.heartbeats)
    work_on = partial(_process_block, sample=rows.without_rows(), work=work, presence=watch.heartbeats)
    for packed in _results(source, work_on, watch):
        done = pickle.loads(packed)  # noqa: S301 - of our own making
        if isinstance(done, EnrichError):
            raise done
        yield from done


@lru_cache(maxsize=1)
def _cached_ledger(packed: bytes) -> Ledger:
    """Open a ledger once in a process, which does many blocks."""
    opening: Callable[[], Ledger] = cloudpickle.loads(packed)
    return opening()


def _reconnected(ledger: Ledger, failure: BaseException) -> bool:
    """Wait for the ledger's server; tell whether it is back."""
    try:
        return ledger.reconnect(failure) is not None
    except DATABASE_ERRORS:
        return False


def _process_block(
    block: ArrowTable, *, sample: JobInput, work: Callable[[JobInput], T], presence: Heartbeats
) -> ArrowTable:
    """Work on a block; tell what came of it, or what went wrong."""
    done: list[T] | EnrichError
    try:
        with presence.sending():
            done = [work(sample.for_frame(first, frame)) for first, frame in from_block(block, sample.all_columns)]
    except Exception as error:  # noqa: BLE001 - it is raised where somebody listens
        done = as_enrich_error(error)
    return single_cell_block(RESULT_COLUMN, done)


def _dataset(source: PartSource, work_on: Callable[..., ArrowTable]) -> Any:  # noqa: ANN401 - Ray has no types that hold
    """Put both in one task, which holds a block or two: what was read need not travel."""
    blocks = max(1, len(source.groups))
    return ray.data.read_datasource(source, override_num_blocks=blocks, num_cpus=1).map_batches(
        work_on, batch_format="pyarrow", batch_size=None, zero_copy_batch=True, num_cpus=1
    )


def _results(source: PartSource, work_on: Callable[..., ArrowTable], watch: HeartbeatMonitor) -> Iterator[bytes]:
    """Yield what the tasks tell, and listen meanwhile to whoever wants to stop.

    Who stops does not wait: tasks that were begun before any told something end with Ray.
    """
    datasets: list[Any] = []
    found: queue.SimpleQueue[Sequence[bytes] | Exception] = queue.SimpleQueue()
    stopped = threading.Event()

    def run() -> None:
        try:
            datasets.append(dataset := _dataset(source, work_on))
            for batch in dataset.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0):
                if stopped.is_set():
                    return
                found.put(batch.column(RESULT_COLUMN).to_pylist())
            found.put(())
        except Exception as error:  # noqa: BLE001 - it is raised by who listens
            found.put(error)

    threading.Thread(target=run, name="cluster", daemon=True).start()
    try:
        while some := _next(found, watch):
            yield from some
    finally:
        stopped.set()
        for dataset in datasets:
            if executor := getattr(dataset, "_current_executor", None):
                executor.shutdown(force=True)


def _next(found: queue.SimpleQueue[Sequence[bytes] | Exception], watch: HeartbeatMonitor) -> Sequence[bytes]:
    while True:
        watch.check()
        with suppress(queue.Empty):
            some = found.get(timeout=CHECK_EVERY_S)
            watch.reset()
            if isinstance(some, Exception):
                raise _cluster_error(some) from some
            return some


def _cluster_error(error: Exception) -> EnrichError:
    """Tell what Ray says in a line."""
    if isinstance(error, EnrichError):
        return error
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return ClusterFailed(f"the cluster could not do its work: {type(error).__name__}: {said[:200]}", RUN_AGAIN_HINT)


def _count_in_cluster(shape: InputSchema, watch: HeartbeatMonitor, leaves: Sequence[InputFile]) -> list[int]:
    counting = ray.remote(num_cpus=1, max_retries=-1)(_count_rows)
    refs = waiting = [counting.remote(leaf, shape, watch.heartbeats) for leaf in leaves]
    counted: dict[Any, int] = {}
    try:
        while waiting:
            watch.check()
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=CHECK_EVERY_S)
            if done:
                watch.reset()
            for ref, rows in zip(done, ray.get(done), strict=True):
                if isinstance(rows, EnrichError):
                    raise rows
                counted[ref] = rows
    except ray.exceptions.RayError as error:
        raise _cluster_error(error) from error
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)
    return [counted[ref] for ref in refs]


def _count_rows(leaf: InputFile, shape: InputSchema, presence: Heartbeats) -> int | EnrichError:
    try:
        with presence.sending(on=str(leaf)), as_refused():
            return count_file_rows(leaf, shape, LocalCopies())
    except Exception as error:  # noqa: BLE001 - it is raised where somebody listens
        return as_enrich_error(error)


def _configure_ray_data() -> None:
    """Let Ray Data say nothing on the terminal, and leave the division of the input to us."""
    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    # The watch knows better.
    context.execution_no_progress_timeout_s = -1
    logger = logging.getLogger("ray.data")
    logger.handlers = [each for each in logger.handlers if not isinstance(each, logging.StreamHandler)]

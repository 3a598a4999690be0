"""Processes all rows of the input block by block on the Ray cluster."""

from __future__ import annotations

import logging
import pickle
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import ray
from ray import cloudpickle
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from enrich.cluster.presence import CHECK_EVERY_S, RUN_AGAIN_HINT, HeartbeatMonitor, Heartbeats
from enrich.errors import ClusterFailed, EnrichError, LedgerFailed
from enrich.files.discovery import InputFile
from enrich.files.downloads import LocalCopies
from enrich.files.reader import ROWS_PER_PART, InputPart, InputSchema, PartReader, count_file_rows
from enrich.files.text import as_refused
from enrich.job.job import Job
from enrich.job.locations import ObjectUrl
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.ledger import Ledger
from enrich.models import RequestSelection
from enrich.rows.reader import JobInput
from enrich.rows.template import RequestTemplate

#: The column of a block with the positions of its rows in the input.
POSITION_COLUMN = "enrich:place"
#: An error is sent as the only row of this column. If it were raised, Ray would write it and more to its logs.
ERROR_COLUMN = "enrich:failed"
#: Small files are grouped up to ROWS_PER_PART rows. An object is downloaded as a whole, so up to this many of its rows
#: are read by one task.
ROWS_OF_AN_OBJECT = 1_000_000

ReadGroup = tuple[InputPart, ...]
#: Arrow does not support these types, or not unchanged, so they are sent as text.
_AS_TEXT = (pl.Categorical, pl.Enum, pl.Int128, pl.UInt128)
#: The type of a block. Ray has no usable type hints.
ArrowTable = Any


class PartSource(Datasource):  # type: ignore[misc] # Ray has no usable type hints
    """The parts of an input as a Ray datasource."""

    def __init__(self, parts: Iterable[InputPart], shape: InputSchema, presence: Heartbeats) -> None:
        super().__init__()
        self.groups = group_parts(parts)
        self._shape = shape
        self._presence = presence

    def get_name(self) -> str:
        """Return the name that Ray uses in its logs."""
        return "Leads"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: Ray should not decide how the input is split."""
        return None

    def get_read_tasks(self, *_: object, **__: object) -> list[Any]:
        """Return a read task for each group of parts."""
        return [
            ReadTask(
                partial(read_group, parts, self._shape, self._presence),
                BlockMetadata(
                    num_rows=sum(part.rows for part in parts), size_bytes=None, input_files=None, exec_stats=None
                ),
            )
            for parts in self.groups
        ]


def group_parts(parts: Iterable[InputPart]) -> list[ReadGroup]:
    """Group parts that one task reads one after the other."""
    found: list[list[InputPart]] = []
    rows = 0
    for part in parts:
        same = bool(found) and isinstance(part.file.location, ObjectUrl) and part.file == found[-1][-1].file
        if found and rows + part.rows <= (ROWS_OF_AN_OBJECT if same else ROWS_PER_PART):
            found[-1].append(part)
            rows += part.rows
        else:
            found.append([part])
            rows = part.rows
    return [tuple(each) for each in found]


def read_group(group: ReadGroup, shape: InputSchema, presence: Heartbeats) -> Iterator[ArrowTable]:
    """Yield parts as blocks. An error becomes the last block."""
    copies = LocalCopies()
    try:
        with presence.sending(on=f"{group[0].file} from row {group[0].start_row + 1:,} on"):
            for part in group:
                first = part.first_position
                for frame in PartReader(part, shape, copies).batches():
                    yield to_block(first, frame)
                    first += frame.height
    except Exception as error:  # noqa: BLE001 - raised in the run's process
        yield error_block(error)


def to_block(first: int, frame: pl.DataFrame) -> ArrowTable:
    """Return the rows of a frame as a block. `first` is the position of the first row."""
    columns = [
        column.cast(pl.String) if isinstance(column.dtype, _AS_TEXT) else column for column in frame.get_columns()
    ]
    places = pl.int_range(first, first + frame.height, eager=True).alias(POSITION_COLUMN)
    return pl.DataFrame([places, *columns]).to_arrow(compat_level=pl.CompatLevel.oldest())


def from_block(block: ArrowTable, schema: Mapping[str, pl.DataType]) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield runs of consecutive rows, each with the position of its first. Raises the error that the block holds."""
    if ERROR_COLUMN in block.column_names:
        packed = next(cell for cell in block.column(ERROR_COLUMN).to_pylist() if cell is not None)
        raise pickle.loads(packed)  # noqa: S301 - pickled by enrich
    frame = pl.DataFrame(pl.from_arrow(block))
    places = frame.get_column(POSITION_COLUMN)
    begins = [0, *((places.diff() != 1).fill_null(value=False)).arg_true().to_list()]
    whole = pl.DataFrame([frame.get_column(name).cast(kind) for name, kind in schema.items()])
    for begin, end in zip(begins, [*begins[1:], len(places)], strict=True):
        if begin < end:
            yield int(places[begin]), whole[begin:end]


def error_block(error: Exception) -> ArrowTable:
    """Return a block that holds an error."""
    return single_cell_block(ERROR_COLUMN, as_enrich_error(error))


def single_cell_block(name: str, value: object) -> ArrowTable:
    """Return a block with a single cell, which holds any value."""
    return pl.DataFrame({name: [pickle.dumps(value)]}).to_arrow(compat_level=pl.CompatLevel.oldest())


def as_enrich_error(error: Exception) -> EnrichError:
    """Return unexpected errors as EnrichError with type and source line only: the message may hold cells."""
    if isinstance(error, EnrichError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
    return EnrichError(f"a task of the cluster failed: {type(error).__name__} at {where}", "this is a bug of enrich")


T = TypeVar("T")

#: Blocks are split at this many bytes, because a task holds several of them in memory.
BLOCK_BYTES = 32 << 20
RESULT_COLUMN = "enrich:done"


@dataclass(frozen=True, slots=True)
class SharedPass:
    """A pass over the input that tasks of the cluster join. All of it is sent to them.

    `open_ledger` opens the ledger in a process, which keeps it for the following blocks.
    """

    job: Job
    template: RequestTemplate
    selection: RequestSelection
    open_ledger: Callable[[], Ledger]
    #: `open_ledger` as bytes, the key of a process's open ledger.
    pickled_open_ledger: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pickled_open_ledger", cloudpickle.dumps(self.open_ledger))

    def with_ledger(self, act: Callable[[Ledger], T]) -> T:
        """Call a function with the ledger. Retry it after a lost connection or a conflict with another process.

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
    """Split the input into parts. The cluster counts rows of files that must be read to do so. Raises EnrichError."""
    return rows.parts(partial(_count_in_cluster, rows.input_schema, watch))


def map_blocks(
    rows: JobInput, parts: Sequence[InputPart], work: Callable[[JobInput], T], watch: HeartbeatMonitor
) -> Iterator[T]:
    """Run a function on the rows of every block and yield the results, in any order.

    A block may be processed again when a machine is lost. Raises what `work` and `watch` raise, and ClusterFailed.
    """
    _configure_ray_data()
    source = PartSource(parts, rows.input_schema, watch.heartbeats)
    work_on = partial(_process_block, sample=rows.without_rows(), work=work, presence=watch.heartbeats)
    for packed in _results(source, work_on, watch):
        done = pickle.loads(packed)  # noqa: S301 - pickled by enrich
        if isinstance(done, EnrichError):
            raise done
        yield from done


@lru_cache(maxsize=1)
def _cached_ledger(packed: bytes) -> Ledger:
    """Open the ledger once per process, which processes many blocks."""
    opening: Callable[[], Ledger] = cloudpickle.loads(packed)
    return opening()


def _reconnected(ledger: Ledger, failure: BaseException) -> bool:
    """Wait for the ledger's server; return whether it is back."""
    try:
        return ledger.reconnect(failure) is not None
    except DATABASE_ERRORS:
        return False


def _process_block(
    block: ArrowTable, *, sample: JobInput, work: Callable[[JobInput], T], presence: Heartbeats
) -> ArrowTable:
    """Process a block; return a block with the results or the error."""
    done: list[T] | EnrichError
    try:
        with presence.sending():
            done = [work(sample.for_frame(first, frame)) for first, frame in from_block(block, sample.all_columns)]
    except Exception as error:  # noqa: BLE001 - raised in the run's process
        done = as_enrich_error(error)
    return single_cell_block(RESULT_COLUMN, done)


def _dataset(source: PartSource, work_on: Callable[..., ArrowTable]) -> Any:  # noqa: ANN401 - Ray has no usable type hints
    """Read and process in one task, so that blocks are not sent around. A task holds a block or two."""
    blocks = max(1, len(source.groups))
    return ray.data.read_datasource(source, override_num_blocks=blocks, num_cpus=1).map_batches(
        work_on, batch_format="pyarrow", batch_size=None, zero_copy_batch=True, num_cpus=1
    )


def _results(source: PartSource, work_on: Callable[..., ArrowTable], watch: HeartbeatMonitor) -> Iterator[bytes]:
    """Yield the tasks' results, and check for stop requests meanwhile.

    A stop does not wait: tasks that have started but not returned anything end with Ray.
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
        except Exception as error:  # noqa: BLE001 - raised by `_next`
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
    """Shorten Ray's error to one line."""
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
    except Exception as error:  # noqa: BLE001 - raised in the run's process
        return as_enrich_error(error)


def _configure_ray_data() -> None:
    """Keep Ray Data from printing to the terminal and from splitting the input itself."""
    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    # HeartbeatMonitor detects stalls more reliably.
    context.execution_no_progress_timeout_s = -1
    logger = logging.getLogger("ray.data")
    logger.handlers = [each for each in logger.handlers if not isinstance(each, logging.StreamHandler)]

"""Does some work on all rows of the input, block by block, wherever there is room in the cluster."""

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

#: The column of a block that has the places of its rows in the input.
POSITION_COLUMN = "enrich:place"
#: A failure travels as the only row of such a column: raised, Ray would write it and more into its logs.
ERROR_COLUMN = "enrich:failed"
#: Small files are read together up to so many rows; an object, which is fetched as a whole, is read on up to so many.
ROWS_OF_AN_OBJECT = 1_000_000

ReadGroup = tuple[InputPart, ...]
#: Arrow knows them not, or not as they are; as text they come through.
_AS_TEXT = (pl.Categorical, pl.Enum, pl.Int128, pl.UInt128)
#: As a block is; Ray has no types that hold.
ArrowTable = Any


class PartSource(Datasource):  # type: ignore[misc] # Ray has no types that hold
    """The parts of an input."""

    def __init__(self, parts: Iterable[InputPart], shape: InputSchema, presence: Heartbeats) -> None:
        super().__init__()
        self.groups = group_parts(parts)
        self._shape = shape
        self._presence = presence

    def get_name(self) -> str:
        """Say what Ray calls it in its logs."""
        return "Leads"

    def estimate_inmemory_data_size(self) -> int | None:
        """Say nothing: how the input is divided is not for Ray to decide."""
        return None

    def get_read_tasks(self, *_: object, **__: object) -> list[Any]:
        """Make a task for each errand."""
        return [
            ReadTask(
                partial(read_group, errand, self._shape, self._presence),
                BlockMetadata(
                    num_rows=sum(part.rows for part in errand), size_bytes=None, input_files=None, exec_stats=None
                ),
            )
            for errand in self.groups
        ]


def group_parts(parts: Iterable[InputPart]) -> list[ReadGroup]:
    """Put parts together that one task reads, one after the other."""
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
    """Read parts as blocks; what goes wrong is the last of them."""
    copies = LocalCopies()
    try:
        with presence.sending(on=f"{group[0].file} from row {group[0].start_row + 1:,} on"):
            for part in group:
                first = part.first_position
                for frame in PartReader(part, shape, copies).batches():
                    yield to_block(first, frame)
                    first += frame.height
    except Exception as error:  # noqa: BLE001 - it is raised where somebody listens
        yield error_block(error)


def to_block(first: int, frame: pl.DataFrame) -> ArrowTable:
    """Make a block of rows, the first of which has this place."""
    columns = [
        column.cast(pl.String) if isinstance(column.dtype, _AS_TEXT) else column for column in frame.get_columns()
    ]
    places = pl.int_range(first, first + frame.height, eager=True).alias(POSITION_COLUMN)
    return pl.DataFrame([places, *columns]).to_arrow(compat_level=pl.CompatLevel.oldest())


def from_block(block: ArrowTable, schema: Mapping[str, pl.DataType]) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield stretches of rows that follow one another, each with the place of its first. Raises what went wrong."""
    if ERROR_COLUMN in block.column_names:
        packed = next(cell for cell in block.column(ERROR_COLUMN).to_pylist() if cell is not None)
        raise pickle.loads(packed)  # noqa: S301 - of our own making
    frame = pl.DataFrame(pl.from_arrow(block))
    places = frame.get_column(POSITION_COLUMN)
    begins = [0, *((places.diff() != 1).fill_null(value=False)).arg_true().to_list()]
    whole = pl.DataFrame([frame.get_column(name).cast(kind) for name, kind in schema.items()])
    for begin, end in zip(begins, [*begins[1:], len(places)], strict=True):
        if begin < end:
            yield int(places[begin]), whole[begin:end]


def error_block(error: Exception) -> ArrowTable:
    """Write down what went wrong."""
    return single_cell_block(ERROR_COLUMN, as_enrich_error(error))


def single_cell_block(name: str, value: object) -> ArrowTable:
    """Make a block of a single cell, which holds any value."""
    return pl.DataFrame({name: [pickle.dumps(value)]}).to_arrow(compat_level=pl.CompatLevel.oldest())


def as_enrich_error(error: Exception) -> EnrichError:
    """Tell a failure that nobody foresaw by its place alone: its words may hold cells."""
    if isinstance(error, EnrichError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
    return EnrichError(f"a task of the cluster failed: {type(error).__name__} at {where}", "this is a bug of enrich")


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
        object.__setattr__(self, "pickled_open_ledger", cloudpickle.dumps(self.open_ledger))

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

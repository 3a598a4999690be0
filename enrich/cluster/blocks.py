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

from enrich.cluster.presence import AGAIN, LOOK_S, Presence, Watch
from enrich.cluster.source import ArrowTable, PartSource, from_block, one_cell, told
from enrich.errors import ClusterFailed, EnrichError, LedgerFailed
from enrich.job import Job
from enrich.model import Wish
from enrich.question import Question
from enrich.rows import Rows
from enrich.store.dialect import FAILURES
from enrich.store.ledger import Ledger
from enrich.tables.copies import Copies
from enrich.tables.finding import Leaf
from enrich.tables.parts import Part
from enrich.tables.reading import Shape, count
from enrich.tables.textfile import refusing

T = TypeVar("T")

#: Blocks are cut when they have so many bytes: a task holds a few of them.
BLOCK_BYTES = 32 << 20
DONE = "enrich:done"


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass over the input in which others take part; all of it is sent to them.

    `opening` opens the ledger in a process, which keeps it for the blocks that follow.
    """

    job: Job
    question: Question
    wish: Wish
    opening: Callable[[], Ledger]
    #: By these bytes a process knows it again.
    packed: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "packed", cloudpickle.dumps(self.opening))

    def with_ledger(self, act: Callable[[Ledger], T]) -> T:
        """Do something with the ledger, again when its server was away or others were in the way.

        Raises LedgerFailed, and what `act` raises.
        """
        ledger = _opened(self.packed)
        while True:
            try:
                ledger.join_pass(self.wish)
                return act(ledger)
            except FAILURES as failure:
                if _regained(ledger, failure):
                    continue
                _opened.cache_clear()
                ledger.close()
                raise LedgerFailed(f"the ledger cannot be used: {failure}", AGAIN) from failure


def divided(rows: Rows, watch: Watch) -> list[Part]:
    """Divide the input; files that have to be read to be counted are counted in the cluster. Raises EnrichError."""
    return rows.parts(partial(_counts, rows.shape, watch))


def on_blocks(rows: Rows, parts: Sequence[Part], work: Callable[[Rows], T], watch: Watch) -> Iterator[T]:
    """Do some work on the rows of every block, and yield what comes of it, in any order.

    A block may be worked on again when a machine is lost. Raises what the work and the watch raise, and ClusterFailed.
    """
    _quieten()
    source = PartSource(parts, rows.shape, watch.presence)
    work_on = partial(_work_on, sample=rows.sample(), work=work, presence=watch.presence)
    for packed in _heard(source, work_on, watch):
        done = pickle.loads(packed)  # noqa: S301 - of our own making
        if isinstance(done, EnrichError):
            raise done
        yield from done


@lru_cache(maxsize=1)
def _opened(packed: bytes) -> Ledger:
    """Open a ledger once in a process, which does many blocks."""
    opening: Callable[[], Ledger] = cloudpickle.loads(packed)
    return opening()


def _regained(ledger: Ledger, failure: BaseException) -> bool:
    """Wait for the ledger's server; tell whether it is back."""
    try:
        return ledger.regain(failure) is not None
    except FAILURES:
        return False


def _work_on(block: ArrowTable, *, sample: Rows, work: Callable[[Rows], T], presence: Presence) -> ArrowTable:
    """Work on a block; tell what came of it, or what went wrong."""
    done: list[T] | EnrichError
    try:
        with presence.at_work():
            done = [work(sample.block(first, frame)) for first, frame in from_block(block, sample.known)]
    except Exception as error:  # noqa: BLE001 - it is raised where somebody listens
        done = told(error)
    return one_cell(DONE, done)


def _dataset(source: PartSource, work_on: Callable[..., ArrowTable]) -> Any:  # noqa: ANN401 - Ray has no types that hold
    """Put both in one task, which holds a block or two: what was read need not travel."""
    blocks = max(1, len(source.errands))
    return ray.data.read_datasource(source, override_num_blocks=blocks, num_cpus=1).map_batches(
        work_on, batch_format="pyarrow", batch_size=None, zero_copy_batch=True, num_cpus=1
    )


def _heard(source: PartSource, work_on: Callable[..., ArrowTable], watch: Watch) -> Iterator[bytes]:
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
                found.put(batch.column(DONE).to_pylist())
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


def _next(found: queue.SimpleQueue[Sequence[bytes] | Exception], watch: Watch) -> Sequence[bytes]:
    while True:
        watch.look()
        with suppress(queue.Empty):
            some = found.get(timeout=LOOK_S)
            watch.hear()
            if isinstance(some, Exception):
                raise _failed(some) from some
            return some


def _failed(error: Exception) -> EnrichError:
    """Tell what Ray says in a line."""
    if isinstance(error, EnrichError):
        return error
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return ClusterFailed(f"the cluster could not do its work: {type(error).__name__}: {said[:200]}", AGAIN)


def _counts(shape: Shape, watch: Watch, leaves: Sequence[Leaf]) -> list[int]:
    counting = ray.remote(num_cpus=1, max_retries=-1)(_count_there)
    refs = waiting = [counting.remote(leaf, shape, watch.presence) for leaf in leaves]
    counted: dict[Any, int] = {}
    try:
        while waiting:
            watch.look()
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S)
            if done:
                watch.hear()
            for ref, rows in zip(done, ray.get(done), strict=True):
                if isinstance(rows, EnrichError):
                    raise rows
                counted[ref] = rows
    except ray.exceptions.RayError as error:
        raise _failed(error) from error
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)
    return [counted[ref] for ref in refs]


def _count_there(leaf: Leaf, shape: Shape, presence: Presence) -> int | EnrichError:
    try:
        with presence.at_work(on=str(leaf)), refusing():
            return count(leaf, shape, Copies())
    except Exception as error:  # noqa: BLE001 - it is raised where somebody listens
        return told(error)


def _quieten() -> None:
    """Let Ray Data say nothing on the terminal, and leave the division of the input to us."""
    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    # The watch knows better.
    context.execution_no_progress_timeout_s = -1
    logger = logging.getLogger("ray.data")
    logger.handlers = [each for each in logger.handlers if not isinstance(each, logging.StreamHandler)]

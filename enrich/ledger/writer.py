"""Runs the ledger's moves on one thread, as many to a commit as have come together (group commit).

A move's future is resolved only after its commit: who awaits it knows that it is on disk. When the ledger can't be
written any more, or is no longer at its path, what was paid for goes into a rescue file instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from enrich.errors import ExitCode, LeaseLost, LedgerFailed, LedgerMoved
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.ledger import Ledger
from enrich.ledger.rescue_file import RescueFile
from enrich.ledger.rescue_recorder import RescueRecorder
from enrich.ledger.sqlite import describe_write_error, is_busy_error, is_damage_error

P = ParamSpec("P")
T = TypeVar("T")
I = TypeVar("I")  # noqa: E741 - an item

#: How long the write lock of another program is waited for in a run, in seconds.
LOCK_TIMEOUT_S = 300.0
#: … when a signal or --max-time ends the run.
SHORT_LOCK_TIMEOUT_S = 2.0
#: … before the person is told.
ANNOUNCE_AFTER_S = 3.0


class _Operation(Generic[T]):
    """One move, and what came of it. `items`: what it tells, which others like it may tell in one with it."""

    __slots__ = ("args", "can_be_rescued", "error", "function", "future", "items", "kwargs", "result")

    def __init__(  # noqa: PLR0913 - all of them are needed once
        self,
        function: Callable[..., T],
        future: asyncio.Future[T],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
        items: Sequence[Any] | None = None,
        *,
        can_be_rescued: bool = False,
    ) -> None:
        self.function = function
        self.future = future
        self.args = args
        self.kwargs = kwargs or {}
        self.items = items
        #: Made with what keeps the moves when the ledger can't be written, instead of failing.
        self.can_be_rescued = can_be_rescued
        self.result: T | None = None
        self.error: BaseException | None = None

    def execute(self, ledger: object) -> None:
        self.result = self.function(ledger, *self.args, **self.kwargs)

    def execute_on_rescue(self, recorder: RescueRecorder) -> None:
        """Make the move where the ledger can't be written; one that begins something new fails."""
        self.error = None
        name = getattr(self.function, "__name__", "")
        if self.can_be_rescued:
            self.execute(recorder)
        elif name in RescueRecorder.OPERATIONS and self.function is getattr(Ledger, name):
            items = () if self.items is None else (self.items,)
            self.result = getattr(recorder, name)(*items, *self.args, **self.kwargs)
        else:
            self.error = recorder.failure

    def resolve(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)  # type: ignore[arg-type] # None only where T is


class LedgerWriter:
    """The door to the ledger while an execution is at work. Use as an async context manager."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        new_rescue_file: Callable[[], RescueFile] | None = None,
        lock_timeout_s: float = 0.0,
    ) -> None:
        """Write to a ledger.

        `rescue` makes the file for what can't be written; `lock_patience_s` is how long another program's write lock
        is waited for beyond what the database does.
        """
        self._ledger = ledger
        self._new_rescue_file = new_rescue_file
        self._lock_timeout_s = lock_timeout_s
        #: Called once in the event loop when the ledger can't be written any more; nothing new may be begun then.
        self.on_failure: Callable[[LedgerFailed], None] = lambda _: None
        #: Called once in the event loop when another program's lock is waited for.
        self.on_lock_wait: Callable[[str], None] = lambda _: None
        #: What was asked for in this round of the event loop; it goes to the thread in one piece.
        self._pending: list[_Operation[Any]] = []
        self._batches: queue.SimpleQueue[list[_Operation[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_thread, name="ledger", daemon=True)
        self._error: BaseException | None = None
        self._rescue_recorder: RescueRecorder | None = None
        self._rescue_file: RescueFile | None = None
        #: Since when the write lock is waited for, and since when nobody wants to wait for it any more.
        self._locked_since: float | None = None
        self._waits_shortened_since: float | None = None
        self._wait_announced = False
        #: Whether anything was accepted, and whether the ledger turned out to be damaged.
        self._has_accepted = False
        self._is_damaged = False

    async def __aenter__(self) -> LedgerWriter:
        self._loop = asyncio.get_running_loop()
        if self._new_rescue_file is not None:
            self._rescue_file = self._new_rescue_file()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._flush_pending()
        self.shorten_waits()
        self._ledger.shorten_waits()
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join)
        if self._rescue_recorder is not None:
            failure = self._rescue_recorder.close()
            if self._is_damaged and not (self._has_accepted or self._rescue_recorder.file.path):
                failure.exit_code = ExitCode.REFUSED
            raise failure
        if self._rescue_file is not None:
            self._rescue_file.close()

    def shorten_waits(self) -> None:
        """Wait only a few seconds more for the write lock of another program."""
        if self._waits_shortened_since is None:
            self._waits_shortened_since = time.monotonic()

    def submit(
        self, function: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Make one move; the future is done when it is durable, or carries what the move raised."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._enqueue(_Operation(function, future, args, kwargs))
        return future

    def submit_or_rescue(
        self, function: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Make one move, as `do`; when the ledger can't be written it is given what keeps the moves instead."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._enqueue(_Operation(function, future, args, kwargs, can_be_rescued=True))
        return future

    def submit_batch(
        self,
        function: Callable[Concatenate[Ledger, Sequence[I], P], T],
        items: Sequence[I],
        *args: P.args,
        **_: P.kwargs,
    ) -> asyncio.Future[T]:
        """Make a move that tells of several items, in one with those that come at the same time with equal `args`.

        What the move returns runs along its items, and so does each future's part of it; or it returns None.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        self._enqueue(_Operation(function, future, args, items=items))
        return future

    def _enqueue(self, operation: _Operation[Any]) -> None:
        if not self._pending:
            self._loop.call_soon(self._flush_pending)
        self._pending.append(operation)

    def _flush_pending(self) -> None:
        if self._pending:
            self._batches.put(self._pending)
            self._pending = []

    def _run_thread(self) -> None:
        last = False
        while not last:
            operations: list[_Operation[Any]] = []
            block = True
            while not last:
                try:
                    batch = self._batches.get(block=block)
                except queue.Empty:
                    break
                last = batch is None
                operations += batch or ()
                block = False
            if operations:
                self._commit(operations)
                self._loop.call_soon_threadsafe(_resolve, operations)

    def _commit(self, batch: list[_Operation[Any]]) -> None:
        """Commit the batch as one; after a commit that failed nothing is written into the ledger any more."""
        self._has_accepted = self._has_accepted or any(move.function is Ledger.record_accepted for move in batch)
        if self._error is None:
            try:
                self._commit_with_retries(batch)
            except BaseException as error:  # noqa: BLE001 - it is handed to who asked for the moves
                self._fail(error)
            else:
                return
        for operation in batch:
            if self._rescue_recorder is None:
                operation.error = self._error
            else:
                operation.execute_on_rescue(self._rescue_recorder)
        if self._rescue_recorder is not None:
            self._rescue_recorder.flush()

    def _fail(self, error: BaseException) -> None:
        """Write nothing into the ledger from now on; keep what was paid for, where there is a file for it."""
        if isinstance(error, (*DATABASE_ERRORS, UnicodeDecodeError)):
            self._is_damaged = is_damage_error(error)
            reason, hint = describe_write_error(error)
            error = LedgerFailed(f"{self._ledger.location}: the ledger {reason}", hint)
        self._error = error
        if isinstance(error, LedgerFailed) and not isinstance(error, LeaseLost):
            if self._rescue_file is not None:
                self._rescue_recorder = RescueRecorder(
                    self._ledger, self._rescue_file, error, isinstance(error, LedgerMoved) and error.database_missing
                )
                self._rescue_recorder.begin()
            self._loop.call_soon_threadsafe(self.on_failure, error)

    def _commit_with_retries(self, batch: list[_Operation[Any]]) -> None:
        """Commit the batch; when a server was away in the middle, find out whether it did, and do it again if not."""
        while True:
            try:
                self._commit_once(batch)
            except DATABASE_ERRORS as failure:
                if self._should_retry_lock(failure):
                    continue
                committed = self._ledger.reconnect(failure)
                if committed is None:
                    raise
                if not committed:
                    continue
            self._locked_since = None
            return

    def _should_retry_lock(self, failure: BaseException) -> bool:
        """Tell whether the lock of another program is worth another try; say once that it is waited for."""
        if not is_busy_error(failure):
            return False
        now = time.monotonic()
        self._locked_since = now if self._locked_since is None else self._locked_since
        deadlines = [self._locked_since + self._lock_timeout_s]
        if self._waits_shortened_since is not None:
            deadlines.append(max(self._locked_since, self._waits_shortened_since) + SHORT_LOCK_TIMEOUT_S)
        if not self._wait_announced and now - self._locked_since >= ANNOUNCE_AFTER_S and now < min(deadlines):
            self._wait_announced = True
            text = f"{self._ledger.location}: another program has locked the ledger: waiting up to "
            self._loop.call_soon_threadsafe(
                self.on_lock_wait, f"{text}{self._lock_timeout_s:.0f} s; nothing new is sent"
            )
        return now < min(deadlines)

    def _commit_once(self, batch: list[_Operation[Any]]) -> None:
        groups = _group_batchable(batch)
        for operation in batch:
            operation.error = None
        # What is alone in its transaction needs no other bounds.
        savepoint = self._ledger.savepoint if len(groups) > 1 else contextlib.nullcontext
        with self._ledger.transaction():
            # Behind the write lock: a run that begins on another lock file comes before all this, or after it.
            self._ledger.check_files()
            for operations in groups:
                try:
                    with savepoint():
                        _execute_group(operations, self._ledger)
                except (*DATABASE_ERRORS, UnicodeDecodeError, LeaseLost, LedgerMoved):
                    raise
                except Exception as error:  # noqa: BLE001 - it is handed to who asked for the move
                    for operation in operations:
                        operation.error = error
                    if len(groups) == 1:
                        self._ledger.rollback()
        # What was written into a file that is no longer there is not durable.
        self._ledger.check_files()


def _group_batchable(batch: list[_Operation[Any]]) -> list[list[_Operation[Any]]]:
    """Put moves that can be made in one together; otherwise the order stays."""
    groups: list[list[_Operation[Any]]] = []
    for operation in batch:
        matching = (
            group
            for group in groups
            if operation.items is not None
            and group[0].items is not None
            and (group[0].function, group[0].args) == (operation.function, operation.args)
        )
        if (group := next(matching, None)) is None:
            groups.append([operation])
        else:
            group.append(operation)
    return groups


def _execute_group(operations: list[_Operation[Any]], ledger: Ledger) -> None:
    first = operations[0]
    if first.items is None:
        first.execute(ledger)
        return
    results = first.function(ledger, [item for move in operations for item in move.items or ()], *first.args)
    start = 0
    for operation in operations:
        end = start + len(operation.items or ())
        operation.result = None if results is None else results[start:end]
        start = end


def _resolve(batch: list[_Operation[Any]]) -> None:
    for operation in batch:
        operation.resolve()

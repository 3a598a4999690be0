"""Runs ledger operations on one thread and commits all that are waiting at once (group commit).

The future of an operation is resolved after its commit, so its result is on disk. When the ledger can no longer be
written, or is no longer at its path, paid results go to a rescue file instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from enrich.errors import LeaseLost, LedgerFailed, LedgerMoved
from enrich.exit_codes import ExitCode
from enrich.ledger import transitions
from enrich.ledger.database import Database
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.rescue_file import RescueFile
from enrich.ledger.rescue_recorder import REPLACEMENTS, RescueRecorder
from enrich.ledger.sqlite_errors import describe_write_error, is_busy_error, is_damage_error, is_disk_error

P = ParamSpec("P")
T = TypeVar("T")
I = TypeVar("I")  # noqa: E741 - an item

#: How long a run waits for another program's write lock of a SQLite file, beyond SQLite's own wait, in seconds.
LOCK_TIMEOUT_S = 300.0
#: The same after a signal or --max-time, in seconds.
SHORT_LOCK_TIMEOUT_S = 2.0
#: After how many seconds the wait is reported to the user.
ANNOUNCE_AFTER_S = 3.0
#: Operations that record a request which may have been charged.
_AFTER_A_POST = (transitions.record_accepted, transitions.mark_in_doubt)


@dataclass(slots=True, eq=False)
class _Operation(Generic[T]):
    """One operation and its result. `items` can be merged with those of equal operations into one call."""

    function: Callable[..., T]
    future: asyncio.Future[T]
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    items: Sequence[Any] | None = None
    result: T | None = None
    error: BaseException | None = None

    def execute_on_rescue(self, recorder: RescueRecorder) -> None:
        """Run the operation without the ledger. Operations that start something new fail."""
        self.error = None
        if (replacement := REPLACEMENTS.get(self.function)) is None:
            self.error = recorder.failure
        else:
            items = () if self.items is None else (self.items,)
            self.result = replacement(recorder, *items, *self.args, **self.kwargs)


class _OperationFailed(Exception):
    """An operation raised the cause. Its transaction is rolled back."""


class LedgerWriter:
    """Writes to the ledger during a run. Use it as an async context manager."""

    def __init__(self, ledger: Database, new_rescue_file: Callable[[], RescueFile] | None = None) -> None:
        """Write to a ledger. `new_rescue_file` creates the file for data that cannot be written to it."""
        self._ledger = ledger
        self._new_rescue_file = new_rescue_file
        #: Called once in the event loop when the ledger can no longer be written. Nothing new may be started then.
        self.on_failure: Callable[[LedgerFailed], None] = lambda _: None
        #: Called once in the event loop when the writer waits for another program's lock.
        self.on_lock_wait: Callable[[str], None] = lambda _: None
        #: Operations of this round of the event loop. They go to the thread together.
        self._pending: list[_Operation[Any]] = []
        self._batches: queue.SimpleQueue[list[_Operation[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_thread, name="ledger", daemon=True)
        self._error: BaseException | None = None
        self._rescue_recorder: RescueRecorder | None = None
        self._rescue_file: RescueFile | None = None
        #: When the wait for the write lock began, and when waits were shortened (monotonic, seconds). None: not so far.
        self._locked_since: float | None = None
        self._waits_shortened_at: float | None = None
        self._wait_announced = False
        #: Whether any request may have been accepted, and whether the ledger is damaged, or the disk full or faulty.
        self._may_have_spent = False
        self._is_unusable = False

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
            if self._is_unusable and not (self._may_have_spent or self._rescue_recorder.file.path):
                failure.exit_code = ExitCode.REFUSED
            raise failure
        if self._rescue_file is not None:
            self._rescue_file.close()

    def check_rescue_space(self) -> None:
        """Raise CommandRefused when the rescue file has no space. Check before the first POST of a run."""
        if self._rescue_file is not None:
            self._rescue_file.check_space()

    def shorten_waits(self) -> None:
        """Wait only a few more seconds for the write lock of another program."""
        if self._waits_shortened_at is None:
            self._waits_shortened_at = time.monotonic()

    def submit(
        self, function: Callable[Concatenate[Database, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Run one operation. The future is done when it is durable, or holds the exception that it raised."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._enqueue(_Operation(function, future, args, kwargs))
        return future

    def submit_batch(
        self,
        function: Callable[Concatenate[Database, Sequence[I], P], T],
        items: Sequence[I],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> asyncio.Future[T]:
        """Run an operation on several items, merged with operations of the same time that have equal arguments.

        The operation returns one result per item or None. Each future gets its part of the results.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        self._enqueue(_Operation(function, future, args, kwargs, items))
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
        is_last = False
        while not is_last:
            batches = [self._batches.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batches.append(self._batches.get_nowait())
            is_last = None in batches
            if operations := [operation for batch in batches for operation in batch or ()]:
                self._commit(operations)
                self._loop.call_soon_threadsafe(_resolve, operations)

    def _commit(self, batch: list[_Operation[Any]]) -> None:
        """Commit the batch in one transaction. After a failed commit nothing is written to the ledger any more."""
        self._may_have_spent = self._may_have_spent or any(each.function in _AFTER_A_POST for each in batch)
        if self._error is None:
            try:
                self._commit_with_retries(batch)
            except BaseException as error:  # noqa: BLE001 - passed on to the futures
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
        """Stop writing to the ledger, and record paid results in the rescue file if there is one."""
        if isinstance(error, (*DATABASE_ERRORS, UnicodeDecodeError)):
            self._is_unusable = is_damage_error(error) or is_disk_error(error)
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
        """Commit the batch. After a lost connection find out whether it was committed, and if not, run it again."""
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
        """Return whether another program's lock is worth a retry. Report the wait once."""
        if not is_busy_error(failure):
            return False
        now = time.monotonic()
        self._locked_since = now if self._locked_since is None else self._locked_since
        deadlines = [self._locked_since + LOCK_TIMEOUT_S]
        if self._waits_shortened_at is not None:
            deadlines.append(max(self._locked_since, self._waits_shortened_at) + SHORT_LOCK_TIMEOUT_S)
        if not self._wait_announced and now - self._locked_since >= ANNOUNCE_AFTER_S and now < min(deadlines):
            self._wait_announced = True
            text = f"{self._ledger.location}: another program has locked the ledger: waiting up to "
            self._loop.call_soon_threadsafe(self.on_lock_wait, f"{text}{LOCK_TIMEOUT_S:.0f} s; nothing new is sent")
        return now < min(deadlines)

    def _commit_once(self, batch: list[_Operation[Any]]) -> None:
        groups = _group_batchable(batch)
        try:
            self._execute_and_commit(groups, contextlib.nullcontext)
        except _OperationFailed as failed:
            if len(groups) == 1:
                for operation in batch:
                    operation.error = failed.__cause__
            else:
                # Savepoints are statements of their own, so they are used only where an operation does fail.
                self._execute_and_commit(groups, self._ledger.savepoint)

    def _execute_and_commit(
        self, groups: list[list[_Operation[Any]]], savepoint: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        """Run all operations in one transaction. Without savepoints, raises _OperationFailed for the first failure."""
        with self._ledger.transaction():
            # Check with the write lock held: a run that uses another lock file comes before or after this transaction.
            self._ledger.check_files()
            for operations in groups:
                for operation in operations:
                    operation.error = None
                try:
                    with savepoint():
                        _execute_group(operations, self._ledger)
                except (*DATABASE_ERRORS, UnicodeDecodeError, LeaseLost, LedgerMoved):
                    raise
                except Exception as error:
                    if savepoint is contextlib.nullcontext:
                        raise _OperationFailed from error
                    for operation in operations:
                        operation.error = error
        # Data written to a file that is no longer at its path is not durable.
        self._ledger.check_files()


def _group_batchable(batch: list[_Operation[Any]]) -> list[list[_Operation[Any]]]:
    """Group operations that can be merged into one call. Otherwise the order stays."""
    groups: list[list[_Operation[Any]]] = []
    for operation in batch:
        matching = (
            group
            for group in groups
            if operation.items is not None
            and group[0].items is not None
            and (group[0].function, group[0].args, group[0].kwargs)
            == (operation.function, operation.args, operation.kwargs)
        )
        if (group := next(matching, None)) is None:
            groups.append([operation])
        else:
            group.append(operation)
    return groups


def _execute_group(operations: list[_Operation[Any]], ledger: Database) -> None:
    first = operations[0]
    items = () if first.items is None else ([item for each in operations for item in each.items or ()],)
    results = first.function(ledger, *items, *first.args, **first.kwargs)
    if first.items is None:
        first.result = results
        return
    start = 0
    for operation in operations:
        end = start + len(operation.items or ())
        operation.result = None if results is None else results[start:end]
        start = end


def _resolve(batch: list[_Operation[Any]]) -> None:
    for operation in batch:
        if operation.future.done():
            continue
        if operation.error is not None:
            operation.future.set_exception(operation.error)
        else:
            operation.future.set_result(operation.result)

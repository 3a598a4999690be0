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

from enrich.errors import Exit, LeaseLost, LedgerFailed, LedgerMoved
from enrich.store.dialect import FAILURES
from enrich.store.ledger import Ledger
from enrich.store.rescue_file import RescueFile
from enrich.store.sqlite import is_locked, tells_of_damage, unwritable
from enrich.store.unwritten import UnwrittenMoves

P = ParamSpec("P")
T = TypeVar("T")
I = TypeVar("I")  # noqa: E741 - an item

#: How long the write lock of another program is waited for in a run, in seconds.
LOCKED_S = 300.0
#: … when a signal or --max-time ends the run.
HURRIED_S = 2.0
#: … before the person is told.
ANNOUNCED_S = 3.0


class _Move(Generic[T]):
    """One move, and what came of it. `items`: what it tells, which others like it may tell in one with it."""

    __slots__ = ("args", "error", "future", "items", "kept", "kwargs", "result", "run")

    def __init__(  # noqa: PLR0913 - all of them are needed once
        self,
        run: Callable[..., T],
        future: asyncio.Future[T],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
        items: Sequence[Any] | None = None,
        *,
        kept: bool = False,
    ) -> None:
        self.run = run
        self.future = future
        self.args = args
        self.kwargs = kwargs or {}
        self.items = items
        #: Made with what keeps the moves when the ledger can't be written, instead of failing.
        self.kept = kept
        self.result: T | None = None
        self.error: BaseException | None = None

    def make(self, ledger: object) -> None:
        self.result = self.run(ledger, *self.args, **self.kwargs)

    def keep(self, kept: UnwrittenMoves) -> None:
        """Make the move where the ledger can't be written; one that begins something new fails."""
        self.error = None
        name = getattr(self.run, "__name__", "")
        if self.kept:
            self.make(kept)
        elif name in UnwrittenMoves.MOVES and self.run is getattr(Ledger, name):
            items = () if self.items is None else (self.items,)
            self.result = getattr(kept, name)(*items, *self.args, **self.kwargs)
        else:
            self.error = kept.failure

    def resolve(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)  # type: ignore[arg-type] # None only where T is


class Journal:
    """The door to the ledger while an execution is at work. Use as an async context manager."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        rescue: Callable[[], RescueFile] | None = None,
        lock_patience_s: float = 0.0,
    ) -> None:
        """Write to a ledger.

        `rescue` makes the file for what can't be written; `lock_patience_s` is how long another program's write lock
        is waited for beyond what the database does.
        """
        self._ledger = ledger
        self._rescue = rescue
        self._lock_patience_s = lock_patience_s
        #: Called once in the event loop when the ledger can't be written any more; nothing new may be begun then.
        self.on_failure: Callable[[LedgerFailed], None] = lambda _: None
        #: Called once in the event loop when another program's lock is waited for.
        self.on_wait: Callable[[str], None] = lambda _: None
        #: What was asked for in this round of the event loop; it goes to the thread in one piece.
        self._asked: list[_Move[Any]] = []
        self._batches: queue.SimpleQueue[list[_Move[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._broken: BaseException | None = None
        self._kept: UnwrittenMoves | None = None
        self._file: RescueFile | None = None
        #: Since when the write lock is waited for, and since when nobody wants to wait for it any more.
        self._locked_since: float | None = None
        self._hurried_since: float | None = None
        self._waits = False
        #: Whether anything was accepted, and whether the ledger turned out to be damaged.
        self._sent = False
        self._damaged = False

    async def __aenter__(self) -> Journal:
        self._loop = asyncio.get_running_loop()
        if self._rescue is not None:
            self._file = self._rescue()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._hand_over()
        self.hurry()
        self._ledger.hurry()
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join)
        if self._kept is not None:
            failure = self._kept.close()
            if self._damaged and not (self._sent or self._kept.file.path):
                failure.exit_code = Exit.REFUSED
            raise failure
        if self._file is not None:
            self._file.close()

    def hurry(self) -> None:
        """Wait only a few seconds more for the write lock of another program."""
        if self._hurried_since is None:
            self._hurried_since = time.monotonic()

    def do(self, move: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Make one move; the future is done when it is durable, or carries what the move raised."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._ask(_Move(move, future, args, kwargs))
        return future

    def do_or_keep(
        self, move: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Make one move, as `do`; when the ledger can't be written it is given what keeps the moves instead."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._ask(_Move(move, future, args, kwargs, kept=True))
        return future

    def together(
        self, move: Callable[Concatenate[Ledger, Sequence[I], P], T], items: Sequence[I], *args: P.args, **_: P.kwargs
    ) -> asyncio.Future[T]:
        """Make a move that tells of several items, in one with those that come at the same time with equal `args`.

        What the move returns runs along its items, and so does each future's part of it; or it returns None.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        self._ask(_Move(move, future, args, items=items))
        return future

    def _ask(self, move: _Move[Any]) -> None:
        if not self._asked:
            self._loop.call_soon(self._hand_over)
        self._asked.append(move)

    def _hand_over(self) -> None:
        if self._asked:
            self._batches.put(self._asked)
            self._asked = []

    def _work(self) -> None:
        last = False
        while not last:
            moves: list[_Move[Any]] = []
            block = True
            while not last:
                try:
                    batch = self._batches.get(block=block)
                except queue.Empty:
                    break
                last = batch is None
                moves += batch or ()
                block = False
            if moves:
                self._commit(moves)
                self._loop.call_soon_threadsafe(_resolve, moves)

    def _commit(self, batch: list[_Move[Any]]) -> None:
        """Commit the batch as one; after a commit that failed nothing is written into the ledger any more."""
        self._sent = self._sent or any(move.run is Ledger.accepted for move in batch)
        if self._broken is None:
            try:
                self._commit_patiently(batch)
            except BaseException as error:  # noqa: BLE001 - it is handed to who asked for the moves
                self._fail(error)
            else:
                return
        for move in batch:
            if self._kept is None:
                move.error = self._broken
            else:
                move.keep(self._kept)
        if self._kept is not None:
            self._kept.flush()

    def _fail(self, error: BaseException) -> None:
        """Write nothing into the ledger from now on; keep what was paid for, where there is a file for it."""
        if isinstance(error, (*FAILURES, UnicodeDecodeError)):
            self._damaged = tells_of_damage(error)
            said, hint = unwritable(error)
            error = LedgerFailed(f"{self._ledger.place}: the ledger {said}", hint)
        self._broken = error
        if isinstance(error, LedgerFailed) and not isinstance(error, LeaseLost):
            if self._file is not None:
                self._kept = UnwrittenMoves(
                    self._ledger, self._file, error, isinstance(error, LedgerMoved) and error.gone
                )
                self._kept.begin()
            self._loop.call_soon_threadsafe(self.on_failure, error)

    def _commit_patiently(self, batch: list[_Move[Any]]) -> None:
        """Commit the batch; when a server was away in the middle, find out whether it did, and do it again if not."""
        while True:
            try:
                self._commit_once(batch)
            except FAILURES as failure:
                if self._may_wait(failure):
                    continue
                committed = self._ledger.regain(failure)
                if committed is None:
                    raise
                if not committed:
                    continue
            self._locked_since = None
            return

    def _may_wait(self, failure: BaseException) -> bool:
        """Tell whether the lock of another program is worth another try; say once that it is waited for."""
        if not is_locked(failure):
            return False
        now = time.monotonic()
        self._locked_since = now if self._locked_since is None else self._locked_since
        ends = [self._locked_since + self._lock_patience_s]
        if self._hurried_since is not None:
            ends.append(max(self._locked_since, self._hurried_since) + HURRIED_S)
        if not self._waits and now - self._locked_since >= ANNOUNCED_S and now < min(ends):
            self._waits = True
            text = f"{self._ledger.place}: another program has locked the ledger: waiting up to "
            self._loop.call_soon_threadsafe(self.on_wait, f"{text}{self._lock_patience_s:.0f} s; nothing new is sent")
        return now < min(ends)

    def _commit_once(self, batch: list[_Move[Any]]) -> None:
        groups = _grouped(batch)
        for move in batch:
            move.error = None
        # What is alone in its transaction needs no other bounds.
        apart = self._ledger.savepoint if len(groups) > 1 else contextlib.nullcontext
        with self._ledger.transaction():
            # Behind the write lock: a run that begins on another lock file comes before all this, or after it.
            self._ledger.check_files()
            for moves in groups:
                try:
                    with apart():
                        _make(moves, self._ledger)
                except (*FAILURES, UnicodeDecodeError, LeaseLost, LedgerMoved):
                    raise
                except Exception as error:  # noqa: BLE001 - it is handed to who asked for the move
                    for move in moves:
                        move.error = error
                    if len(groups) == 1:
                        self._ledger.rollback()
        # What was written into a file that is no longer there is not durable.
        self._ledger.check_files()


def _grouped(batch: list[_Move[Any]]) -> list[list[_Move[Any]]]:
    """Put moves that can be made in one together; otherwise the order stays."""
    groups: list[list[_Move[Any]]] = []
    for move in batch:
        alike = (
            group
            for group in groups
            if move.items is not None
            and group[0].items is not None
            and (group[0].run, group[0].args) == (move.run, move.args)
        )
        if (group := next(alike, None)) is None:
            groups.append([move])
        else:
            group.append(move)
    return groups


def _make(moves: list[_Move[Any]], ledger: Ledger) -> None:
    first = moves[0]
    if first.items is None:
        first.make(ledger)
        return
    results = first.run(ledger, [item for move in moves for item in move.items or ()], *first.args)
    start = 0
    for move in moves:
        end = start + len(move.items or ())
        move.result = None if results is None else results[start:end]
        start = end


def _resolve(batch: list[_Move[Any]]) -> None:
    for move in batch:
        move.resolve()

"""Runs the ledger's moves on one thread, as many to a commit as have come together (group commit).

A move's future is resolved only after its commit: who awaits it knows that it is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from enrich.errors import LeaseLost, LedgerFailed
from enrich.store.dialect import FAILURES
from enrich.store.ledger import Ledger

P = ParamSpec("P")
T = TypeVar("T")
I = TypeVar("I")  # noqa: E741 - an item


class _Move(Generic[T]):
    """One move, and what came of it. `items`: what it tells, which others like it may tell in one with it."""

    __slots__ = ("args", "error", "future", "items", "result", "run")

    def __init__(
        self,
        run: Callable[..., T],
        future: asyncio.Future[T],
        args: tuple[object, ...] = (),
        items: Sequence[Any] | None = None,
    ) -> None:
        self.run = run
        self.future = future
        self.args = args
        self.items = items
        self.result: T | None = None
        self.error: BaseException | None = None

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
        self, ledger: Ledger, turn: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    ) -> None:
        """Write to a ledger; `turn` waits until no other process writes, where there are several."""
        self._ledger = ledger
        self._turn = turn
        #: What was asked for in this round of the event loop; it goes to the thread in one piece.
        self._asked: list[_Move[Any]] = []
        self._batches: queue.SimpleQueue[list[_Move[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._broken: BaseException | None = None

    async def __aenter__(self) -> Journal:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._hand_over()
        self._ledger.hurry()
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join)

    def do(self, move: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Make one move; the future is done when it is durable, or carries what the move raised."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._ask(_Move(lambda ledger: move(ledger, *args, **kwargs), future))
        return future

    def together(
        self, move: Callable[Concatenate[Ledger, Sequence[I], P], T], items: Sequence[I], *args: P.args, **_: P.kwargs
    ) -> asyncio.Future[T]:
        """Make a move that tells of several items, in one with those that come at the same time with equal `args`.

        What the move returns runs along its items, and so does each future's part of it; or it returns None.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        self._ask(_Move(move, future, args, items))
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
        """Commit the batch as one; after a commit that failed nothing is written any more."""
        try:
            if self._broken is not None:
                raise self._broken
            self._commit_patiently(batch)
        except BaseException as error:  # noqa: BLE001 - it is handed to who asked for the moves
            if isinstance(error, FAILURES):
                error = LedgerFailed(
                    f"the ledger cannot be written: {error}", "make room or mend it, then run the same command again"
                )
            self._broken = error
            for move in batch:
                move.error = error

    def _commit_patiently(self, batch: list[_Move[Any]]) -> None:
        """Commit the batch; when a server was away in the middle, find out whether it did, and do it again if not."""
        while True:
            try:
                self._commit_once(batch)
            except FAILURES as failure:
                committed = self._ledger.regain(failure)
                if committed is None:
                    raise
                if not committed:
                    continue
            return

    def _commit_once(self, batch: list[_Move[Any]]) -> None:
        groups = _grouped(batch)
        for move in batch:
            move.error = None
        # What is alone in its transaction needs no other bounds.
        apart = self._ledger.savepoint if len(groups) > 1 else contextlib.nullcontext
        with self._turn(), self._ledger.transaction():
            for moves in groups:
                try:
                    with apart():
                        _make(moves, self._ledger)
                except (*FAILURES, LeaseLost):
                    raise
                except Exception as error:  # noqa: BLE001 - it is handed to who asked for the move
                    for move in moves:
                        move.error = error
                    if len(groups) == 1:
                        self._ledger.rollback()


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
        first.result = first.run(ledger)
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

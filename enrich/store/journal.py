"""Runs the ledger's moves on one thread, as many to a commit as have come together (group commit).

A move's future is resolved only after its commit: who awaits it knows that it is on disk.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from enrich.errors import LedgerFailed
from enrich.store.ledger import Ledger

P = ParamSpec("P")
T = TypeVar("T")


class _Move(Generic[T]):
    """One move, and what came of it."""

    __slots__ = ("error", "future", "result", "run")

    def __init__(self, run: Callable[[Ledger], T], future: asyncio.Future[T]) -> None:
        self.run = run
        self.future = future
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

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._moves: queue.SimpleQueue[_Move[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._broken: BaseException | None = None

    async def __aenter__(self) -> Journal:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._moves.put(None)
        await asyncio.to_thread(self._thread.join)

    def do(self, move: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Make one move; the future is done when it is durable, or carries what the move raised."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._moves.put(_Move(lambda ledger: move(ledger, *args, **kwargs), future))
        return future

    def _work(self) -> None:
        last = False
        while not last:
            batch: list[_Move[Any]] = []
            block = True
            while True:
                try:
                    move = self._moves.get(block=block)
                except queue.Empty:
                    break
                if move is None:
                    last = True
                    break
                batch.append(move)
                block = False
            if batch:
                self._commit(batch)
                self._loop.call_soon_threadsafe(_resolve, batch)

    def _commit(self, batch: list[_Move[Any]]) -> None:
        """Commit the batch as one; after a commit that failed nothing is written any more."""
        try:
            if self._broken is not None:
                raise self._broken
            with self._ledger.transaction():
                for move in batch:
                    try:
                        with self._ledger.savepoint():
                            move.result = move.run(self._ledger)
                    except sqlite3.Error:
                        raise
                    except Exception as error:  # noqa: BLE001 - it is handed to who asked for the move
                        move.error = error
        except BaseException as error:  # noqa: BLE001 - likewise
            if isinstance(error, sqlite3.Error):
                error = LedgerFailed(
                    f"the ledger cannot be written: {error}", "make room or mend it, then run the same command again"
                )
            self._broken = error
            for move in batch:
                move.error = error


def _resolve(batch: list[_Move[Any]]) -> None:
    for move in batch:
        move.resolve()

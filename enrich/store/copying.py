"""Copies a ledger into another database, and proves that both say the same."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from enrich.errors import Refused
from enrich.place import LedgerPlace
from enrich.privacy import key_path
from enrich.store.database import Database, exists, remove
from enrich.store.dialect import FAILURES
from enrich.store.lock import hold
from enrich.store.opening import alone
from enrich.store.records import Records
from enrich.store.sqlite import damaged, tells_of_damage

#: All that a ledger remembers, with what tells the rows of a table apart. Who refers to another is checked at the end.
TABLES = {
    "facts": ("name",),
    "waterfalls": ("identifier",),
    "calls": ("id",),
    "executions": ("id",),
    "requests": ("id",),
    "bundles": ("id",),
    "attempts": ("id",),
    "forgotten": ("hash",),
    "delivered": ("job", "row_key"),
    "latencies": ("call", "seconds"),
}
#: Columns of text in which databases differ about what comes first.
_WORDS = ("name", "identifier", "job", "call")
#: Tells of the processes of an execution, and of nothing once it has ended; a file has no such column.
_OF_THE_MOMENT = ("owner_id",)


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied: how many rows of each table, and a hash of all they say, which is the same on both sides."""

    rows: dict[str, int]
    digest: str
    #: Where the key to those who were forgotten lies now; None: nobody was.
    key: Path | None = None


def copy(source: LedgerPlace, target: LedgerPlace) -> Copied:
    """Copy a ledger that no run is at work with, all of it or nothing, to where no other is.

    The key to those who were forgotten goes with it. Raises Refused, and LedgerLocked while a run holds either.
    """
    if source == target:
        raise Refused(f"{target}: this is the ledger itself", "name another place for the copy")
    with closing(_Old(source)) as old, alone(source), hold(target, 0), _making(target) as new:
        try:
            with old.still(), new.transaction():
                copied = _fill(old, new)
                key = _copy_key(source, target)
        except FAILURES as error:
            if tells_of_damage(error):
                raise damaged(source) from error
            raise Refused(f"{target}: the copy cannot be written: {error}") from error
    return replace(copied, key=key)


class _Old(Records):
    """A ledger that is read from end to end."""

    def columns(self, table: str) -> list[str]:
        """Name the columns of a table that are copied."""
        described = self._db.execute(f"SELECT * FROM {table} LIMIT 0").description or ()
        return [column[0] for column in described if column[0] not in _OF_THE_MOMENT]

    def rows(self, table: str, columns: list[str]) -> Iterator[tuple[Any, ...]]:
        """Yield all rows of a table, in an order that is the same everywhere."""
        order = ", ".join(name + (self._db.dialect.by_bytes if name in _WORDS else "") for name in TABLES[table])
        return self._db.stream(f"SELECT {', '.join(columns)} FROM {table} ORDER BY {order}")


class _New(_Old):
    """A ledger that is written from another."""

    def __init__(self, place: LedgerPlace) -> None:
        """Make it, unless it is there; one that is not empty stays as it is."""
        Database.__init__(self, place)

    def is_empty(self) -> bool:
        """Tell whether it remembers nothing."""
        return not any(self._db.execute(f"SELECT EXISTS (SELECT 1 FROM {table})").fetchone()[0] for table in TABLES)

    def fill(self, tables: Mapping[str, tuple[list[str], Iterator[tuple[Any, ...]]]]) -> None:
        """Write the columns and rows of each table; they may refer to those that come later."""
        with self._db.loading():
            for table, (columns, rows) in tables.items():
                self._db.load(table, columns, rows)


@contextmanager
def _making(place: LedgerPlace) -> Iterator[_New]:
    """Have a ledger to write to; one that was made for that goes with what fails: empty, it would pay for all again."""
    is_new = not exists(place)
    try:
        with closing(_New(place)) as new:
            yield new
    except BaseException:
        if is_new:
            remove(place)
        raise


def _fill(old: _Old, new: _New) -> Copied:
    """Copy everything and read it again. Raises Refused when that is not the same, or not sound."""
    if not new.is_empty():
        raise Refused(f"{new.place}: this ledger is not empty", "a copy replaces nothing: choose another place")
    columns = {table: old.columns(table) for table in TABLES}
    told, found = ({table: _Tally() for table in TABLES} for _ in range(2))
    new.fill({table: (names, told[table].of(old.rows(table, names))) for table, names in columns.items()})
    for table, names in columns.items():
        deque(found[table].of(new.rows(table, names)), maxlen=0)
    problems = [f"{table} differs" for table in TABLES if told[table].said() != found[table].said()]
    problems += new.problems()
    if problems:
        raise Refused(
            f"{new.place}: the copy is not sound, and was dropped: {'; '.join(problems)}",
            f"is the ledger sound? enrich ledger check {old.place}",
        )
    whole = blake2b(repr([told[table].said() for table in TABLES]).encode(), digest_size=16)
    return Copied({table: tally.rows for table, tally in told.items()}, whole.hexdigest())


@dataclass(slots=True)
class _Tally:
    """Counts rows and hashes what they say, as they pass."""

    rows: int = 0
    hash: blake2b = field(default_factory=lambda: blake2b(digest_size=16))

    def of(self, rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """Pass rows on; PostgreSQL's text can't hold a NUL, of which a run makes what stands here, too."""
        for row in rows:
            plain = tuple(cell.replace("\0", "\ufffd") if isinstance(cell, str) else cell for cell in row)
            self.rows += 1
            self.hash.update(repr(plain).encode())
            yield plain

    def said(self) -> tuple[int, str]:
        """Tell what passed."""
        return self.rows, self.hash.hexdigest()


def _copy_key(source: LedgerPlace, target: LedgerPlace) -> Path | None:
    """Copy the key to those who were forgotten (0600), if there is one; another is not replaced."""
    mine, other = key_path(source), key_path(target)
    if not mine.exists():
        return None
    key = mine.read_bytes()
    if other.exists():
        if other.read_bytes() != key:
            raise Refused(f"{other}: here lies the key of another ledger", "choose another place for the copy")
        return other
    other.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(other, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    return other

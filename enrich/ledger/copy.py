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

from enrich.errors import CommandRefused
from enrich.job.locations import LedgerLocation
from enrich.ledger.database import Database, delete_ledger, ledger_exists
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.forgotten import key_path
from enrich.ledger.lock import lock_ledger, open_exclusive
from enrich.ledger.sqlite import damaged_ledger_error, is_damage_error
from enrich.ledger.verify import LedgerVerifier

#: All that a ledger remembers, with what tells the rows of a table apart. Who refers to another is checked at the end.
COPIED_TABLES = {
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
_TEXT_KEY_COLUMNS = ("name", "identifier", "job", "call")
#: Tells of the processes of an execution, and of nothing once it has ended; a file has no such column.
_UNCOPIED_COLUMNS = ("owner_id",)


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What was copied: how many rows of each table, and a hash of all they say, which is the same on both sides."""

    rows: dict[str, int]
    digest: str
    #: Where the key to those who were forgotten lies now; None: nobody was.
    key: Path | None = None


def copy_ledger(source: LedgerLocation, target: LedgerLocation) -> CopyResult:
    """Copy a ledger that no run is at work with, all of it or nothing, to where no other is.

    The key to those who were forgotten goes with it. Raises Refused, and LedgerLocked while a run holds either.
    """
    if source == target:
        raise CommandRefused(f"{target}: this is the ledger itself", "name another place for the copy")
    with (
        closing(_SourceLedger(source)) as reader,
        open_exclusive(source),
        lock_ledger(target, 0),
        _created_target(target) as writer,
    ):
        try:
            with reader.snapshot(), writer.transaction():
                result = _copy_tables(reader, writer)
                key = _copy_forgotten_key(source, target)
        except DATABASE_ERRORS as error:
            if is_damage_error(error):
                raise damaged_ledger_error(source) from error
            raise CommandRefused(f"{target}: the copy cannot be written: {error}") from error
    return replace(result, key=key)


class _SourceLedger(LedgerVerifier):
    """A ledger that is read from end to end."""

    def copied_columns(self, table: str) -> list[str]:
        """Name the columns of a table that are copied."""
        described = self._db.execute(f"SELECT * FROM {table} LIMIT 0").description or ()
        return [column[0] for column in described if column[0] not in _UNCOPIED_COLUMNS]

    def all_rows(self, table: str, columns: list[str]) -> Iterator[tuple[Any, ...]]:
        """Yield all rows of a table, in an order that is the same everywhere."""
        order = ", ".join(
            name + (self._db.dialect.byte_order if name in _TEXT_KEY_COLUMNS else "") for name in COPIED_TABLES[table]
        )
        return self._db.stream(f"SELECT {', '.join(columns)} FROM {table} ORDER BY {order}")


class _TargetLedger(_SourceLedger):
    """A ledger that is written from another."""

    def __init__(self, location: LedgerLocation) -> None:
        """Make it, unless it is there; one that is not empty stays as it is."""
        Database.__init__(self, location)

    def is_empty(self) -> bool:
        """Tell whether it remembers nothing."""
        return not any(
            self._db.execute(f"SELECT EXISTS (SELECT 1 FROM {table})").fetchone()[0] for table in COPIED_TABLES
        )

    def load_tables(self, tables: Mapping[str, tuple[list[str], Iterator[tuple[Any, ...]]]]) -> None:
        """Write the columns and rows of each table; they may refer to those that come later."""
        with self._db.deferred_references():
            for table, (columns, rows) in tables.items():
                self._db.load_rows(table, columns, rows)


@contextmanager
def _created_target(location: LedgerLocation) -> Iterator[_TargetLedger]:
    """Have a ledger to write to; one that was made for that goes with what fails: empty, it would pay for all again."""
    is_new = not ledger_exists(location)
    try:
        with closing(_TargetLedger(location)) as writer:
            yield writer
    except BaseException:
        if is_new:
            delete_ledger(location)
        raise


def _copy_tables(reader: _SourceLedger, writer: _TargetLedger) -> CopyResult:
    """Copy everything and read it again. Raises Refused when that is not the same, or not sound."""
    if not writer.is_empty():
        raise CommandRefused(
            f"{writer.location}: this ledger is not empty", "a copy replaces nothing: choose another place"
        )
    columns = {table: reader.copied_columns(table) for table in COPIED_TABLES}
    source_digests, target_digests = ({table: _TableDigest() for table in COPIED_TABLES} for _ in range(2))
    writer.load_tables(
        {
            table: (names, source_digests[table].count_and_hash(reader.all_rows(table, names)))
            for table, names in columns.items()
        }
    )
    for table, names in columns.items():
        deque(target_digests[table].count_and_hash(writer.all_rows(table, names)), maxlen=0)
    problems = [
        f"{table} differs"
        for table in COPIED_TABLES
        if source_digests[table].result() != target_digests[table].result()
    ]
    problems += writer.problems()
    if problems:
        raise CommandRefused(
            f"{writer.location}: the copy is not sound, and was dropped: {'; '.join(problems)}",
            f"is the ledger sound? enrich ledger check {reader.location}",
        )
    overall_hash = blake2b(repr([source_digests[table].result() for table in COPIED_TABLES]).encode(), digest_size=16)
    return CopyResult({table: tally.rows for table, tally in source_digests.items()}, overall_hash.hexdigest())


@dataclass(slots=True)
class _TableDigest:
    """Counts rows and hashes what they say, as they pass."""

    rows: int = 0
    hash: blake2b = field(default_factory=lambda: blake2b(digest_size=16))

    def count_and_hash(self, rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """Pass rows on; PostgreSQL's text can't hold a NUL, of which a run makes what stands here, too."""
        for row in rows:
            plain = tuple(cell.replace("\0", "\ufffd") if isinstance(cell, str) else cell for cell in row)
            self.rows += 1
            self.hash.update(repr(plain).encode())
            yield plain

    def result(self) -> tuple[int, str]:
        """Tell what passed."""
        return self.rows, self.hash.hexdigest()


def _copy_forgotten_key(source: LedgerLocation, target: LedgerLocation) -> Path | None:
    """Copy the key to those who were forgotten (0600), if there is one; another is not replaced."""
    source_path, target_path = key_path(source), key_path(target)
    if not source_path.exists():
        return None
    key = source_path.read_bytes()
    if target_path.exists():
        if target_path.read_bytes() != key:
            raise CommandRefused(
                f"{target_path}: here lies the key of another ledger", "choose another place for the copy"
            )
        return target_path
    target_path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(target_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    return target_path

"""Copies a ledger into another database and verifies that both hold the same data."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from msgspec import Struct

from enrich.errors import CommandRefused
from enrich.job.local_files import is_same_file
from enrich.job.locations import LedgerLocation
from enrich.ledger import verify
from enrich.ledger.database import Database, delete_ledger, ledger_exists, open_existing
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.erasure import key_path, write_key
from enrich.ledger.lock import lock_ledger, open_exclusive
from enrich.ledger.rescue_file import find_rescue_files
from enrich.ledger.sqlite_errors import damaged_ledger_error, is_damage_error

#: All copied tables, each with the columns that identify a row.
COPIED_TABLES = {
    "facts": ("name",),
    "targets": ("kind", "identifier"),
    "calls": ("id",),
    "executions": ("id",),
    "requests": ("id",),
    "bulk_tasks": ("id",),
    "attempts": ("id",),
    "step_rows": ("request_id", "row_hash"),
    "forgotten": ("hash",),
    "delivered": ("job", "row_key", "field"),
    "latencies": ("call", "seconds"),
    "known_batches": ("job", "position"),
}
#: Text columns: SQLite and PostgreSQL sort these differently by default.
_TEXT_KEY_COLUMNS = ("name", "kind", "identifier", "job", "field", "call")
#: Only meaningful while a run is active, and absent from SQLite ledgers.
_UNCOPIED_COLUMNS = ("lease_id",)


class CopyResult(Struct, frozen=True):
    """The result of a copy: rows per table, and a hash of all rows that is equal for source and target."""

    rows: dict[str, int]
    digest: str
    #: Where the key for the hashes of forgotten people is now. None: there is no key.
    key: Path | None = None


def copy_ledger(source: LedgerLocation, target: LedgerLocation) -> CopyResult:
    """Copy a whole ledger that no run is using, or nothing of it, to a location that holds no ledger data.

    The key for the hashes of forgotten people is copied too. Raises CommandRefused, also if there is a rescue file, and
    LedgerLocked while a run holds either ledger.
    """
    if is_same_file(source, target):
        raise CommandRefused(f"{target}: this is the ledger itself", "choose another location for the copy")
    with (
        closing(open_existing(source, skip_integrity_check=True)) as reader,
        open_exclusive(source),
        lock_ledger(target, 0),
        _created_target(target) as writer,
    ):
        if isinstance(source, Path) and (rescue_files := find_rescue_files(source, ())):
            raise CommandRefused(
                f"{rescue_files[0]} has what the last run could not write into this ledger",
                "import it with `enrich run JOB --limit 0`, then run this again",
            )
        try:
            with reader.snapshot(), writer.transaction():
                rows, digest = _copy_tables(reader, writer)
                return CopyResult(rows, digest, _copy_forgotten_key(source, target))
        except DATABASE_ERRORS as error:
            if is_damage_error(error):
                raise damaged_ledger_error(source) from error
            raise CommandRefused(f"{target}: the copy cannot be written: {error}") from error


def _all_rows(db: Database, table: str, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield all rows of a table, in the same order in both databases.

    NUL is replaced by U+FFFD, as a run on PostgreSQL does: its text cannot hold NUL.
    """
    order = ", ".join(
        name + (db.dialect.byte_order if name in _TEXT_KEY_COLUMNS else "") for name in COPIED_TABLES[table]
    )
    for row in db.stream(f"SELECT {', '.join(columns)} FROM {table} ORDER BY {order}"):
        yield tuple(cell.replace("\0", "\ufffd") if isinstance(cell, str) else cell for cell in row)


@contextmanager
def _created_target(location: LedgerLocation) -> Iterator[Database]:
    """Open the target ledger. If the copy fails, delete a ledger that was created here.

    An empty ledger that stays behind would let a later run pay for every request again.
    """
    is_new = not ledger_exists(location)
    try:
        with closing(Database(location)) as writer:
            yield writer
    except BaseException:
        if is_new:
            delete_ledger(location)
        raise


def _copy_tables(reader: Database, writer: Database) -> tuple[dict[str, int], str]:
    """Copy all tables and read them back. Return the rows per table, and a hash of all rows.

    Raises CommandRefused when the copy differs or violates an invariant.
    """
    if any(writer.exists(f"FROM {table}") for table in COPIED_TABLES):
        raise CommandRefused(f"{writer.location}: this ledger is not empty", "choose another location for the copy")
    columns = {
        table: [name for name in reader.column_names(f"SELECT * FROM {table}") if name not in _UNCOPIED_COLUMNS]
        for table in COPIED_TABLES
    }
    for table, names in columns.items():
        writer.session.load_rows(table, names, _all_rows(reader, table, names))
    read, copied = (
        {table: _count_and_hash(_all_rows(db, table, names)) for table, names in columns.items()}
        for db in (reader, writer)
    )
    problems = [f"{table} differs" for table in COPIED_TABLES if read[table] != copied[table]]
    problems += verify.problems(writer)
    if problems:
        raise CommandRefused(
            f"{writer.location}: the copy is damaged and was removed: {'; '.join(problems)}",
            f"check the ledger: enrich ledger check {shlex.quote(str(reader.location))}",
        )
    overall_hash = blake2b(repr(list(read.values())).encode(), digest_size=16)
    return {table: count for table, (count, _) in read.items()}, overall_hash.hexdigest()


def _count_and_hash(rows: Iterator[tuple[Any, ...]]) -> tuple[int, str]:
    count, hashed = 0, blake2b(digest_size=16)
    for row in rows:
        count += 1
        hashed.update(repr(row).encode())
    return count, hashed.hexdigest()


def _copy_forgotten_key(source: LedgerLocation, target: LedgerLocation) -> Path | None:
    """Copy the key for the hashes of forgotten people, if there is one (mode 0600). Never replace a different key."""
    source_path, target_path = key_path(source), key_path(target)
    if not source_path.exists():
        return None
    key = source_path.read_bytes()
    if not target_path.exists():
        write_key(target_path, key)
    elif target_path.read_bytes() != key:
        raise CommandRefused(f"{target_path}: this is the key of another ledger", "choose another place for the copy")
    return target_path

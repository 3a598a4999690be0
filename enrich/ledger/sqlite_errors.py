"""What errors of SQLite mean for a ledger: damage, a disk that fails, a lock of another program; and what to do."""

from __future__ import annotations

import sqlite3

from enrich.errors import LedgerDamaged
from enrich.job.locations import PostgresLocation

#: A journal of the damaged ledger would be applied to the backup.
RESTORE_HINT = (
    "restore a backup without -wal and -shm files. Leads since the backup are charged again: see RELIABILITY.md"
)
DISK_HINT = "free some space, there and in TMPDIR, or repair the disk, then run the same command again"

_DAMAGE_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_FORMAT}
_DISK_ERROR_CODES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}
#: Decoding errors of Python and of SQLite's JSON functions start with these. They have no error code.
_DAMAGE_MESSAGES = ("Could not decode to UTF-8", "malformed JSON")


def error_code(error: BaseException | None) -> int:
    """Return SQLite's code of an error; 0: it has none."""
    return (getattr(error, "sqlite_errorcode", None) or 0) if isinstance(error, sqlite3.Error) else 0


def error_kind(error: BaseException | None) -> int:
    """Return the low byte of the code: the kind of error. The other bytes are its subtype."""
    return error_code(error) & 0xFF


def is_busy_error(error: BaseException | None) -> bool:
    """Return whether the error means that another program holds the write lock."""
    return error_kind(error) == sqlite3.SQLITE_BUSY


def is_disk_error(error: BaseException | None) -> bool:
    """Return whether the disk is full, read-only or faulty. Errors that mean damage may be among these."""
    return error_kind(error) in _DISK_ERROR_CODES


def describe_write_error(error: BaseException) -> tuple[str, str]:
    """Describe why a database could not be written, without quoting its content, and what to do."""
    if is_damage_error(error):
        return "is damaged", RESTORE_HINT
    if is_busy_error(error):
        return (
            "cannot be written: another program has locked it (database is locked)",
            "end the program that holds the lock, such as a database browser, then run the same command again",
        )
    return f"cannot be written: {error}", DISK_HINT


def is_damage_error(error: BaseException | None) -> bool:
    """Return whether the error means that SQLite or Python's decoder found damage in the file."""
    if not isinstance(error, sqlite3.Error):
        return isinstance(error, UnicodeDecodeError)
    is_damage = not _DAMAGE_CODES.isdisjoint({error_code(error), error_kind(error)})
    return is_damage or str(error).startswith(_DAMAGE_MESSAGES)


def damaged_ledger_error(path: object, detail: str = "") -> LedgerDamaged:
    """Return the error for a damaged ledger. SQLite's own message may quote personal data and is never shown."""
    return LedgerDamaged(f"{path}: the ledger is damaged{detail and f': {detail}'}", restore_hint(path))


def restore_hint(location: object) -> str:
    """Return how to restore a damaged ledger."""
    return "restore a backup of its schema: pg_restore" if isinstance(location, PostgresLocation) else RESTORE_HINT

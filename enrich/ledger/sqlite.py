"""Opens a ledger in a SQLite file: checks it first and migrates it to the current version."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from enrich.errors import CommandRefused, LedgerMoved
from enrich.ledger import schema
from enrich.ledger.dialect import Dialect
from enrich.ledger.file_identity import check_is_no_other_file, file_identity, ledger_file_exists, make_private_folder
from enrich.ledger.sqlite_errors import (
    damaged_ledger_error,
    describe_write_error,
    error_code,
    error_kind,
    is_damage_error,
    is_disk_error,
)

#: How long to wait for another process that writes, or that reads data to be erased, in seconds.
BUSY_TIMEOUT_S = 30.0
#: During a run the write lock is retried after this many milliseconds.
RUN_BUSY_TIMEOUT_MS = 500
#: Suffixes of the files that SQLite keeps next to a database.
JOURNAL_SUFFIXES = ("-journal", "-wal", "-shm")
#: Every command checks files up to this size (bytes), because that takes no time.
ALWAYS_CHECKED_BYTES = 8 * 1024 * 1024
#: Larger files (bytes) are not checked at each start. `enrich ledger check` checks them.
CHECKED_AT_START_BYTES = 256 * 1024 * 1024

#: SQLite's messages about damage quote the file's content. These texts replace them; the first matching pattern counts.
_DAMAGE_TEXTS = (
    ("index|non-unique", "an index does not agree with its table"),
    ("constraint failed|value in", "a column has an invalid value"),
    ("", "its pages do not fit together"),
)


class Column(NamedTuple):
    """A column of the ledger's tables, the Python type of its values, and the types of its JSON if it holds that."""

    table: str
    name: str
    kind: type
    json_types: tuple[type, ...]


def ledger_columns() -> tuple[Column, ...]:
    """Return all columns of a new ledger."""
    kinds = {"TEXT": str, "INTEGER": int, "REAL": float, "BLOB": bytes}
    with closing(open_in_memory()) as db:
        rows = db.execute(
            "SELECT m.name, c.name, c.type FROM sqlite_master m JOIN pragma_table_info(m.name) c WHERE m.type = 'table'"
        )
        return tuple(
            Column(table, name, kinds[kind], schema.JSON_COLUMNS.get(table, {}).get(name, ()))
            for table, name, kind in rows
        )


def orphan_query() -> str:
    """Return the SQL that selects a row for each reference of a new ledger's columns to a row that is not there."""
    with closing(open_in_memory()) as db:
        references = db.execute(
            'SELECT m.name, f."from", f."table" FROM sqlite_master m JOIN pragma_foreign_key_list(m.name) f '
            "WHERE m.type = 'table'"
        ).fetchall()
    return " UNION ALL ".join(
        f"SELECT 1 FROM {table} t LEFT JOIN {referenced} r ON r.id = t.{column} "
        f"WHERE t.{column} IS NOT NULL AND r.id IS NULL"
        for table, column, referenced in references
    )


class SqliteSession(sqlite3.Connection):
    """One SQLite file over one connection."""

    dialect = Dialect(
        serial_key="INTEGER PRIMARY KEY",
        blob_type="BLOB",
        has_leases=False,
        no_index="+",
        json_list="json_group_array({})",
        as_bytes="CAST({} AS BLOB)",
    )
    #: Files that must stay at their paths while a run uses the ledger, with their identities. The lock file is last.
    _files: Sequence[tuple[Path, tuple[int, int] | None]] = ()

    def watch_files(self, path: Path) -> None:
        """Record the files of the ledger that `check_files` compares from then on. The caller holds its lock."""
        self.execute("SELECT count(*) FROM requests").fetchone()  # creates the journals
        # Waits happen in the writer instead of in SQLite, because a signal can end them there.
        self.execute(f"PRAGMA busy_timeout = {RUN_BUSY_TIMEOUT_MS}")
        real = Path(os.path.realpath(path))
        journals = (real.parent / f"{real.name}{end}" for end in ("-wal", "-shm"))
        self._files = [(each, file_identity(each)) for each in (path, *journals, lock_path(path))]

    def check_files(self) -> None:
        """Raise LedgerMoved when a file of the ledger was removed or replaced since `watch_files`."""
        changed = next((path for path, identity in self._files if file_identity(path) != identity), None)
        if changed is None:
            return
        if changed == self._files[-1][0]:
            raise LedgerMoved(
                f"{changed}: the lock file was removed or replaced while the run was using it",
                "make sure that no other run uses this ledger, then run the same command again",
                database_missing=False,
            )
        raise LedgerMoved(
            f"{changed}: a file of the ledger was removed or replaced while the run was using it",
            "put the ledger back if you have it, then run the same command again",
        )

    def stream(self, sql: str, values: Sequence[Any] = (), /) -> Iterator[Any]:
        """Yield the rows of a query."""
        return self.execute(sql, values)

    def load_rows(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], /) -> None:
        """Insert many rows with their own ids."""
        values = ", ".join("?" * len(columns))
        self.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values})", rows)

    def begin(self) -> None:
        """Begin a transaction that writes."""
        self.execute("BEGIN IMMEDIATE")

    def begin_snapshot(self) -> None:
        """Begin a transaction that reads from one snapshot, and may write to temporary tables."""
        self.execute("BEGIN")

    begin_temporary = begin_snapshot

    def commit(self) -> None:
        """Commit the transaction durably."""
        self.execute("COMMIT")

    def rollback(self) -> None:
        """Roll back the open transaction. A full disk may have ended it already."""
        if self.in_transaction:
            self.execute("ROLLBACK")

    def reconnect(self, _: BaseException) -> bool | None:
        """Return None: a failed file operation would fail again."""
        return None

    def shorten_waits(self) -> None:
        """Do nothing: waits for a file are short."""

    def clear_table(self, table: str) -> None:
        """Delete all rows of a temporary table."""
        self.execute(f"DELETE FROM {table}")

    def integrity_problems(self) -> Iterator[str]:
        """Check the whole file with its indexes. Yield each problem in words that quote none of its content."""
        messages = [message for (message,) in self.execute("PRAGMA integrity_check") if message != "ok"]
        problems = [next(words for sign, words in _DAMAGE_TEXTS if re.search(sign, message)) for message in messages]
        yield from dict.fromkeys(problems)

    def enable_secure_delete(self) -> None:
        """Overwrite deleted data from now on (SQLite docs: "PRAGMA secure_delete")."""
        self.execute("PRAGMA secure_delete = ON")

    def discard_erased_data(self) -> bool:
        """Move the whole journal into the file and truncate it. False: a connection still reads an older snapshot."""
        (busy, *_) = self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy


def lock_path(path: Path) -> Path:
    """Return the path of a ledger's lock file. All links to one ledger share it."""
    real = Path(os.path.realpath(path))
    return real.parent / f"{real.name}.lock"


def open_in_memory() -> SqliteSession:
    """Open a new ledger without a file."""
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, factory=SqliteSession)
    _migrate(db, Path(), allowed=True)
    return db


def open_sqlite(path: Path, *, read_only: bool, any_version: bool, skip_integrity_check: bool) -> SqliteSession:
    """Open a ledger and create it (mode 0600) if it is missing. With `read_only` it can be read during a run.

    With `any_version` a ledger of another version is opened as it is. With `skip_integrity_check` the caller checks for
    damage. Raises CommandRefused when the file is not a ledger, is damaged, has a newer version than this program, or
    cannot be written.
    """
    try:
        file_exists = ledger_file_exists(path)
        if not read_only:
            make_private_folder(path.parent)
            if not file_exists:
                _create(path)
            _make_writable(path)
        if path.is_file() and not path.stat().st_size:
            raise damaged_ledger_error(path, "it is empty")
        # Only one thread at a time uses the connection, but not always the same one.
        db = sqlite3.connect(
            _file_uri(path, "mode=ro" if read_only else "mode=rw"),
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=BUSY_TIMEOUT_S,
            factory=SqliteSession,
        )
        try:
            _check_application_id(db, path)
            _check_length(db, path)
            if not read_only:
                # WAL: others can read while we write. FULL: a commit survives a power cut.
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
            # Lookups by fingerprint hit random pages, so the cache is large (a negative number is KiB).
            db.execute("PRAGMA cache_size = -65536")
            if not any_version:
                _migrate(db, path, allowed=not read_only)
            if not skip_integrity_check:
                _check_integrity(db, path, ALWAYS_CHECKED_BYTES if read_only else CHECKED_AT_START_BYTES)
        except BaseException:
            db.close()
            raise
    except (OSError, sqlite3.Error, UnicodeDecodeError) as error:
        raise _opening_error(path, error) from error
    return db


def _make_writable(path: Path) -> None:
    """Make the journals writable. Raise PermissionError if the ledger or its folder is read-only: SQLite would not."""
    for target, reason in ((path, "it is read-only"), (path.resolve().parent, "its folder is read-only")):
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, reason, str(path))
    for end in JOURNAL_SUFFIXES:
        journal = Path(f"{path.resolve()}{end}")
        if journal.is_file() and not os.access(journal, os.W_OK):  # SQLite made it while the ledger was read-only
            journal.chmod(0o600)


def is_ledger_file(path: Path) -> bool:
    """Return whether a file is a ledger. It may be open in this process.

    Only SQLite may open it: if another part of the program closed the file, all locks of the process on it would end.
    """
    try:
        with closing(sqlite3.connect(_file_uri(path, "mode=ro&immutable=1"), uri=True)) as db:
            return bool(db.execute("PRAGMA application_id").fetchone() == (schema.APPLICATION_ID,))
    except sqlite3.Error:
        return False


def _opening_error(path: Path, error: Exception) -> CommandRefused:
    """Return the error for a ledger that cannot be opened."""
    if error_code(error) == sqlite3.SQLITE_NOTADB:
        check_is_no_other_file(path)
    # An error in our own SQL comes from the content: it fits every sound ledger.
    if is_damage_error(error) or error_kind(error) == sqlite3.SQLITE_ERROR:
        return damaged_ledger_error(path)
    reason = getattr(error, "strerror", None) or error
    hint = describe_write_error(error)[1] if is_disk_error(error) else "is it a ledger, and writable?"
    if error_kind(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        if not os.access(path, os.R_OK):
            reason = "this user has no permission to read it"
        elif not os.access(path.resolve().parent, os.W_OK):  # SQLite makes a file for readers, too
            reason, hint = "its folder is read-only", "copy it to another folder, and name the copy with --ledger"
    return CommandRefused(f"{path}: the ledger cannot be opened: {reason}", hint)


def remove_with_journals(path: Path) -> None:
    """Remove a database with its journals, which SQLite would apply to the next file at this path."""
    for suffix in ("", *JOURNAL_SUFFIXES):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _create(path: Path) -> None:
    """Create a new ledger atomically, so that an empty file always means lost data."""
    from enrich.files.atomic import fsync_dir  # noqa: PLC0415 - it imports polars, and commands that read create nothing

    temporary = path.with_name(f".{path.name}.new")
    # SQLite would apply a journal without its ledger to the new one.
    for stale in (temporary, *(Path(f"{base}{end}") for base in (temporary, path) for end in JOURNAL_SUFFIXES)):
        stale.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with closing(sqlite3.connect(temporary, isolation_level=None)) as db:
        _migrate(db, path, allowed=True)
    temporary.replace(path)
    fsync_dir(path.parent)


def _check_length(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a truncated file: SQLite would read the missing bytes as zeros."""
    (size,) = db.execute("PRAGMA page_size").fetchone()
    if path.stat().st_size % size:
        raise damaged_ledger_error(path, "the file is cut off")


def _check_integrity(db: sqlite3.Connection, path: Path, max_bytes: int) -> None:
    """Refuse a damaged ledger before anything is sent: lost requests would be paid for again.

    Indexes are compared with their tables too: a stale journal can produce pages that are valid but inconsistent.
    """
    if path.stat().st_size > max_bytes:
        return
    (result,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if result != "ok":
        raise damaged_ledger_error(path)


def _file_uri(path: Path, options: str) -> str:
    """Return SQLite's name of a file. Path.as_uri imports HTTP and TLS in Python 3.14."""
    return f"file:{quote(os.fsencode(path.absolute()))}?{options}"


def _check_application_id(db: sqlite3.Connection, path: Path) -> None:
    """Refuse the database of another program before anything in it is changed."""
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    if application_id in schema.UNRELEASED_IDS:
        raise schema.unreleased_ledger_error(path)
    if application_id != schema.APPLICATION_ID and {"requests", "attempts"} <= names:
        raise damaged_ledger_error(path)
    if names and application_id != schema.APPLICATION_ID:
        raise CommandRefused(f"{path}: this database is no ledger of enrich", "choose another file for the ledger")


def _migrate(db: sqlite3.Connection, path: Path, *, allowed: bool) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version < 0:
        raise damaged_ledger_error(path)
    schema.check_version(path, version, len(schema.MIGRATIONS), may_upgrade=allowed)
    for number, script in enumerate(schema.MIGRATIONS[version:], start=version + 1):
        db.execute("BEGIN IMMEDIATE")
        for statement in schema.statements(script):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {number}")
        db.execute("COMMIT")

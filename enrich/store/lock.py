"""One writer per ledger, by a lock that dies with its process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from enrich.errors import LOCKED_HINT, CommandRefused, LedgerLocked
from enrich.job.locations import LedgerLocation, PostgresLocation
from enrich.store.open_files import ledger_file_exists
from enrich.store.server import load_postgres
from enrich.store.sqlite import lock_path


@contextmanager
def lock_ledger(ledger: LedgerLocation, wait_s: float) -> Iterator[None]:
    """Hold the lock of a ledger; wait for it so many seconds, -1: as long as it takes; at a server a moment at least.

    Raises LedgerLocked when another execution holds it.
    """
    if isinstance(ledger, PostgresLocation):
        with load_postgres().advisory_lock(ledger, wait_s):
            yield
        return
    ledger_file_exists(ledger)  # refuses what can be no ledger
    path = lock_path(ledger)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file_lock = FileLock(path, timeout=wait_s, mode=0o600)
        file_lock.acquire()
        while not _is_file_at(file_lock.lock_file, file_lock._context.lock_file_fd):  # noqa: SLF001 - not public in older versions
            # Removed while it was waited for: another run may hold the one that is there now.
            file_lock.release()
            file_lock.acquire()
    except Timeout:
        raise LedgerLocked(f"{ledger}: another execution holds this ledger", LOCKED_HINT) from None
    except OSError as error:
        raise CommandRefused(f"{path}: the lock cannot be made: {error.strerror or error}") from error
    try:
        yield
    finally:
        file_lock.release()


def _is_file_at(path: str, descriptor: int | None) -> bool:
    """Tell whether a descriptor is that of the file at a path."""
    try:
        return descriptor is not None and os.path.samestat(os.fstat(descriptor), Path(path).stat())
    except FileNotFoundError:
        return False


def is_locked(ledger: LedgerLocation) -> bool | None:
    """Tell whether an execution holds the lock, without touching it; None where the system doesn't tell."""
    if isinstance(ledger, PostgresLocation):
        return bool(load_postgres().is_locked(ledger))
    path = lock_path(ledger)
    try:
        lock_table = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return None
    try:
        inode = path.stat().st_ino
    except OSError:
        return False
    # `1: FLOCK  ADVISORY  WRITE 708 08:01:1311 0 EOF`; the device is left out: file systems disagree on it.
    locks = (line.split() for line in lock_table.splitlines())
    return any(lock[1] == "FLOCK" and lock[5].endswith(f":{inode}") for lock in locks)

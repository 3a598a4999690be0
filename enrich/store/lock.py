"""One writer per ledger, by a lock that dies with its process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from enrich.errors import LOCKED_HINT, LedgerLocked, Refused
from enrich.place import LedgerPlace, Postgres
from enrich.store.open_files import is_there
from enrich.store.server import postgres
from enrich.store.sqlite import lock_path


@contextmanager
def hold(ledger: LedgerPlace, wait_s: float) -> Iterator[None]:
    """Hold the lock of a ledger; wait for it so many seconds, -1: as long as it takes; at a server a moment at least.

    Raises LedgerLocked when another execution holds it.
    """
    if isinstance(ledger, Postgres):
        with postgres().held(ledger, wait_s):
            yield
        return
    is_there(ledger)  # refuses what can be no ledger
    path = lock_path(ledger)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=wait_s, mode=0o600)
        lock.acquire()
        while not _is_at(lock.lock_file, lock._context.lock_file_fd):  # noqa: SLF001 - not public in older versions
            # Removed while it was waited for: another run may hold the one that is there now.
            lock.release()
            lock.acquire()
    except Timeout:
        raise LedgerLocked(f"{ledger}: another execution holds this ledger", LOCKED_HINT) from None
    except OSError as error:
        raise Refused(f"{path}: the lock cannot be made: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _is_at(path: str, descriptor: int | None) -> bool:
    """Tell whether a descriptor is that of the file at a path."""
    try:
        return descriptor is not None and os.path.samestat(os.fstat(descriptor), Path(path).stat())
    except FileNotFoundError:
        return False


def is_held(ledger: LedgerPlace) -> bool | None:
    """Tell whether an execution holds the lock, without touching it; None where the system doesn't tell."""
    if isinstance(ledger, Postgres):
        return bool(postgres().is_held(ledger))
    path = lock_path(ledger)
    try:
        held = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return None
    try:
        inode = path.stat().st_ino
    except OSError:
        return False
    # `1: FLOCK  ADVISORY  WRITE 708 08:01:1311 0 EOF`; the device is left out: file systems disagree on it.
    locks = (line.split() for line in held.splitlines())
    return any(lock[1] == "FLOCK" and lock[5].endswith(f":{inode}") for lock in locks)

"""One writer per ledger, by a lock that dies with its process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from enrich.errors import LedgerLocked, Refused

#: `is_held` takes the lock for less than this to look: nobody must fail for that.
A_MOMENT_S = 0.2


@contextmanager
def hold(ledger: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock beside a ledger; wait for it so many seconds, -1: as long as it takes.

    Raises LedgerLocked when another execution holds it.
    """
    path = ledger.with_name(ledger.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=wait_s or A_MOMENT_S, mode=0o600)
        lock.acquire()
    except Timeout:
        raise LedgerLocked(
            f"{ledger}: another execution holds this ledger", "wait for it, or use --if-locked skip or wait"
        ) from None
    except OSError as error:
        raise Refused(f"{path}: the lock cannot be made: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def is_held(ledger: Path) -> bool:
    """Tell whether an execution holds a ledger now."""
    path = ledger.with_name(ledger.name + ".lock")
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0, mode=0o600):
            return False
    except Timeout:
        return True
    except OSError:  # it belongs to somebody else: who only looks cannot tell
        return False

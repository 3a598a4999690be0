"""Locks a ledger for one writer. The lock is released when its process ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from enrich.errors import LOCKED_HINT, CommandRefused, LedgerLocked
from enrich.job.locations import LedgerLocation, PostgresLocation
from enrich.ledger import execution_records, lease_table
from enrich.ledger.database import Database, load_postgres, try_read
from enrich.ledger.dialect import OUTAGE_TIMEOUT_S
from enrich.ledger.file_identity import (
    check_has_one_name,
    check_is_no_other_file,
    ledger_file_exists,
    make_private_folder,
)
from enrich.ledger.sqlite import lock_path
from enrich.models import iso_time

if TYPE_CHECKING:
    from enrich.ledger.leases import Lease
    from enrich.ledger.postgres import FencingToken

#: Longer than `is_locked` holds the lock, and how often a lock is tried, in seconds.
MIN_LOCK_WAIT_S, LOCK_RETRY_S = 0.1, 0.05


@contextmanager
def lock_ledger(ledger: LedgerLocation, wait_s: float) -> Iterator[None]:
    """Hold the lock of a ledger. Wait up to `wait_s` seconds for it; -1 waits without limit.

    It waits a moment at least (`is_locked` may hold the lock), for PostgreSQL a few seconds.
    Raises LedgerLocked when another run holds the lock.
    """
    if isinstance(ledger, PostgresLocation):
        with load_postgres().advisory_lock(ledger, wait_s):
            yield
        return
    path = lock_path(ledger)
    if ledger_file_exists(ledger):
        check_has_one_name(ledger)
        if not path.exists():  # without a lock file no run has it open
            check_is_no_other_file(ledger)
    try:
        make_private_folder(path.parent)
        deadline = inf if wait_s < 0 else time.monotonic() + max(wait_s, MIN_LOCK_WAIT_S)
        while (lock_file := _try_lock(path)) is None:
            if time.monotonic() >= deadline:
                raise locked_error(ledger)
            time.sleep(LOCK_RETRY_S)
    except OSError as error:
        raise CommandRefused(f"{path}: the lock cannot be made: {error.strerror or error}") from error
    try:
        yield
    finally:
        fcntl.flock(lock_file, fcntl.LOCK_UN)
        os.close(lock_file)


def _try_lock(path: Path) -> int | None:
    """Lock a file, and create it if it is missing. Return its descriptor; None: another process holds the lock."""
    lock_file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # After a removal the path has another file, which another run can lock.
        if os.path.samestat(os.fstat(lock_file), path.stat()):
            return lock_file
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock_file)
        raise
    os.close(lock_file)
    return None


def locked_error(path: Path) -> LedgerLocked:
    """Return the error about a locked ledger file: with the process and the start of its run, as far as known."""
    pid = lock_holder(path)
    newest = try_read(path, lambda ledger: execution_records.list_executions(ledger, last=1))
    facts = [
        *([f"process {pid}"] if pid else []),
        *(f"since {iso_time(execution.started_ms)}" for execution in newest or () if execution.ended_ms is None),
    ]
    details = f" ({', '.join(facts)})" if facts else ""
    return LedgerLocked(f"{path}: another run is using this ledger{details}", LOCKED_HINT)


def is_locked(ledger: LedgerLocation) -> bool:
    """Return whether a process holds the lock. Creates no file, and holds a free lock only for a moment."""
    if isinstance(ledger, PostgresLocation):
        return bool(load_postgres().is_locked(ledger))
    try:
        descriptor = os.open(lock_path(ledger), os.O_RDONLY)
    except OSError:
        return False
    try:
        # /proc/locks would not do: it does not show the processes of other containers.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def lock_holder(path: Path) -> int | None:
    """Return the id of the process that holds the lock of a ledger file; 0: none. None: unknown on this system."""
    try:
        lock_table = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return None
    try:
        inode = lock_path(path).stat().st_ino
    except OSError:
        return 0
    # Example: `1: FLOCK  ADVISORY  WRITE 708 08:01:1311 0 EOF`. File systems disagree on the device, so it is ignored.
    locks = (line.split() for line in lock_table.splitlines())
    return next((int(lock[4]) for lock in locks if lock[1] == "FLOCK" and lock[5].endswith(f":{inode}")), 0)


#: The leader of a run reads the input in one transaction and may wait for a slow disk meanwhile, in seconds.
INPUT_IDLE_TIMEOUT_S = 600.0


@contextmanager
def open_for_run(location: LedgerLocation) -> Iterator[tuple[Database, Lease | None]]:
    """Open a ledger for writing. On PostgreSQL with a lease: writes fail once it is lost. The caller holds the lock."""
    if not isinstance(location, PostgresLocation):
        with closing(Database(location)) as ledger:
            ledger.watch_files()
            yield ledger, None
        return
    with open_leased(location, idle_timeout_s=INPUT_IDLE_TIMEOUT_S) as (ledger, lease):
        yield ledger, lease


@contextmanager
def open_leased(
    location: PostgresLocation, *, leader_id: int | None = None, idle_timeout_s: float | None = None
) -> Iterator[tuple[Database, Lease]]:
    """Open a ledger for writing under a lease (see `Lease`). Raises JobError when psycopg is not installed."""
    load_postgres()  # raises JobError without psycopg
    from enrich.ledger.leases import Lease  # noqa: PLC0415 - only needed for PostgreSQL

    with (
        Lease(location, leader_id=leader_id, idle_timeout_s=idle_timeout_s) as lease,
        closing(Database(location, fencing_token=lease.fencing_token, open_timeout_s=OUTAGE_TIMEOUT_S)) as ledger,
    ):
        yield ledger, lease


@contextmanager
def open_exclusive(location: LedgerLocation) -> Iterator[FencingToken | None]:
    """Hold a ledger that nothing else uses, and keep runs from starting. Yield the fencing token for writes, if any.

    A worker may still be active without the lock, when its run was killed. Raises LedgerLocked.
    """
    with lock_ledger(location, 0):
        if not isinstance(location, PostgresLocation):
            yield None
            return
        with open_leased(location) as (ledger, lease):
            with ledger.transaction():
                lease_table.check_no_other_holders(ledger)
            yield lease.fencing_token

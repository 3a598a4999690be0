"""The right to write to a ledger: the lock of one run and, on PostgreSQL, a lease for each process.

A lock is released when its process ends. A lease shows other processes that this one is alive, and ends when it is not
renewed. It is also a clock with the server's time, because processes compare the times they store.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import inf
from pathlib import Path

from enrich.databar.clock import boottime
from enrich.errors import LOCKED_HINT, UNWRITABLE_HINT, CommandRefused, LeaseLost, LedgerLocked
from enrich.job.locations import LedgerLocation, PostgresLocation
from enrich.ledger import lease_table, records, resume
from enrich.ledger.database import OPEN_TIMEOUT_S, Database, load_postgres, try_read
from enrich.ledger.dialect import OUTAGE_TIMEOUT_S, DatabaseFailed, FencingToken
from enrich.ledger.file_identity import (
    check_has_one_name,
    check_is_no_other_file,
    ledger_file_exists,
    make_private_folder,
)
from enrich.ledger.sqlite import lock_path
from enrich.models import iso_time

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
        message = f"{path}: the lock cannot be made: {error.strerror or error}"
        raise CommandRefused(message, UNWRITABLE_HINT) from error
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
    newest = try_read(path, lambda ledger: records.list_executions(ledger, last=1))
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


#: How often a lease is renewed within its duration.
RENEWALS_PER_LEASE = 6
#: A worker without a share of the rate renews this often, in seconds: others wait for it, and it for them.
JOIN_EVERY_S = 0.5
#: The share of the lease after which the holder starts nothing new until it has renewed the lease.
SAFE_SHARE = 0.8


class Lease:
    """The lease of this process. Use it as a context manager; its tasks are free for others when the block ends.

    `leader_id`: the lease of the run that we work for. None: we lead it, and the run ends when our lease ends.
    `idle_timeout_s`: after this many idle seconds in a transaction the server ends it, so that others do not wait for
    us. Raises RunEnded when the leader's lease has ended, LeaseLost and DatabaseFailed.
    """

    def __init__(
        self, location: PostgresLocation, *, leader_id: int | None = None, idle_timeout_s: float | None = None
    ) -> None:
        self._duration_s = seconds = location.lease_s
        self._renewed_at = boottime()
        self._leader_id = leader_id
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)
        #: The share of the run's rate that a worker may use; 0 until each other worker has seen it.
        self.rate_share = 0.0
        self._ledger = Database(location, open_timeout_s=OPEN_TIMEOUT_S if leader_id is None else OUTAGE_TIMEOUT_S)
        try:
            lease_id = self._ledger.retry_on_disconnect(self._acquire)
            #: For connections that write under this lease.
            self.fencing_token = FencingToken(lease_id, seconds if idle_timeout_s is None else idle_timeout_s)
            now_ms = self._ledger.retry_on_disconnect(self._read_clock)
            if leader_id is not None:
                self._joined_ms = now_ms + 1  # rounded up
                self._ledger.retry_on_disconnect(self._renew)
        except BaseException:
            self._ledger.close()
            raise

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._ledger.shorten_waits()
        self._thread.join()
        self._ledger.close()

    def is_valid(self) -> bool:
        """Return whether the lease surely lasts a while. Raises LeaseLost when it can no longer be renewed."""
        if self._lost.is_set():
            raise LeaseLost
        return boottime() < self._renewed_at + SAFE_SHARE * self._duration_s

    def monotonic(self) -> float:
        """Return seconds from a clock that never steps."""
        return time.monotonic()

    def now_ms(self) -> int:
        """Return the server's time in milliseconds since 1970 (UTC)."""
        return int(boottime() * 1000) + self._offset_ms

    def earliest_ms(self) -> int:
        """Return the server's time. It does not depend on the API's time."""
        return self.now_ms()

    def observe(self, api_ms: int) -> None:
        """Do nothing: all processes use the server's clock."""

    def _renew_until_stopped(self) -> None:
        ledger, lease_id = self._ledger, self.fencing_token.lease_id
        try:
            while not self._stop.wait(self._renewal_interval_s):
                ledger.retry_on_disconnect(self._renew)
        except (DatabaseFailed, LeaseLost):
            self._lost.set()
        try:
            with ledger.transaction():
                lease_table.release_lease(ledger, lease_id)
                resume.recover(ledger, self._read_clock())
        except (DatabaseFailed, LeaseLost):
            pass  # the lease expires anyway

    @property
    def _renewal_interval_s(self) -> float:
        interval_s = self._duration_s / RENEWALS_PER_LEASE
        return interval_s if self._leader_id is None or self.rate_share else min(JOIN_EVERY_S, interval_s)

    def _acquire(self) -> int:
        with self._ledger.transaction():
            name = f"{os.uname().nodename} {os.getpid()}"
            return lease_table.acquire_lease(self._ledger, name, self._duration_s, leader_id=self._leader_id)

    def _renew(self) -> None:
        renewed_at = boottime()
        ledger = self._ledger
        with ledger.transaction():
            if not lease_table.renew_lease(ledger, self.fencing_token.lease_id):
                raise LeaseLost
            if self._leader_id is not None:
                self._update_rate_share()
        self._renewed_at = renewed_at
        with ledger.transaction():
            resume.recover(ledger, self._read_clock())

    def _update_rate_share(self) -> None:
        """Take an equal share of the rate once every other worker has seen this one.

        The sum is never more than the rate. A worker that joins has no share until all others have renewed their leases
        since then. Each of them counts the workers at that renewal, and has its smaller share before its commit.
        """
        workers, not_renewed = lease_table.count_workers(self._ledger, self.fencing_token.lease_id, self._joined_ms)
        self.rate_share = 1 / workers if self.rate_share or not not_renewed else 0.0

    def _read_clock(self) -> int:
        """Return the server's time (ms). Its offset is kept from boot time, which a new system time does not change."""
        now_ms = lease_table.now_ms(self._ledger)
        self._offset_ms = now_ms - int(boottime() * 1000)
        return now_ms

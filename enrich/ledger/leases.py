"""A lease: shows other processes that this one is alive, and ends leases that were not renewed.

A lease is also a clock with the server's time, because processes compare the times they store.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from enrich.databar.clock import boottime
from enrich.errors import LeaseLost
from enrich.job.locations import PostgresLocation
from enrich.ledger import lease_table, resume
from enrich.ledger.database import OPEN_TIMEOUT_S, Database
from enrich.ledger.dialect import OUTAGE_TIMEOUT_S, DatabaseFailed
from enrich.ledger.postgres import FencingToken

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
            self._offset_ms = self._ledger.retry_on_disconnect(self._measure_offset_ms)
            if leader_id is not None:
                now_ms = self._ledger.retry_on_disconnect(lambda: lease_table.now_ms(self._ledger))
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
                resume.recover(ledger, lease_table.now_ms(ledger))
        except (DatabaseFailed, LeaseLost):
            pass  # the lease expires anyway

    @property
    def _renewal_interval_s(self) -> float:
        interval_s = self._duration_s / RENEWALS_PER_LEASE
        return interval_s if self._leader_id is None or self.rate_share else min(JOIN_EVERY_S, interval_s)

    def _acquire(self) -> int:
        with self._ledger.transaction():
            name = f"{socket.gethostname()} {os.getpid()}"
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
            resume.recover(ledger, lease_table.now_ms(ledger))
        self._offset_ms = self._measure_offset_ms()

    def _update_rate_share(self) -> None:
        """Take an equal share of the rate once every other worker has seen this one.

        The sum is never more than the rate. A worker that joins has no share until all others have renewed their leases
        since then. Each of them counts the workers at that renewal, and has its smaller share before its commit.
        """
        workers, not_renewed = lease_table.count_workers(self._ledger, self.fencing_token.lease_id, self._joined_ms)
        self.rate_share = 1 / workers if self.rate_share or not not_renewed else 0.0

    def _measure_offset_ms(self) -> int:
        """Return server time minus boot time (ms). Setting the machine's clock does not change boot time."""
        return lease_table.now_ms(self._ledger) - int(boottime() * 1000)

"""A lease: shows other processes that this one is alive, and ends leases that were not renewed.

A lease is also a clock with the server's time, because processes compare the times they store.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from enrich.databar.clock import boottime
from enrich.errors import LeaseLost, RunEnded
from enrich.job.locations import PostgresLocation
from enrich.ledger.database import OPEN_TIMEOUT_S
from enrich.ledger.dialect import OUTAGE_TIMEOUT_S, DatabaseFailed
from enrich.ledger.ledger import Ledger
from enrich.ledger.postgres import FencingToken

#: How often a lease is renewed within its duration.
RENEWALS_PER_LEASE = 6
#: The share of the lease after which the holder starts nothing new until it has renewed the lease.
SAFE_SHARE = 0.8


class Lease:
    """The lease of this process. Use it as a context manager; its tasks are free for others when the block ends.

    `leader_id`: the owner that leads the run we work for. None: we lead it, and the run ends when our lease ends.
    `idle_timeout_s`: after this many idle seconds in a transaction the server ends it, so that others do not wait for
    us. Raises RunEnded when the leader's lease has ended.
    """

    def __init__(
        self, location: PostgresLocation, *, leader_id: int | None = None, idle_timeout_s: float | None = None
    ) -> None:
        self._duration_s = seconds = location.lease_s
        self._renewed_at = boottime()
        self._leader_id = leader_id
        self._ledger = Ledger(location, open_timeout_s=OPEN_TIMEOUT_S if leader_id is None else OUTAGE_TIMEOUT_S)
        try:
            owner_id = self._ledger.retry_on_disconnect(self._acquire)
        except RunEnded:
            self._ledger.close()
            raise
        #: For connections that write as this owner.
        self.fencing_token = FencingToken(owner_id, seconds if idle_timeout_s is None else idle_timeout_s)
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._offset_ms = self._ledger.retry_on_disconnect(self._measure_offset_ms)
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

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
        ledger, owner_id = self._ledger, self.fencing_token.owner_id
        try:
            while not self._stop.wait(self._duration_s / RENEWALS_PER_LEASE):
                ledger.retry_on_disconnect(self._renew)
        except (DatabaseFailed, LeaseLost):
            self._lost.set()
        try:
            with ledger.transaction():
                ledger.release_lease(owner_id)
                ledger.recover(ledger.now_ms())
        except (DatabaseFailed, LeaseLost):
            pass  # the lease expires anyway

    def _acquire(self) -> int:
        with self._ledger.transaction():
            name = f"{socket.gethostname()} {os.getpid()}"
            return self._ledger.acquire_lease(name, self._duration_s, leader_id=self._leader_id)

    def _renew(self) -> None:
        renewed_at = boottime()
        ledger = self._ledger
        with ledger.transaction():
            if not ledger.renew_lease(self.fencing_token.owner_id):
                raise LeaseLost
        self._renewed_at = renewed_at
        with ledger.transaction():
            ledger.recover(ledger.now_ms())
        self._offset_ms = self._measure_offset_ms()

    def _measure_offset_ms(self) -> int:
        """Return server time minus boot time (ms). Setting the machine's clock does not change boot time."""
        return self._ledger.now_ms() - int(boottime() * 1000)

"""A lease: says as long as this process lives that it does, and ends the leases of those who don't say so.

It is a clock, too: what processes write down for each other has the times of the server.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from enrich.errors import LeaseLost, RunEnded
from enrich.job.locations import PostgresLocation
from enrich.ledger.database import OPEN_TIMEOUT_S
from enrich.ledger.dialect import OUTAGE_TIMEOUT_S, DatabaseFailed
from enrich.ledger.ledger import Ledger
from enrich.ledger.postgres import FencingToken
from enrich.models import boottime

#: So often in a lease its holder says that it lives.
RENEWALS_PER_LEASE = 6
#: The share of a lease after which its holder begins nothing new, unless it could say again that it lives.
SAFE_SHARE = 0.8


class Lease:
    """The lease of this process. Use as a context manager; what it holds is free when the block ends.

    `follows`: the owner who leads the execution that we work for; None: it is us, and an execution stands and falls
    with our lease. `idle_s`: after so long the server ends a transaction in which we say nothing, so that nobody waits
    for us. Raises LeaderGone.
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
        #: What those get that write as this owner.
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
        """Tell whether the lease surely lasts a while yet. Raises LeaseLost when it will not be renewed any more."""
        if self._lost.is_set():
            raise LeaseLost
        return boottime() < self._renewed_at + SAFE_SHARE * self._duration_s

    def monotonic(self) -> float:
        """Seconds that never step, as a clock."""
        return time.monotonic()

    def now_ms(self) -> int:
        """Tell what time the server has, in milliseconds since 1970 (UTC), as a clock."""
        return int(boottime() * 1000) + self._offset_ms

    def earliest_ms(self) -> int:
        """The same: this clock is the server's, whatever the API says."""
        return self.now_ms()

    def observe(self, api_ms: int) -> None:
        """Do nothing: all processes go by the server's clock."""

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
            pass  # it runs out by itself

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
        """Tell how far the server's time is from ours: from one that nobody sets, as people set a machine's clock."""
        return self._ledger.now_ms() - int(boottime() * 1000)

"""A lease: says as long as this process lives that it does, and ends the leases of those who don't say so.

It is a clock, too: what processes write down for each other has the times of the server.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from enrich.errors import LeaderGone, LeaseLost
from enrich.model import boottime
from enrich.place import Postgres
from enrich.store.database import PATIENCE_S
from enrich.store.dialect import OUTAGE_S, DatabaseFailed
from enrich.store.ledger import Ledger
from enrich.store.postgres import Fence

#: So often in a lease its holder says that it lives.
TIMES = 6
#: The share of a lease after which its holder begins nothing new, unless it could say again that it lives.
SURE = 0.8


class Lease:
    """The lease of this process. Use as a context manager; what it holds is free when the block ends.

    `follows`: the owner who leads the execution that we work for; None: it is us, and an execution stands and falls
    with our lease. `idle_s`: after so long the server ends a transaction in which we say nothing, so that nobody waits
    for us. Raises LeaderGone.
    """

    def __init__(self, place: Postgres, *, follows: int | None = None, idle_s: float | None = None) -> None:
        self._seconds = seconds = place.lease_s
        self._renewed = boottime()
        self._follows = follows
        self._ledger = Ledger(place, patience_s=PATIENCE_S if follows is None else OUTAGE_S)
        try:
            owner = self._ledger.patiently(self._begin)
        except LeaderGone:
            self._ledger.close()
            raise
        #: What those get that write as this owner.
        self.fence = Fence(owner, seconds if idle_s is None else idle_s)
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._offset_ms = self._ledger.patiently(self._measured)
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._ledger.hurry()
        self._thread.join()
        self._ledger.close()

    def holds(self) -> bool:
        """Tell whether the lease surely lasts a while yet. Raises LeaseLost when it will not be renewed any more."""
        if self._lost.is_set():
            raise LeaseLost
        return boottime() < self._renewed + SURE * self._seconds

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

    def _work(self) -> None:
        ledger, owner = self._ledger, self.fence.owner
        try:
            while not self._ended.wait(self._seconds / TIMES):
                ledger.patiently(self._renew)
        except (DatabaseFailed, LeaseLost):
            self._lost.set()
        try:
            with ledger.transaction():
                ledger.end_lease(owner)
                ledger.recover(ledger.now_ms())
        except (DatabaseFailed, LeaseLost):
            pass  # it runs out by itself

    def _begin(self) -> int:
        with self._ledger.transaction():
            name = f"{socket.gethostname()} {os.getpid()}"
            return self._ledger.begin_lease(name, self._seconds, follows=self._follows)

    def _renew(self) -> None:
        before = boottime()
        ledger = self._ledger
        with ledger.transaction():
            if not ledger.renew_lease(self.fence.owner):
                raise LeaseLost
        self._renewed = before
        with ledger.transaction():
            ledger.recover(ledger.now_ms())
        self._offset_ms = self._measured()

    def _measured(self) -> int:
        """Tell how far the server's time is from ours: from one that nobody sets, as people set a machine's clock."""
        return self._ledger.now_ms() - int(boottime() * 1000)

"""A ledger opened for an execution, or held without one: on a server with the lease of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from enrich.errors import LedgerLocked
from enrich.place import LedgerPlace, Postgres
from enrich.store.dialect import OUTAGE_S
from enrich.store.ledger import Ledger
from enrich.store.lock import hold
from enrich.store.server import postgres

if TYPE_CHECKING:
    from enrich.store.lease import Lease
    from enrich.store.postgres import Fence

#: Who leads an execution reads the input in one transaction, and may wait for a slow disk meanwhile.
READING_S = 600.0


@contextmanager
def opened(place: LedgerPlace) -> Iterator[tuple[Ledger, Lease | None]]:
    """Open a ledger to write; what is on a server is written as long as the lease holds. The caller holds the lock."""
    if not isinstance(place, Postgres):
        with closing(Ledger(place)) as ledger:
            ledger.watch_files()
            yield ledger, None
        return
    with leased(place, idle_s=READING_S) as (ledger, lease):
        yield ledger, lease


@contextmanager
def leased(
    place: Postgres, *, follows: int | None = None, idle_s: float | None = None
) -> Iterator[tuple[Ledger, Lease]]:
    """Open a ledger to write as long as a lease holds; see there. Raises JobError when the driver is missing."""
    postgres()  # says so
    from enrich.store.lease import Lease  # noqa: PLC0415 - few need it

    with (
        Lease(place, follows=follows, idle_s=idle_s) as lease,
        closing(Ledger(place, fence=lease.fence, patience_s=OUTAGE_S)) as ledger,
    ):
        yield ledger, lease


@contextmanager
def alone(place: LedgerPlace) -> Iterator[Fence | None]:
    """Hold a ledger with which nobody is at work, and let no run begin meanwhile; yield what fences our own writing.

    A worker may be at work though nobody holds the lock: one whose run was killed. Raises LedgerLocked.
    """
    with hold(place, 0):
        if not isinstance(place, Postgres):
            yield None
            return
        with leased(place) as (ledger, lease):
            with ledger.transaction():
                others = ledger.others()
            if others:
                names = ", ".join(other.name for other in others)
                raise LedgerLocked(f"{place}: a run has left processes behind: {names}", "they leave soon: try again")
            yield lease.fence

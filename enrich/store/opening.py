"""A ledger opened for an execution: one on a server with the lease of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from enrich.place import LedgerPlace, Postgres
from enrich.store.dialect import OUTAGE_S
from enrich.store.ledger import Ledger
from enrich.store.server import postgres

if TYPE_CHECKING:
    from enrich.store.lease import Lease

#: Who leads an execution reads the input in one transaction, and may wait for a slow disk meanwhile.
READING_S = 600.0


@contextmanager
def opened(place: LedgerPlace) -> Iterator[tuple[Ledger, Lease | None]]:
    """Open a ledger to write; what is on a server is written as long as the lease holds. The caller holds the lock."""
    if not isinstance(place, Postgres):
        with closing(Ledger(place)) as ledger:
            yield ledger, None
        return
    with leased(place, leads=True, idle_s=READING_S) as (ledger, lease):
        yield ledger, lease


@contextmanager
def leased(place: Postgres, *, leads: bool = False, idle_s: float | None = None) -> Iterator[tuple[Ledger, Lease]]:
    """Open a ledger to write as long as a lease holds; see there. Raises JobError when the driver is missing."""
    postgres()  # says so
    from enrich.store.lease import Lease  # noqa: PLC0415 - few need it

    with (
        Lease(place, leads=leads, idle_s=idle_s) as lease,
        closing(Ledger(place, fence=lease.fence, patience_s=OUTAGE_S)) as ledger,
    ):
        yield ledger, lease

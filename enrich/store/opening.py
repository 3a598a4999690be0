"""A ledger opened for an execution, or held without one: on a server with the lease of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from enrich.errors import LedgerLocked
from enrich.job.locations import LedgerLocation, PostgresLocation
from enrich.store.dialect import OUTAGE_TIMEOUT_S
from enrich.store.ledger import Ledger
from enrich.store.lock import lock_ledger
from enrich.store.server import load_postgres

if TYPE_CHECKING:
    from enrich.store.lease import Lease
    from enrich.store.postgres import FencingToken

#: Who leads an execution reads the input in one transaction, and may wait for a slow disk meanwhile.
INPUT_IDLE_TIMEOUT_S = 600.0


@contextmanager
def open_for_run(location: LedgerLocation) -> Iterator[tuple[Ledger, Lease | None]]:
    """Open a ledger to write; what is on a server is written as long as the lease holds. The caller holds the lock."""
    if not isinstance(location, PostgresLocation):
        with closing(Ledger(location)) as ledger:
            ledger.watch_files()
            yield ledger, None
        return
    with open_leased(location, idle_timeout_s=INPUT_IDLE_TIMEOUT_S) as (ledger, lease):
        yield ledger, lease


@contextmanager
def open_leased(
    location: PostgresLocation, *, leader_id: int | None = None, idle_timeout_s: float | None = None
) -> Iterator[tuple[Ledger, Lease]]:
    """Open a ledger to write as long as a lease holds; see there. Raises JobError when the driver is missing."""
    load_postgres()  # says so
    from enrich.store.lease import Lease  # noqa: PLC0415 - few need it

    with (
        Lease(location, leader_id=leader_id, idle_timeout_s=idle_timeout_s) as lease,
        closing(Ledger(location, fencing_token=lease.fencing_token, open_timeout_s=OUTAGE_TIMEOUT_S)) as ledger,
    ):
        yield ledger, lease


@contextmanager
def open_exclusive(location: LedgerLocation) -> Iterator[FencingToken | None]:
    """Hold a ledger with which nobody is at work, and let no run begin meanwhile; yield what fences our own writing.

    A worker may be at work though nobody holds the lock: one whose run was killed. Raises LedgerLocked.
    """
    with lock_ledger(location, 0):
        if not isinstance(location, PostgresLocation):
            yield None
            return
        with open_leased(location) as (ledger, lease):
            with ledger.transaction():
                other_holders = ledger.other_holders()
            if other_holders:
                names = ", ".join(other.name for other in other_holders)
                raise LedgerLocked(
                    f"{location}: a run has left processes behind: {names}", "they leave soon: try again"
                )
            yield lease.fencing_token

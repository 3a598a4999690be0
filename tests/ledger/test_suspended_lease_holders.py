"""A suspended process holds a lease or lock while others wait: they continue, and it notices when it resumes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from enrich.errors import LeaseLost
from enrich.job.locations import PostgresLocation as Place
from enrich.job.locations import parse_ledger_location
from enrich.ledger import postgres_schema, records
from enrich.ledger.database import Database
from enrich.ledger.dialect import TransactionInterrupted
from enrich.ledger.lock import Lease, is_locked, lock_ledger
from tests.support.ledger import run_sql
from tests.support.postgres import PostgresServer
from tests.support.workspace import wait_until

TIMEOUT_S = 60


@pytest.fixture
def ledger_location(postgres: PostgresServer, tmp_path: Path) -> Place:
    """Return a location with leases of one second."""
    found = parse_ledger_location(tmp_path, f"{postgres.ledger_url()}&lease=1", tmp_path)
    assert isinstance(found, Place)
    return found


def is_idle_in_transaction(ledger_location: Place, pid: int) -> bool:
    """Return whether the connection still exists on the server."""
    return bool(run_sql(ledger_location, "SELECT 1 FROM pg_stat_activity WHERE pid = ?", pid))


@pytest.mark.long
def test_idle_transaction_is_retried(ledger_location: Place) -> None:
    """The server ends an idle transaction; the process gets `TransactionInterrupted` and may try again."""
    with Lease(ledger_location) as lease:
        ledger = Database(ledger_location, fencing_token=lease.fencing_token)
        ledger.session.begin()
        pid = ledger.session._connection.info.backend_pid  # type: ignore[union-attr]
        wait_until(lambda: not is_idle_in_transaction(ledger_location, pid))
        with pytest.raises(TransactionInterrupted) as failure:
            records.newest_execution_id(ledger)
        ledger.rollback()
        assert ledger.reconnect(failure.value) is False
        with ledger.transaction():
            assert records.newest_execution_id(ledger) == 0
        ledger.close()


@pytest.mark.long
def test_unrenewable_lease_is_reported(ledger_location: Place) -> None:
    """A lease that can't be renewed raises `LeaseLost`: the process sends nothing more and does not wait for ever."""
    with Lease(ledger_location) as lease:

        def look() -> bool:
            lease.is_valid()  # raises when the lease is lost; it is also invalid while a renewal is late
            return False

        wait_until(lease.is_valid)
        run_sql(ledger_location, "DELETE FROM leases")
        with pytest.raises(LeaseLost):
            wait_until(look)


@pytest.mark.long
def test_lock_is_reacquired(ledger_location: Place) -> None:
    """After a lost connection, another process took the lock and left; the run takes the lock again."""
    lock_condition = "locktype = 'advisory' AND objid::bigint = (hashtext(?)::bigint & 4294967295)"

    def is_waiting() -> bool:
        return bool(
            run_sql(
                ledger_location,
                f"SELECT 1 FROM pg_locks WHERE {lock_condition} AND NOT granted",
                ledger_location.schema,
            )
        )

    def take_lock() -> None:
        """Wait for the lock, hold it for 1 s, and release it with the connection."""
        run_sql(
            ledger_location,
            "SELECT pg_advisory_lock(?, hashtext(?)), pg_sleep(1)",
            postgres_schema._LOCK_CLASS_ID,
            ledger_location.schema,
        )

    with lock_ledger(ledger_location, 0):
        waiting = threading.Thread(target=take_lock)
        waiting.start()
        wait_until(is_waiting)
        run_sql(
            ledger_location,
            f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE {lock_condition} AND granted",
            ledger_location.schema,
        )
        waiting.join()
        wait_until(lambda: is_locked(ledger_location) is True)
    assert is_locked(ledger_location) is False


@pytest.mark.long
def test_release_does_not_wait_for_server(own_postgres: PostgresServer, tmp_path: Path) -> None:
    """Releasing the lock does not wait for a stopped server."""
    ledger_location = parse_ledger_location(tmp_path, own_postgres.ledger_url(), tmp_path)
    locked, release = threading.Event(), threading.Event()

    def hold_lock() -> None:
        with lock_ledger(ledger_location, 0):
            locked.set()
            release.wait()

    holder = threading.Thread(target=hold_lock, daemon=True)
    holder.start()
    locked.wait()
    own_postgres.stop()
    release.wait(1)  # until the lock is next checked
    release.set()
    holder.join(TIMEOUT_S)
    assert not holder.is_alive()

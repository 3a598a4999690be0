"""Who falls silent while others wait for what it holds on the server: they go on, and it finds out."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from enrich.errors import LeaseLost
from enrich.place import Postgres as Place
from enrich.place import locate_ledger
from enrich.store import pgledger
from enrich.store.allowance import AllowanceRow
from enrich.store.dialect import Disturbed
from enrich.store.lease import Lease
from enrich.store.ledger import Ledger
from enrich.store.lock import hold, is_held
from tests.books import ask
from tests.harness import until
from tests.postgres import Postgres

ENOUGH_S = 60


@pytest.fixture
def place(postgres: Postgres, tmp_path: Path) -> Place:
    """Name a place with short leases."""
    found = locate_ledger(tmp_path, f"{postgres.url()}&lease=1", tmp_path)
    assert isinstance(found, Place)
    return found


def rests(place: Place, pid: int) -> bool:
    """Tell whether a connection is in the middle of a transaction."""
    return bool(ask(place, "SELECT 1 FROM pg_stat_activity WHERE pid = ?", pid))


def test_a_transaction_that_rested_too_long_is_done_again(place: Place) -> None:
    """The server ended it; whoever wakes up in the middle of one is told so, and may try again."""
    with Lease(place) as lease:
        ledger = Ledger(place, fence=lease.fence)
        ledger._db.begin()
        pid = ledger._db._connection.info.backend_pid  # type: ignore[attr-defined]
        until(lambda: not rests(place, pid))
        with pytest.raises(Disturbed) as failure:
            ledger.newest_execution()
        ledger.rollback()
        assert ledger.regain(failure.value) is False
        with ledger.transaction():
            assert ledger.newest_execution() == 0
        ledger.close()


def test_the_rate_is_not_held_by_who_is_silent(place: Place) -> None:
    """A process that was stopped while it had the row of the rate does not stop the others."""
    silent, other = AllowanceRow(place), AllowanceRow(place)
    has_it, done = threading.Event(), threading.Event()

    def rest(_: str | None, __: float) -> tuple[str, None]:
        has_it.set()
        done.wait(ENOUGH_S)
        return "silent", None

    thread = threading.Thread(target=silent.change, args=(rest,))
    thread.start()
    has_it.wait()
    waiting = threading.Thread(target=other.change, args=(lambda *_: ("other", None),))
    waiting.start()
    waiting.join(ENOUGH_S / 2)
    went_on = not waiting.is_alive()
    done.set()
    for each in (thread, waiting):
        each.join()
    assert went_on
    assert ask(place, "SELECT state FROM allowance") == [("silent",)]
    silent.close()
    other.close()


def test_who_can_not_renew_its_lease_is_told(place: Place) -> None:
    """It sends nothing more, and does not wait for ever to be sure again."""
    with Lease(place) as lease:
        assert lease.holds()
        ask(place, "DELETE FROM owners")
        with pytest.raises(LeaseLost):
            until(lambda: not lease.holds())


def test_the_lock_is_taken_again_when_another_let_go(place: Place) -> None:
    """Another was quicker after the connection was lost, saw that ours lives, and left."""
    ours = "locktype = 'advisory' AND objid::bigint = (hashtext(?)::bigint & 4294967295)"

    def in_line() -> bool:
        return bool(ask(place, f"SELECT 1 FROM pg_locks WHERE {ours} AND NOT granted", place.schema))

    def other() -> None:
        """Wait for it, have it for a while, and let go of it with the connection."""
        ask(place, "SELECT pg_advisory_lock(?, hashtext(?)), pg_sleep(1)", pgledger._LOCK, place.schema)

    with hold(place, 0):
        waiting = threading.Thread(target=other)
        waiting.start()
        until(in_line)
        ask(place, f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE {ours} AND granted", place.schema)
        waiting.join()
        until(lambda: is_held(place) is True)
    assert is_held(place) is False


@pytest.mark.long
def test_nobody_waits_long_at_the_end_for_a_lock_whose_server_is_away(own_postgres: Postgres, tmp_path: Path) -> None:
    """Whoever lets go of it needs no server any more."""
    place = locate_ledger(tmp_path, own_postgres.url(), tmp_path)
    lost, leave = threading.Event(), threading.Event()

    def lead() -> None:
        with hold(place, 0):
            lost.set()
            leave.wait()

    leader = threading.Thread(target=lead, daemon=True)
    leader.start()
    lost.wait()
    own_postgres.stop()
    leave.wait(1)  # until the lock is looked for
    leave.set()
    leader.join(ENOUGH_S)
    assert not leader.is_alive()

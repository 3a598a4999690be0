"""A rate divided among the workers of a run: never exceeded in sum, while they join, leave and are lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from math import inf

import pytest
from msgspec.structs import force_setattr

from enrich.cluster.worker import SHARE_CHECK_EVERY_S, WorkerRateLimiter
from enrich.errors import LeaseLost
from enrich.job.locations import LedgerLocation, PostgresLocation
from enrich.ledger.database import Database
from enrich.ledger.lock import Lease
from tests.support.ledger import run_sql


@pytest.fixture
def backend() -> str:
    """Use a ledger on a server."""
    return "server"


@pytest.fixture
def leader(ledger_location: LedgerLocation) -> Iterator[Lease]:
    """Return the lease that leads a run."""
    assert isinstance(ledger_location, PostgresLocation)
    Database(ledger_location).close()
    with Lease(ledger_location) as lease:
        yield lease


def join(stack: ExitStack, location: LedgerLocation, leader: Lease) -> Lease:
    """Return the lease of a worker that renews it only when the test says so."""
    assert isinstance(location, PostgresLocation)
    lease = Lease(location, leader_id=leader.fencing_token.lease_id)
    stack.callback(lease._ledger.close)
    return lease


def leave(location: LedgerLocation, lease: Lease) -> None:
    """End a lease."""
    run_sql(location, "DELETE FROM leases WHERE id = ?", lease.fencing_token.lease_id)


@pytest.mark.long
def test_shares_follow_the_workers(ledger_location: LedgerLocation, leader: Lease) -> None:
    """A worker that joins waits until all others have renewed; the rest share the rate of one that leaves."""
    with ExitStack() as stack:
        first = join(stack, ledger_location, leader)
        assert first.rate_share == 1

        second, third = (join(stack, ledger_location, leader) for _ in range(2))
        second._renew()
        assert (first.rate_share, second.rate_share, third.rate_share) == (1, 0, 0)

        first._renew()
        assert (first.rate_share, second.rate_share, third.rate_share) == (1 / 3, 0, 0)
        second._renew()  # the third joined later, and knows of it
        third._renew()
        assert (first.rate_share, second.rate_share, third.rate_share) == (1 / 3, 1 / 3, 1 / 3)

        leave(ledger_location, first)
        second._renew()
        assert (second.rate_share, third.rate_share) == (1 / 2, 1 / 3)
        with pytest.raises(LeaseLost):
            first._renew()


@pytest.mark.long
def test_worker_that_cannot_renew_keeps_others_waiting(ledger_location: LedgerLocation, leader: Lease) -> None:
    """A worker whose lease was revoked may still send until it ends: a worker that joins waits for that."""
    with ExitStack() as stack:
        silent = join(stack, ledger_location, leader)
        late = join(stack, ledger_location, leader)
        run_sql(ledger_location, "UPDATE leases SET seconds = 0 WHERE id = ?", silent.fencing_token.lease_id)
        late._renew()
        assert (silent.rate_share, late.rate_share) == (1, 0)
        leave(ledger_location, silent)
        late._renew()
        assert late.rate_share == 1


class RecordedLease(Lease):
    """A lease whose share is added to those of all others, in the order in which they change."""

    lock = threading.Lock()
    shares: dict[RecordedLease, float]
    largest_sum = 0.0
    #: The worker has ended: it sends nothing, whatever its share is.
    ended = False

    @property
    def rate_share(self) -> float:
        """Return the share."""
        return self.shares.get(self, 0.0)

    @rate_share.setter
    def rate_share(self, share: float) -> None:
        with self.lock:
            self.shares[self] = 0.0 if self.ended else share
            RecordedLease.largest_sum = max(RecordedLease.largest_sum, sum(self.shares.values()))


@pytest.mark.long
def test_sum_of_shares_is_never_exceeded(ledger_location: LedgerLocation, leader: Lease) -> None:
    """Workers join and leave at random; the shares of those that may send never add up to more than the rate."""
    assert isinstance(ledger_location, PostgresLocation)
    RecordedLease.shares, RecordedLease.largest_sum = {}, 0.0
    shared: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(4):
            threading.Event().wait(rng.uniform(0, 0.5))
            lease = RecordedLease(ledger_location, leader_id=leader.fencing_token.lease_id)
            with lease:
                threading.Event().wait(rng.uniform(0.2, 1.5))
                shared.append(round(1 / (lease.rate_share or inf)) if lease.rate_share else 0)
                lease.ended = True
                lease.rate_share = 0.0

    force_setattr(ledger_location, "lease_s", 2.0)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert 0.99 < RecordedLease.largest_sum < 1.000001
    assert len(set(shared)) > 2


@pytest.mark.long
def test_limiter_of_a_worker_keeps_its_share(ledger_location: LedgerLocation, leader: Lease) -> None:
    """Nothing is sent without a share or a valid lease, and never faster than the share of the ceiling."""
    limiter = WorkerRateLimiter(100.0)
    assert limiter.delay(0.0) == SHARE_CHECK_EVERY_S
    with ExitStack() as stack:
        limiter.lease = first = join(stack, ledger_location, leader)
        assert (limiter.delay(0.0), limiter.rate) == (0.0, 50.0)
        second = join(stack, ledger_location, leader)
        for lease in (first, second, first):
            lease._renew()
        for _ in range(200):
            limiter.delay(0.0)
            limiter.consume(0.0)
            limiter.record_answer(0.0)
        assert limiter.rate == 50.0  # half of the ceiling
        first._renewed_at -= 1_000_000
        assert limiter.delay(1_000.0) == SHARE_CHECK_EVERY_S
    unlimited = WorkerRateLimiter(inf)
    assert unlimited.delay(0.0) == 0

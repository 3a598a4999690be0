"""The short form of `tests.support.cluster_torture`: several workers share a ledger while machines fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cluster_torture import ClusterTortureReport, run_torture
from tests.support.postgres import PostgresServer
from tests.support.ray_head import start_ray_head

SHORT_INJECTIONS = {
    "workers killed": 2,
    "workers stopped for longer than a lease": 1,
    "restarts of the server": 1,
    "crashes of the server": 1,
    "runs killed": 1,
}


def assert_promises_kept(report: ClusterTortureReport) -> None:
    """Check that every promise was kept, and that enough faults were injected for the check to mean something."""
    assert report.passed, report.as_markdown()
    assert report.injected.total() >= 5, report.as_markdown()
    assert report.faults > 15
    assert report.accepted >= report.rows - report.in_doubt
    # The spread of requests also depends on the machine; without a shared rate it would be three times the limit.
    assert report.busiest_second < 2 * report.rate, report.as_markdown()


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_nothing_is_paid_twice_or_lost(tmp_path: Path, own_postgres: PostgresServer) -> None:
    """No request is paid twice or lost while Ray actors are killed or suspended and the server restarts and crashes."""
    with start_ray_head(own_postgres.environ) as head:
        report = run_torture(
            tmp_path, own_postgres, rows=150, workers=3, injections=SHORT_INJECTIONS, seed=5, head=head
        )
    assert_promises_kept(report)

"""What the ledger records besides requests: how long tasks took, from run to run."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from enrich.ledger import records
from enrich.ledger.verify import check_ledger
from tests.support.ledger import CALL, CommittingLedger
from tests.support.workspace import Workspace, make_leads, serve_api


def test_latencies_are_stored_per_call(tmp_path: Path) -> None:
    """Each call has its own latencies; the newest replace older ones."""
    ledger = CommittingLedger.open(tmp_path / "ledger.db")
    other = replace(CALL, enrichments=(*CALL.enrichments, 99))
    ledger.commit(records.save_latencies, CALL, [(1.0, 3.0), (2.0, 0.5)])
    ledger.commit(records.save_latencies, other, [(9.0, 1.0)])
    ledger.commit(records.save_latencies, CALL, [(4.0, 2.0)])
    assert records.load_latencies(ledger.wrapped, CALL) == [(4.0, 2.0)]
    assert records.load_latencies(ledger.wrapped, other) == [(9.0, 1.0)]
    ledger.commit(records.save_latencies, CALL, [(30.0, 1.0)], 100)
    assert records.load_latencies(ledger.wrapped, CALL, 100) == [(30.0, 1.0)]
    assert records.load_latencies(ledger.wrapped, CALL) == [(4.0, 2.0)]
    assert check_ledger(ledger.path).problems == []
    ledger.wrapped.close()


@pytest.mark.long
def test_second_run_uses_stored_latencies(tmp_path: Path) -> None:
    """The second run uses stored latencies and polls each task about once; the first had to measure them."""
    workspace = Workspace(tmp_path)
    workspace.write_job()
    polls = []
    with serve_api(tmp_path / "api.db", latency="fixed(0.8)") as api:
        for run_number in range(2):
            workspace.write_leads(make_leads(30, start=100 * run_number))
            summary = workspace.run_job(api)
            polls.append(summary.polls)
    assert polls[1] < polls[0]
    assert polls[1] <= 1.5 * 30
    ((rows, seconds),) = workspace.sql("SELECT count(*), sum(seconds * answers) / sum(answers) FROM latencies")
    assert rows < 151
    assert 0.5 < seconds < 1.5

"""Short forms of `tests.support.torture`, and tests that its check detects violations."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from enrich.job.target import TargetKind
from tests.support.cases import in_turn
from tests.support.torture import MAX_IN_DOUBT, TortureReport, remove_ledger, run_torture
from tests.support.workspace import Workspace

pytestmark = pytest.mark.long


def test_torture_single(tmp_path: Path) -> None:
    """Keeps every guarantee through kills, a suspend, all faults at once, and changing leads."""
    report = run_torture(tmp_path, rows=80, kills=6, seed=3)

    assert report.passed, report.as_markdown()
    assert report.kills.total() == 6
    assert report.stops >= 1
    assert report.faults > 15
    assert report.proxy_faults.total() > 0
    assert report.clock_steps > 5
    assert report.ledger_away == 1
    assert report.max_in_flight_at_kill <= MAX_IN_DOUBT
    assert report.accepted >= 80 - report.in_doubt


def test_torture_bulk(tmp_path: Path) -> None:
    """Keeps the same guarantees with tasks of five leads; a kill interrupts at most four of them."""
    report = run_torture(tmp_path, rows=120, kills=5, seed=11, bulk=5)

    assert report.passed, report.as_markdown()
    assert report.kills.total() == 5
    assert report.faults > 5
    assert report.accepted >= 120 - report.in_doubt


def test_torture_enrichment(tmp_path: Path) -> None:
    """Keeps the same guarantees when an enrichment is asked."""
    report = run_torture(tmp_path, rows=60, kills=4, seed=7, kind=TargetKind.ENRICHMENT)

    assert report.passed, report.as_markdown()
    assert report.kills.total() == 4
    assert report.faults > 5
    assert report.accepted >= 60 - report.in_doubt


#: Leads of the falsified jobs: enough for some matches.
ROWS = 12


def _falsify_request(workspace: Workspace, sql: str) -> bool:
    """Change one request of a permanent lead with a match; return whether there was one."""
    if not workspace.ledger_path.exists():
        return False
    is_permanent = f"CAST(substr(json_extract(params, '$.first_name'), 6) AS INTEGER) < {ROWS}"
    chosen = f"(SELECT min(attempt_id) FROM requests WHERE state = 'found' AND {is_permanent})"
    with closing(sqlite3.connect(workspace.ledger_path)) as db, db:
        another = f"(SELECT answer FROM attempts WHERE state = 'found' AND id <> {chosen})"
        return db.execute(sql.format(chosen, another=another)).rowcount == 1


@in_turn(
    ("sql", "report_field"),
    [
        ("UPDATE requests SET state = 'pending', queue_position = NULL WHERE attempt_id = {}", "paid_twice"),
        ("UPDATE attempts SET task_id = 'another' WHERE id = {}", "lost"),
        ("UPDATE attempts SET answer = {another} WHERE id = {}", "misassigned_rows"),
        ("UPDATE requests SET state = 'expired', answer_id = NULL WHERE attempt_id = {}", "lost"),
    ],
    ids=["bought again", "forgotten", "another's", "not fetched"],
)
def test_audit_check_detects_falsified_ledger(tmp_path: Path, sql: str, report_field: str) -> None:
    """Detects a ledger that was falsified between two runs."""
    report = run_torture(
        tmp_path,
        rows=ROWS,
        kills=1,
        seed=5,
        faults=(),
        extra_faults=False,
        tamper=lambda workspace: _falsify_request(workspace, sql),
    )

    assert not report.passed
    result = getattr(report, report_field)
    assert (result if isinstance(result, int) else len(result)) == 1, report.as_markdown()


@in_turn(
    ("code", "ignored_count"),
    [("exit(1)", 0), ("exit(0)", 1), ("exit(14)", 1), ("print('this is a bug', file=stderr); exit(1)", 1)],
)
@in_turn("replaced", [False, True])
def test_audit_check_detects_ignored_ledger_loss(
    tmp_path: Path, code: str, ignored_count: int, *, replaced: bool
) -> None:
    """Requires exit 1 with a message; the ledger is back in its place whatever replaced it."""
    workspace, report = Workspace(tmp_path), TortureReport(1, 1)
    workspace.ledger_path.parent.mkdir()
    workspace.ledger_path.write_text("the ledger")
    put = f"from sys import *; from pathlib import *; Path({str(workspace.ledger_path)!r}).write_text('new'); "
    process = subprocess.Popen(
        [sys.executable, "-c", f"input(); {put}{code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    process.stdin.write("\n")
    remove_ledger(workspace, process, report, replaced=replaced)
    assert (report.ledger_away, report.missing_ledger_ignored) == (1, ignored_count)
    assert workspace.ledger_path.read_text() == "the ledger"

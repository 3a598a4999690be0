"""Stored progress snapshots: what an execution records while it runs equals what happened."""

from __future__ import annotations

import json
import sqlite3
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.ledger import records
from enrich.ledger.database import Database
from enrich.run.progress import (
    MAX_BINS,
    Phase,
    ProgressSnapshot,
    Traffic,
    TrafficCounts,
    TrafficRecorder,
    read_snapshot,
)
from tests.support.cases import in_turn
from tests.support.workspace import BOTH_BACKENDS, SandboxApi, Workspace, make_leads, serve_api

#: Seconds until the next tick, and the counts until then.
TICKS = st.lists(
    st.tuples(st.floats(0, 5_000) | st.floats(0, 3), st.builds(TrafficCounts, *[st.integers(0, 500)] * 4)),
    max_size=60,
)


def add_counts(one: TrafficCounts, other: TrafficCounts) -> TrafficCounts:
    """Add two counts."""
    return TrafficCounts(*(a + b for a, b in zip(one, other, strict=True)))


@given(TICKS)
def test_bins_sum_to_totals(ticks: list[tuple[float, TrafficCounts]]) -> None:
    """The bins sum to the totals for any pattern of ticks, and their number is limited."""
    meter, at_s, seen = TrafficRecorder(), 0.0, TrafficCounts()
    for passed_s, happened in ticks:
        at_s, seen = at_s + passed_s, add_counts(seen, happened)
        meter.record(at_s, seen)

    traffic = meter.traffic()
    assert traffic.totals() == seen
    assert len(traffic.submitted) == (int(at_s // traffic.width_s) + 1 if ticks else 0)
    assert len({len(bins) for bins in (traffic.submitted, traffic.answered, traffic.polls, traffic.rate_limited)}) == 1
    assert len(traffic.submitted) <= MAX_BINS


@given(TICKS)
def test_merged_bins_keep_boundaries(ticks: list[tuple[float, TrafficCounts]]) -> None:
    """Each tick is in the bin of its time, even after bins were merged."""
    meter, seen = TrafficRecorder(), TrafficCounts()
    times = list(accumulate(passed_s for passed_s, _ in ticks))
    for at_s, (_, happened) in zip(times, ticks, strict=True):
        seen = add_counts(seen, happened)
        meter.record(at_s, seen)

    traffic = meter.traffic()
    expected = [0] * len(traffic.polls)
    for at_s, (_, happened) in zip(times, ticks, strict=True):
        expected[int(at_s // traffic.width_s)] += happened.polls
    assert list(traffic.polls) == expected


def test_pause_gives_empty_bins() -> None:
    """An hour without ticks gives empty bins, and later counts are in later bins."""
    meter = TrafficRecorder()
    meter.record(0.5, TrafficCounts(submitted=3))
    meter.record(3600.5, TrafficCounts(submitted=5))

    traffic = meter.traffic()
    assert (traffic.submitted[0], sum(traffic.submitted[1:-1]), traffic.submitted[-1]) == (3, 0, 2)
    assert traffic.width_s == 16


def test_clock_going_back() -> None:
    """After the clock goes back, counts belong to the latest known time; a count that decreased adds nothing."""
    traffic = TrafficRecorder()
    traffic.record(5.0, TrafficCounts(polls=4))
    traffic.record(1.0, TrafficCounts(polls=6))
    traffic.record(5.5, TrafficCounts(polls=2))

    assert traffic.traffic().polls == (0, 0, 0, 0, 0, 6)


def test_current_speed() -> None:
    """The current speed weighs the unfinished bin by its elapsed part."""
    traffic = Traffic(
        width_s=4, submitted=(40, 8, 4, 4, 1), answered=(0, 0, 4, 6, 1), polls=(0,) * 5, rate_limited=(0,) * 5
    )

    recent, over_s = traffic.recent(elapsed_s=16.5)

    assert (recent.submitted, recent.answered, over_s) == (17, 11, 12.5)
    assert traffic.recent(0.0) == (TrafficCounts(57, 11), 0.0)


@in_turn("text", [None, "", "{}", "[]", '{"at_ms": 1}'])
def test_invalid_progress_is_none(text: str | None) -> None:
    """Missing or invalid stored progress, as of an older version, is None."""
    assert read_snapshot(text) is None


def stored_progress(workspace: Workspace, execution: int = 1) -> ProgressSnapshot:
    """Return an execution's stored progress."""
    with_ledger = workspace.open_ledger()
    snapshot = read_snapshot(records.read_execution(with_ledger, execution).progress)
    with_ledger.close()
    assert snapshot is not None
    return snapshot


def assert_matches_summary(snapshot: ProgressSnapshot, summary: Any) -> None:
    """The last progress has the numbers of the run summary."""
    totals = snapshot.traffic.totals()
    assert (totals.submitted, totals.polls, totals.rate_limited) == (
        summary.submitted,
        summary.polls,
        summary.rate_limited,
    )
    assert snapshot.spent == round(summary.credits_spent * 1_000_000)
    assert snapshot.done == sum(snapshot.states.values())
    assert snapshot.elapsed_s <= summary.elapsed_s + 0.001


@BOTH_BACKENDS
@pytest.mark.long
def test_final_progress_matches_summary(tmp_path: Path, workspace: Workspace) -> None:
    """The last progress contains all requests and answers, including rate-limited ones."""
    workspace.write_leads(make_leads(15))
    with serve_api(tmp_path / "api.db", rate=100.0, burst=1, retry_after=None) as api:
        summary = workspace.run_job(api)

    snapshot = stored_progress(workspace)
    assert summary.exit_code == 0
    assert_matches_summary(snapshot, summary)
    assert snapshot.traffic.totals().answered == snapshot.done == snapshot.total == 15
    assert (snapshot.found, snapshot.in_flight, snapshot.doing) == (summary.found, 0, Phase.COLLECT)


@pytest.mark.long
def test_progress_includes_canary_and_earlier_tasks(tmp_path: Path, workspace: Workspace) -> None:
    """Tasks of an earlier execution and the canary's rows are in the progress."""
    workspace.write_leads(make_leads(3))
    with serve_api(tmp_path / "api.db", latency="fixed(600)") as api:
        workspace.submit_without_collecting(api)
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        api.advance(601)
        workspace.write_job(canary="{rows: 2, min_hit_rate: 1.0}")
        workspace.write_leads(make_leads(20))
        summary = workspace.run_job(api)

    snapshot = stored_progress(workspace, 2)
    assert summary.exit_code == 15
    assert_matches_summary(snapshot, summary)
    assert (snapshot.done, snapshot.total) == (3 + 2, 3 + 17)


@BOTH_BACKENDS
def test_progress_of_interrupted_run(api: SandboxApi, workspace: Workspace) -> None:
    """An unconfirmed request counts as done for this execution; with a broken input, the total is unknown."""
    workspace.write_leads(make_leads(2))
    api.inject_fault("no-task-id")
    summary = workspace.run_job(api)
    assert summary.exit_code == 14
    assert stored_progress(workspace).states == {"in_doubt": 1, **({"found": 1} if summary.found else {"not_found": 1})}

    workspace.write_leads([*make_leads(2), ["a"]])
    broken = workspace.run_job(api)
    assert broken.exit_code == 5
    assert (stored_progress(workspace, 2).total, stored_progress(workspace, 2).done) == (None, 0)


def test_progress_write_error_is_exit_1(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress that can't be stored is exit 1 with its reason, and nothing more is sent."""
    workspace.write_leads(make_leads(3))

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(records, "save_progress", full)
    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert result.exit_code == 1
    assert "the ledger cannot be written: database or disk is full" in result.stderr
    assert api.audit()["accepted"] == 0


def test_no_progress_after_end(api: SandboxApi, workspace: Workspace) -> None:
    """After an execution has ended, its last progress is not replaced."""
    workspace.write_leads(make_leads(1))
    workspace.run_job(api)
    before = stored_progress(workspace)
    ledger = Database(workspace.ledger_location)
    with ledger.transaction():
        records.save_progress(ledger, 1, json.dumps({"late": True}))
    ledger.close()

    assert stored_progress(workspace) == before

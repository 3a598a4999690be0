"""Marks in the ledger what the input wants, block by block, on all machines of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from enrich.cluster.blocks import SharedPass, map_blocks, split_input
from enrich.cluster.presence import HeartbeatMonitor
from enrich.errors import CommandRefused
from enrich.ledger.ledger import Ledger
from enrich.rows.reader import JobInput
from enrich.rows.requests import RowBatch
from enrich.run.cluster import EnrollCounts


def enroll_on_ray(
    rows: JobInput,
    shared_pass: SharedPass,
    monitor: HeartbeatMonitor,
    *,
    on_progress: Callable[[EnrollCounts], None] = lambda _: None,
) -> EnrollCounts:
    """Enroll all rows in a pass that the caller has begun; the caller chooses and marks.

    `tell` hears now and then what was read so far. Raises what the watch raises, Refused when the input can't
    be read or depends on the order of its rows, LedgerFailed, LeaseLost, ClusterFailed.
    """
    if reason := rows.why_not_parallel():
        raise CommandRefused(f"the input can't be enrolled part by part: {reason}", "enroll it in one process")
    parts = split_input(rows, monitor)
    total = EnrollCounts()
    for some in map_blocks(rows, parts, partial(_enroll, shared_pass), monitor):
        total += some
        on_progress(total)
    if total.rows != (expected := sum(part.rows for part in parts)):
        raise CommandRefused(
            f"{total.rows:,} rows were read, not {expected:,}", "start again when the files are complete"
        )
    return total


def _enroll(shared_pass: SharedPass, rows: JobInput) -> EnrollCounts:
    """Enroll the rows of a block. Done again it changes nothing."""
    total = EnrollCounts()
    for batch in rows.batches(shared_pass.template):

        def enroll(ledger: Ledger, batch: RowBatch = batch) -> None:
            # A commit for each batch: its requests are locked in their order, so that nobody waits in a circle.
            with ledger.transaction():
                ledger.enroll(shared_pass.template.call, batch.requests())

        shared_pass.with_ledger(enroll)
        total += EnrollCounts.from_batch(batch)
    return total

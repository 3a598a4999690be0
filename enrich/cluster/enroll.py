"""Marks in the ledger what the input wants, block by block, on all machines of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from enrich.asking import Batch
from enrich.cluster.blocks import Pass, divided, on_blocks
from enrich.cluster.presence import Watch
from enrich.engine import Enrolled
from enrich.errors import Refused
from enrich.rows import Rows
from enrich.store.ledger import Ledger


def enroll_on_ray(
    rows: Rows,
    taken: Pass,
    watch: Watch,
    *,
    tell: Callable[[Enrolled], None] = lambda _: None,
) -> Enrolled:
    """Enroll all rows in a pass that the caller has begun; the caller chooses and marks.

    `tell` hears now and then what was read so far. Raises what the watch raises, Refused when the input can't
    be read or depends on the order of its rows, LedgerFailed, LeaseLost, ClusterFailed.
    """
    if reason := rows.undivided():
        raise Refused(f"the input can't be enrolled part by part: {reason}", "enroll it in one process")
    parts = divided(rows, watch)
    total = Enrolled()
    for some in on_blocks(rows, parts, partial(_enroll, taken), watch):
        total += some
        tell(total)
    if total.rows != (expected := sum(part.rows for part in parts)):
        raise Refused(f"{total.rows:,} rows were read, not {expected:,}", "start again when the files are complete")
    return total


def _enroll(taken: Pass, rows: Rows) -> Enrolled:
    """Enroll the rows of a block. Done again it changes nothing."""
    total = Enrolled()
    for batch in rows.batches(taken.question):

        def enroll(ledger: Ledger, batch: Batch = batch) -> None:
            # A commit for each batch: its requests are locked in their order, so that nobody waits in a circle.
            with ledger.transaction():
                ledger.enroll(taken.question.call, batch.asked())

        taken.with_ledger(enroll)
        total += Enrolled.of(batch)
    return total

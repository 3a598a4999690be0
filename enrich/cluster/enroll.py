"""Marks in the ledger what the input wants, block by block, on all machines of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from enrich.asking import Batch
from enrich.cluster.blocks import Check, Pass, divided, on_blocks
from enrich.engine import Enrolled
from enrich.errors import Refused
from enrich.rows import Rows
from enrich.store.ledger import Ledger


def enroll_on_ray(
    rows: Rows,
    taken: Pass,
    *,
    accept_doubts: bool = False,
    tell: Callable[[Enrolled], None] = lambda _: None,
    check: Check = lambda: None,
) -> Enrolled:
    """Enroll all rows in a pass that the caller has begun; the caller chooses and marks.

    `tell` hears now and then what was read so far; `check` may raise to give up. Raises Refused when the input can't
    be read or depends on the order of its rows, LedgerFailed, LeaseLost, ClusterFailed.
    """
    if reason := rows.undivided():
        raise Refused(f"the input can't be enrolled part by part: {reason}", "enroll it in one process")
    parts = divided(rows, check)
    total = Enrolled()
    for some in on_blocks(rows, parts, partial(_enroll, taken, accept_doubts), check):
        total += some
        tell(total)
    if total.rows != (expected := sum(part.rows for part in parts)):
        raise Refused(f"{total.rows:,} rows were read, not {expected:,}", "start again when the files are complete")
    return total


def _enroll(taken: Pass, accept_doubts: bool, rows: Rows) -> Enrolled:  # noqa: FBT001 - bound by its place
    """Enroll the rows of a block. Done again it changes nothing."""
    total = Enrolled()
    for batch in rows.batches(taken.question):

        def enroll(ledger: Ledger, batch: Batch = batch) -> int:
            # A commit for each batch: its requests are locked in their order, so that nobody waits in a circle.
            with ledger.transaction():
                given_up = ledger.accept_doubts(batch.asked()) if accept_doubts else 0
                ledger.enroll(taken.question.call, batch.asked())
            return given_up

        total += Enrolled.of(batch, taken.with_ledger(enroll))
    return total

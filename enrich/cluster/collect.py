"""Joins rows and answers into a dataset, block by block, on all machines of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import polars as pl

from enrich.cluster.blocks import Pass, divided, on_blocks
from enrich.cluster.presence import Watch
from enrich.collector import Collector, Counted, output_schema
from enrich.errors import Refused
from enrich.place import Place
from enrich.rows import Rows
from enrich.store.ledger import Ledger
from enrich.tables.dataset import Draft, begin
from enrich.tables.manifest import PartFile


def collect_on_ray(
    rows: Rows,
    taken: Pass,
    target: Place,
    watch: Watch,
    *,
    tell: Callable[[Counted], None] = lambda _: None,
) -> Counted:
    """Write the output, a dataset, from the input and the ledger alone, in a pass that was enrolled.

    `tell` hears now and then what was written so far. Raises what the watch raises, Refused when the input
    can't be read or the output can't be written, LedgerFailed, ClusterFailed.
    """
    if not taken.job.model.dedupe:
        raise Refused(f"the output can't be collected part by part: {rows.undivided()}", "collect it in one process")
    parts = divided(rows, watch)
    draft = begin(target, taken.job.name)
    try:
        files: list[PartFile] = []
        total = Counted()
        collect = partial(_collect, taken, draft)
        for file, counted in on_blocks(rows, parts, collect, watch):
            files.append(file)
            total += counted
            tell(total)
        if not files:
            schema = output_schema(rows, taken.question, indexed=True)
            files = [draft.write_part(0, schema, [pl.DataFrame(schema=schema)])]
        if sum(file.rows for file in files) != sum(part.rows for part in parts):
            raise Refused("rows of the output are missing", "start again when the files are complete")
        draft.finish(files)
    except BaseException:
        draft.discard()
        raise
    return total


def _collect(taken: Pass, draft: Draft, rows: Rows) -> tuple[PartFile, Counted]:
    """Write the part of a block. Done again it writes the same."""

    def write(ledger: Ledger) -> tuple[PartFile, Counted]:
        counted = Counted()
        collector = Collector(ledger, taken.job, taken.question, rows)
        schema = output_schema(rows, taken.question, indexed=True)
        return draft.write_part(rows.first, schema, collector.frames(counted, indexed=True)), counted

    return taken.with_ledger(write)

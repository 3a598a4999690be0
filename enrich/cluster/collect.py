"""Joins rows and answers into a dataset, block by block, on all machines of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import polars as pl

from enrich.cluster.blocks import SharedPass, map_blocks, split_input
from enrich.cluster.presence import HeartbeatMonitor
from enrich.errors import CommandRefused
from enrich.files.manifest import PartFile
from enrich.files.parquet_dataset import DatasetWriter, begin_dataset
from enrich.job.locations import Location
from enrich.ledger.ledger import Ledger
from enrich.rows.reader import JobInput
from enrich.run.collector import Collector, OutputCounts, output_schema


def collect_on_ray(
    rows: JobInput,
    shared_pass: SharedPass,
    target: Location,
    monitor: HeartbeatMonitor,
    *,
    on_progress: Callable[[OutputCounts], None] = lambda _: None,
) -> OutputCounts:
    """Write the output, a dataset, from the input and the ledger alone, in a pass that was enrolled.

    `tell` hears now and then what was written so far. Raises what the watch raises, Refused when the input
    can't be read or the output can't be written, LedgerFailed, ClusterFailed.
    """
    if not shared_pass.job.model.dedupe:
        raise CommandRefused(
            f"the output can't be collected part by part: {rows.why_not_parallel()}", "collect it in one process"
        )
    parts = split_input(rows, monitor)
    draft = begin_dataset(target, shared_pass.job.name)
    try:
        files: list[PartFile] = []
        total = OutputCounts()
        collect = partial(_collect, shared_pass, draft)
        for file, counted in map_blocks(rows, parts, collect, monitor):
            files.append(file)
            total += counted
            on_progress(total)
        if not files:
            schema = output_schema(rows, shared_pass.template, with_index=True)
            files = [draft.write_part(0, schema, [pl.DataFrame(schema=schema)])]
        if sum(file.rows for file in files) != sum(part.rows for part in parts):
            raise CommandRefused("rows of the output are missing", "start again when the files are complete")
        draft.finish(files)
    except BaseException:
        draft.discard()
        raise
    return total


def _collect(shared_pass: SharedPass, draft: DatasetWriter, rows: JobInput) -> tuple[PartFile, OutputCounts]:
    """Write the part of a block. Done again it writes the same."""

    def write(ledger: Ledger) -> tuple[PartFile, OutputCounts]:
        counted = OutputCounts()
        collector = Collector(ledger, shared_pass.job, shared_pass.template, rows)
        schema = output_schema(rows, shared_pass.template, with_index=True)
        return draft.write_part(rows.first_position, schema, collector.frames(counted, with_index=True)), counted

    return shared_pass.with_ledger(write)

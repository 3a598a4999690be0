"""The files beside the output: rows to mend and feed back, and what is new since the last time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import polars as pl

from enrich.collector import Collector, JoinedBatch, to_cell
from enrich.databar.answers import result_fields, value_at
from enrich.files.values import as_text
from enrich.files.writer import write_file
from enrich.job.locations import Location
from enrich.job.spec import Changes, Output
from enrich.model import RowStatus, iso_time
from enrich.rows.requests import CHANGE_COLUMNS

#: Rows of these can be mended, or asked again.
REJECTED_STATUSES = (RowStatus.INVALID, RowStatus.FAILED, RowStatus.EXPIRED)
#: The columns of a reject behind those of the input; when it is fed back, they are replaced.
REJECT_COLUMNS = ("enrich_status", "enrich_error")


def write_rejects(collector: Collector, target: Location, output: Output) -> int:
    """Write the rows that are invalid, failed or expired, as they were and why; return how many."""
    count = 0

    def frames() -> Iterator[pl.DataFrame]:
        nonlocal count
        for joined in collector.joined_batches():
            reason_cells = [joined.cells[name] for name in REJECT_COLUMNS]
            frame = joined.batch.frame.hstack(reason_cells).filter(pl.col("enrich_status").is_in(REJECTED_STATUSES))
            count += frame.height
            yield frame

    schema = collector.job_input.schema | dict.fromkeys(REJECT_COLUMNS, pl.String())
    write_file(
        target,
        output,
        job=collector.job.name,
        schema=schema,
        frames=frames(),
        new_columns=len(REJECT_COLUMNS),
        kind="rejects",
    )
    return count


def write_changes(collector: Collector, target: Location, changes: Changes) -> int:
    """Write what is new since the last feed, one line a field; return how many lines.

    What is told is remembered in the caller's transaction: when that fails, it is told again.
    """
    key = collector.job_input.change_key
    schema = dict.fromkeys([*key, *CHANGE_COLUMNS], pl.String())
    count = 0

    def frames() -> Iterator[pl.DataFrame]:
        nonlocal count
        for joined in collector.joined_batches():
            lines = list(_changed_cells(collector, joined, key))
            count += len(lines)
            yield pl.DataFrame(lines, schema=schema, orient="row")

    write_file(
        target,
        changes,
        job=collector.job.name,
        schema=schema,
        frames=frames(),
        new_columns=len(CHANGE_COLUMNS),
        kind="changes",
    )
    return count


def _changed_cells(collector: Collector, joined: JoinedBatch, key: list[str]) -> Iterator[list[str | None]]:
    """Yield the changes of a page, and remember them as told."""
    job, columns = collector.job.name, collector.template.columns
    keys = joined.batch.frame.select(as_text(joined.batch.frame.get_column(name)) for name in key).rows()
    delivered: list[tuple[int, bytes, int]] = []
    statuses = joined.cells["enrich_status"]
    for index, (result, fingerprint, status) in enumerate(
        zip(joined.results, joined.batch.fingerprints, statuses, strict=True)
    ):
        if result is None or fingerprint is None or result.attempt_id is None:
            continue
        if status == RowStatus.FOUND and result.erased_ms is None:
            delivered.append((index, _delivery_key(keys[index], fingerprint), result.attempt_id))
    merged_columns = {name: collector.merge_column(joined, name) for name in collector.merged_columns}
    for index, previous_answer in collector.ledger.undelivered_rows(job, delivered):
        result, previous_fields = joined.results[index], _answer_fields(previous_answer)
        for name, path in columns.items():
            if name in merged_columns:
                old, new = as_text(joined.batch.frame.get_column(name))[index], merged_columns[name][index]
            else:
                old, new = to_cell(value_at(previous_fields, path)) or "", joined.cells[name][index] or ""
            if result is not None and new and new != old:
                at = None if result.settled_ms is None else iso_time(result.settled_ms)
                yield [*keys[index], name, old, new, result.provider, at]
    collector.ledger.mark_delivered(job, delivered)


def _delivery_key(cells: tuple[str, ...], fingerprint: bytes) -> bytes:
    return blake2b(json.dumps(cells).encode() + fingerprint, digest_size=16, person=b"enrich-delivered").digest()


def _answer_fields(answer: str | None) -> Mapping[str, Any]:
    return {} if answer is None else result_fields(json.loads(answer).get("data"))

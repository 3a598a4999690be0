"""The files beside the output: rows to mend and feed back, and what is new since the last time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import polars as pl

from enrich.api.answer import fields_of, pick
from enrich.asking import CHANGE_COLUMNS
from enrich.collector import Collector, Page, cell
from enrich.model import RowStatus, iso
from enrich.place import Place
from enrich.spec import Changes, Output
from enrich.tables.cells import as_text
from enrich.tables.writing import write

#: Rows of these can be mended, or asked again.
REJECTED = (RowStatus.INVALID, RowStatus.FAILED, RowStatus.EXPIRED)
#: The columns of a reject behind those of the input; when it is fed back, they are replaced.
REASON = ("enrich_status", "enrich_error")


def write_rejects(collector: Collector, target: Place, output: Output) -> int:
    """Write the rows that are invalid, failed or expired, as they were and why; return how many."""
    count = 0

    def frames() -> Iterator[pl.DataFrame]:
        nonlocal count
        for page in collector.pages():
            reason = [page.cells[name] for name in REASON]
            frame = page.batch.frame.hstack(reason).filter(pl.col("enrich_status").is_in(REJECTED))
            count += frame.height
            yield frame

    schema = collector.rows.schema | dict.fromkeys(REASON, pl.String())
    write(target, output, job=collector.job.name, schema=schema, frames=frames(), new=len(REASON), kind="rejects")
    return count


def write_changes(collector: Collector, target: Place, changes: Changes) -> int:
    """Write what is new since the last feed, one line a field; return how many lines.

    What is told is remembered in the caller's transaction: when that fails, it is told again.
    """
    key = collector.rows.key
    schema = dict.fromkeys([*key, *CHANGE_COLUMNS], pl.String())
    count = 0

    def frames() -> Iterator[pl.DataFrame]:
        nonlocal count
        for page in collector.pages():
            lines = list(_changed(collector, page, key))
            count += len(lines)
            yield pl.DataFrame(lines, schema=schema, orient="row")

    write(
        target, changes, job=collector.job.name, schema=schema, frames=frames(), new=len(CHANGE_COLUMNS), kind="changes"
    )
    return count


def _changed(collector: Collector, page: Page, key: list[str]) -> Iterator[list[str | None]]:
    """Yield the changes of a page, and remember them as told."""
    job, columns = collector.job.name, collector.question.columns
    keys = page.batch.frame.select(as_text(page.batch.frame.get_column(name)) for name in key).rows()
    told: list[tuple[int, bytes, int]] = []
    statuses = page.cells["enrich_status"]
    for index, (standing, fingerprint, status) in enumerate(
        zip(page.known, page.batch.fingerprints, statuses, strict=True)
    ):
        if standing is None or fingerprint is None or standing.attempt_id is None:
            continue
        if status == RowStatus.FOUND and standing.erased_ms is None:
            told.append((index, _row_key(keys[index], fingerprint), standing.attempt_id))
    merged = {name: collector.merge(page, name) for name in collector.merged}
    for index, before in collector.ledger.undelivered(job, told):
        standing, earlier = page.known[index], _fields(before)
        for name, path in columns.items():
            if name in merged:
                old, new = as_text(page.batch.frame.get_column(name))[index], merged[name][index]
            else:
                old, new = cell(pick(earlier, path)) or "", page.cells[name][index] or ""
            if standing is not None and new and new != old:
                at = None if standing.settled_ms is None else iso(standing.settled_ms)
                yield [*keys[index], name, old, new, standing.provider, at]
    collector.ledger.deliver(job, told)


def _row_key(cells: tuple[str, ...], fingerprint: bytes) -> bytes:
    return blake2b(json.dumps(cells).encode() + fingerprint, digest_size=16, person=b"enrich-delivered").digest()


def _fields(answer: str | None) -> Mapping[str, Any]:
    return {} if answer is None else fields_of(json.loads(answer).get("data"))

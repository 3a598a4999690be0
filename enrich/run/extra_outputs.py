"""Writes the files besides the output: rows to correct (`rejects`), and what is new since the last run (`changes`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import polars as pl

from enrich.files.limits import limits_of
from enrich.files.values import as_text
from enrich.files.writer import write_file
from enrich.job.locations import Location
from enrich.job.spec import Changes, Output
from enrich.ledger import change_feed
from enrich.models import RowStatus, iso_time
from enrich.rows.requests import CHANGE_COLUMNS
from enrich.run.answer_cells import answer_cells
from enrich.run.collector import Collector, JoinedBatch, JoinedStep

#: Rows with these statuses can be corrected or sent again.
REJECTED_STATUSES = (RowStatus.INVALID, RowStatus.FAILED, RowStatus.EXPIRED)
#: The columns of a rejects file after those of the input. They are replaced when the file is used as input.
REJECT_COLUMNS = ("enrich_status", "enrich_error")


def write_rejects(collector: Collector, target: Location, output: Output) -> int:
    """Write the invalid, failed and expired rows unchanged, with the reason. Returns how many."""
    count, limits = 0, limits_of("rejects", output)

    def frames() -> Iterator[pl.DataFrame]:
        nonlocal count
        for joined in collector.joined_batches():
            reason_cells = [limits.fit(joined.cells[name])[0] for name in REJECT_COLUMNS]
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
    """Write what is new since the last change feed, one line per field. Returns the number of lines.

    Delivery is recorded in the caller's transaction: if that fails, the same changes are written again.
    """
    key = collector.job_input.change_key
    schema = dict.fromkeys([*key, *CHANGE_COLUMNS], pl.String())
    count, limits = 0, limits_of("changes", changes)

    def frames() -> Iterator[pl.DataFrame]:
        nonlocal count
        for joined in collector.joined_batches():
            lines = list(_changed_cells(collector, joined, key))
            count += len(lines)
            frame = pl.DataFrame(lines, schema=schema, orient="row")
            yield pl.DataFrame([limits.fit(cells)[0] for cells in frame.get_columns()])

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
    """Yield the changes of a batch, and record them as delivered."""
    frame = joined.batch.frame
    keys = frame.select(as_text(frame.get_column(name)) for name in key).rows()
    merged = {
        name: (as_text(frame.get_column(name)), as_text(collector.merge_column(joined, name)))
        for name in collector.merged_columns
    }
    feeds = [_deliver(collector, step, keys) for step in joined.steps]
    for feed in feeds:
        for index in feed.previous_answers:
            result = feed.step.results[index]
            others = [other for other in feeds if other is not feed]
            for name in feed.step.columns:
                new = feed.step.cells[name][index] or ""
                # A step may replace what another one has found for the same column.
                old = next(filter(None, (each.value_before(name, index) for each in (feed, *others))), "")
                if name in merged and new:
                    old, new = (cells[index] for cells in merged[name])
                if result is not None and new and new != old:
                    at = None if result.settled_ms is None else iso_time(result.settled_ms)
                    yield [*keys[index], name, old, new, result.provider, at]


@dataclass(frozen=True, slots=True)
class _StepFeed:
    """What the feed has of a step in a batch.

    `rows` have a delivered answer, by their index. Those in `previous_answers` are new: it has the answer that was
    delivered before; None: there was none.
    """

    step: JoinedStep
    rows: frozenset[int]
    previous_answers: Mapping[int, str | None]

    def value_before(self, name: str, index: int) -> str:
        """Return the value of a column that was delivered before; '' without one."""
        path, result = self.step.columns.get(name), self.step.results[index]
        if path is None or result is None or index not in self.rows:
            return ""
        # Not from the cells: those of a step that another one replaces are blank.
        answer = self.previous_answers.get(index, result.answer)
        return "" if answer is None else answer_cells(answer, [path])[0] or ""


def _deliver(collector: Collector, step: JoinedStep, keys: list[tuple[str, ...]]) -> _StepFeed:
    """Return what the feed has of a step, and record it as delivered."""
    job = collector.job.name
    delivered: list[tuple[int, bytes, int]] = []
    statuses, results = step.cells["enrich_status"], step.results
    for index, (result, fingerprint, status) in enumerate(zip(results, step.fingerprints, statuses, strict=True)):
        if result is None or fingerprint is None or result.attempt_id is None:
            continue
        if status == RowStatus.FOUND and result.erased_ms is None:
            delivered.append((index, _delivery_key(keys[index], fingerprint, step.name), result.attempt_id))
    previous_answers = dict(change_feed.undelivered_rows(collector.ledger, job, delivered))
    change_feed.mark_delivered(collector.ledger, job, delivered)
    return _StepFeed(step, frozenset(index for index, _, _ in delivered), previous_answers)


def _delivery_key(cells: tuple[str, ...], fingerprint: bytes, step: str) -> bytes:
    content = json.dumps(cells).encode() + fingerprint + step.encode()
    return blake2b(content, digest_size=16, person=b"enrich-delivered").digest()

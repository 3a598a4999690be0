"""Finds the leads that earlier runs of a job with steps have begun."""

from __future__ import annotations

from enrich.ledger import step_results
from enrich.run.asked_rows import find_asked
from enrich.run.step_rows import StepRows


def find_begun_leads(rows: StepRows, up_to_execution: int | None = None) -> bytearray:
    """Return for which rows a step has sent a request, one byte for each. Requests sent later do not count."""
    begun = bytearray()
    for tables in rows.step_tables():
        first_position = len(begun)
        begun.extend(bytes(tables.height))
        for step, (step_batch, _) in zip(rows.steps, tables.steps, strict=True):
            names = step_batch.batch.fingerprints
            sent = [row for row, result in enumerate(step_batch.results) if result is not None and result.was_sent]
            if up_to_execution is not None:
                in_time = step_results.sent_up_to(rows.ledger, filter(None, names), up_to_execution)
                sent = [row for row in sent if names[row] in in_time]
            for row in find_asked(rows.ledger, step.job, names, sent, step_batch.identities):
                begun[first_position + row] = 1
    return begun

"""Writes gauges of the last run as a file for Prometheus's textfile collector, atomically."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from enrich.job.bounded_read import read_text
from enrich.ledger.history import LedgerTotals
from enrich.models import RowStatus, to_credits

#: Each gauge with its help text.
GAUGES = {
    "enrich_last_start_timestamp_seconds": "When the last run started.",
    "enrich_last_end_timestamp_seconds": "When the last run ended.",
    "enrich_last_success_timestamp_seconds": "When a run last ended with exit code 0, 10 or 13.",
    "enrich_exit_code": "The exit code of the last run.",
    "enrich_duration_seconds": "How long the last execution took.",
    "enrich_rows": "Rows of the input by the status they have in the output.",
    "enrich_requests": "Distinct requests that the input asks for.",
    "enrich_requests_submitted": "Requests that the API accepted in the last execution.",
    "enrich_requests_reused": "Requests that were answered from the ledger.",
    "enrich_credits_spent": "Known credits of the last execution.",
    "enrich_answers_price_unknown": "Answers of the last execution whose price is not known.",
    "enrich_balance_credits": "The account's balance after the last execution.",
    "enrich_polls": "Polls of the last execution.",
    "enrich_rate_limited": "Answers 429 in the last execution.",
    "enrich_ledger_credits_spent": "Known credits of all attempts in the ledger.",
    "enrich_ledger_answers_price_unknown": "Answers in the ledger whose price is not known.",
    "enrich_ledger_requests_in_doubt": "Requests in doubt: a person must decide.",
    "enrich_ledger_requests_at_the_api": "Requests whose answer is still waited for.",
}

#: The only gauge with a label besides `job`.
ROWS_BY_STATUS = "enrich_rows"

#: (name, status) to value; the status is empty except for ROWS_BY_STATUS.
Samples = dict[tuple[str, str], float]

_SUMMARY_GAUGES = {
    "enrich_duration_seconds": "elapsed_s",
    "enrich_requests": "requests",
    "enrich_requests_submitted": "submitted",
    "enrich_requests_reused": "reused",
    "enrich_credits_spent": "credits_spent",
    "enrich_answers_price_unknown": "credits_unknown",
    "enrich_balance_credits": "balance_after",
    "enrich_polls": "polls",
    "enrich_rate_limited": "rate_limited",
}


def samples_from_summary(summary: Mapping[str, Any]) -> Samples:
    """Return the gauges of a run summary; unknown values are left out."""
    samples = {(name, ""): summary.get(field) for name, field in _SUMMARY_GAUGES.items()}
    samples |= {(ROWS_BY_STATUS, status.value): summary.get(status.value) for status in RowStatus}
    return {key: float(value) for key, value in samples.items() if value is not None}


def samples_from_ledger(totals: LedgerTotals) -> Samples:
    """Return the gauges of the whole ledger."""
    return {
        ("enrich_ledger_credits_spent", ""): to_credits(totals.spent),
        ("enrich_ledger_answers_price_unknown", ""): totals.unknown,
        ("enrich_ledger_requests_in_doubt", ""): totals.in_doubt,
        ("enrich_ledger_requests_at_the_api", ""): totals.submitted,
    }


def read_metrics(path: Path) -> Samples:
    """Read the gauges that an earlier run wrote; empty when the file can't be read."""
    try:
        families = list(text_string_to_metric_families(read_text(path)))
    except (OSError, ValueError):
        return {}
    samples = (sample for family in families for sample in family.samples if sample.name in GAUGES)
    found = {(sample.name, sample.labels.get("status", "")): sample.value for sample in samples}
    return {key: value for key, value in found.items() if (key[0] == ROWS_BY_STATUS) is bool(key[1])}


def format_metrics(job: str, samples: Samples) -> bytes:
    """Return the gauges in Prometheus's text format."""
    registry = CollectorRegistry()
    for name, help_text in GAUGES.items():
        by_status = {status: value for (gauge, status), value in samples.items() if gauge == name}
        if not by_status:
            continue
        labels = ["job", "status"] if name == ROWS_BY_STATUS else ["job"]
        gauge = Gauge(name, help_text, labels, registry=registry)
        for status, value in by_status.items():
            gauge.labels(*([job, status] if status else [job])).set(value)
    return generate_latest(registry)


def write_metrics(path: Path, job: str, samples: Samples) -> None:
    """Replace the file (mode 0600) atomically: the collector may read at any time. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(format_metrics(job, samples))
        os.replace(part, path)  # noqa: PTH105 - `part` is a str
    except BaseException:
        os.unlink(part)  # noqa: PTH108 - `part` is a str
        raise

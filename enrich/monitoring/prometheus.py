"""Writes gauges of the last run as a file for Prometheus's textfile collector, atomically."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enrich.exit_codes import SUCCESS_CODES
from enrich.files.atomic import replace_file
from enrich.job.job import Job
from enrich.job.local_files import read_text
from enrich.ledger import queries, records
from enrich.ledger.database import try_read
from enrich.models import RowStatus, to_credits

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

#: Each gauge with its help text, and where its value is in the run summary; with the label `step`, in each of `steps`.
GAUGES = {
    "enrich_last_start_timestamp_seconds": ("When the last run started.", None),
    "enrich_last_end_timestamp_seconds": ("When the last run ended.", None),
    "enrich_last_success_timestamp_seconds": ("When a run last ended with exit code 0, 10 or 13.", None),
    "enrich_exit_code": ("The exit code of the last run.", None),
    "enrich_duration_seconds": ("Duration of the last run.", "elapsed_s"),
    "enrich_rows": ("Rows of the input by the status they have in the output.", None),
    "enrich_requests": ("Distinct requests of the input.", "requests"),
    "enrich_requests_submitted": ("Requests that the API accepted in the last run.", "submitted"),
    "enrich_requests_reused": ("Requests that were already answered in the ledger.", "reused"),
    "enrich_credits_spent": ("Known credits of the last run.", "credits_spent"),
    "enrich_answers_price_unknown": ("Results of the last run with an unknown price.", "credits_unknown"),
    "enrich_balance_credits": ("The account's balance after the last run.", "balance_after"),
    "enrich_polls": ("Polls of the last run.", "polls"),
    "enrich_rate_limited": ("Rate-limited responses (429) in the last run.", "rate_limited"),
    "enrich_step_rows_found": ("Rows for which a step has found something.", "found"),
    "enrich_step_requests_submitted": ("Requests of a step that the API accepted in the last run.", "submitted"),
    "enrich_step_credits_spent": ("Known credits of a step in the last run.", "credits_spent"),
    "enrich_ledger_credits_spent": ("Known credits of all attempts in the ledger.", None),
    "enrich_ledger_answers_price_unknown": ("Results in the ledger with an unknown price.", None),
    "enrich_ledger_requests_in_doubt": ("Unconfirmed requests, which need a decision.", None),
    "enrich_ledger_requests_at_the_api": ("Requests that are running at Databar.", None),
}
#: The gauges that have a label besides `job`.
LABELS = {
    "enrich_rows": "status",
    **dict.fromkeys((name for name in GAUGES if name.startswith("enrich_step_")), "step"),
}

#: (name, value of its label) to value; the label's value is empty for a gauge without one.
Samples = dict[tuple[str, str], float]
_LAST_SUCCESS = ("enrich_last_success_timestamp_seconds", "")


def samples_from_summary(summary: Mapping[str, Any]) -> Samples:
    """Return the gauges of a run summary; unknown values are left out."""
    samples = {("enrich_rows", status.value): summary.get(status.value) for status in RowStatus}
    for name, (_, field) in GAUGES.items():
        if field is not None and name in LABELS:
            samples |= {(name, step["name"]): step[field] for step in summary.get("steps", ())}
        elif field is not None:
            samples[name, ""] = summary.get(field)
    return {key: float(value) for key, value in samples.items() if value is not None}


def _ledger_samples(job: Job) -> Samples:
    """Return the gauges of the whole ledger; empty when it can't be read."""
    samples: Samples = {}
    if (totals := try_read(job.ledger, queries.totals)) is not None:
        samples = {
            ("enrich_ledger_credits_spent", ""): to_credits(totals.spent),
            ("enrich_ledger_answers_price_unknown", ""): totals.unknown,
            ("enrich_ledger_requests_in_doubt", ""): totals.in_doubt,
            ("enrich_ledger_requests_at_the_api", ""): totals.submitted,
        }
    last_ms = try_read(job.ledger, lambda db: records.last_ended_ms(db, job.name, SUCCESS_CODES))
    return samples if last_ms is None else samples | {_LAST_SUCCESS: last_ms / 1000}


def read_metrics(path: Path) -> Samples:
    """Read the gauges that an earlier run wrote; empty when the file can't be read."""
    found = {}
    for sample in _read_samples(path):
        if sample.name not in GAUGES:
            continue
        labels = {name: value for name, value in sample.labels.items() if name != "job"}
        if list(labels) == ([LABELS[sample.name]] if sample.name in LABELS else []) and all(labels.values()):
            found[sample.name, "".join(labels.values())] = sample.value
    return found


def find_metrics_path(job: Job, name: str) -> Path:
    """Return the path of the metrics. Raises JobError if they cannot be written there."""
    job.file_locations(datetime.now().astimezone())  # a refused run writes its metrics, too
    path = job.resolve_path(name)
    if path.exists() and not path.is_file():
        raise job.error(["metrics"], f"{path}: the metrics cannot be written: it is not a file")
    samples = _read_samples(path)
    if samples and not any(sample.name.startswith("enrich_") for sample in samples):
        raise job.error(["metrics"], f"{path} has metrics of another program", "choose another file")
    return path


def _read_samples(path: Path) -> Sequence[Sample]:
    """Read the samples in a file; none when it can't be read."""
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415 - few jobs write metrics

    try:
        return [sample for family in text_string_to_metric_families(read_text(path)) for sample in family.samples]
    except (OSError, ValueError):
        return []


def format_metrics(job: str, samples: Samples) -> bytes:
    """Return the gauges in Prometheus's text format."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest  # noqa: PLC0415 - likewise

    registry = CollectorRegistry()
    for name, (help_text, _) in GAUGES.items():
        by_label = {label: value for (gauge, label), value in samples.items() if gauge == name}
        if not by_label:
            continue
        gauge = Gauge(name, help_text, ["job", *([LABELS[name]] if name in LABELS else [])], registry=registry)
        for label, value in by_label.items():
            gauge.labels(*([job, label] if label else [job])).set(value)
    return generate_latest(registry)


def update_metrics(path: Path, job: Job, samples: Samples, code: int, started_at: float) -> None:
    """Write the gauges of a run that has ended now, and those of the ledger. Raises OSError."""
    now = time.time()
    last_success = {key: at for key, at in read_metrics(path).items() if key == _LAST_SUCCESS}
    gauges = last_success | samples | _ledger_samples(job)
    gauges |= {
        ("enrich_last_start_timestamp_seconds", ""): started_at,
        ("enrich_last_end_timestamp_seconds", ""): now,
        ("enrich_exit_code", ""): code,
    }
    if code in SUCCESS_CODES:
        gauges[_LAST_SUCCESS] = now
    write_metrics(path, job.name, gauges)


def write_metrics(path: Path, job: str, samples: Samples) -> None:
    """Replace the file (mode 0600) atomically: the collector may read at any time. Raises OSError."""
    replace_file(path, format_metrics(job, samples))

"""The metrics file: what Prometheus reads after a run, however the run ended."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from enrich.ledger.lock import lock_ledger
from enrich.models import RowStatus
from enrich.monitoring.prometheus import (
    GAUGES,
    LABELS,
    Samples,
    format_metrics,
    read_metrics,
    samples_from_summary,
    write_metrics,
)
from tests.support.request_recorder import assert_no_personal_data, searchable_leads
from tests.support.workspace import SandboxApi, Workspace, serve_api

PROM = "metrics/enrich.prom"
SUCCESS = "enrich_last_success_timestamp_seconds"


@pytest.fixture
def metrics_workspace(workspace: Workspace) -> Workspace:
    """Return a workspace whose job writes metrics."""
    workspace.write_job(metrics=PROM)
    workspace.write_leads(searchable_leads(4))
    return workspace


def read_gauges(workspace: Workspace) -> dict[str, float]:
    """Read the metrics with Prometheus' own parser as `name` or `name status` → value; all are gauges of this job."""
    result = {}
    for family in text_string_to_metric_families((workspace.folder / PROM).read_text(encoding="utf-8")):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["job"] == "job"
            result[f"{sample.name} {sample.labels.get('status', '')}".strip()] = sample.value
    return result


def test_metrics_match_summary_and_ledger(api: SandboxApi, metrics_workspace: Workspace) -> None:
    """Metrics equal the run summary and the ledger; the file is for its owner only and has no personal data."""
    before = time.time()
    summary = metrics_workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output

    metrics = read_gauges(metrics_workspace)
    for name, field in (
        ("enrich_requests", "requests"),
        ("enrich_requests_submitted", "submitted"),
        ("enrich_requests_reused", "reused"),
        ("enrich_credits_spent", "credits_spent"),
        ("enrich_ledger_credits_spent", "credits_spent"),
        ("enrich_answers_price_unknown", "credits_unknown"),
        ("enrich_balance_credits", "balance_after"),
        ("enrich_polls", "polls"),
        ("enrich_rate_limited", "rate_limited"),
        ("enrich_duration_seconds", "elapsed_s"),
    ):
        assert metrics[name] == pytest.approx(summary[field]), name
    for status in RowStatus:
        assert metrics[f"enrich_rows {status}"] == summary[status]
    assert metrics["enrich_exit_code"] == metrics["enrich_ledger_requests_in_doubt"] == 0
    assert before <= metrics["enrich_last_start_timestamp_seconds"] <= metrics["enrich_last_end_timestamp_seconds"]
    assert metrics[SUCCESS] == metrics["enrich_last_end_timestamp_seconds"]
    path = metrics_workspace.folder / PROM
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert_no_personal_data(path.read_text(encoding="utf-8"), metrics_workspace)


def test_second_run_updates_ledger_totals(api: SandboxApi, metrics_workspace: Workspace) -> None:
    """Credits of the run and of the whole ledger are separate metrics."""
    metrics_workspace.run_in_process("run", "job.yaml", "--limit", "2", api=api)
    first = read_gauges(metrics_workspace)
    metrics_workspace.run_in_process("run", "job.yaml", api=api)
    second = read_gauges(metrics_workspace)

    assert first["enrich_rows pending"] == 2
    assert second["enrich_requests_reused"] == 2
    total = first["enrich_credits_spent"] + second["enrich_credits_spent"]
    assert (
        second["enrich_ledger_credits_spent"] == pytest.approx(total) == pytest.approx(api.audit()["credits_charged"])
    )


def test_failed_start_keeps_last_success(api: SandboxApi, metrics_workspace: Workspace) -> None:
    """Exits 3 and 11 write their code and times; the last success and the last numbers stay."""
    metrics_workspace.run_in_process("run", "job.yaml", api=api)
    good = read_gauges(metrics_workspace)

    for code in (3, 11):
        with lock_ledger(metrics_workspace.ledger_path if code == 11 else metrics_workspace.folder / "other", 0):
            result = metrics_workspace.run_in_process(
                "run", "job.yaml", api=api, **({"DATABAR_API_KEY": ""} if code == 3 else {})
            )
        assert result.exit_code == code
        bad = read_gauges(metrics_workspace)
        assert bad["enrich_exit_code"] == code
        assert bad["enrich_last_end_timestamp_seconds"] > good["enrich_last_end_timestamp_seconds"]
        assert bad[SUCCESS] == pytest.approx(good[SUCCESS], abs=2)
        assert bad["enrich_rows found"] == good["enrich_rows found"]
        assert bad["enrich_ledger_credits_spent"] == good["enrich_ledger_credits_spent"]


def test_metrics_of_another_program_stay(metrics_workspace: Workspace) -> None:
    """A file with metrics of another program is exit 2 and stays."""
    path = metrics_workspace.folder / PROM
    path.parent.mkdir()
    path.write_text("backup_age_seconds 12\n", encoding="utf-8")
    result = metrics_workspace.run_in_process("run", "job.yaml")
    assert result.exit_code == 2
    assert f"{PROM} has metrics of another program" in result.stderr
    assert path.read_text(encoding="utf-8") == "backup_age_seconds 12\n"


def test_failed_first_start_has_no_success(metrics_workspace: Workspace) -> None:
    """After a failed first start there is no metric of the last success."""
    assert metrics_workspace.run_in_process("run", "job.yaml").exit_code == 3

    assert set(read_gauges(metrics_workspace)) == {
        "enrich_exit_code",
        "enrich_last_start_timestamp_seconds",
        "enrich_last_end_timestamp_seconds",
    }


def test_last_success_from_file_or_ledger(api: SandboxApi, metrics_workspace: Workspace) -> None:
    """The last success comes from the old file or from the ledger; one of them is enough."""
    metrics_workspace.run_in_process("run", "job.yaml", api=api)
    good = read_gauges(metrics_workspace)[SUCCESS]

    (metrics_workspace.folder / PROM).write_text("not of { prometheus\n")
    assert metrics_workspace.run_in_process("run", "job.yaml").exit_code == 3
    assert read_gauges(metrics_workspace)[SUCCESS] == pytest.approx(good, abs=2)

    metrics_workspace.ledger_path.write_bytes(b"damaged")
    assert metrics_workspace.run_in_process("run", "job.yaml", api=api).exit_code == 5
    assert read_gauges(metrics_workspace)[SUCCESS] == pytest.approx(good, abs=2)


@pytest.mark.long
def test_in_doubt_is_no_success(api: SandboxApi, metrics_workspace: Workspace) -> None:
    """Unconfirmed requests are counted and are no success, so an alert can use them."""
    api.inject_fault("no-task-id")
    assert metrics_workspace.run_in_process("run", "job.yaml", api=api).exit_code == 14

    metrics = read_gauges(metrics_workspace)
    assert (metrics["enrich_exit_code"], metrics["enrich_ledger_requests_in_doubt"]) == (14, 1)
    assert SUCCESS not in metrics


@pytest.mark.long
def test_open_tasks_are_counted(tmp_path: Path, metrics_workspace: Workspace) -> None:
    """Exit 13 is a success with a count of open tasks, because the next run continues."""
    with serve_api(tmp_path / "slow.db", latency="fixed(3600)") as api:
        assert metrics_workspace.run_in_process("run", "job.yaml", "--max-time", "1s", api=api).exit_code == 13

    metrics = read_gauges(metrics_workspace)
    assert metrics["enrich_ledger_requests_at_the_api"] == metrics["enrich_rows pending"] == 4
    assert SUCCESS in metrics


def test_unwritable_metrics_are_a_note(api: SandboxApi, metrics_workspace: Workspace) -> None:
    """An unwritable metrics file is one note; the leads are enriched."""
    metrics_workspace.write_job(metrics="leads.csv/enrich.prom")

    result = metrics_workspace.run_in_process("run", "job.yaml", api=api)

    assert result.exit_code == 0
    assert result.stderr.count("\n") == 1
    assert "enrich.prom: the metrics cannot be written" in result.stderr
    assert len(metrics_workspace.read_output()) == 4


def test_metrics_file_must_end_in_prom(api: SandboxApi, metrics_workspace: Workspace) -> None:
    """The file must end in `.prom`, the only files that the textfile collector reads."""
    metrics_workspace.write_job(metrics="enrich.txt")

    for command in ("run", "check"):
        result = metrics_workspace.run_in_process(command, "job.yaml", api=api)

        assert result.exit_code == 2
        assert "job.yaml:12: metrics" in result.stderr
        assert ".prom" in result.stderr


def test_sandbox_writes_no_metrics(metrics_workspace: Workspace) -> None:
    """A sandbox run writes no metrics, so it changes no dashboard."""
    assert metrics_workspace.run_in_process("run", "job.yaml", "--sandbox", "--limit", "0").exit_code == 0

    assert not (metrics_workspace.folder / PROM).parent.exists()


def test_invalid_old_file_is_ignored(metrics_workspace: Workspace) -> None:
    """Gauges in the old file that are not valid ones of ours are dropped, and the rest is kept."""
    (metrics_workspace.folder / PROM).parent.mkdir()
    old_metrics = (
        'enrich_rows{job="job"} 3\nenrich_polls{job="job",status="found"} 1\nup 1\nenrich_requests{job="job"} 7\n'
    )
    (metrics_workspace.folder / PROM).write_text(old_metrics)

    assert metrics_workspace.run_in_process("run", "job.yaml").exit_code == 3

    metrics = read_gauges(metrics_workspace)
    assert metrics["enrich_requests"] == 7
    assert not metrics.keys() & {"up", "enrich_rows", "enrich_polls", "enrich_polls found"}


def test_metric_naming_conventions() -> None:
    """Names have a prefix and base units, and no `_total`, which is for counters."""
    for name in GAUGES:
        assert name.startswith("enrich_")
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_ms", "_minutes"))


def test_unknown_values_have_no_metric() -> None:
    """An unknown value, such as a balance not reported, has no metric instead of 0."""
    result = samples_from_summary({"balance_after": None, "rows": None, "found": None, "polls": 0})

    assert result == {("enrich_polls", ""): 0.0}


KEYS = st.sampled_from(
    [(name, "email" if LABELS.get(name) == "step" else "") for name in GAUGES if name != "enrich_rows"]
    + [("enrich_rows", status.value) for status in RowStatus]
)


@given(
    job=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    samples=st.dictionaries(KEYS, st.floats(allow_nan=False)),
)
@example(job="\r", samples={("enrich_polls", ""): 1.0})
def test_metrics_roundtrip(tmp_path_factory: pytest.TempPathFactory, job: str, samples: Samples) -> None:
    """All numbers of all jobs survive writing and reading."""
    path = tmp_path_factory.getbasetemp() / "round.prom"
    write_metrics(path, job, samples)

    assert path.read_bytes() == format_metrics(job, samples)
    assert read_metrics(path) == samples

"""The metrics: what Prometheus reads after a run, whatever ended it."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from enrich.model import RowStatus
from enrich.store.lock import hold
from enrich.watch.metrics import GAUGES, Samples, of_receipt, read, text, write
from tests.harness import Api, Office, serving
from tests.watch import assert_nobody_in, somebody

PROM = "metrics/enrich.prom"
SUCCESS = "enrich_last_success_timestamp_seconds"


@pytest.fixture
def watched(office: Office) -> Office:
    """An office whose job writes metrics."""
    office.write_job(metrics=PROM)
    office.write_leads(somebody(4))
    return office


def gauges(office: Office) -> dict[str, float]:
    """What Prometheus' own parser reads: `name` or `name status` to a value; all are gauges of this job."""
    told = {}
    for family in text_string_to_metric_families((office.folder / PROM).read_text(encoding="utf-8")):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["job"] == "job"
            told[f"{sample.name} {sample.labels.get('status', '')}".strip()] = sample.value
    return told


def test_a_run_leaves_its_numbers(api: Api, watched: Office) -> None:
    """They are those of the receipt and of the ledger; the file is for its owner only and knows nobody."""
    before = time.time()
    receipt = watched.command("run", "job.yaml", "--json", api=api).receipt

    told = gauges(watched)
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
        assert told[name] == pytest.approx(receipt[field]), name
    for status in RowStatus:
        assert told[f"enrich_rows {status}"] == receipt[status]
    assert told["enrich_exit_code"] == told["enrich_ledger_requests_in_doubt"] == 0
    assert before <= told["enrich_last_start_timestamp_seconds"] <= told["enrich_last_end_timestamp_seconds"]
    assert told[SUCCESS] == told["enrich_last_end_timestamp_seconds"]
    path = watched.folder / PROM
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert_nobody_in(path.read_text(encoding="utf-8"), watched)


def test_the_second_run_adds_to_the_ledgers_numbers_only(api: Api, watched: Office) -> None:
    """Credits of the execution and of the ledger are told apart."""
    watched.command("run", "job.yaml", "--limit", "2", api=api)
    first = gauges(watched)
    watched.command("run", "job.yaml", api=api)
    second = gauges(watched)

    assert first["enrich_rows pending"] == 2
    assert second["enrich_requests_reused"] == 2
    total = first["enrich_credits_spent"] + second["enrich_credits_spent"]
    assert (
        second["enrich_ledger_credits_spent"] == pytest.approx(total) == pytest.approx(api.audit()["credits_charged"])
    )


def test_a_refused_start_forgets_nothing(api: Api, watched: Office) -> None:
    """Exit 3 and exit 11 write their code and their times; the last success and the last numbers stay."""
    watched.command("run", "job.yaml", api=api)
    good = gauges(watched)

    for code in (3, 11):
        with hold(watched.ledger_path if code == 11 else watched.folder / "other", 0):
            done = watched.command("run", "job.yaml", api=api, **({"DATABAR_API_KEY": ""} if code == 3 else {}))
        assert done.code == code
        bad = gauges(watched)
        assert bad["enrich_exit_code"] == code
        assert bad["enrich_last_end_timestamp_seconds"] > good["enrich_last_end_timestamp_seconds"]
        assert bad[SUCCESS] == pytest.approx(good[SUCCESS], abs=2)
        assert bad["enrich_rows found"] == good["enrich_rows found"]
        assert bad["enrich_ledger_credits_spent"] == good["enrich_ledger_credits_spent"]


def test_a_first_start_that_fails_knows_of_no_success(watched: Office) -> None:
    """What is not known has no number."""
    assert watched.command("run", "job.yaml").code == 3

    assert set(gauges(watched)) == {
        "enrich_exit_code",
        "enrich_last_start_timestamp_seconds",
        "enrich_last_end_timestamp_seconds",
    }


def test_the_last_success_is_known_without_the_old_file_or_without_the_ledger(api: Api, watched: Office) -> None:
    """One of them is enough."""
    watched.command("run", "job.yaml", api=api)
    good = gauges(watched)[SUCCESS]

    (watched.folder / PROM).write_text("not of { prometheus\n")
    assert watched.command("run", "job.yaml").code == 3
    assert gauges(watched)[SUCCESS] == pytest.approx(good, abs=2)

    watched.ledger_path.write_bytes(b"damaged")
    assert watched.command("run", "job.yaml", api=api).code == 5
    assert gauges(watched)[SUCCESS] == pytest.approx(good, abs=2)


def test_doubts_and_exit_14_are_no_success(api: Api, watched: Office) -> None:
    """They are counted, and an alert can stand on them."""
    api.fault("no-task-id")
    assert watched.command("run", "job.yaml", api=api).code == 14

    told = gauges(watched)
    assert (told["enrich_exit_code"], told["enrich_ledger_requests_in_doubt"]) == (14, 1)
    assert SUCCESS not in told


def test_tasks_that_wait_are_counted(tmp_path: Path, watched: Office) -> None:
    """Exit 13 is a night that goes on by itself: a success, with what is still at the API."""
    with serving(tmp_path / "slow.db", latency="fixed(3600)") as api:
        assert watched.command("run", "job.yaml", "--max-time", "1s", api=api).code == 13

    told = gauges(watched)
    assert told["enrich_ledger_requests_at_the_api"] == told["enrich_rows pending"] == 4
    assert SUCCESS in told


def test_metrics_that_cannot_be_written_do_not_break_the_run(api: Api, watched: Office) -> None:
    """One note; the leads are enriched."""
    watched.write_job(metrics="leads.csv/enrich.prom")

    done = watched.command("run", "job.yaml", api=api)

    assert done.code == 0
    assert done.stderr.count("\n") == 1
    assert "enrich.prom: the metrics cannot be written" in done.stderr
    assert len(watched.output()) == 4


def test_a_name_that_the_collector_would_not_read_is_exit_2(api: Api, watched: Office) -> None:
    """The textfile collector takes *.prom only."""
    watched.write_job(metrics="enrich.txt")

    done = watched.command("run", "job.yaml", api=api)

    assert done.code == 2
    assert "job.yaml:12: metrics" in done.stderr
    assert ".prom" in done.stderr


def test_a_run_of_the_sandbox_leaves_no_metrics(watched: Office) -> None:
    """Who tries something turns nobody's dashboard."""
    assert watched.command("run", "job.yaml", "--sandbox", "--limit", "0").code == 0

    assert not (watched.folder / PROM).parent.exists()


def test_an_old_file_of_another_shape_is_no_hindrance(watched: Office) -> None:
    """What somebody else wrote there is left out, and the rest is kept."""
    (watched.folder / PROM).parent.mkdir()
    odd = 'enrich_rows{job="job"} 3\nenrich_polls{job="job",status="found"} 1\nup 1\nenrich_requests{job="job"} 7\n'
    (watched.folder / PROM).write_text(odd)

    assert watched.command("run", "job.yaml").code == 3

    told = gauges(watched)
    assert told["enrich_requests"] == 7
    assert not told.keys() & {"up", "enrich_rows", "enrich_polls", "enrich_polls found"}


def test_names_follow_the_conventions() -> None:
    """A prefix, base units, and no `_total`, which is for counters."""
    for name in GAUGES:
        assert name.startswith("enrich_")
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_ms", "_minutes"))


def test_what_is_not_known_has_no_gauge() -> None:
    """A balance that the API did not tell is not 0."""
    told = of_receipt({"balance_after": None, "rows": None, "found": None, "polls": 0})

    assert told == {("enrich_polls", ""): 0.0}


KEYS = st.sampled_from(
    [(name, "") for name in GAUGES if name != "enrich_rows"] + [("enrich_rows", status.value) for status in RowStatus]
)


@given(
    job=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    samples=st.dictionaries(KEYS, st.floats(allow_nan=False)),
)
@example(job="\r", samples={("enrich_polls", ""): 1.0})
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, job: str, samples: Samples) -> None:
    """Every number of every job comes back as it was."""
    path = tmp_path_factory.getbasetemp() / "round.prom"
    write(path, job, samples)

    assert path.read_bytes() == text(job, samples)
    assert read(path) == samples

"""Tasks, bulk runs and credits: durations, expiry, totals, and what is charged."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from statistics import median
from time import time
from typing import Any

import httpx
import pytest

from enrich.sandbox.faults import PeakRate
from enrich.sandbox.settings import parse_latency
from tests.sandbox.conftest import ADA, SandboxClient, StartSandbox, make_leads
from tests.support.cases import in_turn

# Task durations and expiry follow the sandbox's own clock, which can be advanced


def date_of(api: SandboxClient) -> float:
    """Return the time in the API's Date header."""
    return parsedate_to_datetime(api.http.get("/user/me").headers["date"]).timestamp()


def test_advance_completes_tasks(start: StartSandbox) -> None:
    """Advancing the clock completes tasks."""
    api = start(latency="fixed(3600)")
    task_id = api.submit()
    api.advance(3_590)
    assert api.task_body(task_id)["status"] == "processing"
    api.advance(11)
    assert api.task_body(task_id)["status"] == "completed"


def test_latency_is_deterministic_per_request(start: StartSandbox) -> None:
    """A task's duration is drawn from the settings and the same for the same request."""
    result = []
    for _ in range(2):
        api = start(latency="uniform(0,1000)")
        tasks = [api.submit(params) for params in make_leads(10)]
        api.advance(500)
        result.append([api.task_body(task_id)["status"] for task_id in tasks])
    assert result[0] == result[1]
    assert set(result[0]) == {"processing", "completed"}


def test_date_follows_the_clock(start: StartSandbox) -> None:
    """There is one Date header, which follows the clock and its offset."""
    api = start(date_offset=600.0)
    assert len(api.http.get("/user/me").headers.get_list("date")) == 1
    assert date_of(api) == pytest.approx(time() + 600, abs=3)
    api.advance(86_400)
    assert date_of(api) == pytest.approx(time() + 87_000, abs=3)


def test_expired(start: StartSandbox) -> None:
    """A result expires a fixed time after completion and is then a 410."""
    api = start(latency="fixed(1800)", result_ttl=3_600.0)
    task_id = api.submit()
    api.advance(1_800 + 3_590)
    assert api.task_body(task_id)["status"] == "completed"
    api.advance(20)
    assert (api.get_task(task_id).status_code, api.get_task(task_id).json()) == (
        410,
        {"detail": "Task data has expired"},
    )


def test_expired_task_with_status_gone(start: StartSandbox) -> None:
    """An expired task can be a 200 with the status `gone` and no data."""
    api = start(expired_as="gone")
    task_id = api.submit()
    api.advance(86_401)
    assert (api.task_body(task_id)["status"], api.task_body(task_id)["data"]) == ("gone", None)


def test_cancelled_tasks_expire(start: StartSandbox) -> None:
    """A cancelled task expires after the same time."""
    api = start(latency="fixed(100000)")
    task_id = api.submit()
    api.cancel(task_id)
    api.advance(86_401)
    assert api.get_task(task_id).status_code == 410


def test_expired_results_stay_charged(api: SandboxClient) -> None:
    """An expired result stays charged."""
    api.submit(ADA, enrichments=[833])
    api.advance(100_000)
    assert api.audit()["credits_charged"] == 0.5


@in_turn("text", ["", "fixed", "fixed(a)", "fixed(-1)", "uniform(2,1)", "lognormal(0,1)", "normal(1,1)"])
def test_unknown_latency(text: str) -> None:
    """An unknown distribution is an error that shows the valid forms."""
    with pytest.raises(ValueError, match="none of lognormal"):
        parse_latency(text)


def test_distributions() -> None:
    """The distributions have the median and the bounds in their names."""
    draws = [(number + 0.5) / 1_000 for number in range(1_000)]
    assert {parse_latency("fixed(2)")(draw) for draw in draws} == {2}
    assert median(map(parse_latency("lognormal(1.2, 0.6)"), draws)) == pytest.approx(1.2, rel=0.01)
    assert all(1 < parse_latency("uniform(1,3)")(draw) < 3 for draw in draws)


# A bulk run is one task whose data is in the order of its rows


def test_results_are_aligned_with_rows(start: StartSandbox) -> None:
    """The data has one element a row, null for no match; the progress counts them."""
    api = start(hit_rate=0.5)
    task = api.task_body(api.submit_bulk(make_leads(20)))
    found = [row for row in task["data"] if row is not None]
    assert (task["status"], len(task["data"])) == ("completed", 20)
    assert 0 < len(found) < 20
    missed = 20 - len(found)
    assert task["progress"] == {"total": 20, "completed": len(found), "no_data": missed, "failed": 0, "processing": 0}
    assert api.task_body(api.submit(make_leads(20)[0]))["data"] in ([task["data"][0]], None, [], {})


def test_bulk_cost_equals_single_runs(api: SandboxClient) -> None:
    """A bulk run costs as much as its rows in single runs."""
    bulk = api.task_body(api.submit_bulk(make_leads(5), enrichments=[833, 966]))
    singles = [api.submit_and_get(params, enrichments=[833, 966]) for params in make_leads(5)]
    assert bulk["credits_spent"] == sum(task["credits_spent"] for task in singles)
    assert [[row] for row in bulk["data"]] == [task["data"] for task in singles]


def test_partially_completed_status(start: StartSandbox) -> None:
    """With some failed rows the status is `partially_completed`, and the errors are in a list."""
    api = start(failure_rate=0.3)
    task = api.task_body(api.submit_bulk(make_leads(20)))
    failed = task["progress"]["failed"]
    assert (task["status"], len(task["data"])) == ("partially_completed", 20)
    assert 0 < failed <= len(task["error"])
    assert task["data"].count(None) == failed


def test_failed_status_when_all_rows_fail(start: StartSandbox) -> None:
    """A bulk run with only failed rows has failed."""
    api = start(failure_rate=1.0)
    assert api.task_body(api.submit_bulk(make_leads(3)))["status"] == "failed"


def test_partial_rows(start: StartSandbox) -> None:
    """A running bulk task shows its finished rows only on request."""
    api = start(latency="uniform(10,1000)")
    task_id = api.submit_bulk(make_leads(20))
    api.advance(500)
    task, partial = api.task_body(task_id), api.task_body(task_id, include_partial="true")
    result = partial["progress"]["completed"]
    assert (task["status"], task["data"], task["credits_spent"]) == ("processing", None, 0)
    assert (partial["status"], len(partial["data"])) == ("processing", result)
    assert 0 < result < 20
    api.advance(600)
    assert len(api.task_body(task_id)["data"]) == 20


def test_cancel_keeps_finished_rows(start: StartSandbox) -> None:
    """Cancelling keeps and charges the finished rows, and refunds the rest."""
    api = start(latency="uniform(10,1000)")
    task_id = api.submit_bulk(make_leads(20), enrichments=[833])
    api.advance(500)
    task = api.cancel(task_id).json()
    result = task["progress"]["completed"]
    assert (task["status"], len(task["data"]), task["progress"]["processing"]) == ("cancelled", result, 0)
    assert task["credits_spent"] == result * 0.5
    api.advance(1_000)
    assert api.balance() == 10_000 - result * 0.5
    assert sum(run["charged"] for run in api.audit()["runs"]) == result


def test_flat_result_shapes(start: StartSandbox) -> None:
    """The flat shapes also apply to the rows of a bulk run."""
    api = start(shape="flat_list")
    [row] = api.task_body(api.submit_bulk([ADA]))["data"]
    assert row.keys() == {"email"}


def test_audit_counts_each_row(api: SandboxClient) -> None:
    """The audit counts each row, with identical rows in one entry."""
    api.submit_bulk([ADA, ADA, *make_leads(3)])
    totals = api.audit()
    assert (totals["accepted"], totals["distinct"], totals["accepted_more_than_once"]) == (5, 4, 1)


def test_matches_without_alignment(start: StartSandbox) -> None:
    """Before July 2026 the data held only the matches in no order; the counts were the same."""
    api = start(hit_rate=0.5, bulk_data="hits")
    task = api.task_body(api.submit_bulk(make_leads(20)))
    assert None not in task["data"]
    assert len(task["data"]) == task["progress"]["completed"] < 20


def test_too_many_rows(start: StartSandbox) -> None:
    """Beyond the row limit, a bulk run is a 400 that names no row, and nothing is accepted."""
    api = start(bulk_limit=3)
    answer = api.post_bulk(make_leads(4))
    assert (answer.status_code, answer.json()["error"]) == (400, "BATCH_TOO_LARGE")
    assert api.audit()["accepted"] == 0
    assert api.task_body(api.submit_bulk(make_leads(3)))["status"] == "completed"


# The audit counts what was accepted and charged, so tests need not trust any client


def assert_totals_add_up(totals: Any) -> None:
    """Check that no credit appears or disappears."""
    gone = totals["credits_charged"] + totals["credits_reserved"]
    assert totals["balance_at_start"] + totals["topped_up"] - totals["balance"] == pytest.approx(gone, abs=1e-9)


def test_identical_requests_are_one_entry(api: SandboxClient) -> None:
    """Identical requests are one entry with all task ids; another provider or verifier is another request."""
    tasks = [api.submit(ADA, enrichments=[833, 966], email_verifier=10) for _ in range(2)]
    api.submit(ADA, enrichments=[966, 833], email_verifier=10)
    api.submit(ADA, enrichments=[833, 966])
    totals = api.audit()
    assert (totals["accepted"], totals["charged"], totals["distinct"]) == (4, 4, 3)
    assert (totals["accepted_more_than_once"], totals["paid_twice"]) == (1, 1)
    entry = totals["runs"][0]
    assert entry["credits"] > 0
    del entry["credits"]
    assert entry == {
        "waterfall": "email_getter",
        "params": ADA,
        "enrichments": [833, 966],
        "email_verifier": 10,
        "accepted": 2,
        "charged": 2,
        "task_ids": tasks,
    }


def test_same_key_for_default_and_named_providers(api: SandboxClient) -> None:
    """A run without enrichments is the same request as one that names the default providers."""
    api.submit(ADA)
    api.submit(ADA, enrichments=[833, 966, 701, 745])
    assert api.audit()["paid_twice"] == 1


def test_totals_alone(api: SandboxClient) -> None:
    """The list of runs can be left out."""
    api.submit()
    totals = api.audit(runs=False)
    assert "runs" not in totals
    assert totals["accepted"] == 1


def test_needs_no_key(api: SandboxClient) -> None:
    """The control endpoints need no key."""
    assert httpx.get(f"{api.root}/__audit", trust_env=False).status_code == 200


def test_counts_requests(api: SandboxClient) -> None:
    """Requests are counted by endpoint, and errors by status; control requests are not counted."""
    task_id = api.submit()
    api.task_body(task_id)
    api.task_body(task_id)
    api.get_task("nothing")
    api.cancel(task_id)
    api.submit_bulk([ADA])
    api.balance()
    api.http.get("/waterfalls/")
    assert api.audit()["requests"] == {
        "run": 1,
        "task": 3,
        "404": 1,
        "cancel": 1,
        "409": 1,
        "bulk_run": 1,
        "me": 1,
        "waterfalls": 1,
    }


def test_credits_are_charged_or_reserved(start: StartSandbox) -> None:
    """Credits missing from the balance are charged or reserved at every moment."""
    api = start(latency="uniform(0,100)", hit_rate=0.7, failure_rate=0.2)
    for number, params in enumerate(make_leads(40)):
        task_id = api.submit(params, enrichments=[833, 966], email_verifier=10)
        if number % 10 == 0:
            api.cancel(task_id)
        if number % 5 == 0:
            api.advance(7)
            assert_totals_add_up(api.audit(runs=False))
    assert api.audit(runs=False)["credits_reserved"] > 0
    api.advance(100)
    totals = api.audit()
    assert_totals_add_up(totals)
    assert totals["credits_reserved"] == 0
    assert totals["credits_charged"] == pytest.approx(sum(run["credits"] for run in totals["runs"]), abs=1e-9)
    spent = sum(api.task_body(run["task_ids"][0])["credits_spent"] for run in totals["runs"])
    assert totals["credits_charged"] == pytest.approx(spent, abs=1e-9)


def test_top_up(start: StartSandbox) -> None:
    """Credits can be added while the sandbox runs, and are reported apart from the initial ones."""
    api = start(balance=0.4)
    assert api.post_run(ADA, enrichments=[833]).status_code == 406
    answer = api.http.post(f"{api.root}/__topup", json={"credits": 0.1})
    assert answer.json() == {"balance": 0.5}
    assert api.post_run(ADA, enrichments=[833]).status_code == 200
    totals = api.audit()
    assert (totals["balance_at_start"], totals["topped_up"]) == (0.4, 0.1)
    assert_totals_add_up(totals)


def test_provider_totals_add_up(start: StartSandbox) -> None:
    """Totals by provider and verifier add up to the charges, whatever the answers show; refunds count for none."""
    api = start(latency="uniform(10,100)", charge_misses=True, hit_rate=0.7, failure_rate=0.2, shape="flat")
    for number, person in enumerate(make_leads(24)):
        task_id = api.submit(person, enrichments=[833, 966], email_verifier=10)
        if number % 6 == 0:
            api.cancel(task_id)
    assert api.audit(runs=False)["by_provider"] == {}
    api.advance(100)
    totals = api.audit(runs=False)

    stats = totals["by_provider"]
    assert set(stats) == {"Mailhound", "Peoplegrid", "Mailproof"}
    assert sum(each["credits"] for each in stats.values()) == pytest.approx(totals["credits_charged"])
    assert stats["Mailhound"]["calls"] <= totals["charged"] <= 20
    assert 0 < stats["Peoplegrid"]["calls"] <= 20 - stats["Mailhound"]["found"]
    assert stats["Mailproof"]["found"] == 0


def test_busiest_second_is_a_sliding_window() -> None:
    """The busiest second may begin anywhere, so a client can't hide bursts in the average."""
    now = 0.0
    busiest = PeakRate(lambda: now)
    for now in (0.0, 0.5, 0.9, 1.0, 1.4, 5.0):  # noqa: B007 - the clock reads it
        busiest.count()
    assert busiest.peak == 4  # from 0.5 to 1.4


def test_busiest_second_counts_all_api_requests(api: SandboxClient) -> None:
    """All API requests count, and control requests do not."""
    for _ in range(3):
        api.submit(ADA)
        api.audit()
    assert api.audit()["busiest_second"] == 3

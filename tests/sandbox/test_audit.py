"""The audit counts what was accepted and charged, so tests need not trust any client."""

from typing import Any

import httpx
import pytest

from enrich.sandbox.middleware import PeakRate
from tests.sandbox.conftest import ADA, SandboxClient, StartSandbox, make_leads


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

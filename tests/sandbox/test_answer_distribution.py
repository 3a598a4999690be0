"""Identical requests get identical answers, at the frequencies of the settings."""

from typing import Any

import pytest

from enrich.sandbox.catalogue import WATERFALLS
from tests.sandbox.conftest import ADA, SandboxClient, StartSandbox, make_leads

REALISTIC: dict[str, Any] = {"hit_rate": 0.7, "failure_rate": 0.015}


def submit_and_collect(api: SandboxClient, rows: list[dict[str, str]], **body: Any) -> list[Any]:
    """Submit each lead; return the answers without the leads' names."""
    names = {"task_id", "request_id"}
    tasks = [api.submit_and_get(params, **body) for params in rows]
    return [{key: value for key, value in task.items() if key not in names} for task in tasks]


@pytest.mark.long
def test_same_answers_in_any_order(start: StartSandbox) -> None:
    """With the same seed, another sandbox gives the same answers in any order of requests."""
    rows = make_leads(30)
    forwards = submit_and_collect(start(**REALISTIC), rows, enrichments=[833, 966])
    backwards = submit_and_collect(start(**REALISTIC), rows[::-1], enrichments=[833, 966])
    assert forwards == backwards[::-1]


def test_different_seed_changes_answers(start: StartSandbox) -> None:
    """Another seed gives other answers."""
    rows = make_leads(10)
    assert submit_and_collect(start(seed=2), rows) != submit_and_collect(start(), rows)


def test_whitespace_and_normal_form_ignored(api: SandboxClient) -> None:
    """NFC, NFD and surrounding spaces make no difference to a request."""
    composed, decomposed = ADA | {"last_name": "B\u00fcron"}, ADA | {"last_name": " Bu\u0308ron "}
    assert submit_and_collect(api, [composed]) == submit_and_collect(api, [decomposed])
    assert api.audit()["distinct"] == 1


@pytest.mark.long
def test_hit_rate(start: StartSandbox) -> None:
    """About 70% of 500 people are found, whichever providers are used."""
    api = start(**REALISTIC)
    for body in ({}, {"enrichments": [833, 966], "email_verifier": 10}, {"enrichments": [701]}):
        data = api.task_body(api.submit_bulk(make_leads(500), **body))["data"]
        assert 0.6 < sum(row is not None for row in data) / 500 < 0.8


def test_failure_rate(start: StartSandbox) -> None:
    """About 1.5% of the tasks fail, some of them free of charge."""
    api = start(**REALISTIC)
    progress = api.task_body(api.submit_bulk(make_leads(1_000)))["progress"]
    totals = api.audit()
    assert 5 <= progress["failed"] <= 30
    assert 0 < totals["accepted"] - sum(run["charged"] for run in totals["runs"]) < progress["failed"]


def test_every_provider_finds_some(start: StartSandbox) -> None:
    """Each requested provider finds someone, the first ones most often."""
    api = start()
    rows = api.task_body(api.submit_bulk(make_leads(200), enrichments=[833, 966, 113]))["data"]
    finders = [row["steps"][-1]["provider"] for row in rows]
    shares = [finders.count(name) for name in ("Mailhound", "Peoplegrid", "Apex Contacts")]
    assert shares[0] == max(shares)
    assert min(shares) > 10


def test_prices_differ() -> None:
    """The catalog has cheap and expensive providers."""
    prices = {provider.cost for waterfall in WATERFALLS.values() for provider in waterfall.providers}
    assert {10_000, 500_000, 1_000_000, 2_000_000} <= prices

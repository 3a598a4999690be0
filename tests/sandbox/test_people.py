"""The same question has the same answer, and answers are as frequent as the settings say."""

from typing import Any

from enrich.sandbox.catalogue import WATERFALLS
from tests.sandbox.conftest import ADA, Api, Start, people

REAL: dict[str, Any] = {"hit_rate": 0.7, "failure_rate": 0.015}


def answers(api: Api, rows: list[dict[str, str]], **body: Any) -> list[Any]:
    """Ask about each lead; give what came, without its names."""
    names = {"task_id", "request_id"}
    tasks = [api.task_of(params, **body) for params in rows]
    return [{key: value for key, value in task.items() if key not in names} for task in tasks]


def test_same_answers_in_any_order(start: Start) -> None:
    """Another sandbox with the same seed gives the same answers, in whatever order it is asked."""
    rows = people(30)
    forwards = answers(start(**REAL), rows, enrichments=[833, 966])
    backwards = answers(start(**REAL), rows[::-1], enrichments=[833, 966])
    assert forwards == backwards[::-1]


def test_another_seed_knows_others(start: Start) -> None:
    """Another seed gives other answers."""
    rows = people(10)
    assert answers(start(seed=2), rows) != answers(start(), rows)


def test_spaces_and_normal_forms_do_not_matter(api: Api) -> None:
    """A question is the same in NFC and NFD, and with spaces around."""
    composed, decomposed = ADA | {"last_name": "B\u00fcron"}, ADA | {"last_name": " Bu\u0308ron "}
    assert answers(api, [composed]) == answers(api, [decomposed])
    assert api.audit()["distinct"] == 1


def test_hit_rate(start: Start) -> None:
    """About 70 % of 500 people are found, whatever providers are asked."""
    api = start(**REAL)
    for body in ({}, {"enrichments": [833, 966], "email_verifier": 10}, {"enrichments": [701]}):
        data = api.task(api.bulk(people(500), **body))["data"]
        assert 0.6 < sum(row is not None for row in data) / 500 < 0.8


def test_failure_rate(start: Start) -> None:
    """About 1.5 % of the tasks fail, some of them free of charge."""
    api = start(**REAL)
    progress = api.task(api.bulk(people(1_000)))["progress"]
    totals = api.audit()
    assert 5 <= progress["failed"] <= 30
    assert 0 < totals["accepted"] - sum(run["charged"] for run in totals["runs"]) < progress["failed"]


def test_every_provider_has_its_share(start: Start) -> None:
    """Each of the asked providers finds somebody, the first ones most often."""
    api = start()
    rows = api.task(api.bulk(people(200), enrichments=[833, 966, 113]))["data"]
    finders = [row["steps"][-1]["provider"] for row in rows]
    shares = [finders.count(name) for name in ("Mailhound", "Peoplegrid", "Apex Contacts")]
    assert shares[0] == max(shares)
    assert min(shares) > 10


def test_prices_differ() -> None:
    """The catalogue has cheap and dear providers."""
    prices = {provider.cost for waterfall in WATERFALLS.values() for provider in waterfall.providers}
    assert {10_000, 500_000, 1_000_000, 2_000_000} <= prices

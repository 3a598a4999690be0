"""What a run finds and costs, and how its result is written."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from enrich.sandbox.answers import ascii_name, domain_of
from enrich.sandbox.catalogue import WATERFALLS
from tests.sandbox.conftest import ADA, SandboxClient, StartSandbox, make_leads
from tests.support.cases import in_turn

# Finished tasks show matches, misses and failures in every documented form at the right price

MAIL: dict[str, Any] = {"enrichments": [833, 966], "email_verifier": 10}


def step_costs(wrapper: Any) -> Decimal:
    """Sum the costs of a wrapper's steps."""
    return sum((Decimal(step["cost"]) for step in wrapper["steps"]), Decimal(0))


def test_running(start: StartSandbox) -> None:
    """A running task has no data and has spent nothing."""
    api = start(latency="fixed(60)")
    task = api.task_body(api.submit())
    del task["task_id"], task["request_id"]
    assert task == {"status": "processing", "data": None, "error": None, "credits_spent": 0.0}


def test_wrapped_match(api: SandboxClient) -> None:
    """A match is a list of one wrapper, whose steps sum to the credits spent."""
    task = api.task_body(api.submit(**MAIL))
    [wrapper] = task["data"]
    assert task["status"] == "completed"
    assert wrapper["result"]["email"].endswith("@engine.example")
    assert wrapper["result_field"] == ["email"]
    finder = next(step for step in wrapper["steps"] if step["result"] == "found" and step["is_verified"])
    assert wrapper["enrichment_data"][finder["provider"]]["email"] == wrapper["result"]["email"]
    assert finder.keys() == {"action", "provider", "result", "details", "cost", "is_verified", "provider_logo"}
    assert step_costs(wrapper) == Decimal(str(task["credits_spent"])) > 0


def test_other_shapes(start: StartSandbox) -> None:
    """The same match can be a bare wrapper, a flat object, or a list of one."""
    [wrapper] = start().submit_and_get(**MAIL)["data"]
    assert start(shape="wrapper_object").submit_and_get(**MAIL)["data"] == wrapper
    assert start(shape="flat").submit_and_get(**MAIL)["data"] == wrapper["result"]
    assert start(shape="flat_list").submit_and_get(**MAIL)["data"] == [wrapper["result"]]


@pytest.mark.parametrize(
    ("kind", "data"),
    [("null", None), ("empty_list", []), ("empty_object", {}), ("no_data", None)],
)
def test_no_match_without_data(start: StartSandbox, kind: str, data: Any) -> None:
    """A miss can be completed without any data, free of charge."""
    task = start(hit_rate=0.0, miss_kinds=(kind,), no_data_seconds=0.0).submit_and_get()
    assert (task["status"], task["data"], task["error"], task["credits_spent"]) == ("completed", data, None, 0)


@pytest.mark.parametrize(("kind", "value"), [("null_result", None), ("blank_result", "")])
def test_no_match_with_empty_fields(start: StartSandbox, kind: str, value: str | None) -> None:
    """A miss can be a wrapper whose output fields are all null or blank."""
    api = start(hit_rate=0.0, miss_kinds=(kind,))
    [wrapper] = api.task_body(api.submit({"email": "ada@engine.example"}, "person_getter"))["data"]
    assert wrapper["result"] == dict.fromkeys(("first_name", "last_name", "linkedin_url"), value)
    assert [step["result"] for step in wrapper["steps"]] == ["not_found", "not_found"]
    assert step_costs(wrapper) == 0


def test_no_data_becomes_completed(start: StartSandbox) -> None:
    """The status `no_data` becomes `completed` after its time."""
    api = start(hit_rate=0.0, miss_kinds=("no_data",), no_data_seconds=60.0)
    task_id = api.submit()
    assert (api.task_body(task_id)["status"], api.task_body(task_id)["data"]) == ("no_data", None)
    api.advance(61)
    assert (api.task_body(task_id)["status"], api.task_body(task_id)["data"]) == ("completed", None)


def test_no_data_can_be_final(start: StartSandbox) -> None:
    """The status `no_data` can be final."""
    api = start(hit_rate=0.0, miss_kinds=("no_data",), no_data_seconds=None)
    task_id = api.submit()
    api.advance(3_600)
    assert api.task_body(task_id)["status"] == "no_data"


@pytest.mark.long
def test_no_match_shapes_all_occur(start: StartSandbox) -> None:
    """The misses of a longer list include all kinds."""
    api = start(hit_rate=0.0)
    seen: Counter[tuple[str, str]] = Counter()
    for params in make_leads(60):
        task = api.task_body(api.submit(params))
        shape = "wrapper" if task["data"] else repr(task["data"])
        seen[task["status"], shape] += 1
    assert seen.keys() == {
        ("completed", "None"),
        ("completed", "[]"),
        ("completed", "{}"),
        ("completed", "wrapper"),
        ("no_data", "None"),
    }


def test_no_match_can_be_charged(start: StartSandbox) -> None:
    """Where misses are charged, each provider that was used costs its price."""
    task = start(hit_rate=0.0, charge_misses=True).submit_and_get(enrichments=[833, 966])
    assert task["credits_spent"] == 1.5


def test_free_failure_succeeds_on_retry(start: StartSandbox) -> None:
    """A free failure costs nothing, has no data, and succeeds on a retry."""
    api = start(failure_rate=1.0, free_failures=1.0)
    task = api.task_body(api.submit())
    assert (task["status"], task["data"], task["credits_spent"]) == ("failed", None, 0)
    assert task["error"]
    statuses = [api.task_body(api.submit())["status"] for _ in range(2)]
    assert statuses[-1] == "completed"
    [asked] = api.audit()["runs"]
    assert asked["accepted"] - asked["charged"] == 1 + statuses.count("failed")


def test_charged_failure_repeats(start: StartSandbox) -> None:
    """A charged failure fails and is charged again on a retry."""
    api = start(failure_rate=1.0, free_failures=0.0)
    first, second = api.task_body(api.submit(enrichments=[833])), api.task_body(api.submit(enrichments=[833]))
    assert (first["status"], first["credits_spent"]) == ("failed", 0.5)
    assert second["error"] == first["error"]
    assert api.audit()["paid_twice"] == 1


def test_errors_are_texts_and_lists(start: StartSandbox) -> None:
    """The error of a failure is a text or a list."""
    api = start(failure_rate=1.0)
    assert {type(api.task_body(api.submit(params))["error"]) for params in make_leads(20)} == {str, list}


def test_charged_failures_may_show_steps(start: StartSandbox) -> None:
    """Some charged failures have data with their steps."""
    api = start(failure_rate=1.0, free_failures=0.0)
    shown = [api.task_body(api.submit(params))["data"] for params in make_leads(20)]
    wrappers = [data[0] for data in shown if data]
    assert 0 < len(wrappers) < 20
    assert all(step_costs(wrapper) == Decimal("0.5") for wrapper in wrappers)


def test_aliases(start: StartSandbox) -> None:
    """The statuses can be `success` and `error`."""
    assert start(aliases=True).submit_and_get()["status"] == "success"
    assert start(aliases=True, failure_rate=1.0).submit_and_get()["status"] == "error"


def test_credits_may_be_hidden(start: StartSandbox) -> None:
    """A task can leave out its credits."""
    assert "credits_spent" not in start(hide_credits=True).submit_and_get()


def test_rejected_matches_cost_verification(start: StartSandbox) -> None:
    """With a verifier, some misses cost the verification of rejected matches, shown in their steps."""
    api = start(hit_rate=0.0, miss_kinds=("null_result",))
    for params in make_leads(30):
        task = api.task_body(api.submit(params, **MAIL))
        rejected = [step for step in task["data"][0]["steps"] if step["result"] == "invalid"]
        assert task["data"][0]["result"] == {"email": None}
        assert task["credits_spent"] == 0.01 * len(rejected)
    assert api.audit()["credits_charged"] > 0


def test_max_price_is_reserved_and_settled(start: StartSandbox) -> None:
    """The maximum price is reserved at submission, and the difference to the actual price is refunded at completion."""
    api = start(latency="fixed(60)")
    task_id = api.submit(**MAIL)
    assert api.balance() == 10_000 - (0.5 + 1 + 2 * 0.01)
    api.advance(61)
    spent = api.task_body(task_id)["credits_spent"]
    assert api.balance() == pytest.approx(10_000 - spent, abs=1e-9)
    assert spent in {0.51, 1.01, 1.02}


def test_default_providers(start: StartSandbox) -> None:
    """Without enrichments the enabled providers are used in order; a missing param skips a provider."""
    api = start(hit_rate=0.0, miss_kinds=("null_result",))
    [wrapper] = api.task_body(api.submit())["data"]
    assert [step["provider"] for step in wrapper["steps"]] == ["Mailhound", "Peoplegrid", "Inboxly"]
    [wrapper] = api.task_body(api.submit({**ADA, "linkedin": "https://linkedin.example/in/ada"}))["data"]
    assert [step["provider"] for step in wrapper["steps"]][-1] == "Profilewell"
    assert api.audit()["runs"][0]["enrichments"] == [833, 966, 701, 745]


def test_request_sets_provider_order(start: StartSandbox) -> None:
    """The providers are used in the order of the request."""
    api = start(hit_rate=0.0, miss_kinds=("null_result",))
    [wrapper] = api.task_body(api.submit(enrichments=[966, 113, 833]))["data"]
    assert [step["provider"] for step in wrapper["steps"]] == ["Peoplegrid", "Apex Contacts", "Mailhound"]


def test_nested_result_fields(api: SandboxClient) -> None:
    """Some results contain objects and lists."""
    result = api.task_body(api.submit({"company_website": "engine.example"}, "company_lookup"))["data"][0]["result"]
    assert isinstance(result["funding"]["total"], int)
    assert isinstance(result["industries"], list)


@in_turn(
    ("name", "spelt"),
    [
        ("Zoë", "zoe"),
        ("Łukasz", "lukasz"),
        ("Jean-Luc", "jeanluc"),
        ("O'Neil", "oneil"),
        ("김", "gim"),
        ("王", "738b"),
        ("Жанна", "zheaenena"),
        ("Æsa", "aesa"),
        ("…", ""),
    ],
)
def test_names_become_ascii(name: str, spelt: str) -> None:
    """Any name becomes ASCII in an email address."""
    assert ascii_name(name) == spelt


@in_turn(
    ("company", "domain"),
    [
        ("engine.example", "engine.example"),
        ("https://www.Engine.example/about", "engine.example"),
        ("Engine & Söhne", "engine-sohne.example"),
        ("...", "company.example"),
    ],
)
def test_companies_have_domains(company: str, domain: str) -> None:
    """A company has the given domain, or one made from its name."""
    assert domain_of(company) == domain


def test_phones_are_fictional(api: SandboxClient) -> None:
    """Phone numbers are from a range reserved for fiction."""
    for number in range(5):
        task = api.task_body(api.submit({"linkedin": f"https://linkedin.example/in/{number}"}, "phone_getter"))
        assert "-555-01" in task["data"][0]["result"]["phone"]


# Identical requests get identical answers, at the frequencies of the settings

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
